"""Ours against others that compute the same from the same data: values against float64, then times, taking turns.

For the ops that have no matrix product to be measured against: each rival's time is a multiple of ours.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import results
from bench.measure import absent_status
from bench.timing import PeakMemory, seconds
from prism_kernels.testing import relative_error

Values = Mapping[str, Tensor]
Run = Callable[[], Values]

ROUNDS = (5, 60)
MEMORY_LIMIT_S = 300


@dataclass(frozen=True)
class Rival:
    """One way to compute it. `load` gets the data and returns the call; ImportError says what is missing."""

    name: str
    load: Callable[[Any], Run]
    # "" is installed always; otherwise the distribution whose version is reported
    package: str = ""
    ours: bool = False
    # what the call takes of the work: a loop that takes minutes is run on part of it
    share: float = 1.0


@dataclass(frozen=True)
class Bar:
    """How many times slower than ours a rival must be, at least; or how much of its memory we may take, at most."""

    rival: str
    slower: float | None = None
    memory_share: float | None = None


@dataclass(frozen=True)
class Duel:
    """An op on one set of data. The first rival is the one that the others are measured against."""

    op: str
    label: str
    make: Callable[[], Any]
    exact: Callable[[Any], Values]
    rivals: tuple[Rival, ...]
    tolerance: float
    bars: tuple[Bar, ...] = ()
    memory: bool = False
    # seconds of a rival's rounds, ours included
    limit_s: float = 6.0


class Ring:
    """The data of a duel and its first rival, made once; a row for each rival."""

    def __init__(self, duel: Duel) -> None:
        self.duel, self.rows = duel, []
        self.data = duel.make()
        self.exact = duel.exact(self.data)
        self.first = duel.rivals[0].load(self.data)

    def fight(self, rival: Rival, benchmark: Any, module: str) -> None:
        """Checks the rival's values, measures its memory, and times it in turns with ours."""
        row = {"contender": rival.name, "ours": rival.ours, "package": rival.package}
        self.rows.append(row)
        try:
            run = rival.load(self.data)
            errors = self.errors(run())
            peak = peak_in_child(module, self.duel, rival) if self.duel.memory else None
        except Exception as error:
            # a peer may fail in any way: the row says how, and the others are still measured
            row["status"] = absent_status(error, rival.ours)
            if rival.ours and not isinstance(error, ImportError):
                raise
            pytest.skip(row["status"])
        ours: list[float] = []
        theirs: list[float] = []

        def before_round() -> None:
            ours.append(seconds(self.first, "cpu"))

        def one_round() -> None:
            theirs.append(seconds(run, "cpu"))

        # a warm-up, from which the number of rounds follows
        before_round()
        one_round()
        rounds = max(ROUNDS[0], min(ROUNDS[1], int(self.duel.limit_s / (ours.pop() + theirs.pop()))))
        benchmark.group = f"{self.duel.op}, {self.duel.label}"
        benchmark.pedantic(one_round, setup=before_round, rounds=rounds)
        taken = statistics.median(theirs) / rival.share
        # NaN is not within
        green = all(error <= self.duel.tolerance for error in errors.values())
        row |= {
            "status": "ok" if green else "wrong values",
            "median_s": taken,
            "first_s": statistics.median(ours),
            "slower": taken / statistics.median(ours) if green else None,
            "share": rival.share,
            "samples_s": theirs,
            "first_samples_s": ours,
            "peak_extra_bytes": peak,
            "errors": errors,
        }
        benchmark.extra_info |= {key: row[key] for key in ("status", "slower", "peak_extra_bytes", "errors")}
        assert green or not rival.ours, f"{rival.name}: the values are wrong: {errors}"

    def errors(self, values: Values) -> dict[str, float]:
        """Returns the relative error of each value; one of a part of the data is compared with that part."""
        assert values, "a rival must return what it computed"
        return {name: relative_error(value, self.exact[name][: value.numel()] if value.dim() else self.exact[name])
                for name, value in values.items()}  # fmt: skip


# what was measured in this session, by op
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
    return {**results.header(duel.op, "cpu"), "label": duel.label, "versus": rows, "bars": bars(duel, rows)}


def bars(duel: Duel, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the bars with what was measured (None: not measured)."""
    found = []
    known = {row["contender"]: row for row in rows}
    first = known.get(duel.rivals[0].name, {})
    for bar in duel.bars:
        row = known.get(bar.rival, {})
        if bar.slower is not None:
            found.append(results.bar(f"times faster than {bar.rival}", ">=", bar.slower, row.get("slower")))
        if bar.memory_share is not None:
            peaks = first.get("peak_extra_bytes"), row.get("peak_extra_bytes")
            share = peaks[0] / peaks[1] if all(peaks) else None
            found.append(results.bar(f"peak extra memory over that of {bar.rival}", "<=", bar.memory_share, share))
    return found


def table(content: dict[str, Any]) -> str:
    """Returns a plain text table of a result file, and its bars."""
    lines = [f"\n{content['op']}, {content['label']}"]
    for row in content["versus"]:
        if "median_s" not in row:
            lines.append(f"  {row['contender']:<44} {row['status']}")
            continue
        slower = "wrong values" if row["slower"] is None else f"x {row['slower']:.2f}"
        peak = "" if row["peak_extra_bytes"] is None else f"{row['peak_extra_bytes'] / results.MIB:9.1f} MiB"
        worst = max(row["errors"].values())
        lines.append(f"  {row['contender']:<44} {1e3 * row['median_s']:9.3f} ms {slower:>12} {peak} error {worst:.1e}")
    return "\n".join([*lines, *results.bar_lines(content["bars"])])


def peak_in_child(module: str, duel: Duel, rival: Rival) -> int:
    """Returns the peak of extra memory of one call after a warm-up, in a process of its own, which has but one
    resident set."""
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


def main(module: str, op: str, name: str) -> None:
    """Measures the memory of one rival and prints it as the last line."""
    duel = next(d for d in import_module(module).DUELS if d.op == op)
    run = next(r for r in duel.rivals if r.name == name).load(duel.make())
    run()
    with PeakMemory("cpu") as peak:
        kept = run()
    results_bytes = sum(value.nbytes for value in kept.values() if value.dim())
    print(json.dumps({"peak_extra_bytes": peak.bytes - results_bytes}))


if __name__ == "__main__":
    main(*sys.argv[1:])
