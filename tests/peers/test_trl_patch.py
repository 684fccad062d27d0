"""TRL 1.16's trainers with and without our head: equal numbers, LoRA on the head, undo, refusals.

The models are tiny and random; runs with the same seed sample the same completions.
"""

import functools
from types import SimpleNamespace

import datasets
import pytest
import torch
import trl.trainer.utils
from peft import LoraConfig, VeraConfig, get_peft_model
from PIL import Image
from transformers import (
    ProcessorMixin,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from trl import (
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from prism.models.sizes import TinySize
from prism.models.tiny import tiny_image_processor, tiny_policy
from prism_kernels.integrations import head, patching
from prism_kernels.integrations import trl as ours

LANGUAGE = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "heads": 2, "key_value_heads": 1}
SIZE = TinySize(**LANGUAGE, layers=2, head_dim=16, vision_hidden_size=32, vision_layers=1, image_side=64)
TOLERANCE = 1e-4
METRICS = (
    "loss",
    "grad_norm",
    "kl",
    "entropy",
    "policy_loss",
    "mean_token_accuracy",
    "logits/chosen",
    "logits/rejected",
)
COLOURS = {"circles": (255, 0, 0), "squares": (0, 255, 0), "stars": (0, 0, 255), "crosses": (90, 90, 0)}


class Processor(Qwen3VLProcessor):
    """Qwen3-VL's processor without videos, whose part needs torchvision."""

    def __init__(self, image_processor, tokenizer):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=tokenizer.chat_template)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """The folder of a tiny Qwen3-VL, from which TRL also loads the reference model, and its tokenizer."""
    folder = tmp_path_factory.mktemp("policy")
    model, tokenizer = tiny_policy(SIZE)
    # larger logits, like a trained model's
    model.lm_head.weight.data.mul_(30)
    model.save_pretrained(folder)
    return SimpleNamespace(folder=str(folder), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def text_policy(tmp_path_factory, policy):
    """The folder of a tiny text-only Qwen3, and its tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    text_model(len(policy.tokenizer)).save_pretrained(folder)
    return SimpleNamespace(folder=str(folder), tokenizer=policy.tokenizer)


def text_model(vocabulary=64, kind=(Qwen3Config, Qwen3ForCausalLM), **options):
    torch.manual_seed(0)
    config, model = kind
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = model(config(vocab_size=vocabulary, num_key_value_heads=1, head_dim=16, **sizes, **options))
    made.lm_head.weight.data.mul_(30)
    return made.eval()


def reward(completions, **_):
    return [float(sum(map(ord, str(c))) % 7) for c in completions]


def questions(images):
    rows = [{"prompt": [{"role": "user", "content": f"How many {name}?"}]} for name in COLOURS]
    if images:
        rows = [{**row, "image": Image.new("RGB", (64, 64), c)} for row, c in zip(rows, COLOURS.values())]
    return datasets.Dataset.from_list(rows)


def online(folder, images, processor, tmp_path, *, kind=(GRPOTrainer, GRPOConfig), peft=None, steps=3, **options):
    """Returns a GRPO or RLOO trainer with a reference model and two optimisation steps per generation."""
    trainer, config = kind
    args = config(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=12,
        num_iterations=2,
        max_steps=steps,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        beta=0.04,
        seed=3,
        **common(),
        **options,
    )
    data = questions(images)
    return trainer(folder, reward, args, train_dataset=data, processing_class=processor, peft_config=peft)


def common():
    return {
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def run(make):
    """Trains, and returns the steps' logs and the weights."""
    trainer = make()
    trainer.train()
    steps = [{k: h[k] for k in METRICS if k in h} for h in trainer.state.log_history if "loss" in h]
    weights = {name: x.detach().clone() for name, x in trainer.model.named_parameters()}
    return SimpleNamespace(steps=steps, weights=weights)


def largest_difference(mine, theirs):
    """Returns the largest relative difference of a logged number or a weight matrix, with its name."""
    assert [step.keys() for step in mine.steps] == [step.keys() for step in theirs.steps]
    assert mine.weights.keys() == theirs.weights.keys()
    found = []
    for name in {name for step in theirs.steps for name in step}:
        a, b = (torch.tensor([s[name] for s in one.steps if name in s]).double() for one in (mine, theirs))
        # relative to the largest of the run, because an on-policy loss is 0 except for rounding
        found.append((float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)), name))
    for name, b in theirs.weights.items():
        found.append((float((mine.weights[name] - b).norm() / b.norm().clamp(min=1e-6)), name))
    return max(found)


