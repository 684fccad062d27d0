"""GRPOTrainer's loss by `policy_loss` gives TRL 1.16's numbers, metrics and training; refusals, undo."""

import functools
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import trl.trainer.grpo_trainer
from test_trl_patch import SIZE, Processor, largest_difference, online, questions, run, text_model
from test_trl_patch import TOLERANCE as TRAINED
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import GRPOConfig, GRPOTrainer

from prism.models.tiny import tiny_image_processor, tiny_policy, train_tokenizer
from prism_kernels.integrations import padded, trl_loss
from prism_kernels.integrations import trl as ours

TOLERANCE = 1e-5
PUBLISHED = GRPOTrainer._compute_loss
KINDS = tuple(trl_loss.AGGREGATES)
# for each level of the ratio: the clip, and a ceiling (delta) that some ratios exceed
CLIPS = {"token": (0.2, 0.28, 1.4), "sequence": (0.02, 0.03, 1.06)}
# logged times, which differ between runs
CLOCKS = ("step_time", "runtime", "per_second")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """The folder of a tiny Qwen3."""
    path = tmp_path_factory.mktemp("text")
    text_model(len(tokenizer)).save_pretrained(path)
    return str(path)


@pytest.fixture
def make(folder, tokenizer, tmp_path):
    """Returns a function that makes a GRPOTrainer with two micro-batches per step and two steps per generation."""
    return functools.partial(online, folder, False, tokenizer, tmp_path, gradient_accumulation_steps=2)


