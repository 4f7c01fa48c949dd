"""Requests to the agent as the DUT's user space sees them: calls, their answers, their failures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pilab import agent
from pilab.agent_function import FunctionSource, source_of
from pilab.agent_link import AgentLink, Pending, unpack
from pilab.errors import (
    DutKilledError,
    DutOSError,
    DutTimeoutError,
    LinkStateError,
    PilabError,
    ProtocolError,
    RemoteCallError,
)
from pilab.events import Action, Note
from pilab.timeline import Timeline

_KILL_TIMEOUT_S = 3.0
_GRACE_S = 1.0


@dataclass(frozen=True, slots=True)
class Request:
    """
    A request and how a person names it.

    Args:
        operation: As the agent knows it.
        args: Its arguments, packable.
        verb: For the timeline: "read".
        subject: What it is done to: "/dev/pilab_led".
        detail: What else there is to say of it.
        alarm_s: After how long the worker itself gives up, in s; None: never.
    """

    operation: str
    args: tuple[Any, ...]
    verb: str
    subject: str
    detail: str = ""
    alarm_s: float | None = None

    @property
    def words(self) -> str:
        """ "read /dev/pilab_led"."""
        return f"{self.verb} {self.subject}".strip()


def call_request(
    function: Callable[..., Any], args: Sequence[Any], alarm_s: float | None = None
) -> Request:
    """Return the request that runs a function; raises UnsendableError."""
    source: FunctionSource = source_of(function)
    sent = (source.text, source.file, source.name, list(args))
    return Request("call", sent, "call", source.name, alarm_s=alarm_s)


class AgentCall:
    """
    A request under way on the DUT: `pilab.ports.DutCall`.

    Its action is put on the timeline when the answer arrives, whoever waits for it or not.

    Args:
        link: The link.
        timeline: Where actions go, if anywhere.
        request: What is asked.
        lane: The worker that is asked; 0: any.
        new_lane: Ask a worker that stays for the lane's later requests.
        on_output: Called with what the request puts out before its answer.
        on_done: Called when the answer is there, or there will be none.
    """

    def __init__(
        self,
        link: AgentLink,
        timeline: Timeline | None,
        request: Request,
        *,
        lane: int = 0,
        new_lane: bool = False,
        on_output: Callable[[bytes], None] | None = None,
        on_done: Callable[[], None] | None = None,
    ) -> None:
        self._link = link
        self._timeline = timeline
        self._request = request
        self._lane = lane
        self._then = on_done
        self._outcome: Any = None
        self._settled = False
        payload = agent.pack([request.operation, request.args, request.alarm_s])
        self._pending = link.request(
            agent.REQUEST,
            payload,
            lane=lane,
            new_lane=new_lane,
            on_output=on_output,
            on_done=self._on_done,
        )

    @property
    def id(self) -> int:
        """The request's number; the lane's, if it made one."""
        return self._pending.id

    def done(self) -> bool:
        """See `pilab.ports.DutCall.done`."""
        return self._pending.done

    def result(self, within_s: float | None = 5.0) -> Any:
        """See `pilab.ports.DutCall.result`."""
        if self._pending.wait(self._link.deadlines(within_s)):
            return self._value(self._pending)
        return self._overdue(within_s or 0.0)

    def finish(self, timeout_s: float) -> Any:
        """
        As `result`, for a caller who will not ask again: what is not done in time is killed.

        A worker with an alarm is given time to say itself that it went off.
        """
        try:
            grace_s = 0.0 if self._request.alarm_s is None else _GRACE_S
            return self.result(timeout_s + grace_s)
        except DutTimeoutError as error:
            if not self.done():
                self.cancel()
            raise DutTimeoutError(error.call, timeout_s) from None

    def cancel(self) -> None:
        """See `pilab.ports.DutCall.cancel`; returns once the process is gone or given up."""
        if self._lane or not self.done():
            kill(self._link, self._timeline, self._lane or self.id, self._request.words)

    def _overdue(self, timeout_s: float) -> Any:
        """Say whose fault it is that there is no answer."""
        alive = self._link.ping()
        if self.done():  # it came while we asked
            return self._value(self._pending)
        if alive is not None:
            raise DutTimeoutError(self._request.words, timeout_s)
        raise self._link.silence(self._pending, f"answer to {self._request.words}", timeout_s)

    def _value(self, pending: Pending) -> Any:
        if pending.error is not None:
            raise pending.error
        if not self._settled:
            assert pending.reply is not None
            self._outcome = self._judge(pending.reply)
            self._settled = True
        if isinstance(self._outcome, PilabError):
            raise self._outcome
        return self._outcome

    def _judge(self, reply: agent.Frame) -> Any:
        """Return the value, or the error to raise."""
        request = self._request
        answer = unpack(reply)
        match answer:
            case {"value": value}:
                return value
            case {"errno": int(number), "call": str(call), "subject": str(subject)}:
                return DutOSError(call or request.subject, subject or "on the DUT", number)
            case {"timeout": True}:
                return DutTimeoutError(request.words, request.alarm_s or 0.0)
            case {"kind": str(kind), "text": str(text), "traceback": str(traceback)}:
                return RemoteCallError(request.subject, kind, text, traceback)
            case {"lost": "killed", "signal": int(signal)}:
                return DutKilledError(request.words, signal)
            case {"lost": "stuck"}:
                return DutTimeoutError(f"{request.words} (killed, stuck in the kernel)", 1.0)
            case {"lost": "exited", "status": int(status)}:
                return RemoteCallError(
                    request.subject, "SystemExit", f"its process ended with status {status}"
                )
            case {"lost": "ended"}:
                return LinkStateError(f"process of {request.words}", "ended", ["running"])
        return ProtocolError(self._link.name, f"an answer to {request.words}", repr(answer)[:200])

    def _on_done(self, pending: Pending) -> None:
        """Runs in the link's reader, or in who closes it; maybe before the sender is back."""
        if self._timeline is not None:
            self._timeline.add(self._action(pending))
        if self._then is not None:
            self._then()

    def _action(self, pending: Pending) -> Action:
        request = self._request
        number: int | None = None
        detail = request.detail
        try:
            self._value(pending)
            number = 0
        except DutOSError as error:
            number = error.errno
        except PilabError as error:
            detail = "; ".join(filter(None, [detail, error.message]))
        return Action(
            t_ns=pending.sent_ns,
            verb=request.verb,
            subject=request.subject,
            detail=detail,
            end_ns=pending.arrival_ns,
            errno=number,
        )


def kill(link: AgentLink, timeline: Timeline | None, number: int, words: str) -> None:
    """
    Kill the worker of a request or lane and wait until it is gone.

    One that cannot die, for it hangs in the kernel, is given up and noted on the timeline.

    Raises:
        BenchError: There is no agent to do it.
    """
    pending = link.request(agent.CANCEL, lane=number)
    if not pending.wait(link.deadlines(_KILL_TIMEOUT_S)):
        raise link.silence(pending, f"end of {words}", _KILL_TIMEOUT_S)
    assert pending.reply is not None
    how = unpack(pending.reply)
    if timeline is not None and how.get("value") and how["value"].get("lost") == "stuck":
        text = (
            f"{words}: process {how['value'].get('pid')} hangs in the kernel and cannot be killed"
        )
        timeline.add(Note(t_ns=timeline.now_ns(), text=text))


def shown(data: bytes) -> str:
    """Return written bytes as the timeline shows them."""
    return repr(data if len(data) <= 32 else data[:32] + b"...")[1:]
