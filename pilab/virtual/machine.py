"""The QEMU process: its command line, its sockets, its life."""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilab.errors import LinkTimeoutError, MachineError, ProtocolError
from pilab.virtual.qmp import Qmp
from pilab.virtual.spawn import end, spawn

QEMU = "qemu-system-aarch64"
MACHINE = "virt"
PL061_LINES = 8
START_TIMEOUT_S = 20.0
SNAPSHOT_NAME = "ready"
YOUNG_S = 60.0

KERNEL_ARGUMENTS = (
    "console=ttyAMA0",
    "printk.devkmsg=on",  # a long-lived writer of /dev/kmsg is rate limited otherwise
    "sysrq_always_enabled=1",
)


@dataclass(frozen=True)
class MachineConfig:
    """
    What a virtual Pi is made of; equal configurations may share a snapshot.

    Args:
        kernel: vmlinuz.
        initramfs: The image.
        dtb: The device tree; None: the machine's own.
        memory_mib: RAM in MiB.
        cpus: Processors.
        accel: "tcg" or "kvm".
    """

    kernel: Path
    initramfs: Path
    dtb: Path | None = None
    memory_mib: int = 256
    cpus: int = 2
    accel: str = "tcg"

    def board_argv(self) -> list[str]:
        """Return the options that the machine's device tree depends on."""
        cpu = "host" if self.accel == "kvm" else "cortex-a53"
        return [
            *("-M", MACHINE, "-accel", self.accel, "-cpu", cpu),
            *("-smp", str(self.cpus), "-m", str(self.memory_mib)),
            *("-display", "none", "-nodefaults"),
        ]

    def boot_argv(self) -> list[str]:
        """Return the options that name what boots."""
        argv = ["-kernel", str(self.kernel), "-initrd", str(self.initramfs)]
        argv += ["-append", " ".join(KERNEL_ARGUMENTS)]
        if self.dtb is not None:
            argv += ["-dtb", str(self.dtb)]
        return argv


