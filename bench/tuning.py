"""Times a small declared space of tile and block sizes on a GPU; a person puts the winners into the tables.

Each setting is a row: the setting, its median time, and the distance of its result from the current setting's.
"""

import itertools
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case, Inputs, make_inputs
from bench.timing import Timed, interleave
from prism_kernels import linear_logprob
from prism_kernels.ops.anchored_rows import ROW_KERNELS
from prism_kernels.ops.linear_logprob import eager

# fold, lanes, warps: fields of RowTile
ROW_TILES = list(itertools.product((1, 2, 4), (1024, 2048), (4, 8)))
# rows, columns, depth, group, warps, stages: fields of Tile
FUSED_TILES = [(128, 256, 64, group, 8, stages) for group, stages in itertools.product((8, 16, 32), (3, 4))]
FUSED_TILES += [(128, 128, 64, 16, 8, 4), (128, 128, 64, 16, 4, 4), (256, 128, 64, 16, 8, 3)]
FORWARD_ROWS = (512, 1024, 1664, 2048, 4096)
BACKWARD_SCRATCH_MIB = (200, 400, 800, 1600)

Report = Callable[[dict[str, Any]], None]
# label, a dict or an object, its item or attribute, the value to set
Setting = tuple[str, Any, Any, Any]


@contextmanager
def _set(holder: Any, name: Any, value: Any) -> Iterator[None]:
    """Sets an item of a dict, or an attribute, inside a `with` block."""
    if isinstance(holder, dict):
        before, holder[name] = holder[name], value
    else:
        before = getattr(holder, name)
        setattr(holder, name, value)
    try:
        yield
    finally:
        if isinstance(holder, dict):
            holder[name] = before
        else:
            setattr(holder, name, before)


def _try(report: Report, what: str, settings: list[Setting], run: Callable[[], Tensor]) -> None:
    """Times `run` under each setting (label, holder, name, value), one after the other."""
    wanted = run().double().clone()
    for label, holder, name, value in settings:
        row: dict[str, Any] = {"what": what, "setting": label, "in_force": _get(holder, name) == value}
        try:
            with _set(holder, name, value):
                row["difference"] = float((run().double() - wanted).abs().max())
                durations = interleave({what: Timed(run)}, wanted.device.type, rounds=10, warmup=2, limit=2)[what]
                row["median_s"] = statistics.median(durations)
        except Exception as error:
            # too much shared memory or a compiler fault: the row records it, and the others are still tried
            row["failed"] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        report(row)


def _get(holder: Any, name: Any) -> Any:
    return holder[name] if isinstance(holder, dict) else getattr(holder, name)


def tune(report: Report, case: Case, device: str = "cuda") -> None:
    """Tries every setting on the shapes of one case and reports each row at once."""
    inputs = make_inputs(case, device)
    _tune_blocks(report, inputs)
    _tune_row_tiles(report, case, device)
    _tune_fused(report, inputs)


def _tune_blocks(report: Report, inputs: Inputs) -> None:
    hidden, weight = inputs.leaves

    def train(cache_bytes: int | None) -> Callable[[], Tensor]:
        def run() -> Tensor:
            hidden.grad = weight.grad = None
            linear_logprob(hidden, weight, inputs.target, cache_bytes=cache_bytes).logp.backward(inputs.grad_logp)
            assert hidden.grad is not None
            return hidden.grad

        return run

    rows = [(f"{n} rows", eager, "forward_rows", lambda *_, n=n: n) for n in FORWARD_ROWS]
    _try(report, "rows of a forward block, forward+backward", rows, train(None))
    scratch = [(f"{n} MiB", eager, "CUDA_SCRATCH", n * 2**20) for n in BACKWARD_SCRATCH_MIB]
    _try(report, "scratch of the backward pass, cache_bytes=0", scratch, train(0))
    hidden.grad = weight.grad = None


def _tune_row_tiles(report: Report, case: Case, device: str) -> None:
    from prism_kernels.ops.anchored_rows import kernels as row_kernels

    rows = min(2048, case.rows)
    z = torch.randn(rows, case.columns, device=device)
    target = torch.randint(case.columns, (rows,), device=device)
    anchor = z.gather(1, target[:, None])[:, 0]
    one = torch.ones_like(anchor)
    exp = torch.empty_like(z, dtype=torch.bfloat16)
    stats = torch.empty(4, rows, device=device)
    kernels, key = ROW_KERNELS["triton"], row_kernels.architecture(z.device)

    def forward() -> Tensor:
        kernels.forward(z, target, anchor, one, None, 0.0, False, exp, stats)
        return stats

    def backward() -> Tensor:
        kernels.backward(z, False, target, anchor, one, coefficients, None, 0.0, exp)
        return exp[:, ::97]

    coefficients = torch.randn(3, rows, device=device)
    for what, table, run in (
        ("Triton row tile, forward", row_kernels.FORWARD_TILES, forward),
        ("Triton row tile, backward", row_kernels.BACKWARD_TILES, backward),
    ):
        _try(report, what, row_settings(table, key), run)


def row_settings(table: dict[int, Any], key: int) -> list[Setting]:
    """Returns the settings of the row kernels' tiles."""
    return [(str(t), table, key, type(table[key])(*t)) for t in ROW_TILES]


def fused_settings(table: dict[int, Any], key: int) -> list[Setting]:
    """Returns the settings of the fused forward's tile for 2-byte elements."""
    tile = type(table[key].half)
    return [(str(t), table, key, table[key]._replace(half=tile(*t))) for t in FUSED_TILES]


def _tune_fused(report: Report, inputs: Inputs) -> None:
    from prism_kernels.ops.anchored_rows.kernels import architecture
    from prism_kernels.ops.linear_logprob import kernels as fused

    hidden, weight = inputs.leaves

    def forward() -> Tensor:
        with torch.no_grad():
            return linear_logprob(hidden, weight, inputs.target, backend="triton").logp

    settings = fused_settings(fused.TILES, architecture(hidden.device))
    _try(report, "Triton fused forward tile", settings, forward)
