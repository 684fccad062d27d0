"""The router in plain torch, with closed-form gradients: no sort of the assignments, no host synchronisation.

T tokens, D width, E experts, K experts of a token, C kinds of tokens. p is the probability of an expert.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def accumulator(x: Tensor) -> torch.dtype:
    """Returns the dtype that is computed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Choice(NamedTuple):
    """Each token's experts (T, K), and the probabilities (T, E) and logsumexp (T,) that they were chosen by."""

    experts: Tensor
    probability: Tensor
    lse: Tensor


class Tokens(NamedTuple):
    """What kind each token is of (None: one kind), how much it counts (None: 1), and how many kinds there are."""

    kind: Tensor | None
    weight: Tensor | None
    kinds: int

    def known(self) -> Tensor | None:
        """Returns the kinds (T,) as indices: held in range, since on a GPU the values are not checked."""
        return None if self.kind is None else self.kind.to(torch.int64).clamp(0, self.kinds - 1)

    def members(self, like: Tensor) -> Tensor:
        """Returns each token's weight in the row of its kind, 0 in the others: (C, T), fp64."""
        weight = torch.ones_like(like, dtype=torch.float64) if self.weight is None else self.weight.double()
        if self.kind is None:
            return weight[None]
        kinds = torch.arange(self.kinds, device=like.device)
        return torch.where(self.kind == kinds[:, None], weight, 0)

    def counted(self, x: Tensor) -> Tensor:
        """Returns x (T,) or (T, E), and 0 at tokens that do not count: those may be NaN."""
        if self.weight is None:
            return x
        keep = self.weight != 0
        return torch.where(keep[:, None] if x.dim() == 2 else keep, x, 0)


def logits(x: Tensor, router_weight: Tensor, tokens: Tokens, kind_bias: Tensor | None) -> Tensor:
    """Returns the logits (T, E), NaN at a token of an unknown kind."""
    dtype = accumulator(x)
    if x.is_cuda and x.dtype == router_weight.dtype and x.dtype in (torch.bfloat16, torch.float16):
        # the products of halves are exact in fp32: no copy of x is needed
        z = torch.mm(x, router_weight.t(), dtype)
    else:
        z = torch.mm(x.to(dtype), router_weight.to(dtype).t())
    held = tokens.known()
    if kind_bias is not None:
        bias = kind_bias.to(dtype)
        z += bias if held is None else bias.index_select(0, held)
    if held is not None and tokens.kind is not None:
        z = torch.where(torch.eq(held, tokens.kind)[:, None], z, torch.nan)
    return z


def choose(z: Tensor, top_k: int) -> Choice:
    """Returns the choice that logits (T, E) make; of equal probabilities the lower index comes first."""
    probability = torch.softmax(z, 1)
    # not topk, whose choice among equals is its own
    index = torch.sort(probability, dim=1, descending=True, stable=True).indices[:, :top_k].contiguous()
    return Choice(index, probability, torch.logsumexp(z, 1))


def permute(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Returns the offsets (E,) and the permutation (T * K,) of the assignments (T, K): a counting sort, stable."""
    flat = index.reshape(1, -1).to(torch.int64)
    # [E, T * K] how many assignments to the expert there are up to this one
    upto = (flat == torch.arange(experts, device=flat.device)[:, None]).cumsum(1, dtype=torch.int32)
    total = upto[:, -1] if flat.shape[1] else upto.sum(1, dtype=torch.int32)
    offsets = total.cumsum(0, dtype=torch.int32)
    place = (offsets - total).index_select(0, flat[0]) + upto.gather(0, flat)[0] - 1
    number = torch.arange(flat.shape[1], device=flat.device, dtype=torch.int32)
    return offsets, torch.empty_like(number).scatter_(0, place.to(torch.int64), number)


def weights(choice: Choice, renormalize: bool) -> Tensor:
    """Returns by how much each token's experts count, (T, K)."""
    weight = choice.probability.gather(1, choice.experts)
    return weight / weight.sum(1, keepdim=True) if renormalize else weight


def count(index: Tensor, tokens: Tokens, experts: int) -> Tensor:
    """Returns the weight of the tokens of each kind that chose each expert, (C, E), fp64."""
    chosen = torch.zeros(index.shape[0], experts, dtype=torch.float64, device=index.device)
    return tokens.members(index[:, 0]) @ chosen.scatter_(1, index, 1.0)


def _totals(counts: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Returns 1 / the weight of each kind (C, 1), and 1 / that of all tokens; 0 where there is none."""
    each = counts.sum(1, keepdim=True) / top_k
    total = each.sum()
    return torch.where(each > 0, 1 / each, 0), torch.where(total > 0, 1 / total, 0)


def losses(choice: Choice, tokens: Tokens, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the load-balance loss and the z loss; counts (C, E) as from `count`."""
    each, total = _totals(counts, choice.experts.shape[1])
    members = tokens.members(choice.lse)
    mass = members @ tokens.counted(choice.probability).double()
    aux = counts.shape[1] * total * (counts * mass * each).sum()
    z = total * (members.sum(0) * tokens.counted(choice.lse).double().square()).sum()
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
    each, total = (t.to(p.dtype) for t in _totals(counts, index.shape[1]))
    share = total if tokens.weight is None else total * tokens.weight.to(p.dtype)[:, None]
    more = torch.zeros_like(p)
    if grad_aux is not None:
        # the counts are constants, so the loss is linear in the probabilities
        slope = grad_aux * counts.shape[1] * counts.to(p.dtype) * each
        kind = tokens.known()
        slope = slope if kind is None else slope.index_select(0, kind)
        more += p * (slope - (p * slope).sum(1, keepdim=True))
    if grad_z is not None:
        more += p * (2 * grad_z * lse[:, None])
    return grad + tokens.counted(share * more)


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
        every = Tokens(tokens.kind, None, tokens.kinds)
        grad_bias = (every.members(grad_logits[:, 0]) @ grad_logits.double()).to(dtype)
    return grad_x, grad_router, grad_bias
