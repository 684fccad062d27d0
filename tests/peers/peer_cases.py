"""Shared by the comparisons with the peers: batches, this package's results on them, and the stored oracles.

We pack T tokens of S sequences; the peers pad them to (S, L). N samples in groups; V vocabulary, D hidden size.
"""

import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prism_kernels import group_advantage, linear_logprob, policy_loss, token_logprob, use_backend
from prism_kernels.backend import backend_status

ORACLES = Path(__file__).parent / "oracles"
LENGTHS = (7, 4, 11, 1, 6)
COLUMNS = ("logp", "old_logp", "ref_logp", "rollout_logp", "entropy")
# float64 throughout; verl adds 1e-8 to its counts
TOLERANCE = 1e-7
# peers take means of flags in float32
METRIC_TOLERANCE = 1e-6


def backends(op: str) -> list[str]:
    """Returns the backends on which an op runs on this machine's CPU."""
    return [s.backend for s in backend_status() if s.op == op and s.reason is None and s.backend in ("cpu", "torch")]


def grid(*shape: int, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    """Returns normal numbers on a grid of 1/1024: exact in float32 too, and short in JSON."""
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale * 1024).round() / 1024


class Batch(NamedTuple):
    """Columns (T,), the bounds of their sequences, an advantage per sequence (S,), and the valid tokens (T,)."""

    columns: dict[str, Tensor]
    advantage: Tensor
    cu_seqlens: Tensor
    mask: Tensor

    def pad(self, x: Tensor) -> Tensor:
        """Returns x (T,) as a matrix (S, L), with zeros after each sequence."""
        rows = [x[a:b] for a, b in itertools.pairwise(self.cu_seqlens.tolist())]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def pack(self, matrix: Tensor) -> Tensor:
        """Returns a matrix (S, L) as a column (T,)."""
        lengths = self.cu_seqlens.diff().tolist()
        return torch.cat([row[:length] for row, length in zip(matrix, lengths)])

    def spoilt(self, name: str) -> Tensor:
        """Returns a column with NaN and infinities at the invalid tokens."""
        bad = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=torch.float64).repeat(self.mask.numel())
        return torch.where(self.mask, self.columns[name], bad[: self.mask.numel()])


def batches() -> dict[str, Batch]:
    """Returns three batches: no masked token, some in each sequence, and one sequence fully masked."""
    made = {}
    for seed, name in enumerate(("plain", "masked", "silent")):
        generator = torch.Generator().manual_seed(seed)
        tokens = sum(LENGTHS)
        logp = grid(tokens, generator=generator) - 2
        columns = {"logp": logp}
        for other in COLUMNS[1:4]:
            columns[other] = logp + grid(tokens, generator=generator, scale=0.5)
        columns["entropy"] = grid(tokens, generator=generator).abs()
        cu_seqlens = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
        mask = torch.ones(tokens, dtype=torch.bool)
        if name != "plain":
            mask = torch.rand(tokens, generator=generator) < 0.7
            # the first token of each sequence is valid, so that masked tokens also lie between valid ones
            mask[cu_seqlens[:-1].long()] = True
        if name == "silent":
            mask[cu_seqlens[1] : cu_seqlens[2]] = False
        made[name] = Batch(columns, grid(len(LENGTHS), generator=generator), cu_seqlens, mask)
    return made


class LossCase(NamedTuple):
    """A call of policy_loss: its batch, options and optional columns."""

    batch: str
    options: dict[str, Any]
    columns: tuple[str, ...] = ()
    # pass an advantage per token instead of one per sequence
    per_token: bool = False
    on_policy: bool = False


class Result(NamedTuple):
    """A loss, its gradients by logp and entropy (T,), and means per token, named by ours; "a+b" is the sum of two."""

    loss: Tensor
    grad: Tensor
    grad_entropy: Tensor
    metrics: dict[str, float]


def ours(case: LossCase, batch: Batch, backend: str) -> Result:
    """Returns the result of policy_loss, with bad numbers at every invalid token."""
    logp = batch.spoilt("logp").requires_grad_()
    entropy = batch.spoilt("entropy").requires_grad_()
    extra = {name: batch.spoilt(name) for name in case.columns if name != "entropy"}
    if "entropy" in case.columns:
        extra["entropy"] = entropy
    advantage = batch.advantage
    if case.per_token:
        advantage = advantage.repeat_interleave(batch.cu_seqlens.diff().long())
    old = None if case.on_policy else batch.spoilt("old_logp")
    loss, metrics = policy_loss(
        logp, old, advantage, batch.cu_seqlens, mask=batch.mask, **extra, **case.options, backend=backend
    )
    grads = torch.autograd.grad(loss, [logp, entropy], allow_unused=True, materialize_grads=True)
    return Result(loss.detach(), *grads, metrics.means())


def assert_same(mine: Result, theirs: Result) -> None:
    """Asserts that losses, gradients and all metrics of the peer agree."""
    for name in ("loss", "grad", "grad_entropy"):
        a, b = getattr(mine, name), getattr(theirs, name)
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m, name=name: f"{name}: {m}")
    for name, value in theirs.metrics.items():
        total = sum(mine.metrics[part] for part in name.split("+"))
        assert abs(total - value) <= METRIC_TOLERANCE * max(1, abs(value)), f"{name}: ours {total}, theirs {value}"


class AdvantageCase(NamedTuple):
    """A call of group_advantage, and a tolerance for the peer's precision."""

    reward: list[float]
    group: list[int]
    options: dict[str, Any]
    valid: list[bool] | None = None
    tolerance: float = TOLERANCE


