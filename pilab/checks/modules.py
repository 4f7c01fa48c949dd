"""Kernel modules on the DUT: /proc/modules, taint, and one that is loaded for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ModuleState:
    """
    A line of /proc/modules.

    Args:
        name: The module.
        size_bytes: Its size in memory.
        refcount: How many use it; -1 if it cannot be unloaded.
        users: Modules that use it.
        state: "Live", "Loading" or "Unloading".
        taint: Its taint letters, such as "OE"; empty if none.
    """

    name: str
    size_bytes: int
    refcount: int
    users: tuple[str, ...]
    state: str
    taint: str


def parse_modules(text: str) -> dict[str, ModuleState]:
    """Return the modules of /proc/modules by name."""
    modules = {}
    for line in text.splitlines():
        name, size, count, users, state, _address, *taint = line.split()
        modules[name] = ModuleState(
            name=name,
            size_bytes=int(size),
            refcount=-1 if count == "-" else int(count),
            users=tuple(user for user in users.split(",") if user and user != "-"),
            state=state,
            taint=taint[0].strip("()") if taint else "",
        )
    return modules


def format_parameters(words: Iterable[str], parameters: Mapping[str, Any]) -> str:
    """
    Return module parameters as finit_module(2) takes them.

    Args:
        words: Parameters already in that form: "values=1,2".
        parameters: Name to value: int, str, bool, or a sequence of them.

    Returns:
        'values=1,2 speed=3 name="two words"'
    """
    parts = list(words)
    for name, value in parameters.items():
        values = value if isinstance(value, list | tuple) else [value]
        text = ",".join(_word(item) for item in values)
        parts.append(f'{name}="{text}"' if any(c.isspace() for c in text) else f"{name}={text}")
    return " ".join(parts)


def _word(value: Any) -> str:
    return ("Y" if value else "N") if isinstance(value, bool) else str(value)


class LoadedModule:
    """
    A module that is loaded, to be unloaded at the end of a `with`.

    Leaving the `with` unloads it if it still is loaded; that unloading works is part of what
    is checked, unless the block failed already.

    Args:
        name: The module's name as the kernel has it.
        unload: Unloads it; raises DutOSError.
    """

    def __init__(self, name: str, unload: Callable[[], None]) -> None:
        self.name = name
        self._unload = unload
        self.loaded = True

    def unload(self) -> None:
        """
        Unload it now.

        Raises:
            DutOSError: The kernel refuses (EAGAIN: in use); it stays loaded.
        """
        self._unload()
        self.loaded = False

    def __enter__(self) -> LoadedModule:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        # After a failure the next experiment gets a pristine kernel: nothing to tidy up.
        if self.loaded and kind is None:
            self.unload()
