"""The virtual Pi behind the ports: board over qtest, power over QMP, agent over virtio-serial."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from pilab.errors import BenchError, LinkStateError, MachineError
from pilab.events import Level
from pilab.ports import BoardEdge, Capability, EdgeSink
from pilab.virtual.gpio import VirtualGpio
from pilab.virtual.machine import PL061_LINES, Machine


class QemuBoard:
    """
    The second GPIO board of a virtual Pi: the other ends of its PL061's lines.

    Threads may share it. Edges carry the time of their arrival from QEMU.

    Args:
        gpio: The lines; closed with the board.
    """

    def __init__(self, gpio: VirtualGpio) -> None:
        self._gpio = gpio
        self._driven: set[int] = set()
        self._watched: frozenset[int] = frozenset()
        self._sink: EdgeSink | None = None
        self._counts: dict[int, int] = {}
        self._closed = False
        self._guard = threading.Lock()
        gpio.listen(self._hear)

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Interrupts and edges are real; time is that of an emulator."""
        return frozenset(
            {
                Capability.EDGE_INTERRUPTS,
                Capability.LEVEL_INTERRUPTS,
                Capability.WATCH_EDGES,
                Capability.SURVIVES_CRASH,
            }
        )

    @property
    def offsets(self) -> frozenset[int]:
        """The PL061's eight lines."""
        return frozenset(range(PL061_LINES))

    def drive(self, offset: int, level: Level) -> int:
        """See `pilab.ports.Board.drive`."""
        self._claim([offset])
        return self._gpio.set_input(offset, level)

    def drive_together(self, levels: dict[int, Level]) -> int:
        """See `pilab.ports.Board.drive_together`; the machine is halted meanwhile."""
        self._claim(levels)
        return self._gpio.set_inputs(levels)

    def release(self, offset: int) -> None:
        """See `pilab.ports.Board.release`; a line that nobody drives is low."""
        self._check([offset])
        with self._guard:
            self._driven.discard(offset)
        self._gpio.set_input(offset, Level.LOW)

    def level(self, offset: int) -> Level:
        """See `pilab.ports.Board.level`."""
        self._check([offset])
        return self._gpio.level(offset)

    def dut_drives(self, offset: int) -> bool:
        """Whether the DUT made this line an output."""
        self._check([offset])
        return self._gpio.guest_drives(offset)

    def watch(self, offsets: Iterable[int], sink: EdgeSink) -> None:
        """See `pilab.ports.Board.watch`."""
        wanted = frozenset(offsets)
        self._check(wanted)
        with self._guard:
            if clash := wanted & self._driven:
                raise ValueError(f"line {min(clash)} is being driven, it cannot be watched")
        self._gpio.sync()
        with self._guard:
            self._watched = wanted
            self._sink = sink
            self._counts = dict.fromkeys(wanted, 0)

    def sync(self) -> None:
        """See `pilab.ports.Board.sync`."""
        self._check([])
        self._gpio.sync()

    def forget_drives(self) -> None:
        """After a restore nothing is driven any more."""
        with self._guard:
            self._driven.clear()

    def close(self) -> None:
        """See `pilab.ports.Board.close`."""
        if self._closed:
            return
        with contextlib.suppress(BenchError):  # a machine that is gone drives nothing
            for offset in sorted(self._driven):
                self.release(offset)
        self._closed = True
        self._sink = None
        self._gpio.close()

    def _hear(self, t_ns: int, line: int, level: Level) -> None:
        with self._guard:
            if line not in self._watched or self._sink is None:
                return
            self._counts[line] += 1
            sink, seq = self._sink, self._counts[line]
        sink(BoardEdge(t_ns=t_ns, offset=line, level=level, seq=seq))

    def _claim(self, offsets: Iterable[int]) -> None:
        self._check(offsets)
        with self._guard:
            for offset in offsets:
                if offset in self._watched:
                    raise ValueError(f"line {offset} is being watched, it cannot be driven")
            self._driven.update(offsets)

    def _check(self, offsets: Iterable[int]) -> None:
        if self._closed:
            raise LinkStateError("board", "closed", ["open"])
        for offset in offsets:
            if offset not in self.offsets:
                raise ValueError(f"no line {offset} on this board (0 to {PL061_LINES - 1})")


class QemuPower:
    """
    Switches a virtual Pi and restores its snapshot.

    Args:
        machine: The machine.
        gpio: Its lines, told before and after.
        board: Its board, told afterwards.
        while_halted: Called when the old kernel is halted and before it is gone: drains the
            console, drops what was under way to the agent.
    """

    def __init__(
        self,
        machine: Machine,
        gpio: VirtualGpio,
        board: QemuBoard,
        while_halted: Callable[[], None],
    ) -> None:
        self._machine = machine
        self._gpio = gpio
        self._board = board
        self._while_halted = while_halted

    def on(self) -> None:
        """See `pilab.ports.Power.on`."""
        self._machine.resume()

    def off(self) -> None:
        """Halt the machine; `pristine` or `on` goes on."""
        self._machine.stop()

    def pristine(self) -> None:
        """See `pilab.ports.Power.pristine`: stop, loadvm, cont."""
        self._machine.stop()
        self._gpio.before_restore()
        self._while_halted()
        self._machine.restore()
        self._gpio.after_restore()
        self._board.forget_drives()
        self._machine.resume()

    def starved_ns(self) -> int:
        """See `pilab.ports.Power.starved_ns`."""
        return self._machine.starved_ns()

    def alive(self) -> bool:
        """See `pilab.ports.Power.alive`."""
        return self._machine.alive()


class VirtioChannel:
    """
    The host's end of the agent's virtio-serial port.

    Args:
        path: The Unix socket on which QEMU listens.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket: socket.socket | None = None

    def open(self, timeout_s: float) -> None:
        """See `pilab.ports.Channel.open`."""
        self.close()
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        link.settimeout(timeout_s)
        try:
            link.connect(str(self._path))
        except OSError as error:
            link.close()
            raise MachineError(f"the agent's port refuses: {error}") from error
        link.settimeout(10.0)
        self._socket = link

    def send(self, data: bytes) -> None:
        """See `pilab.ports.Channel.send`."""
        link = self._socket
        if link is None:
            raise LinkStateError("agent", "closed", ["open"])
        try:
            link.sendall(data)
        except TimeoutError as error:
            raise MachineError("the DUT does not take what is sent to the agent") from error
        except OSError as error:
            raise MachineError(f"the agent's port is gone: {error}") from error

    def receive(self, timeout_s: float | None) -> bytes:
        """See `pilab.ports.Channel.receive`."""
        link = self._socket
        if link is None:
            raise LinkStateError("agent", "closed", ["open"])
        try:
            readable, _, _ = select.select([link], [], [], timeout_s)
            if not readable:
                return b""
            data = link.recv(1 << 18)
        except (OSError, ValueError) as error:
            raise MachineError(f"the agent's port is gone: {error}") from error
        if not data:
            raise MachineError("the agent's port was closed")
        return data

    def close(self) -> None:
        """See `pilab.ports.Channel.close`."""
        link, self._socket = self._socket, None
        if link is not None:
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
            link.close()
