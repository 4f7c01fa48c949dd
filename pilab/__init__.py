"""A hardware-in-the-loop lab for Linux kernel modules on the Raspberry Pi."""

__version__ = "0.1.0"
