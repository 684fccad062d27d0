"""OpenRLHF 0.11's log-probabilities, entropies, Actor and loss, with and without our patch.

OpenRLHF cannot be imported without DeepSpeed and flash-attn. If it is not installed,
`bench.end_to_end.openrlhf_stand_in` replaces its three modules, with the same names, parameters and mathematics.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from bench.end_to_end import openrlhf_stand_in
from prism_kernels.integrations import head, patching
from prism_kernels.integrations import openrlhf as ours

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def package(monkeypatch):
    return stand_in(monkeypatch)


def stand_in(monkeypatch):
    """Returns the modules of OpenRLHF, or of its stand-in."""
    monkeypatch.setattr(patching, "version", lambda _: openrlhf_stand_in.VERSION)
    for name, module in openrlhf_stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return [importlib.import_module(name) for name in openrlhf_stand_in.NAMES]


def language_model(kind=(Qwen3Config, Qwen3ForCausalLM), **options):
    torch.manual_seed(0)
    config, model = kind
    made = model(config(vocab_size=90, num_key_value_heads=1, head_dim=16, **SIZES, **options))
    made.lm_head.weight.data.mul_(20)
    return made.eval()


def make_actor(package, model, temperature=1.0):
    actor = package[-1].Actor(model, temperature=temperature)
    actor.packing_samples = False
    return actor


def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 90, (2, 12), generator=generator)
    attention = (torch.arange(12) >= torch.tensor([0, 3])[:, None]).long()
    return ids, attention, torch.ones(2, 5, dtype=torch.bool)


@pytest.mark.parametrize("cache_bytes", [0, None])
@pytest.mark.parametrize("asked", ["action", "all"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_actor(package, temperature, asked, cache_bytes):
    """Log-probabilities, and at temperature 1 also entropies, with their gradients."""
    ids, attention, action_mask = batch()
    actor = make_actor(package, language_model(), temperature)
    asked = {"action_mask": action_mask} if asked == "action" else {"return_logprobs": True}
    # the published function divides the logits in place, which makes the gradient of its entropies fail
    both = temperature == 1.0

    def run():
        logp, output = actor(ids, attention_mask=attention, return_output=True, return_entropy=both, **asked)
        g = torch.randn(logp.shape, generator=torch.Generator().manual_seed(2))
        total = (logp * g).sum() + (output.entropy.sum() if both else 0)
        return [
            logp,
            *([output.entropy] if both else []),
            *torch.autograd.grad(total, list(actor.parameters())),
        ], output

    theirs, _ = run()
    with ours.patch(cache_bytes=cache_bytes):
        mine, output = run()
    assert output.logits is None
    assert "forward" not in vars(actor.model)
    for a, b in zip(mine, theirs):
        assert a.shape == b.shape
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6


def test_no_logits_are_made(package, monkeypatch):
    """The head's forward does not run; one fused call computes log-probabilities and entropies."""
    ids, attention, _ = batch()
    actor = make_actor(package, language_model())
    monkeypatch.setattr(actor.model.lm_head, "forward", None)
    calls = []
    published = head.linear_logprob
    monkeypatch.setattr(head, "linear_logprob", lambda *a, **o: calls.append(1) or published(*a, **o))
    with ours.patch():
        actor(ids, attention_mask=attention, return_logprobs=True, return_output=True, return_entropy=True)
    assert len(calls) == 1


def test_a_call_for_logits_returns_logits(package):
    ids, attention, _ = batch()
    actor = make_actor(package, language_model())
    expected = actor(ids, attention_mask=attention, return_output=True).logits
    with ours.patch():
        assert torch.equal(actor(ids, attention_mask=attention, return_output=True).logits, expected)


def test_lora_and_experts(package):
    peft = pytest.importorskip("peft")
    ids, attention, action_mask = batch()
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "output_router_logits": True}
    model = peft.get_peft_model(
        language_model((Qwen3MoeConfig, Qwen3MoeForCausalLM), **experts),
        peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False),
    )
    actor = make_actor(package, model)
    theirs, output = actor(ids, action_mask, attention, return_output=True)
    with ours.patch():
        mine, found = actor(ids, action_mask, attention, return_output=True)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.aux_loss, output.aux_loss)


def test_functions_of_logits(package):
    utils, x = package[2], torch.randn(2, 5, 11)
    labels = torch.randint(0, 11, (2, 5))
    theirs = utils.log_probs_from_logits(x.clone(), labels, 0.7), utils.compute_entropy(x)
    with ours.patch():
        kept = x.clone()
        mine = utils.log_probs_from_logits(x, labels, temperature=0.7), utils.compute_entropy(x)
    torch.testing.assert_close(mine, theirs)
    assert torch.equal(x, kept)


