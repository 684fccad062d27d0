"""Prefix attention by torch's own kernels. T tokens, H heads of q, K heads of k and v, d width, n pieces of length L.

Two parts for the CPU: every piece attends causally to itself, and all branch tokens of a group, as one long query,
to their prefix. Against one call a branch over [prefix; branch] the products are the same, but no prefix is copied or
masked, its gradient is summed inside the kernel, and a group costs one call, whatever the lengths of its branches.
Two softmaxes over parts of the keys merge exactly, with l = logaddexp(l1, l2), out1 e^(l1 - l) + out2 e^(l2 - l).
A part's backward pass, given the merged out and l, returns its share of the gradients of the whole.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from prism_kernels.ops.prefix_attention.layout import pieces, plan
from prism_kernels.packing import Layout

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of the log-sum-exps and of sums of gradients."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _heads_first(x: Tensor, heads: int) -> Tensor:
    """Returns rows (n, L, K, d) as (n, H, L, d), each head as often as the queries need it."""
    n, length, kept, width = x.shape
    if kept != heads:
        x = x[:, :, :, None].expand(n, length, kept, heads // kept, width).reshape(n, length, heads, width)
    return x.transpose(1, 2)


def _fit(*tensors: Tensor) -> list[Tensor]:
    """Returns the tensors as the kernels need them: the last dimension dense."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """Returns x[rows], (n, L, K, d), contiguous whatever the strides of x."""
    return x.index_select(0, rows.flatten()).view(*rows.shape, *x.shape[1:])


def _rows(grad: Tensor, heads: int) -> Tensor:
    """Returns (n, H, L, d) as rows (n L, K, d), summed over the heads that shared one."""
    n, all_heads, length, width = grad.shape
    rows = grad.transpose(1, 2).reshape(n * length, heads, all_heads // heads, width)
    dtype = accumulator(grad.dtype)
    return rows[:, :, 0].to(dtype) if heads == all_heads else rows.sum(2, dtype=dtype)


def forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
    """Returns the output (T, H, d) and the log-sum-exps (T, H)."""
    heads = q.shape[1]
    batches, families = plan(layout)
    q, k, v = _fit(q, k, v)
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[:2], dtype=accumulator(q.dtype))
    for rows in batches:
        own = (_heads_first(_take(x, rows), heads) for x in (q, k, v))
        part, part_lse = _flash(*own, is_causal=True, scale=scale)
        out[rows] = part.transpose(1, 2)
        lse[rows] = part_lse.transpose(1, 2)
    for prefix, start, end in families:
        keys = (_heads_first(x[None, prefix:start], heads) for x in (k, v))
        part, part_lse = _flash(_heads_first(q[None, start:end], heads), *keys, scale=scale)
        seen, own_lse = part_lse[0].t(), lse[start:end]
        total = torch.logaddexp(seen, own_lse)
        merged = part[0].transpose(0, 1) * (seen - total).exp()[..., None]
        merged += out[start:end] * (own_lse - total).exp()[..., None]
        out[start:end] = merged
        lse[start:end] = total
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v."""
    heads, kept = q.shape[1], k.shape[1]
    batches, families = plan(layout)
    grad, q, k, v = _fit(grad, q, k, v)
    # sums of two parts: in 16 bits not in the tensors' own dtype
    grads = [torch.empty(x.shape, dtype=accumulator(x.dtype)) for x in (q, k, v)]
    for rows in batches:
        upstream, queries, keys, values, output = (_heads_first(_take(x, rows), heads) for x in (grad, q, k, v, out))
        parts = _flash_backward(
            upstream, queries, keys, values, output, lse[rows].transpose(1, 2), 0.0, True, scale=scale
        )
        for whole, part, count in zip(grads, parts, (heads, kept, kept)):
            whole[rows.flatten()] = _rows(part, count)
    for prefix, start, end in families:
        upstream, queries, output = (_heads_first(x[None, start:end], heads) for x in (grad, q, out))
        keys, values = (_heads_first(x[None, prefix:start], heads) for x in (k, v))
        parts = _flash_backward(
            upstream, queries, keys, values, output, lse[None, start:end].transpose(1, 2), 0.0, False, scale=scale
        )
        grads[0][start:end] += _rows(parts[0], heads)
        grads[1][prefix:start] += _rows(parts[1], kept)
        grads[2][prefix:start] += _rows(parts[2], kept)
    return grads[0].to(q.dtype), grads[1].to(k.dtype), grads[2].to(v.dtype)


# a trace would hold for the lengths of one pack
@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend_pieces(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
    """Returns the output (T, H, d) by one call a piece over [prefix; branch]: for any device and dtype."""
    outputs = []
    for start, length, prefix, size in pieces(layout):
        if length == 0:
            continue
        keys, values = (torch.cat((x[prefix : prefix + size], x[start : start + length])) for x in (k, v))
        seen = torch.ones(length, size + length, dtype=torch.bool, device=q.device).tril(size)
        # heads go first, and batches of one before them
        queries, keys, values = (x.transpose(0, 1)[None] for x in (q[start : start + length], keys, values))
        part = scaled_dot_product_attention(queries, keys, values, attn_mask=seen, scale=scale, enable_gqa=True)
        outputs.append(part[0].transpose(0, 1))
    return torch.cat(outputs)
