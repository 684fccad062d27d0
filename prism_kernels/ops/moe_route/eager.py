"""The router in plain torch, with closed-form gradients: no sort of the assignments, no host synchronisation.

T tokens, D width, E experts, K experts of a token, C kinds of tokens. p is the probability of an expert.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from prism_kernels.ops.rows import accumulator


class Choice(NamedTuple):
    """Each token's experts, with the probabilities and the logsumexp of its logits."""

    # [T, K]
    experts: Tensor
    # [T, E]
    probability: Tensor
    # [T]
    lse: Tensor


class Tokens(NamedTuple):
    """The kinds of the tokens and their weights."""

    # [T]; None: one kind
    kind: Tensor | None
    # [T]; None: 1 each
    weight: Tensor | None
    # the number of kinds
    kinds: int

    def kind_index(self) -> Tensor | None:
        """Returns the kinds (T,) as indices, clamped, since on a GPU the values are not checked."""
        return None if self.kind is None else self.kind.to(torch.int64).clamp(0, self.kinds - 1)

    def members(self, like: Tensor) -> Tensor:
        """Returns each token's weight in the row of its kind, 0 in the others: (C, T), fp64."""
        weight = torch.ones_like(like, dtype=torch.float64) if self.weight is None else self.weight.double()
        if self.kind is None:
            return weight[None]
        kinds = torch.arange(self.kinds, device=like.device)
        return torch.where(self.kind == kinds[:, None], weight, 0)

    def counted(self, x: Tensor) -> Tensor:
        """Returns x (T,) or (T, E), and 0 at tokens of weight 0, whose x may be NaN."""
        if self.weight is None:
            return x
        keep = self.weight != 0
        return torch.where(keep[:, None] if x.dim() == 2 else keep, x, 0)


def logits(x: Tensor, router_weight: Tensor, tokens: Tokens, kind_bias: Tensor | None) -> Tensor:
    """Returns the logits (T, E), NaN at a token of an unknown kind."""
    dtype = accumulator(x.dtype)
    if x.is_cuda and x.dtype == router_weight.dtype and x.dtype in (torch.bfloat16, torch.float16):
        # products of 16-bit numbers are exact in fp32: x needs no fp32 copy
        z = torch.mm(x, router_weight.t(), dtype)
    else:
        z = torch.mm(x.to(dtype), router_weight.to(dtype).t())
    kind_index = tokens.kind_index()
    if kind_bias is not None:
        bias = kind_bias.to(dtype)
        z += bias if kind_index is None else bias.index_select(0, kind_index)
    if kind_index is not None and tokens.kind is not None:
        z = torch.where(torch.eq(kind_index, tokens.kind)[:, None], z, torch.nan)
    return z


def choose(z: Tensor, top_k: int) -> Choice:
    """Returns the experts of the top_k largest logits (T, E); of equal probabilities the lower index comes first."""
    probability = torch.softmax(z, 1)
    # not topk, which does not specify the order of equal values
    index = torch.sort(probability, dim=1, descending=True, stable=True).indices[:, :top_k].contiguous()
    return Choice(index, probability, torch.logsumexp(z, 1))


