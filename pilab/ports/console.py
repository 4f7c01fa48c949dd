"""The DUT's serial console."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

ConsoleSink = Callable[[int, bytes], None]
"""Called with (arrival in host CLOCK_MONOTONIC ns, one or more bytes)."""


class Console(Protocol):
    """
    A serial line that is always drained, whoever is or isn't interested.

    A thread of the console's own reads from the moment it is opened; bytes that arrive before
    `listen` are kept and given to the first sink.
    """

    def listen(self, sink: ConsoleSink) -> None:
        """Call `sink` with everything that arrives, in order, in the reader's thread."""

    def write(self, data: bytes) -> None:
        """Send bytes to the DUT; raises BenchError if they cannot be sent."""

    def send_break(self) -> None:
        """Send a BREAK, as magic SysRq on a serial line wants it."""

    def drain(self, timeout_s: float) -> None:
        """
        Return when every byte that has reached the host has been given to the sink.

        Raises:
            LinkTimeoutError: Bytes kept coming for longer than `timeout_s`.
        """

    def close(self) -> None:
        """Stop reading. Idempotent."""
