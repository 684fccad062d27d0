"""Log-probabilities and entropies of the same logits from one pass, for a trainer that asks for them one by one.

Whichever is asked for first leaves the rest of its pass to the other. It is for that tensor itself, unchanged since, on
the same thread, and once; it lives no longer than the first result does. Whoever asks otherwise gets a pass of its own.

Entropies that come first do not know the labels yet: their pass is anchored at the highest logit of each row. What a
row needs for another column follows from its sums, without cancellation, since no column is above that one.

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

# rows with this label have the log-probability 0, without a gradient, but an entropy
IGNORED = -100


# a graph could not look up what is left of a pass. this holds where a caller of these is compiled: torch.compile of the
# function itself would take the mark away
@torch.compiler.disable  # type: ignore[untyped-decorator]
def logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the log-probabilities of labels (...) int64 under logits (..., V)."""
    left = _LATEST.take(logits, _Rows)
    if left is not None:
        return left.logprobs(logits, labels)
    kept = labels != IGNORED
    out = token_logprob(logits, labels.where(kept, 0), entropy=True)
    logp = out.logp.where(kept, 0)
    _LATEST.leave(logits, logp, out.entropy)
    return logp


@torch.compiler.disable  # type: ignore[untyped-decorator]
def entropies(logits: Tensor) -> Tensor:
    """Returns the entropies of the rows of logits (..., V)."""
    left = _LATEST.take(logits, Tensor)
    if left is not None:
        return left if _wants_gradient(logits) else left.detach()
    check.dtype(NAME, "logits", logits, FLOATS)
    labelled = _Labelled()
    backend = resolve(NAME, logits.device)
    found, logp, top, sums = _RowsFunction.apply(logits.reshape(-1, logits.shape[-1]), labelled, backend)
    entropy = found.view(logits.shape[:-1])
    _LATEST.leave(logits, entropy, _Rows(logp, top, sums, labelled))
    return entropy


def _wants_gradient(logits: Tensor) -> bool:
    return torch.is_grad_enabled() and logits.requires_grad


class _Latest(local):
    """The logits that this thread last made a pass over, and what is left of it."""

    def __init__(self) -> None:
        self.logits: TensorWeakRef | None = None
        self.version = 0
        self.graph = False
        # under the first result: the graph of what is left holds the logits, so that nothing else may hold it
        self.left = WeakTensorKeyDictionary()

    def is_of(self, logits: Tensor) -> bool:
        if self.logits is None:
            return False
        return self.logits() is logits and self.version == logits._version

    def leave(self, logits: Tensor, first: Tensor, left: Any) -> None:
        # a tensor of inference mode cannot tell whether it was changed. and of each tensor only the first pass leaves
        # anything: a checkpoint that computes its function once more must not find what the first time did not
        if logits.is_inference() or self.is_of(logits):
            return
        self.logits, self.version, self.graph = TensorWeakRef(logits), logits._version, _wants_gradient(logits)
        self.left = WeakTensorKeyDictionary()
        self.left[first] = left

    def take(self, logits: Tensor, kind: type) -> Any:
        """Returns what is left if it is of that kind, once: its graph is gone after a backward pass."""
        if not self.is_of(logits) or (_wants_gradient(logits) and not self.graph):
            return None
        left = next(self.left.values(), None)
        if not isinstance(left, kind):
            return None
        self.left.clear()
        return left


_LATEST = _Latest()


class _Labelled:
    """The columns of the labels and the sums over all others, for the backward pass, once they are known."""

    columns: Tensor
    sums: Tensor


class _Rows(NamedTuple):
    """What a pass over logits knows of each row, (T,): logp is that of the highest column, top, and differentiable."""

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
        # labels that are no column are refused where that can be seen
        logit = logit.where((columns == flat) | ~kept, torch.nan)
        self.labelled.columns = columns
        self.labelled.sums = _without(columns, logit, self.top, self.sums)
        return _LabelsFunction.apply(self.logp, self.labelled.sums, kept).view(labels.shape)


def _without(columns: Tensor, logit: Tensor, top: Tensor, sums: Tensor) -> Tensor:
    """Returns the sums over all columns but these, of those over all but the highest, at which they stay anchored."""
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
    """Entropies, and the log-probabilities of the highest columns, whose gradient is taken for that of the labels'."""

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
    """The log-probabilities of the labels, whose gradient goes where the entropies' is."""

    @staticmethod
    def forward(ctx: Any, logp: Tensor, sums: Tensor, kept: Tensor) -> Tensor:
        """Returns them, 0 where a row is not kept."""
        ctx.save_for_backward(kept)
        return outcome(RowSums(*sums), torch.ones_like(logp), kept)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Returns the gradient, 0 where a row is not kept."""
        (kept,) = ctx.saved_tensors
        return grad.where(kept, 0), None, None
