"""Custom rewards: their values and failures, the settings that name them, and a run with them."""

import json
import math
import re
import time
from dataclasses import fields
from pathlib import Path

import pytest
from test_run import SMALL

from prism import cli
from prism.config import ConfigError, load_config, parse_overrides, to_toml
from prism.rewards import ProblemView, RolloutView, Workers, join_rewards, rewards_of, score_batch
from prism.rewards.custom import MOST_KEPT, call_reward, find_unusable_rewards
from prism.runtime.log import read_metrics

MODULE = """
import os, time
from pathlib import Path

LIMIT = 5
nameless = lambda rollout, problem: 1.0

def short(rollout, problem):
    if rollout.text == "hang":
        time.sleep(60)
    if rollout.text == "crash":
        os._exit(1)
    if rollout.text == "none":
        return None
    if rollout.text == "bad":
        raise KeyError("lost")
    return rollout.tokens <= 3

def read(rollout, problem):
    return float("inf") if rollout.sections is None else float(rollout.answer == problem.data_source)

def text(rollout, problem):
    return "1.0"

def huge(rollout, problem):
    return 1e30

def one_argument(rollout):
    return 0.0

class Judge:
    def kind(rollout, problem):
        return len(problem.prompt)

# each of a run's first calls fails in another way, one by giving no value
def unlucky(rollout, problem):
    for deed in ("hang", "crash", "error", "infinite", "none"):
        try:
            os.close(os.open(Path(__file__).with_name(deed), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        if deed == "hang":
            time.sleep(60)
        if deed == "crash":
            os.abort()
        if deed == "error":
            raise KeyError("lost")
        return float("inf") if deed == "infinite" else None
    return 2

def length(rollout, problem):
    assert problem.data_source.startswith("shapes/") and problem.id and problem.ground_truth and problem.prompt
    return rollout.tokens
"""
PROBLEM = ProblemView("row 1", "How many?", "3", (), "stars")


def response(answer):
    return f"<caption>c</caption><think>t</think><answer>{answer}</answer>"


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "custom_rewards_example.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return "custom_rewards_example"


