"""Rows of /proc/interrupts."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from pilab.clock import Deadline
from pilab.errors import CheckError

PATH = "/proc/interrupts"

# What follows the counts: "9030000.pl061   0 Edge      name, other name"
_TAIL = re.compile(r"(?P<chip>\S.*?)\s+(?P<hwirq>\d+)\s+(?P<trigger>Edge|Level)\s*(?P<actions>.*)")


@dataclass(frozen=True, slots=True)
class InterruptRow:
    """
    One numbered row.

    Args:
        irq: Linux's number.
        counts: Interrupts per processor.
        chip: The controller: "9030000.pl061".
        hwirq: The controller's own number.
        trigger: "Edge" or "Level".
        actions: Names of the handlers, in the kernel's order.
    """

    irq: int
    counts: tuple[int, ...]
    chip: str
    hwirq: int
    trigger: str
    actions: tuple[str, ...]

    @property
    def total(self) -> int:
        """Interrupts on all processors."""
        return sum(self.counts)


def parse_interrupts(text: str) -> list[InterruptRow]:
    """Return the numbered rows of /proc/interrupts; others (IPI0, Err) are left out."""
    header, *lines = text.splitlines() or [""]
    cpus = len(header.split())
    rows = []
    for line in lines:
        # A chip's name may begin with a digit, so the header says how many counts there are.
        words = line.split(None, cpus + 1)
        if len(words) < cpus + 2:
            continue
        head, tail = " ".join(words[: cpus + 1]), words[cpus + 1]
        match = _TAIL.fullmatch(tail)
        number, *counts = head.split()
        if match is None or not number.rstrip(":").isdigit():
            continue
        actions = tuple(name.strip() for name in match["actions"].split(",") if name.strip())
        rows.append(
            InterruptRow(
                irq=int(number.rstrip(":")),
                counts=tuple(int(count) for count in counts),
                chip=match["chip"],
                hwirq=int(match["hwirq"]),
                trigger=match["trigger"],
                actions=actions,
            )
        )
    return rows


class InterruptCounter:
    """
    Interrupts handled under one name, counted from when this was made.

    Args:
        name: The handler's name as /proc/interrupts has it: "pilab-irq-button".
        read_rows: Reads /proc/interrupts anew.
        deadline: Makes a deadline of so many seconds.
        on_read: Told of every reading: (name, irq or None, count).
    """

    def __init__(
        self,
        name: str,
        read_rows: Callable[[], list[InterruptRow]],
        deadline: Callable[[float], Deadline],
        on_read: Callable[[str, int | None, int], None],
    ) -> None:
        self.name = name
        self._read_rows = read_rows
        self._deadline = deadline
        self._on_read = on_read
        self._start = self.value()

    @property
    def row(self) -> InterruptRow | None:
        """The row that has this name now; None if there is none."""
        return next((row for row in self._read_rows() if self.name in row.actions), None)

    def value(self) -> int:
        """Return the row's count over all processors; 0 without a row."""
        row = self.row
        count = 0 if row is None else row.total
        self._on_read(self.name, None if row is None else row.irq, count)
        return count

    def since_start(self) -> int:
        """Return how many interrupts came since this counter was made."""
        return self.value() - self._start

    def expect(self, count: int, *, within_s: float = 0.5) -> None:
        """
        Wait until exactly `count` interrupts came since the start.

        Raises:
            CheckError: Fewer came in `within_s` seconds, or more.
        """
        deadline = self._deadline(within_s)
        while (seen := self.since_start()) < count and not deadline.expired:
            pass  # each reading takes a round trip to the DUT: this does not spin
        if seen != count:
            row = self.row
            what = f"{seen}" if row is not None else "no such row"
            raise CheckError(f"interrupts of {self.name}", f"exactly {count}", what)
