"""The virtual Pi's eight GPIO lines: the PL061 controller as seen from outside the guest."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pilab.events import Level
from pilab.virtual.machine import PL061_LINES, Machine
from pilab.virtual.qtest import Qtest

# Source: ARM DDI 0190 (PL061): GPIODATA with all mask bits, GPIODIR; the base is QEMU's virt.
DATA = 0x9030000 + 0x3FC
DIRECTION = 0x9030000 + 0x400
ALL_LINES = (1 << PL061_LINES) - 1

OutputSink = Callable[[int, int, Level], None]
"""Called with (arrival in host CLOCK_MONOTONIC ns, line, level)."""


class VirtualGpio:
    """
    Drives the guest's inputs and hears its outputs; threads may share it.

    Args:
        machine: The running or halted machine; one VirtualGpio per machine.

    Raises:
        BenchError: QEMU does not answer as expected.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._controller = machine.gpio_controller()
        self._sink: OutputSink | None = None
        self._muted = False
        self._outputs = [Level.LOW] * PL061_LINES
        self._inputs: dict[int, Level] = {}
        self._guard = threading.Lock()
        self._qtest = Qtest(machine.qtest_path, self._hear)
        self._qtest.intercept_out(self._controller)

    def listen(self, sink: OutputSink | None) -> None:
        """Call `sink` with every edge of an output, in the reader's thread."""
        self._sink = sink

    def set_input(self, line: int, level: Level) -> int:
        """Set an input; return when the controller had it, host CLOCK_MONOTONIC ns."""
        with self._guard:
            self._inputs[line] = level
            self._qtest.set_irq_in(self._controller, "unnamed-gpio-in", line, int(level))
        return time.monotonic_ns()

    def set_inputs(self, levels: dict[int, Level]) -> int:
        """Set several inputs at one instant of the guest's time."""
        self._machine.stop()
        try:
            for line, level in levels.items():
                self.set_input(line, level)
        finally:
            self._machine.resume()
        return time.monotonic_ns()

    def level(self, line: int) -> Level:
        """Return the level on the wire: what the guest drives, else what we drive."""
        direction = self._qtest.readl(DIRECTION)
        if direction & (1 << line):
            return Level(self._qtest.readl(DATA) >> line & 1)
        with self._guard:
            return self._inputs.get(line, Level.LOW)

    def guest_drives(self, line: int) -> bool:
        """Whether the guest made this line an output."""
        return bool(self._qtest.readl(DIRECTION) & (1 << line))

    def sync(self) -> None:
        """Return when every edge that happened before has been given to the sink."""
        self._qtest.sync()

    def before_restore(self) -> None:
        """
        Make the halted guest's outputs low, unheard.

        QEMU tells an edge only if the level differs from the last one it told, and restoring
        does not change what it remembers: an output left high would swallow the next rise.
        """
        self._muted = True
        self._qtest.writel(DIRECTION, ALL_LINES)
        self._qtest.writel(DATA, 0)
        self._qtest.sync()

    def after_restore(self) -> None:
        """Drive every input low, and hear again; the guest is still halted."""
        with self._guard:
            self._inputs.clear()
        for line in range(PL061_LINES):
            self._qtest.set_irq_in(self._controller, "unnamed-gpio-in", line, 0)
        self._qtest.sync()
        self._muted = False

    def close(self) -> None:
        """Let go of QEMU. Idempotent."""
        self._sink = None
        self._qtest.close()

    def _hear(self, t_ns: int, line: int, raised: bool) -> None:
        if line >= PL061_LINES or self._muted:
            return
        if (sink := self._sink) is not None:
            sink(t_ns, line, Level(raised))
