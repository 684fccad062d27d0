"""Replaces attributes of other packages, adds entries to their registries, and undoes both."""

import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType, TracebackType
from typing import Any, NamedTuple, Self

from prism_kernels.check import fail

_MISSING = object()
_MARK = "_prism_kernels"


class Replacement(NamedTuple):
    """An attribute of a module or class, and its new value."""

    owner: Any
    name: str
    value: Any


class Undoable(ABC):
    """A change that `undo` takes back, or the end of a `with` block."""

    @abstractmethod
    def undo(self) -> None:
        """Takes the change back; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


class Patch(Undoable):
    """Replaced attributes.

    All are looked up before the first is replaced: a package that differs from the expected one stays as it is.
    """

    def __init__(self, op: str, replacements: Sequence[Replacement]) -> None:
        self._done: list[tuple[Replacement, Any]] = []
        originals = []
        for replacement in replacements:
            owner, name, _ = replacement
            before = vars(owner).get(name, _MISSING)
            if before is _MISSING:
                fail(op, f"{owner.__name__} to have {name}", "none", RuntimeError)
            if getattr(before, _MARK, None) is not None:
                fail(op, f"{owner.__name__}.{name} as published", "one that is patched already", RuntimeError)
            originals.append((replacement, before))
        for replacement, before in originals:
            setattr(replacement.value, _MARK, op)
            setattr(replacement.owner, replacement.name, replacement.value)
            self._done.append((replacement, before))

    def undo(self) -> None:
        """Restores every attribute, also in modules that were imported meanwhile and took the new one."""
        while self._done:
            (owner, name, value), before = self._done.pop()
            setattr(owner, name, before)
            for module in _loaded(owner):
                if vars(module).get(name) is value:
                    setattr(module, name, before)


class ForwardPatch(Undoable):
    """A module whose `forward` is replaced."""

    def __init__(self, module: Any, forward: Callable[..., Any]) -> None:
        # other wrappers set a forward on the instance; without one the class's is used
        self._module, self._before = module, vars(module).get("forward")
        self._done = True
        module.forward = forward

    def undo(self) -> None:
        """Restores the module's forward; a second call does nothing."""
        if not self._done:
            return
        self._done = False
        del self._module.forward
        if self._before is not None:
            self._module.forward = self._before


class Registration(Undoable):
    """Entries added to another package's registries, which may not hold these names before."""

    def __init__(self, op: str, entries: Sequence[tuple[MutableMapping[str, Any], str, Any]]) -> None:
        for registry, name, _ in entries:
            if name in registry:
                fail(op, f"no {name!r} in the registry", "one", RuntimeError)
        self._added = list(entries)
        for registry, name, value in entries:
            registry[name] = value

    def undo(self) -> None:
        """Removes the entries."""
        while self._added:
            registry, name, _ = self._added.pop()
            del registry[name]


def everywhere(owner: ModuleType, name: str, value: Any) -> list[Replacement]:
    """Returns replacements of an attribute in its module and in all of the package's that imported it by name."""
    published = getattr(owner, name, _MISSING)
    others = [m for m in _loaded(owner) if m is not owner and vars(m).get(name, None) is published]
    return [Replacement(module, name, value) for module in (owner, *others)]


def _loaded(owner: Any) -> Iterator[ModuleType]:
    """Yields the loaded modules of a module's package; none for a class."""
    if not isinstance(owner, ModuleType):
        return
    package = owner.__name__.partition(".")[0]
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and name.partition(".")[0] == package:
            yield module


def require_version(op: str, package: str, known: Sequence[str]) -> None:
    """Raises where a package is missing or its version starts with none of `known`, the versions that were tried."""
    try:
        installed = version(package)
    except PackageNotFoundError:
        fail(op, f"{package} {' or '.join(known)} to be installed", "none", RuntimeError)
    if not any(installed == one or installed.startswith(one + ".") for one in known):
        fail(op, f"{package} {' or '.join(known)}, which it was tried with", installed, RuntimeError)


def require_parameters(op: str, function: Callable[..., Any], names: Sequence[str]) -> None:
    """Raises unless a function has these parameters, in this order."""
    parameters = tuple(inspect.signature(function).parameters)
    if parameters != tuple(names):
        who = f"{function.__module__}.{function.__qualname__}"
        fail(op, f"{who}({', '.join(names)})", f"({', '.join(parameters)})", RuntimeError)
