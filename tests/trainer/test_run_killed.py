"""A run that is killed ten times, in every stage, while it evaluates, writes a checkpoint and its report, ends as the
undisturbed one does: bit for bit."""

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
    """What an untrained policy says, put into the form that is scored, mostly: otherwise there is nothing to learn."""
    texts = encoder.tokenizer.batch_decode([r.token_ids for r in found], skip_special_tokens=True)
    whole = "<caption>{}</caption><think>Step 1: look.</think><answer>{}</answer>"
    plain = ["".join(c for c in text if c.isalnum()) for text in texts]
    return [
        whole.format(f"- {text or 'none'}", r.token_ids[0] % 3) if sum(r.token_ids) % 3 else text
        for text, r in zip(plain, found)
    ]


class Clock:
    """Counts what a run calls, Python's functions and C's, and kills it at a number of them behind one of some places.

    A time would be another moment on a machine that does something else besides.
    """

    def __init__(self, places=(), calls=None):
        self.places, self.calls, self.count, self.left = places, calls, 0, None

    def __call__(self, frame, event, argument):
        self.count += 1
        if self.count == self.left:
            os.kill(os.getpid(), 9)

    def at(self, place):
        """Says the place, and how much was called since the last one."""
        os.write(1, f"{place}, {self.count}\n".encode())
        self.count = 0
        # to kill, counting begins at the place; a run that is not killed counts throughout
        if self.calls is None or (place in self.places and self.left is None):
            self.left = self.calls
            sys.setprofile(self)


def telling(clock, name, function):
    """The function, which says what it begins with."""

    def told(self, *arguments):
        clock.at(name(self, *arguments))
        return function(self, *arguments)

    return told


def run_with(clock, settings):
    """Runs, and says the places: steps, checkpoints, evaluations, the end."""
    batch.decode = formed
    places = {
        (Step, "__init__"): lambda self, rt, stage, index: f"{stage} {index}",
        (Runtime, "assess"): lambda self, after: f"evaluation {after}",
        (Runtime, "_save"): lambda self, inside=None: f"checkpoint {' '.join(map(str, inside or self.done[-1:]))}",
        (Runtime, "finish"): lambda self: "report",
    }
    for (owner, method), name in places.items():
        setattr(owner, method, telling(clock, name, getattr(owner, method)))
    status = run(load_config(None, settings))
    clock.at("end")
    return status


def forks_runs():
    """Starts a run for each line that it reads, one after the other, and says its end."""
    # a fork copies no threads
    torch.set_num_threads(1)
    # the same for every run, and most of what it takes to begin one
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
    """Runs in the folders of a test, the same but for the kills."""

    def __init__(self):
        code = f"import sys; sys.path[:0] = {[str(HERE), str(HERE.parents[1])]}; import {__name__} as t; t.forks_runs()"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        self.process = subprocess.Popen([sys.executable, "-c", code], **pipes)

    def run(self, folder, *clock):
        """Returns the places that a run came to, how much it called before each, and its exit status."""
        self.process.stdin.write(json.dumps([{**SMALL, **CHANGES, "run.folder": str(folder)}, clock]) + "\n")
        said = {}
        while True:
            text = self.process.stdout.readline().strip()
            assert text, "the driver has ended"
            if text.startswith("status"):
                return said, int(text.split()[1])
            place, calls = text.split(", ")
            said[place] = int(calls)

    def close(self):
        self.process.stdin.close()
        assert self.process.wait(20) == 0
        self.process.stdout.close()


def moments(said, rng):
    """Ten moments in their order: a place of the run with those behind it, and how many calls later."""
    places, calls = list(said), list(said.values())
    # from within each stage, behind its first checkpoint; alignment, which holds most, twice
    wanted = [f"{stage} {rng.randint(2, 3)}" for stage in ("sft", "warmup", "rlvr")]
    wanted += ["align 2", "align 3", "evaluation start", "checkpoint sft 2", "checkpoint align 2", "report"]
    wanted += [f"evaluation {rng.choice(STAGES)}"]
    # a little is called more or less often, waiting for the workers of the rewards
    return [(places[place:], rng.randint(1, calls[place + 1] * 9 // 10)) for place in sorted(map(places.index, wanted))]


def outcome(folder):
    """All that a run leaves but times and memory: weights, metrics, evaluations, rollouts."""
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
def test_a_run_killed_at_ten_moments_goes_on_to_the_same_bits(tmp_path):
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
    # all of it was trained before and behind a stage's first checkpoint, otherwise the comparison says less
    for stage, norm in (("sft", "grad_norm"), ("warmup", "d_grad_norm"), ("align", "d_grad_norm"),
                        ("align", "grad_norm"), ("rlvr", "grad_norm")):  # fmt: skip
        norms = [record[norm] or 0 for record in wanted[1] if record["stage"] == stage]
        assert max(norms[:2]) > 0 and max(norms[2:]) > 0, (stage, norm)
    for name, tensors in wanted[0].items():
        assert ours[0][name].keys() == tensors.keys()
        assert [key for key in tensors if not torch.equal(ours[0][name][key], tensors[key])] == [], name
    assert ours[1:] == wanted[1:]
