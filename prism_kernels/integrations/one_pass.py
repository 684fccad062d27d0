"""Log-probabilities and entropies of the same logits from one pass, for a trainer that calls for them separately.

The first of the two calls keeps the rest of its pass for the other call, which must get the same tensor, unchanged, on
the same thread. The rest is used once, and is dropped with the first result. Any other call makes a pass of its own.

Entropies that come first do not know the labels: their pass is anchored at the highest logit of each row. The sums
for another column follow from a row's sums without cancellation, since no logit is above the anchor.

T rows, V columns.
"""

from threading import local
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from prism_kernels import check
from prism_kernels.backend import resolve
from prism_kernels.ops.rows import FLOATS, RowSums, accumulator, outcome
from prism_kernels.ops.token_logprob import token_logprob
from prism_kernels.ops.token_logprob.op import NAME, token_logprob_bwd, token_logprob_fwd

# a row with this label has the log-probability 0 without a gradient, but an entropy
IGNORED = -100


# a compiled graph cannot look up the rest of a pass. the mark works for compiled callers; torch.compile of the function
# itself would remove it
@torch.compiler.disable  # type: ignore[untyped-decorator]
def logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the log-probabilities of labels (...) int64 under logits (..., V)."""
    rows = _LATEST.take(logits, _Rows)
    if rows is not None:
        return rows.logprobs(logits, labels)
    kept = labels != IGNORED
    out = token_logprob(logits, labels.where(kept, 0), entropy=True)
    logp = out.logp.where(kept, 0)
    _LATEST.keep(logits, logp, out.entropy)
    return logp


@torch.compiler.disable  # type: ignore[untyped-decorator]
def entropies(logits: Tensor) -> Tensor:
    """Returns the entropies of the rows of logits (..., V)."""
    entropy = _LATEST.take(logits, Tensor)
    if entropy is not None:
        return entropy if _wants_gradient(logits) else entropy.detach()
    check.dtype(NAME, "logits", logits, FLOATS)
    labelled = _Labelled()
    backend = resolve(NAME, logits.device)
    flat, logp, top, sums = _RowsFunction.apply(logits.reshape(-1, logits.shape[-1]), labelled, backend)
    entropy = flat.view(logits.shape[:-1])
    _LATEST.keep(logits, entropy, _Rows(logp, top, sums, labelled))
    return entropy


def _wants_gradient(logits: Tensor) -> bool:
    return torch.is_grad_enabled() and logits.requires_grad


class _Latest(local):
    """The logits of this thread's last pass, and the rest of the pass."""

    def __init__(self) -> None:
        self.logits: TensorWeakRef | None = None
        self.version = 0
        self.graph = False
        # keyed by the first result: the graph of the rest holds the logits, so that nothing else may keep it alive
        self.rest = WeakTensorKeyDictionary()

    def is_of(self, logits: Tensor) -> bool:
        if self.logits is None:
            return False
        return self.logits() is logits and self.version == logits._version

    def keep(self, logits: Tensor, first: Tensor, rest: Any) -> None:
        # a tensor of inference mode has no version. and only the first pass over a tensor keeps its rest: a checkpoint
        # that computes its function again must not find a rest that the first time did not find
        if logits.is_inference() or self.is_of(logits):
            return
        self.logits, self.version, self.graph = TensorWeakRef(logits), logits._version, _wants_gradient(logits)
        self.rest = WeakTensorKeyDictionary()
        self.rest[first] = rest

    def take(self, logits: Tensor, kind: type) -> Any:
        """Returns the rest if it is of that kind; only once, since a backward pass frees its graph."""
        if not self.is_of(logits) or (_wants_gradient(logits) and not self.graph):
            return None
        rest = next(self.rest.values(), None)
        if not isinstance(rest, kind):
            return None
        self.rest.clear()
        return rest


_LATEST = _Latest()


class _Labelled:
    """The columns of the labels and the sums over all others, set before the backward pass."""

    columns: Tensor
    sums: Tensor


