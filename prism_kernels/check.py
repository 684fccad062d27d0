"""Checks of arguments, with one wording for errors: the op, the expected argument, the given one."""

import os
from collections.abc import Iterable

import torch
from torch import Tensor


def fail(op: str, expected: str, got: object, error: type[Exception] = ValueError) -> None:
    """Raises `error` with the text that every op uses."""
    raise error(f"{op}: expected {expected}, got {got}")


def tensor(op: str, name: str, value: object) -> None:
    """Checks that an argument is a tensor."""
    if not isinstance(value, Tensor):
        fail(op, f"{name} to be a tensor", type(value).__name__, TypeError)


def shape(op: str, name: str, value: Tensor, expected: tuple[int | str, ...]) -> None:
    """Checks a shape; a string allows any size and names the dimension in the error."""
    sizes = tuple(value.shape)
    if len(sizes) != len(expected) or any(isinstance(e, int) and e != s for e, s in zip(expected, sizes)):
        wanted = ", ".join(str(e) for e in expected) + ("," if len(expected) == 1 else "")
        fail(op, f"{name} of shape ({wanted})", sizes)


def dtype(op: str, name: str, value: Tensor, allowed: Iterable[torch.dtype]) -> None:
    """Checks that a tensor has one of these dtypes."""
    allowed = tuple(allowed)
    if value.dtype not in allowed:
        names = ", ".join(str(a).removeprefix("torch.") for a in allowed)
        fail(op, f"{name} of dtype {names}", str(value.dtype).removeprefix("torch."), TypeError)


def device(op: str, name: str, value: Tensor, like: Tensor, like_name: str) -> None:
    """Checks that two tensors are on one device."""
    if value.device != like.device:
        fail(op, f"{name} on {like_name}'s device {like.device}", value.device)


def positive(op: str, name: str, value: float | None) -> None:
    """Checks that a number is positive and finite; None passes."""
    if value is not None and not 0 < value < float("inf"):
        fail(op, f"{name} > 0 and finite", value)


def one_of(op: str, name: str, value: object, known: Iterable[str]) -> None:
    """Checks that a name is known; the error lists the known names."""
    known = tuple(known)
    if value not in known:
        fail(op, f"{name} to be one of {', '.join(map(repr, known))}", repr(value))


def reads_values(value: Tensor) -> bool:
    """Returns whether a tensor's values may be checked: on the CPU, elsewhere only with PRISM_KERNELS_CHECK=1."""
    return value.device.type == "cpu" or os.environ.get("PRISM_KERNELS_CHECK") == "1"


def targets(op: str, target: Tensor, columns: int, ignore_index: int) -> None:
    """Checks that each target is a column or the ignored index, where values may be read."""
    if not reads_values(target):
        return
    bad = (target != ignore_index) & ((target < 0) | (target >= columns))
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        fail(op, f"target in [0, {columns}) or ignore_index {ignore_index}", f"{int(target[row])} in row {row}")


def temperatures(op: str, temperature: Tensor) -> None:
    """Checks that each temperature is positive and finite, where values may be read."""
    if not reads_values(temperature):
        return
    bad = ~((temperature > 0) & temperature.isfinite())
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        fail(op, "temperature > 0 and finite", f"{float(temperature[row])} in row {row}")
