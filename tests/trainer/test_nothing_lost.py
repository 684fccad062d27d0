"""However often a run is interrupted: no prompt is skipped or repeated, and no response counts more for its length."""

import functools
import random
from collections import Counter
from itertools import chain

import pytest

pytest.importorskip("transformers")

import torch
from shapes_files import write_problems, write_sft
from test_run import SMALL

from prism.commands.run import run_stages
from prism.config import load_config
from prism.models import tiny
from prism.rollout import engine
from prism.runtime import checkpoint
from prism.runtime.runtime import Runtime, Step
from prism.runtime.signals import InterruptedRunError
from prism.stages import align, rlvr, sft
from prism.worlds.shapes.world import ShapesWorld

# the rows of each stage's file: no step ends with an epoch
ROWS = {"sft": 9, "align": 7, "rlvr": 11}
CHANGES = {
    **SMALL,
    "run.stages": ["sft", "warmup", "align", "rlvr"],
    "data.source": "files",
    "data.buffer": 4,
    "optimiser.sft.steps": 6,
    "optimiser.warmup.steps": 4,
    "optimiser.align.steps": 6,
    "optimiser.rlvr.steps": 5,
    "rollout.align.prompts": 3,
    "rollout.rlvr.prompts": 2,
    "algorithm.rlvr.name": "dapo",
    "algorithm.rlvr.overlong": "none",
    "algorithm.rlvr.dynamic_sampling.generate": 3,
    "algorithm.rlvr.dynamic_sampling.tries": 3,
    "checkpoint.every": 2,
}


class KilledError(BaseException):
    """Ends a run where it is raised, as a kill does."""


class Ledger:
    """Notes what each step drew and was trained on, and ends a run at a given event.

    The events are what a step passes through; sampling a token is one, so that a run also ends when short responses
    of a step are finished and long ones are not.
    """

    def __init__(self, patch):
        self.drawn, self.trained, self.events = {}, {}, []
        # the number of the event at which the run ends, and whether it may finish its step
        self.end, self.softly, self.one, self.step = None, False, None, None
        for owner, name in ((sft, "imitate"), (align, "policy_update"), (rlvr, "policy_update"),
                            (rlvr, "reward_rollouts"), (engine, "choose"), (checkpoint, "save")):  # fmt: skip
            patch.setattr(owner, name, self.watched(name, getattr(owner, name)))
        patch.setattr(Step, "batches", self.noting(Step.batches))

    def event(self, name):
        self.events.append(name)
        if len(self.events) == self.end:
            if not self.softly:
                raise KilledError
            self.one.ask_to_stop()

    def watched(self, name, function):
        @functools.wraps(function)
        def call(*arguments, **named):
            self.event(name)
            result = function(*arguments, **named)
            if name in ("imitate", "policy_update"):
                self.note(self.trained, [self.used(arguments)])
            self.event(f"{name} ended")
            return result

        return call

    def used(self, arguments):
        """Returns the prompts of an update, and the responses with their lengths."""
        given = arguments[1]
        if isinstance(given, list):
            return [problem.name for problem in given]
        owners = [given.problems[rollout.prompt].name for rollout in given.rollouts]
        return list(zip(owners, given.lengths.tolist(), given.texts))

    def noting(self, batches):
        def draw(step, count, most=1):
            self.step, parts = (step.stage, step.index), []
            for part in batches(step, count, most):
                parts.append([problem.name for problem in part])
                self.note(self.drawn, parts)
                self.event("drawn")
                yield part

        return draw

    def note(self, notes, value):
        """Notes something of the present step; a step that is repeated after a kill must do the same again."""
        before = notes.get(self.step, [])
        same = min(len(before), len(value))
        assert before[:same] == value[:same], self.step
        notes[self.step] = max(before, list(value), key=len)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    world = ShapesWorld(3)
    write_sft(folder / "sft.jsonl", world.samples("sft", ROWS["sft"]))
    write_problems(folder / "align.parquet", world.samples("alignment", ROWS["align"]))
    write_problems(folder / "rlvr.jsonl", world.samples("rl", ROWS["rlvr"]))
    return {f"data.files.{path.stem}": [str(path)] for path in folder.iterdir() if path.suffix}


@pytest.fixture
def patched(monkeypatch):
    """Responses of many lengths, and rewards that differ in some groups only."""
    monkeypatch.setattr(tiny, "train_tokenizer", functools.cache(tiny.train_tokenizer))
    special = engine.Engine.banned_token_ids

    def stops(self, stop_token_ids):
        return frozenset(set(range(0, self._vocabulary, 6)) - special(self, ()))

    reward = rlvr.reward_rollouts

    def rewarded(batch, config):
        result = reward(batch, config)
        total = torch.tensor([float(rollout.token_ids[0] % 7 == 0) for rollout in batch.rollouts])
        return result._replace(total=total, compared=total)

    monkeypatch.setattr(engine.Engine, "_stops", stops)
    monkeypatch.setattr(rlvr, "reward_rollouts", rewarded)
    return monkeypatch


def goes_on(ledger, config):
    """Runs once, and returns whether the run came to its end."""
    with Runtime(config) as one:
        ledger.one = one
        try:
            run_stages(one)
        except (KilledError, InterruptedRunError):
            return False
    return True


def settings(files, folder):
    return load_config(None, {**CHANGES, **files, "run.folder": str(folder)})


def test_an_interrupted_run_loses_and_repeats_no_prompt_and_no_response(files, patched, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        whole = Ledger(patch)
        assert goes_on(whole, settings(files, tmp_path / "whole"))
    # the tries of dynamic sampling differ in number, and responses in length
    assert len({len(parts) for (stage, _), parts in whole.drawn.items() if stage == "rlvr"}) > 1
    lengths = [length for (stage, _), (used,) in whole.trained.items() if stage != "sft" for _, length, _ in used]
    assert len(set(lengths)) > 5 and min(lengths) < 4 and max(lengths) == 12
    parts, rng, ends = Ledger(patched), random.Random(1), Counter()
    for number in range(14):
        parts.events, parts.softly = [], number % 3 == 0
        parts.end = rng.randint(1, len(whole.events) // 6)
        if goes_on(parts, settings(files, tmp_path / "parts")):
            break
        ends["stopped" if parts.softly else parts.events[-1]] += 1
    parts.end = None
    assert goes_on(parts, settings(files, tmp_path / "parts"))
    assert ends.total() >= 10 and {"choose", "stopped"} <= {*ends}
    assert parts.drawn == whole.drawn
    assert parts.trained == whole.trained
    # each prompt once in each epoch, also where a batch crosses the end of one
    for stage, rows in {**ROWS, "warmup": ROWS["align"]}.items():
        steps = sorted(index for name, index in parts.drawn if name == stage)
        assert steps == list(range(CHANGES[f"optimiser.{stage}.steps"]))
        order = list(chain.from_iterable(chain.from_iterable(parts.drawn[stage, index]) for index in steps))
        assert len(order) > 1.5 * rows and len(set(order)) == rows
        for start in range(0, len(order), rows):
            epoch = order[start : start + rows]
            assert len(set(epoch)) == len(epoch), stage