def micro_batch(trainer):
    """Returns scored completions of several lengths, one of them fully masked, sampled by another policy."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 3
    rows = [row for row in questions(False).select(range(2)) for _ in range(4)]
    inputs = trainer._generate_and_score_completions(rows)
    length = inputs["completion_mask"].shape[1]
    lengths = torch.tensor([0, length - 1, 3, length, length, 1, length // 2, length])
    inputs["completion_mask"] = (torch.arange(length) < lengths[:, None]).long()
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum() * 3
    generator = torch.Generator().manual_seed(0)
    current = inputs["old_per_token_logps"]
    for name, size in (("old_per_token_logps", 0.4), ("ref_per_token_logps", 1.0)):
        inputs[name] = current + size * torch.randn(current.shape, generator=generator)
    # a mean other than 0, so that the terms of a loss do not cancel
    inputs["advantages"] = inputs["advantages"] - 0.5
    assert inputs["advantages"].abs().min() > 0.01 and inputs["advantages"].unique().numel() > 4
    return inputs


@pytest.fixture(scope="module")
def made(folder, tokenizer, tmp_path_factory):
    """An unpatched trainer, and a micro-batch."""
    trainer = online(folder, False, tokenizer, tmp_path_factory.mktemp("made"), gradient_accumulation_steps=2)
    return SimpleNamespace(trainer=trainer, inputs=micro_batch(trainer))


@pytest.fixture
def step(made, monkeypatch):
    """The trainer and micro-batch of `made`; changes to them are undone after the test."""

    def change(**options):
        for name, value in options.items():
            owner = made.trainer if hasattr(made.trainer, name) else made.trainer.args
            monkeypatch.setattr(owner, name, value)

    yield SimpleNamespace(trainer=made.trainer, inputs=dict(made.inputs), change=change)
    made.trainer.model.train()


def configure(step, kind, level, *, delta=False, **options):
    low, high, ceiling = CLIPS[level]
    step.change(
        loss_type=kind,
        importance_sampling_level=level,
        epsilon_low=low,
        epsilon_high=1 + high if kind == "cispo" else high,
        delta=ceiling if delta else None,
        **options,
    )


def outcome(loss, step):
    """Returns the loss, its gradient, and the logged metrics."""
    trainer = step.trainer
    trainer.model.zero_grad()
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    metrics.clear()
    value = loss(trainer, trainer.model, step.inputs)
    value.backward()
    grads = torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).double()
    assert all(len(values) == 1 for values in metrics.values())
    return SimpleNamespace(
        loss=float(value.detach()), grad=grads, metrics={name: value for name, (value,) in metrics.items()}
    )


def difference(mine, theirs):
    """Returns the largest relative difference of loss, gradient, gradient norm and metrics, with its name."""
    assert mine.metrics.keys() == theirs.metrics.keys()
    size = theirs.grad.norm()
    found = [
        (abs(mine.loss - theirs.loss) / abs(theirs.loss), "loss"),
        (float((mine.grad - theirs.grad).norm() / size), "gradient"),
        (float(abs(mine.grad.norm() - size) / size), "norm"),
    ]
    found += [(abs(mine.metrics[k] - x) / max(abs(x), 1e-2), k) for k, x in theirs.metrics.items()]
    assert not any(math.isnan(x) for x, _ in found), found
    return max(found)


def assert_same(step):
    theirs = outcome(PUBLISHED, step)
    mine = outcome(trl_loss.compute_loss, step)
    assert difference(mine, theirs)[0] < TOLERANCE, difference(mine, theirs)
    assert abs(theirs.loss) > 5e-3 and theirs.grad.norm() > 1e-3
    return theirs


# ---- one micro-batch


@pytest.mark.parametrize("kind, level", [*itertools.product(KINDS, CLIPS)])
def test_loss_gradient_and_metrics(kind, level, step):
    found = {}
    for delta, beta, correction in itertools.product((False, True), (0.0, 0.3), (False, True)):
        configure(step, kind, level, delta=delta, beta=beta, use_bias_correction_kl=correction)
        found[delta, beta, correction] = theirs = assert_same(step)
        clipped = [value for name, value in theirs.metrics.items() if "clip" in name and "min" not in name]
        assert clipped and all(0 < value < 1 for value in clipped[:1])
        assert ("kl" in theirs.metrics) == (beta != 0)
    # each option changes the loss, except delta with cispo, which has its own ceiling
    losses = {key: theirs.loss for key, theirs in found.items()}
    assert len(set(losses.values())) == (3 if kind == "cispo" else 6)
    assert (losses[False, 0.0, False] == losses[True, 0.0, False]) == (kind == "cispo")


@pytest.mark.parametrize("kind", KINDS)
def test_an_on_policy_step_and_an_evaluation(kind, step):
    """An on-policy step has no old log-probabilities; an evaluation is not cut into micro-batches."""
    configure(step, kind, "token", beta=0.3)
    off_policy = outcome(PUBLISHED, step)
    step.trainer.model.eval()
    evaluated = assert_same(step)
    assert evaluated.loss != pytest.approx(off_policy.loss)
    step.trainer.model.train()
    del step.inputs["old_per_token_logps"]
    assert_same(step)


@pytest.mark.parametrize("kind", ["grpo", "dapo"])
@pytest.mark.parametrize("bonus", [0.0, 0.5])
def test_token_weights(kind, bonus, step):
    """vLLM's weights, and the masks of stale samples, low-entropy tokens and tool tokens: each alone, then all."""
    shape = step.inputs["completion_mask"].shape
    generator = torch.Generator().manual_seed(1)
    weight = torch.rand(shape, generator=generator).mul(2).clamp(max=1.5)
    weight = weight.where(weight > 0.3, 0.0)
    tools = (torch.rand(shape, generator=generator) < 0.8).long()
    sampled = step.inputs["old_per_token_logps"] + 1.0
    given = [
        ({}, {}),
        ({"use_vllm": True}, {"importance_sampling_ratio": weight}),
        ({"use_vllm": True}, {"importance_sampling_ratio": weight[:, :1]}),
        ({"off_policy_mask_threshold": 0.0}, {}),
        ({"off_policy_mask_threshold": 0.5}, {"sampling_per_token_logps": sampled}),
        ({"top_entropy_quantile": 0.6}, {}),
        ({}, {"tool_mask": tools}),
        ({}, {"advantages": step.inputs["advantages"][:, None] * (0.5 + weight)}),
    ]
    given.append(({k: v for o, _ in given for k, v in o.items()}, {k: v for _, i in given[:7] for k, v in i.items()}))
    unset = {"use_vllm": False, "off_policy_mask_threshold": None, "top_entropy_quantile": 1.0}
    before, losses = dict(step.inputs), set()
    for options, inputs in given:
        configure(step, kind, "token", beta=0.3, entropy_coef=bonus, **{**unset, **options})
        step.change(_entropy_bonus_enabled=bonus != 0)
        step.inputs = {**before, **inputs}
        losses.add(assert_same(step).loss)
    assert len(losses) == len(given), "each must change the loss"


def test_sequence_weights(step):
    weight = torch.rand(len(step.inputs["completion_mask"]), 1, generator=torch.Generator().manual_seed(2))
    step.inputs["importance_sampling_ratio"] = weight
    configure(step, "grpo", "sequence", use_vllm=True, off_policy_mask_threshold=0.0)
    with_weights = assert_same(step)
    configure(step, "grpo", "sequence", use_vllm=False, off_policy_mask_threshold=None)
    assert assert_same(step).loss != with_weights.loss


def test_balance_of_experts(tokenizer, tmp_path):
    folder, kind = str(tmp_path / "moe"), (Qwen3MoeConfig, Qwen3MoeForCausalLM)
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "router_aux_loss_coef": 0.1}
    text_model(len(tokenizer), kind, **sizes).save_pretrained(folder)
    trainer = online(folder, False, tokenizer, tmp_path)
    step = SimpleNamespace(trainer=trainer, inputs=micro_batch(trainer))
    theirs = assert_same(step)
    trainer.aux_loss_enabled = False
    assert abs(assert_same(step).loss - theirs.loss) > 1e-3


