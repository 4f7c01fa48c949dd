"""One experiment on one kernel, from its start to its verdict."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from pilab.bench import Bench
from pilab.errors import BenchError, Fault, PilabError
from pilab.events import (
    Action,
    ConsoleLine,
    CrashSeen,
    Edge,
    Event,
    ExperimentStarted,
    InterruptCount,
    Note,
    Verdict,
    VerdictGiven,
)
from pilab.experiment import Experiment
from pilab.recorder import Recorder

STORY_EVENTS = 40

_VERDICTS = {
    Fault.MODULE: Verdict.FAIL,
    Fault.KERNEL: Verdict.CRASH,
    Fault.BENCH: Verdict.ERROR,
    Fault.USAGE: Verdict.ERROR,
}


class Trial:
    """
    An experiment being carried out.

    Life cycle: `begin` once the bench is there, `judge` once the check has ended.

    Args:
        spec: The experiment.
        kernel: Series of the kernel.
        mutant: Name of the mutant that stands in for the module, or "".
    """

    def __init__(self, spec: Experiment, kernel: str, mutant: str = "") -> None:
        self.spec = spec
        self.kernel = kernel
        self.label = f"{spec.name}~{mutant}" if mutant else spec.name
        self.verdict: VerdictGiven | None = None
        self.explanation = ""
        self._bench: Bench | None = None
        self._start_ns = time.monotonic_ns()

    def begin(self, bench: Bench, sources: Mapping[str, Path]) -> None:
        """Give the bench a pristine kernel; BenchError if that fails."""
        self._bench = bench
        bench.timeline.experiment = self.label
        bench.timeline.add(ExperimentStarted(t_ns=self._start_ns, kernel=self.kernel))
        bench.begin(self.label, sources)

    def judge(self, error: BaseException | None, recorder: Recorder | None) -> VerdictGiven:
        """
        Give the verdict and put it on the timeline.

        Args:
            error: What the check raised; None if it returned.
            recorder: Where the verdict goes if there is no bench to put it on.
        """
        bench = self._bench
        if bench is not None:
            bench.end()
            error = bench.diagnose(error)
        verdict, reason = classify(error)
        if bench is not None and bench.recorder_problem and verdict is not Verdict.SKIP:
            verdict, reason = Verdict.ERROR, bench.recorder_problem
        self.explanation = _explanation(error)
        event = VerdictGiven(
            t_ns=time.monotonic_ns(),
            experiment=self.label,
            kernel=self.kernel,
            verdict=verdict,
            reason=reason,
            duration_s=round((time.monotonic_ns() - self._start_ns) / 1e9, 4),
            counts={} if bench is None else bench.counts | bench.edge_counts(),
        )
        self.verdict = event
        if bench is not None:
            bench.timeline.add(event)
            bench.timeline.experiment = ""
        elif recorder is not None:
            recorder.sink(event)
        return event

    def story(self) -> str:
        """Return the newest part of the timeline, one line per event."""
        if self._bench is None:
            return ""
        events = self._bench.timeline.since(0)
        told = [line for event in events if (line := tell(event, self._start_ns))]
        skipped = len(told) - STORY_EVENTS
        head = [f"... {skipped} earlier events"] if skipped > 0 else []
        return "\n".join(head + told[-STORY_EVENTS:])


def classify(error: BaseException | None) -> tuple[Verdict, str]:
    """Return the verdict that an error means, and its reason in one line."""
    if error is None:
        return Verdict.PASS, ""
    if isinstance(error, pytest.skip.Exception):
        return Verdict.SKIP, str(error.msg)
    if isinstance(error, PilabError):
        return _VERDICTS[error.fault], _first_line(error.message)
    if isinstance(error, AssertionError):
        return Verdict.FAIL, _first_line(str(error)) or "an assertion of the check failed"
    if isinstance(error, pytest.fail.Exception):
        return Verdict.FAIL, _first_line(str(error.msg))
    return Verdict.ERROR, f"the check itself failed: {type(error).__name__}: {error}"


def tell(event: Event, start_ns: int) -> str:
    """Return an event as a line for a person; "" for one that nobody wants to read."""
    stamp = f"{(event.t_ns - start_ns) / 1e6:10.3f} ms  "
    match event:
        case Edge():
            return f"{stamp}{event.wire} {event.word} ({event.line}, by the {event.driver})"
        case ConsoleLine():
            return f"{stamp}console: {event.text}"
        case Action():
            result = "" if not event.errno else f" -> errno {event.errno}"
            return f"{stamp}{event.verb} {event.subject} {event.detail}".rstrip() + result
        case InterruptCount():
            return f"{stamp}interrupts {event.name}: {event.count}"
        case CrashSeen():
            return f"{stamp}CRASH {event.summary}"
        case Note():
            return f"{stamp}-- {event.text}"
        case _:
            return ""


def _explanation(error: BaseException | None) -> str:
    if isinstance(error, PilabError) and error.hint:
        return error.hint
    if isinstance(error, BenchError):
        return str(error)
    return "" if error is None else str(error)


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else ""
