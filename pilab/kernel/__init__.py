"""Building modules and reading what was built: headers, kbuild, preflight, symbols."""
