import copy
import math
from dataclasses import replace

import pytest
import torch
from discriminator_cases import SIZE, TOKENIZER

from prism.config import MemorySettings, RlvrAlgorithm, StageAdam
from prism.models.policy import Policy, pack_responses, response_ids
from prism.models.prompts import PromptEncoder
from prism.models.tiny import tiny_image_processor, tiny_policy
from prism.rollout.batch import RolloutBatch
from prism.rollout.engine import Engine
from prism.rollout.options import Sampling
from prism.runtime.optimiser import NotFiniteError, StageOptimiser
from prism.stages.update import policy_update

ENCODER = PromptEncoder(TOKENIZER, tiny_image_processor(SIZE))
SETTINGS = StageAdam(lr=0.0, steps=4, clip_norm=1e9, weight_decay=0.0)


@pytest.fixture(scope="module")
def played():
    """A policy, its rollouts and an advantage for each."""
    model, _ = tiny_policy(SIZE, tokenizer=TOKENIZER)
    policy = Policy(model)
    prompts = [ENCODER.encode(text) for text in ("how many?", "where is the red one?", "why")]
    rollouts = Engine(model, TOKENIZER).generate(prompts, Sampling(group=4, max_new_tokens=9), seed=3)
    advantage = torch.randn(len(rollouts), generator=torch.Generator().manual_seed(1))
    return policy, RolloutBatch([], prompts, rollouts, []), advantage


def update(policy, batch, advantage, memory, algorithm, **options):
    policy = copy.deepcopy(policy)
    optimiser = StageOptimiser(policy, SETTINGS, 4)
    logged = policy_update(
        policy, batch, advantage, ENCODER, optimiser, algorithm, memory, temperature=1.0, longest=9, **options
    )
    return logged, {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["grpo", "gspo", "dr_grpo", "cispo", "rloo"])
def test_packs_do_not_change_the_step(played, name):
    policy, batch, advantage = played
    algorithm = RlvrAlgorithm(name=name)
    longest = max(len(p.input_ids) for p in batch.prompts) + 9
    one, wanted = update(policy, batch, advantage, MemorySettings(pack_tokens=4096), algorithm)
    many, got = update(policy, batch, advantage, MemorySettings(pack_tokens=longest), algorithm)
    assert one["loss"] == pytest.approx(many["loss"], rel=1e-5, abs=1e-7)
    assert one["grad_norm"] > 0 and wanted.keys() == got.keys()
    for key in wanted:
        torch.testing.assert_close(got[key], wanted[key], rtol=1e-4, atol=1e-6 * one["grad_norm"])
    assert one["tokens"] == sum(len(r.token_ids) for r in batch.rollouts)