def scaled(monkeypatch, factor):
    """Multiplies our op's gradients by a factor, and keeps its values."""
    published = head.linear_logprob

    @functools.wraps(published)
    def wrong(*args, **options):
        result = published(*args, **options)
        logp, entropy = (x if x is None else x.detach() * (1 - factor) + x * factor for x in result[:2])
        return result._replace(logp=logp, entropy=entropy)

    monkeypatch.setattr(head, "linear_logprob", wrong)


# ---- equal training


def test_grpo_with_images(policy, tmp_path, monkeypatch):
    """Ten steps give equal losses, gradient norms and weights; a wrong gradient is noticed."""
    processor = Processor(tiny_image_processor(SIZE), policy.tokenizer)
    make = functools.partial(online, policy.folder, True, processor, tmp_path, entropy_coef=0.01, steps=10)
    theirs = run(make)
    assert len(theirs.steps) == 10
    start = tiny_policy(SIZE, tokenizer=policy.tokenizer)[0].get_parameter("model.visual.patch_embed.proj.weight")
    # the images reach the model: the vision tower trains
    assert not torch.equal(theirs.weights["model.visual.patch_embed.proj.weight"], start)
    assert max(abs(step["policy_loss"]) for step in theirs.steps) > 1e-3
    with ours.patch():
        mine = run(make)
        assert largest_difference(mine, theirs)[0] < TOLERANCE, largest_difference(mine, theirs)
        assert largest_difference(mine, theirs)[0] > 0, "equal bits mean that TRL's own head ran"
    with ours.patch():
        scaled(monkeypatch, -1.0)
        assert largest_difference(run(make), theirs)[0] > 1000 * TOLERANCE


def rloo(policy, tmp_path):
    return online(policy.folder, False, policy.tokenizer, tmp_path, kind=(RLOOTrainer, RLOOConfig))


def grpo_cast(policy, tmp_path):
    options = {"cast_lm_head_to_fp32": True, "model_init_kwargs": {"dtype": "bfloat16"}}
    return online(policy.folder, False, policy.tokenizer, tmp_path, **options)


def offline(kind, policy, tmp_path, rows, **options):
    trainer, config = kind
    args = config(output_dir=str(tmp_path), max_steps=3, learning_rate=1e-3, **common(), **options)
    data = datasets.Dataset.from_list(rows)
    return trainer(policy.folder, args=args, train_dataset=data, processing_class=policy.tokenizer)


def sft(policy, tmp_path):
    chats = [[("user", name), ("assistant", f"{name} " * 5)] for name in COLOURS]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    return offline((SFTTrainer, SFTConfig), policy, tmp_path, rows, per_device_train_batch_size=2)


def kto(policy, tmp_path):
    rows = [{"prompt": f"How many {n}? ", "completion": f"{n} {n}", "label": n < "d"} for n in COLOURS]
    return offline((KTOTrainer, KTOConfig), policy, tmp_path, rows, per_device_train_batch_size=4)


@pytest.mark.parametrize("make, tolerance", [(rloo, 1e-4), (sft, 1e-4), (kto, 1e-4), (grpo_cast, 2e-2)])
def test_other_trainers(make, tolerance, text_policy, tmp_path, monkeypatch):
    theirs = run(lambda: make(text_policy, tmp_path))
    with ours.patch(cache_bytes=None):
        mine = run(lambda: make(text_policy, tmp_path))
    assert largest_difference(mine, theirs)[0] < tolerance, largest_difference(mine, theirs)
    with ours.patch():
        scaled(monkeypatch, 1.1)
        assert largest_difference(run(lambda: make(text_policy, tmp_path)), theirs)[0] > 2 * tolerance


# ---- LoRA on the head


def lora(**options):
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "lm_head"], **options})


