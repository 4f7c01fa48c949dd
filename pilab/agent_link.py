"""The host's end of the link to the agent: sessions, requests, answers, silence."""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from pilab import agent
from pilab.clock import Deadline
from pilab.errors import BenchError, LinkStateError, LinkTimeoutError, ProtocolError
from pilab.ports.channel import Channel

_RESEND_S = 0.05
_RESEND_SLOWLY_S = 0.25
_PING_TIMEOUT_S = 2.0

Deadlines = Callable[[float | None], Deadline]
"""Makes the deadline of a wait from its timeout in s."""


class Pending:
    """A request that was sent; its waiter sleeps on a lock that the reader lets go."""

    __slots__ = (
        "_done",
        "_gate",
        "_on_done",
        "arrival_ns",
        "error",
        "frames_before",
        "id",
        "on_output",
        "reply",
        "sent_ns",
    )

    def __init__(
        self,
        number: int,
        on_output: Callable[[bytes], None] | None = None,
        on_done: Callable[[Pending], None] | None = None,
    ) -> None:
        self.id = number
        self.sent_ns = time.monotonic_ns()
        self.arrival_ns = 0
        self.frames_before = 0
        self.reply: agent.Frame | None = None
        self.error: BenchError | None = None
        self.on_output = on_output
        self._on_done = on_done
        self._done = False
        self._gate = threading.Lock()
        self._gate.acquire()

    @property
    def done(self) -> bool:
        """Whether there is an answer, or will never be one."""
        return self._done

    def finish(self, reply: agent.Frame | None, error: BenchError | None, now_ns: int) -> None:
        """Take the answer and wake the waiter; called once, by whoever removed it."""
        self.arrival_ns = now_ns
        self.error = error
        self.reply = reply
        try:
            if self._on_done is not None:
                self._on_done(self)
        finally:
            self._done = True
            self._gate.release()

    def wait(self, deadline: Deadline) -> bool:
        """Return whether the answer came in time; raises BenchError if there will be none."""
        while not self.done:
            remaining_s = deadline.remaining_s()
            if remaining_s == 0.0:
                return False
            if self._gate.acquire(timeout=-1 if remaining_s is None else remaining_s):
                self._gate.release()  # for whoever waits for the same answer
        if self.error is not None:
            raise self.error
        return True


