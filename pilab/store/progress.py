"""Telling a person what takes long."""

from __future__ import annotations

import threading
import time
from typing import Protocol, TextIO


class Progress(Protocol):
    """Told of work that may take longer than two seconds; threads may share it."""

    def start(self, task: str, total_bytes: int | None) -> None:
        """A task began; `total_bytes` if it is known how much there is to do."""

    def advance(self, task: str, done_bytes: int) -> None:
        """So much of it is done by now, in all."""

    def done(self, task: str) -> None:
        """It ended."""


class PlainProgress:
    """
    One line per task that takes longer than a moment.

    Args:
        stream: Where to write.
        after_s: What is done sooner is not worth a line.
    """

    def __init__(self, stream: TextIO, after_s: float = 2.0) -> None:
        self._stream = stream
        self._after_s = after_s
        self._tasks: dict[str, tuple[float, threading.Timer]] = {}

    def start(self, task: str, total_bytes: int | None) -> None:
        """See `Progress.start`."""
        size = "" if total_bytes is None else f" ({total_bytes / 1e6:.0f} MB)"
        timer = threading.Timer(self._after_s, self._say, [f"{task}{size} ..."])
        timer.daemon = True
        timer.start()
        self._tasks[task] = (time.monotonic(), timer)

    def advance(self, task: str, done_bytes: int) -> None:
        """See `Progress.advance`; not worth a line."""

    def done(self, task: str) -> None:
        """See `Progress.done`."""
        start_s, timer = self._tasks.pop(task, (time.monotonic(), None))
        if timer is not None:
            timer.cancel()
        taken_s = time.monotonic() - start_s
        if taken_s >= self._after_s:
            self._say(f"{task}: {taken_s:.1f} s")

    def _say(self, text: str) -> None:
        self._stream.write(f"pilab: {text}\n")
        self._stream.flush()
