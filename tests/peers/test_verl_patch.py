"""verl 0.9.1 with and without our patch: equal numbers, PRISM's names in its registries, undo, refusals."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import peer_cases
import pytest
import torch
import torch.distributed as dist
import verl
import verl.utils.torch_functional as functional
import verl_cases
from peer_cases import assert_same
from transformers import Qwen3Config, Qwen3ForCausalLM
from verl.models.transformers import dense_common
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl_cases import ADVANTAGES, GROUP, LOSSES, REWARD, advantage, loss

from prism_kernels import group_advantage, prism_advantage
from prism_kernels.integrations import padded, patching
from prism_kernels.integrations import verl as ours

BATCHES = peer_cases.batches()
MODES = {"vanilla": "prism_grpo", "gspo": "prism_gspo"}
SIMILAR = {name: case for name, case in LOSSES.items() if case[1].mode in MODES}


@pytest.fixture
def registered():
    with ours.register():
        yield


# ---- equal numbers


def assert_equal(mine, theirs):
    assert_same(mine._replace(metrics={}), theirs._replace(metrics={}))
    assert mine.metrics == pytest.approx(theirs.metrics, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", SIMILAR)
def test_our_losses_in_verls_ppo_loss(name, registered):
    """verl's ppo_loss adds its KL and entropy terms, counts and rollout weights to our policy losses."""
    case, call = LOSSES[name]
    theirs = loss(BATCHES[case.batch], call)
    mine = loss(BATCHES[case.batch], replace(call, mode=MODES[call.mode]))
    if call.correction and "_" in str(call.correction[1]):
        # a token of weight 0 has no objective, so we do not count it as clipped
        for name in ("clipped_low+clipped_high", "clipped_dual"):
            assert mine.metrics.pop(name) <= theirs.metrics.pop(name) + 1e-7
    assert_equal(mine, theirs)
    if call.mode == "vanilla" and "loss_agg_mode" not in call.actor:
        dapo = loss(BATCHES[case.batch], replace(call, mode="prism_dapo"))
        assert_equal(dapo._replace(metrics=mine.metrics), mine)


def test_a_wrong_sign_is_noticed(registered, monkeypatch):
    case, call = LOSSES["vanilla-plain"]
    published = padded.policy_loss
    monkeypatch.setattr(padded, "policy_loss", lambda logp, *a, **o: published(2 * logp.detach() - logp, *a, **o))
    mine = loss(BATCHES[case.batch], replace(call, mode="prism_grpo"))
    with pytest.raises(AssertionError, match="grad"):
        assert_equal(mine, loss(BATCHES[case.batch], call))


@pytest.mark.parametrize("name", ["grpo", "grpo-eps", "grpo-unscaled"])
def test_advantages(name, registered):
    case, estimator, config = ADVANTAGES[name]
    theirs = advantage(case, estimator, config)
    torch.testing.assert_close(advantage(case, f"prism_{estimator}", config), theirs, rtol=1e-7, atol=1e-7)


def rewards_of(perception, reasoning):
    """Returns rewards with perception on the second token and reasoning on the last of 3 to 5 tokens, and a mask."""
    mask = (torch.arange(6) < torch.tensor([3, 4, 5, 3, 4, 5, 3, 4])[:, None]).long()
    rewards = torch.zeros(8, 6, dtype=torch.float64)
    rewards[:, 1] = perception
    rewards[torch.arange(8), mask.sum(1) - 1] = reasoning
    return rewards, mask


def compute_advantage(rewards, mask, estimator, config):
    """Calls an estimator with the arguments that verl's trainer passes to a registered one."""
    index = np.array([f"prompt {g}" for g in GROUP], dtype=object)
    given = {"token_level_rewards": rewards, "response_mask": mask, "config": config, "index": index}
    return core_algos.get_adv_estimator_fn(estimator)(**given)


