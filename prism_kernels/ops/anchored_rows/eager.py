"""The row kernels in plain torch, a block of columns at a time: flat memory, no compiler needed.

T rows, V columns. The docstrings here define the kernels; csrc/cpu, csrc/cuda and kernels.py implement the same.
"""

import torch
from torch import Tensor

# columns of a block, which with 512 rows of fp32 fits the caches of a core better than whole rows
BLOCK = 4096
# a row whose largest logit lies further above the anchor than this is anchored at its maximum instead:
# exp(28) summed over 2**18 columns stays below 2**60, so that the squares (2**120) still fit in fp32
FAR = 28.0
# exp(d) is 0 below this in every dtype; a finite d keeps 0 * d at 0, where -inf would make it NaN
LOWEST = -1e4


def _logits(z: Tensor, bias: Tensor | None, softcap: float, dtype: torch.dtype) -> Tensor:
    x = z.to(dtype, copy=True)
    if bias is not None:
        x += bias
    if softcap:
        x.div_(softcap).tanh_().mul_(softcap)
    return x


def forward(
    z: Tensor,
    target: Tensor,
    anchor: Tensor,
    inv_temperature: Tensor,
    bias: Tensor | None,
    softcap: float,
    chain: bool,
    exp: Tensor | None,
    stats: Tensor,
) -> None:
    """Writes the sums of a log-softmax anchored at the target and, if asked, its exponentials.

    For each row: x = z + bias, then x = softcap * tanh(x / softcap) if softcap is not 0, and
    d_v = (x_v - c) * inv_temperature, where c is the anchor, or the row's largest x if that lies more than 28 above
    the anchor (in units of d). Then stats (4, T), in the dtype of anchor, is

        stats[0] = c
        stats[1] = sum over v != target of exp(d_v)
        stats[2] = sum over v != target of exp(d_v) * d_v, where 0 * -inf counts as 0
        stats[3] = sum over v != target of exp(d_v) ** 2

    A target outside [0, V) is not in this slice: the sums then run over all columns. `exp` (T, V), of any dtype,
    receives exp(d_v), times 1 - (x_v / softcap) ** 2 if `chain`; 0 at the target; and 0 throughout in a row whose
    stats[1] is NaN or inf, so that a matrix product with it stays clean. `exp` may be `z`.
    """
    columns = z.shape[1]
    dtype = anchor.dtype
    blocks = [(v, min(v + BLOCK, columns)) for v in range(0, columns, BLOCK)]

    def logits(v0: int, v1: int) -> Tensor:
        return _logits(z[:, v0:v1], None if bias is None else bias[v0:v1], softcap, dtype)

    top = torch.full_like(anchor, -torch.inf)
    for v0, v1 in blocks:
        plain = bias is None and not softcap
        top = torch.maximum(top, (z[:, v0:v1] if plain else logits(v0, v1)).amax(1).to(dtype))
    centre = torch.where((top - anchor) * inv_temperature > FAR, top, anchor)
    stats.zero_()
    stats[0] = centre
    for v0, v1 in blocks:
        x = logits(v0, v1)
        slope = 1 - (x / softcap).square() if chain and softcap and exp is not None else None
        d = x.sub_(centre[:, None]).mul_(inv_temperature[:, None])
        e = d.exp()
        rows = ((target >= v0) & (target < v1)).nonzero()[:, 0]
        e[rows, target[rows] - v0] = 0
        d.clamp_(min=LOWEST)
        stats[1] += e.sum(1)
        stats[2] += d.mul_(e).sum(1)
        stats[3] += torch.linalg.vector_norm(e, dim=1).square_()
        if exp is not None:
            exp[:, v0:v1] = e if slope is None else e.mul_(slope)
    if exp is not None:
        exp[~stats[1].isfinite()] = 0


def backward(
    source: Tensor,
    source_is_exp: bool,
    target: Tensor,
    anchor: Tensor,
    inv_temperature: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    softcap: float,
    out: Tensor,
) -> None:
    """Writes the gradient with respect to z, given each row's three coefficients (alpha, beta, at_target).

    With e_v and d_v as in `forward` (anchor is its stats[0]), read from `source`, which holds z (source_is_exp=False)
    or exp(d_v) without the chain factor (True; then d_v = log e_v, and bias is not used):

        out[t, v] = e_v * (alpha + beta * d_v) * slope_v,   slope_v = 1 - (x_v / softcap) ** 2, or 1 without a softcap
        out[t, target] = at_target                          as given, without slope

    e_v = 0 gives 0. A row whose three coefficients are all 0 is 0 throughout, whatever the source holds (NaN too).
    `out` may be `source`.
    """
    alpha, beta, at_target = (c[:, None] for c in coefficients)
    dtype = anchor.dtype
    dead = (coefficients == 0).all(0)
    for v0 in range(0, source.shape[1], BLOCK):
        v1 = min(v0 + BLOCK, source.shape[1])
        if source_is_exp:
            e = source[:, v0:v1].to(dtype)
            d = e.log().clamp_(min=LOWEST)
            x = d / inv_temperature[:, None] + anchor[:, None] if softcap else None
        else:
            x = _logits(source[:, v0:v1], None if bias is None else bias[v0:v1], softcap, dtype)
            d = (x - anchor[:, None]).mul_(inv_temperature[:, None])
            e = d.exp()
            d.clamp_(min=LOWEST)
        f = d.mul_(beta).add_(alpha).mul_(e)
        if softcap and x is not None:
            f *= torch.where(e == 0, 0, 1 - (x / softcap).square_())
        f.masked_fill_(dead[:, None], 0)
        rows = ((target >= v0) & (target < v1)).nonzero()[:, 0]
        f[rows, target[rows] - v0] = at_target[rows, 0]
        out[:, v0:v1] = f