def permute(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Returns the offsets (E,) and the permutation (T * K,) of the assignments (T, K): a counting sort, stable."""
    flat = index.reshape(1, -1).to(torch.int64)
    # [E, T * K] the number of assignments to the expert up to and including this one
    running = (flat == torch.arange(experts, device=flat.device)[:, None]).cumsum(1, dtype=torch.int32)
    total = running[:, -1] if flat.shape[1] else running.sum(1, dtype=torch.int32)
    offsets = total.cumsum(0, dtype=torch.int32)
    position = (offsets - total).index_select(0, flat[0]) + running.gather(0, flat)[0] - 1
    assignment = torch.arange(flat.shape[1], device=flat.device, dtype=torch.int32)
    return offsets, torch.empty_like(assignment).scatter_(0, position.to(torch.int64), assignment)


def weights(choice: Choice, renormalize: bool) -> Tensor:
    """Returns the weights of each token's experts, (T, K)."""
    weight = choice.probability.gather(1, choice.experts)
    return weight / weight.sum(1, keepdim=True) if renormalize else weight


def count(index: Tensor, tokens: Tokens, experts: int) -> Tensor:
    """Returns the total weight of each kind's tokens that chose each expert, (C, E), fp64."""
    chosen = torch.zeros(index.shape[0], experts, dtype=torch.float64, device=index.device)
    return tokens.members(index[:, 0]) @ chosen.scatter_(1, index, 1.0)


def _inverse_weights(counts: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Returns 1 / each kind's total weight, (C, 1), and 1 / the weight of all tokens; 0 where the weight is 0."""
    kind_weight = counts.sum(1, keepdim=True) / top_k
    total = kind_weight.sum()
    return torch.where(kind_weight > 0, 1 / kind_weight, 0), torch.where(total > 0, 1 / total, 0)


def losses(choice: Choice, tokens: Tokens, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the load-balance loss and the z loss; counts (C, E) are from `count`."""
    per_kind, per_token = _inverse_weights(counts, choice.experts.shape[1])
    members = tokens.members(choice.lse)
    mass = members @ tokens.counted(choice.probability).double()
    aux = counts.shape[1] * per_token * (counts * mass * per_kind).sum()
    z = per_token * (members.sum(0) * tokens.counted(choice.lse).double().square()).sum()
    return aux.to(choice.lse.dtype), z.to(choice.lse.dtype)


def logits_gradient(
    choice: Choice,
    tokens: Tokens,
    counts: Tensor,
    renormalize: bool,
    grad_weight: Tensor | None,
    grad_aux: Tensor | None,
    grad_z: Tensor | None,
) -> Tensor:
    """Returns the gradient of the logits, (T, E), given those of the weights and of the two losses."""
    index, p, lse = choice
    grad = torch.zeros_like(p)
    if grad_weight is not None:
        weight = weights(choice, renormalize)
        slope = weight * grad_weight.to(p.dtype)
        if renormalize:
            grad.scatter_(1, index, slope - weight * slope.sum(1, keepdim=True))
        else:
            grad.scatter_(1, index, slope).addcmul_(p, slope.sum(1, keepdim=True), value=-1)
    if grad_aux is None and grad_z is None:
        return grad
    per_kind, per_token = (t.to(p.dtype) for t in _inverse_weights(counts, index.shape[1]))
    share = per_token if tokens.weight is None else per_token * tokens.weight.to(p.dtype)[:, None]
    of_losses = torch.zeros_like(p)
    if grad_aux is not None:
        # the counts are constants, so the loss is linear in the probabilities
        slope = grad_aux * counts.shape[1] * counts.to(p.dtype) * per_kind
        kind_index = tokens.kind_index()
        slope = slope if kind_index is None else slope.index_select(0, kind_index)
        of_losses += p * (slope - (p * slope).sum(1, keepdim=True))
    if grad_z is not None:
        of_losses += p * (2 * grad_z * lse[:, None])
    return grad + tokens.counted(share * of_losses)


def input_gradients(
    grad_logits: Tensor, x: Tensor, router_weight: Tensor, tokens: Tokens, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x, router_weight and kind_bias; empty where not needed."""
    dtype = grad_logits.dtype
    # not one empty tensor: an operator's results may not share memory
    grad_x, grad_router, grad_bias = (grad_logits.new_empty(0) for _ in range(3))
    if needs[0]:
        grad_x = torch.mm(grad_logits, router_weight.to(dtype))
    if needs[1]:
        grad_router = torch.mm(grad_logits.t(), x.to(dtype))
    if needs[2]:
        unweighted = Tokens(tokens.kind, None, tokens.kinds)
        grad_bias = (unweighted.members(grad_logits[:, 0]) @ grad_logits.double()).to(dtype)
    return grad_x, grad_router, grad_bias
