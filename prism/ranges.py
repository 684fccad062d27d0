"""Frozen dataclasses of numbers, each with its range, which code and settings files make under the same checks.

A GPU machine runs models and rollouts without pydantic, so this module does not import it. Where a settings file is
read, pydantic takes types and ranges from the same annotations, with the same words in its errors.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, get_args


@dataclass(frozen=True)
class Range:
    """The numbers that a field takes; the names are pydantic's."""

    gt: float | None = None
    ge: float | None = None
    le: float | None = None
    multiple_of: int | None = None

    def broken(self, value: float) -> str | None:
        """Returns the numbers that were expected, or None if the value is one of them."""
        if self.gt is not None and value <= self.gt:
            return f"a number greater than {self.gt:g}"
        if self.ge is not None and value < self.ge:
            return f"a number greater than or equal to {self.ge:g}"
        if self.le is not None and value > self.le:
            return f"a number less than or equal to {self.le:g}"
        if self.multiple_of is not None and value % self.multiple_of:
            return f"a multiple of {self.multiple_of}"
        return None

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Returns pydantic's schema of a number in this range."""
        return {**handler(source), **{name: limit for name, limit in asdict(self).items() if limit is not None}}


Positive = Annotated[int, Range(gt=0)]
Natural = Annotated[int, Range(ge=0)]
Share = Annotated[float, Range(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class Ranged:
    """A dataclass whose fields are numbers with a `Range`, or such a number or None."""

    def __post_init__(self) -> None:
        """Raises for numbers of a wrong type or out of range, with a line for each."""
        if problems := list(self._problems()):
            raise ValueError("\n".join(problems))

    def _problems(self) -> Iterator[str]:
        for field in fields(self):
            value, optional = getattr(self, field.name), type(None) in get_args(field.type)
            if value is None and optional:
                continue
            kind, limits = get_args(get_args(field.type)[0] if optional else field.type)
            if expected := _wrong_type(kind, value) or limits.broken(value):
                yield f"{field.name}: expected {expected}, got {value!r}"


def _wrong_type(kind: type, value: Any) -> str | None:
    """Returns the number that was expected, or None if the value is one."""
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        return "a valid integer" if kind is int else "a valid number"
    return None if math.isfinite(value) else "a finite number"
