"""Inputs and the three-way comparison, for tests and benchmarks."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def head_inputs(
    rows: int,
    columns: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    scale: float = 1.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns hidden (T, D) and weight (V, D), which require gradients, and target (T,); `scale` spreads the logits."""
    make = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=make) * (scale / math.sqrt(width))
    weight = torch.randn(columns, width, generator=make)
    target = torch.randint(0, columns, (rows,), generator=make)
    leaves = [x.to(device, dtype).requires_grad_() for x in (hidden, weight)]
    return leaves[0], leaves[1], target.to(device)


def confident_inputs(
    gaps: Tensor, columns: int, width: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns hidden, weight and target such that 1 - p of row t's target is close to gaps[t]."""
    make = torch.Generator().manual_seed(seed)
    rows = gaps.numel()
    weight = torch.randn(columns, width, generator=make, dtype=torch.float64) / math.sqrt(width)
    target = torch.randint(0, columns, (rows,), generator=make)
    direction = weight[target]
    # along the target's weight row its logit grows with the row's square, the others only at random
    hidden = torch.zeros(rows, width, dtype=torch.float64)
    low, high = torch.zeros(rows, dtype=torch.float64), torch.full((rows,), 400.0, dtype=torch.float64)
    for _ in range(60):
        middle = (low + high) / 2
        hidden = direction * middle[:, None]
        z = hidden @ weight.t()
        rest = z.scatter(1, target[:, None], -torch.inf).logsumexp(1)
        missing = torch.sigmoid(rest - z.gather(1, target[:, None])[:, 0])
        high = torch.where(missing < gaps, middle, high)
        low = torch.where(missing < gaps, low, middle)
    return hidden.to(device, dtype).requires_grad_(), weight.to(device, dtype).requires_grad_(), target.to(device)


def double(value: Any) -> Any:
    """Returns float64 copies of the tensors inside a value, as leaves that require gradients where the originals do."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value
        return value.detach().double().requires_grad_(value.requires_grad)
    if isinstance(value, tuple):
        return tuple(double(v) for v in value)
    if isinstance(value, Mapping):
        return {k: double(v) for k, v in value.items()}
    return value


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Returns the norm of the difference over the norm of the exact value."""
    wanted = exact.detach().double()
    return float((value.detach().double() - wanted).norm() / wanted.norm().clamp(min=1e-300))


def assert_close(ours: Tensor, plain: Tensor, exact: Tensor, *, name: str, tiny: float = 1e-6) -> None:
    """Asserts the three-way rule: our error against float64 is at most twice that of plain torch at the same dtype."""
    assert ours.shape == exact.shape, f"{name}: expected shape {tuple(exact.shape)}, got {tuple(ours.shape)}"
    error, allowed = relative_error(ours, exact), 2 * relative_error(plain, exact) + tiny
    # `not <=`, so that NaN fails
    assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"


def gradients(outputs: list[tuple[Tensor, Tensor]], leaves: list[Tensor]) -> list[Tensor]:
    """Returns the gradients of sum(output * weight) with respect to the leaves; fails where one is unused."""
    total = sum((output * weight.to(output.dtype)).sum() for output, weight in outputs)
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, leaves))


def poison_allocations() -> Callable[[], None]:
    """Makes torch.empty and its variants return NaN from now on; returns a function that undoes it."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    # torch's default, which a caller may have changed
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    return lambda: torch.use_deterministic_algorithms(before)
