"""Debian's arm64 kernels, unpacked beside what it takes to build modules for them."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from pilab.errors import BenchError, UnknownNameError
from pilab.store.apt import DUT_ARCHITECTURE, PrivateApt, host_architecture, unpack
from pilab.store.cache import Cache, digest
from pilab.store.progress import Progress

REFRESH_SETTING = "PILAB_REFRESH"

SERIES: dict[str, str] = {
    "6.1": r"linux-image-(6\.1\.\d+-\d+-arm64)",
    "6.12": r"linux-image-(6\.12\.\d+\+deb\d+-arm64)",
}
"""Series to the name of its image package, the release in parentheses; one entry per kernel."""


@dataclass(frozen=True)
class KernelTree:
    """
    A kernel that can run and be built for.

    Args:
        series: "6.1".
        release: What `uname -r` says there: "6.1.0-56-arm64".
        arch: "arm64".
        image: vmlinuz.
        modules: Its lib/modules/RELEASE.
        headers: Folder for `make -C`.
        package_versions: Package to version.
        identity: Changes whenever anything above does; for cache keys.
    """

    series: str
    release: str
    arch: str
    image: Path
    modules: Path
    headers: Path
    package_versions: dict[str, str]
    identity: str


def kernel_tree(series: str, cache: Cache, progress: Progress | None = None) -> KernelTree:
    """
    Return a kernel, fetched if it is not in the cache.

    The newest release is taken when it is first needed and kept from then on; PILAB_REFRESH=1
    looks for a newer one.

    Args:
        series: One of `SERIES`.
        cache: Where it is kept.
        progress: Told of what takes long.

    Raises:
        UnknownNameError: No such series.
        BenchError: It cannot be had.
    """
    if series not in SERIES:
        raise UnknownNameError("kernel", series, SERIES)
    key = digest("kernel", series, SERIES[series], host_architecture())
    if os.environ.get(REFRESH_SETTING) == "1":
        _refresh(series, cache, key, progress)
    entry = cache.ensure("kernel", key, lambda into: _make(series, into, cache, progress))
    return _describe(series, entry)


def _refresh(series: str, cache: Cache, key: str, progress: Progress | None) -> None:
    entry = cache.find("kernel", key)
    newest = PrivateApt(cache, progress).newest(SERIES[series])
    if entry is not None and _describe(series, entry).release not in newest:
        shutil.rmtree(entry)


def _make(series: str, into: Path, cache: Cache, progress: Progress | None) -> None:
    apt = PrivateApt(cache, progress)
    image = apt.newest(SERIES[series])
    match = re.fullmatch(SERIES[series], image)
    assert match is not None
    release = match[1]
    common = f"linux-headers-{release.removesuffix('-' + DUT_ARCHITECTURE)}-common"
    host = host_architecture()
    kbuild = f"linux-kbuild-{_kbuild_version(release)}"
    if host != DUT_ARCHITECTURE:
        kbuild += f":{host}"
    debs = apt.fetch([image, f"linux-headers-{release}", common, kbuild])
    unpack(debs, into)
    versions = [deb.name for deb in debs]
    (into / "packages").write_text("\n".join(versions) + "\n")
    _use_in_place(into, release)
    for useless in ("usr/share/doc", "usr/share/lintian"):
        shutil.rmtree(into / useless, ignore_errors=True)
    apt.forget(debs)


def _kbuild_version(release: str) -> str:
    """6.1.0-56-arm64 goes with linux-kbuild-6.1, 6.12.117+deb12-arm64 with -6.12.117+deb12."""
    if match := re.fullmatch(r"(\d+\.\d+)\.0-\d+-arm64", release):
        return match[1]
    return release.removesuffix(f"-{DUT_ARCHITECTURE}")


def _use_in_place(root: Path, release: str) -> None:
    """Make the headers work where they lie: their paths are those of an installed package."""
    headers = root / "usr/src" / f"linux-headers-{release}"
    makefile = headers / "Makefile"
    text = makefile.read_text()
    relative = "$(dir $(abspath $(lastword $(MAKEFILE_LIST))))../"
    changed = re.sub(r"^include /usr/src/(\S+)", rf"include {relative}\1", text, flags=re.M)
    if changed == text:
        raise BenchError(f"the headers of {release} have no include line to redirect")
    makefile.write_text(changed)
    for name in ("scripts", "tools"):
        link = headers / name
        if link.is_symlink():
            target = link.readlink()
            inside = root / target.relative_to("/") if target.is_absolute() else None
            if inside is not None:
                link.unlink()
                link.symlink_to(os.path.relpath(inside, headers))


def _describe(series: str, entry: Path) -> KernelTree:
    image = next((entry / "boot").glob("vmlinuz-*"), None)
    if image is None:
        raise BenchError(f"the kernel {series} in the cache has no vmlinuz")
    release = image.name.removeprefix("vmlinuz-")
    lines = (entry / "packages").read_text().split()
    versions = {line.split("_")[0]: line.split("_")[1] for line in lines}
    modules = entry / "usr/lib/modules" / release
    if not modules.is_dir():
        modules = entry / "lib/modules" / release
    return KernelTree(
        series=series,
        release=release,
        arch=DUT_ARCHITECTURE,
        image=image,
        modules=modules,
        headers=entry / "usr/src" / f"linux-headers-{release}",
        package_versions=versions,
        identity=digest(*sorted(lines)),
    )
