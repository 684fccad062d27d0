"""Prefix attention by one variable-length flash call on a GPU. T tokens, U expanded keys, K heads, d width.

Every piece is a sequence. Its queries are its own tokens, so that q needs no copy; its keys are its prefix's tokens,
then its own. Flash attention aligns a causal mask to the lower right, as queries after a prefix need it.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prism_kernels.ops.prefix_attention.eager import pieces
from prism_kernels.ops.rows import accumulator
from prism_kernels.packing import Layout, PrefixPack

# (q, k, v, cu_q, cu_k, max_q, max_k, scale) -> out, causal to the lower right
Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float], Tensor]


class Expansion(NamedTuple):
    """The token that each expanded key copies, and the copies of each token."""

    # [U]
    source: Tensor
    # [T] the copy in the token's own piece
    in_piece: Tensor
    # for each group of at least one branch, its prefix's first token and the copies (branches, L) of its tokens
    copies: tuple[tuple[int, Tensor], ...]
    # int32, the bounds of the pieces
    cu_query: Tensor
    cu_key: Tensor
    max_query: int
    max_key: int


# all layers of a model share one, as long as the pack exists
_EXPANSIONS: WeakKeyDictionary[PrefixPack, Expansion] = WeakKeyDictionary()


def flash_takes(q: Tensor) -> bool:
    """Returns whether flash attention has a kernel for these heads on this GPU."""
    return q.shape[2] % 8 == 0 and q.shape[2] <= 256 and torch.cuda.get_device_capability(q.device) >= (8, 0)


def expansion(layout: Layout, device: torch.device) -> Expansion:
    """Returns the expansion of a pack."""
    source, in_piece = [], []
    copies: dict[int, list[Tensor]] = {}
    cu_query, cu_key = [0], [0]
    max_query = max_key = 0
    for start, length, prefix, size in pieces(layout):
        if length == 0:
            continue
        begin = cu_key[-1]
        source += [torch.arange(prefix, prefix + size), torch.arange(start, start + length)]
        in_piece.append(torch.arange(begin + size, begin + size + length))
        if size:
            copies.setdefault(prefix, []).append(torch.arange(begin, begin + size))
        cu_query.append(cu_query[-1] + length)
        cu_key.append(begin + size + length)
        max_query, max_key = max(max_query, length), max(max_key, size + length)
    empty = torch.empty(0, dtype=torch.int64)
    return Expansion(
        torch.cat([*source, empty]).to(device),
        torch.cat([*in_piece, empty]).to(device),
        tuple((prefix, torch.stack(rows).to(device)) for prefix, rows in copies.items()),
        torch.tensor(cu_query, dtype=torch.int32, device=device),
        torch.tensor(cu_key, dtype=torch.int32, device=device),
        max_query,
        max_key,
    )


# lengths are data: a traced expansion would be valid for one pack only
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _expansion_of(pack: PrefixPack, device: torch.device) -> Expansion:
    plan = _EXPANSIONS.get(pack)
    if plan is None:
        # tensors made in inference mode cannot be saved for a later backward pass
        with torch.inference_mode(False):
            plan = _EXPANSIONS[pack] = expansion(pack.layout, device)
    return plan


class Expand(torch.autograd.Function):
    """Copies the rows of k or v; the gradients of the copies are summed in fp32, in a fixed order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Expansion) -> Tensor:
        """Returns (U, K, d)."""
        ctx.plan = plan
        return x.index_select(0, plan.source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Returns (T, K, d)."""
        plan: Expansion = ctx.plan
        total = grad.index_select(0, plan.in_piece)
        for prefix, copies in plan.copies:
            branches, length = copies.shape
            rows = torch.cat((grad.index_select(0, copies.flatten()), total[prefix : prefix + length]))
            summed = rows.view(branches + 1, length, *grad.shape[1:]).sum(0, dtype=accumulator(grad.dtype))
            total[prefix : prefix + length] = summed.to(grad.dtype)
        return total, None


def attend_expanded(
    q: Tensor, k: Tensor, v: Tensor, pack: PrefixPack, scale: float, varlen: Varlen | None = None
) -> Tensor:
    """Returns the output (T, H, d)."""
    plan = _expansion_of(pack, q.device)
    attend = varlen or _installed()
    keys, values = Expand.apply(k, plan), Expand.apply(v, plan)
    return attend(q, keys, values, plan.cu_query, plan.cu_key, plan.max_query, plan.max_key, scale)


def _installed() -> Varlen:
    return _flash_attn if find_spec("flash_attn") else _torch_varlen


def _flash_attn(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float
) -> Tensor:
    flash_attn_varlen_func = import_module("flash_attn").flash_attn_varlen_func
    # the faster, nondeterministic backward pass adds to dq in any order
    return flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=True, deterministic=True
    )


def _torch_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    known = signature(varlen_attn).parameters
    # the first versions have no window, and take fewer heads of k without an option
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known and q.shape[1] != k.shape[1]:
        options["enable_gqa"] = True
    out = varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, **options)
    assert isinstance(out, Tensor)
    return out
