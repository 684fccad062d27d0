"""The loss and all gradients, a chunk of rows at a time: logits of one chunk exist, and nothing waits for a backward.

T rows (tokens), V columns, D hidden, R rank of LoRA, S sequences. A chunk's logits give its log-probabilities, these
the policy's gradient, and that, while the exponentials are still there, the gradients of the head: three matrix
products. Where a token's gradient depends on its whole sequence, a chunk is made of whole sequences; one that is longer
than a chunk is first run through without gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from prism_kernels.metrics import POLICY_TOTALS, PolicyMetrics
from prism_kernels.ops.anchored_rows.formulas import RowSums, outcome
from prism_kernels.ops.linear_logprob import blocks
from prism_kernels.ops.linear_logprob.backward import Gradients, Needs, backward
from prism_kernels.ops.linear_logprob.forward import Head, forward
from prism_kernels.ops.policy_loss.eager import Correction, Segments, corrections, loss_terms
from prism_kernels.ops.policy_loss.options import Options

# a chunk's exponentials take about this much, so that the products are large and the memory is flat
CPU_BYTES = 64 * 2**20
CUDA_BYTES = 2600 * 2**20
# above this share of rows with a gradient, picking them costs more than it saves
DENSE = 0.875


def default_rows(hidden: Tensor, columns: int) -> int:
    """Returns the rows of a chunk, a multiple of 128."""
    size = (CUDA_BYTES if hidden.is_cuda else CPU_BYTES) // (columns * blocks.cached(hidden).itemsize)
    return max(128, size // 128 * 128)


class Policy(NamedTuple):
    """The columns of the policy loss, (T,) each, in the accumulator's dtype; `weight` is by what a token counts."""

    old_logp: Tensor | None
    advantage: Tensor
    ref_logp: Tensor | None
    rollout_logp: Tensor | None
    weight: Tensor
    # None where it follows from the log-probabilities themselves
    correction: Correction | None
    segments: Segments

    def rows(self, span: "Span") -> "Policy":
        """Returns the rows of a span."""
        r = slice(span.begin, span.end)

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[r]

        mask = cut(self.segments.mask)
        if span.first is None:
            # parts of sequences: only the number of valid rows is asked for
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
    """Rows from begin to end; whole sequences from first to last, or of any tokens if first is None."""

    begin: int
    end: int
    first: int | None = None
    last: int = 0


def spans(policy: Policy, total: int, chunk: int, options: Options, may_read: bool) -> list[Span]:
    """Returns the parts whose loss is formed at once, at least one: chunks of rows, or of whole sequences."""
    from_logp = policy.correction is None and options.correction_unit != "token"
    if options.ratio == "token" and not from_logp:
        return [Span(a, min(a + chunk, total)) for a in range(0, max(total, 1), chunk)]
    sequences = policy.segments.counts.numel()
    if not may_read:
        return [Span(0, total, 0, sequences)]
    bounds = policy.segments.cu_seqlens.tolist()
    found, first = [], 0
    for last in range(1, sequences + 1):
        if last == sequences or bounds[last + 1] - bounds[first] > chunk:
            found.append(Span(bounds[first], bounds[last], first, last))
            first = last
    return found or [Span(0, total, 0, sequences)]


class Result(NamedTuple):
    """The loss, the metrics' totals, logp (T,) and the gradients of the head's tensors."""

    loss: Tensor
    totals: Tensor
    logp: Tensor
    grads: Gradients


class _Rows(NamedTuple):
    """What a run over some rows leaves."""

    sums: Tensor
    cache: Tensor
    logp: Tensor
    entropy: Tensor | None


