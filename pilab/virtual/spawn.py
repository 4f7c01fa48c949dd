"""Processes that end with their owner, however it ends."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any

from pilab.errors import MachineError

# Told to die with its parent first, the shell then looks whether the parent is still there:
# without that second look a parent killed in between would leave an orphan.
_GUARD = 'test "$PPID" = "$1" || exit 125; shift; exec "$@"'


def spawn(
    argv: Sequence[str],
    *,
    stderr: IO[bytes] | int,
    stdout: IO[bytes] | int = subprocess.DEVNULL,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """
    Start a program that gets SIGKILL when this process ends, on SIGKILL too.

    PR_SET_PDEATHSIG is bound to the thread that forks, so a thread that lives as long as
    the process does the forking.

    Args:
        argv: Program and arguments.
        stderr: Where its complaints go.
        stdout: Where its output goes.
        env: Its environment; None: ours.
        pass_fds: Descriptors that it inherits.

    Returns:
        The process, in a session of its own (Ctrl-C in the terminal does not reach it).

    Raises:
        MachineError: It cannot be started.
    """
    guarded = [
        *("setpriv", "--pdeathsig", "KILL", "--"),
        *("sh", "-c", _GUARD, "sh", str(os.getpid())),
        *argv,
    ]

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            guarded,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=None if env is None else dict(env),
            pass_fds=pass_fds,
            start_new_session=True,
        )

    try:
        return _forker().do(start)
    except OSError as error:
        raise MachineError(
            f"cannot start {Path(argv[0]).name}: {error}",
            hint="./lab installs what is missing",
        ) from error


def end(process: subprocess.Popen[bytes], *, within_s: float = 2.0) -> None:
    """End a process by SIGTERM, then SIGKILL, and reap it. Idempotent."""
    if process.poll() is not None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        process.send_signal(number)
        try:
            process.wait(within_s)
            return
        except subprocess.TimeoutExpired:
            continue


class _Forker:
    """A thread that lives as long as the process and calls functions for others."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._work: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._loop, name="pilab-forker", daemon=True).start()

    def do(self, function: Callable[[], Any]) -> Any:
        future: Future[Any] = Future()
        self._work.put((function, future))
        return future.result()

    def _loop(self) -> None:
        while True:
            function, future = self._work.get()
            try:
                future.set_result(function())
            except OSError as error:
                future.set_exception(error)


_lock = threading.Lock()
_the_forker: _Forker | None = None


def _forker() -> _Forker:
    global _the_forker
    with _lock:
        if _the_forker is None or _the_forker.pid != os.getpid():
            _the_forker = _Forker()
        return _the_forker
