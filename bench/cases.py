"""The measured shapes, their inputs, and the exact results in float64.

T rows (tokens), V columns (vocabulary), D width of the hidden states (0 for an op on logits).
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from prism_kernels.testing import relative_error

FORWARD = "forward"
TRAIN = "forward+backward"
HALF = "forward+backward, half of the rows without gradient"
PASSES = (FORWARD, TRAIN, HALF)

# the rows and columns of the gradients that are compared with float64
SAMPLE = 64
# one row in this many has a token with 1 - p in CONFIDENT
CONFIDENT_EVERY = 8
CONFIDENT = (1e-9, 1e-3)
# a result is green within these; several peers form bf16 logits, which are off by 2**-9 of their size
TOLERANCE = {
    "float32": {"logp": 1e-4, "entropy": 1e-3, "gradient": 1e-3},
    "bfloat16": {"logp": 0.25, "entropy": 0.25, "gradient": 5e-2},
}


@dataclass(frozen=True)
class Case:
    """One shape of one op."""

    name: str
    op: str
    rows: int
    columns: int
    width: int
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def logits_bytes(self) -> int:
        """E: the size of all logits in fp32."""
        return 4 * self.rows * self.columns

    def label(self) -> str:
        width = f", D={self.width}" if self.width else ""
        return f"T={self.rows}, V={self.columns}{width}, {self.dtype}"

    def is_first(self) -> bool:
        """Whether this is the op's first case, which its plot and its table show."""
        return self in [next(c for c in group if c.op == self.op) for group in (CPU_CASES, CUDA_CASES)]

    def flops(self, pass_: str) -> int:
        """Returns the operations of the necessary matrix products."""
        one = 2 * self.rows * self.columns * self.width
        return {FORWARD: one, TRAIN: 3 * one, HALF: 2 * one}[pass_]

    def bytes(self, pass_: str) -> int:
        """Returns the bytes of reading each input once and writing each output once."""
        size = self.torch_dtype.itemsize
        leaves = size * (self.width * (self.rows + self.columns) if self.width else self.rows * self.columns)
        # the target, then logp, entropy, lse and the sum of squares
        vectors = self.rows * (8 + 4 * 4)
        if pass_ == FORWARD:
            return leaves + vectors
        # the backward pass of an op on logits reads them once more
        return leaves * (2 if self.width else 3) + vectors + 4 * self.rows

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "label": self.label(),
            "flops": {p: self.flops(p) for p in PASSES},
            "bytes": {p: self.bytes(p) for p in PASSES},
            "logits_bytes": self.logits_bytes,
        }


CPU_CASES = (
    Case("main", "linear_logprob", 2048, 32768, 512, "float32"),
    Case("small", "linear_logprob", 256, 8192, 128, "float32"),
    Case("bf16", "linear_logprob", 512, 16384, 256, "bfloat16"),
    Case("main", "token_logprob", 1024, 32768, 0, "float32"),
    Case("small", "token_logprob", 128, 8192, 0, "float32"),
    Case("bf16", "token_logprob", 512, 32768, 0, "bfloat16"),
)
CUDA_CASES = (
    Case("4b", "linear_logprob", 16384, 151936, 2560, "bfloat16"),
    Case("8b", "linear_logprob", 16384, 151936, 4096, "bfloat16"),
    Case("bf16", "token_logprob", 4096, 151936, 0, "bfloat16"),
    Case("fp32", "token_logprob", 4096, 151936, 0, "float32"),
)


def cases(op: str, device: str) -> list[Case]:
    return [c for c in (CUDA_CASES if device == "cuda" else CPU_CASES) if c.op == op]


@dataclass
class Inputs:
    """A contender's inputs: the leaves are (hidden, weight) or (logits,), the gradients those of the outputs."""

    leaves: tuple[Tensor, ...]
    target: Tensor
    grad_logp: Tensor
    grad_entropy: Tensor

    def without_gradient_in_half(self) -> "Inputs":
        # whole sequences lose their gradient, as in groups of equal rewards
        half = torch.arange(self.target.numel(), device=self.target.device) // 256 % 2 == 0
        return Inputs(self.leaves, self.target, self.grad_logp * half, self.grad_entropy * half)


