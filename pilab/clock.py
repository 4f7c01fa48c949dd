"""One clock: the host's CLOCK_MONOTONIC, in integer nanoseconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

NS_PER_S = 1_000_000_000


class Clock(Protocol):
    """Whatever tells the time of the timeline."""

    def now_ns(self) -> int:
        """Return the time in ns; it never goes back."""


class MonotonicClock:
    """The host's CLOCK_MONOTONIC."""

    def now_ns(self) -> int:
        """Return CLOCK_MONOTONIC in ns."""
        return time.monotonic_ns()


@dataclass
class ManualClock:
    """A clock for tests: it moves when it is told to."""

    t_ns: int = 0

    def now_ns(self) -> int:
        """Return the time last set, in ns."""
        return self.t_ns

    def advance(self, seconds: float) -> None:
        """Move on by `seconds`."""
        self.t_ns += seconds_to_ns(seconds)


def seconds_to_ns(seconds: float) -> int:
    """Return whole ns; ValueError if `seconds` is negative."""
    if seconds < 0:
        raise ValueError(f"a time must not be negative: {seconds} s")
    return round(seconds * NS_PER_S)


def _never() -> int:
    return 0


@dataclass
class Deadline:
    """
    A point in time until which something may be waited for.

    A virtual DUT that got no processor cannot be blamed for being late, so time during
    which the host starved it does not count; on real hardware nothing starves it.

    Args:
        timeout_s: How long, in seconds; None never expires, 0 is expired at once (a poll).
        clock: The clock that counts.
        starved_ns: Returns for how many ns, in all, the DUT wanted to run and could not.
        starved_limit_s: How much starvation is forgiven at most.

    Raises:
        ValueError: `timeout_s` is negative.
    """

    timeout_s: float | None
    clock: Clock = field(default_factory=MonotonicClock)
    starved_ns: Callable[[], int] = _never
    starved_limit_s: float = 30.0

    def __post_init__(self) -> None:
        self._start_ns = self.clock.now_ns()
        self._starved_start_ns = self.starved_ns()
        self._timeout_ns = None if self.timeout_s is None else seconds_to_ns(self.timeout_s)

    @property
    def elapsed_ns(self) -> int:
        """Time since the start on the wall, in ns, starvation included."""
        return self.clock.now_ns() - self._start_ns

    def remaining_s(self) -> float | None:
        """
        Return the seconds left: None if it never expires, 0.0 once it has.

        May rise again while the DUT is starved: ask again before giving up.
        """
        if self._timeout_ns is None:
            return None
        left = self._timeout_ns - self.elapsed_ns
        if left <= 0 and self._timeout_ns:
            starved = self.starved_ns() - self._starved_start_ns
            left += min(starved, seconds_to_ns(self.starved_limit_s))
        return max(left, 0) / NS_PER_S

    @property
    def expired(self) -> bool:
        """Whether no time is left."""
        return self.remaining_s() == 0.0