class TwoRanks:
    """An accelerator of two processes; the other one has half of each value."""

    num_processes = 2

    def __init__(self, one):
        self.one = one

    def __getattr__(self, name):
        return getattr(self.one, name)

    def gather(self, x):
        x = x[None] if x.dim() == 0 else x
        return torch.cat((x, x / 2))

    def reduce(self, x, reduction):
        assert reduction == "sum"
        return x + x / 2


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks(kind, step):
    configure(step, kind, "token", entropy_coef=0.1)
    step.change(_entropy_bonus_enabled=True)
    alone = assert_same(step)
    step.change(accelerator=TwoRanks(step.trainer.accelerator))
    theirs = assert_same(step)
    assert (theirs.loss == alone.loss) == (kind not in ("dapo", "cispo"))
    assert theirs.metrics != alone.metrics


def test_no_valid_token(step):
    """As when every completion is too long: the loss and the gradient are 0."""
    step.inputs["completion_mask"] = torch.zeros_like(step.inputs["completion_mask"])
    configure(step, "grpo", "token")
    theirs, mine = outcome(PUBLISHED, step), outcome(trl_loss.compute_loss, step)
    for found in (theirs, mine):
        assert found.loss == 0 and not found.grad.any()
    assert mine.metrics == pytest.approx(theirs.metrics, nan_ok=True)


# ---- a wrong loss is noticed


def flipped(loss, **_):
    return 2 * loss.detach() - loss


def longer(loss, **_):
    return loss / 1.01


@pytest.mark.parametrize("wrong", [flipped, longer])
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_loss_is_noticed(wrong, kind, step, monkeypatch):
    spoil(monkeypatch, wrong)
    configure(step, kind, "token")
    theirs, mine = outcome(PUBLISHED, step), outcome(trl_loss.compute_loss, step)
    assert difference(mine, theirs)[0] > 100 * TOLERANCE


def spoil(monkeypatch, wrong):
    published = padded.policy_loss

    def spoilt(*args, **options):
        loss, totals = published(*args, **options)
        return wrong(loss), totals

    monkeypatch.setattr(padded, "policy_loss", spoilt)


# ---- training

