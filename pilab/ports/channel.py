"""A stream of bytes to the agent."""

from __future__ import annotations

from typing import Protocol


class Channel(Protocol):
    """
    A full-duplex byte stream: a virtio-serial port, the standard streams of an SSH session.

    It may lose, repeat or garble bytes when the DUT crashes; the agent's framing copes.
    """

    def open(self, timeout_s: float) -> None:
        """Connect, dropping whatever was under way; raises BenchError."""

    def send(self, data: bytes) -> None:
        """Send all of `data`; raises BenchError if the other side is gone or does not read."""

    def receive(self, timeout_s: float | None) -> bytes:
        """
        Return the next bytes, at least one.

        Returns:
            b"" when `timeout_s` passed without any. None waits for ever.

        Raises:
            BenchError: The stream ended or was closed.
        """

    def close(self) -> None:
        """Disconnect; a `receive` in another thread ends. Idempotent."""
