"""Checks of the tensors that the policy losses share."""

from collections.abc import Mapping

import torch
from torch import Tensor

from prism_kernels import check

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def batch(
    op: str,
    tokens: int,
    like: Tensor,
    name: str,
    advantage: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    denominator: float | Tensor | None,
    columns: Mapping[str, Tensor | None],
) -> bool:
    """Checks shapes, dtypes and devices; returns whether the advantage is one number for each token.

    `columns` are the float tensors (T,), where given; devices must be that of `like`, which is called `name`.
    """
    check.tensor(op, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        check.fail(op, "cu_seqlens of shape (S + 1,)", tuple(cu_seqlens.shape))
    check.dtype(op, "cu_seqlens", cu_seqlens, (torch.int32, torch.int64))
    check.device(op, "cu_seqlens", cu_seqlens, like, name)
    for key, value in columns.items():
        if value is not None:
            check.tensor(op, key, value)
            check.shape(op, key, value, (tokens,))
            check.dtype(op, key, value, FLOATS)
            check.device(op, key, value, like, name)
    if mask is not None:
        check.tensor(op, "mask", mask)
        check.shape(op, "mask", mask, (tokens,))
        check.dtype(op, "mask", mask, (torch.bool,))
        check.device(op, "mask", mask, like, name)
    if isinstance(denominator, Tensor):
        check.shape(op, "denominator", denominator, ())
        check.device(op, "denominator", denominator, like, name)
    check.tensor(op, "advantage", advantage)
    check.dtype(op, "advantage", advantage, FLOATS)
    check.device(op, "advantage", advantage, like, name)
    sequences = cu_seqlens.shape[0] - 1
    if advantage.dim() != 1 or advantage.shape[0] not in (sequences, tokens):
        check.fail(
            op,
            f"advantage of shape ({sequences},), one for each sequence, or ({tokens},), one for each token",
            tuple(advantage.shape),
        )
    return advantage.shape[0] == tokens


def required(op: str, name: str, value: Tensor | None, option: str, setting: float | str | None) -> None:
    """Checks that a tensor is given where an option needs it."""
    if setting and value is None:
        check.fail(op, f"{name} with {option} {setting!r}", None)


def values(op: str, cu_seqlens: Tensor, tokens: int, denominator: Tensor | None) -> None:
    """Checks that the sequences cover the tokens, and that the denominator is not 0, where values may be read."""
    if not check.reads_values(cu_seqlens):
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != tokens:
        check.fail(op, f"cu_seqlens from 0 to {tokens}, the number of tokens", f"{first} to {last}")
    falls = cu_seqlens.diff() < 0
    if falls.any():
        place = int(falls.nonzero()[0, 0]) + 1
        pair = f"{int(cu_seqlens[place])} after {int(cu_seqlens[place - 1])} at {place}"
        check.fail(op, "cu_seqlens that do not decrease", pair)
    if denominator is not None and not 0 < float(denominator) < float("inf"):
        check.fail(op, "denominator > 0 and finite", float(denominator))
