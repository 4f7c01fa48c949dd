"""The live bench: a DUT, the board that presses its buttons, and what a check may ask of them."""

from __future__ import annotations

import contextlib
import errno as errno_names
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pilab.assembly import Assembly, assemble
from pilab.checks.console_watch import ConsoleWatch
from pilab.checks.crashes import ExpectedCrash
from pilab.checks.gpio_lines import GpioLine, lines_by_name, read_lines_on_dut
from pilab.checks.interrupts import PATH as INTERRUPTS
from pilab.checks.interrupts import InterruptCounter, InterruptRow, parse_interrupts
from pilab.checks.modules import LoadedModule, ModuleState, format_parameters, parse_modules
from pilab.checks.printk import PrintkLog
from pilab.clock import Deadline
from pilab.errors import (
    BenchError,
    CheckError,
    DutOSError,
    KernelCrashError,
    LinkTimeoutError,
    MachineError,
    ModuleFaultError,
    UnknownNameError,
)
from pilab.events import Action, ClockMapped, Edge, InterruptCount, ModuleBuilt, Note
from pilab.kernel.build import BuiltModule
from pilab.ports import Capability, Completed, DutCall, DutProcess, Target
from pilab.recorder import Recorder
from pilab.store.progress import Progress
from pilab.timeline import Timeline
from pilab.wires import Button, Led, WireTap
from pilab.wiring import Wire

CONNECT_TIMEOUT_S = 10.0
PING_TIMEOUT_S = 2.0


