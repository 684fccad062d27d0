"""A run killed twelve times equals an uninterrupted run bit for bit.

The kills come in every stage, during an evaluation, while the settings or a checkpoint are written, and while the
report is.
"""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file
from test_run import SMALL, SPENT

from prism.commands.run import run
from prism.config import load_config
from prism.models import tiny
from prism.models.building import build_policy
from prism.rollout import batch
from prism.runtime import runtime
from prism.runtime.checkpoint import checkpoints
from prism.runtime.log import read_metrics
from prism.runtime.runtime import Runtime, Step

HERE = Path(__file__).parent
STAGES = ("sft", "warmup", "align", "rlvr")
CHANGES = {
    "run.stages": list(STAGES),
    "run.device": "cpu",
    "rollout.align.prompts": 4,
    "rollout.rlvr.prompts": 4,
    "checkpoint.every": 2,
    **{f"optimiser.{stage}.steps": 4 for stage in STAGES},
}


def formed(found, encoder):
    """Returns the texts of rollouts, two thirds of them put into the scored format.

    An untrained policy never writes this format, so without it there is nothing to learn.
    """
    texts = encoder.tokenizer.batch_decode([r.token_ids for r in found], skip_special_tokens=True)
    whole = "<caption>{}</caption><think>Step 1: look.</think><answer>{}</answer>"
    plain = ["".join(c for c in text if c.isalnum()) for text in texts]
    return [
        whole.format(f"- {text or 'none'}", r.token_ids[0] % 3) if sum(r.token_ids) % 3 else text
        for text, r in zip(plain, found)
    ]


class Clock:
    """Counts the function calls of a run, Python's and C's, and kills it a number of calls after one of given places.

    Calls are counted instead of time, because the speed of a busy machine varies.
    """

    def __init__(self, places=(), calls=None):
        self.places, self.calls, self.count, self.left = places, calls, 0, None

    def __call__(self, frame, event, argument):
        self.count += 1
        if self.count == self.left:
            os.kill(os.getpid(), 9)

    def at(self, place):
        """Prints the place, and the number of calls since the last one."""
        os.write(1, f"{place}, {self.count}\n".encode())
        self.count = 0
        # a run that is to be killed starts counting at the place; any other counts from the beginning
        if self.calls is None or (place in self.places and self.left is None):
            self.left = self.calls
            sys.setprofile(self)


def telling(clock, name, function):
    """Returns the function with a call of `clock.at` before it."""

    def told(self, *arguments):
        clock.at(name(self, *arguments))
        return function(self, *arguments)

    return told


def run_with(clock, settings):
    """Runs, and prints each place that the run reaches: steps, checkpoints, evaluations, the report, the end."""
    batch.decode = formed
    places = {
        (Step, "__init__"): lambda self, rt, stage, index: f"{stage} {index}",
        (Runtime, "assess"): lambda self, after: f"evaluation {after}",
        (Runtime, "_save"): lambda self, inside=None: f"checkpoint {' '.join(map(str, inside or self.done[-1:]))}",
        (Runtime, "finish"): lambda self: "report",
        (runtime, "write_whole"): lambda path, text: f"write {path.name}",
    }
    for (owner, method), name in places.items():
        setattr(owner, method, telling(clock, name, getattr(owner, method)))
    status = run(load_config(None, settings))
    clock.at("end")
    return status


def forks_runs():
    """Forks a run for each line of standard input, one after the other, and prints its exit status."""
    # a fork copies no threads
    torch.set_num_threads(1)
    # training the tokenizer is most of the start-up time, and every run can share the result
    tiny.train_tokenizer = functools.cache(tiny.train_tokenizer)
    build_policy(load_config(None, SMALL))
    for line in sys.stdin:
        settings, clock = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                os._exit(run_with(Clock(*clock), settings))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        os.write(1, f"status {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n".encode())


class Driver:
    """A process that forks equal runs, each in a given folder and killed where asked."""

    def __init__(self):
        code = f"import sys; sys.path[:0] = {[str(HERE), str(HERE.parents[1])]}; import {__name__} as t; t.forks_runs()"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        self.process = subprocess.Popen([sys.executable, "-c", code], **pipes)

    def run(self, folder, *clock):
        """Returns the places that a run reached with the number of calls before each, and its exit status."""
        self.process.stdin.write(json.dumps([{**SMALL, **CHANGES, "run.folder": str(folder)}, clock]) + "\n")
        said = {}
        while True:
            text = self.process.stdout.readline().strip()
            assert text, "the driver ended early"
            if text.startswith("status"):
                return said, int(text.split()[1])
            place, calls = text.split(", ")
            said[place] = int(calls)

    def close(self):
        self.process.stdin.close()
        assert self.process.wait(20) == 0
        self.process.stdout.close()


def moments(said, rng):
    """Returns twelve moments in order: the run's places from one on, and a number of calls after it."""
    places, calls = list(said), list(said.values())
    # in each stage after its first checkpoint; twice in alignment, which has the most state
    wanted = [f"{stage} {rng.randint(2, 3)}" for stage in ("sft", "warmup", "rlvr")]
    wanted += ["align 2", "align 3", "evaluation start", "checkpoint sft 2", "checkpoint align 2", "report"]
    wanted += [f"evaluation {rng.choice(STAGES)}", "write config.json", "write changes.json"]
    # 9 / 10: the number of calls varies a little with the time spent waiting for the reward workers
    return [(places[place:], rng.randint(1, calls[place + 1] * 9 // 10)) for place in sorted(map(places.index, wanted))]


def outcome(folder):
    """Returns a run's weights, metrics without times and memory, evaluations and rollouts."""
    newest = next(checkpoints(folder / "checkpoints"))
    tensors = {
        "policy": load_file(folder / "policy" / "model.safetensors"),
        "discriminator": load_file(newest / "discriminator.safetensors"),
    }
    records = read_metrics(folder / "metrics.jsonl")
    texts = {path.name: path.read_text() for path in (folder / "rollouts").iterdir()}
    plain = [{key: value for key, value in record.items() if key not in SPENT} for record in records]
    return tensors, plain, json.loads((folder / "evaluations.json").read_text()), texts


@pytest.mark.slow
def test_a_run_killed_at_twelve_moments_resumes_to_the_same_bits(tmp_path):
    driver, rng = Driver(), random.Random(0)
    whole, end = driver.run(tmp_path / "whole")
    assert end == 0
    for places, calls in moments(whole, rng):
        said, end = driver.run(tmp_path / "killed", places, calls)
        assert (list(said)[-1], end) == (places[0], -signal.SIGKILL)
    _, end = driver.run(tmp_path / "killed")
    assert end == 0
    driver.close()
    (ours, wanted) = (outcome(tmp_path / name) for name in ("killed", "whole"))
    # each model trained both before and after its stage's first checkpoint, or the comparison would show less
    for stage, norm in (("sft", "grad_norm"), ("warmup", "d_grad_norm"), ("align", "d_grad_norm"),
                        ("align", "grad_norm"), ("rlvr", "grad_norm")):  # fmt: skip
        norms = [record[norm] or 0 for record in wanted[1] if record["stage"] == stage]
        assert max(norms[:2]) > 0 and max(norms[2:]) > 0, (stage, norm)
    for name, tensors in wanted[0].items():
        assert ours[0][name].keys() == tensors.keys()
        assert [key for key in tensors if not torch.equal(ours[0][name][key], tensors[key])] == [], name
    assert ours[1:] == wanted[1:]
