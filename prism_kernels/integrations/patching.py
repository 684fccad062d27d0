"""Attributes of other packages, replaced together and put back as they were."""

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
    """One attribute of a module or class, and what takes its place."""

    owner: Any
    name: str
    value: Any


class Undoable(ABC):
    """What `undo` takes back; as a context manager it is taken back at the end."""

    @abstractmethod
    def undo(self) -> None:
        """Takes it back; a second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


class Patch(Undoable):
    """Replaced attributes.

    All are looked up before the first is replaced: a package that is not as expected stays as it is.
    """

    def __init__(self, op: str, replacements: Sequence[Replacement]) -> None:
        self._done: list[tuple[Replacement, Any]] = []
        found = []
        for replacement in replacements:
            owner, name, _ = replacement
            before = vars(owner).get(name, _MISSING)
            if before is _MISSING:
                fail(op, f"{owner.__name__} to have {name}", "none", RuntimeError)
            if getattr(before, _MARK, None) is not None:
                fail(op, f"{owner.__name__}.{name} as it was published", "it is patched already", RuntimeError)
            found.append((replacement, before))
        for replacement, before in found:
            setattr(replacement.value, _MARK, op)
            setattr(replacement.owner, replacement.name, replacement.value)
            self._done.append((replacement, before))

    def undo(self) -> None:
        """Puts every attribute back, also where a module that was imported meanwhile took the new one."""
        while self._done:
            (owner, name, value), before = self._done.pop()
            setattr(owner, name, before)
            for module in _loaded(owner):
                if vars(module).get(name) is value:
                    setattr(module, name, before)


class Registration(Undoable):
    """Entries that were added to another package's registries; none may be there already."""

    def __init__(self, op: str, entries: Sequence[tuple[MutableMapping[str, Any], str, Any]]) -> None:
        for registry, name, _ in entries:
            if name in registry:
                fail(op, f"no {name!r} in the registry", "it is registered already", RuntimeError)
        self._added = list(entries)
        for registry, name, value in entries:
            registry[name] = value

    def undo(self) -> None:
        """Takes the entries out."""
        while self._added:
            registry, name, _ = self._added.pop()
            del registry[name]


def everywhere(owner: ModuleType, name: str, value: Any) -> list[Replacement]:
    """Returns the replacements of an attribute in its module and in those of the package that imported it by name."""
    published = getattr(owner, name, _MISSING)
    others = [m for m in _loaded(owner) if m is not owner and vars(m).get(name, None) is published]
    return [Replacement(module, name, value) for module in (owner, *others)]


def _loaded(owner: Any) -> Iterator[ModuleType]:
    """Yields the loaded modules of an owner's package, of a module's only."""
    if not isinstance(owner, ModuleType):
        return
    package = owner.__name__.partition(".")[0]
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and name.partition(".")[0] == package:
            yield module


def require_version(op: str, package: str, known: Sequence[str]) -> None:
    """Refuses a package that is missing, or of a version that was not tried: `known` are beginnings of versions."""
    try:
        found = version(package)
    except PackageNotFoundError:
        fail(op, f"{package} {' or '.join(known)} to be installed", "it is not installed", RuntimeError)
    if not any(found == one or found.startswith(one + ".") for one in known):
        fail(op, f"{package} {' or '.join(known)}, which it was tried with", found, RuntimeError)


def require_parameters(op: str, function: Callable[..., Any], names: Sequence[str]) -> None:
    """Refuses a function whose parameters are not these, in this order."""
    found = tuple(inspect.signature(function).parameters)
    if found != tuple(names):
        where = f"{function.__module__}.{function.__qualname__}"
        fail(op, f"{where}({', '.join(names)})", f"({', '.join(found)})", RuntimeError)
