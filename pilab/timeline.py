"""Everything that happened in a run, on one clock."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence

from pilab.clock import Clock, Deadline, MonotonicClock
from pilab.events import Event

Sink = Callable[[Event], None]


class Timeline:
    """
    An append-only list of events that one can wait on.

    Threads may share it: board, console and agent add to it from threads of their own.
    Events lie in the order in which they were added; their `t_ns` may be slightly out of
    order, for a kernel's timestamp is older than its arrival. Sinks are called in order,
    one at a time, in the thread that adds; they must not wait.

    Args:
        dut: Name of the DUT, put on every event that has none.
        clock: The clock of `now_ns`.
    """

    def __init__(self, dut: str = "", clock: Clock | None = None) -> None:
        self.dut = dut
        self.clock: Clock = clock or MonotonicClock()
        self.experiment = ""
        self._events: list[Event] = []
        self._sinks: list[Sink] = []
        self._changed = threading.Condition()

    def now_ns(self) -> int:
        """Return the time of the timeline's clock, in ns."""
        return self.clock.now_ns()

    def add(self, event: Event) -> Event:
        """Append an event, labelled with DUT and experiment, and return it so labelled."""
        with self._changed:
            event = dataclasses.replace(
                event,
                dut=event.dut or self.dut,
                experiment=event.experiment or self.experiment,
            )
            self._events.append(event)
            self._changed.notify_all()
            for sink in self._sinks:
                sink(event)
        return event

    def add_sink(self, sink: Sink) -> None:
        """Call `sink` with every event from now on."""
        with self._changed:
            self._sinks.append(sink)

    def remove_sink(self, sink: Sink) -> None:
        """No longer call `sink`; nothing happens if it is not there."""
        with self._changed:
            if sink in self._sinks:
                self._sinks.remove(sink)

    def forget(self) -> None:
        """Drop the events in memory; marks taken before are void. Sinks have them all."""
        with self._changed:
            self._events.clear()

    def mark(self) -> int:
        """Return the position after the newest event, for `since` and `wait`."""
        with self._changed:
            return len(self._events)

    def since(self, mark: int = 0) -> Sequence[Event]:
        """Return the events added after `mark`, oldest first."""
        with self._changed:
            return tuple(self._events[mark:])

    def wait(
        self, matches: Callable[[Event], bool], deadline: Deadline, mark: int | None = None
    ) -> Event | None:
        """
        Return the first event after `mark` for which `matches` is true.

        Args:
            matches: Called once per event, in the waiting thread.
            deadline: How long to wait; a timeout of 0 s polls.
            mark: Where to begin; None: only what is added from now on.

        Returns:
            The event, or None if the deadline passed first.
        """
        with self._changed:
            position = len(self._events) if mark is None else mark
            while True:
                while position < len(self._events):
                    event = self._events[position]
                    position += 1
                    if matches(event):
                        return event
                remaining_s = deadline.remaining_s()
                if remaining_s == 0.0:
                    return None
                self._changed.wait(remaining_s)
