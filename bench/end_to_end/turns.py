"""Runs steps of two sides in turns, each in a separate process: time, computed values, and peak memory.

A benchmark is a module with a function `child(side, sizes, steps, memory)`, which runs that many steps of a side, each
inside a `Turn`. The module passes it to `main`, with a function that makes the result file's content. Two processes
take steps in turns, and two others, one after the other, measure the peak of their resident set.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from bench import results
from bench.timing import PeakMemory

# the values that a step reports beside its time, under the same names on both sides
Said = dict[str, Any]
# the name of a step, which the parent sends to the child
STEP = "step"


class Turn:
    """The child process's side of the pipe: it runs a step on each request and reports it.

    Args:
        memory: whether to report the peak of the resident set.
    """

    def __init__(self, memory: bool) -> None:
        self.memory = memory
        # libraries may print to stdout; that must not look like an answer
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def begin(self) -> str:
        """Waits for the parent's request, and returns the name of the step."""
        wanted = sys.stdin.readline()
        if not wanted:
            raise SystemExit("the parent is gone")
        self.peak = PeakMemory("cpu")
        if self.memory:
            self.peak.__enter__()
        self.start = time.perf_counter()
        return wanted.rstrip("\n")

    def end(self) -> None:
        """Takes the time."""
        self.found: Said = {"seconds": time.perf_counter() - self.start}
        if self.memory:
            self.peak.__exit__()
            self.found |= {"peak_extra_bytes": self.peak.bytes, "peak_bytes": self.peak.peak}

    def say(self, said: Said) -> None:
        """Answers the parent."""
        self.answers.write(json.dumps(self.found | said) + "\n")
        self.answers.flush()


class Side:
    """A child process with one side, which runs a step on request."""

    def __init__(self, module: str, spec: dict[str, Any], environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "--child", json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )

    def step(self, wanted: str = STEP) -> Said:
        """Runs a step and returns its report."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{wanted}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the side's process ended with exit code {self.process.wait()}")
        return json.loads(line)

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


@dataclass(frozen=True)
class Match:
    """Two sides of the same work.

    Args:
        module: the module with `child` and `main`.
        sides: the names of the sides, the published one first.
        sizes: a dataclass, the argument of `child`.
    """

    module: str
    sides: tuple[str, str]
    sizes: Any

    def start(self, side: str, steps: int, memory: bool = False) -> Side:
        """Returns a process for that many steps."""
        spec = {"side": side, "sizes": asdict(self.sizes), "steps": steps, "memory": memory}
        return Side(self.module, spec, results.memory_environment() if memory else os.environ)

    @contextmanager
    def both(self, steps: int) -> Iterator[dict[str, Side]]:
        """Yields a process for each side."""
        with ExitStack() as stack:
            yield {side: stack.enter_context(self.start(side, steps)) for side in self.sides}

    def peaks(self, steps: int, wanted: Sequence[str] = (STEP,)) -> dict[str, dict[str, Said]]:
        """Returns the report of the last of that many steps, with its memory, by side and name of the step."""
        reports = {}
        for name in self.sides:
            with self.start(name, steps * len(wanted), memory=True) as side:
                reports[name] = {one: [side.step(one) for _ in range(steps)][-1] for one in wanted}
        return reports


def take_turns(sides: Mapping[str, Side], steps: int, wanted: str = STEP) -> dict[str, list[Said]]:
    """Returns the reports of all sides; the side that begins alternates."""
    taken: dict[str, list[Said]] = {name: [] for name in sides}
    for count in range(steps):
        order = list(sides.items())
        for name, side in order if count % 2 == 0 else reversed(order):
            taken[name].append(side.step(wanted))
    return taken


def rows(
    taken: Mapping[str, list[Said]], peaks: Mapping[str, dict[str, Said]], wanted: str = STEP
) -> list[dict[str, Any]]:
    """Returns a row of the result file for each side, without the first step, which warms up."""
    made = []
    for name, reports in taken.items():
        samples = [said["seconds"] for said in reports[1:]]
        memory = {key: peaks[name][wanted][key] for key in ("peak_bytes", "peak_extra_bytes")}
        case = {} if wanted == STEP else {"case": wanted}
        made.append({**case, "contender": name, "median_s": statistics.median(samples), "samples_s": samples, **memory})
    return made


def over(made: Sequence[dict[str, Any]], key: str) -> float:
    """Returns the ratio of our figure to the published side's."""
    theirs, ours = made
    return ours[key] / theirs[key]


def table(content: dict[str, Any], title: str) -> str:
    """Returns a plain text table, and the bars."""
    lines = [f"{title}, {content['label']}"]
    width = max(len(row["contender"]) for row in content["rows"])
    case = None
    for row in content["rows"]:
        if row.get("case") != case:
            case = row["case"]
            lines.append(f" {case}")
        whole, extra = row["peak_bytes"] / results.MIB, row["peak_extra_bytes"] / results.MIB
        time_taken = f"{row['median_s']:8.3f} s"
        lines.append(f"  {row['contender']:<{width}} {time_taken} {whole:9.0f} MiB, of which the step {extra:.0f}")
    return "\n".join([*lines, *results.bar_lines(content["bars"])])


def main(
    doc: str | None,
    sizes: type,
    child: Callable[[str, Any, int, bool], None],
    measure: Callable[[Any, int], dict[str, Any]],
    title: str,
    rounds: int,
) -> None:
    """Runs the measurement of the command line and writes the JSON; in a child process, runs the steps.

    Args:
        doc: the text of `--help`.
        sizes: a dataclass whose fields become options; a field's metadata may name the choices.
        child: runs the steps.
        measure: returns the result file's content from sizes and rounds.
        title: the title of the table.
        rounds: the default number of measured steps.
    """
    parser = argparse.ArgumentParser(description=doc)
    for field in fields(sizes):
        value: dict[str, Any] = {"type": type(field.default), "default": field.default, **field.metadata}
        parser.add_argument(f"--{field.name}", **({"action": "store_true"} if field.default is False else value))
    parser.add_argument("--rounds", type=int, default=rounds, help="3 for a quick look")
    parser.add_argument("--out", help="folder for the JSON, instead of bench/results/<machine>")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    given = vars(parser.parse_args())
    spec, rounds, out = given.pop("child"), given.pop("rounds"), given.pop("out")
    if spec is not None:
        child(spec["side"], sizes(**spec["sizes"]), spec["steps"], spec["memory"])
        return
    content = measure(sizes(**given), rounds)
    folder = results.RESULTS / results.machine("cpu") if out is None else Path(out)
    results.write(folder / f"{content['op']}.json", content)
    print(table(content, title))
