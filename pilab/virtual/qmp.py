"""QEMU's control channel, with a deadline on every call."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from qemu.qmp import ExecInterruptedError, ExecuteError, QMPClient
from qemu.qmp.error import QMPError

from pilab.errors import LinkStateError, LinkTimeoutError, MachineError, ProtocolError

T = TypeVar("T")
EventSink = Callable[[str, dict[str, Any]], None]

# A machine that is ended closes the link under the library's feet, which it reports loudly.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


class Qmp:
    """
    A QMP link for callers that are not asynchronous; threads may share it.

    Life cycle: `connect` once, `execute` any number of times, `close`. The event loop runs in
    a thread of its own.

    Args:
        path: The Unix socket on which QEMU listens.
        on_event: Called with (name, data) for every event, in the link's thread.
    """

    def __init__(self, path: Path, on_event: EventSink | None = None) -> None:
        self.path = path
        self._on_event = on_event
        self._client = QMPClient("pilab")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="pilab-qmp", daemon=True)
        self._state = "new"

    def connect(self, timeout_s: float) -> None:
        """
        Connect and negotiate; QEMU's socket must exist.

        Raises:
            LinkTimeoutError: QEMU does not answer.
            MachineError: The socket refuses.
        """
        if self._state != "new":
            raise LinkStateError("qmp", self._state, ["new"])
        self._thread.start()
        self._state = "connected"
        self._wait(self._connect(), "greeting", timeout_s)

    def execute(
        self, command: str, arguments: dict[str, Any] | None = None, *, timeout_s: float = 5.0
    ) -> Any:
        """
        Run a command and return what QEMU returned.

        Raises:
            ProtocolError: QEMU refused the command; `seen` holds its words.
            LinkTimeoutError: No answer in `timeout_s` seconds.
            MachineError: QEMU is gone.
        """
        if self._state != "connected":
            raise LinkStateError("qmp", self._state, ["connected"])
        return self._wait(
            self._client.execute(command, arguments), f"answer to {command}", timeout_s
        )

    def monitor(self, line: str, *, timeout_s: float = 10.0) -> str:
        """Run a line of the human monitor (savevm, loadvm); return what it printed."""
        answer = self.execute("human-monitor-command", {"command-line": line}, timeout_s=timeout_s)
        return str(answer).strip()

    def close(self) -> None:
        """Disconnect and end the thread. Idempotent."""
        if self._state != "connected":
            self._state = "closed"
            return
        self._state = "closed"
        # Whether QEMU says goodbye does not matter: the loop ends either way.
        with contextlib.suppress(TimeoutError, concurrent.futures.CancelledError):
            asyncio.run_coroutine_threadsafe(self._disconnect(), self._loop).result(2.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(2.0)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    async def _connect(self) -> None:
        await self._client.connect(str(self.path))
        self._listening = asyncio.ensure_future(self._listen())

    async def _listen(self) -> None:
        async for event in self._client.events:
            if self._on_event is not None:
                data = event.get("data")
                self._on_event(str(event["event"]), data if isinstance(data, dict) else {})

    async def _disconnect(self) -> None:
        self._listening.cancel()
        with contextlib.suppress(QMPError, EOFError, OSError):  # closed is what was wanted
            await self._client.disconnect()

    def _wait(self, work: Coroutine[Any, Any, T], waited_for: str, timeout_s: float) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            future.cancel()
            raise LinkTimeoutError("qmp", waited_for, timeout_s) from None
        except ExecuteError as error:
            raise ProtocolError("qmp", waited_for, str(error)) from error
        except (ExecInterruptedError, QMPError, EOFError, OSError) as error:
            raise MachineError(f"QEMU is gone: {error}") from error
