"""
QEMU's qtest channel: sets the lines of a GPIO controller and hears its outputs.

A malformed command hits an assertion in QEMU and kills the machine, so everything is
validated here. Answers ("OK ...") and interrupts ("IRQ raise 3") share one stream; a thread
reads it and tells them apart.
Source: QEMU 7.2's behaviour, measured; the commands are those of its qtest protocol.
"""

from __future__ import annotations

import contextlib
import queue
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pilab.errors import LinkTimeoutError, MachineError, ProtocolError

IrqSink = Callable[[int, int, bool], None]
"""Called with (arrival in host CLOCK_MONOTONIC ns, line, raised)."""

_QOM_PATH = re.compile(r"/[A-Za-z0-9_./\[\]-]+")
_IRQ_NAME = re.compile(r"[a-z][a-z0-9-]*")


class Qtest:
    """
    One connection to QEMU's qtest server; threads may share it.

    Life cycle: connected by the constructor, ended by `close` or by QEMU's end. Commands are
    answered in order, one at a time.

    Args:
        path: The Unix socket on which QEMU listens.
        on_irq: Called for every intercepted output that moves, in the reader's thread.
        timeout_s: How long an answer may take, in seconds.

    Raises:
        MachineError: The socket refuses.
    """

    def __init__(self, path: Path, on_irq: IrqSink, timeout_s: float = 5.0) -> None:
        self._on_irq = on_irq
        self._timeout_s = timeout_s
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._command = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            raise MachineError(f"qtest: cannot connect: {error}") from error
        self._reader = threading.Thread(target=self._read, name="pilab-qtest", daemon=True)
        self._reader.start()

    def set_irq_in(self, qom_path: str, name: str, line: int, level: int) -> None:
        """
        Set an input line of a device; on return the device has seen it.

        Args:
            qom_path: The device: "/machine/unattached/device[5]".
            name: The name of its inputs: "unnamed-gpio-in".
            line: Which one; the caller knows how many there are.
            level: 0 or 1.
        """
        self._check(qom_path, name)
        if line < 0 or level not in (0, 1):
            raise ValueError(f"no line {line} or level {level}")
        self._ask(f"set_irq_in {qom_path} {name} {line} {level}")

    def intercept_out(self, qom_path: str) -> None:
        """Hear the outputs of a device from now on; once per QEMU process, one device."""
        self._check(qom_path)
        self._ask(f"irq_intercept_out {qom_path}")

    def readl(self, address: int) -> int:
        """Return a 32-bit word of guest-physical memory or of a device's registers."""
        if not 0 <= address < 1 << 64:
            raise ValueError(f"no address {address:#x}")
        words = self._ask(f"readl {address:#x}")
        if len(words) != 1:
            raise ProtocolError("qtest", "one word", " ".join(words))
        return int(words[0], 0)

    def writel(self, address: int, value: int) -> None:
        """Write a 32-bit word to guest-physical memory or to a device's registers."""
        if not 0 <= address < 1 << 64 or not 0 <= value < 1 << 32:
            raise ValueError(f"no address {address:#x} or value {value:#x}")
        self._ask(f"writel {address:#x} {value:#x}")

    def sync(self) -> None:
        """Return when everything that QEMU said before has been given to the sink."""
        self._ask("endianness")

    def close(self) -> None:
        """Disconnect. Idempotent."""
        with contextlib.suppress(OSError):  # QEMU closed first
            self._socket.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._reader:
            self._reader.join(2.0)
        self._socket.close()

    def _check(self, qom_path: str, name: str = "x") -> None:
        if not _QOM_PATH.fullmatch(qom_path) or not _IRQ_NAME.fullmatch(name):
            raise ValueError(f"not a device or input name: {qom_path!r} {name!r}")

    def _ask(self, command: str) -> list[str]:
        with self._command:
            try:
                self._socket.sendall(command.encode() + b"\n")
                answer = self._answers.get(timeout=self._timeout_s)
            except queue.Empty:
                # A late answer would be taken for that of the next command.
                self.close()
                verb = command.split()[0]
                raise LinkTimeoutError("qtest", f"answer to {verb}", self._timeout_s) from None
            except OSError as error:
                raise MachineError(f"qtest: QEMU is gone: {error}") from error
        if answer is None:
            raise MachineError("qtest: QEMU closed the connection")
        status, *words = answer.split()
        if status != "OK":
            raise ProtocolError("qtest", f"OK to {command!r}", answer)
        return words

    def _read(self) -> None:
        rest = b""
        try:
            while data := self._socket.recv(65536):
                t_ns = time.monotonic_ns()
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._hear(t_ns, line.decode("ascii", "replace").rstrip("\r"))
        except OSError:
            pass  # closed: whoever waits is told below
        self._answers.put(None)

    def _hear(self, t_ns: int, line: str) -> None:
        if line.startswith("IRQ "):
            _, verb, number = line.split()
            self._on_irq(t_ns, int(number), verb == "raise")
        elif line:
            self._answers.put(line)
