"""Attention over a pack in which each prompt is stored once: each branch sees its own prefix and itself."""

import torch
from torch import Tensor

from prism_kernels import check
from prism_kernels.ops.prefix_attention.eager import attend_pieces
from prism_kernels.ops.prefix_attention.op import NAME, PrefixAttentionFunction
from prism_kernels.ops.prefix_attention.varlen import attend_expanded, flash_takes
from prism_kernels.ops.rows import FLOATS
from prism_kernels.packing import LENGTHS, PrefixPack, layout_of


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, pack: PrefixPack, *, scale: float | None = None) -> Tensor:
    """Returns the attention's output (T, H, d), as if each branch ran as a sequence of its own after its prompt.

    It replaces, without the (T, T) mask::

        same = branch[:, None] == branch                       # -1 in a prefix
        own_prefix = (branch == -1) & (group[:, None] == group)
        mask = (own_prefix | same & (group[:, None] == group)).tril()
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)

    Memory is linear in T. On the CPU, two flash passes are merged by their log-sum-exps: one over the prefix for all
    queries of a group, one over each piece itself. On a GPU in 16 bits, one variable-length flash call reads an
    expanded copy of the prefixes' keys. Other dtypes and devices take one call per branch.

    Args:
        q: (T, H, d).
        k: (T, K, d); K divides H, and each of its heads serves H / K consecutive heads of q.
        v: (T, K, d).
        pack: where the prefixes and branches are; on q's device. Its lengths and groups are checked: on the CPU at each
            call, elsewhere when `pack.layout` first reads them from the device (packs made by `packing` never do).
        scale: the factor of the products; None: 1 / sqrt(d).
    """
    for name, value in (("q", q), ("k", k), ("v", v)):
        check.tensor(NAME, name, value)
        check.dtype(NAME, name, value, FLOATS if name == "q" else (q.dtype,))
        check.device(NAME, name, value, q, "q")
    if not isinstance(pack, PrefixPack):
        check.fail(NAME, "pack to be a PrefixPack (prism_kernels.packing)", type(pack).__name__, TypeError)
    for name, value in zip(LENGTHS, pack.lengths):
        check.tensor(NAME, name, value)
        check.device(NAME, "pack", value, q, "q")
    if q.dim() != 3 or 0 in q.shape[1:]:
        check.fail(NAME, "q of shape (T, H, d) with H, d > 0", tuple(q.shape))
    tokens, heads, width = q.shape
    if tokens != pack.input_ids.shape[0]:
        check.fail(NAME, f"q of shape ({pack.input_ids.shape[0]}, H, d), the pack's tokens", tuple(q.shape))
    check.shape(NAME, "k", k, (tokens, "K", width))
    if k.shape[1] == 0 or heads % k.shape[1]:
        check.fail(NAME, f"k of shape (T, K, d) with K a divisor of q's {heads} heads", tuple(k.shape))
    check.shape(NAME, "v", v, tuple(k.shape))
    scale = check.optional(NAME, "scale", scale) or width**-0.5
    if tokens == 0:
        layout_of(*pack.lengths, tokens, NAME)
        # empty, but a part of the graph
        return q + 0 * (k.sum() + v.sum())
    if q.device.type == "cpu":
        return PrefixAttentionFunction.apply(q, k, v, pack.lengths, scale)
    if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16) and flash_takes(q):
        return attend_expanded(q, k, v, pack, scale)
    return attend_pieces(q, k, v, pack.layout, scale)
