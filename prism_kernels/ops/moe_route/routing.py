"""What a router decides, as the experts want it. T tokens, E experts, K experts of a token."""

from typing import NamedTuple

from torch import Tensor, int32, int64, nan, ops, where

from prism_kernels import check
from prism_kernels.backend import resolve
from prism_kernels.ops.moe_route.registration import FLOATS, NAME
from prism_kernels.ops.moe_route.torch import accumulator


class Routing(NamedTuple):
    """Which experts each token goes to, how much each counts, and in which order the experts take the tokens.

    An assignment is a token with one of its experts; t * K + k is its number.
    """

    # [T, K] int64; no tuple's `index` is needed here
    index: Tensor  # type: ignore[assignment]
    # [T, K] fp32 (fp64 for fp64 input), differentiable
    weight: Tensor
    # [E] int32, where each expert's assignments end in the permutation
    offsets: Tensor
    # [T * K] int32, the assignments by expert, those of an expert in the order of the tokens
    permutation: Tensor
    # [kinds, E] the weight of the tokens of each kind that chose each expert
    counts: Tensor
    # without dimensions; None where the routing was given
    aux_loss: Tensor | None
    z_loss: Tensor | None

    @staticmethod
    def from_topk(index: Tensor, weight: Tensor, num_experts: int, *, backend: str | None = None) -> "Routing":
        """Returns the routing of another router's choice: index and weight (T, K); differentiable in weight."""
        op = f"{NAME}.from_topk"
        check.tensor(op, "index", index)
        check.shape(op, "index", index, ("T", "K"))
        check.dtype(op, "index", index, (int64, int32))
        check.tensor(op, "weight", weight)
        check.shape(op, "weight", weight, tuple(index.shape))
        check.dtype(op, "weight", weight, FLOATS)
        check.device(op, "weight", weight, index, "index")
        if num_experts < 1 or index.shape[1] < 1:
            check.fail(op, "at least one expert, and one for each token", f"{num_experts}, {index.shape[1]}")
        # held in range, since on a GPU the values are not checked: a bad one shows as a weight of NaN
        chosen = resolve(NAME, index.device, backend)
        offsets, permutation = ops.prism_kernels.moe_permutation_fwd(index, num_experts, chosen)
        held = index.to(int64).clamp(0, num_experts - 1)
        dtype = accumulator(weight)
        kept = where(held == index, weight.to(dtype), nan)
        counts = offsets.diff(prepend=offsets.new_zeros(1)).to(dtype)[None]
        return Routing(held, kept, offsets, permutation, counts, None, None)
