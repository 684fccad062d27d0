"""A loss, a gradient or a score that is not finite: no step, in any stage; it is counted, and its batch is saved."""

import copy

import pytest

pytest.importorskip("transformers")

import torch
from score_cases import ENCODER, SIZE, TOKENIZER, make_model, make_samples, picture, response
from test_run import settings

from prism.config import load_config
from prism.config.sections import Adam
from prism.data.problem import Problem
from prism.discriminator.score import prepare_groups
from prism.models.policy import Policy
from prism.models.tiny import tiny_policy
from prism.rollout.engine import Engine
from prism.rollout.sampling import Sampling
from prism.runtime.log import read_metrics
from prism.runtime.optimiser import NotFiniteError, Stepper
from prism.runtime.runtime import Run
from prism.stages.align import align_step, train_discriminator
from prism.stages.rollouts import Answered
from prism.stages.warmup import warmup_step

ADAM = Adam(lr=1e-3)


def config(**changes):
    return load_config(None, {"data.prompt_tokens": 256, "memory.score_pack_tokens": "none", **changes})


def weights(model):
    return copy.deepcopy(model.state_dict())


def same(model, before):
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values()))


def spoil(parameter, calls):
    """Makes a parameter's gradient infinite at some of the backward passes."""
    left = iter(calls)
    return parameter.register_hook(lambda g: g * (torch.inf if next(left, False) else 1.0))


def test_steps_of_the_discriminator_are_counted_one_by_one(tmp_path):
    model = make_model()
    stepper = Stepper(model, ADAM, 20, inspection=tmp_path)
    prepared = prepare_groups(make_samples(), ENCODER)
    assert len(prepared.packs) == 1
    handle = spoil(model.value_head.weight, [False, True, True])
    before = weights(model)
    first, skipped = train_discriminator(model, prepared, stepper, config(), steps=3)
    handle.remove()
    # that of the first step is what the others' does not hide
    assert first.skipped is None and skipped == 2 and stepper.skipped_in_a_row == 2
    assert not same(model, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001-2.pt", "step-000001-3.pt"]
    saved = torch.load(tmp_path / "step-000001-2.pt", weights_only=True)
    assert saved["skipped"] == "the gradient's norm is not finite: inf"
    assert torch.equal(saved["packs"][0]["input_ids"], prepared.packs[0].pack.input_ids)
    assert torch.equal(saved["packs"][0]["pixel_values"], prepared.packs[0].pixel_values)
    # no pair: no step, yet nothing that is not finite
    none = prepare_groups([make_samples()[2]], ENCODER)
    first, skipped = train_discriminator(model, none, stepper, config(), steps=2)
    assert (first.skipped, skipped, stepper.skipped_in_a_row) == ("no valid pair", 2, 2)


def test_ten_in_a_row_stop_the_warm_up():
    model = make_model()
    with torch.no_grad():
        model.backbone.language_model.norm.weight[0] = torch.nan
    stepper, before = Stepper(model, ADAM, 20), weights(model)
    for _ in range(Stepper.MOST_SKIPPED - 1):
        assert warmup_step(model, make_samples(), ENCODER, stepper, config())["skipped"] == 1
    with pytest.raises(NotFiniteError, match="10 steps in a row were not taken: a score is not finite"):
        warmup_step(model, make_samples(), ENCODER, stepper, config())
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(model.state_dict().values(), before.values())
    )


@pytest.fixture
def game():
    """A policy with its answers, whose texts are scored."""
    model, _ = tiny_policy(SIZE, tokenizer=TOKENIZER)
    teacher = response("- a red star", "One.", "1")
    problems = [
        Problem("a", "How many?", images=(picture(64, 96),), teacher=teacher),
        Problem("b", "x", teacher=teacher),
    ]
    prompts = [problem.encoded(ENCODER) for problem in problems]
    rollouts = Engine(model, TOKENIZER).generate(prompts, Sampling(n=3, max_new_tokens=8, seed=0))
    texts = [response(f"- item {i}", f"Step {i}.", str(i)) for i in range(len(rollouts))]
    return Policy(model), Answered(problems, prompts, rollouts, texts)


@pytest.mark.parametrize(
    "broken", ["discriminator's gradient", "discriminator's score", "policy's gradient", "nothing"]
)
def test_alignment_takes_no_step_on_what_is_not_finite(game, tmp_path, broken):
    policy, answered = game
    model = make_model()
    steppers = tuple(
        Stepper(one, ADAM, 20, inspection=tmp_path / name)
        for one, name in ((policy, "policy"), (model, "discriminator"))
    )
    if broken == "discriminator's gradient":
        spoil(model.value_head.weight, [True])
    elif broken == "policy's gradient":
        spoil(policy.model.lm_head.weight, [True])
    elif broken == "discriminator's score":
        # of one sample alone, by a word that no other has
        word = TOKENIZER("item", add_special_tokens=False)["input_ids"][-1]
        with torch.no_grad():
            model.backbone.language_model.embed_tokens.weight[word] = torch.nan
    before = weights(policy), {k: v.nan_to_num() for k, v in weights(model).items()}
    # there is no reference policy here
    settings = config(**{"discriminator.steps": 2, "algorithm.align.kl_coef": 0.0})
    done = align_step(policy, model, answered, ENCODER, steppers, settings)
    counts = done.logged["skipped"], done.logged["d_skipped"]
    expected = {
        "discriminator's gradient": (0, 1),
        # rewards that are not finite teach nothing, and not that their samples are as good as others
        "discriminator's score": (1, 2),
        "policy's gradient": (1, 0),
        "nothing": (0, 0),
    }[broken]
    assert counts == expected
    assert same(policy, before[0]) == bool(expected[0])
    now = all(torch.equal(a.nan_to_num(), b) for a, b in zip(model.state_dict().values(), before[1].values()))
    assert now == (expected[1] == 2)
    assert (tmp_path / "policy" / "step-000001.pt").exists() == bool(expected[0])
    assert len(list(tmp_path.glob("discriminator/*"))) == expected[1]
    if expected[0]:
        saved = torch.load(tmp_path / "policy" / "step-000001.pt", weights_only=True)
        assert saved["responses"] == [rollout.token_ids for rollout in answered.rollouts]
        assert len(saved["advantage"]) == len(saved["log_probs"]) == len(answered.rollouts)


def test_a_run_saves_the_batch_of_a_step_that_it_does_not_take(tmp_path):
    one = Run(settings(tmp_path, **{"run.stages": ["sft"]}))
    spoil(one.policy.model.model.language_model.norm.weight, [False, True, False])
    one.go()
    assert [record["skipped"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 0]
    assert [path.name for path in (tmp_path / "not_finite").iterdir()] == ["sft-policy"]
    (path,) = (tmp_path / "not_finite" / "sft-policy").iterdir()
    saved = torch.load(path, weights_only=True)
    assert path.name == "step-000002.pt" and saved["skipped"] == "the gradient is not finite"
    assert (
        len(saved["prompts"]) == len(saved["responses"]) == 4 and saved["prompts"][0]["pixel_values"].isfinite().all()
    )
