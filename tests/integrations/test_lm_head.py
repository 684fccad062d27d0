"""`patch_lm_head` makes transformers' models return the log-probabilities of their logits in less memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from prism.models.sizes import TinySize
from prism.models.tiny import tiny_policy
from prism_kernels.integrations import patching
from prism_kernels.integrations.transformers.lm_head import patch_lm_head

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


def text_model(vocabulary=90, kind=(Qwen3Config, Qwen3ForCausalLM), **options):
    torch.manual_seed(0)
    config, model = kind
    made = model(config(vocab_size=vocabulary, num_key_value_heads=1, head_dim=16, **SIZES, **options))
    made.lm_head.weight.data.mul_(20)
    return made.eval()


def text_inputs():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 90, (2, 11), generator=generator)
    # the second row is padded on the right
    mask = (torch.arange(11) < torch.tensor([11, 8])[:, None]).long()
    labels = ids.masked_fill((mask == 0) | (torch.arange(11) < 3), -100)
    return {"input_ids": ids, "attention_mask": mask}, labels


def vision_model():
    model, tokenizer = tiny_policy(TinySize(vocab_size=400, hidden_size=32, layers=1, heads=2, key_value_heads=1))
    model.lm_head.weight.data.mul_(20)
    image, start = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|vision_start|>"])
    ids = torch.tensor([[5, start, image, image, image, image, 9, 10, 11, 12]])
    patches = torch.randn(16, 3 * 2 * 16 * 16, generator=torch.Generator().manual_seed(2))
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == image).int(),
    }
    return model, inputs, ids.masked_fill(torch.arange(10) < 6, -100)


def dense(logits, labels, temperature=1.0):
    """Returns log-probabilities and entropies of the labels, from all logits."""
    pi = (logits[:, :-1] / temperature).log_softmax(-1)
    target, mask = labels[:, 1:].clamp(min=0), labels[:, 1:] != -100
    logp = pi.gather(-1, target[..., None])[..., 0]
    return logp * mask, -(pi.exp() * pi).sum(-1) * mask


@pytest.mark.parametrize("cache_bytes", [0, None])
@pytest.mark.parametrize("kind", ["text", "vision"])
def test_log_probs_and_gradients_equal_those_of_the_logits(kind, cache_bytes):
    if kind == "text":
        model, (inputs, labels) = text_model(), text_inputs()
    else:
        model, inputs, labels = vision_model()
    expected = dense(model(**inputs).logits, labels, 0.7)
    patch_lm_head(model, cache_bytes=cache_bytes)
    out = model(**inputs, labels=labels, token_logprobs=True, temperature=0.7, entropy=True)
    assert torch.equal(out.mask, labels[:, 1:] != -100)
    assert set(out.keys()) == {"log_probs", "entropy", "mask"}
    weights = [p for p in model.parameters() if p.requires_grad]
    g, h = torch.randn(2, *out.mask.shape, generator=torch.Generator().manual_seed(3))
    pairs = []
    for logp, entropy in (expected, (out.log_probs, out.entropy)):
        total = (logp * g).sum() + (entropy * h).sum()
        pairs.append(torch.autograd.grad(total, weights, allow_unused=True, materialize_grads=True))
    for mine, theirs in zip((out.log_probs, out.entropy), expected):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert sum(float(b.norm()) > 0 for b in pairs[0]) > len(weights) // 2
    for b, a in zip(*pairs):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6


def test_a_call_without_token_logprobs_is_unchanged():
    model, (inputs, labels) = text_model(), text_inputs()
    expected = model(**inputs, labels=labels)
    generated = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with patch_lm_head(model):
        out = model(**inputs, labels=labels)
        assert torch.equal(out.logits, expected.logits) and torch.equal(out.loss, expected.loss)
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), generated)
        # the mean of the negative log-probabilities is transformers' loss
        found = model(**inputs, labels=labels, token_logprobs=True)
        torch.testing.assert_close(-found.log_probs.sum() / found.mask.sum(), expected.loss)
        assert found.entropy is None


def test_shifted_labels_and_a_temperature_for_each_token():
    model, (inputs, labels) = text_model(), text_inputs()
    patch_lm_head(model)
    temperature = torch.rand(2, 11) + 0.5
    aligned = labels.roll(-1, 1)
    aligned[:, -1] = -100
    out = model(**inputs, shift_labels=aligned, token_logprobs=True, temperature=temperature)
    assert out.log_probs.shape == (2, 11)
    plain, _ = dense(model(**inputs).logits, labels, temperature[:, :-1, None])
    torch.testing.assert_close(out.log_probs[:, :-1], plain, rtol=1e-5, atol=1e-5)
    assert (out.log_probs[:, -1] == 0).all()


def test_balance_loss():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    model = text_model(kind=(Qwen3MoeConfig, Qwen3MoeForCausalLM), output_router_logits=True, **experts)
    inputs, labels = text_inputs()
    expected = model(**inputs, labels=labels).aux_loss
    patch_lm_head(model)
    out = model(**inputs, labels=labels, token_logprobs=True)
    torch.testing.assert_close(out.aux_loss, expected)


# FSDP2 warns of results that lose its hooks
@pytest.mark.filterwarnings("error::UserWarning:torch.distributed.fsdp")
@pytest.mark.parametrize("apart", [False, True])
def test_sharded_by_fsdp(apart, tmp_path):
    """FSDP2's parameters are DTensors; the head is sharded with the model or separately."""
    model, (inputs, labels) = text_model(), text_inputs()
    patch_lm_head(model)

    def gradient():
        model(**inputs, labels=labels, token_logprobs=True, entropy=True).log_probs.sum().backward()
        grad = model.lm_head.weight.grad
        return getattr(grad, "full_tensor", lambda: grad)()

    expected = gradient()
    model.zero_grad()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        if apart:
            fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert isinstance(model.lm_head.weight, DTensor)
        torch.testing.assert_close(gradient(), expected)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("earlier", [False, True])
