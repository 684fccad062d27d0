"""`python3 -m bench.gpu`: on a machine with a GPU, builds in place, tests, measures and tunes; leaves JSON.

Each phase is a process with a time limit, and its result is written before the next phase begins, so a failure or a
hang loses no other result. Results go to $OUT, or to bench/results/<machine>. The exit code is not 0 if a phase failed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import results, versus
from bench.cases import FORWARD, HALF, TRAIN, cases
from bench.left_out import left_out
from bench.measure import Bench, measure_together
from bench.registry import contenders
from bench.tuning import tune

ROOT = Path(__file__).parent.parent
# seconds for all phases
LIMIT_S = 525
# characters of a phase's output that its result keeps
KEPT_CHARACTERS = 20_000
# characters of it that are shown: the tables come again at the end
SHOWN_CHARACTERS = 1_000
# seconds of one pass of one case, in which all contenders alternate
LOOP_S = {"linear_logprob": 5.0, "token_logprob": 2.0}
OPS = tuple(LOOP_S)
TESTS = ["tests/kernels", "tests/integrations", "tests/trainer"]
TEST_WORKERS = 8
# seconds of one test: a test that hangs costs a worker, not the phase
TEST_LIMIT_S = 90
# phases that run the CUDA_DUELS of a module, each in its own process: an illegal access ends a process's use of the GPU
DUELS = {
    "policy_loss": "bench.test_policy_loss",
    "group_advantage": "bench.test_group_advantage",
    "prefix_attention": "bench.test_prefix_attention",
    "linear_policy_loss": "bench.test_linear_policy_loss",
    "experts": "bench.moe_layer",
    "discriminator_step": "bench.test_discriminator_step",
}
# one file for all duels: few files come back from a remote machine
DUELS_FILE = "duels.json"


class Phase(NamedTuple):
    """A step of `main`: a command and its reserved seconds. It may also use the time that earlier phases left."""

    name: str
    share_s: float
    command: tuple[str, ...]


def _own(name: str, share_s: float) -> Phase:
    return Phase(name, share_s, ("-m", "bench.gpu", "--phase", name))


PHASES = (
    Phase("build", 80, ("setup.py", "build_ext", "--inplace")),
    _own("tests", 130),
    _own("linear_logprob", 85),
    _own("token_logprob", 25),
    _own("policy_loss", 30),
    _own("group_advantage", 12),
    _own("prefix_attention", 20),
    _own("linear_policy_loss", 25),
    _own("experts", 35),
    _own("discriminator_step", 60),
    _own("tuning", 23),
)


def limits(left_s: float, phases: Iterable[Phase] = PHASES) -> float:
    """Returns the seconds that the first of some phases may take, so that the later ones keep theirs."""
    _, *later = phases
    return max(1.0, left_s - sum(phase.share_s for phase in later))


def out_folder() -> Path:
    """Returns the folder of the results."""
    named = os.environ.get("OUT")
    return Path(named) if named else results.RESULTS / results.machine("cuda")


def build_environment() -> dict[str, str]:
    """Returns the build's environment variables, for this GPU's architecture only."""
    major, minor = torch.cuda.get_device_capability()
    # wgmma and similar instructions exist in the "a" variant only
    architecture = f"{major}.{minor}{'a' if major >= 9 else ''}"
    return {
        "TORCH_CUDA_ARCH_LIST": architecture,
        "MAX_JOBS": str(os.cpu_count() or 1),
        "PRISM_KERNELS_REQUIRE": "1",
    }


def run_phase(phase: Phase, limit_s: float, folder: Path) -> dict[str, Any]:
    """Runs a phase, shows the last lines of its output, and returns its result with the end of the output."""
    begin = time.monotonic()
    print(f"\n=== {phase.name}, at most {limit_s:.0f} s", flush=True)
    # a file instead of a pipe keeps the output of a killed phase
    log = folder / f"{phase.name}.log"
    with log.open("w+") as file:
        # a process group, so that the time limit also ends the phase's children
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
    print(output[-SHOWN_CHARACTERS:], flush=True)
    return summary


def run_tests() -> int:
    """Runs all tests that can be imported here, lists the others, and returns pytest's exit code."""
    without = left_out(TESTS)
    for name, why in without.items():
        print(f"left out: {name}: {why}", flush=True)
    command = [sys.executable, "-m", "pytest", *TESTS, *(f"--ignore={name}" for name in without)]
    command += ["-p", "no:cacheprovider", "-rfE", "--durations=15", "--continue-on-collection-errors", "--tb=short"]
    if find_spec("xdist"):
        command += ["-n", str(min(TEST_WORKERS, os.cpu_count() or 1)), "--dist=loadfile"]
        if find_spec("pytest_timeout"):
            command += [f"--timeout={TEST_LIMIT_S}", "--timeout-method=thread"]
    # the workers share the cores
    return subprocess.call(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "2"})


