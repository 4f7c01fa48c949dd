"""One file per piece of hardware, all behind `pilab.ports`; they never import each other."""
