"""Every step has the gradients of the whole batch, however the batch is cut into packs.

Bounds relative to the gradient's norm: 1e-12 in fp64, 1e-5 in fp32.
"""

import copy
from dataclasses import replace

import pytest

pytest.importorskip("transformers")

import torch
from discriminator_cases import SIZE, TOKENIZER, make_backbone, widen
from score_cases import picture, response
from stage_cases import FixedRun

from prism.config import DiscriminatorSettings, MemorySettings, RlvrAlgorithm, StageAdam, load_config
from prism.data.problem import Problem
from prism.discriminator.model import Discriminator
from prism.discriminator.score import Sample, ScoreLimits, prepare_groups
from prism.discriminator.training import discriminator_step
from prism.models.policy import Policy
from prism.models.prompts import PromptEncoder
from prism.models.tiny import tiny_image_processor, tiny_policy
from prism.rollout.batch import RolloutBatch
from prism.rollout.engine import Engine
from prism.rollout.options import Sampling
from prism.runtime.optimiser import GuardedOptimiser, StageOptimiser
from prism.stages.align import align
from prism.stages.update import imitate, policy_update

ENCODER = PromptEncoder(TOKENIZER, tiny_image_processor(SIZE))
# a step changes no weight and clips no gradient
STILL = {"lr": 0.0, "weight_decay": 0.0, "clip_norm": 1e9, "steps": 4}
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5}
LONGEST = 16


@pytest.fixture(params=BOUNDS, ids=["fp64", "fp32"])
def dtype(request, monkeypatch):
    widen(monkeypatch)
    return request.param


@pytest.fixture(scope="module")
def untrained():
    model, _ = tiny_policy(SIZE, tokenizer=TOKENIZER)
    # larger weights than at initialisation, so that every part of the model matters
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(3.0)
    return model


def problems():
    teachers = [response("- a red star", "One.", "1"), response("two", "2", "2"), response("- a\n- b", "3", "3")]
    images = [(picture(64, 96),), (), (picture(32, 64, 1), picture(64, 64, 2))]
    asked = ["How many stars?", "What is 1 + 1?", "Compare."]
    return [Problem(a, a, images=i, answer="1", teacher=t) for a, i, t in zip(asked, images, teachers)]


@pytest.fixture(scope="module")
def answered(untrained):
    """Rollouts of a policy; four of five texts have the scored format."""
    found = problems()
    prompts = [problem.encoded(ENCODER) for problem in found]
    rollouts = Engine(untrained, TOKENIZER).generate(prompts, Sampling(group=4, max_new_tokens=LONGEST), seed=3)
    texts = [response(f"- item {i}", f"Step {i}.", str(i % 3)) if i % 5 else "no tags" for i in range(len(rollouts))]
    return RolloutBatch(found, prompts, rollouts, texts)


def policy_of(model, dtype):
    return Policy(copy.deepcopy(model).to(dtype))


def scorer_of(dtype):
    weight = torch.randn(1, SIZE.hidden_size, generator=torch.Generator().manual_seed(5))
    return Discriminator(make_backbone(), value_weight=weight).to(dtype)


def gradients(model):
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def budgets(prompts, responses, owner):
    """Returns pack sizes in tokens that hold one response, two or more, and all of them."""
    sizes = [len(prompts[p].input_ids) + len(r) for p, r in zip(owner, responses)]
    return [max(sizes), 2 * max(sizes), 10**6]


def agree(found, dtype):
    """Asserts that all gradients equal the last ones, which are of the whole batch in one pack."""
    *others, wanted = found
    norm = float(torch.cat([g.flatten() for g in wanted.values()]).norm())
    assert norm > 0.01 and len(wanted) > 40
    for got in others:
        assert got.keys() == wanted.keys()
        error = max(float((got[name] - wanted[name]).norm()) for name in wanted)
        assert error <= BOUNDS[dtype] * norm, error / norm
        # an error of 0 would mean that the packs were the same
        assert error > 0