def test_undo(earlier):
    model = text_model()
    before = model.forward
    if earlier:
        model.forward = before = lambda **_: None
    held = dict(vars(model))
    patch = patch_lm_head(model)
    assert model.forward is not before
    patch.undo()
    patch.undo()
    assert vars(model).keys() == held.keys()
    assert all(vars(model)[name] is value for name, value in held.items())
    assert model.forward == before


def test_refusals(monkeypatch):
    model, (inputs, labels) = text_model(), text_inputs()
    with pytest.raises(TypeError, match="an LM head that has a weight, got NoneType"):
        patch_lm_head(model.model)
    with pytest.raises(TypeError, match="a model with an LM head"):
        patch_lm_head(torch.nn.Linear(2, 2))
    with patch_lm_head(model):
        with pytest.raises(RuntimeError, match="one that is patched already"):
            patch_lm_head(model)
        with pytest.raises(ValueError, match="expected labels or shift_labels, got None"):
            model(**inputs, token_logprobs=True)
        model.lm_head.weight.ds_status = None
        with pytest.raises(RuntimeError, match="a model without DeepSpeed ZeRO-3"):
            model(**inputs, labels=labels, token_logprobs=True)
    monkeypatch.setattr(patching, "version", lambda _: "4.57.0")
    with pytest.raises(RuntimeError, match=r"expected transformers 5, which it was tried with, got 4\.57\.0"):
        patch_lm_head(model)
    assert "forward" not in vars(model)


MEMORY = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Qwen3Config, Qwen3ForCausalLM
from bench.timing import PeakMemory
from prism_kernels.integrations.transformers.lm_head import patch_lm_head

torch.set_num_threads(1)
sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
model = Qwen3ForCausalLM(Qwen3Config(vocab_size=60000, num_key_value_heads=1, head_dim=16, **sizes))
ids = torch.randint(0, 60000, (1, 1025))
patch_lm_head(model)

def step():
    model.zero_grad()
    if sys.argv[1] == "ours":
        logp = model(input_ids=ids, labels=ids, token_logprobs=True).log_probs
    else:
        logits = model(input_ids=ids).logits[:, :-1]
        logp = -torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="none")
    logp.mean().backward()

step()
with PeakMemory("cpu") as peak:
    step()
print(peak.bytes)
"""


def test_memory():
    """Forward and backward need at most half of the memory of the logits; each side runs in its own process."""

    def measure(side):
        environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, side],
            cwd=Path(__file__).parents[2],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return int(done.stdout)

    logits = 4 * 1024 * 60000
    theirs, mine = measure("theirs"), measure("ours")
    assert theirs > 1.5 * logits
    assert mine <= 0.5 * theirs
