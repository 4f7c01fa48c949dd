"""The virtual Pi's initramfs: busybox, Python, kmod and the agent, all from Debian's packages."""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
import subprocess
from collections.abc import Iterable
from importlib import resources
from io import BytesIO
from pathlib import Path

from elftools.elf.elffile import ELFFile

from pilab.errors import BenchError

PACKAGES = (
    "busybox-static",
    "kmod",
    "libc6",
    "libexpat1",
    "libffi8",
    "libkmod2",
    "liblzma5",
    r"libssl3(t64)?",
    "libzstd1",
    "zlib1g",
    r"python3\.\d+-minimal",
    r"libpython3\.\d+-minimal",
    r"libpython3\.\d+-stdlib",
)
"""Names, or patterns of names that carry a version."""

KERNEL_MODULES = ("virtio_pci", "virtio_console")
"""What the agent's port needs and Debian builds as modules."""

STDLIB = (
    *("[a-z]*.py", "_*.py", "collections", "ctypes", "encodings", "importlib", "json", "re"),
    *("lib-dynload/_ctypes.*", "lib-dynload/_json.*", "lib-dynload/_posixshmem.*"),
    *("lib-dynload/_queue.*", "lib-dynload/mmap.*", "lib-dynload/resource.*"),
    "lib-dynload/termios.*",
)
"""What is taken of Python's library; the rest would only make the snapshot larger."""

WARM_IMPORTS = (
    *("array", "ctypes", "errno", "fcntl", "mmap", "pty", "re", "resource"),
    *("select", "signal", "socket", "struct", "subprocess", "termios", "threading", "time"),
)
"""Imported before the snapshot is taken, so that no check pays for them."""

PORT_NAME = "org.pilab.agent"

_INIT = """\
#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
mount -t debugfs debugfs /sys/kernel/debug
hostname pilab
ip link set lo up
for module in {modules}; do modprobe "$module"; done
port=
while [ -z "$port" ]; do
    for name in /sys/class/virtio-ports/*/name; do
        [ "$(cat "$name" 2>/dev/null)" = {port} ] && port=/dev/$(basename "$(dirname "$name")")
    done
    [ -n "$port" ] || sleep 0.05
done
while :; do
    python3 -c 'import {imports}
import runpy, sys
sys.argv = ["/usr/lib/pilab/agent.py", sys.argv[1]]
runpy.run_path("/usr/lib/pilab/agent.py", run_name="__main__")' "$port"
    echo "pilab: the agent ended with status $?" > /dev/kmsg
    sleep 0.2
done
"""


def build_image(packages: Path, modules: Path, agent: Path, into: Path) -> Path:
    """
    Write the initramfs.

    Args:
        packages: Directory with `PACKAGES` unpacked.
        modules: The kernel's lib/modules/RELEASE.
        agent: The agent's source.
        into: Directory to write to.

    Returns:
        `into`/initramfs.

    Raises:
        BenchError: A package lacks a file that is needed, or cpio fails.
    """
    root = into / "root"
    _lay_out(root, packages)
    _add_modules(root, modules)
    (root / "usr/lib/pilab").mkdir(parents=True)
    shutil.copy(agent, root / "usr/lib/pilab/agent.py")
    init = root / "init"
    init.write_text(
        _INIT.format(
            modules=" ".join(KERNEL_MODULES), port=PORT_NAME, imports=", ".join(WARM_IMPORTS)
        )
    )
    init.chmod(0o755)
    image = into / "initramfs"
    image.write_bytes(gzip.compress(_archive(root), compresslevel=1, mtime=0))
    shutil.rmtree(root)
    return image


def agent_source() -> Path:
    """Return the agent's file."""
    with resources.as_file(resources.files("pilab") / "agent.py") as path:
        return path


def _lay_out(root: Path, packages: Path) -> None:
    for folder in ("bin", "dev", "etc", "lib", "proc", "root", "run", "sbin", "sys", "tmp"):
        (root / folder).mkdir(parents=True)
    _copy(packages, root, "bin/busybox", "bin/busybox")
    done = subprocess.run(
        ["readelf", "-h", root / "bin/busybox"], capture_output=True, text=True, check=False
    )
    if "AArch64" not in done.stdout:
        raise BenchError("busybox-static is not for arm64")
    for applet in _APPLETS:
        (root / "bin" / applet).symlink_to("busybox")
    _copy(packages, root, "bin/kmod", "bin/kmod")
    for name in ("insmod", "lsmod", "modinfo", "modprobe", "rmmod", "depmod"):
        (root / "sbin" / name).symlink_to("/bin/kmod")
    _copy_libraries(packages, root)
    _copy_python(packages, root)
    (root / "etc/passwd").write_text(
        "root:x:0:0:root:/root:/bin/sh\nstudent:x:1000:1000:student:/tmp:/bin/sh\n"
    )
    (root / "etc/group").write_text("root:x:0:\nstudent:x:1000:\n")