class AgentLink:
    """
    Requests to the agent over a channel, matched to their answers.

    A thread of its own reads the channel from `reopen` to `close`. Threads may share the link.
    Each greeting begins a session; what was under way in an earlier one fails, and what arrives
    from it is ignored.

    Args:
        channel: The bytes.
        name: What messages call the agent.
        deadlines: Makes the deadlines of waits.
    """

    def __init__(self, channel: Channel, name: str, deadlines: Deadlines = Deadline) -> None:
        self.name = name
        self.deadlines = deadlines
        self._channel = channel
        self._state = "closed"
        self._decoder = agent.Decoder()
        self._reader: threading.Thread | None = None
        self._numbers = itertools.count(1)
        self._pending: dict[int, Pending] = {}
        self._greeting = 0
        self._session = 0
        self._stale_frames = 0
        self._garbage_seen = 0
        self._lock = threading.Lock()  # guards _state, _pending and the two session numbers
        self._send_lock = threading.Lock()
        self._connect_lock = threading.RLock()

    @property
    def state(self) -> str:
        """ "closed", "open", "greeted" or "lost"."""
        return self._state

    @property
    def garbage_bytes(self) -> int:
        """Bytes that arrived since `reopen` and belonged to no frame."""
        return self._decoder.garbage_bytes

    @property
    def stale_frames(self) -> int:
        """Frames of earlier sessions that were ignored."""
        return self._stale_frames

    # --- life ---

    def reopen(self, timeout_s: float) -> None:
        """
        Open the channel, anew if it is open; requests under way fail.

        Raises:
            BenchError: The channel does not open.
        """
        with self._connect_lock:
            self.close()
            self._channel.open(timeout_s)
            with self._lock:
                self._state = "open"
            self._decoder = agent.Decoder()
            self._garbage_seen = 0
            self._reader = threading.Thread(
                target=self._read, args=(self._decoder,), name=f"{self.name}-reader", daemon=True
            )
            self._reader.start()

    def greet(self, timeout_s: float) -> Mapping[str, Any]:
        """
        Begin a new session, opening the channel if need be; return what the agent says of itself.

        Raises:
            LinkTimeoutError: No agent answered.
            ProtocolError: What answered is no agent.
            BenchError: The channel does not open or broke.
        """
        deadline = self.deadlines(timeout_s)
        with self._connect_lock:
            reused = self._state in ("open", "greeted")
            if not reused:
                self.reopen(timeout_s)
            self._fail_all(LinkStateError(self.name, "greeted anew", ["in the same session"]))
            self._garbage_seen = self._decoder.garbage_bytes
            frames_before = self._decoder.frames
            pending, greeting = self._begin_session()
            halfway = self.deadlines(timeout_s / 2)
            slowly = self.deadlines(1.0)
            while True:
                self._send(agent.frame(agent.HELLO, greeting, pending.id))
                pause_s = _RESEND_SLOWLY_S if slowly.expired else _RESEND_S
                if pending.wait(self.deadlines(min(pause_s, deadline.remaining_s() or 0.0))):
                    break
                if deadline.expired:
                    self._forget(pending)
                    raise self._silence("greeting", timeout_s, frames_before)
                if reused and halfway.expired:  # the old stream may be stuck
                    reused = False
                    self._forget(pending)
                    self.reopen(timeout_s)
                    frames_before = 0
                    pending, greeting = self._begin_session()
            assert pending.reply is not None
            told = dict(unpack(pending.reply)["value"])
            with self._lock:
                self._session = int(told.pop("session"))
                self._state = "greeted"
            return told

    def close(self) -> None:
        """Close the channel; requests under way fail. Idempotent."""
        with self._lock:
            self._state = "closed"
        self._channel.close()
        reader, self._reader = self._reader, None
        if reader is not None and reader is not threading.current_thread():
            reader.join(5.0)
        self._fail_all(LinkStateError(self.name, "closed", ["greeted"]))

    # --- requests ---

    def request(
        self,
        kind: int,
        payload: bytes = b"",
        *,
        lane: int = 0,
        new_lane: bool = False,
        on_output: Callable[[bytes], None] | None = None,
        on_done: Callable[[Pending], None] | None = None,
    ) -> Pending:
        """
        Send a request of a kind of `pilab.agent`.

        Args:
            kind: REQUEST, PING, CANCEL or INPUT.
            payload: Packed.
            lane: The worker that it is for; 0: any.
            new_lane: Make a lane, whose number is the request's.
            on_output: Called with what the request puts out before its answer.
            on_done: Called once when the request is answered or fails.

        Raises:
            LinkStateError: The agent was not greeted, or is gone.
            BenchError: The channel broke.
        """
        pending = Pending(next(self._numbers), on_output, on_done)
        pending.frames_before = self._decoder.frames
        with self._lock:
            if self._state != "greeted":
                raise LinkStateError(self.name, self._state, ["greeted"])
            session = self._session
            if kind != agent.INPUT:
                self._pending[pending.id] = pending
        lane = pending.id if new_lane else lane
        try:
            message = agent.frame(kind, session, pending.id, lane, payload)
            pending.sent_ns = time.monotonic_ns()
            self._send(message)
        except BaseException:
            self._forget(pending)
            raise
        return pending

    def ping(self, timeout_s: float = _PING_TIMEOUT_S) -> Pending | None:
        """Return the answered ping, or None if it was not answered in time."""
        try:
            pending = self.request(agent.PING)
            if pending.wait(self.deadlines(timeout_s)):
                return pending
        except BenchError:
            return None
        self._forget(pending)
        return None

    def silence(self, pending: Pending, waited_for: str, timeout_s: float) -> BenchError:
        """Return the error that says that the agent as a whole has not answered since a request."""
        return self._silence(waited_for, timeout_s, pending.frames_before)

    # --- inside ---

    def _begin_session(self) -> tuple[Pending, int]:
        pending = Pending(next(self._numbers))
        with self._lock:
            self._session = 0
            self._state = "open"
            self._greeting = secrets.randbits(64)
            self._pending[pending.id] = pending
            return pending, self._greeting

    def _silence(self, waited_for: str, timeout_s: float, frames_before: int) -> BenchError:
        garbage = self._decoder.garbage_bytes - self._garbage_seen
        if garbage and self._decoder.frames == frames_before:
            return ProtocolError(
                self.name,
                f"a frame as {waited_for}",
                f"{garbage} bytes that are none, the last {self._decoder.excerpt!r}",
                hint="is something else than pilab's agent, of this version, on that port?",
            )
        seen = f"{garbage} bytes of garbage" if garbage else "nothing"
        return LinkTimeoutError(self.name, waited_for, timeout_s, seen)

    def _send(self, message: bytes) -> None:
        with self._send_lock:
            self._channel.send(message)

    def _forget(self, pending: Pending) -> None:
        with self._lock:
            self._pending.pop(pending.id, None)

    def _fail_all(self, error: BenchError) -> None:
        with self._lock:
            failed = list(self._pending.values())
            self._pending.clear()
        now_ns = time.monotonic_ns()
        for pending in failed:
            pending.finish(None, error, now_ns)

    def _read(self, decoder: agent.Decoder) -> None:
        """Dispatch what arrives until the channel ends."""
        error: BenchError = LinkStateError(self.name, "lost", ["greeted"])
        try:
            while True:
                data = self._channel.receive(None)
                now_ns = time.monotonic_ns()
                for message in decoder.feed(data):
                    self._dispatch(message, now_ns)
        except BenchError as ended:
            error = ended
        finally:
            with self._lock:
                lost = self._decoder is decoder and self._state != "closed"
                if lost:
                    self._state = "lost"
            if lost:
                self._fail_all(error)

    def _dispatch(self, message: agent.Frame, now_ns: int) -> None:
        ours = self._greeting if message.kind == agent.HELLO else self._session
        with self._lock:
            pending = self._pending.get(message.id)
            if message.session != ours or pending is None:
                self._stale_frames += message.session != ours
                return
            if message.kind != agent.OUTPUT:
                del self._pending[message.id]
        if message.kind != agent.OUTPUT:
            pending.finish(message, None, now_ns)
        elif pending.on_output is not None:
            pending.on_output(message.payload)


def unpack(reply: agent.Frame) -> Any:
    """Return a reply's payload as a value; ProtocolError if it is none."""
    try:
        return agent.unpack(reply.payload)
    except (ValueError, IndexError) as error:
        raise ProtocolError("agent", "a packed value", repr(reply.payload[:64])) from error
