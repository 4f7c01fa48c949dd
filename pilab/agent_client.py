"""The DUT as its agent shows it: `pilab.ports.Target` over any channel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pilab.agent_call import AgentCall, Request, call_request, shown
from pilab.agent_link import AgentLink, Deadlines, unpack
from pilab.agent_process import AgentProcess
from pilab.agent_terminal import AgentTerminal
from pilab.clock import Deadline
from pilab.errors import LinkTimeoutError, ModuleFaultError
from pilab.ports.channel import Channel
from pilab.ports.target import ClockMap, Completed
from pilab.timeline import Timeline

UNKNOWN_ERROR_NS = 1 << 62
"""`ClockMap.printk_error_ns` of a DUT whose kernel log cannot be written or read."""

_EXCHANGES = 8
_PRINTK_ROUNDS = 3
_PING_TIMEOUT_S = 2.0


class AgentTarget:
    """
    A DUT through its agent.

    Life cycle: made closed; `connect` opens the channel and greets, and is called again whenever
    the DUT was put back to a pristine state; `close` lets go. Threads may share it.

    Args:
        channel: The bytes to the agent and back.
        timeline: Where actions are put, if anywhere.
        name: What messages call the agent.
        deadlines: Makes the deadlines of waits; a virtual DUT's forgive starvation.
    """

    def __init__(
        self,
        channel: Channel,
        timeline: Timeline | None = None,
        name: str = "agent",
        *,
        deadlines: Deadlines = Deadline,
    ) -> None:
        self._link = AgentLink(channel, name, deadlines)
        self._timeline = timeline

    @property
    def link(self) -> AgentLink:
        """The link, for its state and its counts of garbage and stale frames."""
        return self._link

    # --- life ---

    def connect(self, timeout_s: float) -> Mapping[str, Any]:
        """
        Greet the agent of a fresh DUT; nothing from before reaches the new one.

        A channel that is open and sound is used as it is; one that stays silent for half of the
        time is opened anew.

        Returns:
            What it says of itself: "python", "release", "machine", "pid", "cmdline".

        Raises:
            LinkTimeoutError: No agent answered.
            ProtocolError: Something answered that is no agent.
            BenchError: The channel does not open.
        """
        return self._link.greet(timeout_s)

    def reopen(self, timeout_s: float) -> None:
        """
        Open the channel anew without greeting: while the DUT is halted, before its restore.

        Raises:
            BenchError: It does not open.
        """
        self._link.reopen(timeout_s)

    def close(self) -> None:
        """Let go of the agent; calls under way fail with LinkStateError. Idempotent."""
        self._link.close()

    def ping(self, timeout_s: float) -> bool:
        """Whether the agent answers in time."""
        return self._link.ping(timeout_s) is not None

    def exchange_clocks(self) -> ClockMap:
        """
        Measure how the DUT's clocks map to the host's.

        Of eight exchanges the shortest counts; the error is half of its round trip. printk's
        clock is read back from markers in /dev/kmsg; where that is not allowed its error is
        `UNKNOWN_ERROR_NS`.

        Raises:
            LinkTimeoutError: The agent does not answer.
        """
        best: tuple[int, int] | None = None
        for _ in range(_EXCHANGES):
            answered = self._link.ping(_PING_TIMEOUT_S)
            if answered is None or answered.reply is None:
                raise LinkTimeoutError(self._link.name, "clock", _PING_TIMEOUT_S)
            dut_ns, _boot_ns = unpack(answered.reply)["value"]
            error_ns = (answered.arrival_ns - answered.sent_ns + 1) // 2
            if best is None or error_ns < best[1]:
                best = answered.sent_ns + error_ns - dut_ns, error_ns
        assert best is not None
        offset_ns, error_ns = best
        try:
            request = Request("printk_clock", (_PRINTK_ROUNDS,), "write", "/dev/kmsg")
            before_ns, after_ns, printk_us = self._quietly(request).finish(_PING_TIMEOUT_S)
        except ModuleFaultError:
            return ClockMap(offset_ns, error_ns, offset_ns, UNKNOWN_ERROR_NS)
        # printk cuts its time to whole microseconds: on average it was half of one later.
        printk_offset_ns = offset_ns + (before_ns + after_ns) // 2 - (printk_us * 1000 + 500)
        printk_error_ns = error_ns + (after_ns - before_ns + 1) // 2 + 500
        return ClockMap(offset_ns, error_ns, printk_offset_ns, printk_error_ns)

    # --- modules ---

    def load(self, image: bytes, name: str, params: str = "", *, timeout_s: float = 10.0) -> None:
        """See `pilab.ports.Target.load`."""
        self._start(Request("load", (image, name, params), "load", name, params)).finish(timeout_s)

    def unload(self, name: str, *, timeout_s: float = 10.0) -> None:
        """See `pilab.ports.Target.unload`."""
        self._start(Request("unload", (name,), "unload", name)).finish(timeout_s)

    # --- files ---

    def read_file(self, path: str, *, limit_bytes: int = 1 << 20, timeout_s: float = 5.0) -> bytes:
        """See `pilab.ports.Target.read_file`."""
        request = Request("read_file", (path, limit_bytes), "read", path)
        return bytes(self._start(request).finish(timeout_s))

    def write_file(
        self,
        path: str,
        data: bytes,
        *,
        create: bool = False,
        mode: int = 0o644,
        timeout_s: float = 5.0,
    ) -> int:
        """See `pilab.ports.Target.write_file`."""
        request = Request("write_file", (path, data, create, mode), "write", path, shown(data))
        return int(self._start(request).finish(timeout_s))

    def list_directory(self, path: str, *, timeout_s: float = 5.0) -> list[str]:
        """Return the names in a directory, sorted; fails as `read_file` does."""
        request = Request("list_directory", (path,), "list", path)
        return list(self._quietly(request).finish(timeout_s))

    def exists(self, path: str, *, timeout_s: float = 5.0) -> bool:
        """Return whether there is such a name, be it a dangling link."""
        return bool(self._quietly(Request("exists", (path,), "exists", path)).finish(timeout_s))

    # --- commands and functions ---

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 10.0) -> Completed:
        """
        Run a command to its end; what it leaves running in its process group is killed then.

        Raises:
            DutOSError: There is no such command ("execve"), or its output is over 7 MiB (EFBIG).
            DutTimeoutError: It did not end in time; it was killed.
        """
        request = Request("run", (list(argv), stdin), "run", argv[0], " ".join(argv[1:]))
        ended = self._start(request).finish(timeout_s)
        return Completed(tuple(argv), ended["status"], ended["stdout"], ended["stderr"])

    def call(self, function: Callable[..., Any], *args: Any, timeout_s: float = 5.0) -> Any:
        """
        Run a function on the DUT; the process that ran it is gone when this returns.

        Raises:
            UnsendableError: The function refers to something around it.
            DutOSError, RemoteCallError: What it raised.
            DutTimeoutError: It did not return in time; it was killed.
            DutKilledError: The kernel killed it.
        """
        return self._start(call_request(function, args)).finish(timeout_s)

    def start(self, function: Callable[..., Any], *args: Any) -> AgentCall:
        """See `pilab.ports.Target.start`."""
        return self._start(call_request(function, args))

    def process(self) -> AgentProcess:
        """See `pilab.ports.Target.process`."""
        return AgentProcess(self._link, self._timeline)

    def terminal(self, argv: Sequence[str], rows: int, columns: int) -> AgentTerminal:
        """See `pilab.ports.Target.terminal`."""
        return AgentTerminal(self._link, self._timeline, argv, rows, columns)

    def _start(self, request: Request) -> AgentCall:
        return AgentCall(self._link, self._timeline, request)

    def _quietly(self, request: Request) -> AgentCall:
        return AgentCall(self._link, None, request)
