"""How commands and files reach the DUT: through the agent that runs there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Completed:
    """
    A command that ended.

    Args:
        argv: The command.
        status: Exit status; negative: the signal that ended it.
        stdout: What it wrote.
        stderr: What it complained.
    """

    argv: tuple[str, ...]
    status: int
    stdout: bytes
    stderr: bytes


@dataclass(frozen=True, slots=True)
class ClockMap:
    """
    How the DUT's clocks map to the host's CLOCK_MONOTONIC.

    Args:
        offset_ns: Host time minus the DUT's CLOCK_MONOTONIC.
        error_ns: The offset is right within plus or minus this.
        printk_offset_ns: Host time minus printk's own time.
        printk_error_ns: That one's error.
    """

    offset_ns: int
    error_ns: int
    printk_offset_ns: int
    printk_error_ns: int


class DutCall(Protocol):
    """A call under way on the DUT."""

    def result(self, within_s: float | None = 5.0) -> Any:
        """
        Return what it returned.

        Raises:
            DutTimeoutError: It has not returned in time; it goes on.
            DutOSError, DutKilledError, RemoteCallError: It failed.
            BenchError: The agent is gone.
        """

    def done(self) -> bool:
        """Whether `result` would return or raise at once."""

    def cancel(self) -> None:
        """Kill the process that makes the call."""


class DutProcess(Protocol):
    """
    A process on the DUT that keeps its open files and its state from one call to the next.

    Use it in a `with`; leaving kills it, which closes its files.
    """

    @property
    def pid(self) -> int:
        """Its process id on the DUT."""

    def __enter__(self) -> DutProcess: ...

    def __exit__(self, *exc: object) -> None: ...

    def open(self, path: str, flags: int) -> int:
        """open(2); return the descriptor, which belongs to this process."""

    def close(self, fd: int) -> None:
        """close(2)."""

    def read(self, fd: int, size_bytes: int, *, timeout_s: float = 5.0) -> bytes:
        """read(2); blocks on the DUT for at most `timeout_s`."""

    def write(self, fd: int, data: bytes, *, timeout_s: float = 5.0) -> int:
        """write(2); return how many bytes were taken."""

    def lseek(self, fd: int, offset: int, whence: int = 0) -> int:
        """lseek(2)."""

    def ioctl(self, fd: int, request: int, arg: int | bytes = 0) -> tuple[int, bytes]:
        """ioctl(2); return its value and, if `arg` was bytes, the buffer afterwards."""

    def call(self, function: Callable[..., Any], *args: Any, timeout_s: float = 5.0) -> Any:
        """Run a function in this process; as `Target.call`."""

    def start(self, function: Callable[..., Any], *args: Any) -> DutCall:
        """Begin to run a function in this process; as `Target.start`."""

    def kill(self) -> None:
        """End it with SIGKILL. Idempotent."""


class Target(Protocol):
    """
    The DUT as seen by its user space.

    Calls fail with DutOSError (the DUT's errno), DutTimeoutError (the call hangs, the DUT is
    alive), DutKilledError (the kernel killed the caller), or BenchError (no agent).
    Arguments and results are None, bool, int, float, str, bytes, list, tuple (comes back as a
    list) and dict with str keys.
    """

    def connect(self, timeout_s: float) -> Mapping[str, Any]:
        """
        Greet the agent of a fresh DUT; nothing from before reaches the new one.

        Returns:
            What it says of itself: "python", "release", "machine", "pid", "cmdline".
        """

    def ping(self, timeout_s: float) -> bool:
        """Whether the agent answers in time."""

    def exchange_clocks(self) -> ClockMap:
        """Measure how the DUT's clocks map to the host's."""

    def load(self, image: bytes, name: str, params: str = "", *, timeout_s: float = 10.0) -> None:
        """
        finit_module(2) with the bytes of a .ko.

        Args:
            image: The .ko.
            name: File name without .ko, for messages and the file on the DUT.
            params: As insmod takes them: "speed=3 name=x".
        """

    def unload(self, name: str, *, timeout_s: float = 10.0) -> None:
        """delete_module(2) with O_NONBLOCK."""

    def read_file(self, path: str, *, limit_bytes: int = 1 << 20, timeout_s: float = 5.0) -> bytes:
        """Open, read to the end (or `limit_bytes`), close."""

    def write_file(
        self,
        path: str,
        data: bytes,
        *,
        create: bool = False,
        mode: int = 0o644,
        timeout_s: float = 5.0,
    ) -> int:
        """Open for writing (creating and truncating only if asked), one write(2), close."""

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 10.0) -> Completed:
        """Run a command to its end."""

    def call(self, function: Callable[..., Any], *args: Any, timeout_s: float = 5.0) -> Any:
        """
        Run a Python function on the DUT and return what it returns.

        Its source is sent: it must be a plain `def` that imports what it needs inside and
        refers to nothing around it. An OSError that it raises becomes DutOSError.
        """

    def start(self, function: Callable[..., Any], *args: Any) -> DutCall:
        """Begin to run a function in a process of its own; as `call` otherwise."""

    def process(self) -> DutProcess:
        """Start a process that keeps its open files between calls."""

    def terminal(self, argv: Sequence[str], rows: int, columns: int) -> Terminal:
        """Run a command on a new terminal of the DUT."""

    def close(self) -> None:
        """Let go of the agent. Idempotent."""


class Terminal(Protocol):
    """A command on a terminal of the DUT: bytes both ways until it ends."""

    def send(self, data: bytes) -> None:
        """Type bytes."""

    def receive(self, timeout_s: float | None) -> bytes | None:
        """Return output; b"" if none came in time; None once the command has ended."""

    def resize(self, rows: int, columns: int) -> None:
        """Tell the terminal its size."""

    def close(self) -> None:
        """Hang up. Idempotent."""
