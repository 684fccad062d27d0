"""Runs of the command line on a real folder: a run of all stages, the same stopped by SIGTERM, and single commands."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from prism.runtime.log import read_metrics

ROOT = Path(__file__).parents[2]
# the shipped settings, of which only sizes, lengths and numbers of steps are changed
RECIPE = ROOT / "configs" / "qwen3vl_4b_1xh200.toml"
STAGES = ("sft", "warmup", "align", "rlvr")
# between the processor's least size, 65,536, and the largest image, 1,920,000
CAP = 100_000
SMALLER = {
    "run.device": "cpu",
    "model.max_image_pixels": CAP,
    "data.prompt_tokens": 384,
    "data.response_tokens": 96,
    "data.buffer": 16,
    "rollout.engine": "lean",
    # an alignment step is decoded in two batches
    "rollout.cache_tokens": 4096,
    "rollout.align.prompts": 4,
    "rollout.align.group": 4,
    "rollout.align.max_new_tokens": 64,
    "rollout.rlvr.prompts": 2,
    "rollout.rlvr.group": 4,
    "rollout.rlvr.max_new_tokens": 64,
    "algorithm.align.kl_coef": 0.05,
    "algorithm.align.kl_estimator": "k3",
    "algorithm.align.token_credit": "true",
    # as the recipe says how to take DAPO
    "algorithm.rlvr.name": "dapo",
    "algorithm.rlvr.kl_coef": 0.02,
    "algorithm.rlvr.kl_estimator": "k3",
    "algorithm.rlvr.overlong.buffer": 16,
    "algorithm.rlvr.dynamic_sampling.generate": 4,
    "algorithm.rlvr.dynamic_sampling.tries": 2,
    "optimiser.sft.steps": 16,
    "optimiser.sft.batch": 8,
    "optimiser.sft.lr": 4e-3,
    "optimiser.warmup.steps": 4,
    "optimiser.warmup.batch": 4,
    "optimiser.warmup.lr": 1e-3,
    "optimiser.align.steps": 7,
    "optimiser.align.batch": 8,
    "optimiser.align.lr": 1e-4,
    "optimiser.discriminator.lr": 1e-3,
    "optimiser.rlvr.steps": 3,
    "optimiser.rlvr.lr": 1e-4,
    "optimiser.rlvr.weight_decay": 0.1,
    "optimiser.rlvr.warmup": 2,
    "memory.pack_tokens": 1024,
    "checkpoint.every": 2,
    "log.rollouts_every": 1,
    "evaluation.samples": 8,
    "evaluation.every": 6,
    "evaluation.max_new_tokens": 64,
}
# the metrics of a step that differ between two equal runs
SPENT = ("seconds", "peak_bytes")
# after this step of alignment shows in metrics.jsonl, the run is stopped: past a checkpoint, and between two
STOP_AFTER = 3


@dataclass(frozen=True)
class Place:
    """Where models and data are, and the runs' folders.

    Args:
        folder: holds `policy`, `base` (of another size, to make the discriminator of), `data` and `runs`.
        files: the data files by stage and split.
    """

    folder: Path
    files: dict[str, Path]

    def run(self, name: str) -> Path:
        """Returns the folder of a run."""
        return self.folder / "runs" / name

    def arguments(self, command: str, name: str, **models: Path) -> list[str]:
        """Returns the arguments of a command with settings.

        Args:
            command: the command.
            name: name of the run.
            models: other models than those of the recipe, by key of [model].
        """
        chosen = {"policy": self.folder / "policy", "discriminator": self.folder / "base", **models}
        settings = {
            **SMALLER,
            "run.folder": self.run(name),
            **{f"model.{key}": path for key, path in chosen.items()},
            **{f"data.files.{use}": path for use, path in self.files.items()},
        }
        flags = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        return [command, "--config", str(RECIPE), *flags]


def start(arguments: list[str], log: Path) -> subprocess.Popen:
    """Starts `python -m prism`, whose output goes to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with log.open("a") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "prism", *arguments],
            cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip


def prism(arguments: list[str], log: Path) -> str:
    """Runs a command to its end, and returns what it printed."""
    status = start(arguments, log).wait(timeout=600)
    said = log.read_text()
    assert status == 0, f"prism {arguments[0]} ended with {status}:\n{said[-6000:]}"
    return said


def run_whole(place: Place) -> Path:
    """Runs all stages, and returns the run's folder."""
    prism(place.arguments("run", "whole"), place.folder / "logs" / "whole.txt")
    return place.run("whole")


