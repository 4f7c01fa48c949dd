"""A function's source, as it is sent to the DUT."""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import symtable
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pilab.errors import BenchError

_BUILTINS = frozenset(dir(builtins)) | {"__name__", "__builtins__"}


class UnsendableError(BenchError):
    """
    A function cannot run on the DUT, for its source is all that is sent.

    Args:
        function: Its name.
        why: What of it cannot be sent.
    """

    def __init__(self, function: str, why: str) -> None:
        self.function = function
        self.why = why
        super().__init__(
            f"{function} cannot be sent to the DUT: {why}",
            hint="a plain def that imports what it needs inside and takes the rest as arguments",
        )


@dataclass(frozen=True, slots=True)
class FunctionSource:
    """
    What makes a function on another machine.

    Args:
        name: Its name.
        file: Where it stands, for tracebacks.
        text: Its source, on the lines on which it stands in `file`.
    """

    name: str
    file: str
    text: str


def source_of(function: Callable[..., Any]) -> FunctionSource:
    """
    Return the source of a function that refers to nothing around it.

    Raises:
        UnsendableError: It is no plain function, or needs names that only this process has.
    """
    if not isinstance(function, types.FunctionType):
        raise UnsendableError(
            getattr(function, "__qualname__", repr(function)), "it is no Python function"
        )
    return _source_of(function.__code__, function.__name__)


@functools.lru_cache(maxsize=256)
def _source_of(code: types.CodeType, name: str) -> FunctionSource:
    if code.co_name == "<lambda>":
        raise UnsendableError("a lambda", "only a def can be")
    if code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        raise UnsendableError(name, "it is a generator or a coroutine")
    if code.co_freevars:
        raise UnsendableError(name, f"it uses {_list(code.co_freevars)} of the function around it")
    try:
        lines, first = inspect.getsourcelines(code)
    except OSError as error:
        raise UnsendableError(name, "its source is not in a file") from error
    indented = lines[0][:1].isspace()
    text = ("if 1:\n" if indented else "") + "".join(lines)
    definition = ast.parse(text).body[0]
    if isinstance(definition, ast.If):
        definition = definition.body[0]
    if not isinstance(definition, ast.FunctionDef) or definition.name != code.co_name:
        raise UnsendableError(name, "its source is no def of that name")
    if definition.decorator_list:
        raise UnsendableError(name, "it is decorated")
    missing = sorted(set(_missing(text)) - {code.co_name})
    if missing:
        raise UnsendableError(name, f"it uses {_list(missing)}, defined outside of it")
    return FunctionSource(code.co_name, code.co_filename, "\n" * (first - 1 - indented) + text)


def _missing(text: str) -> Iterator[str]:
    """Yield the names that the source refers to and neither defines nor imports."""
    top = symtable.symtable("from __future__ import annotations\n" + text, "function", "exec")
    scopes = [top]
    for scope in scopes:
        scopes.extend(scope.get_children())
    made = {s.get_name() for scope in scopes for s in scope.get_symbols() if _is_made(scope, s)}
    for scope in scopes:
        for symbol in scope.get_symbols():
            if symbol.is_referenced() and (symbol.is_global() or scope is top):
                name = symbol.get_name()
                if name not in _BUILTINS and name not in made:
                    yield name


def _is_made(scope: symtable.SymbolTable, symbol: symtable.Symbol) -> bool:
    """Whether the symbol is a global that this scope gives a value."""
    is_global = symbol.is_declared_global() or scope.get_type() == "module"
    return is_global and (symbol.is_assigned() or symbol.is_imported())


def _list(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(repr(name) for name in names)
