"""printk lines between two markers."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable

from pilab.clock import Deadline
from pilab.errors import LinkTimeoutError
from pilab.events import ConsoleLine, Event
from pilab.timeline import Timeline

MARKER = "pilab-marker"
MARKER_TIMEOUT_S = 5.0


class PrintkLog:
    """
    What the kernel printed on the console between two markers.

    The markers go through /dev/kmsg and so are in order with printk; their level 0 always
    reaches the console. Use it in a `with`; afterwards `lines` is complete and fixed. Within
    the block it holds what has arrived so far.

    Args:
        timeline: Where console lines appear.
        write_kmsg: Writes one record to the DUT's /dev/kmsg.
        deadline: Makes a deadline of so many seconds.
    """

    def __init__(
        self,
        timeline: Timeline,
        write_kmsg: Callable[[bytes], object],
        deadline: Callable[[float], Deadline],
    ) -> None:
        self._timeline = timeline
        self._write_kmsg = write_kmsg
        self._deadline = deadline
        self._start = 0
        self._end_marker = ""

    @property
    def lines(self) -> list[str]:
        """Texts of the lines, without time stamps, oldest first."""
        lines = []
        for event in self._timeline.since(self._start):
            if isinstance(event, ConsoleLine):
                if self._end_marker and event.text == self._end_marker:
                    break
                if not event.text.startswith(MARKER):
                    lines.append(event.text)
        return lines

    def matching(self, pattern: str) -> list[str]:
        """Return the lines in which the regular expression is found."""
        return [line for line in self.lines if re.search(pattern, line)]

    def __enter__(self) -> PrintkLog:
        marker = self._mark("begin")
        events = self._timeline.since(0)
        self._start = 1 + max(i for i, event in enumerate(events) if _is_line(event, marker))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        if kind is None:
            self._end_marker = self._mark("end")

    def _mark(self, word: str) -> str:
        marker = f"{MARKER} {word} {secrets.token_hex(4)}"
        start = self._timeline.mark()
        self._write_kmsg(f"<0>{marker}\n".encode())
        deadline = self._deadline(MARKER_TIMEOUT_S)
        if self._timeline.wait(lambda event: _is_line(event, marker), deadline, start) is None:
            raise LinkTimeoutError("console", f"line {marker!r}", MARKER_TIMEOUT_S)
        return marker


def _is_line(event: Event, text: str) -> bool:
    return isinstance(event, ConsoleLine) and event.text == text
