"""The programs of docs/examples run, and do what they say."""

import runpy
from pathlib import Path

import pytest
import torch

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