def make_inputs(case: Case, device: str, seed: int = 0) -> Inputs:
    """Returns random inputs whose logits have a standard deviation of 2, with a confident token in one row of eight."""
    make = torch.Generator(device).manual_seed(seed)
    total, columns, width, dtype = case.rows, case.columns, case.width, case.torch_dtype

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=make, device=device).mul_(scale)

    target = torch.randint(columns, (total,), generator=make, device=device)
    confident = torch.arange(0, total, CONFIDENT_EVERY, device=device)
    low, high = (-math.log(p) for p in reversed(CONFIDENT))
    # the distance of the token's logit above the log-sum-exp of the others: 1 - p = exp(-margin)
    lead = low + 0.5 + (high - low - 1) * torch.rand(confident.numel(), generator=make, device=device)
    if width:
        weight = normal(columns, width, scale=2 / math.sqrt(width)).to(dtype)
        hidden = normal(total, width)
        # along its own weight row the token's logit is `level`; the others spread with level / sqrt(width)
        level = lead + math.log(columns)
        level = level + level.square() / (2 * width)
        rows = weight[target[confident]].float()
        hidden[confident] = rows * (level / rows.square().sum(1))[:, None]
        leaves = (hidden.to(dtype), weight)
    else:
        logits = normal(total, columns, scale=2.0)
        # the log-sum-exp of normal logits with standard deviation 2 is log V + 2**2 / 2
        logits[confident, target[confident]] = lead + math.log(columns) + 2
        leaves = (logits.to(dtype),)
    for leaf in leaves:
        leaf.requires_grad_()
    return Inputs(leaves, target, normal(total), normal(total, scale=0.1))


@dataclass
class Truth:
    """The results in float64, and parts of the gradients: `rows` of the first leaf's, `columns` of the weight's."""

    logp: Tensor
    entropy: Tensor
    missing: Tensor
    rows: Tensor
    columns: Tensor
    # key: whether the entropy's gradient flows too
    grad_rows: dict[bool, Tensor]
    grad_columns: dict[bool, Tensor]


