"""Checks of arguments, with one wording for errors: the op, the expected argument, the given one."""

import os
from collections.abc import Iterable
from numbers import Real
from operator import index

import numpy as np
import torch
from torch import Tensor

# of a number: its inverse and its square are finite in fp32, and so is its product with exp(40), the largest ratio
SMALLEST, LARGEST = 1e-15, 1e15
# from here on softmax is uniform to fp32, and the logarithms of its exponentials have no digits left
LARGEST_TEMPERATURE = 1e6
# an operator's integers are int64
LEAST_INTEGER, LARGEST_INTEGER = -(2**63), 2**63 - 1


def fail(op: str, expected: str, got: object, error: type[Exception] = ValueError) -> None:
    """Raises `error` with the text that every op uses."""
    if isinstance(got, int) and got.bit_length() > 64:
        # Python refuses to print long ones
        got = f"an integer of {got.bit_length()} bits"
    raise error(f"{op}: expected {expected}, got {got}")


def tensor(op: str, name: str, value: object) -> None:
    """Checks that an argument is a plain tensor: dense, and no DTensor."""
    if not isinstance(value, Tensor):
        fail(op, f"{name} to be a tensor", type(value).__name__, TypeError)
    assert isinstance(value, Tensor)
    if value.layout is not torch.strided:
        fail(op, f"{name} to be a dense tensor", str(value.layout).removeprefix("torch."), TypeError)
    if type(value) is not Tensor and hasattr(value, "full_tensor"):
        fail(op, f"{name} to be a plain tensor", "a DTensor; pass its to_local() or full_tensor()", TypeError)


def shape(op: str, name: str, value: Tensor, expected: tuple[int | str, ...]) -> None:
    """Checks a shape; a string allows any size and names the dimension in the error."""
    if value.shape == expected:
        return
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


def real(op: str, name: str, value: Tensor) -> None:
    """Checks that a tensor has real numbers: floats or integers."""
    if value.dtype.is_complex or value.dtype == torch.bool:
        fail(op, f"{name} of a real dtype", str(value.dtype).removeprefix("torch."), TypeError)


def device(op: str, name: str, value: Tensor, like: Tensor, like_name: str) -> None:
    """Checks that two tensors are on one device."""
    if value.device != like.device:
        fail(op, f"{name} on {like_name}'s device {like.device}", value.device)


def number(
    op: str, name: str, value: object, low: float = -LARGEST, high: float = LARGEST, expected: str | None = None
) -> float:
    """Returns a number as a float, after checking that it lies in [low, high].

    Args:
        op: the op's name.
        name: the argument's name.
        value: a number of Python or numpy. A tensor is none: reading it would wait for its device.
        low: the least value.
        high: the largest value.
        expected: what the error says instead of the bounds.
    """
    kind = type(value)
    if kind is not float and kind is not int and (kind is bool or not isinstance(value, _NUMBERS)):
        fail(op, f"{name} to be a number", kind.__name__, TypeError)
    # the comparison is exact for integers that no float can hold, and NaN fails it
    if not low <= value <= high:  # type: ignore[operator]
        fail(op, expected or f"{name} in [{low:g}, {high:g}]", value)
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError:
        fail(op, expected or f"{name} in [{low:g}, {high:g}]", value)
        raise


# under torch.compile, numbers may be symbols
_NUMBERS = (Real, torch.SymFloat, torch.SymInt)


def memory(op: str, name: str, value: Tensor) -> None:
    """Checks that a tensor has values, unlike one of the device meta."""
    if value.is_meta:
        fail(op, f"{name} on a device with memory", value.device)


def positive(op: str, name: str, value: object, largest: float = LARGEST) -> float:
    """Returns a number as a float, after checking that it is positive, neither tiny nor huge."""
    plain = number(op, name, value, -torch.inf, torch.inf, f"{name} > 0 and finite")
    if not SMALLEST <= plain <= largest:
        fail(op, _positive(name, plain, largest), value)
    return plain


def _positive(name: str, value: float, largest: float) -> str:
    return f"{name} in [{SMALLEST:g}, {largest:g}]" if 0 < value < torch.inf else f"{name} > 0 and finite"


def optional(op: str, name: str, value: object) -> float:
    """Returns a positive number as a float, as `positive` does, and 0 for None."""
    return 0.0 if value is None else positive(op, name, value)


def denominator(op: str, value: Tensor) -> None:
    """Checks what is known of a denominator without reading it."""
    tensor(op, "denominator", value)
    real(op, "denominator", value)
    shape(op, "denominator", value, ())


def integer(
    op: str,
    name: str,
    value: object,
    low: int = LEAST_INTEGER,
    high: int = LARGEST_INTEGER,
    expected: str | None = None,
) -> int:
    """Returns an integer of Python or numpy, after checking that it lies in [low, high]."""
    kind = type(value)
    if kind is not int and (kind is bool or not isinstance(value, int | np.integer | torch.SymInt)):
        fail(op, f"{name} to be an integer", kind.__name__, TypeError)
    if not low <= value <= high:  # type: ignore[operator]
        fail(op, expected or f"{name} in [{low}, {high}]", value)
    return value if kind is int else index(value)  # type: ignore[return-value, arg-type]


def flag(op: str, name: str, value: object) -> bool:
    """Returns True or False, after checking that the argument is one of them."""
    if not isinstance(value, bool | np.bool_):
        fail(op, f"{name} to be True or False", type(value).__name__, TypeError)
    return bool(value)


def one_of(op: str, name: str, value: object, known: Iterable[str]) -> None:
    """Checks that a name is known; the error lists the known names."""
    known = tuple(known)
    if not isinstance(value, str) or value not in known:
        got = repr(value) if value is None or isinstance(value, str) else type(value).__name__
        fail(op, f"{name} to be one of {', '.join(map(repr, known))}", got)


def reads_values(value: Tensor) -> bool:
    """Returns whether a tensor's values may be checked: on the CPU, elsewhere only with PRISM_KERNELS_CHECK=1."""
    return value.device.type == "cpu" or os.environ.get("PRISM_KERNELS_CHECK") == "1"


def targets(op: str, target: Tensor, columns: int, ignore_index: int) -> None:
    """Checks that each target is a column or the ignored index, where values may be read."""
    if not reads_values(target) or not target.numel():
        return
    low, high = target.aminmax()
    if int(low) >= 0 and int(high) < columns:
        return
    bad = (target != ignore_index) & ((target < 0) | (target >= columns))
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        fail(op, f"target in [0, {columns}) or ignore_index {ignore_index}", f"{int(target[row])} in row {row}")


def temperatures(op: str, temperature: Tensor, softcap: float = 0.0) -> None:
    """Checks each temperature, where values may be read: positive, not huge, and at most four times a soft cap.

    The slope of a soft cap is computed from the logarithms of exponentials, in which a cap far below the temperature
    is lost.
    """
    if not reads_values(temperature) or not temperature.numel():
        return
    # both are NaN where one value is
    low, high = temperature.aminmax()
    if float(low) >= SMALLEST and float(high) <= min(4 * softcap or LARGEST_TEMPERATURE, LARGEST_TEMPERATURE):
        return
    bad = ~((temperature >= SMALLEST) & (temperature <= LARGEST_TEMPERATURE))
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        value = float(temperature[row])
        fail(op, _positive("temperature", value, LARGEST_TEMPERATURE), f"{value} in row {row}")
    if softcap and float(high) > 4 * softcap:
        fail(op, f"softcap of at least a quarter of the temperature {float(high):g}", softcap)