def fight(module: str, folder: Path) -> None:
    """Runs the duels of a module, and writes the file after each rival."""
    broken = []
    for duel in import_module(module).CUDA_DUELS:
        content: dict[str, Any] = {"versus": []}
        try:
            for content in versus.fight_all(duel, module):
                kept = [other for other in fought(folder) if other["op"] != duel.op]
                results.write(folder / DUELS_FILE, {"duels": [*kept, content]})
            print(versus.table(content), flush=True)
        except Exception as error:
            # the data or the exact values failed: the other duels still run
            broken.append(f"{duel.op}: {type(error).__name__}: {error}")
        bad = [row for row in content["versus"] if row["ours"] and row["status"] != "ok"]
        broken += [f"{duel.op}, {row['contender']}: {row['status']}" for row in bad]
    if broken:
        raise SystemExit("bench.gpu: not ok:\n" + "\n".join(broken))


def fought(folder: Path) -> list[dict[str, Any]]:
    """Returns the duels so far."""
    path = folder / DUELS_FILE
    return json.loads(path.read_text())["duels"] if path.exists() else []


def measure(op: str, folder: Path) -> None:
    """Measures an op case by case, training first, and writes <op>.json after each pass."""
    measured, rows = [], []
    for case in cases(op, "cuda"):
        bench = Bench(case, "cuda")
        measured.append(case)
        rivals = [c for c in contenders(op, "cuda") if case.is_first() or not c.first_case_only]
        for pass_ in (TRAIN, FORWARD, HALF):
            rows += measure_together(bench, rivals, LOOP_S[op], (pass_,))
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
    parser.add_argument("--phase", choices=("tests", *OPS, *DUELS, "tuning"), help="one measurement, in this process")
    phase_name = parser.parse_args().phase
    if not torch.cuda.is_available():
        raise SystemExit("bench.gpu: torch sees no CUDA device; run it on a machine with an NVIDIA GPU and its driver")
    folder = out_folder()
    folder.mkdir(parents=True, exist_ok=True)
    if phase_name in OPS:
        measure(phase_name, folder)
        return
    if phase_name in DUELS:
        fight(DUELS[phase_name], folder)
        return
    if phase_name == "tests":
        raise SystemExit(run_tests())
    if phase_name == "tuning":
        tuning(folder)
        return
    # an earlier run's duels would count as this run's
    (folder / DUELS_FILE).unlink(missing_ok=True)
    deadline = time.monotonic() + LIMIT_S
    done: list[dict[str, Any]] = []
    for index, phase in enumerate(PHASES):
        done.append(run_phase(phase, limits(deadline - time.monotonic(), PHASES[index:]), folder))
        content = {"machine": results.machine("cuda"), "versions": results.versions(), "phases": done}
        results.write(folder / "phases.json", content)
    print("\n" + summary(done, folder))
    if not all(phase["ok"] for phase in done):
        raise SystemExit(1)


def summary(done: list[dict[str, Any]], folder: Path) -> str:
    """Returns the short table at the end."""
    lines = []
    for op in OPS:
        path = folder / f"{op}.json"
        if path.exists():
            lines.append(results.table(json.loads(path.read_text())))
    lines += [versus.table(content) for content in fought(folder)]
    lines.append("")
    for phase in done:
        verdict = "ok" if phase["ok"] else "TIMED OUT" if phase["timed_out"] else f"FAILED ({phase['exit_code']})"
        lines.append(f"{phase['phase']:<16} {phase['seconds']:6.1f} s  {verdict}")
    lines.append(f"results in {folder}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