def test_advantages_as_verls_trainer_calls_them(registered):
    reward = torch.tensor(REWARD, dtype=torch.float64)
    rewards, mask = rewards_of(reward, reward.flip(0))
    for scaled in (True, False):
        found, _ = compute_advantage(rewards, mask, "prism_grpo", AlgoConfig(norm_adv_by_std_in_grpo=scaled))
        mine = group_advantage(rewards.sum(1), torch.tensor(GROUP), scale="std" if scaled else "none")
        torch.testing.assert_close(found, mine[:, None] * mask)
    found, returns = compute_advantage(rewards, mask, "prism", AlgoConfig())
    mine = prism_advantage(reward, reward.flip(0), torch.tensor(GROUP))
    torch.testing.assert_close(found, mine[:, None] * mask)
    torch.testing.assert_close(returns, found)


def test_channels_and_options():
    """A format flag read from a reward of -1 on the first token, and another alpha."""
    reward = torch.tensor(REWARD, dtype=torch.float64)
    rewards, mask = rewards_of(reward, reward.flip(0))
    format_ok = torch.arange(8) % 3 > 0
    rewards[:, 0] = torch.where(format_ok, 0.0, -1.0)

    def channels(rewards, mask):
        return {**ours.channels_of_tokens(rewards[:, 1:], mask[:, 1:]), "format_ok": rewards[:, 0] == 0}

    with ours.register(channels=channels, alpha=0.25):
        found, _ = compute_advantage(rewards, mask, "prism", AlgoConfig())
    mine = prism_advantage(reward, reward.flip(0), torch.tensor(GROUP), format_ok=format_ok, alpha=0.25)
    torch.testing.assert_close(found, mine[:, None] * mask)


@pytest.mark.parametrize("shape", [(6, 11), (2, 3, 11)])
@pytest.mark.parametrize("name", ["logprobs", "entropy", "entropy_chunked", "squares"])
def test_functions_of_logits(name, shape):
    def call(x):
        if name == "logprobs":
            return functional.logprobs_from_logits(x, labels)
        if name == "entropy":
            return functional.entropy_from_logits(x)
        if name == "entropy_chunked":
            # verl's function accepts only a matrix
            rows = functional.entropy_from_logits_with_chunking(x.flatten(0, -2), chunk_size=4)
            return rows.view(labels.shape)
        return functional.calculate_sum_pi_squared_from_logits(x)

    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(shape, generator=generator) * 3).requires_grad_()
    labels = torch.randint(0, 11, shape[:-1], generator=generator)
    g = torch.randn(shape[:-1], generator=generator)
    theirs = call(logits)
    kept = logits.detach().clone()
    with ours.patch():
        mine = call(logits)
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs)
        if name == "squares":
            assert not mine.requires_grad
            return
        pair = [torch.autograd.grad((x * g).sum(), logits)[0] for x in (mine, theirs)]
    torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-6)
    assert torch.equal(logits, kept)


def test_the_gradient_is_written_over_the_logits():
    """With inplace_backward=True, which verl's engines pass when nothing else needs the logits."""
    x = torch.randn(5, 11, requires_grad=True)
    labels = torch.arange(5)
    expected = torch.autograd.grad(functional.logprobs_from_logits(x, labels).sum(), x)[0]
    with ours.patch():
        logits = x * 1
        (gradient,) = torch.autograd.grad(
            functional.logprobs_from_logits(logits, labels=labels, inplace_backward=True).sum(), logits
        )
    torch.testing.assert_close(gradient, expected)
    assert gradient.data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("cache_bytes", [0, None])