_APPLETS = (
    *("sh", "ash", "awk", "basename", "cat", "chmod", "chown", "clear", "cp", "cut", "date", "dd"),
    *("df", "dirname", "dmesg", "echo", "env", "expr", "false", "find", "free", "grep", "head"),
    *("hexdump", "hostname", "id", "ip", "kill", "killall", "less", "ln", "ls", "mkdir", "mkfifo"),
    *("mknod", "mktemp", "more", "mount", "mountpoint", "mv", "od", "pidof", "printf", "ps", "pwd"),
    *("readlink", "realpath", "reset", "rm", "rmdir", "sed", "seq", "setsid", "sha256sum", "sleep"),
    *("sort", "stat", "stty", "su", "sync", "sysctl", "tail", "tee", "test", "time", "timeout"),
    *("top", "touch", "tr", "true", "tty", "umount", "uname", "uniq", "uptime", "usleep", "vi"),
    *("watch", "wc", "which", "whoami", "xargs", "xxd", "yes"),
)


def _copy(packages: Path, root: Path, pattern: str, to: str) -> None:
    for source in _find(packages, pattern):
        target = root / to
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def _find(packages: Path, pattern: str) -> list[Path]:
    # Merged-/usr: a package may ship a file at /bin/x or at /usr/bin/x.
    found = sorted(packages.glob(pattern)) + sorted(packages.glob(f"usr/{pattern}"))
    if not found:
        raise BenchError(f"no {pattern} in the image's packages", hint="delete the cache's entry")
    return found


def _copy_libraries(packages: Path, root: Path) -> None:
    triplet = "lib/aarch64-linux-gnu"
    for pattern in (
        *("libc.so.6", "libm.so.6", "libz.so.1*", "libexpat.so.1*", "libffi.so.8*"),
        *("libkmod.so.2*", "liblzma.so.5*", "libzstd.so.1*", "libcrypto.so.3", "libdl.so.2"),
        *("libpthread.so.0", "libutil.so.1"),
    ):
        for source in _find(packages, f"{triplet}/{pattern}"):
            target = root / triplet / source.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)  # a link becomes the file that it means
    loader = _find(packages, f"{triplet}/ld-linux-aarch64.so.1")[0]
    shutil.copy(loader, root / triplet / loader.name)
    (root / "lib" / loader.name).symlink_to(f"/{triplet}/{loader.name}")


def _copy_python(packages: Path, root: Path) -> None:
    binary = sorted((packages / "usr/bin").glob("python3.*"))[-1]
    version = binary.name.removeprefix("python")
    source, target = packages / f"usr/lib/python{version}", root / f"usr/lib/python{version}"
    (root / "usr/bin").mkdir(parents=True)
    shutil.copy(binary, root / "usr/bin" / binary.name)
    (root / "usr/bin/python3").symlink_to(binary.name)
    for pattern in STDLIB:
        for found in sorted(source.glob(pattern)):
            to = target / found.relative_to(source)
            to.parent.mkdir(parents=True, exist_ok=True)
            if found.is_dir():
                shutil.copytree(found, to, ignore=shutil.ignore_patterns("test*"))
            else:
                shutil.copy(found, to)


def _add_modules(root: Path, modules: Path) -> None:
    release = modules.name
    target = root / "lib/modules" / release
    target.mkdir(parents=True)
    files = {module_name(path): path for path in (modules / "kernel").rglob("*.ko*")}
    builtin = {
        module_name(Path(line)) for line in (modules / "modules.builtin").read_text().split()
    }
    dependencies: list[str] = []
    for name in _with_dependencies(KERNEL_MODULES, files, builtin):
        data = _read_module(files[name])
        (target / f"{name}.ko").write_bytes(data)
        needs = " ".join(f"{n}.ko" for n in _depends(data) if n not in builtin)
        dependencies.append(f"{name}.ko: {needs}".rstrip())
    (target / "modules.dep").write_text("\n".join(dependencies) + "\n")
    for name in ("modules.builtin", "modules.order"):
        shutil.copy(modules / name, target / name)


def module_name(path: Path) -> str:
    """Return the module's name, which has underscores: "virtio_pci" for virtio-pci.ko.xz."""
    return path.name.split(".ko")[0].replace("-", "_")


def _with_dependencies(
    wanted: Iterable[str], files: dict[str, Path], builtin: set[str]
) -> list[str]:
    """Return the modules and what they need, each after what it needs."""
    order: list[str] = []

    def visit(name: str) -> None:
        if name in builtin or name in order:
            return
        if name not in files:
            raise BenchError(f"the kernel has no module {name}")
        for needed in _depends(_read_module(files[name])):
            visit(needed)
        order.append(name)

    for name in wanted:
        visit(name)
    return order


def _read_module(path: Path) -> bytes:
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def _depends(module: bytes) -> list[str]:
    section = ELFFile(BytesIO(module)).get_section_by_name(".modinfo")
    if section is None:
        raise BenchError("a kernel module without .modinfo")
    for entry in section.data().split(b"\0"):
        key, _, value = entry.partition(b"=")
        if key == b"depends" and value:
            return [name.replace("-", "_") for name in value.decode().split(",")]
    return []


def _archive(root: Path) -> bytes:
    names = sorted(os.path.relpath(path, root) for path in root.rglob("*"))
    done = subprocess.run(
        ["cpio", "--create", "--format=newc", "--owner=+0:+0", "--reproducible", "--quiet"],
        input="\n".join([".", *names]).encode(),
        cwd=root,
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise BenchError(f"cpio failed: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout
