"""The specification of `prefix_attention`: a masked softmax over all T x T products, in the dtype of its input."""

import torch
from torch import Tensor

from prism_kernels.packing import PrefixPack


def visible(pack: PrefixPack) -> Tensor:
    """Returns the keys that each query sees, (T, T), from the pack's branch of each token and its prefixes' lengths."""
    owner = torch.cat((pack.branch_group, pack.branch_group.new_zeros(1)))
    # a prefix token's group is the number of prefixes that end at or before it
    prefix_rank = (pack.branch == -1).cumsum(0) - 1
    of_prefix = torch.searchsorted(pack.cu_prefix[1:].long(), prefix_rank, right=True)
    group = torch.where(pack.branch == -1, of_prefix, owner[pack.branch])
    same_group = group[:, None] == group
    in_prefix = pack.branch == -1
    return (same_group & (in_prefix | (pack.branch[:, None] == pack.branch))).tril()


def prefix_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, pack: PrefixPack, *, scale: float | None = None
) -> Tensor:
    """Returns the output (T, H, d)."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)
    weight = scores.masked_fill(~visible(pack), -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weight, v)