@pytest.mark.parametrize("shape", [(7,), (2, 5)])
def test_fused_heads(shape, cache_bytes):
    """Ours equal verl's FusedLinearForPPO; its linear_cross_entropy needs a GPU, and returns the same flattened."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(*shape, 8, generator=generator, requires_grad=True)
    weight = torch.randn(31, 8, generator=generator, requires_grad=True)
    labels = torch.randint(0, 31, shape, generator=generator)
    g, h = torch.randn(2, *shape, generator=generator)

    def both(logp, entropy):
        total = (logp.view(shape) * g).sum() + (entropy.view(shape) * h).sum()
        return [logp.flatten(), entropy.flatten(), *torch.autograd.grad(total, [hidden, weight])]

    theirs = FusedLinearForPPO(chunk_size=4)(hidden, weight, labels, 0.7)
    assert theirs[0].shape == shape
    expected = both(*theirs)
    with ours.patch(cache_bytes=cache_bytes):
        from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

        mine = FusedLinearForPPO(chunk_size=4)(hidden, weight, labels, temperature=0.7)
        assert mine[0].shape == shape
        flat = linear_cross_entropy(hidden, weight, labels, 0.7, "none", None)
        assert flat[0].shape == flat[1].shape == (labels.numel(),)
        for found in (both(*mine), both(*flat)):
            for a, b in zip(found, expected):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_verls_forward_of_a_model_with_fused_kernels():
    """Unpatched, verl's Triton path needs a GPU."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=50, num_key_value_heads=1, head_dim=8, **sizes))
    ids = torch.randint(0, 50, (1, 9))
    theirs = dense_common.forward_with_torch_backend(model, input_ids=ids, temperature=0.8, return_dict=True)
    with ours.patch():
        mine = dense_common.forward_with_triton_backend(model, input_ids=ids, temperature=0.8, return_dict=True)
    for name in ("log_probs", "entropy"):
        torch.testing.assert_close(mine[name].view(1, 9), theirs[name], rtol=1e-5, atol=1e-5)


TESTS = ("core_algos_on_cpu", "loss_aggregation_on_cpu", "dynamic_policy_losses_on_cpu", "rollout_corr")
IN_PLACE = """
import verl.trainer.ppo.core_algos as core
from prism_kernels.integrations import verl as ours

ours.patch()
ours.register()
core.compute_grpo_outcome_advantage = core.ADV_ESTIMATOR_REGISTRY["grpo"] = ours.grpo_advantage
core.compute_policy_loss_vanilla = core.POLICY_LOSS_REGISTRY["vanilla"] = ours.grpo_loss
core.compute_policy_loss_gspo = core.POLICY_LOSS_REGISTRY["gspo"] = ours.gspo_loss
"""


