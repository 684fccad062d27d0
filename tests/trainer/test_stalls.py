"""A run that waits too long says what for."""

import functools
import re
import sys
import time

import pytest

pytest.importorskip("transformers")

from test_run import SMALL

from prism.commands.run import run
from prism.config import load_config
from prism.models import tiny
from prism.runtime import checkpoint
from prism.runtime.runtime import Runtime
from prism.runtime.stalls import StallWatch, waiting_for

SLOW = """
import time
def slow(rollout, problem):
    time.sleep(0.5)
    return 1.0
"""


def waited(seconds, *what):
    """Waits inside some waits, and returns the messages of a watch of 0.1 s."""
    said = []
    with StallWatch(0.1, said.append):
        nested(seconds, list(what))
    return said


def nested(seconds, what):
    if not what:
        time.sleep(seconds)
        return
    with waiting_for(what.pop(0)):
        nested(seconds, what)


def test_a_wait_is_named_once_each_period_with_its_time():
    said = waited(0.6, "step 3 of align", lambda: "rollouts of p1")
    times = [float(re.match(r"step 3 of align has taken (\S+) s; waiting for rollouts of p1, for", s)[1]) for s in said]
    periods = [int(now / 0.1) for now in times]
    # a busy machine may delay a message, but no period has two
    assert 2 <= len(periods) <= 6 and periods[0] >= 1 and periods == sorted(set(periods))


def test_short_waits_and_no_waits_are_silent():
    assert waited(0.3) == []
    said = []
    with StallWatch(0.5, said.append):
        for number in range(12):
            with waiting_for(f"step {number}"):
                time.sleep(0.05)
    assert said == []


def test_a_wait_that_an_earlier_run_left_and_one_that_cannot_be_named_do_no_harm():
    left = waiting_for("a generator that was never closed")
    left.__enter__()
    assert waited(0.3) == []
    assert "something that cannot be named: ZeroDivisionError" in waited(0.15, lambda: 1 / 0)[0]
    left.__exit__(None, None, None)


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "train_tokenizer", functools.cache(tiny.train_tokenizer))
    changes = {"run.folder": str(tmp_path / "run"), "run.stages": ["rlvr"], "optimiser.rlvr.steps": 1}
    return {**SMALL, **changes, "log.console": "lines", "log.stall_seconds": 0.3}


def test_a_slow_reward_is_named_with_its_problem(tmp_path, settings, monkeypatch, capsys):
    (tmp_path / "slow_reward.py").write_text(SLOW)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert run(load_config(None, {**settings, "algorithm.rlvr.rewards": ["slow_reward:slow"]})) == 0
    told = capsys.readouterr().out
    stalls = re.findall(
        r"step 1 of rlvr has taken \S+ s; waiting for (\d) of 6 calls; now (.*), for \S+ s; in (.*)", told
    )
    named = [one for one in stalls if one[1].startswith("slow_reward:slow for rl-0-00")]
    assert named and all(place.startswith("prism/rewards/workers.py, line ") for *_, place in named)


def test_slow_rollouts_data_and_checkpoints_are_named(settings, monkeypatch, capsys):
    def slowed(function):
        @functools.wraps(function)
        def slow(*arguments, **named):
            time.sleep(0.45)
            return function(*arguments, **named)

        return slow

    monkeypatch.setattr(Runtime, "assess", lambda self, after: self.evaluations.update({after: {"samples": 0}}))
    monkeypatch.setattr(checkpoint, "save", slowed(checkpoint.save))
    from prism.rollout.engine import Engine
    from prism.worlds.shapes.problems import ShapesProblems

    monkeypatch.setattr(Engine, "generate", slowed(Engine.generate))
    monkeypatch.setattr(ShapesProblems, "take", slowed(ShapesProblems.take))
    assert run(load_config(None, settings)) == 0
    told = capsys.readouterr().out
    assert "waiting for problems, data.shapes, rl, for " in told
    assert re.search(r"waiting for 3 rollouts of each of 2 problems \(rl-0-\d+, rl-0-\d+\), for ", told)
    assert re.search(r"a checkpoint in .*/checkpoints has taken ", told)
