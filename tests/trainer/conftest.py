"""Fixtures of the trainer's tests that several files share."""

import functools

import pytest


@pytest.fixture(scope="module")
def one_tokenizer():
    """Trains the tiny tokenizer once, which takes most of a small run's start."""
    from prism.models import tiny

    before = tiny.train_tokenizer
    tiny.train_tokenizer = functools.cache(before)
    yield
    tiny.train_tokenizer = before


@pytest.fixture(scope="module")
def stopped(one_tokenizer, tmp_path_factory):
    """The folder of a run that was stopped in its last stage, with two checkpoints."""
    from run_cases import stop_in

    from prism.runtime import checkpoint

    folder = tmp_path_factory.mktemp("stopped") / "run"
    stop_in(folder, "rlvr", 1)
    assert len(list(checkpoint.checkpoints(folder / "checkpoints"))) == 2
    return folder
