"""The loss and all its gradients, a chunk of rows at a time, so that the logits of one chunk exist only.

T rows (tokens), V columns, D hidden, R rank of LoRA, S sequences. A chunk's logits give its log-probabilities, and
these the gradient of the policy loss; the chunk's exponentials, still in memory, turn it into the gradients of the
head: three matrix products. Where a token's gradient depends on its whole sequence, a chunk holds whole sequences; a
sequence longer than a chunk takes a first pass without gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from prism_kernels.metrics import POLICY_TOTALS, PolicyMetrics
from prism_kernels.ops.anchored_rows import RowKernels
from prism_kernels.ops.linear_logprob.eager import Gradients, Needs, backward, chained, forward
from prism_kernels.ops.policy_loss.eager import Correction, Segments, corrections, loss_terms
from prism_kernels.ops.policy_loss.options import Options
from prism_kernels.ops.rows import Head, RowSums, accumulator, cached, has_gradient, outcome

# bytes of a chunk's exponentials: large products in flat memory
CPU_BYTES = 64 * 2**20
CUDA_BYTES = 2600 * 2**20
# above this share of rows with a gradient, picking them costs more than it saves
DENSE = 0.875


def default_rows(hidden: Tensor, columns: int) -> int:
    """Returns the rows of a chunk, a multiple of 128."""
    size = (CUDA_BYTES if hidden.is_cuda else CPU_BYTES) // (columns * cached(hidden).itemsize)
    return max(128, size // 128 * 128)


class Policy(NamedTuple):
    """The columns of the policy loss, (T,) each, in the accumulator's dtype; `weight` is each token's weight."""

    old_logp: Tensor | None
    advantage: Tensor
    ref_logp: Tensor | None
    rollout_logp: Tensor | None
    weight: Tensor
    # None where it depends on the new log-probabilities
    correction: Correction | None
    segments: Segments

    def rows(self, span: "Span") -> "Policy":
        """Returns the rows of a span."""
        r = slice(span.begin, span.end)

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[r]

        mask = cut(self.segments.mask)
        if span.first is None:
            # parts of sequences: of these segments only the number of valid rows is used
            ends = torch.tensor([0, span.end - span.begin], device=self.weight.device)
            segments = Segments.of(ends, mask, span.end - span.begin, self.weight.dtype)
        else:
            s = slice(span.first, span.last)
            bounds = self.segments.cu_seqlens[span.first : span.last + 1] - span.begin
            sequence = self.segments.sequence[r] - span.first
            segments = Segments(bounds, sequence, mask, self.segments.counts[s])
        correction = None if self.correction is None else Correction(*(c[r] for c in self.correction))
        return Policy(
            cut(self.old_logp),
            self.advantage[r],
            cut(self.ref_logp),
            cut(self.rollout_logp),
            self.weight[r],
            correction,
            segments,
        )


class Span(NamedTuple):
    """Rows from begin to end: the sequences from first to last, or any tokens if first is None."""

    begin: int
    end: int
    first: int | None = None
    last: int = 0


def spans(policy: Policy, total: int, chunk: int, options: Options, may_read: bool) -> list[Span]:
    """Returns the spans whose loss is computed at once, at least one: chunks of rows, or of whole sequences."""
    from_logp = policy.correction is None and options.correction_unit != "token"
    if options.ratio == "token" and not from_logp:
        return [Span(a, min(a + chunk, total)) for a in range(0, max(total, 1), chunk)]
    sequences = policy.segments.counts.numel()
    if not may_read:
        return [Span(0, total, 0, sequences)]
    bounds = policy.segments.cu_seqlens.tolist()
    result, first = [], 0
    for last in range(1, sequences + 1):
        if last == sequences or bounds[last + 1] - bounds[first] > chunk:
            result.append(Span(bounds[first], bounds[last], first, last))
            first = last
    return result or [Span(0, total, 0, sequences)]


class Result(NamedTuple):
    """The loss, the metrics' totals, logp (T,) and the gradients of the head's tensors."""

    loss: Tensor
    totals: Tensor
    logp: Tensor
    grads: Gradients


class _Rows(NamedTuple):
    """The results of a forward pass over some rows."""

    sums: Tensor
    cache: Tensor
    logp: Tensor
    entropy: Tensor | None


class Runner:
    """Runs chunks of rows through the head; the memory of their exponentials is allocated once."""

    def __init__(
        self, head: Head, kernels: RowKernels, chunk: int, entropy: bool, needs: Needs, may_read: bool
    ) -> None:
        self.head, self.kernels, self.chunk, self.entropy = head, kernels, chunk, entropy
        self.needs, self.may_read = needs, may_read
        hidden, weight = head.hidden, head.weight
        self.chain = chained(head, entropy, hidden.shape[0])
        self.memory: Tensor | None = None
        rank = 0 if head.lora_weight is None else head.lora_weight.shape[1]
        exact = accumulator(hidden.dtype)

        def new(wanted: bool, *shape: int, dtype: torch.dtype = exact) -> Tensor:
            return torch.zeros(*(shape if wanted else (0,)), dtype=dtype, device=hidden.device)

        total, columns = hidden.shape[0], weight.shape[0]
        self.grads = Gradients(
            new(needs.hidden, total, hidden.shape[1], dtype=hidden.dtype),
            new(needs.weight, columns, hidden.shape[1]),
            new(needs.bias, columns),
            new(needs.lora_hidden, total, rank),
            new(needs.lora_weight, columns, rank),
        )

    def forward(self, rows: slice, keep_exponentials: bool) -> _Rows:
        """Returns the row sums, the log-probabilities and, if wanted, the exponentials and the entropies."""
        head = self.head.rows(rows)
        cache_rows = head.hidden.shape[0] if keep_exponentials else 0
        if cache_rows and self.memory is None:
            height = min(self.chunk, self.head.hidden.shape[0])
            self.memory = head.weight.new_empty(height, head.weight.shape[0], dtype=cached(head.hidden))
        memory = self.memory if cache_rows else None
        sums, cache = forward(head, self.kernels, cache_rows, self.chain, None, memory)
        logp, entropy, _, _ = outcome(RowSums(*sums), head.inv_temperature, head.keep)
        return _Rows(sums, cache, logp, entropy if self.entropy else None)

    def backward(self, rows: slice, run: _Rows, grad_logp: Tensor, grad_entropy: Tensor | None) -> None:
        """Adds the gradients of these rows."""
        picked = None
        if self.may_read:
            has = has_gradient(grad_logp, grad_entropy)
            picked = has.nonzero()[:, 0]
            if picked.numel() > DENSE * has.numel():
                picked = None
        grads = backward(
            self.head.rows(rows),
            self.kernels,
            run.sums,
            run.cache,
            self.chain,
            grad_logp,
            grad_entropy,
            picked,
            self.needs,
            self.grads,
            add=True,
        )
        if self.needs.hidden:
            self.grads.hidden[rows] = grads.hidden
        if self.needs.lora_hidden:
            self.grads.lora_hidden[rows] = grads.lora_hidden


def run_chunks(
    head: Head, kernels: RowKernels, policy: Policy, options: Options, chunk: int, needs: Needs, may_read: bool
) -> Result:
    """Returns the loss over all rows and the gradients of the head, those over rows in the accumulator's dtype."""
    entropy = options.entropy_coef != 0
    runner = Runner(head, kernels, chunk, entropy, needs, may_read)
    total = head.hidden.shape[0]
    logp = torch.zeros(total, dtype=accumulator(head.hidden.dtype), device=head.hidden.device)
    loss = logp.new_zeros(())
    metrics: PolicyMetrics | None = None
    wanted = any(needs)

    for span in spans(policy, total, chunk, options, may_read):
        chunks = [
            slice(begin, min(begin + chunk, span.end))
            for begin in range(span.begin, max(span.end, span.begin + 1), chunk)
        ]
        whole = len(chunks) == 1
        runs = []
        for rows in chunks:
            runs.append(runner.forward(rows, wanted and whole))
            logp[rows] = runs[-1].logp
        row_entropy = torch.cat([r.entropy for r in runs if r.entropy is not None]) if entropy else None
        p = policy.rows(span)
        x = logp[span.begin : span.end]
        correction = p.correction
        if correction is None:
            log_ratio = None
            if p.rollout_logp is not None:
                log_ratio = p.segments.kept((x if p.old_logp is None else p.old_logp) - p.rollout_logp)
            correction = corrections(log_ratio, p.segments, options, x)
        terms = loss_terms(
            x, p.old_logp, p.advantage, p.ref_logp, row_entropy, p.weight, correction, p.segments, options
        )
        loss = loss + terms.value
        span_metrics = PolicyMetrics(terms.totals)
        metrics = span_metrics if metrics is None else metrics + span_metrics
        if not wanted:
            continue
        for rows, first in zip(chunks, runs):
            r = slice(rows.start - span.begin, rows.stop - span.begin)
            run = first if whole else runner.forward(rows, True)
            runner.backward(rows, run, terms.grad[r], terms.grad_entropy[r] if entropy else None)

    assert metrics is not None
    totals = metrics.totals.clone()
    # a sequence that was cut counts once
    totals[POLICY_TOTALS.index("sequences")] = (policy.segments.counts > 0).sum()
    return Result(loss, totals, logp, runner.grads)
