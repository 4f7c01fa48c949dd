"""The cache: directories that are made once, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import platformdirs

from pilab.errors import BenchError

MANIFEST = ".manifest.json"
YOUNG_S = 3600.0


class Cache:
    """
    Directories under one root, each made once and then never changed.

    Processes may share it: an entry is made under a lock of its own, in a temporary sibling
    that is renamed when it is complete and on disk. An entry whose files are no longer those
    that were made (missing, cut short, touched) is thrown away and made again.

    Args:
        root: Its folder; None: PILAB_CACHE, else the user's cache folder.

    Raises:
        BenchError: The folder cannot be written.
    """

    def __init__(self, root: Path | None = None) -> None:
        setting = os.environ.get("PILAB_CACHE")
        self.root = root or Path(setting or platformdirs.user_cache_path("pilab"))
        self.root = self.root.absolute()
        with _speaking(self.root):
            self.root.mkdir(parents=True, exist_ok=True)

    def find(self, kind: str, key: str) -> Path | None:
        """Return the entry if it is there and whole; else None."""
        entry = self.root / kind / key
        return entry if _is_whole(entry) else None

    def ensure(self, kind: str, key: str, make: Callable[[Path], object]) -> Path:
        """
        Return an entry, made now if it is not there or not whole.

        Args:
            kind: What sort of thing it is: "build", "snapshot".
            key: Names what it is made from; letters, digits, "._+-".
            make: Called with an empty folder to fill; what it raises passes through, and
                nothing is kept.

        Returns:
            root/kind/key.

        Raises:
            BenchError: No room, or no right to write.
        """
        if (found := self.find(kind, key)) is not None:
            return found
        entry = self.root / kind / key
        with _speaking(self.root):
            entry.parent.mkdir(parents=True, exist_ok=True)
            with _locked(entry.parent / f".{key}.lock"):
                if _is_whole(entry):
                    return entry
                _sweep(entry.parent, key)
                shutil.rmtree(entry, ignore_errors=True)
                fresh = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=entry.parent))
                try:
                    fresh.chmod(0o755)
                    make(fresh)
                    _seal(fresh)
                    fresh.rename(entry)
                except BaseException:
                    shutil.rmtree(fresh, ignore_errors=True)
                    raise
                _sync(entry.parent)
        return entry


def _sweep(parent: Path, key: str) -> None:
    """Remove what a killed maker of this entry left; we hold its lock."""
    for left in parent.glob(f".{key}.*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)


def _seal(folder: Path) -> None:
    """Write everything to disk, then the manifest that makes the entry whole."""
    manifest = {name: list(state) for name, state in _states(folder)}
    for name in manifest:
        _sync(folder / name)
    target = folder / MANIFEST
    target.write_text(json.dumps(manifest))
    _sync(target)
    _sync(folder)


def _is_whole(entry: Path) -> bool:
    try:
        manifest = json.loads((entry / MANIFEST).read_bytes())
        for name, state in manifest.items():
            if _state(entry / name) != tuple(state):
                return False
    except (OSError, ValueError, AttributeError):
        return False
    return True


def _states(folder: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            yield str(path.relative_to(folder)), _state(path)


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _speaking(root: Path) -> Iterator[None]:
    """Turn the system's refusals into words."""
    try:
        yield
    except OSError as error:
        if isinstance(error, BenchError) or error.errno not in _WORDS:
            raise
        raise BenchError(
            f"cache {root}: {error.strerror}: {error.filename}", hint=_hint(root, error)
        ) from error


_WORDS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}


def _hint(root: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free_mib = shutil.disk_usage(root).free >> 20
        return f"{free_mib} MiB are free there; make room, or set PILAB_CACHE to another disk"
    return "set PILAB_CACHE to a folder that you may write to"


def digest(*parts: object) -> str:
    """Return a key made of these parts."""
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()[:32]
