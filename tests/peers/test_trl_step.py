"""One step of TRL 1.16's GRPOTrainer and of our loss on the same off-policy rollouts: equal loss and gradient.

TRL's trainer pads the prompts, images, completions and rewards; our packs store each prompt once.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from bench.end_to_end.trl_step import Shape, make_trainer, problems, start, variety
from prism.models.policy import Policy, pack_responses
from prism.models.prompts import PromptEncoder
from prism.models.tiny import tiny_image_processor
from prism.rewards import score_batch
from prism.rollout.engine import Engine
from prism.rollout.options import Sampling
from prism_kernels import PolicyMetrics, group_advantage, policy_loss

SHAPE = Shape(prompts=3, group=4, tokens=24)
TOLERANCE = 1e-4
# TRL adds this to a group's standard deviation
EPS = 1e-4

# for each of TRL's loss types: the level of its ratio, its clip, and our options
LOSSES = {
    "dapo": ("token", (0.2, 0.28), {"aggregate": "token_mean"}),
    "bnpo": ("token", (0.1, 0.2), {"aggregate": "token_mean"}),
    "grpo": ("token", (0.2, 0.2), {"aggregate": "seq_mean_token_mean"}),
    "grpo of sequences": ("sequence", (3e-3, 4e-3), {"aggregate": "seq_mean_token_mean", "ratio": "sequence"}),
    "dr_grpo": ("token", (0.2, 0.2), {"aggregate": "seq_mean_token_sum_norm", "horizon": float(SHAPE.tokens)}),
}


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """Rollouts of an older policy, in the form that each side needs."""
    old, tokenizer = start()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in old.parameters():
            parameter += 0.05 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    encoder = PromptEncoder(tokenizer, tiny_image_processor())
    own = problems(SHAPE, 1)
    prompts = [problem.encoded(encoder) for problem in own]
    sampling = Sampling(group=SHAPE.group, max_new_tokens=SHAPE.tokens)
    rollouts = Engine(old, tokenizer).generate(prompts, sampling, seed=5, stop_token_ids=())
    # three lengths, so that TRL must pad
    responses = [rollout.token_ids[: SHAPE.tokens - 7 * (s % 3)] for s, rollout in enumerate(rollouts)]
    owner = [rollout.prompt for rollout in rollouts]
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    verdicts = score_batch(texts, [own[p].answer for p in owner])
    reward = torch.tensor([verdict.score + more for verdict, more in zip(verdicts, variety(texts))])
    # small enough to spread a prompt's responses over several packs
    budget = max(len(prompt.input_ids) for prompt in prompts) + 2 * SHAPE.tokens
    packs = pack_responses(prompts, responses, owner, encoder, budget)
    policy, before = Policy(start()[0]), Policy(old)
    with torch.no_grad():
        old_logp = [before(part.pack, part.pixel_values, part.image_grid_thw).logp for part in packs]

    trainer = make_trainer(SHAPE, 1, str(tmp_path_factory.mktemp("trl")))
    trainer._generate_single_turn = lambda *_, **__: (responses, None)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    rows = [trainer.train_dataset[index] for index in range(SHAPE.prompts) for _ in range(SHAPE.group)]
    inputs = trainer._generate_and_score_completions(rows)
    assert "old_per_token_logps" not in inputs
    inputs["old_per_token_logps"] = padded(old_logp, packs, inputs["completion_mask"])
    return SimpleNamespace(
        trainer=trainer,
        inputs=inputs,
        policy=policy,
        packs=packs,
        old_logp=old_logp,
        tokens=sum(map(len, responses)),
        reward=reward,
        group=torch.tensor(owner),
    )


def padded(logp, packs, mask):
    """Returns the packs' log-probabilities as a padded matrix (S, longest), like TRL's."""
    found = torch.zeros(mask.shape)
    for values, part in zip(logp, packs):
        for row, value in zip(part.responses, values.split(list(part.pack.layout.branch))):
            found[row, : len(value)] = value
            assert int(mask[row].sum()) == len(value)
    return found


def theirs(step, name):
    """Returns TRL's loss, gradients, and fraction of clipped tokens."""
    level, clip, _ = LOSSES[name]
    trainer = step.trainer
    trainer.loss_type, trainer.importance_sampling_level = name.split()[0], level
    trainer.epsilon_low, trainer.epsilon_high = clip
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    loss = trainer.compute_loss(trainer.model, step.inputs)
    loss.backward()
    (clipped,) = trainer._metrics["train"]["clip_ratio/region_mean"]
    return float(loss), gradients(trainer.model), clipped


