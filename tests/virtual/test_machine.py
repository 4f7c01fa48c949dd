"""The QEMU process: it starts, says why if not, and never outlives its owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pilab.assembly import Ready
from pilab.errors import MachineError, ProtocolError
from pilab.virtual.machine import Machine, MachineConfig
from pilab.virtual.qtest import Qtest
from pilab.virtual.snapshot import copy_disk

pytestmark = pytest.mark.virtual

OWNER = """
import sys
from pathlib import Path
from pilab.virtual.machine import Machine, MachineConfig
kernel, initramfs, disk = map(Path, sys.argv[1:4])
machine = Machine(MachineConfig(kernel, initramfs), disk)
machine.resume()
print(machine.pid, machine.folder, flush=True)
sys.stdin.read()
"""


def _ends(pid: int, within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_qemu_ends_when_its_owner_is_killed(ready: Ready, tmp_path: Path, number: int) -> None:
    """Whatever ends the owner, SIGKILL included, ends QEMU."""
    disk = copy_disk(ready.disk, tmp_path / "disk.qcow2")
    argv = [sys.executable, "-c", OWNER]
    argv += [str(ready.config.kernel), str(ready.config.initramfs), str(disk)]
    owner = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid, _folder = owner.stdout.readline().split()
    assert not disk.exists(), "the disk has no name while the machine runs"
    os.kill(owner.pid, number)
    owner.communicate(timeout=10)
    assert _ends(int(pid))


def test_close_ends_qemu_and_removes_its_folder(ready: Ready, tmp_path: Path) -> None:
    """After close nothing is left; a second close does nothing."""
    machine = Machine(ready.config, copy_disk(ready.disk, tmp_path / "disk.qcow2"))
    pid, folder = machine.pid, machine.folder
    assert machine.alive()
    machine.close()
    machine.close()
    assert _ends(pid)
    assert not folder.exists()
    assert not machine.alive()


def test_start_shows_what_qemu_printed_when_it_fails(tmp_path: Path) -> None:
    """A QEMU that does not start is a MachineError with QEMU's own words."""
    config = MachineConfig(tmp_path / "no-kernel", tmp_path / "no-initramfs")
    disk = tmp_path / "no-disk.qcow2"
    with pytest.raises(MachineError) as caught:
        Machine(config, disk)
    assert "no-disk.qcow2" in caught.value.stderr
    assert "no-disk.qcow2" in str(caught.value)


def test_restore_of_an_unknown_state_is_refused(machine: Machine) -> None:
    """The human monitor's complaint becomes an error instead of passing for success."""
    with pytest.raises(ProtocolError) as caught:
        machine.restore("nonsense")
    assert "nonsense" in caught.value.seen


def test_qtest_refuses_what_would_kill_qemu(machine: Machine) -> None:
    """Names and numbers that QEMU asserts on never reach it."""
    qtest = Qtest(machine.qtest_path, lambda *_: None)
    try:
        for path, name, line, level in (
            ("/machine\nquit", "unnamed-gpio-in", 0, 1),
            ("/machine", "un named", 0, 1),
            ("/machine", "unnamed-gpio-in", -1, 1),
            ("/machine", "unnamed-gpio-in", 0, 2),
        ):
            with pytest.raises(ValueError, match="no"):
                qtest.set_irq_in(path, name, line, level)
        qtest.sync()
    finally:
        qtest.close()
    assert machine.alive()


def test_a_machine_that_was_killed_is_noticed(machine: Machine) -> None:
    """Calls on a machine whose process is gone fail at once and say so."""
    os.kill(machine.pid, signal.SIGKILL)
    assert _ends(machine.pid)
    assert not machine.alive()
    with pytest.raises(MachineError, match="QEMU is gone"):
        machine.resume()


def test_starvation_grows_when_others_take_the_processors(machine: Machine) -> None:
    """The time for which the host's scheduler let QEMU wait is counted, and only rises."""
    machine.resume()
    before = machine.starved_ns()
    count = 2 * (os.cpu_count() or 1)
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        # A guest that idles wants no processor, so keep it awake by talking to QEMU.
        deadline = time.monotonic() + 20
        while machine.starved_ns() == before and time.monotonic() < deadline:
            machine.qmp.execute("query-status")
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
    assert machine.starved_ns() > before