def our_advantage(case: AdvantageCase, backend: str) -> Tensor:
    """Returns the result of group_advantage; the rewards of invalid samples are NaN."""
    reward = torch.tensor(case.reward, dtype=torch.float64)
    valid = None if case.valid is None else torch.tensor(case.valid)
    if valid is not None:
        reward[~valid] = torch.nan
    with use_backend(backend):
        return group_advantage(reward, torch.tensor(case.group), valid=valid, **case.options)


class HeadCase(NamedTuple):
    """A call of linear_logprob, or of token_logprob if weight is None and x are logits; a tolerance for the peer."""

    x: list[list[float]]
    weight: list[list[float]] | None
    bias: list[float] | None
    target: list[int]
    # the factors of logp and entropy in the sum whose gradients are compared
    upstream: list[list[float]]
    options: dict[str, Any]
    tolerance: float = TOLERANCE

    def leaves(self) -> list[Tensor]:
        """Returns x, and weight and bias if given, as tensors that require gradients."""
        given = (x for x in (self.x, self.weight, self.bias) if x is not None)
        return [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in given]


def head_case(options: dict[str, Any], *, linear: bool, bias: bool = False, tolerance: float = TOLERANCE) -> HeadCase:
    """Returns six rows over a vocabulary of 11, two of them confident."""
    generator = torch.Generator().manual_seed(len(options) + linear)
    rows, columns, width = 6, 11, 5
    x = grid(rows, width if linear else columns, generator=generator, scale=1.5)
    x[:2] *= 4
    target = torch.randint(0, columns, (rows,), generator=generator)
    return HeadCase(
        x.tolist(),
        grid(columns, width, generator=generator).tolist() if linear else None,
        grid(columns, generator=generator).tolist() if bias else None,
        target.tolist(),
        grid(2, rows, generator=generator).tolist(),
        options,
        tolerance,
    )


def head_result(
    case: HeadCase, leaves: list[Tensor], logp: Tensor, entropy: Tensor, square: Tensor | None
) -> dict[str, Tensor]:
    """Returns the outputs and the gradients of the weighted sum of logp and entropy."""
    g, h = torch.tensor(case.upstream, dtype=torch.float64)
    grads = torch.autograd.grad((logp * g).sum() + (entropy * h).sum(), leaves)
    names = ("grad_x", "grad_weight", "grad_bias")
    result = {"logp": logp.detach(), "entropy": entropy.detach(), **dict(zip(names, grads))}
    if square is not None:
        result["sum_pi_squared"] = square.detach()
    return {name: value.double() for name, value in result.items()}


def our_head(case: HeadCase, backend: str) -> dict[str, Tensor]:
    """Returns the result of linear_logprob or token_logprob."""
    leaves = case.leaves()
    options = {"entropy": True, "backend": backend, **case.options}
    target = torch.tensor(case.target)
    if case.weight is None:
        out = token_logprob(leaves[0], target, **options)
    else:
        bias = leaves[2] if case.bias is not None else None
        out = linear_logprob(leaves[0], leaves[1], target, bias=bias, **options)
    return head_result(case, leaves, out.logp, out.entropy, out.sum_pi_squared)


# ---- storage


def _short(x: Any) -> Any:
    """Returns nested data with tensors as lists and floats rounded to 12 digits."""
    if isinstance(x, Tensor):
        return _short(x.tolist())
    if isinstance(x, float):
        return float(f"{x:.12g}")
    if isinstance(x, dict):
        return {k: _short(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [_short(v) for v in x]
    return x


def stored(case: Any, result: Result | dict[str, Tensor] | Tensor) -> dict[str, Any]:
    """Returns a case with the peer's result, in JSON's types."""
    value = result._asdict() if isinstance(result, Result) else result
    return _short({"case": case._asdict(), "peer": value})


def write(peer: str, oracle: dict[str, Any]) -> Path:
    """Writes an oracle, one case per line."""
    path = ORACLES / f"{peer}.json"
    sections = []
    for name, section in oracle.items():
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in section.items())
        sections.append(f"{json.dumps(name)}: {{\n{lines}\n}}")
    path.write_text("{\n" + ",\n".join(sections) + "\n}\n")
    return path


def read(peer: str) -> dict[str, Any]:
    """Returns a stored oracle."""
    return json.loads((ORACLES / f"{peer}.json").read_text())


def stored_batches() -> dict[str, Any]:
    """Returns the batches in JSON's types."""
    return {name: _short(batch._asdict()) for name, batch in batches().items()}


def read_batches(oracle: dict[str, Any]) -> dict[str, Batch]:
    """Returns the batches of a stored oracle."""
    made = {}
    for name, x in oracle["batches"].items():
        columns = {key: torch.tensor(column, dtype=torch.float64) for key, column in x["columns"].items()}
        bounds, mask = torch.tensor(x["cu_seqlens"], dtype=torch.int32), torch.tensor(x["mask"])
        made[name] = Batch(columns, torch.tensor(x["advantage"], dtype=torch.float64), bounds, mask)
    return made


def read_result(peer: dict[str, Any]) -> Result:
    """Returns a stored loss with its gradients and metrics."""
    arrays = [torch.tensor(peer[name], dtype=torch.float64) for name in ("loss", "grad", "grad_entropy")]
    return Result(*arrays, peer["metrics"])


def assert_stored(entry: dict[str, Any], again: dict[str, Any]) -> None:
    """Asserts that a stored entry equals the peer's present result: the case exactly, the numbers to 2e-6."""
    assert entry["case"] == json.loads(json.dumps(again["case"])), "the stored case differs: record it again"
    _assert_near(entry["peer"], json.loads(json.dumps(again["peer"])))


def _assert_near(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            _assert_near(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            _assert_near(x, y)
    else:
        # the last digits of a peer that computes in float32 differ between machines
        assert abs(a - b) <= 1e-9 + 2e-6 * abs(b), f"stored {a}, now {b}: record the oracles again"