LOSSES = {
    "token": {},
    "dual": {"dual_clip": 1.2},
    "sample": {"token_level_loss": False},
    "tis": {"vllm_is_correction_type": "tis"},
    "icepop": {"vllm_is_correction_type": "icepop"},
    "seq-mask-tis": {"vllm_is_correction_type": "seq-mask-tis"},
}


@pytest.mark.parametrize("counts", [{}, {"dp_size": 2, "batch_num_tokens": 40.0, "global_batch_size": 8.0}])
@pytest.mark.parametrize("name", LOSSES)
def test_loss(package, name, counts):
    generator = torch.Generator().manual_seed(0)
    logp, old, rollout, advantage = torch.randn(4, 3, 7, generator=generator, dtype=torch.float64) * 0.5
    mask = (torch.arange(7) < torch.tensor([7, 4, 5])[:, None]).double()
    options = dict(LOSSES[name])
    if "vllm_is_correction_type" in options:
        options |= {"enable_vllm_is_correction": True, "vllm_is_truncated_threshold": [0.7, 1.3]}
    module = package[3].PolicyLoss(clip_eps_high=0.28, **options)
    logp.requires_grad_()

    def run():
        found = module(logp, old, advantage, mask, rollout, **counts)
        return torch.autograd.grad(found[0], logp)[0], *found

    theirs = run()
    with ours.patch(losses=True):
        mine = run()
    for place, (a, b) in enumerate(zip(mine, theirs)):
        if name == "icepop" and place == 2:
            # we do not count a token of weight 0 as clipped
            assert a < b
        elif b is None:
            assert a is None
        else:
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-6, atol=1e-6)
    assert theirs[0].norm() > 0
    assert 0 < theirs[2] < 1


MEMORY = """
import sys
import test_openrlhf_patch as t, torch
from bench.timing import PeakMemory
from transformers import Qwen3Config, Qwen3ForCausalLM

torch.set_num_threads(1)
model = Qwen3ForCausalLM(Qwen3Config(vocab_size=60000, num_key_value_heads=1, head_dim=16, **t.SIZES))
ids = torch.randint(0, 60000, (1, 1024))
with t.pytest.MonkeyPatch.context() as patch:
    package = t.stand_in(patch)
    actor = t.make_actor(package, model)
    if sys.argv[1] == "ours":
        t.ours.patch()

    def step():
        model.zero_grad()
        actor(ids, attention_mask=torch.ones_like(ids), return_logprobs=True).mean().backward()

    step()
    with PeakMemory("cpu") as peak:
        step()
print(peak.bytes)
"""


def test_memory():
    """An Actor's step needs at most half of the unfused memory; each side runs in its own process."""

    def measure(side):
        root = Path(__file__).parents[2]
        environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
        environment["PYTHONPATH"] = os.pathsep.join([str(root), str(Path(__file__).parent)])
        command = [sys.executable, "-c", MEMORY, side]
        done = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        return int(done.stdout.splitlines()[-1])

    assert measure("ours") <= 0.5 * measure("theirs")


def test_undo_and_refusals(package, monkeypatch):
    def attributes():
        classes = [package[-1].Actor, package[3].PolicyLoss]
        return {(x.__name__, key): value for x in (*package, *classes) for key, value in vars(x).items()}

    before = attributes()
    with ours.patch(losses=True):
        changed = [key for key, value in attributes().items() if value is not before[key]]
        assert len(changed) == 6
        with pytest.raises(RuntimeError, match="one that is patched already"):
            ours.patch()
        with pytest.raises(NotImplementedError, match="policy_loss_type=\"ppo\" with losses=True, got 'gspo'"):
            package[3].PolicyLoss(policy_loss_type="gspo")(*[torch.zeros(1, 1)] * 4)
        actor = make_actor(package, language_model().model)
        ids, attention, mask = batch()
        with pytest.raises(TypeError, match="a model with an LM head"):
            actor(ids, mask, attention)
    assert all(attributes()[key] is value for key, value in before.items())
    with monkeypatch.context() as context:
        context.setattr(patching, "version", lambda _: "0.12.0")
        with pytest.raises(RuntimeError, match=r"expected openrlhf 0\.11, which it was tried with, got 0\.12\.0"):
            ours.patch()
    with monkeypatch.context() as context:
        context.setattr(package[2], "compute_entropy", lambda logits, chunk_size: None)
        with pytest.raises(RuntimeError, match=r"\(logits\), got \(logits, chunk_size\)"):
            ours.patch()
    assert all(attributes()[key] is value for key, value in before.items())