def test_failures_cost_one_rollout_one_reward(module, tmp_path):
    texts = ["abc", "abcdef", "none", "hang", "crash", "bad", response("stars"), response("3")]
    custom = {"short": (f"{module}:short", 0.5), "read": (f"{module}:read", 2.0)}
    with Workers(2) as pool:
        rewards = rewards_of(
            texts, [len(text) for text in texts], [PROBLEM] * 8, custom, workers=pool, timeout_s=3, verifier_weight=10
        )
    assert rewards.by_name["short"] == [1.0, 0.0, None, None, None, None, 0.0, 0.0]
    assert rewards.by_name["read"] == [None] * 6 + [1.0, 0.0]
    assert rewards.total == [0.5, 0, 0, 0, 0, 0, 10 * 0.2 + 2.0, 10.0]
    assert [verdict.accuracy for verdict in rewards.verdicts] == [0.0] * 7 + [1.0]
    causes = [(failure.name, failure.cause, failure.rollout.text) for failure in rewards.failures]
    expected = [("timeout", "hang"), ("crash", "crash"), ("error", "bad")]
    assert causes == [("short", *one) for one in expected] + [("read", "not_finite", text) for text in texts[:6]]
    assert "KeyError: 'lost'" in rewards.failures[2].detail
    assert rewards.metrics() == {
        "reward_short": 1 / 4,
        "reward_read": 0.5,
        "failed_rewards": {"timeout": 1, "crash": 1, "error": 1, "not_finite": 6},
    }
    rewards.write_failures(tmp_path / "new" / "failures.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "new" / "failures.jsonl").read_text().splitlines()]
    assert [line["cause"] for line in lines] == [failure.cause for failure in rewards.failures]
    assert lines[0]["rollout"] == {"text": "hang", "tokens": 4, "accuracy": 0.0}
    assert lines[0]["problem"]["id"] == "row 1" and lines[0]["name"] == "short"
    # a selection keeps all failures: their samples are to be seen
    part = rewards.select([6, 0])
    assert (part.total, part.by_name) == ([4.0, 0.5], {"short": [0.0, 1.0], "read": [1.0, None]})
    assert part.failures == rewards.failures
    both = join_rewards([part, rewards])
    assert both.total == part.total + rewards.total and len(both.failures) == 2 * len(rewards.failures)
    assert both.by_name["read"] == [1.0, None, *rewards.by_name["read"]]
    many = rewards._replace(failures=rewards.failures * MOST_KEPT)
    many.write_failures(tmp_path / "many.jsonl")
    assert len((tmp_path / "many.jsonl").read_text().splitlines()) == MOST_KEPT


def test_without_custom_rewards_the_total_is_the_score():
    texts = [response("3"), response("4"), "3"]
    rewards = rewards_of(texts, [9, 9, 1], [PROBLEM] * 3, {})
    assert rewards.verdicts == score_batch(texts, ["3"] * 3)
    assert rewards.total == [verdict.score for verdict in rewards.verdicts]
    assert rewards.metrics() == {} and rewards.failures == []


def test_a_reward_that_applies_nowhere_has_no_mean(module):
    with Workers(1) as pool:
        rewards = rewards_of(["none"], [1], [PROBLEM], {"short": (f"{module}:short", 1.0)}, workers=pool)
    assert rewards.metrics() == {"reward_short": None, "failed_rewards": {}} and rewards.total == [0.0]


def test_the_page_lists_what_a_reward_sees():
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    for name, view in (("rollout", RolloutView), ("problem", ProblemView)):
        (row,) = re.findall(rf"^\| `{name}` \| (.*) \|$", page, re.MULTILINE)
        properties = {key for key, value in vars(view).items() if isinstance(value, property)}
        # the sections' own names stand in brackets
        listed = set(re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", row)))
        assert listed == {field.name for field in fields(view)} | properties


def test_texts_and_problems_must_be_as_many():
    with pytest.raises(ValueError, match="rewards_of: expected problems for each of the 2 texts, got 1"):
        rewards_of(["a", "b"], [1, 1], [PROBLEM], {})


FRAGILE = """
import os
from pathlib import Path

def one(rollout, problem):
    if rollout.text == "crash":
        {deed}
        os.abort()
    return 1.0
"""


def ask_fragile(tmp_path, monkeypatch, deed, name, **options):
    """Returns the rewards by a module that changes in its first call, in which its worker crashes."""
    (tmp_path / f"{name}.py").write_text(FRAGILE.format(deed=deed))
    monkeypatch.syspath_prepend(tmp_path)
    texts = ["a", "crash", "b", response("3")]
    with Workers(1, preload=[name], required=False, **options) as pool:
        return rewards_of(texts, [1] * 4, [PROBLEM] * 4, {"one": (f"{name}:one", 1.0)}, workers=pool, timeout_s=2)


# what the module has become when its worker is replaced, and why no later call has a value
@pytest.mark.parametrize(
    ("name", "deed", "cause"),
    [
        ("gone_reward", "os.unlink(__file__)", "error: ImportError: expected module 'gone_reward' of"),
        ("half_reward", "Path(__file__).write_text('def one(')", "error: ImportError: expected module 'half_reward'"),
        ("poor_reward", "Path(__file__).write_text('import no_such')", "error: ImportError: expected 'no_such', which"),
        ("exit_reward", "Path(__file__).write_text('raise SystemExit(3)')", "error: SystemExit: 3"),
        ("dead_reward", "Path(__file__).write_text('import os; os.abort()')", "crash: the process ended with status"),
    ],
)
def test_a_module_that_cannot_be_imported_again_costs_samples(tmp_path, monkeypatch, name, deed, cause):
    rewards = ask_fragile(tmp_path, monkeypatch, deed, name)
    assert rewards.by_name["one"] == [1.0, None, None, None]
    assert [verdict.accuracy for verdict in rewards.verdicts] == [0.0, 0.0, 0.0, 1.0]
    causes = [f"{failure.cause}: {failure.detail.strip().splitlines()[-1]}" for failure in rewards.failures]
    assert causes[0] == "crash: the process ended with status -6"
    assert len(causes) == 3 and all(one.startswith(cause) for one in causes[1:]), causes


# eight seconds of waiting
@pytest.mark.full
def test_a_module_that_hangs_at_its_second_import_is_waited_for_once(tmp_path, monkeypatch):
    deed = "Path(__file__).write_text('import time; time.sleep(60)')"
    begun = time.monotonic()
    rewards = ask_fragile(tmp_path, monkeypatch, deed, "slow_reward", start_seconds=4)
    assert [failure.cause for failure in rewards.failures] == ["crash", "timeout", "timeout"]
    # one start of 4 s and two calls of 2 s
    assert time.monotonic() - begun < 20


def test_a_module_that_is_whole_again_is_used_again(tmp_path, monkeypatch):
    path = tmp_path / "healed_reward.py"
    (tmp_path / "whole.txt").write_text("def one(rollout, problem): return 2.0\n")
    # the first call after the crash finds no module, and a second reward puts it back
    (tmp_path / "healer.py").write_text(
        f"import shutil\ndef heal(rollout, problem): shutil.copy({str(tmp_path / 'whole.txt')!r}, {str(path)!r})\n"
    )
    path.write_text(FRAGILE.format(deed="os.unlink(__file__)"))
    monkeypatch.syspath_prepend(tmp_path)
    custom = {"one": ("healed_reward:one", 1.0), "heal": ("healer:heal", 1.0)}
    with Workers(1, preload=["healed_reward", "healer"], required=False) as pool:
        first, second = (
            rewards_of(texts, [1, 1], [PROBLEM] * 2, custom, workers=pool, timeout_s=20).by_name["one"]
            for texts in (["crash", "b"], ["c", "d"])
        )
    assert first == [None, None] and second == [2.0, 2.0]


def test_values_are_finite_numbers(module):
    rollout = RolloutView(response("3"), 9, 1.0)
    assert call_reward(f"{module}:Judge.kind", rollout, PROBLEM) == (9.0, "", "")
    with pytest.raises(TypeError, match=f"{module}:text: expected a reward to be a float or None, got str"):
        call_reward(f"{module}:text", rollout, PROBLEM)
    value, cause, detail = call_reward(f"{module}:huge", rollout, PROBLEM)
    assert (value, cause) == (None, "not_finite") and "below 1e+18 in size, got 1e+30" in detail


def test_rewards_that_cannot_be_called(module, tmp_path):
    (tmp_path / "broken_rewards.py").write_text("1 / 0")
    (tmp_path / "crashing_rewards.py").write_text("import os; os.abort()")
    (tmp_path / "needing_rewards.py").write_text("import no_such_dependency")
    expected = {
        f"{module}:short": None,
        "no_such_package.rewards:short": "no module named 'no_such_package'; install it or put its folder on",
        f"{module}:long": f"expected 'long' in '{module}', got only Judge, Path, huge, length",
        f"{module}:LIMIT": f"expected '{module}:LIMIT' to be callable, got int",
        f"{module}:one_argument": "to be callable as reward(rollout, problem), got (rollout)",
        f"{module}:nameless": "expected a function with a name at 'custom_rewards_example:nameless', got a lambda",
        "broken_rewards:one": "expected module 'broken_rewards' of 'broken_rewards:one' to be importable, "
        "got ZeroDivisionError: division by zero",
        "needing_rewards:one": "expected 'no_such_dependency', which module 'needing_rewards' of 'needing_rewards:",
        "crashing_rewards:one": "expected 'crashing_rewards:one' to be importable, got crash: the process ended with",
    }
    problems = find_unusable_rewards(list(expected))
    for problem, part in zip(problems, filter(None, expected.values()), strict=True):
        assert part in problem


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["rewards", "lambda r, p: 1"], 'expected import paths like "package.module:function", got \'lambda r'),
        (["rewards", "short"], "expected import paths like \"package.module:function\", got 'short'"),
        (["rewards", "a:short,b:short"], "rewards: expected functions of different names, got a:short, b:short"),
        (
            ["rewards", "a:b", "reward_weights", "1,2"],
            "reward_weights: expected one for each of the 1 rewards, or none, g",
        ),
        (["reward_weights", "0.5"], "reward_weights: expected one for each of the 0 rewards, or none, got 1"),
        (["rewards", "a:b", "reward_weights", "inf"], "reward_weights: expected a finite number, got inf"),
        (["verifier_weight", "-1"], "verifier_weight: expected a number greater than or equal to 0, got -1"),
    ],
)
def test_bad_settings_name_the_key(flags, message):
    flags = [f"--algorithm.rlvr.{flag}" if i % 2 == 0 else flag for i, flag in enumerate(flags)]
    with pytest.raises(ConfigError) as error:
        load_config(None, parse_overrides(flags))
    assert "algorithm.rlvr." in str(error.value) and message in str(error.value)


