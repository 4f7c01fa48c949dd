"""
Errors that say whose fault it is.

Every error of the lab belongs to one `Fault`; the verdict of an experiment and
the exit code of a command follow from it and from nothing else. Errors carry
fields; their text is made from the fields, in lower case, and ends with what to
do where that is known (`hint`).
"""

from __future__ import annotations

import difflib
import enum
import errno as errno_names
import os
from collections.abc import Iterable, Sequence
from typing import ClassVar


class Fault(enum.Enum):
    """Who has to change something before the same thing can succeed."""

    USAGE = "usage"
    """The person who typed the command: exit code 2."""
    MODULE = "module"
    """The module under test: verdict FAIL, exit code 1."""
    KERNEL = "kernel"
    """The kernel died under the module: verdict CRASH, exit code 1."""
    BENCH = "bench"
    """The bench or the host: verdict ERROR, exit code 3."""


class PilabError(Exception):
    """
    Base of every error that the lab raises on purpose.

    Args:
        message: What was wanted and what was seen, lower case, with units.
        hint: What a person can do about it; shown on a line of its own.
    """

    fault: ClassVar[Fault] = Fault.BENCH

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  {self.hint}"


# --- the person at the keyboard -----------------------------------------------------


class UsageError(PilabError):
    """The command cannot be carried out as it was typed."""

    fault = Fault.USAGE


