"""The JSON form of events."""

from __future__ import annotations

import json

import pytest

from pilab.events import (
    KINDS,
    Action,
    ClockMapped,
    ConsoleLine,
    CrashSeen,
    Driver,
    Edge,
    EdgeKind,
    Event,
    ExperimentStarted,
    InterruptCount,
    Level,
    ModuleBuilt,
    Note,
    Verdict,
    VerdictGiven,
    from_json,
    to_json,
)

EVENTS: list[Event] = [
    Edge(t_ns=1, dut="6.1-0", wire="led_a", line="GPIO5", level=Level.HIGH, driver=Driver.DUT),
    ConsoleLine(t_ns=2, text="hello", kernel_us=17, level=6, truncated=True),
    Action(t_ns=3, verb="press", subject="button_a", end_ns=4, errno=None),
    InterruptCount(t_ns=4, name="pilab-irq-button", irq=45, count=2),
    CrashSeen(t_ns=5, cause="panic", summary="kernel panic"),
    ExperimentStarted(t_ns=6, experiment="hello", kernel="6.12"),
    VerdictGiven(
        t_ns=7, kernel="6.1", verdict=Verdict.PASS, reason="", duration_s=0.5, counts={"edges": 2}
    ),
    ClockMapped(t_ns=8, offset_ns=-5, error_ns=1, printk_offset_ns=7, printk_error_ns=2),
    ModuleBuilt(t_ns=9, name="hello", kernel="6.1", sha256="00", path="hello.ko"),
    Note(t_ns=10, text="press 3000 times"),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.kind)
def test_event_survives_json(event: Event) -> None:
    """An event written to events.jsonl comes back equal, its enums included."""
    back = from_json(json.loads(json.dumps(to_json(event))))
    assert back == event
    assert type(back) is type(event)


def test_every_kind_is_tried_above() -> None:
    """A new kind of event cannot be forgotten in the test above."""
    assert {event.kind for event in EVENTS} == set(KINDS)


def test_edge_revives_its_enums() -> None:
    """A level read back is a Level, not a number."""
    edge = from_json(json.loads(json.dumps(to_json(EVENTS[0]))))
    assert isinstance(edge, Edge)
    assert edge.level is Level.HIGH
    assert edge.driver is Driver.DUT
    assert edge.word == "rising"


@pytest.mark.parametrize(
    "data", [{"kind": "nonsense", "t_ns": 1}, {"kind": "note", "t_ns": 1}, {"t_ns": 1}]
)
def test_from_json_refuses_what_is_no_event(data: dict[str, object]) -> None:
    """An unknown kind or a missing field is a ValueError that names it."""
    with pytest.raises(ValueError, match="event"):
        from_json(data)


@pytest.mark.parametrize(
    ("kind", "level", "matches"),
    [
        (EdgeKind.RISING, Level.HIGH, True),
        (EdgeKind.RISING, Level.LOW, False),
        (EdgeKind.FALLING, Level.LOW, True),
        (EdgeKind.FALLING, Level.HIGH, False),
        (EdgeKind.ANY, Level.LOW, True),
        (EdgeKind.ANY, Level.HIGH, True),
    ],
)
def test_edge_kind_matches_the_level_it_ends_at(
    kind: EdgeKind, level: Level, matches: bool
) -> None:
    """A rising edge ends high, a falling one low, any edge anywhere."""
    assert kind.matches(level) is matches