@pytest.mark.parametrize("trainer", ["grpo", "sft"])
def test_lora_on_the_head(trainer, text_policy, tmp_path):
    def make():
        if trainer == "grpo":
            return online(text_policy.folder, False, text_policy.tokenizer, tmp_path, peft=lora(), temperature=0.7)
        rows = datasets.Dataset.from_list([{"text": f"{name} " * 6} for name in COLOURS])
        args = SFTConfig(str(tmp_path), per_device_train_batch_size=2, max_steps=3, learning_rate=1e-3, **common())
        tokenizer = text_policy.tokenizer
        return SFTTrainer(text_policy.folder, args, train_dataset=rows, processing_class=tokenizer, peft_config=lora())

    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        make()
    with ours.patch():
        trained = make()
        before = {name: x.detach().clone() for name, x in trained.model.named_parameters() if "lm_head.lora" in name}
        trained.train()
    weights = dict(trained.model.named_parameters())
    assert len(before) == 2
    assert not any(torch.equal(weights[name], x) for name, x in before.items())
    # the reference: peft's own forward of the adapter, over all logits
    model, tau = trained.model, 0.7 if trainer == "grpo" else 1.0
    ids = torch.arange(24).view(2, 12) + 7
    fused = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    logits = model(input_ids=ids).logits[:, :-1] / tau
    plain = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
    trainable = [x for x in model.parameters() if x.requires_grad]
    g = torch.randn(plain.shape, generator=torch.Generator().manual_seed(0))
    pairs = [torch.autograd.grad((x * g).sum(), trainable) for x in (fused, plain)]
    for a, b in zip(*pairs):
        assert (a - b).norm() <= 1e-5 * b.norm()
        assert b.norm() > 0
    with model.disable_adapter():
        bare = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
        dense = model(input_ids=ids).logits[:, :-1] / tau
    torch.testing.assert_close(bare, dense.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(bare, fused, atol=1e-3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lora_dropout": 0.1}, "dropout; set lora_dropout=0"),
        ({"use_dora": True}, "a variant of LoRA"),
        ({"lora_bias": True}, "with a bias; set lora_bias=False"),
    ],
)
def test_unsupported_adapters_are_refused(options, message, text_policy, tmp_path):
    with ours.patch(), pytest.raises(NotImplementedError, match=message):
        online(text_policy.folder, False, text_policy.tokenizer, tmp_path, peft=lora(**options))


def test_two_active_adapters_are_refused():
    model = get_peft_model(text_model(), lora())
    model.add_adapter("second", lora())
    base = model.get_base_model()
    ours.fuse_lm_head(base)
    base.lm_head.set_adapter(["default", "second"])
    ids = torch.arange(8)[None]
    with pytest.raises(NotImplementedError, match="2 active ones: default, second"):
        base(input_ids=ids, labels=ids, fused_lm_head=True)


def test_another_kind_of_adapter_is_refused():
    model = get_peft_model(text_model(), VeraConfig(target_modules=["lm_head"], r=4))
    with pytest.raises(NotImplementedError, match="an adapter of type Linear"):
        ours.fuse_lm_head(model.get_base_model())


def test_cast_with_lora_is_refused(text_policy, tmp_path):
    with ours.patch(), pytest.raises(NotImplementedError, match="cast_lm_head_to_fp32=False with LoRA"):
        online(text_policy.folder, False, text_policy.tokenizer, tmp_path, peft=lora(), cast_lm_head_to_fp32=True)


def test_a_fully_trained_head_with_lora_elsewhere(text_policy, tmp_path):
    """TRL supports peft's modules_to_save, and so do we."""
    peft = lora(target_modules=["q_proj"], modules_to_save=["lm_head"])
    make = functools.partial(online, text_policy.folder, False, text_policy.tokenizer, tmp_path, peft=peft)
    theirs = run(make)
    with ours.patch():
        assert largest_difference(run(make), theirs)[0] < TOLERANCE


# ---- the head itself, compared with TRL's


CONFIGS = {
    "plain": {},
    "softcap": {"final_logit_softcapping": 5.0},
    "scale": {"logit_scale": 0.5},
    "divided": {"logits_scaling": 4.0},
    "both": {"final_logit_softcapping": 5.0, "logit_scale": 3.0},
}


def fields(add, config, inputs, **options):
    """Returns the output of a fused head, and the gradients of its log-probabilities and entropies."""
    model = text_model()
    for name, value in config.items():
        setattr(model.config, name, value)
    add(model, outputs=ours.FIELDS, **options)
    out = model(**inputs, fused_lm_head=True)
    weights = [model.lm_head.weight, model.model.layers[0].mlp.down_proj.weight]
    g, h = torch.randn(2, *out.log_probs.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((out.log_probs * g).sum() + (out.entropy * h).sum() + out.loss, weights)
    return out, grads


@pytest.mark.parametrize("labels", ["some", "shifted", "none", "counted"])
@pytest.mark.parametrize("config", CONFIGS)
def test_every_field(config, labels):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 64, (3, 40), generator=generator)
    # some labels are the model's most likely token, to test is_top1
    best = text_model()(input_ids=ids).logits.argmax(-1)
    best = best if labels == "shifted" else best.roll(1, 1)
    chance = torch.rand(ids.shape, generator=generator)
    some = torch.where(chance > 0.7, best, ids).masked_fill(chance < 0.3, -100)
    inputs = {
        "some": {"labels": some},
        "shifted": {"shift_labels": some},
        "none": {"labels": torch.full_like(ids, -100)},
        "counted": {"labels": some, "num_items_in_batch": torch.tensor(50)},
    }[labels]
    inputs = {"input_ids": ids, **inputs}
    theirs, their_grads = fields(trl.trainer.utils.add_fused_lm_head, CONFIGS[config], inputs, temperature=0.7)
    mine, grads = fields(ours.fuse_lm_head, CONFIGS[config], inputs, temperature=0.7)
    assert mine.keys() == theirs.keys()
    for name in (*ours.FIELDS, "loss", "label_mask"):
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-5)
    if labels != "none":
        assert 0 < theirs.is_top1.sum() < theirs.label_mask.sum()
    for a, b in zip(grads, their_grads):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_the_head_returns_only_requested_fields():
    model, ids = text_model(), torch.arange(8)[None]
    ours.fuse_lm_head(model)
    out = model(input_ids=ids, labels=ids, fused_lm_head=True)
    assert set(out.keys()) == {"loss", "log_probs", "label_mask"}
    # without the keyword the model's own forward runs
    plain = model(input_ids=ids, labels=ids)
    assert plain.logits.shape == (1, 8, 64)
    torch.testing.assert_close(plain.loss, out.loss)


