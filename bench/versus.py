"""Duels of our op with others that compute the same from the same data: values against float64, then times in turns.

These ops have no matrix product as a reference, so each rival's time is a multiple of ours. On a GPU a duel also counts
launches and waits of the host, and compares the bytes a second with those of a copy.
"""

import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import results
from bench.gpu_trace import Trace, clear_cache, trace
from bench.measure import absent_status
from bench.timing import PeakMemory, seconds
from prism_kernels.testing import relative_error

Values = Mapping[str, Tensor]
Run = Callable[[], Values]
# (one round, the setup before each round, rounds)
Turns = Callable[[Callable[[], None], Callable[[], None], int], None]

ROUNDS = (5, 60)
MEMORY_LIMIT_S = 300


@dataclass(frozen=True)
class Rival:
    """One way to compute it. `load` gets the data and returns the call, or raises ImportError."""

    name: str
    load: Callable[[Any], Run]
    # the distribution whose version is reported; "" needs none
    package: str = ""
    ours: bool = False
    # the share of the data that the call computes: a loop of minutes runs on a part
    share: float = 1.0


@dataclass(frozen=True)
class Bar:
    """A bar: the least ratio of the rival's time to ours, or the greatest ratio of our memory to its memory."""

    rival: str
    slower: float | None = None
    memory_share: float | None = None


@dataclass(frozen=True)
class Goal:
    """A goal for a figure of our row, the first one; the figure is multiplied by `unit`."""

    name: str
    key: str
    sign: str
    limit: float
    unit: float = 1.0


@dataclass(frozen=True)
class Reference:
    """The minimum of the work, timed in turns: a copy that moves its bytes, or its matrix products alone."""

    name: str
    load: Callable[[Any], Callable[[], object]]
    # the bytes that a call of it moves, and those that the op must move: each input read, each output written once
    bytes: int = 0


@dataclass(frozen=True)
class Duel:
    """An op on one set of data. The others are measured against the first rival, which is ours."""

    op: str
    label: str
    make: Callable[[], Any]
    exact: Callable[[Any], Values]
    rivals: tuple[Rival, ...]
    tolerance: float
    bars: tuple[Bar, ...] = ()
    memory: bool = False
    # seconds of a rival's rounds, including ours
    limit_s: float = 6.0
    device: str = "cpu"
    reference: Reference | None = None
    goals: tuple[Goal, ...] = ()
    # rivals that do not fit into memory together run one after the other, not in turns
    apart: bool = False
    rounds: tuple[int, int] = ROUNDS


@dataclass
class Samples:
    """The seconds of a rival's rounds, and of the first rival's and the reference's rounds between them."""

    rival: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)


