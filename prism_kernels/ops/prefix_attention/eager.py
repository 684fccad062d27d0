"""Prefix attention by torch's kernels: by flash attention on the CPU, and by one call per piece on any device.

T tokens, H heads of q, K heads of k and v, d width. A piece is a prefix or a branch; n pieces of length L.

On the CPU attention has two parts: every piece attends causally to itself, and all branch tokens of a group, as one
long query, attend to their prefix. One call per branch over [prefix; branch] needs the same products; with two parts no
prefix is copied or masked, its gradient is summed inside the kernel, and a group costs one call, for branches of any
lengths. Two softmaxes over parts of the keys merge exactly: with l = logaddexp(l1, l2),
out = out1 e^(l1 - l) + out2 e^(l2 - l). A part's backward pass, given the merged out and l, returns its share of the
gradients.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from prism_kernels.ops.rows import accumulator
from prism_kernels.packing import Layout

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Piece(NamedTuple):
    """Consecutive tokens that attend causally to themselves, and the prefix that they all see (empty for a prefix)."""

    start: int
    length: int
    prefix_start: int
    prefix_length: int


class Family(NamedTuple):
    """A group with a prefix and branches; the branches' tokens directly follow the prefix."""

    prefix_start: int
    # of the branches' tokens
    start: int
    end: int


def pieces(layout: Layout) -> list[Piece]:
    """Returns the pieces in the order of their tokens, with empty prefixes."""
    result = []
    start = 0
    lengths = iter(layout.branch)
    for prefix, branches in zip(layout.prefix, layout.branches):
        prefix_start = start
        result.append(Piece(start, prefix, start, 0))
        start += prefix
        for _ in range(branches):
            length = next(lengths)
            result.append(Piece(start, length, prefix_start, prefix))
            start += length
    return result


def families(layout: Layout) -> list[Family]:
    """Returns the groups in which branches see a prefix."""
    result: list[Family] = []
    for piece in pieces(layout):
        if piece.prefix_length == 0 or piece.length == 0:
            continue
        start, end = piece.start, piece.start + piece.length
        if result and result[-1].prefix_start == piece.prefix_start:
            result[-1] = result[-1]._replace(end=end)
        else:
            result.append(Family(piece.prefix_start, start, end))
    return result


# the layers of a model share one pack, forward and backward
@lru_cache(maxsize=8)
def plan(layout: Layout) -> tuple[tuple[Tensor, ...], tuple[Family, ...]]:
    """Returns the rows (n, L) of the n pieces of each length L > 0, shortest first, and the families."""
    starts: dict[int, list[int]] = {}
    for piece in pieces(layout):
        starts.setdefault(piece.length, []).append(piece.start)
    starts.pop(0, None)
    rows = (torch.tensor(first)[:, None] + torch.arange(length) for length, first in sorted(starts.items()))
    return tuple(rows), tuple(families(layout))


def _heads_first(x: Tensor, heads: int) -> Tensor:
    """Returns rows (n, L, K, d) as (n, H, L, d), each head repeated for its H / K heads of q."""
    n, length, kv_heads, width = x.shape
    if kv_heads != heads:
        x = x[:, :, :, None].expand(n, length, kv_heads, heads // kv_heads, width).reshape(n, length, heads, width)
    return x.transpose(1, 2)


def _last_dense(*tensors: Tensor) -> list[Tensor]:
    """Returns the tensors with a last dimension of stride 1, which the kernels need."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """Returns x[rows], (n, L, K, d), contiguous."""
    return x.index_select(0, rows.flatten()).view(*rows.shape, *x.shape[1:])


def _rows(grad: Tensor, heads: int) -> Tensor:
    """Returns (n, H, L, d) as rows (n L, K, d), summed over the heads of q that share a head of k and v."""
    n, q_heads, length, width = grad.shape
    rows = grad.transpose(1, 2).reshape(n * length, heads, q_heads // heads, width)
    dtype = accumulator(grad.dtype)
    return rows[:, :, 0].to(dtype) if heads == q_heads else rows.sum(2, dtype=dtype)


def forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
    """Returns the output (T, H, d) and the log-sum-exps (T, H)."""
    heads = q.shape[1]
    batches, families = plan(layout)
    q, k, v = _last_dense(q, k, v)
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[:2], dtype=accumulator(q.dtype))
    for rows in batches:
        part, part_lse = _flash(*(_heads_first(_take(x, rows), heads) for x in (q, k, v)), is_causal=True, scale=scale)
        out[rows] = part.transpose(1, 2)
        lse[rows] = part_lse.transpose(1, 2)
    for prefix, start, end in families:
        keys = (_heads_first(x[None, prefix:start], heads) for x in (k, v))
        part, part_lse = _flash(_heads_first(q[None, start:end], heads), *keys, scale=scale)
        prefix_lse, piece_lse = part_lse[0].t(), lse[start:end]
        total = torch.logaddexp(prefix_lse, piece_lse)
        merged = part[0].transpose(0, 1) * (prefix_lse - total).exp()[..., None]
        merged += out[start:end] * (piece_lse - total).exp()[..., None]
        out[start:end] = merged
        lse[start:end] = total
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v."""
    heads, kv_heads = q.shape[1], k.shape[1]
    batches, families = plan(layout)
    grad, q, k, v = _last_dense(grad, q, k, v)
    # sums of two parts, so not in 16 bits
    grads = [torch.empty(x.shape, dtype=accumulator(x.dtype)) for x in (q, k, v)]
    for rows in batches:
        upstream, queries, keys, values, output = (_heads_first(_take(x, rows), heads) for x in (grad, q, k, v, out))
        parts = _flash_backward(
            upstream, queries, keys, values, output, lse[rows].transpose(1, 2), 0.0, True, scale=scale
        )
        for whole, part, count in zip(grads, parts, (heads, kv_heads, kv_heads)):
            whole[rows.flatten()] = _rows(part, count)
    for prefix, start, end in families:
        upstream, queries, output = (_heads_first(x[None, start:end], heads) for x in (grad, q, out))
        keys, values = (_heads_first(x[None, prefix:start], heads) for x in (k, v))
        parts = _flash_backward(
            upstream, queries, keys, values, output, lse[None, start:end].transpose(1, 2), 0.0, False, scale=scale
        )
        grads[0][start:end] += _rows(parts[0], heads)
        grads[1][prefix:start] += _rows(parts[1], kv_heads)
        grads[2][prefix:start] += _rows(parts[2], kv_heads)
    return grads[0].to(q.dtype), grads[1].to(k.dtype), grads[2].to(v.dtype)


# a trace would be valid for the lengths of one pack only
@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend_pieces(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
    """Returns the output (T, H, d) by one call per piece over [prefix; branch]; for any device and dtype."""
    outputs = []
    for start, length, prefix, size in pieces(layout):
        if length == 0:
            continue
        keys, values = (torch.cat((x[prefix : prefix + size], x[start : start + length])) for x in (k, v))
        mask = torch.ones(length, size + length, dtype=torch.bool, device=q.device).tril(size)
        # [1, H, L, d]
        queries, keys, values = (x.transpose(0, 1)[None] for x in (q[start : start + length], keys, values))
        part = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
        outputs.append(part[0].transpose(0, 1))
    return torch.cat(outputs)