def test_packs_do_not_change_a_supervised_step(untrained, dtype):
    found = []
    batch = problems() * 2
    responses = [TOKENIZER(problem.teacher)["input_ids"] + [0] for problem in batch]
    for budget in budgets([p.encoded(ENCODER) for p in batch], responses, range(len(batch))):
        policy = policy_of(untrained, dtype)
        imitate(
            policy, batch, ENCODER, StageOptimiser(policy, StageAdam(**STILL), 4), MemorySettings(pack_tokens=budget)
        )
        found.append(gradients(policy))
    agree(found, dtype)


ALGORITHMS = {
    **{name: {"name": name} for name in ("grpo", "gspo", "dr_grpo", "rloo", "cispo")},
    "reference": {"kl_coef": 0.1, "kl_estimator": "k3", "entropy_coef": 0.01, "correction": "sequence_tis"},
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_packs_do_not_change_a_step_of_rlvr(untrained, answered, dtype, name):
    advantage = torch.randn(len(answered.rollouts), generator=torch.Generator().manual_seed(1), dtype=dtype)
    algorithm = RlvrAlgorithm(**ALGORITHMS[name])
    reference = policy_of(untrained, dtype)
    with torch.no_grad():
        reference.model.lm_head.weight.mul_(1.05)
    found, logs = [], []
    owner = [r.prompt for r in answered.rollouts]
    for budget in budgets(answered.prompts, [r.token_ids for r in answered.rollouts], owner):
        policy = policy_of(untrained, dtype)
        optimiser = StageOptimiser(policy, StageAdam(**STILL), 4)
        log = policy_update(
            policy, answered, advantage, ENCODER, optimiser, algorithm, MemorySettings(pack_tokens=budget),
            temperature=1.0, longest=LONGEST, reference=reference if algorithm.kl_coef else None,
        )  # fmt: skip
        found.append(gradients(policy))
        logs.append(log)
    agree(found, dtype)
    # metrics cover all tokens, whatever the packs
    for log in logs[:2]:
        assert log == pytest.approx(logs[2], rel=BOUNDS[dtype] * 10, abs=BOUNDS[dtype] * 10)
    assert logs[0]["tokens"] == int(answered.lengths.sum())


@pytest.mark.parametrize("name", ["grpo", "gspo", "reference"])
def test_the_fused_loss_takes_the_same_step(untrained, answered, dtype, name):
    advantage = torch.randn(len(answered.rollouts), generator=torch.Generator().manual_seed(1), dtype=dtype)
    algorithm = RlvrAlgorithm(**ALGORITHMS[name])
    reference = policy_of(untrained, dtype) if algorithm.kl_coef else None
    found, logs = [], []
    for fused in (False, True):
        policy = policy_of(untrained, dtype)
        optimiser = StageOptimiser(policy, StageAdam(**STILL), 4)
        memory = MemorySettings(fused_policy_loss=fused)
        logs.append(
            policy_update(
                policy, answered, advantage, ENCODER, optimiser, algorithm, memory, temperature=1.0, longest=LONGEST,
                reference=reference,
            )
        )  # fmt: skip
        found.append(gradients(policy))
    wanted, got = found
    norm = float(torch.cat([g.flatten() for g in wanted.values()]).norm())
    assert norm > 0.01 and got.keys() == wanted.keys()
    assert max(float((got[name] - wanted[name]).norm()) for name in wanted) <= BOUNDS[dtype] * norm
    # the fused loss knows no entropy unless the loss has one
    assert ("entropy" in logs[1]) == (algorithm.entropy_coef != 0)
    wanted = {name: logs[0][name] for name in logs[1]}
    assert logs[1] == pytest.approx(wanted, rel=BOUNDS[dtype] * 10, abs=BOUNDS[dtype] * 10)


def test_packs_do_not_change_the_steps_of_policy_and_discriminator_in_alignment(untrained, answered, dtype):
    """A discriminator's pack holds whole groups, so its smallest pack is one group."""
    settings = load_config(
        None,
        {
            # the load-balance loss depends on the packs, see the last test
            "discriminator.aux_coef": 0.0,
            "discriminator.z_coef": 0.1,
            "data.prompt_tokens": 256,
            "algorithm.align.token_credit": False,
            "algorithm.align.kl_coef": 0.0,
            "optimiser.discriminator.clip_norm": 1e9,
            "memory.score_pack_tokens": "none",
        },
    )
    responses = [r.token_ids for r in answered.rollouts]
    policies, scorers, packs = [], [], []
    group = max(len(part.pack.input_ids) for part in _prepared(answered, 1))
    for budget, score_budget in zip(
        budgets(answered.prompts, responses, [r.prompt for r in answered.rollouts]), (group, 2 * group, 10**6)
    ):
        memory = settings.memory.model_copy(update={"pack_tokens": budget, "score_pack_tokens": score_budget})
        config = settings.model_copy(update={"memory": memory})
        policy, scorer = policy_of(untrained, dtype), scorer_of(dtype)
        run = FixedRun(
            config,
            answered,
            policy=policy,
            discriminator=scorer,
            encoder=ENCODER,
            policy_optimiser=StageOptimiser(policy, StageAdam(**STILL), 4),
            discriminator_optimiser=StageOptimiser(scorer, StageAdam(**STILL), 4),
        )
        align(run)
        (metrics,) = run.metrics
        assert metrics["d_skipped"] == metrics["skipped"] == 0
        policies.append(gradients(policy))
        scorers.append(gradients(scorer))
        packs.append(len(_prepared(answered, score_budget)))
    assert packs[0] > packs[1] > packs[2] == 1
    agree(policies, dtype)
    agree(scorers, dtype)


def _samples(answered):
    return [
        Sample(prompt, answered.texts_of(place), teacher=problem.teacher)
        for place, (problem, prompt) in enumerate(zip(answered.problems, answered.prompts))
    ]


def _prepared(answered, budget, groups=slice(None)):
    samples = _samples(answered)[groups]
    if budget == 1:
        return [part for sample in samples for part in prepare_groups([sample], ENCODER).packs]
    return prepare_groups(samples, ENCODER, ScoreLimits(budget=budget)).packs


def test_the_load_balance_loss_is_the_mean_over_packs_weighted_by_tokens(answered, dtype):
    def step(samples, budget, coefficient):
        model = scorer_of(dtype)
        prepared = prepare_groups(samples, ENCODER, ScoreLimits(budget=budget))
        still = GuardedOptimiser(torch.optim.SGD(model.parameters(), lr=0.0), clip_norm=1e9)
        discriminator_step(model, prepared, still, DiscriminatorSettings(aux_coef=coefficient))
        return gradients(model), sum(len(part.pack.input_ids) for part in prepared.packs)

    def balance(samples, budget):
        """Returns the gradient of the load-balance loss alone, and the number of tokens."""
        (with_it, tokens), (without, _) = (step(samples, budget, coefficient) for coefficient in (1.0, 0.0))
        return {name: with_it[name] - without[name] for name in without}, tokens

    samples = [replace(sample, responses=[response("- a", "b", "1")]) for sample in _samples(answered)]
    single = max(len(part.pack.input_ids) for sample in samples for part in prepare_groups([sample], ENCODER).packs)
    cut, total = balance(samples, single)
    parts = [balance([sample], single) for sample in samples]
    # a group without images has no gradient in the vision tower
    summed = {name: sum(part.get(name, 0.0) * (tokens / total) for part, tokens in parts) for name in cut}
    size = max(float(g.norm()) for g in cut.values())
    assert size > 0.01
    bound = BOUNDS[dtype] * 100
    assert all(float((cut[name] - summed[name]).norm()) <= bound * size for name in cut)
    # it differs from the loss over one pack of everything
    whole, _ = balance(samples, 10**6)
    assert any(float((cut[name] - whole[name]).norm()) > 0.01 * size for name in cut)
