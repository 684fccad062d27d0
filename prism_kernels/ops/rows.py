"""What the ops on rows share: dtypes, layout, temperatures, the LM head, and a row's sums and their formulas.

T rows, V columns, D hidden, R rank of LoRA. Every formula works on vectors of T rows: c is a row's anchor,
d_v = (z_v - c) / temperature. Over v != target, `rest` = sum e^d, `moment` = sum e^d d, `square` = sum e^2d. d_y is
the target's d, exactly 0 where c is the target's logit.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from prism_kernels import check

# the dtypes of every op's inputs
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype that inputs of a dtype are computed in: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def operand(hidden: Tensor) -> torch.dtype:
    """Returns the dtype in which matrix products run: the input's on CUDA; elsewhere at least fp32, which is faster."""
    return hidden.dtype if hidden.device.type == "cuda" else accumulator(hidden.dtype)


def cached(hidden: Tensor) -> torch.dtype:
    """Returns the dtype in which exponentials are kept: fp16 would overflow, so bf16 stands in for it."""
    return torch.bfloat16 if hidden.dtype == torch.float16 else hidden.dtype


def contiguous(x: Tensor | None) -> Tensor | None:
    """Returns x with its elements side by side, as the native kernels take them."""
    return x if x is None or x.is_contiguous() else x.contiguous()


class _MeanOverRanks(torch.autograd.Function):
    """A DTensor as it is; its gradient, a sum over the ranks of its mesh, is divided by their number."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """Returns the tensor."""
        ctx.ranks = tensor.device_mesh.size()  # type: ignore[attr-defined]
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Returns the mean."""
        return grad / ctx.ranks


def whole(tensor: Tensor) -> Tensor:
    """Returns a DTensor gathered, any other tensor as it is.

    The gradient of a DTensor is the mean over the ranks of its mesh: FSDP2's default, and right too where the ranks
    have the same data.
    """
    if not hasattr(tensor, "full_tensor"):
        return tensor
    from torch.distributed.tensor import Partial

    # each rank has the gradient of its own loss alone
    mine = [Partial() for _ in tensor.placements]  # type: ignore[attr-defined]
    return _MeanOverRanks.apply(tensor).full_tensor(grad_placements=mine)