def test_settings_of_rewards(tmp_path):
    flags = ["--algorithm.rlvr.rewards", "a.b:c", "--algorithm.rlvr.reward_weights", "-0.5"]
    config = load_config(None, parse_overrides(flags))
    assert config.algorithm.rlvr.custom_rewards == {"c": ("a.b:c", -0.5)}
    (tmp_path / "same.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "same.toml") == config
    two = load_config(None, {"algorithm.rlvr.rewards": ["a:b", "a:C.d"]})
    assert two.algorithm.rlvr.custom_rewards == {"b": ("a:b", 1.0), "d": ("a:C.d", 1.0)}
    assert load_config().algorithm.rlvr.custom_rewards == {}


def command(folder, *flags):
    settings = {**SMALL, "run.folder": str(folder), "optimiser.rlvr.steps": 1}
    del settings["run.stages"]
    return ["rlvr", *(part for key, value in settings.items() for part in (f"--{key}", str(value))), *flags]


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_a_missing_function_is_told_before_a_model_is_loaded(module, tmp_path, capsys, flags):
    reward = ["--algorithm.rlvr.rewards", f"{module}:length,{module}:missing"]
    assert cli.main(command(tmp_path / "run", *reward, *flags)) == 2
    message = f"prism rlvr: algorithm.rlvr.rewards: expected 'missing' in '{module}', got only "
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    # other stages do without them
    assert cli.main(["sft", *command(tmp_path / "run", *reward, "--dry-run")[1:]]) == 0


def test_a_run_with_custom_rewards_survives_their_failures(module, tmp_path):
    given = {"rewards": f"{module}:length,{module}:unlucky", "reward_weights": "0.5,3", "verifier_weight": "0"}
    flags = [part for key, value in given.items() for part in (f"--algorithm.rlvr.{key}", value)]
    assert cli.main(command(tmp_path / "run", *flags)) == 0
    (metrics,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert metrics["reward_length"] == pytest.approx(metrics["length"])
    # of six rollouts four failed and one had no value
    assert metrics["reward_unlucky"] == 2.0
    assert metrics["failed_rewards"] == {"timeout": 1, "crash": 1, "error": 1, "not_finite": 1}
    assert metrics["reward"] == pytest.approx(0.5 * metrics["length"] + 3 * 2 / 6)
    assert math.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    rollouts = [json.loads(line) for line in (tmp_path / "run/rollouts/rlvr-000001.jsonl").read_text().splitlines()]
    assert sorted(rollout["reward_unlucky"] is None for rollout in rollouts) == [False, *[True] * 5]
    failed = [json.loads(line) for line in (tmp_path / "run/failed_rewards/rlvr-000001.jsonl").read_text().splitlines()]
    assert {line["cause"] for line in failed} == set(metrics["failed_rewards"])
    assert {line["rollout"]["text"] for line in failed} <= {rollout["response"] for rollout in rollouts}