class UnknownNameError(UsageError):
    """
    No such experiment, kernel, bench or wire.

    Args:
        kind: What was looked for, singular: "experiment".
        name: What was typed.
        known: Every name that would have been right.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        self.kind = kind
        self.name = name
        self.known = tuple(known)
        self.near = tuple(difflib.get_close_matches(name, self.known, n=3, cutoff=0.5))
        if self.near:
            hint = f"did you mean {' or '.join(self.near)}?"
        else:
            hint = f"known: {', '.join(self.known) or 'none'}"
        super().__init__(f"no {kind} named {name!r}", hint=hint)


# --- the bench and the host ---------------------------------------------------------


class BenchError(PilabError):
    """The bench, the host or the lab itself is at fault, never the module."""

    fault = Fault.BENCH


class LinkStateError(BenchError):
    """
    A link was used in a state that does not allow it.

    Args:
        link: Which link: "qmp", "agent", "qtest".
        state: The state it is in.
        required: The states in which the call is allowed.
    """

    def __init__(self, link: str, state: str, required: Sequence[str]) -> None:
        self.link = link
        self.state = state
        self.required = tuple(required)
        super().__init__(f"{link}: is {state}, must be {' or '.join(required)}")


class LinkTimeoutError(BenchError):
    """
    A part of the bench did not answer in time.

    Args:
        link: Who was asked.
        waited_for: What would have been the answer.
        timeout_s: How long was waited, in seconds.
        seen: What came instead, shortened.
    """

    def __init__(
        self,
        link: str,
        waited_for: str,
        timeout_s: float,
        seen: str = "nothing",
        *,
        hint: str | None = None,
    ) -> None:
        self.link = link
        self.waited_for = waited_for
        self.timeout_s = timeout_s
        self.seen = seen
        super().__init__(f"{link}: no {waited_for} in {timeout_s:.3f} s (saw {seen})", hint=hint)


class ProtocolError(BenchError):
    """
    A part of the bench answered something that its protocol does not allow.

    Args:
        link: Who answered.
        wanted: What was allowed.
        seen: What came, shortened.
    """

    def __init__(self, link: str, wanted: str, seen: str, *, hint: str | None = None) -> None:
        self.link = link
        self.wanted = wanted
        self.seen = seen
        super().__init__(f"{link}: wanted {wanted}, saw {seen}", hint=hint)


class MachineError(BenchError):
    """
    QEMU did not start, or ended by itself.

    Args:
        what: What happened, one clause.
        stderr: What QEMU printed, its last lines.
    """

    def __init__(self, what: str, stderr: str = "", *, hint: str | None = None) -> None:
        self.what = what
        self.stderr = stderr
        text = what if not stderr.strip() else f"{what}; it printed:\n{_indent(stderr)}"
        super().__init__(text, hint=hint)


class CapabilityError(BenchError):
    """
    A bench claims a capability that it turned out to lack.

    Args:
        bench: The bench's name.
        capability: The capability's value, such as "edge-interrupts".
        seen: What showed that it is missing.
    """

    def __init__(self, bench: str, capability: str, seen: str) -> None:
        self.bench = bench
        self.capability = capability
        self.seen = seen
        super().__init__(f"bench {bench}: claims {capability}, but {seen}")


# --- the module under test ----------------------------------------------------------


class ModuleFaultError(PilabError):
    """What was seen shows that the module is wrong."""

    fault = Fault.MODULE


class CheckError(ModuleFaultError):
    """
    Something that a check looked at is not as it must be.

    Args:
        subject: What was looked at: "led_a", "/proc/pilab_rw".
        wanted: What it must be, with units.
        seen: What it was.
    """

    def __init__(self, subject: str, wanted: str, seen: str, *, hint: str | None = None) -> None:
        self.subject = subject
        self.wanted = wanted
        self.seen = seen
        super().__init__(f"{subject}: wanted {wanted}, saw {seen}", hint=hint)


class DeadlineError(ModuleFaultError):
    """Something that the module had to do in time did not happen."""


class EdgeTimeoutError(DeadlineError):
    """
    No such edge arrived in time.

    Args:
        wire: The wire's name: "led_a".
        line: The DUT's line name: "GPIO5".
        wanted: The edge waited for: "rising", "falling" or "any".
        timeout_s: How long, in seconds.
        seen: Edges of that line since the wait began, oldest first, as words.
        after: What was done just before: "press button_a"; empty if nothing.
        line_state: What else is known of the line: "line GPIO5 is an input".
    """

    def __init__(
        self,
        wire: str,
        line: str,
        wanted: str,
        timeout_s: float,
        seen: Sequence[str] = (),
        *,
        after: str = "",
        line_state: str = "",
    ) -> None:
        self.wire = wire
        self.line = line
        self.wanted = wanted
        self.timeout_s = timeout_s
        self.seen = tuple(seen)
        self.after = after
        self.line_state = line_state
        text = f"{wire}: no {wanted} edge in {timeout_s:.3f} s"
        if after:
            text += f" after {after}"
        text += f"; saw {_count_words(self.seen)}"
        if line_state:
            text += f"; {line_state}"
        super().__init__(text)


class UnexpectedEdgeError(ModuleFaultError):
    """
    A line moved that had to stay as it was.

    Args:
        wire: The wire's name.
        line: The DUT's line name.
        level: The level it had to keep: "low" or "high".
        for_s: How long it had to keep it, in seconds.
        seen: The edges seen, as words, oldest first; empty if it was wrong all along.
    """

    def __init__(
        self, wire: str, line: str, level: str, for_s: float, seen: Sequence[str] = ()
    ) -> None:
        self.wire = wire
        self.line = line
        self.level = level
        self.for_s = for_s
        self.seen = tuple(seen)
        what = _count_words(self.seen) if self.seen else "the other level from the start"
        super().__init__(f"{wire}: had to stay {level} for {for_s:.3f} s; saw {what}")


class DutOSError(ModuleFaultError, OSError):
    """
    A system call on the DUT failed.

    Args:
        call: The call: "open", "finit_module".
        subject: What it was called on: a path, a module's name.
        errno: The errno, positive.
    """

    def __init__(self, call: str, subject: str, errno: int) -> None:
        self.call = call
        self.subject = subject
        self.errno_name = errno_names.errorcode.get(errno, str(errno))
        super().__init__(f"{call} {subject}: {self.errno_name} ({os.strerror(errno).lower()})")
        self.errno = errno  # after OSError's own __init__, which clears it

    def __str__(self) -> str:
        return self.message


class DutTimeoutError(DeadlineError):
    """
    A call on the DUT did not return in time although the DUT is alive.

    Args:
        call: What was called: "read /dev/pilab_chardev".
        timeout_s: How long it was given, in seconds.
    """

    def __init__(self, call: str, timeout_s: float) -> None:
        self.call = call
        self.timeout_s = timeout_s
        super().__init__(f"{call} did not return in {timeout_s:.3f} s; the rest of the DUT answers")


class DutKilledError(ModuleFaultError):
    """
    The DUT process that made a call was killed, as the kernel does on an oops.

    Args:
        call: What was called.
        signal: The signal's number.
    """

    def __init__(self, call: str, signal: int) -> None:
        self.call = call
        self.signal = signal
        super().__init__(f"{call}: the calling process was killed by signal {signal}")


class RemoteCallError(ModuleFaultError):
    """
    A Python function sent to the DUT raised something other than OSError.

    Args:
        function: Its name.
        kind: The exception's class name.
        text: Its message.
        traceback: The DUT's traceback.
    """

    def __init__(self, function: str, kind: str, text: str, traceback: str = "") -> None:
        self.function = function
        self.kind = kind
        self.text = text
        self.traceback = traceback
        super().__init__(f"{function} on the DUT: {kind}: {text}")


# --- the kernel under the module ----------------------------------------------------


class KernelCrashError(PilabError):
    """
    The kernel crashed: an oops, a panic, a lockup, a silent death.

    Args:
        cause: The crash's cause as `pilab.console.crash` names it.
        summary: One line for a person, with file and line where known.
    """

    fault = Fault.KERNEL

    def __init__(self, cause: str, summary: str) -> None:
        self.cause = cause
        self.summary = summary
        super().__init__(summary)


def _indent(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.rstrip().splitlines())


def _count_words(words: Sequence[str]) -> str:
    """["rising", "rising", "falling"] becomes "2 rising, 1 falling"."""
    if not words:
        return "nothing"
    counts: dict[str, int] = {}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    return ", ".join(f"{n} {word}" for word, n in counts.items())
