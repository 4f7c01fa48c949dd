"""
What can happen in a run: one frozen class per kind of event.

All times `t_ns` are the host's CLOCK_MONOTONIC in ns. `to_json` and `from_json` are the
form of `events.jsonl`: one object per event with its `kind`, the `dut` it happened on and
the `experiment` it belongs to (empty outside of one).
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from dataclasses import dataclass
from typing import Any, ClassVar


class Level(enum.IntEnum):
    """The electrical level of a line."""

    LOW = 0
    HIGH = 1

    def __str__(self) -> str:
        return self.name.lower()


class EdgeKind(enum.Enum):
    """Which way a line moved."""

    RISING = "rising"
    FALLING = "falling"
    ANY = "any"

    def matches(self, level: Level) -> bool:
        """Whether an edge that ended at `level` is of this kind."""
        return self is EdgeKind.ANY or (self is EdgeKind.RISING) == (level is Level.HIGH)


class Driver(enum.StrEnum):
    """Who moved a line."""

    BOARD = "board"
    DUT = "dut"


class Verdict(enum.StrEnum):
    """How an experiment ended."""

    PASS = "PASS"
    FAIL = "FAIL"
    CRASH = "CRASH"
    ERROR = "ERROR"
    SKIP = "SKIP"


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """
    Something that happened.

    Args:
        t_ns: When, host CLOCK_MONOTONIC, ns.
        dut: Name of the DUT instance, such as "6.1-0".
        experiment: Name of the experiment in progress, or "".
    """

    kind: ClassVar[str] = "event"
    t_ns: int
    dut: str = ""
    experiment: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Edge(Event):
    """
    A wire changed its level.

    Args:
        wire: The wire's name: "led_a".
        line: The DUT's line: "GPIO5".
        level: The level after the edge.
        driver: Who moved it.
        kernel_ns: The board's own timestamp where it has one, mapped to the host's clock.
        seq: The board's sequence number on this line where it has one.
    """

    kind: ClassVar[str] = "edge"
    wire: str
    line: str
    level: Level
    driver: Driver
    kernel_ns: int | None = None
    seq: int | None = None

    @property
    def word(self) -> str:
        """ "rising" or "falling"."""
        return "rising" if self.level is Level.HIGH else "falling"


@dataclass(frozen=True, kw_only=True, slots=True)
class ConsoleLine(Event):
    """
    A line of the serial console; `t_ns` is the arrival of its first byte.

    Args:
        text: The line without its time stamp and line end; undecodable bytes as \\xNN.
        kernel_us: printk's own time in us where the line has one.
        level: printk level 0..7 where known.
        truncated: The line ended without a line end: restored, rebooted or closed.
    """

    kind: ClassVar[str] = "console"
    text: str
    kernel_us: int | None = None
    level: int | None = None
    truncated: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Action(Event):
    """
    Something that the lab did to the DUT.

    Args:
        verb: "press", "release", "load", "unload", "write", "read", "call", "restore" ...
        subject: What it was done to: "button_a", "irq_button", "/dev/pilab_led".
        detail: What else there is to say, short.
        end_ns: When it was done with; None while unknown.
        errno: How a call on the DUT failed, positive; 0 for success; None if not a call.
    """

    kind: ClassVar[str] = "action"
    verb: str
    subject: str
    detail: str = ""
    end_ns: int | None = None
    errno: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class InterruptCount(Event):
    """
    One reading of a row of /proc/interrupts.

    Args:
        name: The action's name in the row: "pilab-irq-button".
        irq: The row's number, None if there is no such row.
        count: Sum over the processors.
    """

    kind: ClassVar[str] = "interrupts"
    name: str
    irq: int | None
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CrashSeen(Event):
    """
    The console told of a crash; `t_ns` is the arrival of its first line.

    Args:
        cause: "null-pointer", "panic", "bug", "warning", "soft-lockup" ... (`pilab.console.crash`).
        summary: One line for a person.
        place: "kmod/oops_null/oops_null.c:31" where the program counter was resolved.
        symbol: "oops_null_init+0x18/0x30 [oops_null]" where known.
        fatal: Whether the kernel cannot go on being trusted.
        source: The source line at `place`.
    """

    kind: ClassVar[str] = "crash"
    cause: str
    summary: str
    place: str = ""
    symbol: str = ""
    fatal: bool = True
    source: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExperimentStarted(Event):
    """
    An experiment began.

    Args:
        kernel: Series of the kernel it runs on: "6.12".
    """

    kind: ClassVar[str] = "started"
    kernel: str


@dataclass(frozen=True, kw_only=True, slots=True)
class VerdictGiven(Event):
    """
    An experiment was judged.

    Args:
        kernel: Series of the kernel it ran on.
        verdict: The verdict.
        reason: One line; empty for PASS.
        duration_s: From its start to its verdict, in seconds.
        counts: What was counted: edges per wire, interrupts, presses.
    """

    kind: ClassVar[str] = "verdict"
    kernel: str
    verdict: Verdict
    reason: str
    duration_s: float
    counts: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClockMapped(Event):
    """
    The DUT's clocks were compared with the host's.

    Args:
        offset_ns: Host time minus the DUT's CLOCK_MONOTONIC.
        error_ns: That offset is right within plus or minus this.
        printk_offset_ns: Host time minus printk's own time.
        printk_error_ns: That one's error.
    """

    kind: ClassVar[str] = "clock"
    offset_ns: int
    error_ns: int
    printk_offset_ns: int
    printk_error_ns: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleBuilt(Event):
    """
    A module that this run is going to load.

    Args:
        name: The module's name.
        kernel: Series of the kernel it was built for.
        sha256: Of the unstripped .ko, hex.
        path: That file, in the cache.
    """

    kind: ClassVar[str] = "module"
    name: str
    kernel: str
    sha256: str
    path: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Note(Event):
    """
    Something worth knowing of the bench itself.

    Args:
        text: The note.
    """

    kind: ClassVar[str] = "note"
    text: str


KINDS: dict[str, type[Event]] = {
    cls.kind: cls
    for cls in (
        Edge,
        ConsoleLine,
        Action,
        InterruptCount,
        CrashSeen,
        ExperimentStarted,
        VerdictGiven,
        ClockMapped,
        ModuleBuilt,
        Note,
    )
}


def to_json(event: Event) -> dict[str, Any]:
    """Return the event as an object of events.jsonl, `kind` first."""
    return {"kind": event.kind} | {
        field.name: getattr(event, field.name) for field in dataclasses.fields(event)
    }


def from_json(data: dict[str, Any]) -> Event:
    """
    Return the event that `to_json` made an object of.

    Raises:
        ValueError: The kind is unknown or a field is missing.
    """
    values = dict(data)
    cls = KINDS.get(values.pop("kind", ""))
    if cls is None:
        raise ValueError(f"no event kind {data.get('kind')!r}")
    hints = typing.get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(cls)}
    try:
        return cls(**{k: _revive(hints[k], v) for k, v in values.items() if k in known})
    except TypeError as error:
        raise ValueError(f"event {cls.kind}: {error}") from error


def _revive(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(hint, types.UnionType):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(value)
    return value
