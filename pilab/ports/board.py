"""The second GPIO board: drives the DUT's inputs, watches its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from pilab.events import Level
from pilab.ports.capability import Capability


@dataclass(frozen=True, slots=True)
class BoardEdge:
    """
    An edge that the board saw on one of its lines.

    Args:
        t_ns: Host CLOCK_MONOTONIC, ns: the board's own stamp mapped to it, else the arrival.
        offset: The board's line.
        level: The level after the edge.
        seq: Sequence number on this line, counted by the board; None if it has none.
    """

    t_ns: int
    offset: int
    level: Level
    seq: int | None = None


EdgeSink = Callable[[BoardEdge], None]


class Board(Protocol):
    """
    A set of lines, each wired to a line of the DUT.

    Every line is an input that drives nothing until `drive`. Threads may share a board.
    All methods raise BenchError when the board is gone; `close` never does.
    """

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What this board can do."""

    @property
    def offsets(self) -> frozenset[int]:
        """The lines that exist."""

    def drive(self, offset: int, level: Level) -> int:
        """
        Drive a line and return when it was done, host CLOCK_MONOTONIC ns.

        On return the DUT's input has that level.

        Raises:
            ValueError: No such line, or it is being watched.
        """

    def drive_together(self, levels: dict[int, Level]) -> int:
        """Drive several lines at the same instant of the DUT's time; else as `drive`."""

    def release(self, offset: int) -> None:
        """Drive the line no longer."""

    def level(self, offset: int) -> Level:
        """Return the line's present level."""

    def watch(self, offsets: Iterable[int], sink: EdgeSink) -> None:
        """
        From now on call `sink` with every edge of these lines, in a thread of the board's own.

        What happened earlier is not told. A board has one sink; a second call replaces it.

        Raises:
            ValueError: No such line, or it is being driven.
        """

    def sync(self) -> None:
        """Return when every edge that happened before this call has been given to the sink."""

    def close(self) -> None:
        """Release every line and stop. Idempotent."""