@dataclass(frozen=True)
class Stopped:
    """A run that SIGTERM stopped, and that was resumed."""

    folder: Path
    # a copy of the folder as the stopped run left it
    halted: Path
    # exit status and output of the stopped run
    status: int
    said: str
    # output of the resumed run
    resumed: str


def stop_and_resume(place: Place, command: str, name: str, **models: Path) -> Stopped:
    """Runs a command, stops it in alignment by SIGTERM, resumes it to its end, and returns what was seen."""
    folder, log = place.run(name), place.folder / "logs" / f"{name}.txt"
    arguments = place.arguments(command, name, **models)
    process = start(arguments, log)
    limit = time.monotonic() + 600
    while ("align", STOP_AFTER) not in steps(folder):
        assert process.poll() is None and time.monotonic() < limit, log.read_text()[-6000:]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    status = process.wait(timeout=60)
    halted = shutil.copytree(folder, folder.with_name(f"{name}-halted"))
    resumed = prism(arguments, log.with_name(f"{name}-resumed.txt"))
    return Stopped(folder, halted, status, log.read_text(), resumed)


def run_stopped(place: Place) -> Stopped:
    """Runs all stages, with a stop in alignment."""
    return stop_and_resume(place, "run", "stopped")


@dataclass(frozen=True)
class Used:
    """What the commands that read a run printed and wrote."""

    # figures of `prism eval` on the test split
    figures: dict
    exported: Path
    # output by command
    said: dict[str, str]


def use_run(place: Place, run: Path) -> Used:
    """Checks the settings, evaluates and exports a run's policy, writes its report, and calls doctor."""
    out, exported = place.folder / "figures.json", place.folder / "exported"
    longest = str(SMALLER["evaluation.max_new_tokens"])
    test = ["--data", str(place.files["test"]), "--max_new_tokens", longest]
    commands = {
        "dry-run": [*place.arguments("run", "dry"), "--dry-run"],
        "eval": ["eval", "--model", str(run / "policy"), *test, "--out", str(out)],
        "export": ["export", "--run", str(run), "--to", str(exported)],
        "report": ["report", "--run", str(run)],
        "doctor": ["doctor", "--model", str(place.folder / "policy"), "--data", str(place.files["sft"])],
    }
    said = {name: prism(arguments, place.folder / "logs" / f"{name}.txt") for name, arguments in commands.items()}
    return Used(json.loads(out.read_text()), exported, said)


@dataclass(frozen=True)
class Single:
    """The stages as single commands, each with the models of the one before; alignment was stopped and resumed."""

    # by command
    folders: dict[str, Path]
    align: Stopped


def run_single(place: Place) -> Single:
    """Runs the stages by single commands, with a stop in alignment."""
    folders = {name: place.run(f"single-{name}") for name in ("upcycle", *STAGES)}
    policy, discriminator = folders["sft"] / "policy", folders["warmup"] / "discriminator"

    def command(name: str, **models: Path) -> None:
        prism(place.arguments(name, f"single-{name}", **models), place.folder / "logs" / f"single-{name}.txt")

    command("upcycle")
    command("sft")
    command("warmup", policy=policy, discriminator=folders["upcycle"] / "discriminator")
    align = stop_and_resume(place, "align", "single-align", policy=policy, discriminator=discriminator)
    command("rlvr", policy=folders["align"] / "policy")
    return Single(folders, align)


def steps(folder: Path) -> set[tuple[str, int]]:
    """Returns the steps of which metrics.jsonl has a record."""
    path = folder / "metrics.jsonl"
    return {(record["stage"], record["step"]) for record in read_metrics(path)} if path.exists() else set()


def records_of(folder: Path) -> list[dict]:
    """Returns the records of metrics.jsonl without times and memory."""
    return [
        {key: value for key, value in record.items() if key not in SPENT}
        for record in read_metrics(folder / "metrics.jsonl")
    ]


def evaluations_of(folder: Path) -> dict:
    """Returns the figures on held-out problems."""
    return json.loads((folder / "evaluations.json").read_text())


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a model's folder."""
    files = sorted(folder.glob("*.safetensors"))
    assert files, folder
    return {name: value for file in files for name, value in load_file(file).items()}


def different(ours: Path, other: Path) -> list[str]:
    """Returns the names of the tensors in which two folders of models differ."""
    a, b = weights_of(ours), weights_of(other)
    assert a.keys() == b.keys()
    return [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]
