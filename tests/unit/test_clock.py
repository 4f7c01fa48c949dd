"""Deadlines on a clock that only moves when told to."""

from __future__ import annotations

import pytest

from pilab.clock import Deadline, ManualClock


def test_deadline_expires_when_its_time_has_passed() -> None:
    """A deadline counts down in its own clock's time and then stays at zero."""
    clock = ManualClock()
    deadline = Deadline(1.0, clock)
    clock.advance(0.75)
    assert deadline.remaining_s() == pytest.approx(0.25)
    assert not deadline.expired
    clock.advance(0.25)
    assert deadline.remaining_s() == 0.0
    assert deadline.expired


def test_deadline_zero_polls_and_none_never_expires() -> None:
    """0 is expired from the start; None never is."""
    clock = ManualClock()
    assert Deadline(0, clock).expired
    never = Deadline(None, clock)
    clock.advance(1e6)
    assert never.remaining_s() is None
    assert not never.expired


def test_deadline_refuses_a_negative_time() -> None:
    """A negative time is a bug of the caller."""
    with pytest.raises(ValueError, match=r"-1 s"):
        Deadline(-1)


def test_deadline_forgives_starvation_up_to_its_limit() -> None:
    """Time for which the DUT got no processor does not count, but not without end."""
    clock = ManualClock()
    starved = [5_000_000_000]
    deadline = Deadline(0.1, clock, lambda: starved[0], starved_limit_s=2.0)
    clock.advance(0.2)
    assert deadline.expired, "starvation from before the deadline began does not count"
    starved[0] += 150_000_000
    assert deadline.remaining_s() == pytest.approx(0.05)
    clock.advance(5.0)
    starved[0] += 60_000_000_000
    assert deadline.expired, "no more than the limit is forgiven"
