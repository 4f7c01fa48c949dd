"""A process on the DUT that keeps its open files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pilab.agent_call import AgentCall, Request, call_request, kill, shown
from pilab.agent_link import AgentLink
from pilab.errors import BenchError
from pilab.timeline import Timeline

_TIMEOUT_S = 5.0


class AgentProcess:
    """
    A worker of the agent kept for oneself: `pilab.ports.DutProcess`.

    It lives until `kill`, the end of its `with`, or the next greeting. Its requests are
    served one after the other; a blocking one ends after its timeout and the process goes on.
    A process that is stuck in the kernel is killed.

    Args:
        link: The link.
        timeline: Where actions go, if anywhere.
    """

    def __init__(self, link: AgentLink, timeline: Timeline | None) -> None:
        self._link = link
        self._timeline = timeline
        self._paths: dict[int, str] = {}
        first = AgentCall(link, None, Request("process", (), "start", "process"), new_lane=True)
        self._lane = first.id
        self._pid = int(first.finish(_TIMEOUT_S))
        self._killed = False

    @property
    def pid(self) -> int:
        """Its process id on the DUT."""
        return self._pid

    def __enter__(self) -> AgentProcess:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.kill()
        except BenchError:
            if kind is None:
                raise  # else the first error is the one to be seen

    def open(self, path: str, flags: int) -> int:
        """open(2); return the descriptor, which belongs to this process."""
        fd = int(self._ask("open", (path, flags), path))
        self._paths[fd] = path
        return fd

    def close(self, fd: int) -> None:
        """close(2)."""
        subject = self._subject(fd)
        self._paths.pop(fd, None)
        self._ask("close", (subject, fd), subject)

    def read(self, fd: int, size_bytes: int, *, timeout_s: float = _TIMEOUT_S) -> bytes:
        """read(2); blocks on the DUT for at most `timeout_s`."""
        subject = self._subject(fd)
        return bytes(self._ask("read", (subject, fd, size_bytes), subject, timeout_s))

    def write(self, fd: int, data: bytes, *, timeout_s: float = _TIMEOUT_S) -> int:
        """write(2); return how many bytes were taken."""
        subject = self._subject(fd)
        return int(self._ask("write", (subject, fd, data), subject, timeout_s, shown(data)))

    def lseek(self, fd: int, offset: int, whence: int = 0) -> int:
        """lseek(2)."""
        subject = self._subject(fd)
        return int(self._ask("lseek", (subject, fd, offset, whence), subject))

    def ioctl(self, fd: int, request: int, arg: int | bytes = 0) -> tuple[int, bytes]:
        """ioctl(2); return its value and, if `arg` was bytes, the buffer afterwards."""
        subject = self._subject(fd)
        args = (subject, fd, request, arg)
        value, buffer = self._ask("ioctl", args, subject, detail=f"{request:#x}")
        return int(value), bytes(buffer)

    def poll(self, fd: int, events: int, *, timeout_s: float = _TIMEOUT_S) -> int:
        """poll(2) of one descriptor; return the events that are ready, 0 if none came in time."""
        request = Request("poll", (fd, events, round(timeout_s * 1e3)), "poll", self._subject(fd))
        return int(self._start(request).finish(timeout_s + _TIMEOUT_S))

    def call(self, function: Callable[..., Any], *args: Any, timeout_s: float = _TIMEOUT_S) -> Any:
        """Run a function in this process; as `Target.call`. Its globals outlive the call."""
        return self._start(call_request(function, args, timeout_s)).finish(timeout_s)

    def start(self, function: Callable[..., Any], *args: Any) -> AgentCall:
        """Begin to run a function in this process; as `Target.start`."""
        return self._start(call_request(function, args))

    def kill(self) -> None:
        """End it with SIGKILL; its files are closed when this returns. Idempotent."""
        if not self._killed:
            self._killed = True
            kill(self._link, self._timeline, self._lane, f"process {self._pid}")

    def _subject(self, fd: int) -> str:
        return self._paths.get(fd, f"descriptor {fd}")

    def _start(self, request: Request) -> AgentCall:
        return AgentCall(self._link, self._timeline, request, lane=self._lane)

    def _ask(
        self,
        operation: str,
        args: tuple[Any, ...],
        subject: str,
        timeout_s: float = _TIMEOUT_S,
        detail: str = "",
    ) -> Any:
        request = Request(operation, args, operation, subject, detail, alarm_s=timeout_s)
        return self._start(request).finish(timeout_s)
