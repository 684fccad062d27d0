"""In every stage a step with a non-finite loss, gradient or score is skipped and counted, and its batch is saved."""

import copy

import pytest

pytest.importorskip("transformers")

import torch
from score_cases import ENCODER, SIZE, TOKENIZER, make_model, make_samples, picture, response
from stage_cases import FixedRun
from test_run import settings

from prism.commands.run import run_stages
from prism.config import Adam, DiscriminatorSettings, load_config
from prism.data.problem import Problem
from prism.discriminator.score import prepare_groups
from prism.discriminator.training import discriminator_step
from prism.models.policy import Policy
from prism.models.tiny import tiny_policy
from prism.rollout.batch import RolloutBatch
from prism.rollout.engine import Engine
from prism.rollout.options import Sampling
from prism.runtime.log import read_metrics
from prism.runtime.optimiser import NotFiniteError, StageOptimiser
from prism.runtime.runtime import Runtime
from prism.stages.align import align
from prism.stages.warmup import warmup

ADAM = Adam(lr=1e-3)


def config(**changes):
    return load_config(None, {"data.prompt_tokens": 256, "memory.score_pack_tokens": "none", **changes})


def weights(model):
    return copy.deepcopy(model.state_dict())


def same(model, before):
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values()))


def spoil(parameter, calls):
    """Makes a parameter's gradient infinite in the backward passes where `calls` is true."""
    left = iter(calls)
    return parameter.register_hook(lambda g: g * (torch.inf if next(left, False) else 1.0))


def test_skipped_steps_of_the_discriminator_are_counted_and_saved(tmp_path):
    model = make_model()
    optimiser = StageOptimiser(model, ADAM, 20, failures=tmp_path)
    prepared = prepare_groups(make_samples(), ENCODER)
    assert len(prepared.packs) == 1
    handle = spoil(model.value_head.weight, [False, True, True])
    before = weights(model)
    results = [discriminator_step(model, prepared, optimiser, DiscriminatorSettings()) for _ in range(3)]
    handle.remove()
    reason = "the gradient's norm is not finite: inf"
    assert [result.skipped for result in results] == [None, reason, reason] and optimiser.failed_in_a_row == 2
    assert not same(model, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001-2.pt", "step-000001-3.pt"]
    saved = torch.load(tmp_path / "step-000001-2.pt", weights_only=True)
    assert saved["skipped"] == reason
    assert torch.equal(saved["packs"][0]["input_ids"], prepared.packs[0].pack.input_ids)
    assert torch.equal(saved["packs"][0]["pixel_values"], prepared.packs[0].pixel_values)
    # no valid pair: the step is skipped, but it is not a numerical failure
    none = prepare_groups([make_samples()[2]], ENCODER)
    result = discriminator_step(model, none, optimiser, DiscriminatorSettings())
    assert (result.skipped, optimiser.failed_in_a_row) == ("no valid pair", 2)


def test_ten_in_a_row_stop_the_discriminator():
    model = make_model()
    with torch.no_grad():
        model.backbone.language_model.norm.weight[0] = torch.nan
    optimiser, before = StageOptimiser(model, ADAM, 20), weights(model)
    groups = prepare_groups(make_samples(), ENCODER)
    for _ in range(StageOptimiser.MOST_FAILED - 1):
        assert discriminator_step(model, groups, optimiser, DiscriminatorSettings()).skipped == "a score is not finite"
    with pytest.raises(NotFiniteError, match="10 updates in a row were skipped: a score is not finite"):
        discriminator_step(model, groups, optimiser, DiscriminatorSettings())
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(model.state_dict().values(), before.values())
    )


@pytest.fixture
def game():
    """A policy and rollouts of it, whose texts have the scored format."""
    model, _ = tiny_policy(SIZE, tokenizer=TOKENIZER)
    teacher = response("- a red star", "One.", "1")
    problems = [
        Problem("a", "How many?", images=(picture(64, 96),), teacher=teacher),
        Problem("b", "x", teacher=teacher),
    ]
    prompts = [problem.encoded(ENCODER) for problem in problems]
    rollouts = Engine(model, TOKENIZER).generate(prompts, Sampling(group=3, max_new_tokens=8))
    texts = [response(f"- item {i}", f"Step {i}.", str(i)) for i in range(len(rollouts))]
    return Policy(model), RolloutBatch(problems, prompts, rollouts, texts)


