"""The DUT's GPIO lines as its own kernel describes them: names, holders, directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class GpioLine:
    """
    A line of a GPIO chip of the DUT.

    Args:
        name: "GPIO17".
        consumer: Who holds it; empty if nobody does or it gave no name.
        direction: "in" or "out".
        used: Whether the kernel or somebody else holds it.
    """

    name: str
    consumer: str
    direction: str
    used: bool


def read_lines_on_dut() -> list[list[Any]]:
    """
    Return [name, consumer, is_output, used] of every named line; runs on the DUT.

    Source: linux/gpio.h: GPIO_GET_CHIPINFO_IOCTL and GPIO_V2_GET_LINEINFO_IOCTL with their
    structures of 68 and 256 bytes; flag bits 0 (used) and 3 (output).
    """
    import fcntl
    import glob
    import struct

    lines = []
    for path in sorted(glob.glob("/dev/gpiochip*")):
        with open(path, "rb", buffering=0) as chip:
            info = bytearray(68)
            fcntl.ioctl(chip, 0x8044B401, info)
            for offset in range(struct.unpack_from("I", info, 64)[0]):
                line = bytearray(256)
                struct.pack_into("I", line, 64, offset)
                fcntl.ioctl(chip, 0xC100B405, line)
                name = bytes(line[:32]).split(b"\0")[0].decode()
                consumer = bytes(line[32:64]).split(b"\0")[0].decode()
                flags = struct.unpack_from("Q", line, 72)[0]
                if name:
                    lines.append([name, consumer, bool(flags & 8), bool(flags & 1)])
    return lines


def lines_by_name(rows: list[list[Any]]) -> dict[str, GpioLine]:
    """Return what `read_lines_on_dut` returned, by line name."""
    return {
        name: GpioLine(name, consumer, "out" if output else "in", used)
        for name, consumer, output, used in rows
    }