class Runner:
    """Runs chunks through the head; the memory of their exponentials is allocated once."""

    def __init__(
        self, head: Head, keep: Tensor, chunk: int, entropy: bool, needs: Needs, backend: str, may_read: bool
    ) -> None:
        self.head, self.keep, self.chunk, self.entropy = head, keep, chunk, entropy
        self.needs, self.backend, self.may_read = needs, backend, may_read
        hidden, weight = head.hidden, head.weight
        accumulator = blocks.accumulator(hidden)
        as_they_are = blocks.cached(hidden) == blocks.operand(hidden)
        self.chain = bool(head.softcap) and not entropy and as_they_are
        self.memory: Tensor | None = None
        rank = 0 if head.lora_weight is None else head.lora_weight.shape[1]

        def new(wanted: bool, *shape: int, dtype: torch.dtype = accumulator) -> Tensor:
            return torch.zeros(*(shape if wanted else (0,)), dtype=dtype, device=hidden.device)

        total, columns = hidden.shape[0], weight.shape[0]
        self.grads = Gradients(
            new(needs.hidden, total, hidden.shape[1], dtype=hidden.dtype),
            new(needs.weight, columns, hidden.shape[1]),
            new(needs.bias, columns),
            new(needs.lora_hidden, total, rank),
            new(needs.lora_weight, columns, rank),
        )

    def part(self, begin: int, end: int) -> Head:
        """Returns the head of some rows."""
        r, head = slice(begin, end), self.head
        return head._replace(
            hidden=head.hidden[r],
            target=head.target[r],
            inv_temperature=head.inv_temperature[r],
            lora_hidden=None if head.lora_hidden is None else head.lora_hidden[r],
        )

    def forward(self, begin: int, end: int, keep_exponentials: bool) -> _Rows:
        """Returns the row sums, the log-probabilities and, if wanted, the exponentials and the entropies."""
        head = self.part(begin, end)
        cache_rows = end - begin if keep_exponentials else 0
        if cache_rows and self.memory is None:
            rows = min(self.chunk, self.head.hidden.shape[0])
            self.memory = head.weight.new_empty(rows, head.weight.shape[0], dtype=blocks.cached(head.hidden))
        sums, cache = forward(head, cache_rows, self.chain, self.backend, None, self.memory if cache_rows else None)
        logp, entropy, _, _ = outcome(RowSums(*sums), head.inv_temperature, self.keep[begin:end])
        return _Rows(sums, cache, logp, entropy if self.entropy else None)

    def backward(self, begin: int, end: int, run: _Rows, grad: Tensor, grad_entropy: Tensor | None) -> None:
        """Adds the gradients of these rows."""
        has = grad != 0 if grad_entropy is None else (grad != 0) | (grad_entropy != 0)
        rows = None
        if self.may_read:
            rows = has.nonzero()[:, 0]
            if rows.numel() > DENSE * has.numel():
                rows = None
        head = self.part(begin, end)
        dtypes = (run.sums.dtype,) * 3
        found = backward(
            head,
            run.sums,
            run.cache,
            self.chain,
            self.keep[begin:end],
            grad,
            grad_entropy,
            rows,
            self.needs,
            dtypes,
            self.backend,
            onto=self.grads,
        )
        if self.needs.hidden:
            self.grads.hidden[begin:end] = found.hidden
        if self.needs.lora_hidden:
            self.grads.lora_hidden[begin:end] = found.lora_hidden


def run_chunks(
    head: Head,
    keep: Tensor,
    policy: Policy,
    options: Options,
    chunk: int,
    needs: Needs,
    backend: str,
    may_read: bool,
) -> Result:
    """Returns the loss over all rows and the gradients of the head, those over rows in the accumulator's dtype."""
    entropy = options.entropy_coef != 0
    runner = Runner(head, keep, chunk, entropy, needs, backend, may_read)
    total = head.hidden.shape[0]
    logp = torch.zeros(total, dtype=blocks.accumulator(head.hidden), device=head.hidden.device)
    loss = logp.new_zeros(())
    metrics: PolicyMetrics | None = None
    wanted = any(needs)

    for span in spans(policy, total, chunk, options, may_read):
        pieces = [(a, min(a + chunk, span.end)) for a in range(span.begin, max(span.end, span.begin + 1), chunk)]
        whole = len(pieces) == 1
        runs = []
        for a, b in pieces:
            runs.append(runner.forward(a, b, wanted and whole))
            logp[a:b] = runs[-1].logp
        surprise = torch.cat([r.entropy for r in runs if r.entropy is not None]) if entropy else None
        p = policy.rows(span)
        x = logp[span.begin : span.end]
        correction = p.correction
        if correction is None:
            behind = None
            if p.rollout_logp is not None:
                behind = p.segments.kept((x if p.old_logp is None else p.old_logp) - p.rollout_logp)
            correction = corrections(behind, p.segments, options, x)
        terms = loss_terms(x, p.old_logp, p.advantage, p.ref_logp, surprise, p.weight, correction, p.segments, options)
        loss = loss + terms.value
        here = PolicyMetrics(terms.totals)
        metrics = here if metrics is None else metrics + here
        if not wanted:
            continue
        for (a, b), first in zip(pieces, runs):
            r = slice(a - span.begin, b - span.begin)
            run = first if whole else runner.forward(a, b, True)
            runner.backward(a, b, run, terms.grad[r], terms.grad_entropy[r] if entropy else None)

    assert metrics is not None
    totals = metrics.totals.clone()
    # a sequence that was cut counts once
    totals[POLICY_TOTALS.index("sequences")] = (policy.segments.counts > 0).sum()
    return Result(loss, totals, logp, runner.grads)