@pytest.mark.parametrize(
    "broken", ["discriminator's gradient", "discriminator's score", "policy's gradient", "nothing"]
)
def test_alignment_skips_non_finite_steps(game, tmp_path, broken):
    policy, answered = game
    model = make_model()
    optimisers = {
        f"{name}_optimiser": StageOptimiser(one, ADAM, 20, failures=tmp_path / name)
        for one, name in ((policy, "policy"), (model, "discriminator"))
    }
    if broken == "discriminator's gradient":
        spoil(model.value_head.weight, [True])
    elif broken == "policy's gradient":
        spoil(policy.model.lm_head.weight, [True])
    elif broken == "discriminator's score":
        # a word of one sample only, so that only its score is NaN
        word = TOKENIZER("item", add_special_tokens=False)["input_ids"][-1]
        with torch.no_grad():
            model.backbone.language_model.embed_tokens.weight[word] = torch.nan
    before = weights(policy), {k: v.nan_to_num() for k, v in weights(model).items()}
    # no KL term, because this run has no reference policy
    settings = config(**{"discriminator.steps": 2, "algorithm.align.kl_coef": 0.0})
    run = FixedRun(settings, answered, policy=policy, discriminator=model, encoder=ENCODER, **optimisers)
    align(run)
    counts = run.metrics[0]["skipped"], run.metrics[0]["d_skipped"]
    expected = {
        "discriminator's gradient": (0, 1),
        # a non-finite reward skips the policy's step too, instead of counting as an average one
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


def test_ten_in_a_row_end_the_warm_up_which_logs_each(game):
    _, answered = game
    # one response to each problem, as warm-up samples them
    batch = answered._replace(rollouts=answered.rollouts[::3], texts=answered.texts[::3])
    model = make_model()
    with torch.no_grad():
        model.backbone.language_model.norm.weight[0] = torch.nan
    optimiser = StageOptimiser(model, ADAM, 20)
    run = FixedRun(config(), batch, steps=20, discriminator=model, encoder=ENCODER, discriminator_optimiser=optimiser)
    with pytest.raises(NotFiniteError, match="10 updates in a row were skipped: a score is not finite"):
        warmup(run)
    assert [metrics["skipped"] for metrics in run.metrics] == [1.0] * 9


def test_scores_are_those_from_before_the_first_of_several_updates(game):
    policy, answered = game
    logged = []
    for steps in (1, 3):
        model, own = make_model(), copy.deepcopy(policy)
        optimisers = {
            f"{name}_optimiser": StageOptimiser(one, ADAM, 20)
            for name, one in (("policy", own), ("discriminator", model))
        }
        changes = {"discriminator.steps": steps, "algorithm.align.kl_coef": 0.0}
        run = FixedRun(config(**changes), answered, policy=own, discriminator=model, encoder=ENCODER, **optimisers)
        align(run)
        logged += run.metrics
    assert logged[0] == logged[1] and logged[0]["d_grad_norm"] > 0


def test_a_run_saves_the_batch_of_a_skipped_step(tmp_path):
    one = Runtime(settings(tmp_path, **{"run.stages": ["sft"]}))
    spoil(one.policy.model.model.language_model.norm.weight, [False, True, False])
    run_stages(one)
    assert [record["skipped"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 0]
    assert [path.name for path in (tmp_path / "not_finite").iterdir()] == ["sft-policy"]
    (path,) = (tmp_path / "not_finite" / "sft-policy").iterdir()
    saved = torch.load(path, weights_only=True)
    assert path.name == "step-000002.pt" and saved["skipped"] == "the gradient's norm is not finite: inf"
    assert (
        len(saved["prompts"]) == len(saved["responses"]) == 4 and saved["prompts"][0]["pixel_values"].isfinite().all()
    )
