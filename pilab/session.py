"""The benches of one process: one per kernel, opened when first needed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

from pilab.bench import Bench, open_bench
from pilab.errors import BenchError
from pilab.recorder import Recorder
from pilab.store.progress import PlainProgress

PR_SET_PDEATHSIG = 1  # Source: linux/prctl.h
GIVE_UP_AFTER = 3


class BenchPool:
    """
    Opens benches on demand and keeps them for the next experiment.

    A bench that was at fault is closed and opened anew; when that has happened
    `GIVE_UP_AFTER` times in a row, the last error is raised again at once, for a broken bench
    should stop the suite instead of failing fifty experiments slowly.

    Args:
        bench: The bench's name or file.
        kmod: Folder of the modules; None: the checkout's.
        run: Run folder; None: nothing is written.
        worker: Name of the parallel worker that this process is; "" if it is alone.
    """

    def __init__(self, bench: str, kmod: Path | None, run: Path | None, worker: str) -> None:
        self._name = bench
        self._kmod = kmod
        self._run = run
        self._worker = worker
        self._open: dict[str, Bench] = {}
        self._failures = 0
        self._last: BenchError | None = None
        self.recorder: Recorder | None = None
        self._recorders: dict[str, Recorder] = {}

    def bench(self, kernel: str) -> Bench:
        """
        Return the open bench for a kernel; the others are halted.

        Raises:
            BenchError: It cannot be opened.
        """
        if self._last is not None and self._failures >= GIVE_UP_AFTER:
            raise self._last
        for series, other in self._open.items():
            if series != kernel:
                other.power.off()
        if kernel not in self._open:
            dut = f"{kernel}-{self._worker or '0'}"
            self.recorder = self._recorder(dut)
            try:
                self._open[kernel] = open_bench(
                    self._name,
                    kernel,
                    kmod=self._kmod,
                    recorder=self.recorder,
                    progress=PlainProgress(sys.stderr),
                    dut=dut,
                )
            except BenchError as error:
                self._failures += 1
                self._last = error
                raise
        self.recorder = self._recorders.get(self._open[kernel].timeline.dut)
        return self._open[kernel]

    def distrust(self, kernel: str) -> None:
        """Close the bench of a kernel: it was at fault."""
        if (bench := self._open.pop(kernel, None)) is not None:
            bench.close()

    def close(self) -> None:
        """Close everything. Idempotent."""
        for kernel in list(self._open):
            self.distrust(kernel)
        for recorder in self._recorders.values():
            recorder.close()
        self._recorders.clear()

    def _recorder(self, dut: str) -> Recorder | None:
        if self._run is None:
            return None
        if dut not in self._recorders:
            self._recorders[dut] = Recorder(self._run, dut)
        return self._recorders[dut]


def die_with_parent() -> None:
    """Have the kernel end this process when the one that started it is gone."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
