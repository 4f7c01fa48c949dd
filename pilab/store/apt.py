"""
Debian packages of any architecture, through an apt state of our own.

Nothing of the host is changed and no root is needed: apt gets folders of its own in the cache,
with the host's own sources and keys, so what it fetches is as trusted as the host's packages.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pilab.errors import BenchError
from pilab.store.cache import Cache, digest
from pilab.store.progress import Progress

MIRROR_SETTING = "PILAB_DEBIAN_MIRROR"
SUITE_SETTING = "PILAB_DEBIAN_SUITE"
DEFAULT_SUITE = "bookworm"
DUT_ARCHITECTURE = "arm64"
UPDATE_TIMEOUT_S = 300
DOWNLOAD_TIMEOUT_S = 3600
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

_URI = re.compile(r"'(?P<uri>[^']+)' (?P<file>\S+) (?P<size>\d+) (?P<hash>\S*)")


def host_architecture() -> str:
    """Return Debian's name of the host's architecture: "amd64" or "arm64"."""
    names = {"x86_64": "amd64", "aarch64": "arm64", "arm64": "arm64"}
    machine = platform.machine()
    if machine not in names:
        raise BenchError(
            f"hosts are x86-64 or arm64, this one is {machine}",
            hint="the kernel's build tools come from Debian for these two",
        )
    return names[machine]


@dataclass(frozen=True, order=True)
class Package:
    """
    One package file that can be fetched.

    Args:
        name: What apt calls it, with its architecture where that is not the DUT's.
        file: Name of the .deb.
        size_bytes: Its size.
        checksum: "SHA256:..." as the signed lists have it.
    """

    name: str
    file: str
    size_bytes: int
    checksum: str


class PrivateApt:
    """
    An apt of our own in the cache; processes may share it, one at a time.

    Args:
        cache: Where its lists and packages are kept.
        progress: Told of what takes long.
    """

    def __init__(self, cache: Cache, progress: Progress | None = None) -> None:
        self._cache = cache
        self._progress = progress
        self._folder = cache.root / "apt"
        self._lists = self._folder / "lists"
        self._debs = self._folder / "debs"
        self._updated = False

    def newest(self, pattern: str) -> str:
        """
        Return the name of the newest package whose whole name matches.

        Args:
            pattern: Regular expression: r"linux-image-6\\.1\\.[0-9]+-[0-9]+-arm64".

        Raises:
            BenchError: There is none.
        """
        with self._locked():
            self._update()
            names = self._run(["apt-cache", *self._options(), "pkgnames"]).split()
        found = [name for name in names if re.fullmatch(pattern, name)]
        if not found:
            raise BenchError(
                f"no package matches {pattern}",
                hint=f"does the mirror serve {DUT_ARCHITECTURE}? {MIRROR_SETTING} names another",
            )
        return max(found, key=_natural)

    def fetch(self, names: Sequence[str]) -> list[Path]:
        """
        Return the .debs of these packages, fetched if they are not there.

        Args:
            names: Package names, "name:amd64" for another architecture than the DUT's.

        Raises:
            BenchError: They cannot be had.
        """
        with self._locked():
            self._update()
            packages = self._resolve(names)
            missing = [package for package in packages if not self._has(package)]
            if missing:
                self._download(missing)
            return [self._debs / package.file for package in packages]

    def forget(self, debs: Sequence[Path]) -> None:
        """Remove .debs that have been unpacked."""
        for deb in debs:
            deb.unlink(missing_ok=True)

    def _update(self) -> None:
        if self._updated:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._lists / "partial").mkdir(parents=True, exist_ok=True)
        self._debs.mkdir(exist_ok=True)
        self._write_sources()
        task = "package lists"
        self._start(task, None)
        # A host may have further sources that do not serve arm64: their failure is not ours,
        # and what is missing then is named when it is looked for.
        self._run(["apt-get", *self._options(), "update"], check=False, timeout_s=UPDATE_TIMEOUT_S)
        self._done(task)
        if not any(self._lists.glob("*Packages*")):
            raise BenchError("cannot fetch Debian's package lists", hint=_network_hint())
        self._updated = True

    def _write_sources(self) -> None:
        if (mirror := os.environ.get(MIRROR_SETTING)) is None:
            if not _host_is_debian():
                raise BenchError(
                    "this host is not Debian, so its package sources cannot be used",
                    hint=f"set {MIRROR_SETTING} to the base URL of a Debian mirror "
                    f"(and {SUITE_SETTING} to another suite than {DEFAULT_SUITE})",
                )
            return
        suite = os.environ.get(SUITE_SETTING, DEFAULT_SUITE)
        signed = f" [signed-by={KEYRING}]" if KEYRING.exists() else ""
        (self._folder / "sources.list").write_text(
            f"deb{signed} {mirror} {suite} main\ndeb{signed} {mirror} {suite}-updates main\n"
        )

    def _options(self) -> list[str]:
        architectures = dict.fromkeys([DUT_ARCHITECTURE, host_architecture()])
        settings = {
            "APT::Architecture": DUT_ARCHITECTURE,
            "Dir::State::Lists": str(self._lists),
            "Dir::State::Status": "/dev/null",
            "Dir::Cache": str(self._folder),
            "APT::Sandbox::User": "",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
        }
        if os.environ.get(MIRROR_SETTING) is not None:
            settings["Dir::Etc::SourceList"] = str(self._folder / "sources.list")
            settings["Dir::Etc::SourceParts"] = "/dev/null"
        options = [f"-o{name}={value}" for name, value in settings.items()]
        options += ["-oAPT::Architectures::="]
        options += [f"-oAPT::Architectures::={name}" for name in architectures]
        return options

    def _resolve(self, names: Sequence[str]) -> list[Package]:
        said = self._run(
            ["apt-get", *self._options(), "download", "--print-uris", *names], cwd=self._debs
        )
        found = []
        for line in said.splitlines():
            if match := _URI.match(line):
                file = match["file"]
                found.append(Package(file.split("_")[0], file, int(match["size"]), match["hash"]))
        if len(found) != len(set(names)):
            raise BenchError(f"apt knows {len(found)} of {len(set(names))} packages", hint=said)
        return found

    def _has(self, package: Package) -> bool:
        file = self._debs / package.file
        return file.exists() and file.stat().st_size == package.size_bytes

    def _download(self, packages: Sequence[Package]) -> None:
        total = sum(package.size_bytes for package in packages)
        free = shutil.disk_usage(self._debs).free
        if free < 2 * total:
            raise BenchError(
                f"no room for {total >> 20} MiB of packages in {self._debs}",
                hint=f"{free >> 20} MiB are free; make room, or set PILAB_CACHE to another disk",
            )
        task = "Debian packages"
        self._start(task, total)
        stop = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(task, packages, stop), daemon=True)
        watcher.start()
        try:
            for package in packages:
                (self._debs / package.file).unlink(missing_ok=True)
            names = [_apt_name(package) for package in packages]
            # apt checks each file against its signed lists and leaves only whole ones.
            self._run(
                ["apt-get", *self._options(), "download", *names],
                cwd=self._debs,
                timeout_s=DOWNLOAD_TIMEOUT_S,
            )
        finally:
            stop.set()
            watcher.join()
            self._done(task)

    def _watch(self, task: str, packages: Sequence[Package], stop: threading.Event) -> None:
        while not stop.wait(0.2):
            have = 0
            for path in self._debs.rglob("*.deb*"):
                have += path.stat().st_size if path.exists() else 0
            if self._progress is not None:
                self._progress.advance(task, have)

    def _run(
        self,
        argv: Sequence[str],
        *,
        cwd: Path | None = None,
        check: bool = True,
        timeout_s: float = 120,
    ) -> str:
        environment = os.environ | {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
        try:
            done = subprocess.run(
                argv,
                cwd=cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except FileNotFoundError as error:
            raise BenchError(f"{argv[0]} is missing", hint="the host must have apt") from error
        except subprocess.TimeoutExpired as error:
            raise BenchError(
                f"{argv[0]} did not end in {timeout_s:.0f} s", hint=_network_hint()
            ) from error
        if check and done.returncode:
            words = [line for line in done.stderr.splitlines() if line.startswith("E:")]
            raise BenchError(
                f"{argv[0]} failed: {' '.join(words) or done.stderr.strip()}", hint=_network_hint()
            )
        return done.stdout

    def _start(self, task: str, total_bytes: int | None) -> None:
        if self._progress is not None:
            self._progress.start(task, total_bytes)

    def _done(self, task: str) -> None:
        if self._progress is not None:
            self._progress.done(task)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "lock").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield


def unpack(debs: Sequence[Path], into: Path) -> None:
    """
    Unpack packages together into a folder.

    Raises:
        BenchError: One is damaged; it is removed, so that the next try fetches it again.
    """
    for deb in debs:
        done = subprocess.run(
            ["dpkg-deb", "-x", deb, into], capture_output=True, text=True, check=False
        )
        if done.returncode:
            deb.unlink(missing_ok=True)
            raise BenchError(
                f"cannot unpack {deb.name}: {done.stderr.strip()}",
                hint="try again: it is fetched anew",
            )


def fetch_packages(patterns: Sequence[str], cache: Cache, progress: Progress | None = None) -> Path:
    """
    Return a folder with these packages for the DUT unpacked together.

    Args:
        patterns: Package names, or regular expressions of which the newest match is taken.
        cache: Where they are kept; once there, they stay as they are.
        progress: Told of what takes long.

    Raises:
        BenchError: They cannot be had.
    """

    def make(into: Path) -> None:
        apt = PrivateApt(cache, progress)
        names = [
            apt.newest(pattern) if re.search(r"[\\[(*+?]", pattern) else pattern
            for pattern in patterns
        ]
        debs = apt.fetch(names)
        unpack(debs, into)
        apt.forget(debs)

    return cache.ensure("packages", digest(*patterns), make)


def _apt_name(package: Package) -> str:
    name, _version, architecture = package.file.removesuffix(".deb").split("_")
    return name if architecture in (DUT_ARCHITECTURE, "all") else f"{name}:{architecture}"


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key in which numbers count as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _host_is_debian() -> bool:
    try:
        words = platform.freedesktop_os_release()
    except OSError:
        return False
    return words.get("ID") == "debian"


def _network_hint() -> str:
    return (
        "the first start needs the network: check it, and that `apt-get update` works "
        f"({MIRROR_SETTING} names another Debian mirror)"
    )