class _Rows(NamedTuple):
    """A pass over logits, each (T,): logp is the log-probability of the highest column, top, and differentiable."""

    logp: Tensor
    top: Tensor
    sums: Tensor
    labelled: _Labelled

    def logprobs(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the log-probabilities of the labels."""
        check.shape(NAME, "labels", labels, tuple(logits.shape[:-1]))
        check.device(NAME, "labels", labels, logits, "logits")
        count = logits.shape[-1]
        flat = labels.reshape(-1)
        check.targets(NAME, flat, count, IGNORED)
        kept = flat != IGNORED
        columns = flat.where(kept, self.top).clamp(0, count - 1)
        logit = logits.detach().reshape(-1, count).gather(1, columns[:, None])[:, 0].to(self.sums.dtype)
        # a label out of range gives NaN where its value cannot be checked
        logit = logit.where((columns == flat) | ~kept, torch.nan)
        self.labelled.columns = columns
        self.labelled.sums = _without(columns, logit, self.top, self.sums)
        return _LabelsFunction.apply(self.logp, self.labelled.sums, kept).view(labels.shape)


def _without(columns: Tensor, logit: Tensor, top: Tensor, sums: Tensor) -> Tensor:
    """Returns the sums over all columns but these, from the sums over all but the highest; the anchor stays."""
    rows = RowSums(*sums)
    d = logit - rows.anchor
    e = d.exp()
    # 1, or NaN in a row with an infinite logit
    highest = (rows.target_logit - rows.anchor).exp()
    rest = rows.rest + (highest - e)
    moment = rows.moment - torch.where(e == 0, 0.0, e * d)
    square = rows.square + (highest - e.square())
    others = torch.stack((rows.anchor, rest, moment, square)).where(columns != top, sums[:4])
    return torch.cat((others, logit[None]))


class _RowsFunction(torch.autograd.Function):
    """Entropies, and the highest columns' log-probabilities, whose gradient serves as that of the labels'."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labelled: _Labelled, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns entropy, logp, the highest columns and their sums."""
        if logits.stride(1) != 1:
            logits = logits.contiguous()
        top = logits.argmax(1)
        logp, entropy, _, _, sums = token_logprob_fwd(logits, top, _unit(logits), IGNORED, backend)
        ctx.save_for_backward(logits, top, sums)
        ctx.options = (labelled, backend)
        ctx.mark_non_differentiable(top, sums)
        ctx.set_materialize_grads(False)
        return entropy, logp, top, sums

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_entropy: Tensor | None, grad_logp: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        """Returns the gradient of the logits."""
        logits, columns, sums = ctx.saved_tensors
        labelled, backend = ctx.options
        if grad_entropy is None and grad_logp is None:
            return None, None, None
        if grad_logp is None:
            grad_logp = torch.zeros_like(sums[0])
        else:
            columns, sums = labelled.columns, labelled.sums
        gradient = token_logprob_bwd(
            logits,
            columns,
            _unit(logits),
            sums,
            grad_logp.contiguous(),
            None if grad_entropy is None else grad_entropy.contiguous(),
            IGNORED,
            backend,
        )
        return gradient, None, None


def _unit(logits: Tensor) -> Tensor:
    return torch.ones(logits.shape[0], dtype=accumulator(logits.dtype), device=logits.device)


class _LabelsFunction(torch.autograd.Function):
    """The labels' log-probabilities, whose gradient joins the entropies' in `_RowsFunction`."""

    @staticmethod
    def forward(ctx: Any, logp: Tensor, sums: Tensor, kept: Tensor) -> Tensor:
        """Returns the log-probabilities, 0 where a row is not kept."""
        ctx.save_for_backward(kept)
        return outcome(RowSums(*sums), torch.ones_like(logp), kept)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Returns the gradient, 0 where a row is not kept."""
        (kept,) = ctx.saved_tensors
        return grad.where(kept, 0), None, None