class Machine:
    """
    A QEMU process, started stopped: `resume` lets it run.

    It dies with this process in every case. Its sockets lie in a folder of its own, which
    `close` removes; a folder whose owner was killed is removed by the next machine.

    Args:
        config: What it is made of.
        disk: A qcow2 file that holds snapshots; the machine has it for itself and nobody
            else may use it meanwhile. With `keep_disk` false its name is removed at once.
        keep_disk: Whether the file outlives the machine.
        on_event: Called with (name, data) of QMP events, in a thread of the link.

    Raises:
        MachineError: QEMU does not start; `stderr` holds its words.
    """

    def __init__(
        self,
        config: MachineConfig,
        disk: Path,
        *,
        keep_disk: bool = False,
        on_event: Callable[[str, dict[str, Any]], None] | None = None,
    ) -> None:
        self.config = config
        self._on_event = on_event
        self._closed = False
        self.folder = _make_folder()
        self._stderr_path = self.folder / "stderr"
        self.qmp = Qmp(self.folder / "qmp", self._hear)
        try:
            self._start(disk)
            if not keep_disk:
                disk.unlink()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self._process.pid

    @property
    def qtest_path(self) -> Path:
        """The qtest socket."""
        return self.folder / "qtest"

    @property
    def agent_path(self) -> Path:
        """The socket of the agent's virtio-serial port."""
        return self.folder / "agent"

    def alive(self) -> bool:
        """Whether QEMU runs."""
        return not self._closed and self._process.poll() is None

    def resume(self) -> None:
        """Let the guest run."""
        self.qmp.execute("cont")

    def stop(self) -> None:
        """Halt the guest, its clock included."""
        self.qmp.execute("stop")

    def save(self, name: str = SNAPSHOT_NAME) -> None:
        """Keep the state of the halted guest in the disk."""
        self._snapshot(f"savevm {name}")

    def restore(self, name: str = SNAPSHOT_NAME) -> None:
        """Halt the guest and bring a kept state back; `resume` goes on from there."""
        # loadvm alone on a panicking guest lost its answer 3 times in 75.
        self.stop()
        self._snapshot(f"loadvm {name}")

    def send_break(self) -> None:
        """Send a BREAK on the serial console."""
        self.qmp.execute("chardev-send-break", {"id": "console"})

    def console_pty(self) -> str:
        """Return the path of the console's pseudo terminal."""
        for chardev in self.qmp.execute("query-chardev"):
            if chardev["label"] == "console":
                return str(chardev["filename"]).removeprefix("pty:")
        raise ProtocolError("qmp", "a chardev named console", "none")

    def gpio_controller(self) -> str:
        """Return the QOM path of the PL061."""
        for child in self.qmp.execute("qom-list", {"path": "/machine/unattached"}):
            if child["type"] == "child<pl061>":
                return f"/machine/unattached/{child['name']}"
        raise ProtocolError("qmp", "a pl061 in /machine/unattached", "none")

    def starved_ns(self) -> int:
        """
        Return for how many ns QEMU's threads, in all, waited for a processor of the host.

        The longest-waiting thread counts: threads that wait at the same time waited once.
        Source: the second field of Linux's /proc/PID/task/TID/schedstat, in ns.
        """
        longest = 0
        try:
            for task in (Path("/proc") / str(self.pid) / "task").iterdir():
                longest = max(longest, int((task / "schedstat").read_text().split()[1]))
        except (OSError, ValueError, IndexError):
            return longest  # a thread ended meanwhile, or the kernel does not count
        return longest

    def stderr(self) -> str:
        """Return what QEMU printed."""
        try:
            return self._stderr_path.read_text(errors="replace")[-4000:]
        except OSError:
            return ""

    def close(self) -> None:
        """End QEMU and remove the folder. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if hasattr(self, "_process"):
            # Nothing of the guest is to be kept, so it need not be asked to end.
            self._process.kill()
            end(self._process)
        self.qmp.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)

    def _start(self, disk: Path) -> None:
        self._lock = os.open(self.folder / "lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        argv = [QEMU, *self.config.board_argv(), *self.config.boot_argv(), *self._links(disk)]
        with self._stderr_path.open("wb") as stderr:
            self._process = spawn(argv, stderr=stderr)
        self._await_sockets(time.monotonic() + START_TIMEOUT_S)
        try:
            self.qmp.connect(START_TIMEOUT_S)
        except (LinkTimeoutError, MachineError) as error:
            raise MachineError(f"QEMU does not answer: {error.message}", self.stderr()) from error

    def _links(self, disk: Path) -> list[str]:
        def socket(name: str) -> str:
            return f"unix:{self.folder / name},server=on,wait=off"

        return [
            *("-S", "-no-reboot", "-action", "shutdown=pause"),
            *("-chardev", "pty,id=console", "-serial", "chardev:console"),
            *("-qmp", socket("qmp")),
            *("-qtest", socket("qtest"), "-qtest-log", "none"),
            *("-device", "virtio-serial-pci"),
            *("-chardev", f"socket,id=agent,path={self.agent_path},server=on,wait=off"),
            *("-device", "virtserialport,chardev=agent,name=org.pilab.agent"),
            *("-drive", f"if=none,format=qcow2,file={disk}"),
        ]

    def _await_sockets(self, deadline_s: float) -> None:
        wanted = [self.folder / "qmp", self.qtest_path, self.agent_path]
        while not all(path.exists() for path in wanted):
            if self._process.poll() is not None:
                raise MachineError(
                    f"QEMU ended with status {self._process.returncode}", self.stderr()
                )
            if time.monotonic() > deadline_s:
                raise MachineError("QEMU opened no sockets", self.stderr())
            time.sleep(0.002)

    def _snapshot(self, line: str) -> None:
        # The human monitor answers with nothing when it worked.
        if said := self.qmp.monitor(line, timeout_s=30.0):
            raise ProtocolError("qmp", f"{line} to work", said)

    def _hear(self, name: str, data: dict[str, Any]) -> None:
        if self._on_event is not None:
            self._on_event(name, data)


def version() -> str:
    """
    Return QEMU's version line.

    Raises:
        MachineError: There is no QEMU.
    """
    try:
        done = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise MachineError(
            f"{QEMU} does not run: {error}", hint="apt-get install qemu-system-arm"
        ) from error
    return done.stdout.splitlines()[0]


def _runtime_root() -> Path:
    base = os.environ.get("XDG_RUNTIME_DIR")
    root = Path(base) if base and os.access(base, os.W_OK) else Path(tempfile.gettempdir())
    root = root / f"pilab-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    if root.stat().st_uid != os.getuid():
        raise MachineError(f"{root} belongs to somebody else")
    return root


def _make_folder() -> Path:
    root = _runtime_root()
    _remove_dead(root)
    return Path(tempfile.mkdtemp(prefix="vm-", dir=root))


def _remove_dead(root: Path) -> None:
    """Remove the folders whose owner was killed: their lock is free."""
    for folder in root.glob("vm-*"):
        try:
            if time.time() - folder.stat().st_mtime < YOUNG_S:
                continue  # perhaps being made right now, its lock not yet taken
            lock = os.open(folder / "lock", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue  # being removed by somebody else
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass  # alive
        finally:
            os.close(lock)


def find_acceleration(candidates: Sequence[str] = ("kvm", "tcg")) -> str:
    """
    Return the first acceleration with which a guest really starts.

    Looking at /dev/kvm is not enough: it may be there and refuse.
    """
    if platform.machine() not in ("aarch64", "arm64"):
        return candidates[-1]
    for accel in candidates[:-1]:
        argv = [QEMU, "-M", MACHINE, "-accel", accel, "-cpu", "host", "-S", "-display", "none"]
        argv += ["-nodefaults", "-monitor", "stdio"]
        try:
            done = subprocess.run(
                argv, input=b"quit\n", capture_output=True, timeout=5, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0:
            return accel
    return candidates[-1]