class Bench:
    """
    A bench in use: what the `bench` fixture gives to a check.

    One thread uses it. Life cycle: `open_bench` (or the constructor), for each experiment
    `begin` and `end`, then `close`; or in a `with`. Between `begin` and `end` the DUT's kernel
    is one that no other experiment has touched.

    Wires are attributes: `bench.button_a` is a `pilab.wires.Button`, `bench.led_a` a
    `pilab.wires.Led`.

    Args:
        parts: The assembled bench.
        recorder: Where timeline and console go besides memory.
    """

    def __init__(self, parts: Assembly, recorder: Recorder | None = None) -> None:
        self.name = parts.file.name
        self.kernel = parts.tree.series
        self.wires: Mapping[str, Wire] = parts.file.wires
        self.board = parts.board
        self.console = parts.console
        self.target: Target = parts.target
        self.power = parts.power
        self.timeline: Timeline = parts.timeline
        self.counts: dict[str, int] = {}
        self._parts = parts
        self._sources: dict[str, Path] = {}
        self._built: dict[str, BuiltModule] = {}
        self._recorder = recorder
        if recorder is not None:
            self.timeline.add_sink(recorder.sink)
        self.watch = ConsoleWatch(parts.console, self.timeline, recorder, self._locate)
        self.watch.on_dead(self.target.close)
        tap = WireTap(self.wires, self.board, self.timeline)
        self._tap = tap
        self._live: dict[str, Button | Led] = {
            name: (Button if wire.drives == "board" else Led)(
                wire, tap, self.deadline, self._line_state
            )
            for name, wire in self.wires.items()
        }

    # --- life cycle -----------------------------------------------------------------

    def begin(self, experiment: str = "", sources: Mapping[str, Path] | None = None) -> None:
        """
        Give the DUT a pristine kernel and greet its agent.

        Args:
            experiment: Name put on the events from now on.
            sources: Module name to folder, for modules that do not come from kmod/.

        Raises:
            BenchError: The DUT does not come up.
        """
        start_ns = self.timeline.now_ns()
        self.timeline.forget()
        self.timeline.experiment = experiment
        self._sources = dict(sources or {})
        self._built = {}
        self.counts = {}
        self.watch.pause()
        self.power.pristine()
        self.watch.resume()
        self._greet()
        self.timeline.add(
            Action(t_ns=start_ns, verb="restore", subject=self.name, end_ns=self.timeline.now_ns())
        )

    def end(self) -> None:
        """Collect what is still on its way; the DUT may be dead."""
        with contextlib.suppress(BenchError):
            self.board.sync()
        with contextlib.suppress(BenchError):
            self.console.drain(1.0)
        self.watch.settle(0.0)

    def close(self) -> None:
        """End everything and leave nothing behind. Idempotent."""
        self._parts.close()
        if self._recorder is not None:
            self.timeline.remove_sink(self._recorder.sink)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What this bench can do."""
        return self.board.capabilities

    def deadline(self, timeout_s: float | None) -> Deadline:
        """Return a deadline that forgives the time in which the DUT was starved."""
        return Deadline(timeout_s, self.timeline.clock, self.power.starved_ns)

    # --- modules --------------------------------------------------------------------

    def load(self, name: str, *words: str, **parameters: Any) -> LoadedModule:
        """
        Build, deploy and load a module; unload it at the end of the `with`.

        Args:
            name: Folder under kmod/ and module: "irq_button".
            words: Parameters as insmod takes them: "values=1,2".
            parameters: Parameters by name.

        Raises:
            BuildError: It does not build.
            DutOSError: The kernel refuses it; `errno` says how.
            DutKilledError: The kernel killed the loader (an oops in init).
        """
        self.insert(name, *words, **parameters)
        module = name.replace("-", "_")
        return LoadedModule(module, lambda: self.unload(module))

    def insert(self, name: str, *words: str, **parameters: Any) -> None:
        """Build, deploy and load a module that stays; as `load` otherwise."""
        built = self.build(name)
        image = built.stripped.read_bytes()
        self._guarded(
            lambda: self.target.load(image, built.name, format_parameters(words, parameters))
        )

    def unload(self, name: str) -> None:
        """
        Unload a module.

        Raises:
            DutOSError: EAGAIN (EWOULDBLOCK) if it is in use, ENOENT if it is not loaded.
        """
        self._guarded(lambda: self.target.unload(name))

    def build(self, name: str) -> BuiltModule:
        """Return the module built for this kernel; built once, then from the cache."""
        if name not in self._built:
            folder = self._sources.get(name, self._parts.kmod / name)
            if not folder.is_dir():
                known = [p.name for p in self._parts.kmod.iterdir() if (p / "Kbuild").exists()]
                raise UnknownNameError("module", name, sorted(known))
            built = self._parts.builder.build(folder, include=self._parts.kmod / "include")
            self._built[name] = built
            self.timeline.add(
                ModuleBuilt(
                    t_ns=self.timeline.now_ns(),
                    name=built.name,
                    kernel=self.kernel,
                    sha256=hashlib.sha256(built.ko.read_bytes()).hexdigest(),
                    path=str(built.ko),
                )
            )
        return self._built[name]

    def modules(self) -> dict[str, ModuleState]:
        """Return what /proc/modules says, by module name."""
        return parse_modules(self.read("/proc/modules").decode())

    def taint(self) -> int:
        """Return the kernel's taint mask."""
        return int(self.read("/proc/sys/kernel/tainted"))

    # --- interrupts, lines, printk --------------------------------------------------

    def interrupts(self, name: str) -> InterruptCounter:
        """Return a counter of the interrupts handled under a name, from now on."""
        return InterruptCounter(name, self._interrupt_rows, self.deadline, self._note_interrupts)

    def gpio_lines(self) -> dict[str, GpioLine]:
        """Return the DUT's named GPIO lines with holder and direction."""
        return lines_by_name(self.call(read_lines_on_dut))

    def printk(self) -> PrintkLog:
        """Collect, in a `with`, what the kernel prints on the console meanwhile."""
        return PrintkLog(
            self.timeline,
            lambda record: self._guarded(lambda: self.target.write_file("/dev/kmsg", record)),
            self.deadline,
        )

    # --- files, commands, functions -------------------------------------------------

    def read(self, path: str, *, timeout_s: float = 5.0) -> bytes:
        """Return all of a file on the DUT; DutOSError if it cannot be read."""
        return self._guarded(lambda: self.target.read_file(path, timeout_s=timeout_s))

    def write(self, path: str, data: bytes | str, *, timeout_s: float = 5.0) -> int:
        """Write to an existing file on the DUT with one write(2); DutOSError if refused."""
        raw = data.encode() if isinstance(data, str) else data
        return self._guarded(lambda: self.target.write_file(path, raw, timeout_s=timeout_s))

    def exists(self, path: str) -> bool:
        """Whether a path exists on the DUT."""
        return bool(self.call(_exists, path))

    def listdir(self, path: str) -> list[str]:
        """Return the names in a directory of the DUT, sorted."""
        return list(self.call(_listdir, path))

    def run(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 10.0) -> Completed:
        """Run a command on the DUT to its end; its exit status is for the check to judge."""
        return self._guarded(lambda: self.target.run(argv, stdin=stdin, timeout_s=timeout_s))

    def call(self, function: Callable[..., Any], *args: Any, timeout_s: float = 5.0) -> Any:
        """Run a Python function on the DUT; see `pilab.ports.Target.call`."""
        return self._guarded(lambda: self.target.call(function, *args, timeout_s=timeout_s))

    def start(self, function: Callable[..., Any], *args: Any) -> DutCall:
        """Begin to run a Python function on the DUT, in a process of its own."""
        return self._guarded(lambda: self.target.start(function, *args))

    def process(self) -> DutProcess:
        """Start a process on the DUT that keeps its open files between calls."""
        return self._guarded(self.target.process)

    # --- what a check says ----------------------------------------------------------

    @contextlib.contextmanager
    def expects_errno(self, *errnos: int) -> Iterator[None]:
        """
        Demand that the block fails with one of these errnos.

        Raises:
            CheckError: It succeeded, or failed with another one.
        """
        wanted = " or ".join(errno_names.errorcode.get(n, str(n)) for n in errnos)
        try:
            yield
        except DutOSError as error:
            if error.errno not in errnos:
                raise CheckError(
                    f"{error.call} {error.subject}", wanted, error.errno_name
                ) from error
        else:
            last = self._last_call()
            raise CheckError(last, wanted, "success")

    def expects_crash(
        self, cause: str, *, place: str = "", within_s: float = 10.0
    ) -> ExpectedCrash:
        """
        Demand, in a `with`, that the kernel crashes so.

        Args:
            cause: As `pilab.console.crash` names it: "null-pointer", "panic".
            place: File, or file:line, of our source where it must be; "" for anywhere.
            within_s: How long the crash may take to appear.

        Raises:
            CheckError: It did not crash, or otherwise; raised when the block ends.
        """
        return ExpectedCrash(self.watch, self.deadline, cause, place, within_s)

    def step(self, text: str) -> None:
        """Name what comes next, for the reader of the timeline."""
        self.timeline.add(Note(t_ns=self.timeline.now_ns(), text=text))

    def count(self, name: str, value: int) -> None:
        """Put a number into the verdict's counts."""
        self.counts[name] = value

    def wire(self, name: str) -> Button | Led:
        """Return the live wire of that name; UnknownNameError if there is none."""
        if name not in self._live:
            raise UnknownNameError("wire", name, sorted(self._live))
        return self._live[name]

    def __getattr__(self, name: str) -> Any:
        live = self.__dict__.get("_live", {})
        if name in live:
            return live[name]
        raise AttributeError(f"no wire or attribute {name!r}; wires: {', '.join(sorted(live))}")

    # --- when something went wrong --------------------------------------------------

    @property
    def recorder_problem(self) -> str:
        """What keeps the run folder from being complete, such as a full disk; "" if nothing."""
        return "" if self._recorder is None else self._recorder.problem

    def diagnose(self, error: BaseException | None) -> BaseException | None:
        """
        Return the error that says whose fault it was; None if all is well.

        A kernel that crashed or fell silent explains every other failure, so it replaces it;
        a machine that is gone is the bench's fault.
        """
        if (crash := self.watch.unexpected_crash()) is not None:
            return KernelCrashError(crash.cause, crash.summary)
        if error is None or not isinstance(error, BenchError | ModuleFaultError):
            return error
        if not self.power.alive():
            return MachineError("QEMU ended in mid-experiment", self._parts.stderr())
        if isinstance(error, LinkTimeoutError | MachineError) and not self._agent_answers():
            return self._autopsy()
        return error

    def _agent_answers(self) -> bool:
        try:
            return self.target.ping(PING_TIMEOUT_S)
        except BenchError:
            return False

    def _autopsy(self) -> KernelCrashError:
        """The kernel neither answers nor printed why: ask it by magic SysRq what it is doing."""
        crash = self.watch.silent_crash(self.console)
        return KernelCrashError(crash.cause, crash.summary)

    # --- inside ---------------------------------------------------------------------

    def _greet(self) -> None:
        self.target.connect(CONNECT_TIMEOUT_S)
        clocks = self.target.exchange_clocks()
        self.timeline.add(
            ClockMapped(
                t_ns=self.timeline.now_ns(),
                offset_ns=clocks.offset_ns,
                error_ns=clocks.error_ns,
                printk_offset_ns=clocks.printk_offset_ns,
                printk_error_ns=clocks.printk_error_ns,
            )
        )
        self._tap.begin()

    def _guarded(self, work: Callable[[], Any]) -> Any:
        """Do what may meet a dead kernel; a crash on the console is the better explanation."""
        try:
            return work()
        except BenchError as error:
            self.watch.settle(1.0)
            if (crash := self.watch.dead()) is not None:
                raise KernelCrashError(crash.cause, crash.summary) from error
            raise

    def _interrupt_rows(self) -> list[InterruptRow]:
        return parse_interrupts(self.read(INTERRUPTS).decode())

    def _note_interrupts(self, name: str, irq: int | None, count: int) -> None:
        self.timeline.add(
            InterruptCount(t_ns=self.timeline.now_ns(), name=name, irq=irq, count=count)
        )

    def _line_state(self, line: str) -> str:
        """Say what the DUT knows of a line, for an error; "" if it cannot be asked."""
        try:
            state = lines_by_name(self.target.call(read_lines_on_dut, timeout_s=2.0)).get(line)
        except (BenchError, ModuleFaultError):
            return ""
        if state is None:
            return f"the DUT has no line {line}"
        holder = (
            f"held by {state.consumer or 'an unnamed holder'}" if state.used else "held by nobody"
        )
        return f"line {line} is an {'output' if state.direction == 'out' else 'input'}, {holder}"

    def _last_call(self) -> str:
        for event in reversed(self.timeline.since(0)):
            if isinstance(event, Action) and event.errno is not None:
                return f"{event.verb} {event.subject}"
        return "the block"

    def _locate(self, module: str, function: str, offset: int) -> Any:
        built = next((b for b in self._built.values() if b.name == module), None)
        return None if built is None else self._parts.locate(built, function, offset)

    def edge_counts(self) -> dict[str, int]:
        """Return how many edges each wire had since `begin`."""
        counts: dict[str, int] = {}
        for event in self.timeline.since(0):
            if isinstance(event, Edge) and event.experiment == self.timeline.experiment:
                counts[f"{event.wire}_edges"] = counts.get(f"{event.wire}_edges", 0) + 1
        return counts


def open_bench(
    name: str = "virt",
    kernel: str = "6.1",
    *,
    kmod: Path | None = None,
    recorder: Recorder | None = None,
    progress: Progress | None = None,
    dut: str = "",
) -> Bench:
    """
    Open a bench: its DUT is ready to load modules.

    Args:
        name: A bench's name, or the path of a bench file.
        kernel: Series of the kernel: "6.1".
        kmod: Folder of the modules; None: this checkout's.
        recorder: Where timeline and console are written.
        progress: Told of what takes long.
        dut: Name of the DUT on the timeline; "" for the kernel's series.

    Raises:
        UsageError: No such bench or kernel, or the bench file is wrong.
        BenchError: It does not come up.
    """
    parts = assemble(name, kernel, kmod=kmod, progress=progress, dut=dut)
    try:
        return Bench(parts, recorder)
    except BaseException:
        parts.close()
        raise


def _exists(path: str) -> bool:
    import os

    return os.path.lexists(path)


def _listdir(path: str) -> list[str]:
    import os

    return sorted(os.listdir(path))
