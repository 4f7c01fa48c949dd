"""One cold boot per kernel, image and device tree; afterwards a ready machine from disk."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from pilab.errors import BenchError, MachineError
from pilab.store.cache import Cache
from pilab.virtual import machine
from pilab.virtual.machine import Machine, MachineConfig

_FICLONE = 0x40049409  # Source: linux/fs.h, _IOW(0x94, 9, int)
DISK = "machine.qcow2"


def snapshot_key(config: MachineConfig, salt: str) -> str:
    """
    Return the key under which a snapshot of this configuration is kept.

    Args:
        config: The machine.
        salt: What else shapes the state that is kept: the preparation's version.
    """
    parts = [machine.version(), config.accel, str(config.memory_mib), str(config.cpus), salt]
    parts += list(machine.KERNEL_ARGUMENTS)
    for file in (config.kernel, config.initramfs, config.dtb):
        parts.append("" if file is None else _digest(file))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def ready_disk(
    cache: Cache, config: MachineConfig, salt: str, prepare: Callable[[Machine], None]
) -> Path:
    """
    Return a disk that holds the state of a machine that has booted and waits.

    Args:
        cache: Where it is kept.
        config: The machine.
        salt: The preparation's version.
        prepare: Called with a machine that has not run yet: resumes it, brings it to the
            state to be kept and returns.

    Returns:
        A qcow2 file with the snapshot; make a copy of it for each machine (`copy_disk`).

    Raises:
        BenchError: It does not boot.
    """

    def make(into: Path) -> None:
        disk = into / DISK
        _create(disk)
        booted = Machine(config, disk, keep_disk=True)
        try:
            prepare(booted)
            booted.stop()
            booted.save()
        finally:
            booted.close()

    return cache.ensure("snapshot", snapshot_key(config, salt), make) / DISK


def copy_disk(disk: Path, to: Path) -> Path:
    """
    Copy a disk, sharing its blocks where the file system can.

    Raises:
        BenchError: No room.
    """
    try:
        with disk.open("rb") as source, to.open("wb") as target:
            try:
                fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())
            except OSError:
                left = os.fstat(source.fileno()).st_size
                while left > 0:
                    done = os.copy_file_range(source.fileno(), target.fileno(), left)
                    if done == 0:
                        break
                    left -= done
    except OSError as error:
        to.unlink(missing_ok=True)
        free_mib = shutil.disk_usage(to.parent).free >> 20
        raise BenchError(
            f"cannot copy the snapshot to {to.parent}: {error.strerror}",
            hint=f"{free_mib} MiB are free there; it takes {disk.stat().st_size >> 20} MiB",
        ) from error
    return to


def _create(disk: Path) -> None:
    # Written by hand it would be a page of code; qemu-img belongs to qemu-utils.
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "1M"]
    try:
        subprocess.run(argv, capture_output=True, check=True, text=True)
    except OSError as error:
        raise MachineError(
            f"qemu-img does not run: {error}", hint="apt-get install qemu-utils"
        ) from error
    except subprocess.CalledProcessError as error:
        raise MachineError("qemu-img failed", error.stderr) from error


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
