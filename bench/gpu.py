"""`python3 -m bench.gpu`: on a machine with a GPU, builds in place, tests, measures and tunes; leaves JSON.

Each phase is a process of its own with a time limit, and its result is written before the next begins: what fails or
hangs loses nothing else. Results go to $OUT, or to bench/results/<machine>. The exit code is not 0 if a phase failed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import results
from bench.cases import cases
from bench.measure import Bench, measure_together
from bench.registry import contenders
from bench.tuning import tune

ROOT = Path(__file__).parent.parent
# of everything together
LIMIT_S = 525
# of the output of a phase, in its result
KEPT_CHARACTERS = 20_000
# of one pass of one case, in which all contenders take turns
LOOP_S = {"linear_logprob": 10.0, "token_logprob": 3.0}
OPS = tuple(LOOP_S)


class Phase(NamedTuple):
    """A step of `main`: a command with a time limit in seconds."""

    name: str
    limit_s: float
    command: tuple[str, ...]


PHASES = (
    Phase("build", 150, ("setup.py", "build_ext", "--inplace")),
    Phase("tests", 210, ("-m", "pytest", "tests/kernels", "-p", "no:cacheprovider", "--durations=15")),
    Phase("linear_logprob", 170, ("-m", "bench.gpu", "--phase", "linear_logprob")),
    Phase("token_logprob", 60, ("-m", "bench.gpu", "--phase", "token_logprob")),
    Phase("tuning", 110, ("-m", "bench.gpu", "--phase", "tuning")),
)


def out_folder() -> Path:
    """Returns where results go."""
    named = os.environ.get("OUT")
    return Path(named) if named else results.RESULTS / results.machine("cuda")


def build_environment() -> dict[str, str]:
    """Returns the variables of the build, which is for this GPU's architecture only."""
    major, minor = torch.cuda.get_device_capability()
    # wgmma and the like exist in the "a" variant only
    architecture = f"{major}.{minor}{'a' if major >= 9 else ''}"
    return {
        "TORCH_CUDA_ARCH_LIST": architecture,
        "MAX_JOBS": str(os.cpu_count() or 1),
        "PRISM_KERNELS_REQUIRE": "1",
    }


def run_phase(phase: Phase, limit_s: float, folder: Path) -> dict[str, Any]:
    """Runs a phase and returns how it went, with the end of its output, which is shown."""
    begin = time.monotonic()
    print(f"\n=== {phase.name}, at most {limit_s:.0f} s", flush=True)
    # a file and not a pipe: what a killed phase has printed is kept
    log = folder / f"{phase.name}.log"
    with log.open("w+") as file:
        # a group of its own, so that a time limit ends what the phase has started too
        process = subprocess.Popen(
            [sys.executable, *phase.command],
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | (build_environment() if phase.name == "build" else {}),
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        try:
            code: int | None = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
        file.seek(0)
        output = file.read()[-KEPT_CHARACTERS:]
    log.unlink()
    summary = {
        "phase": phase.name,
        "command": " ".join(("python3", *phase.command)),
        "exit_code": code,
        "ok": code == 0,
        "timed_out": code is None,
        "seconds": round(time.monotonic() - begin, 1),
        "output_end": output,
    }
    print(output[-3000:], flush=True)
    return summary


def measure(op: str, folder: Path) -> None:
    """Measures an op case by case and writes <op>.json after each."""
    measured, rows = [], []
    for case in cases(op, "cuda"):
        rows += measure_together(Bench(case, "cuda"), contenders(op, "cuda"), LOOP_S[op])
        measured.append(case)
        content = results.document(op, "cuda", measured, rows)
        results.write(folder / f"{op}.json", content)
        torch.cuda.empty_cache()
    print(results.table(content))
    bad = [row for row in rows if row["ours"] and row["status"] != "ok"]
    if bad:
        raise SystemExit(f"bench.gpu: {len(bad)} of our rows are not ok: {bad[0]['contender']}: {bad[0]['status']}")


def tuning(folder: Path) -> None:
    """Tries the settings of bench/tuning.py and writes tuning.json after each."""
    rows: list[dict[str, Any]] = []
    case = cases("linear_logprob", "cuda")[0]

    def report(row: dict[str, Any]) -> None:
        rows.append(row)
        content = {"machine": results.machine("cuda"), "versions": results.versions(), "case": case.as_json()}
        results.write(folder / "tuning.json", content | {"tuning": rows})
        figure = f"{1e3 * row['median_s']:8.3f} ms" if "median_s" in row else row["failed"]
        print(f"{row['what']:<44} {row['setting']:<32} {figure}{'  in force' if row['in_force'] else ''}", flush=True)

    tune(report, case)


def main() -> None:
    """Runs one phase, or all of them, and prints a short table."""
    parser = argparse.ArgumentParser(prog="python3 -m bench.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--phase", choices=(*OPS, "tuning"), help="one measurement, in this process")
    phase_name = parser.parse_args().phase
    if not torch.cuda.is_available():
        raise SystemExit("bench.gpu: torch sees no CUDA device; this needs a machine with an NVIDIA GPU and its driver")
    folder = out_folder()
    folder.mkdir(parents=True, exist_ok=True)
    if phase_name in OPS:
        measure(phase_name, folder)
        return
    if phase_name == "tuning":
        tuning(folder)
        return
    deadline = time.monotonic() + LIMIT_S
    done: list[dict[str, Any]] = []
    for phase in PHASES:
        left = deadline - time.monotonic()
        done.append(run_phase(phase, min(phase.limit_s, max(left, 1.0)), folder))
        content = {"machine": results.machine("cuda"), "versions": results.versions(), "phases": done}
        results.write(folder / "phases.json", content)
    print("\n" + summary(done, folder))
    if not all(phase["ok"] for phase in done):
        raise SystemExit(1)


def summary(done: list[dict[str, Any]], folder: Path) -> str:
    """Returns the short table that comes last."""
    lines = []
    for op in OPS:
        path = folder / f"{op}.json"
        if path.exists():
            lines.append(results.table(json.loads(path.read_text())))
    lines.append("")
    for phase in done:
        verdict = "ok" if phase["ok"] else "TIMED OUT" if phase["timed_out"] else f"FAILED ({phase['exit_code']})"
        lines.append(f"{phase['phase']:<16} {phase['seconds']:6.1f} s  {verdict}")
    lines.append(f"results in {folder}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