def test_under_autocast_in_bf16():
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "labels": ids}
    with torch.autocast("cpu", torch.bfloat16):
        theirs, _ = fields(trl.trainer.utils.add_fused_lm_head, {}, inputs)
        mine, _ = fields(ours.fuse_lm_head, {}, inputs)
    for name in ("log_probs", "entropy", "mean_logits"):
        assert mine[name].dtype == torch.float32
        torch.testing.assert_close(mine[name], theirs[name], rtol=2e-2, atol=5e-2)


def test_balance_loss_of_experts():
    kind = (Qwen3MoeConfig, Qwen3MoeForCausalLM)
    found = []
    for add in (trl.trainer.utils.add_fused_lm_head, ours.fuse_lm_head):
        options = {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "output_router_logits": True,
        }
        model, ids = text_model(kind=kind, **options), torch.arange(16).view(2, 8)
        add(model)
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True)
        found.append((out.loss, out.aux_loss))
    assert found[0][1] > 0
    torch.testing.assert_close(found[0], found[1])


# ---- undo and refusals


def attributes():
    modules = [trl.trainer.utils, *(__import__(f"trl.trainer.{t}_trainer", fromlist=["x"]) for t in ours.TRAINERS)]
    return {(m.__name__, name): value for m in modules for name, value in vars(m).items()}


def test_undo_restores_every_attribute():
    before = attributes()
    patched = ours.patch()
    changed = {key for key, value in attributes().items() if value is not before[key]}
    assert len(changed) == 2 * len(ours.TRAINERS) + 1
    patched.undo()
    patched.undo()
    with pytest.raises(KeyError), ours.patch():
        raise KeyError
    after = attributes()
    assert after.keys() == before.keys()
    assert all(after[key] is value for key, value in before.items())


@pytest.fixture
def untouched():
    """Asserts that a refused call leaves every attribute unchanged."""
    before = attributes()
    yield before
    assert all(attributes()[key] is value for key, value in before.items())


def test_a_second_patch_is_refused(untouched):
    with ours.patch():
        during = attributes()
        with pytest.raises(RuntimeError, match="as published, got one that is patched already"):
            ours.patch()
        assert all(value is during[key] for key, value in attributes().items())


def test_an_unknown_version_is_refused(untouched, monkeypatch):
    versions = {"trl": "1.17.0", "transformers": "5.19.0"}
    monkeypatch.setattr(patching, "version", versions.__getitem__)
    with pytest.raises(RuntimeError, match=r"expected trl 1\.16, .* got 1\.17\.0"):
        ours.patch()


@pytest.mark.parametrize(
    "module, message",
    [
        ("utils", r"\(model, temperature, cast_lm_head_to_fp32, outputs\), got \(model, tau\)"),
        ("kto_trainer", r"trl\.trainer\.kto_trainer to use"),
    ],
)
def test_a_changed_head_in_the_package_is_refused(module, message, monkeypatch):
    monkeypatch.setattr(f"trl.trainer.{module}.add_fused_lm_head", lambda model, tau: None)
    before = attributes()
    with pytest.raises(RuntimeError, match=message):
        ours.patch()
    assert all(value is before[key] for key, value in attributes().items())


def test_bad_calls():
    model = text_model()
    with pytest.raises(ValueError, match=r"outputs among log_probs, .*, got argmax"):
        ours.fuse_lm_head(model, outputs=("log_probs", "argmax"))
    with pytest.raises(TypeError, match="a model with an LM head that has a weight, got NoneType"):
        ours.fuse_lm_head(model.model.__class__(model.config))
    model.config.logit_scale = 0.0
    with pytest.raises(ValueError, match=r"scaled by a positive number, got 0\.0"):
        ours.fuse_lm_head(model)
    assert "forward" not in vars(model)
