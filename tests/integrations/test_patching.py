"""Patches replace attributes and restore them; statistics of logits besides the log-probabilities."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from prism_kernels import linear_logprob
from prism_kernels.integrations import logit_statistics, patching
from prism_kernels.integrations.head import Head, logit_settings
from prism_kernels.integrations.patching import Patch, Registration, Replacement, everywhere


@pytest.fixture
def package(monkeypatch):
    """A package with a module whose function two other modules import by name."""
    modules = {name: ModuleType(name) for name in ("trainer", "trainer.ops", "trainer.loop", "another")}
    modules["trainer.ops"].loss = lambda x: x
    for name in ("trainer.loop", "another"):
        modules[name].loss = modules["trainer.ops"].loss
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return SimpleNamespace(**{name.rpartition(".")[2]: module for name, module in modules.items()})


def test_a_function_is_replaced_in_every_module_of_its_package_only(package):
    before = package.ops.loss

    def ours(x):
        return -x

    patch = Patch("op", everywhere(package.ops, "loss", ours))
    assert package.ops.loss is package.loop.loss is ours
    assert package.another.loss is before
    package.trainer.loss = package.ops.loss
    patch.undo()
    assert package.ops.loss is package.loop.loss is package.trainer.loss is before
    package.ops.loss = None
    patch.undo()
    assert package.ops.loss is None


def test_nothing_is_replaced_when_one_is_missing(package):
    before = package.ops.loss
    wanted = [Replacement(package.ops, "loss", lambda: 0), Replacement(package.loop, "gain", lambda: 0)]
    with pytest.raises(RuntimeError, match=r"op: expected trainer\.loop to have gain, got none"):
        Patch("op", wanted)
    assert package.ops.loss is before


def test_a_patch_ends_with_its_block(package):
    before = package.ops.loss
    with pytest.raises(KeyError), Patch("op", [Replacement(package.ops, "loss", lambda: 0)]):
        assert package.ops.loss is not before
        with pytest.raises(RuntimeError, match=r"trainer\.ops\.loss as published, got one that is patched already"):
            Patch("op", [Replacement(package.ops, "loss", lambda: 1)])
        raise KeyError
    assert package.ops.loss is before


def test_a_method_of_a_class():
    class Loss:
        def forward(self):
            return 1

    before = vars(Loss)["forward"]
    with Patch("op", [Replacement(Loss, "forward", lambda self: 2)]):
        assert Loss().forward() == 2
    assert vars(Loss)["forward"] is before


def test_registration():
    registry = {"grpo": 1}
    with pytest.raises(RuntimeError, match="no 'grpo' in the registry"):
        Registration("op", [(registry, "ours", 2), (registry, "grpo", 2)])
    assert registry == {"grpo": 1}
    with Registration("op", [(registry, "ours", 2)]) as registration:
        assert registry == {"grpo": 1, "ours": 2}
        registration.undo()
        assert registry == {"grpo": 1}


@pytest.mark.parametrize("found, good", [("1.16", True), ("1.16.0", True), ("1.160", False), ("1.17.0", False)])
def test_versions(found, good, monkeypatch):
    monkeypatch.setattr(patching, "version", lambda _: found)
    if good:
        patching.require_version("op", "trl", ("1.16",))
    else:
        with pytest.raises(RuntimeError, match=r"op: expected trl 1\.16, which it was tried with, got 1\."):
            patching.require_version("op", "trl", ("1.16",))


def test_a_missing_package_is_an_error():
    with pytest.raises(RuntimeError, match=r"expected no_such_trainer 1 or 2 to be installed, got none"):
        patching.require_version("op", "no_such_trainer", ("1", "2"))


def test_parameters():
    patching.require_parameters("op", lambda a, b=1: None, ("a", "b"))
    with pytest.raises(RuntimeError, match=r"\(b, a\), got \(a, b\)"):
        patching.require_parameters("op", lambda a, b=1: None, ("b", "a"))


# ---- statistics of logits


def made_head(parts, rows=70, width=6, columns=40):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(columns, width, generator=generator)
    bias = torch.randn(columns, generator=generator) if "bias" in parts else None
    lora = None
    if "lora" in parts:
        lora = (torch.randn(2, width, generator=generator), torch.randn(columns, 2, generator=generator), 0.3)
    z = hidden @ weight.t()
    z = z if bias is None else z + bias
    z = z if lora is None else z + 0.3 * hidden @ lora[0].t() @ lora[1].t()
    return hidden, Head(weight, bias, lora), z


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("parts", [(), ("bias",), ("lora",), ("bias", "lora")])
def test_mean_logit(parts, softcap, monkeypatch):
    monkeypatch.setattr(logit_statistics, "_ROWS", 32)
    hidden, head, z = made_head(parts)
    expected = z if softcap is None else softcap * (z / softcap).tanh()
    torch.testing.assert_close(logit_statistics.mean_logit(hidden, head, softcap), expected.mean(1))
    assert logit_statistics.mean_logit(hidden[:0], head, softcap).shape == (0,)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("parts", [(), ("bias", "lora")])
def test_is_highest(parts, temperature, monkeypatch):
    """Targets are the best, the second best or any token, confident or not; few rows recompute their logits."""
    monkeypatch.setattr(logit_statistics, "_ROWS", 16)
    again = []
    published = logit_statistics._blocks

    def counting(hidden, head):
        again.append(hidden.shape[0])
        return published(hidden, head)

    monkeypatch.setattr(logit_statistics, "_blocks", counting)
    hidden, head, z = made_head(parts)
    for place in (0, 1, 5):
        target = z.argsort(1, descending=True)[:, place]
        out = linear_logprob(
            hidden, head.weight, target, bias=head.bias, lora=head.lora, temperature=temperature, backend="torch"
        )
        found = logit_statistics.is_highest(hidden, head, target, out.logp, out.sum_pi_squared)
        assert found.dtype == torch.bool
        assert (found == (place == 0)).all()
    assert 0 < sum(again) < 3 * len(hidden)


def test_the_first_of_equal_logits_is_the_highest():
    hidden, weight = torch.ones(2, 1), torch.tensor([[0.0], [1.0], [1.0]])
    target = torch.tensor([1, 2])
    out = linear_logprob(hidden, weight, target)
    found = logit_statistics.is_highest(hidden, Head(weight, None, None), target, out.logp, out.sum_pi_squared)
    assert found.tolist() == [True, False]


@pytest.mark.parametrize(
    "options, factor",
    [({}, 1), ({"logit_scale": 0.5}, 0.5), ({"logits_scaling": 8.0}, 1 / 8), ({"lm_head_multiplier": 3.0}, 3)],
)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_logit_settings(options, factor, softcap):
    text = SimpleNamespace(final_logit_softcapping=softcap, **options)
    divisor, cap = logit_settings("op", SimpleNamespace(get_text_config=lambda: text))
    z = torch.linspace(-20, 20, 9)
    scaled = z * factor
    expected = scaled if softcap is None else softcap * (scaled / softcap).tanh()
    found = (z if cap is None else cap * (z / cap).tanh()) / divisor
    torch.testing.assert_close(found, expected)