class Ring:
    """The data of a duel and its first rival, made once, and a row for each rival."""

    def __init__(self, duel: Duel) -> None:
        self.duel, self.rows = duel, []
        self.data = duel.make()
        self.exact = duel.exact(self.data)
        # the exact values may have taken the whole GPU
        gc.collect()
        self.first = None if duel.apart else duel.rivals[0].load(self.data)
        self.reference = None if duel.reference is None else duel.reference.load(self.data)

    def fight(self, rival: Rival, benchmark: Any, module: str) -> None:
        """Adds the rival's row, with rounds by pytest-benchmark; fails if the values of ours are wrong."""
        benchmark.group = f"{self.duel.op}, {self.duel.label}"
        row = self.row(rival, module, lambda run, before, rounds: benchmark.pedantic(run, setup=before, rounds=rounds))
        if "errors" not in row:
            pytest.skip(row["status"])
        benchmark.extra_info |= {key: row[key] for key in ("status", "slower", "peak_extra_bytes", "errors")}
        assert row["status"] == "ok" or not rival.ours, f"{rival.name}: the values are wrong: {row['errors']}"

    def row(self, rival: Rival, module: str, turns: Turns | None = None) -> dict[str, Any]:
        """Checks the rival's values, measures its memory, and times it in turns with ours; adds and returns its row."""
        duel = self.duel
        row: dict[str, Any] = {"contender": rival.name, "ours": rival.ours, "package": rival.package}
        self.rows.append(row)
        try:
            run = rival.load(self.data)
            errors = self.errors(run())
            traced = None if duel.device == "cpu" or duel.apart else trace(run)
            peak = self.peak(module, rival, run) if duel.memory else None
        except Exception as error:
            # a peer may fail in any way: its row records the failure, and the others are still measured
            row["status"] = absent_status(error, rival.ours)
            if rival.ours and not isinstance(error, ImportError) and duel.device == "cpu":
                raise
            return row
        samples = self.turns(run, turns or _one_after_the_other)
        # NaN is never within the tolerance
        green = all(error <= duel.tolerance for error in errors.values())
        taken = statistics.median(samples.rival) / rival.share
        first = statistics.median(samples.first) if samples.first else self.first_s(taken)
        row |= {
            "status": "ok" if green else "wrong values",
            "median_s": taken,
            "first_s": first,
            "slower": taken / first if green and first else None,
            "share": rival.share,
            "samples_s": samples.rival,
            "first_samples_s": samples.first,
            "peak_extra_bytes": peak,
            "errors": errors,
        }
        if samples.reference:
            reference_s = statistics.median(samples.reference)
            row |= {"reference_s": reference_s, "ratio": taken / reference_s if green else None}
        if traced is not None:
            row |= self.figures(traced)
        return row

    def turns(self, run: Run, turns: Turns) -> Samples:
        """Times the rival's rounds, each after a round of the first rival and of the reference."""
        duel, samples = self.duel, Samples()
        first, reference = self.first, self.reference

        def timed(call: Callable[[], object]) -> float:
            if duel.device == "cuda" and not duel.apart:
                clear_cache()
            return seconds(call, duel.device)

        def before_round() -> None:
            if first is not None:
                samples.first.append(timed(first))
            if reference is not None:
                samples.reference.append(timed(reference))

        def one_round() -> None:
            samples.rival.append(timed(run))

        # the warm-up decides the number of rounds
        before_round()
        one_round()
        spent = sum(series.pop() for series in (samples.rival, samples.first, samples.reference) if series)
        fewest, most = duel.rounds
        turns(one_round, before_round, max(fewest, min(most, int(duel.limit_s / spent))))
        return samples

    def first_s(self, taken: float) -> float | None:
        """Returns the first rival's time in a duel without turns; the row may be the first rival's own."""
        return taken if len(self.rows) == 1 else self.rows[0].get("median_s")

    def figures(self, traced: Trace) -> dict[str, Any]:
        """Returns the GPU's trace of one call, and its bytes a second over those of the reference."""
        measured: dict[str, Any] = traced._asdict()
        reference = self.duel.reference
        if reference is None or not reference.bytes or self.reference is None:
            return measured
        against = trace(self.reference)
        if against is None:
            return measured
        rate, best = (reference.bytes / t.device_s / 1e9 for t in (traced, against))
        return measured | {"gbytes_per_s": rate, "reference_gbytes_per_s": best, "bandwidth_share": rate / best}

    def peak(self, module: str, rival: Rival, run: Run) -> int:
        """Returns the peak extra memory of one call: the allocator's on a GPU, else measured in a separate process."""
        if self.duel.device == "cuda":
            return peak_extra(run, "cuda")
        return peak_in_child(module, self.duel, rival)

    def errors(self, values: Values) -> dict[str, float]:
        """Returns the relative error of each value; a value of a part of the data is compared with that part."""
        assert values, "a rival must return what it computed"
        return {name: relative_error(value, self.exact[name][: value.numel()] if value.dim() else self.exact[name])
                for name, value in values.items()}  # fmt: skip


def _one_after_the_other(run: Callable[[], None], before: Callable[[], None], rounds: int) -> None:
    for _ in range(rounds):
        before()
        run()


def fight_all(duel: Duel, module: str) -> Iterator[dict[str, Any]]:
    """Yields the result file's content after each rival, so that a later hang loses nothing; without pytest."""
    ring = Ring(duel)
    for rival in duel.rivals:
        ring.row(rival, module)
        gc.collect()
        if duel.device == "cuda":
            torch.cuda.empty_cache()
        yield document(duel, ring.rows)


# the rows measured in this session, by op
RINGS: dict[str, Ring] = {}