def may_synchronise(tensor: Tensor) -> bool:
    """Returns whether values may be read from a tensor's device: not while compiling or while a graph is captured."""
    if torch.compiler.is_compiling():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def row_temperature(op: str, temperature: float | Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the temperature of each row, (T,), after every check that needs no value from a device."""
    if isinstance(temperature, Tensor):
        check.tensor(op, "temperature", temperature)
        check.real(op, "temperature", temperature)
        if temperature.dim() == 0:
            temperature = temperature.expand(target.shape)
        check.shape(op, "temperature", temperature, tuple(target.shape))
        check.device(op, "temperature", temperature, target, "target")
        return temperature.detach().to(dtype).reshape(-1)
    number = check.positive(op, "temperature", temperature, check.LARGEST_TEMPERATURE)
    return torch.full((target.numel(),), number, dtype=dtype, device=target.device)


def inverse(temperature: Tensor) -> Tensor:
    """Returns 1 / temperature, NaN where a temperature is not positive."""
    return torch.where(temperature > 0, 1 / temperature, torch.nan)


def has_gradient(grad_logp: Tensor, grad_entropy: Tensor | None) -> Tensor:
    """Returns which rows have an incoming gradient that is not 0."""
    has = grad_logp != 0
    return has if grad_entropy is None else has | (grad_entropy != 0)


class RowSums(NamedTuple):
    """The sums that the forward pass keeps of each row for the backward pass: the rows of one (5, T) tensor."""

    anchor: Tensor
    rest: Tensor
    moment: Tensor
    square: Tensor
    target_logit: Tensor


class _Softmax(NamedTuple):
    d_target: Tensor
    e_target: Tensor
    total: Tensor
    log_total: Tensor
    # sum of e^d d over all columns, over the total
    mean_d: Tensor


def _softmax(sums: RowSums, inv_temperature: Tensor) -> _Softmax:
    d_target = (sums.target_logit - sums.anchor) * inv_temperature
    e_target = d_target.exp()
    total = sums.rest + e_target
    # exact for confident tokens: expm1(0) = 0 where the anchor is the target
    log_total = torch.log1p(sums.rest + torch.expm1(d_target))
    # a target of probability 0 has d = -inf, and 0 * -inf must count as 0
    moment = sums.moment + torch.where(e_target == 0, 0.0, e_target * d_target)
    return _Softmax(d_target, e_target, total, log_total, moment / total)


def outcome(sums: RowSums, inv_temperature: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns logp, entropy, log-sum-exp and the sum of squared probabilities; 0 where a row is not kept."""
    s = _softmax(sums, inv_temperature)
    logp = s.d_target - s.log_total
    entropy = s.log_total - s.mean_d
    lse = sums.anchor * inv_temperature + s.log_total
    square = (sums.square + s.e_target.square()) / s.total.square()
    zero = torch.zeros((), dtype=logp.dtype, device=logp.device)
    return (
        torch.where(keep, logp, zero),
        torch.where(keep, entropy, zero),
        torch.where(keep, lse, zero),
        torch.where(keep, square, zero),
    )


def coefficients(
    sums: RowSums, inv_temperature: Tensor, keep: Tensor, softcap: float, grad_logp: Tensor, grad_entropy: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns alpha, beta and at_target (3, T) of anchored_rows' backward, and which rows are poisoned.

    The coefficients are 0 in rows that are not kept, have no gradient, or whose sums are NaN or inf: those touch no
    other row. A kept row is poisoned by a NaN or a +inf among its logits, or by nothing but -inf.
    """
    s = _softmax(sums, inv_temperature)
    scale = inv_temperature / s.total
    alpha = -grad_logp * scale
    beta = torch.zeros_like(alpha)
    at_target = grad_logp * sums.rest * scale
    if grad_entropy is not None:
        # entropy - log_total
        excess = -s.mean_d
        beta = -grad_entropy * scale
        alpha = alpha + beta * excess
        e_d = torch.where(s.e_target == 0, 0.0, s.e_target * s.d_target)
        at_target = at_target + beta * (e_d + s.e_target * excess)
    if softcap:
        at_target = at_target * (1 - (sums.target_logit / softcap).square())
    finite = s.total.isfinite()
    return torch.where(keep & finite, torch.stack((alpha, beta, at_target)), 0.0), keep & ~finite


class Head(NamedTuple):
    """The LM head and its rows, as the blocks of logits are computed from them.

    bias, LoRA's tensors and inv_temperature are in the accumulator's dtype. A target counts in this rank's slice of
    the columns: -1 stands for one outside the slice, V for one that does not exist.
    """

    # [T, D], [V, D], [V]
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    # [T, R], [V, R]
    lora_hidden: Tensor | None
    lora_weight: Tensor | None
    # [T] each
    target: Tensor
    inv_temperature: Tensor
    keep: Tensor
    softcap: float

    def rows(self, which: slice | Tensor) -> "Head":
        """Returns the head of some rows."""

        def pick(x: Tensor) -> Tensor:
            return x[which] if isinstance(which, slice) else x.index_select(0, which)

        if isinstance(which, slice) and which.stop - which.start == self.hidden.shape[0]:
            return self
        return self._replace(
            hidden=pick(self.hidden),
            lora_hidden=None if self.lora_hidden is None else pick(self.lora_hidden),
            target=pick(self.target),
            inv_temperature=pick(self.inv_temperature),
            keep=pick(self.keep),
        )


class HeadArguments(NamedTuple):
    """The first arguments of each op on a head, in the order of its schema."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_hidden: Tensor | None
    lora_weight: Tensor | None
    target: Tensor
    temperature: Tensor
    softcap: float

    def head(self, keep: Tensor, first: int = 0, total: int | None = None) -> Head:
        """Returns the head; the weight's columns are those from `first` on of `total` (None: they are all)."""
        dtype, columns = accumulator(self.hidden.dtype), self.weight.shape[0]

        def cast(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(dtype)

        exists = (self.target >= 0) & (self.target < (columns if total is None else total))
        local, inside = self.target, exists
        if total is not None:
            local = self.target - first
            inside = exists & (local >= 0) & (local < columns)
        return Head(
            self.hidden,
            self.weight,
            cast(self.bias),
            cast(self.lora_hidden),
            cast(self.lora_weight),
            torch.where(keep & ~exists, columns, torch.where(inside, local, -1)),
            inverse(self.temperature),
            keep,
            self.softcap,
        )


# the schema of `HeadArguments`
HEAD = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_hidden, Tensor? lora_weight, Tensor target, "
    "Tensor temperature, float softcap"
)
