"""The programs of docs/examples run and do what their docstrings promise."""

import runpy
from pathlib import Path

import pytest
import torch

from prism import cli
from prism.rewards import ProblemView, RolloutView
from prism.runtime.log import read_metrics
from tests.trainer.test_run import SMALL

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


@pytest.fixture(autouse=True)
def same_number_of_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_train_loop_raises_the_reward(capsys):
    rewards = runpy.run_path(str(EXAMPLES / "train_loop.py"))["train"](steps=30)
    assert rewards[0] < 0.2 and rewards[-1] > 0.5
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_my_reward_prefers_fewer_steps_in_right_answers():
    brevity = runpy.run_path(str(EXAMPLES / "my_reward.py"))["brevity"]
    problem = ProblemView("1", "How many stars?", "1", (), "stars")

    def rewarded(think, accuracy=1.0):
        text = f"<caption>\n- a red star\n</caption>\n<think>\n{think}\n</think>\n<answer>1</answer>"
        return brevity(RolloutView(text, len(text), accuracy), problem)

    assert rewarded("1. I see one star.") == 0.2
    assert rewarded("1. I look.\n2. I see one star.") == 0.1
    assert rewarded("1. I see one star.", accuracy=0.0) is None
    assert brevity(RolloutView("1", 1, 1.0), problem) is None


def test_rlvr_loads_my_reward_by_its_import_path(tmp_path):
    settings = {**SMALL, "run.folder": tmp_path, "optimiser.rlvr.steps": 1}
    del settings["run.stages"]
    settings["algorithm.rlvr.rewards"] = "docs.examples.my_reward:brevity"
    assert cli.main(["rlvr", *(part for key, value in settings.items() for part in (f"--{key}", str(value)))]) == 0
    (metrics,) = read_metrics(tmp_path / "metrics.jsonl")
    # a random policy answers nothing correctly, so the reward returns None; it was called and did not fail
    assert metrics["reward_brevity"] is None and metrics["failed_rewards"] == {}