def test_verls_own_tests_pass(tmp_path):
    """verl's wheel contains its tests; they pass with our functions in place of verl's."""
    (tmp_path / "in_place.py").write_text(IN_PLACE)
    folder = Path(verl.__file__).parents[1] / "tests" / "trainer" / "ppo"
    files = [str(folder / f"test_{name}.py") for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "-p", "in_place", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--import-mode=importlib", *files],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_an_external_module_patches_every_process(tmp_path):
    """verl imports the modules of VERL_USE_EXTERNAL_MODULES in each of its processes."""
    text = "from prism_kernels.integrations import verl\nverl.patch()\nverl.register()\n"
    (tmp_path / "my_prism.py").write_text(text)
    code = (
        "import verl, verl.utils.torch_functional as f, verl.trainer.ppo.core_algos as c; "
        "print(f.entropy_from_logits.__module__, c.get_policy_loss_fn('prism_gspo').__module__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "VERL_USE_EXTERNAL_MODULES": "my_prism"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "prism_kernels.integrations.verl prism_kernels.integrations.verl"


# ---- undo and refusals


def attributes():
    import_module("verl.utils.kernel.linear_cross_entropy")
    modules = [m for name, m in list(sys.modules.items()) if name.partition(".")[0] == "verl" and m is not None]
    found = {(m.__name__, name): value for m in modules for name, value in vars(m).items()}
    return found | {("FusedLinearForPPO", "forward"): vars(FusedLinearForPPO)["forward"]}


def same(before, after):
    return all(after[key] is value for key, value in before.items())


@pytest.fixture
def importer(monkeypatch):
    """Returns a function that makes a verl module which imports logprobs_from_logits by name, as its engines do."""

    def make(name):
        module = ModuleType(name)
        exec("from verl.utils.torch_functional import logprobs_from_logits", vars(module))
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return make


def test_undo_restores_every_attribute(importer):
    importer("verl.an_engine")
    before = attributes()
    patched = ours.patch()
    changed = {key for key, value in attributes().items() if value is not before[key]}
    assert ("verl.an_engine", "logprobs_from_logits") in changed
    assert ("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy") in changed
    assert ("FusedLinearForPPO", "forward") in changed
    late = importer("verl.another_engine")
    assert late.logprobs_from_logits is ours.logprobs_from_logits
    patched.undo()
    assert same(before, attributes())
    assert late.logprobs_from_logits is functional.logprobs_from_logits


def test_registration_and_undo():
    before = dict(core_algos.ADV_ESTIMATOR_REGISTRY), dict(core_algos.POLICY_LOSS_REGISTRY)
    with ours.register():
        assert {"prism", "prism_grpo"} <= core_algos.ADV_ESTIMATOR_REGISTRY.keys()
        assert {"prism_grpo", "prism_dapo", "prism_gspo"} <= core_algos.POLICY_LOSS_REGISTRY.keys()
        with pytest.raises(RuntimeError, match="'prism' in the registry, got one"):
            ours.register()
    assert before == (core_algos.ADV_ESTIMATOR_REGISTRY, core_algos.POLICY_LOSS_REGISTRY)
    core_algos.POLICY_LOSS_REGISTRY["prism_gspo"] = None
    try:
        with pytest.raises(RuntimeError, match="'prism_gspo' in the registry"):
            ours.register()
    finally:
        del core_algos.POLICY_LOSS_REGISTRY["prism_gspo"]
    # the failed registration left nothing
    assert before == (core_algos.ADV_ESTIMATOR_REGISTRY, core_algos.POLICY_LOSS_REGISTRY)


def test_a_second_patch_is_refused():
    before = attributes()
    with ours.patch(), pytest.raises(RuntimeError, match="one that is patched already"):
        ours.patch()
    assert same(before, attributes())


@pytest.mark.parametrize("call", [ours.patch, ours.register])
def test_an_unknown_version_is_refused(call, monkeypatch):
    monkeypatch.setattr(patching, "version", lambda _: "0.9.10")
    before = attributes()
    with pytest.raises(RuntimeError, match=r"expected verl 0\.9\.1, which it was tried with, got 0\.9\.10"):
        call()
    assert same(before, attributes())


@pytest.mark.parametrize("name", ["logprobs_from_logits", "entropy_from_logits"])
def test_a_changed_signature_is_refused(name, monkeypatch):
    monkeypatch.setattr(functional, name, lambda logits, labels, reduction: None)
    before = attributes()
    with pytest.raises(RuntimeError, match=r"got \(logits, labels, reduction\)"):
        ours.patch()
    assert same(before, attributes())


def test_unsupported_options_are_refused(registered, monkeypatch):
    x, weight, labels = torch.randn(3, 4), torch.randn(5, 4), torch.arange(3)
    with ours.patch():
        from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

        with pytest.raises(NotImplementedError, match="reduction=\"none\", got 'mean'"):
            linear_cross_entropy(x, weight, labels, 1.0, "mean")
        monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
        with pytest.raises(NotImplementedError, match="tensor_model_parallel_size=1 with fused kernels, got 2"):
            linear_cross_entropy(x, weight, labels, 1.0, "none", object())
    case, call = LOSSES["vanilla-plain"]
    actor = {"loss_agg_mode": "seq-mean-token-mean"}
    with pytest.raises(ValueError, match="token-mean for prism_dapo, got seq-mean-token-mean"):
        loss(BATCHES[case.batch], replace(call, mode="prism_dapo", actor=actor))
    with pytest.raises(ValueError, match=r"loss_agg_mode among token-mean, .*, got 'sum'"):
        ours.grpo_loss(x, x, x, x > 0, "sum", config=verl_cases.actor_config(call))


@pytest.mark.parametrize("aggregate, missing", [("token-mean", "batch_num_tokens"), ("seq-mean-token-sum", "global_b")])
def test_a_missing_count_is_an_error(aggregate, missing, registered):
    case, call = LOSSES["vanilla-plain"]
    wrong = replace(call, mode="prism_grpo", actor={"loss_agg_mode": aggregate}, counts={"dp_size": 2})
    with pytest.raises(ValueError, match=f"expected {missing}.* with dp_size > 1"):
        loss(BATCHES[case.batch], wrong)