def ours(step, name, *, wider=0.0, advantage=None):
    """Returns our loss, gradients, and fraction of clipped tokens."""
    _, (low, high), options = LOSSES[name]
    advantage = group_advantage(step.reward, step.group, eps=EPS) if advantage is None else advantage
    denominator = float(step.tokens if options["aggregate"] == "token_mean" else len(step.group))
    step.policy.zero_grad()
    total, metrics = 0.0, None
    for part, old in zip(step.packs, step.old_logp):
        loss, found = policy_loss(
            step.policy(part.pack, part.pixel_values, part.image_grid_thw).logp,
            old,
            advantage[list(part.responses)],
            part.pack.cu_branch,
            clip=(low + wider, high + wider),
            denominator=denominator,
            **options,
        )
        loss.backward()
        total += float(loss)
        metrics = found if metrics is None else metrics + found
    assert isinstance(metrics, PolicyMetrics)
    means = metrics.means()
    return total, gradients(step.policy.model), means["clipped_low"] + means["clipped_high"]


def gradients(model) -> dict[str, Tensor]:
    return {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}


def norm(grads: dict[str, Tensor]) -> float:
    return float(torch.stack([grad.norm() for grad in grads.values()]).norm())


def differences(mine, other):
    """Returns the relative differences of loss, gradient norm and gradient."""
    (loss, grads, _), (wanted, expected, _) = mine, other
    assert grads.keys() == expected.keys()
    size = norm(expected)
    apart = norm({name: grads[name] - expected[name] for name in expected})
    return {"loss": abs(loss - wanted) / abs(wanted), "norm": abs(norm(grads) - size) / size, "gradient": apart / size}


def test_rewards_and_advantages_are_the_same(step):
    got = group_advantage(step.reward, step.group, eps=EPS)
    torch.testing.assert_close(got, step.inputs["advantages"], rtol=1e-5, atol=1e-5)
    assert (got.view(SHAPE.prompts, -1).std(1) > 0.9).all()
    assert not step.inputs["completion_mask"].all() and not step.inputs["prompt_mask"].all(), "TRL must pad"
    assert len(step.packs) > SHAPE.prompts and step.inputs["pixel_values"] is not None


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient(name, step):
    published, mine = theirs(step, name), ours(step, name)
    found = differences(mine, published)
    assert max(found.values()) < TOLERANCE, found
    assert abs(published[0]) > 5e-3 and norm(published[1]) > 1e-2
    # the vision tower has a gradient too
    assert any("visual" in key and grad.norm() > 0 for key, grad in mine[1].items())
    # some tokens are clipped, and some are not
    assert 0.02 < published[2] < 0.7
    if "sequences" not in name:
        assert mine[2] == pytest.approx(published[2], abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_a_wrong_step_is_noticed(name, step):
    published = theirs(step, name)
    right = group_advantage(step.reward, step.group, eps=EPS)
    wider = LOSSES[name][1][0]
    for wrong in (
        ours(step, name, wider=wider),
        ours(step, name, advantage=-right),
        ours(step, name, advantage=group_advantage(step.reward, step.group, scale="none")),
    ):
        found = differences(wrong, published)
        assert max(found.values()) > 100 * TOLERANCE, found