def truth(case: Case, inputs: Inputs, block: int = 256) -> Truth:
    """Returns the exact results, computed a block of rows at a time; 1 - p is summed, not subtracted."""
    device = inputs.target.device
    pick = torch.Generator().manual_seed(1)
    confident = torch.arange(0, case.rows, CONFIDENT_EVERY)
    ordinary = torch.randperm(case.rows, generator=pick)[:SAMPLE]
    rows = torch.cat((confident[torch.randperm(confident.numel(), generator=pick)[:SAMPLE]], ordinary))
    rows = rows.unique().to(device)
    columns = torch.cat((inputs.target[:SAMPLE], torch.arange(0, case.columns, -(-case.columns // SAMPLE)).to(device)))
    columns = columns.unique()
    all_columns = torch.arange(case.columns, device=device)
    leaves = [leaf.detach() for leaf in inputs.leaves]
    weight = leaves[1].double() if case.width else None
    out = Truth(*(torch.empty(case.rows, dtype=torch.float64, device=device) for _ in range(3)), rows, columns, {}, {})
    parts: dict[bool, list[Tensor]] = {False: [], True: []}
    for r0 in range(0, case.rows, block):
        r = slice(r0, min(r0 + block, case.rows))
        first = leaves[0][r].double()
        z = first if weight is None else first @ weight.t()
        y = inputs.target[r][:, None]
        d = z - z.gather(1, y)
        e = d.exp().scatter_(1, y, 0.0)
        rest = e.sum(1)
        out.logp[r] = -torch.log1p(rest)
        out.entropy[r] = torch.log1p(rest) - (e * d).sum(1) / (1 + rest)
        out.missing[r] = rest / (1 + rest)
        inside = rows[(rows >= r.start) & (rows < r.stop)]

        everything = torch.arange(r.start, r.stop, device=device)
        for with_entropy in (False, True):
            g = _logits_gradient(out, inputs, d[inside - r0], inside, all_columns, with_entropy)
            parts[with_entropy].append(g if weight is None else g @ weight)
            if weight is not None:
                g = _logits_gradient(out, inputs, d[:, columns], everything, columns, with_entropy)
                out.grad_columns[with_entropy] = out.grad_columns.get(with_entropy, 0) + g.t() @ first
    out.grad_rows = {key: torch.cat(value) for key, value in parts.items()}
    return out


def _logits_gradient(
    exact: Truth, inputs: Inputs, distance: Tensor, at: Tensor, columns: Tensor, with_entropy: bool
) -> Tensor:
    """Returns the gradient of the logits in the rows `at` and some columns, from their distance to the target's."""
    log_pi = distance + exact.logp[at][:, None]
    pi = log_pi.exp()
    at_target = inputs.target[at][:, None] == columns
    g = inputs.grad_logp[at].double()[:, None] * torch.where(at_target, exact.missing[at][:, None], -pi)
    if with_entropy:
        g -= inputs.grad_entropy[at].double()[:, None] * pi * (log_pi + exact.entropy[at][:, None])
    return g


def errors(
    case: Case, exact: Truth, inputs: Inputs, logp: Tensor, entropy: Tensor | None, backward: bool
) -> dict[str, float]:
    """Returns the errors of a result and, after a backward pass, of the leaves' gradients."""
    low, high = CONFIDENT
    sure = (exact.missing >= low) & (exact.missing <= high)
    off = (logp.detach().double() - exact.logp).abs()
    measured = {"logp": float(off.max()), "logp_confident": float((off / exact.logp.abs())[sure].max())}
    if entropy is not None:
        measured["entropy"] = float((entropy.detach().double() - exact.entropy).abs().max())
    if not backward:
        return measured
    first = inputs.leaves[0].grad
    assert first is not None, "the contender left no gradient"
    wanted = exact.grad_rows[entropy is not None]
    got = first.detach()[exact.rows].double()
    measured["gradient_rows"] = relative_error(got, wanted)
    live = wanted.norm(dim=1) > 0
    each = (got - wanted).norm(dim=1) / wanted.norm(dim=1)
    measured["gradient_confident"] = float(each[sure[exact.rows] & live].max())
    if case.width:
        weight = inputs.leaves[1].grad
        assert weight is not None, "the contender left no gradient of the weight"
        measured["gradient_weight"] = relative_error(weight[exact.columns], exact.grad_columns[entropy is not None])
    return measured


def is_green(case: Case, measured: dict[str, float]) -> bool:
    """Whether the value check passes; NaN never does. Errors of confident tokens are reported, but decide nothing."""
    limits = TOLERANCE[case.dtype]
    tests = {"logp": "logp", "entropy": "entropy", "gradient_rows": "gradient", "gradient_weight": "gradient"}
    return all(measured[name] <= limits[limit] for name, limit in tests.items() if name in measured)


def reference(case: Case, device: str, pass_: str) -> Callable[[], object]:
    """Returns what a pass is measured against, outputs allocated beforehand: its matrix products, Z = H @ W.T,
    dH = G @ W, dW = G.T @ H with G of Z's shape; from logits, one copy of them, which reads and writes (T, V)."""
    make = torch.Generator(device).manual_seed(2)
    dtype = case.torch_dtype
    if not case.width:
        source = torch.randn(case.rows, case.columns, generator=make, device=device).to(dtype)
        sink = torch.empty_like(source)
        return lambda: sink.copy_(source)
    hidden = torch.randn(case.rows, case.width, generator=make, device=device).to(dtype)
    weight = torch.randn(case.columns, case.width, generator=make, device=device).to(dtype)
    z = torch.empty(case.rows, case.columns, dtype=dtype, device=device)
    if pass_ == FORWARD:
        return lambda: torch.mm(hidden, weight.t(), out=z)
    used = slice(0, case.rows // 2 if pass_ == HALF else case.rows)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def products() -> None:
        torch.mm(hidden, weight.t(), out=z)
        torch.mm(z[used], weight, out=grad_hidden[used])
        torch.mm(z[used].t(), hidden[used], out=grad_weight)

    return products