def duel_test(duels: tuple[Duel, ...], module: str) -> Callable[..., None]:
    """Returns the test function of a module's duels, one case for each rival."""
    plan = [(duel, rival) for duel in duels for rival in duel.rivals]

    @pytest.mark.parametrize("duel, rival", plan, ids=[f"{duel.op}-{rival.name}" for duel, rival in plan])
    def test(duel: Duel, rival: Rival, benchmark: Any) -> None:
        if duel.op not in RINGS:
            RINGS[duel.op] = Ring(duel)
        RINGS[duel.op].fight(rival, benchmark, module)

    return test


def document(duel: Duel, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the content of a result file."""
    reference = {} if duel.reference is None else {"reference": duel.reference.name}
    header = {**results.header(duel.op, duel.device), "label": duel.label, **reference}
    return {**header, "versus": rows, "bars": bars(duel, rows)}


def bars(duel: Duel, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the bars and goals with the measured values (None: not measured)."""
    known = {row["contender"]: row for row in rows}
    first = known.get(duel.rivals[0].name, {})
    checks = []
    for goal in duel.goals:
        figure = first.get(goal.key)
        checks.append(results.bar(goal.name, goal.sign, goal.limit, None if figure is None else figure * goal.unit))
    for bar in duel.bars:
        row = known.get(bar.rival, {})
        if bar.slower is not None:
            checks.append(results.bar(f"times faster than {bar.rival}", ">=", bar.slower, row.get("slower")))
        if bar.memory_share is not None:
            peaks = first.get("peak_extra_bytes"), row.get("peak_extra_bytes")
            share = peaks[0] / peaks[1] if all(peaks) else None
            checks.append(results.bar(f"peak extra memory over that of {bar.rival}", "<=", bar.memory_share, share))
    return checks


def table(content: dict[str, Any]) -> str:
    """Returns a plain text table of a result file, and its bars."""
    against = f" (ratio to {content['reference']})" if "reference" in content else ""
    lines = [f"\n{content['op']}, {content['label']}{against}"]
    return "\n".join([*lines, *map(_line, content["versus"]), *results.bar_lines(content["bars"])])


def _line(row: dict[str, Any]) -> str:
    if "median_s" not in row:
        return f"  {row['contender']:<44} {row['status']}"
    slower = "" if row["slower"] is None else f"x {row['slower']:.2f}"
    if row["status"] != "ok":
        slower = row["status"]
    line = f"  {row['contender']:<44} {1e3 * row['median_s']:9.3f} ms {slower:>12} "
    if row["peak_extra_bytes"] is not None:
        line += f"{row['peak_extra_bytes'] / results.MIB:9.1f} MiB "
    if "launches" in row:
        line += f"{row['launches']:3d} launches {row['syncs']} syncs {1e3 * row['device_s']:8.3f} ms there "
    if "bandwidth_share" in row:
        line += f"{row['gbytes_per_s']:,.0f} GB/s ({row['bandwidth_share']:.0%}) "
    if row.get("ratio") is not None:
        line += f"ratio {row['ratio']:.2f} "
    return f"{line}error {max(row['errors'].values()):.1e}"


def peak_in_child(module: str, duel: Duel, rival: Rival) -> int:
    """Returns the peak extra memory of one call after a warm-up, in a separate process: a process has one resident
    set only."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.versus", module, duel.op, rival.name],
        env=results.memory_environment() | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.PIPE,
        text=True,
        timeout=MEMORY_LIMIT_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the memory measurement's process ended with exit code {done.returncode}")
    return int(json.loads(done.stdout.splitlines()[-1])["peak_extra_bytes"])


def peak_extra(run: Run, device: str) -> int:
    """Returns the peak extra memory of one call after a warm-up, without the returned tensors."""
    # kept, because a call that drops the gradients of the call before would otherwise free that memory meanwhile
    before = run()
    with PeakMemory(device) as peak:
        kept = run()
    del before
    return peak.bytes - sum(value.nbytes for value in kept.values() if value.dim())


def main(module: str, op: str, name: str) -> None:
    """Measures the memory of one rival and prints it as the last line."""
    duel = next(d for d in import_module(module).DUELS if d.op == op)
    run = next(r for r in duel.rivals if r.name == name).load(duel.make())
    print(json.dumps({"peak_extra_bytes": peak_extra(run, "cpu")}))


if __name__ == "__main__":
    main(*sys.argv[1:])
