"""Puts a bench together from its file: the one place that names backends."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from pilab.agent_client import AgentTarget
from pilab.backends.qemu import QemuBoard, QemuPower, VirtioChannel
from pilab.backends.serial_console import SerialConsole
from pilab.errors import BenchError, LinkTimeoutError, MachineError, UsageError
from pilab.kernel.build import Builder, BuiltModule
from pilab.kernel.symbols import Place, resolve
from pilab.ports import Board, Console, Power, Target
from pilab.store.apt import fetch_packages
from pilab.store.cache import Cache
from pilab.store.kernels import KernelTree, kernel_tree
from pilab.store.progress import Progress
from pilab.timeline import Timeline
from pilab.virtual import devicetree
from pilab.virtual.gpio import VirtualGpio
from pilab.virtual.image import PACKAGES, agent_source, build_image
from pilab.virtual.machine import Machine, MachineConfig, find_acceleration
from pilab.virtual.snapshot import copy_disk, ready_disk
from pilab.wiring import BenchFile, bench_file

BOOT_TIMEOUT_S = 120.0
SNAPSHOT_SALT = "1"
"""Raised whenever `_settle` changes what a snapshot holds."""


@dataclass
class Assembly:
    """
    The parts of a bench in use.

    Args:
        file: The bench file.
        tree: The kernel that runs on the DUT.
        kmod: Folder of the modules.
        board, console, target, power: The backends.
        timeline: Where all of them report.
        builder: Builds modules for the kernel.
        stderr: What the machine itself printed.
    """

    file: BenchFile
    tree: KernelTree
    kmod: Path
    board: Board
    console: Console
    target: Target
    power: Power
    timeline: Timeline
    builder: Builder
    stderr: Callable[[], str]
    _stack: contextlib.ExitStack = field(repr=False)

    def locate(self, built: BuiltModule, function: str, offset: int) -> Place | None:
        """Return the source place of a program counter in a module."""
        return resolve(built.ko, function, offset)

    def close(self) -> None:
        """Close everything, newest first. Idempotent."""
        self._stack.close()


def assemble(
    name: str,
    kernel: str,
    *,
    kmod: Path | None = None,
    progress: Progress | None = None,
    dut: str = "",
) -> Assembly:
    """See `pilab.bench.open_bench`."""
    file = bench_file(name)
    if file.target.kind != "virtio":
        raise UsageError(
            f"bench {file.name}: target kind {file.target.kind!r} is not there yet",
            hint="this version drives virtual benches only",
        )
    cache = Cache()
    ready = prepare_virtual(kernel, cache, progress)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pilab-disk-")))
        machine = Machine(ready.config, copy_disk(ready.disk, folder / "machine.qcow2"))
        stack.callback(machine.close)
        console = SerialConsole(machine.console_pty())
        stack.callback(console.close)
        gpio = VirtualGpio(machine)
        board = QemuBoard(gpio)
        stack.callback(board.close)
        timeline = Timeline(dut or kernel)
        channel = VirtioChannel(machine.agent_path)
        target = AgentTarget(channel, timeline)
        stack.callback(target.close)

        def while_halted() -> None:
            target.close()
            console.drain(2.0)
            channel.open(5.0)

        return Assembly(
            file=file,
            tree=ready.tree,
            kmod=kmod or checkout() / "kmod",
            board=board,
            console=console,
            target=target,
            power=QemuPower(machine, gpio, board, while_halted),
            timeline=timeline,
            builder=Builder(cache, ready.tree),
            stderr=machine.stderr,
            _stack=stack.pop_all(),
        )


@dataclass(frozen=True)
class Ready:
    """
    A virtual Pi that only needs to be started.

    Args:
        tree: Its kernel.
        config: The machine.
        disk: Its snapshot, to be copied.
    """

    tree: KernelTree
    config: MachineConfig
    disk: Path


def prepare_virtual(kernel: str, cache: Cache, progress: Progress | None = None) -> Ready:
    """
    Make whatever a virtual Pi needs and the cache does not have: packages, image, snapshot.

    Args:
        kernel: Series: "6.1".
        cache: Where it is kept.
        progress: Told of what takes long.

    Raises:
        UsageError: No such kernel.
        BenchError: Something cannot be fetched, built or booted.
    """
    tree = kernel_tree(kernel, cache, progress)
    packages = fetch_packages(PACKAGES, cache, progress)
    agent = agent_source()
    sources = [agent, Path(__file__).parent / "virtual/image.py"]
    key = hashlib.sha256("\0".join([tree.identity, str(packages)]).encode())
    for source in sources:
        key.update(source.read_bytes())
    image = cache.ensure(
        "image",
        key.hexdigest()[:32],
        lambda into: _discard(build_image(packages, tree.modules, agent, into)),
    )
    config = MachineConfig(
        kernel=tree.image, initramfs=image / "initramfs", accel=find_acceleration()
    )
    dtb = devicetree.build_dtb(cache, config.board_argv(), [checkout() / "overlays"])
    config = MachineConfig(
        kernel=tree.image, initramfs=image / "initramfs", dtb=dtb, accel=config.accel
    )
    if progress is not None:
        progress.start(f"virtual Pi {kernel}", None)
    disk = ready_disk(cache, config, SNAPSHOT_SALT, _settle)
    if progress is not None:
        progress.done(f"virtual Pi {kernel}")
    return Ready(tree, config, disk)


def checkout() -> Path:
    """Return the checkout's root: modules and overlays lie beside the package."""
    with resources.as_file(resources.files("pilab")) as package:
        return package.parent


def _settle(machine: Machine) -> None:
    """Boot a machine to the state that its snapshot keeps: the agent waits, memory is small."""
    heard = bytearray()
    console = SerialConsole(machine.console_pty())
    console.listen(lambda _t_ns, data: heard.extend(data))
    target = AgentTarget(VirtioChannel(machine.agent_path), None)
    try:
        machine.resume()
        target.connect(BOOT_TIMEOUT_S)
        target.call(_zero_free_memory, timeout_s=60.0)
        target.ping(5.0)
        machine.stop()
        console.drain(5.0)
    except LinkTimeoutError as error:
        tail = heard.decode(errors="replace")[-2000:]
        raise MachineError("the virtual Pi did not boot", f"{machine.stderr()}\n{tail}") from error
    except BenchError as error:
        raise MachineError(
            f"the virtual Pi did not boot: {error.message}", machine.stderr()
        ) from error
    finally:
        target.close()
        console.close()


def _zero_free_memory() -> None:
    """
    Fill most of the free memory with zeros; runs on the DUT.

    Free pages still hold what the boot left there; as zeros they cost nothing in a snapshot.
    """
    import mmap

    with open("/proc/meminfo") as meminfo:  # noqa: PTH123 - pathlib is not loaded on the DUT
        free_kib = next(int(line.split()[1]) for line in meminfo if line.startswith("MemFree"))
    size = (free_kib - 16 * 1024) * 1024
    if size > 0:
        with mmap.mmap(-1, size) as memory:
            for page in range(0, size, 4096):
                memory[page] = 0


def _discard(_path: Path) -> None:
    return None