RUNS = {
    "dapo": {"epsilon_high": 0.28, "delta": 1.5, "entropy_coef": 0.01},
    "grpo": {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    "bnpo": {"top_entropy_quantile": 0.5, "use_bias_correction_kl": False},
    "dr_grpo": {"mask_truncated_completions": True, "steps_per_generation": 4},
    "cispo": {"epsilon_high": 1.1},
    "luspo": {"importance_sampling_level": "sequence", "off_policy_mask_threshold": 0.1},
}


def trained(make):
    """Trains with two of three completions cut short; returns the log without times, and the weights."""
    trainer = make()
    sample, end = trainer._generate_single_turn, trainer.processing_class.eos_token_id

    def ragged(*args):
        completions, *rest = sample(*args)
        return [[*ids[: 3 + 2 * i], end] if i % 3 else ids for i, ids in enumerate(completions)], *rest

    trainer._generate_single_turn = ragged
    trainer.train()
    logs = [history for history in trainer.state.log_history if "loss" in history]
    steps = [{k: x for k, x in log.items() if not any(word in k for word in CLOCKS)} for log in logs]
    return SimpleNamespace(steps=steps, weights={n: x.detach().clone() for n, x in trainer.model.named_parameters()})


@pytest.mark.parametrize("kind", RUNS)
def test_training(kind, make, monkeypatch):
    make = functools.partial(make, loss_type=kind, **RUNS[kind])
    theirs = trained(make)
    assert len(theirs.steps) == 3 and max(log["grad_norm"] for log in theirs.steps) > 1e-2
    with ours.patch(losses=True):
        assert GRPOTrainer._compute_loss is trl_loss.compute_loss
        mine = trained(make)
        assert largest_difference(mine, theirs)[0] < TRAINED, largest_difference(mine, theirs)
        if kind == "dapo":
            spoil(monkeypatch, flipped)
            assert largest_difference(trained(make), theirs)[0] > 100 * TRAINED


def test_training_with_images(tmp_path):
    """The model receives its inputs other than tokens."""
    path = str(tmp_path / "policy")
    model, tokenizer = tiny_policy(SIZE)
    model.lm_head.weight.data.mul_(30)
    model.save_pretrained(path)
    processor = Processor(tiny_image_processor(SIZE), tokenizer)
    make = functools.partial(online, path, True, processor, tmp_path, loss_type="bnpo", gradient_accumulation_steps=2)
    theirs = run(make)
    with ours.patch(losses=True):
        assert largest_difference(run(make), theirs)[0] < TRAINED


# ---- refusals, undo

REFUSED = [
    ({"loss_type": "sapo"}, r"loss_type among grpo, bnpo, dr_grpo, dapo, cispo, luspo with .*, got 'sapo'"),
    ({"loss_type": "vespo"}, r"loss_type among .*, got 'vespo'"),
    ({"use_adaptive_entropy": True}, r"use_adaptive_entropy=False \(entropy_coef is a constant bonus\)"),
    ({"delta": 1.2}, r"delta above 1 \+ epsilon_high = 1\.2 .*, got 1\.2"),
    ({"loss_type": "cispo"}, 'epsilon_high >= 1 with loss_type="cispo".*, got 0.2'),
    (
        {"importance_sampling_level": "sequence", "top_entropy_quantile": 0.5},
        'top_entropy_quantile=1.0 with importance_sampling_level="sequence"',
    ),
    (
        {"importance_sampling_level": "sequence", "use_vllm": True, "vllm_importance_sampling_mode": "token_mask"},
        'vllm_importance_sampling_mode="sequence_mask" or "sequence_truncate" with .*"sequence".*got \'token_mask\'',
    ),
    ({"importance_sampling_level": "word"}, "importance_sampling_level among token, sequence with .*got 'word'"),
]


def attributes():
    owners = [trl.trainer.utils, trl.trainer.grpo_trainer, GRPOTrainer]
    return {(owner.__name__, name): value for owner in owners for name, value in vars(owner).items()}


@pytest.fixture
def untouched():
    """Asserts that a refused call leaves every attribute unchanged."""
    before = attributes()
    yield before
    after = attributes()
    assert after.keys() == before.keys() and all(after[key] is value for key, value in before.items())


@pytest.mark.parametrize("options, message", REFUSED)
def test_unsupported_options_are_refused_when_a_trainer_is_made(options, message, make, untouched):
    with ours.patch(losses=True), pytest.raises(NotImplementedError, match=message) as caught:
        make(**options)
    assert "or TRL's own loss with losses=False" in str(caught.value)


def test_a_refused_trainer_leaves_its_model_unchanged(tmp_path, untouched):
    """The model keeps its own forward."""
    model, config = text_model(), GRPOConfig(str(tmp_path), loss_type="sapo", use_cpu=True, bf16=False)
    with ours.patch(losses=True), pytest.raises(NotImplementedError, match="got 'sapo'"):
        GRPOTrainer(model, len, config)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("options, message", REFUSED)
def test_unsupported_options_are_refused_at_the_next_step(options, message, step, untouched):
    """A trainer made before the patch is refused before its model runs and before anything is logged."""
    step.change(**options)
    step.trainer._metrics["train"].clear()
    with ours.patch(losses=True), pytest.raises(NotImplementedError, match=message):
        step.trainer.compute_loss(None, step.inputs)
    assert not step.trainer._metrics["train"]


def test_token_advantages_with_a_sequence_ratio_are_refused(step, untouched):
    configure(step, "grpo", "sequence")
    step.inputs["advantages"] = step.inputs["advantages"][:, None] * torch.ones(1, 5)
    with pytest.raises(NotImplementedError, match=r"advantages of shape \(B,\) with .*, got \(8, 5\)"):
        trl_loss.compute_loss(step.trainer, None, step.inputs)


class OwnLoss(GRPOTrainer):
    """A subclass with another loss, like TRL's experimental trainers; it ignores loss_type."""

    def _compute_loss(self, model, inputs):
        return super()._compute_loss(model, inputs)


def test_a_subclass_with_its_own_loss_is_accepted(make, untouched):
    with ours.patch(losses=True):
        made = make(kind=(OwnLoss, GRPOConfig), loss_type="sapo")
    assert made.loss_type == "sapo"


def test_undo_restores_every_attribute(untouched):
    patched = ours.patch(losses=True)
    changed = {key for key, value in attributes().items() if value is not untouched[key]}
    assert {("GRPOTrainer", "_compute_loss"), ("GRPOTrainer", "__init__")} < changed
    with pytest.raises(RuntimeError, match="one that is patched already"):
        ours.patch(losses=True)
    patched.undo()
    patched.undo()
    with ours.patch():
        changed = {owner for (owner, _), value in attributes().items() if value is not untouched.get((owner, _))}
        assert "GRPOTrainer" not in changed, "without losses=True the losses stay TRL's"


@pytest.mark.parametrize("name", ["_compute_loss", "_get_per_token_logps_and_entropies", "get_off_policy_mask"])
def test_a_changed_signature_is_refused(name, monkeypatch):
    monkeypatch.setattr(GRPOTrainer, name, lambda self, batch: None)
    before = attributes()
    with pytest.raises(RuntimeError, match=r"expected .*, got \(self, batch\)"):
        ours.patch(losses=True)
    assert all(value is before[key] for key, value in attributes().items())