def test_metrics_of_several_optimiser_steps_cover_all_their_tokens(played):
    policy, batch, advantage = played
    algorithm = RlvrAlgorithm(correction="token_tis")
    longest = max(len(p.input_ids) for p in batch.prompts) + 9
    # one token's log-probability is far off, as if from another engine
    rollouts = list(batch.rollouts)
    off = rollouts[7].model_log_probs.clone()
    off[2] += 3.0
    rollouts[7] = replace(rollouts[7], model_log_probs=off)
    batch = batch._replace(rollouts=rollouts)
    one, _ = update(policy, batch, advantage, MemorySettings(pack_tokens=4096), algorithm)
    parts, _ = update(policy, batch, advantage, MemorySettings(pack_tokens=longest), algorithm, responses=4)
    # the learning rate is 0: all steps see the policy that sampled
    for name in ("entropy", "approx_kl", "correction_raw", "correction_used", "ess", "tokens"):
        assert parts[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    assert one["tokens"] == sum(len(r.token_ids) for r in rollouts) and one["entropy"] > 1
    # the largest over all packs and steps
    assert parts["engine_gap"] == pytest.approx(3.0, abs=1e-3) == one["engine_gap"]
    norms = []
    for start in (0, 4, 8):
        chosen = batch._replace(rollouts=rollouts[start : start + 4])
        one_step = update(policy, chosen, advantage[start : start + 4], MemorySettings(pack_tokens=4096), algorithm)
        norms.append(one_step[0]["grad_norm"])
    assert parts["grad_norm"] == pytest.approx(sum(norms) / 3, rel=1e-4)
    # a NaN reaches the log
    rollouts[7] = replace(rollouts[7], model_log_probs=off.fill_(torch.nan))
    assert math.isnan(update(policy, batch, advantage, MemorySettings(pack_tokens=longest), algorithm)[0]["engine_gap"])


def test_advantages_per_response_equal_the_same_advantages_per_token(played):
    policy, batch, advantage = played
    spread = [a.expand(len(r.token_ids)) for a, r in zip(advantage, batch.rollouts)]
    memory, algorithm = MemorySettings(pack_tokens=4096), RlvrAlgorithm()
    (_, wanted), (_, got) = (update(policy, batch, one, memory, algorithm) for one in (advantage, spread))
    for key in wanted:
        torch.testing.assert_close(got[key], wanted[key])


def test_the_step_makes_rewarded_responses_more_probable(played):
    policy, batch, advantage = played
    policy = copy.deepcopy(policy)
    optimiser = StageOptimiser(policy, StageAdam(lr=1e-3, steps=4, weight_decay=0.0), 4)
    memory = MemorySettings(pack_tokens=4096)

    def gain():
        (part,) = pack_responses(
            batch.prompts,
            [r.token_ids for r in batch.rollouts],
            [r.prompt for r in batch.rollouts],
            ENCODER,
            4096,
        )
        with torch.no_grad():
            logp = policy(part.pack).logp
        sums = torch.stack([x.sum() for x in logp.split([len(batch.rollouts[s].token_ids) for s in part.responses])])
        return float((sums * advantage[list(part.responses)]).sum())

    before = gain()
    policy_update(policy, batch, advantage, ENCODER, optimiser, RlvrAlgorithm(), memory, temperature=1.0, longest=9)
    assert gain() > before


def test_the_kl_term_penalises_distance_from_the_reference(played):
    policy, batch, advantage = played
    other = copy.deepcopy(policy)
    with torch.no_grad():
        other.model.lm_head.weight.add_(0.05 * torch.randn(other.model.lm_head.weight.shape))
    algorithm = RlvrAlgorithm(kl_coef=1.0, kl_estimator="k3")
    memory = MemorySettings(pack_tokens=4096)
    same, _ = update(policy, batch, advantage, memory, algorithm, reference=policy)
    away, _ = update(policy, batch, advantage, memory, algorithm, reference=other)
    plain, _ = update(policy, batch, advantage, memory, RlvrAlgorithm())
    assert same["loss"] == pytest.approx(plain["loss"], abs=1e-5)
    assert away["loss"] > plain["loss"] + 1e-3


def test_packs_repeat_a_prompt_only_where_its_responses_do_not_fit():
    prompts = [ENCODER.encode("one"), ENCODER.encode("two")]
    responses = [[5] * 6] * 5
    owner = [0, 0, 0, 1, 1]
    size, other = (len(prompt.input_ids) for prompt in prompts)
    (whole,) = pack_responses(prompts, responses, owner, ENCODER, 1000)
    assert len(whole.pack.input_ids) == size + other + 30 and whole.responses == (0, 1, 2, 3, 4)
    parts = pack_responses(prompts, responses, owner, ENCODER, max(size, other) + 12)
    assert sorted(s for part in parts for s in part.responses) == [0, 1, 2, 3, 4]
    assert sum(len(part.pack.input_ids) for part in parts) == 2 * size + other + 30
    with pytest.raises(ValueError, match="pack_responses: expected a prompt and response of at most"):
        pack_responses(prompts, responses, owner, ENCODER, min(size, other) + 5)


def test_demonstrations_end_their_turn():
    (ids,) = response_ids(["<answer>3</answer>"], ENCODER)
    assert ids[-1] == TOKENIZER.eos_token_id and TOKENIZER.decode(ids[:-1]) == "<answer>3</answer>"


def test_non_finite_steps_are_skipped_and_ten_in_a_row_are_an_error():
    model = torch.nn.Linear(2, 1)
    optimiser = StageOptimiser(model, StageAdam(lr=1.0, steps=20), 20)
    before = model.weight.detach().clone()

    def step(loss=1.0, gradient=1.0):
        with optimiser.step() as update:
            update.backward(model(torch.ones(1, 2)).sum() * loss)
            model.weight.grad[0, 0] *= gradient
        return update.skipped

    for count in range(StageOptimiser.MOST_FAILED - 1):
        assert "not finite" in (step(gradient=torch.nan) if count % 2 else step(loss=torch.inf))
    assert torch.equal(model.weight, before)
    with pytest.raises(NotFiniteError, match="10 updates in a row"):
        step(loss=torch.nan)
