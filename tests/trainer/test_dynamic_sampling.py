"""Which groups dynamic sampling keeps, and the share that the metric `informative` reports."""

from types import SimpleNamespace

import pytest
import torch
from stage_cases import FixedRun

from prism.config import load_config
from prism.data.problem import Problem
from prism.models.prompts import EncodedPrompt
from prism.rollout.batch import RolloutBatch
from prism.rollout.engine import Rollout
from prism.stages import rlvr

RIGHT, BROKEN = "<caption>c</caption><think>t</think><answer>4</answer>", "5"
WRONG = RIGHT.replace("4", "5")

# a module of its own, since workers import it
REWARDS = """
def evens_out(rollout, problem):
    return 0.0 if rollout.accuracy else 0.8

def brief(rollout, problem):
    return float(rollout.tokens < 15)
"""


def played(*groups):
    """A batch of groups, each a list of (response, number of tokens)."""
    rollouts = [
        Rollout(prompt, index, [0] * tokens, torch.zeros(tokens), torch.zeros(tokens), "stop")
        for prompt, group in enumerate(groups)
        for index, (_, tokens) in enumerate(group)
    ]
    texts = [text for group in groups for text, _ in group]
    problems = [Problem(f"p{i}", "?", answer="4") for i in range(len(groups))]
    return RolloutBatch(problems, [EncodedPrompt([], None, None)] * len(groups), rollouts, texts)


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    (tmp_path / "sampling_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    return "sampling_rewards"


# all right or all wrong: of different lengths, or of different forms
SAME = [[(RIGHT, 10), (RIGHT, 20)], [(WRONG, 10), (WRONG, 20)], [(WRONG, 10), (BROKEN, 10)]]
MIXED = [(RIGHT, 20), (WRONG, 20)]


def settings(**changes):
    rollout = {"rollout.rlvr.prompts": 1, "rollout.rlvr.group": 2, "rollout.rlvr.max_new_tokens": 20}
    return load_config(None, {"run.stages": "rlvr", "algorithm.rlvr.name": "dapo", **rollout, **changes})


def sampled(config, *batches):
    """The batch that a step takes if the tries give these batches, and the number of tries."""
    tries = iter(batches)
    rt = SimpleNamespace(config=config, generate=lambda problems, sampling, seed: next(tries))
    step = SimpleNamespace(seed=0, batches=lambda count, most: iter([[]] * most))
    return rlvr.sample(rt, step)


@pytest.mark.parametrize("same", SAME)
def test_a_group_of_one_accuracy_is_not_informative_whatever_its_rewards(same):
    config = settings()
    assert config.algorithm.rlvr.overlong is not None
    batch = played(same)
    rewarded = rlvr.reward_rollouts(batch, config)
    assert rewarded.total[0] != rewarded.total[1], "shaping must tell them apart, or the test shows nothing"
    taken, tries = sampled(config, batch, played(same, MIXED))
    assert (taken.batch.texts, tries) == ([text for text, _ in MIXED], 2)


def test_groups_of_right_and_wrong_responses_are_kept_even_where_their_rewards_are_equal(rewards):
    config = settings(**{"algorithm.rlvr.rewards": f"{rewards}:evens_out"})
    taken, tries = sampled(config, played(MIXED))
    assert tries == 1 and taken.total[0] == pytest.approx(taken.total[1])


def test_without_the_built_in_reward_the_custom_rewards_decide(rewards):
    changes = {"algorithm.rlvr.rewards": f"{rewards}:brief", "algorithm.rlvr.verifier_weight": 0.0}
    brief = [(WRONG, 11), (WRONG, 20)]
    taken, tries = sampled(settings(**changes), played([(RIGHT, 11), (WRONG, 11)]), played(brief))
    assert tries == 2 and taken.batch.lengths.tolist() == [11, 20]
    # the penalty of length is no reward
    taken, tries = sampled(settings(**changes), played([(RIGHT, 19), (RIGHT, 20)]), played(brief))
    assert tries == 2


def test_the_share_of_informative_groups_is_that_of_accuracy(monkeypatch):
    config = settings(**{"algorithm.rlvr.dynamic_sampling": "none", "rollout.rlvr.prompts": 4})
    monkeypatch.setattr(rlvr, "policy_update", lambda *_, **__: {})
    parts = dict.fromkeys(("policy", "encoder", "policy_optimiser"), object())
    run = FixedRun(config, played(*SAME, MIXED), **parts)
    rlvr.rlvr(run)
    assert run.metrics[0]["informative"] == 0.25
