"""A command on a terminal of the DUT."""

from __future__ import annotations

import queue
from collections.abc import Sequence

from pilab import agent
from pilab.agent_call import AgentCall, Request, kill
from pilab.agent_link import AgentLink
from pilab.clock import Deadline
from pilab.timeline import Timeline

_ACKNOWLEDGE_BYTES = 64 << 10


class AgentTerminal:
    """
    A command on a pseudoterminal: `pilab.ports.Terminal`.

    The DUT sends no more than 256 KiB ahead of what was received, so that a terminal nobody
    looks at neither fills the host's memory nor delays other requests. One thread may send
    while another receives.

    Args:
        link: The link.
        timeline: Where notes go, if anywhere.
        argv: The command.
        rows: Height in characters.
        columns: Width in characters.
    """

    def __init__(
        self,
        link: AgentLink,
        timeline: Timeline | None,
        argv: Sequence[str],
        rows: int,
        columns: int,
    ) -> None:
        self._link = link
        self._timeline = timeline
        self._words = f"terminal {argv[0]}"
        self._arrived: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._unacknowledged = 0
        self._ended = False
        self._closed = False
        request = Request("terminal", (list(argv), rows, columns), "terminal", argv[0])
        self._call = AgentCall(
            link, None, request, new_lane=True, on_output=self._arrived.put, on_done=self._on_end
        )

    @property
    def status(self) -> int | None:
        """How the command ended (negative: the signal), None while it runs."""
        return int(self._call.result(0)) if self._call.done() else None

    def send(self, data: bytes) -> None:
        """Type bytes."""
        self._tell("send", data)

    def receive(self, timeout_s: float | None) -> bytes | None:
        """Return output; b"" if none came in time; None once the command has ended."""
        if self._ended:
            return None
        try:
            remaining_s = Deadline(timeout_s).remaining_s()
            data = (
                self._arrived.get(timeout=remaining_s)
                if remaining_s != 0.0
                else (self._arrived.get_nowait())
            )
        except queue.Empty:
            return b""
        if data is None:
            self._ended = True
            return None
        self._unacknowledged += len(data)
        if self._unacknowledged >= _ACKNOWLEDGE_BYTES:
            self._tell("received", self._unacknowledged)
            self._unacknowledged = 0
        return data

    def resize(self, rows: int, columns: int) -> None:
        """Tell the terminal its size."""
        self._tell("resize", [rows, columns])

    def close(self) -> None:
        """Hang up. Idempotent."""
        if not self._closed:
            self._closed = True
            if not self._call.done():
                kill(self._link, self._timeline, self._call.id, self._words)

    def _tell(self, what: str, value: bytes | int | list[int]) -> None:
        if not self._call.done():
            self._link.request(agent.INPUT, agent.pack([what, value]), lane=self._call.id)

    def _on_end(self) -> None:
        self._arrived.put(None)
