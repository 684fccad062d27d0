"""Hostile numbers, flags and names for every scalar argument of every public op.

The result is right, compared with float64 or with the plain number that the value stands for, or the error names the
op and the argument. No finite input gives NaN, and no error comes from torch or Python itself.
"""

import inspect

import numpy as np
import pytest
import torch

import prism_kernels as pk
from prism_kernels.backend import BACKENDS, unavailable
from prism_kernels.packing import Branch, Kind, PrefixGroup, build_pack, pack_groups
from prism_kernels.shaping import overlong_penalty
from prism_kernels.testing import double, head_inputs

T, V, D = 6, 11, 4
NUMBERS = {
    "nan": float("nan"),
    "inf": float("inf"),
    "-inf": float("-inf"),
    "1e300": 1e300,
    "-1e300": -1e300,
    "1e30": 1e30,
    "1e15": 1e15,
    "1e6": 1e6,
    "1e-3": 1e-3,
    "1e-15": 1e-15,
    "1e-30": 1e-30,
    "1e-40": 1e-40,
    "5e-324": 5e-324,
    "0.0": 0.0,
    "-0.0": -0.0,
    "-1": -1,
    "10**400": 10**400,
    "-10**400": -(10**400),
    "10**5000": 10**5000,
    "2**63": 2**63,
}
OTHERS = {
    "complex": 1 + 1j,
    "complex real": complex(1),
    "True": True,
    "str": "1",
    "bytes": b"1",
    "None": None,
    "numpy float64": np.float64(0.5),
    "numpy float32": np.float32(0.5),
    "numpy int": np.int64(2),
    "numpy bool": np.bool_(True),
    "numpy complex": np.complex64(1 + 1j),
    "numpy array": np.array([0.5, 0.5]),
    "0-d tensor": torch.tensor(0.5),
    "0-d integer tensor": torch.tensor(2),
    "0-d complex tensor": torch.tensor(0.5 + 1j),
    "0-d bool tensor": torch.tensor(True),
    "vector": torch.ones(2),
    "list": [0.5],
    "pair": (0.5, 2.0),
    "object": object(),
}
HOSTILE = {**NUMBERS, **OTHERS}


def tensors():
    """Returns ordinary arguments by op: whatever is not listed takes its default."""
    hidden, weight, target = head_inputs(T, V, D)
    make = torch.Generator().manual_seed(1)

    def leaf(*shape):
        return torch.randn(*shape, generator=make).requires_grad_()

    lora = (leaf(2, D), leaf(V, 2), 0.5)
    cu_seqlens, group = torch.tensor([0, 2, T]), torch.arange(T) // 2
    losses = {
        "old_logp": -torch.rand(T, generator=make),
        "advantage": torch.randn(2, generator=make),
        "cu_seqlens": cu_seqlens,
        "ref_logp": -torch.rand(T, generator=make),
        "rollout_logp": -torch.rand(T, generator=make),
        "correction": "token_mask",
        "kl_coef": 0.5,
        "kl_estimator": "k3",
        "entropy_coef": 0.25,
        "aggregate": "seq_mean_token_sum_norm",
        "horizon": 4.0,
    }
    pack = build_pack([PrefixGroup(range(2), [Branch(range(2), Kind.REASONING)] * 2)])
    return {
        "linear_logprob": {
            "hidden": hidden,
            "weight": weight,
            "target": target,
            "lora": lora,
            "entropy": True,
        },
        "token_logprob": {"logits": leaf(T, V), "target": target, "entropy": True},
        "linear_policy_loss": {"hidden": hidden, "weight": weight, "target": target, "lora": lora, **losses},
        "policy_loss": {"logp": leaf(T), "entropy": leaf(T), **losses},
        "group_advantage": {"reward": torch.tensor([0.1, 0.1, 1, 2, 3, 5]), "group": group},
        "prism_advantage": {
            "perception": torch.tensor([0.1, 0.1, 1, 2, 3, 5]),
            "reasoning": leaf(T),
            "group": group,
            "accuracy": torch.tensor([1.0, 0, 1, 0, 0, 0]),
            "format_ok": torch.tensor([True] * 5 + [False]),
            "mode": "rlvr_v2",
        },
        "pair_loss": {"preferred": leaf(T), "other": leaf(T), "regularisation": 0.1, "soft_clip": 3.0},
        "moe_route": {"x": leaf(T, D), "router_weight": leaf(3, D), "top_k": 2},
        "prefix_attention": {"q": leaf(T, 2, D), "k": leaf(T, 1, D), "v": leaf(T, 1, D), "pack": pack},
    }


# of one argument that is not a number by itself: how a value takes its place
INSIDE = {
    "lora scale": ("lora", lambda value, plain: (*plain[:2], value)),
    "clip low": ("clip", lambda value, plain: (value, 0.2)),
    "clip high": ("clip", lambda value, plain: (0.2, value)),
    "correction lower": ("correction_bounds", lambda value, plain: (value, 2.0)),
    "correction upper": ("correction_bounds", lambda value, plain: (0.5, value)),
}
# tensors and the pack have their own tests
NOT_SCALAR = {
    *("hidden", "weight", "target", "logits", "logp", "old_logp", "advantage", "cu_seqlens", "mask", "ref_logp"),
    *("rollout_logp", "reward", "group", "valid", "perception", "reasoning", "accuracy", "format_ok", "preferred"),
    *("other", "x", "router_weight", "kind", "kind_bias", "token_weight", "q", "k", "v", "pack", "bias"),
    *("process_group", "routing", "gate_up", "down"),
}
OPS = [name for name in pk.__all__ if name in tensors()]


def arguments_of(op):
    """Yields the op's scalar arguments, and those inside of a pair."""
    names = [name for name in inspect.signature(getattr(pk, op)).parameters if name not in NOT_SCALAR]
    if op == "policy_loss":
        names.remove("entropy")
    inside = [name for name, (whole, _) in INSIDE.items() if whole in names]
    return names + inside


CASES = [(op, name) for op in OPS for name in arguments_of(op)]


def call(op, changes):
    """Returns the results and the gradients of their sum, as one list of tensors."""
    arguments = {**tensors()[op], **changes}
    results = getattr(pk, op)(**arguments)
    outputs = [results] if isinstance(results, torch.Tensor) else list(results)
    outputs = [x for x in outputs if isinstance(x, torch.Tensor)]
    leaves = [x for x in flat(arguments.values()) if isinstance(x, torch.Tensor) and x.requires_grad]
    live = [x for x in outputs if x.requires_grad]
    if live:
        total = sum(x.sum() for x in live)
        outputs += [g for g in torch.autograd.grad(total, leaves, allow_unused=True) if g is not None]
    return [x.detach() for x in outputs]


def flat(values):
    for value in values:
        yield from flat(value) if isinstance(value, tuple) and not hasattr(value, "_fields") else [value]


def changed(op, name, value):
    whole, put = INSIDE.get(name, (name, lambda value, plain: value))
    plain = tensors()[op].get(whole)
    return {whole: put(value, plain)}


def in_double(op, changes):
    """Returns the same call in float64."""
    arguments = {name: double(x) for name, x in {**tensors()[op], **changes}.items() if name != "pack"}
    return call(op, arguments)


def plain(value):
    """Returns the number of Python that a value of numpy stands for, else the value."""
    return value.item() if isinstance(value, np.generic) else value


@pytest.mark.parametrize("op, name", CASES, ids=[f"{op}-{name}".replace(" ", "_") for op, name in CASES])
def test_a_hostile_scalar_is_right_or_refused(op, name):
    words = INSIDE.get(name, (name, None))[0]
    tried = 0
    for label, value in HOSTILE.items():
        changes = changed(op, name, value)
        if name == "process_group":
            continue
        try:
            got = call(op, changes)
        except (ValueError, TypeError, RuntimeError) as error:
            text = str(error)
            assert text.startswith(f"{op}: expected ") or text.startswith(f"{op}: backend"), f"{label}: {error!r}"
            assert words in text.removeprefix(f"{op}: expected "), f"{label}: {error!r}"
            continue
        tried += 1
        for x in got:
            assert not x.is_floating_point() or not x.isnan().any(), f"{label}: NaN in {x}"
        if isinstance(value, torch.Tensor):
            wanted = call(op, changed(op, name, value.item() if value.dim() == 0 else value))
        elif isinstance(value, np.generic):
            wanted = call(op, changed(op, name, plain(value)))
        elif isinstance(value, float | int) and not isinstance(value, bool) and op != "moe_route":
            compare_with_double(op, changes, got, label)
            continue
        else:
            continue
        for ours, theirs in zip(got, wanted):
            assert torch.equal(ours, theirs), label
    # an argument whose every hostile value is refused has a default that is not
    assert tried or call(op, {})


def compare_with_double(op, changes, got, label):
    for ours, exact in zip(got, in_double(op, changes), strict=True):
        if not ours.is_floating_point():
            continue
        bound = 1e-3 * exact.abs().max().clamp(min=1e-30) if exact.numel() else 0
        assert (ours.double() - exact).abs().le(bound).all(), f"{label}: {ours} instead of {exact}"


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [0.25, 1.0, 30.0, 1e4, 1e10, 1e15])
def test_every_softcap_that_is_accepted_is_right(kind, softcap):
    hidden, weight, target = head_inputs(T, V, D, dtype=kind)
    x, w = double(hidden), double(weight)
    log_pi = (softcap * torch.tanh(x @ w.t() / softcap)).log_softmax(-1)
    wanted = log_pi.gather(1, target[:, None])[:, 0]
    exact = torch.autograd.grad(wanted.sum() - (log_pi.exp() * log_pi).sum(), (x, w))
    bound = 1e-5 if kind in (torch.float32, torch.float64) else 0.02
    for backend in BACKENDS:
        if unavailable("linear_logprob", backend, "cpu") is None:
            out = pk.linear_logprob(hidden, weight, target, softcap=softcap, entropy=True, backend=backend)
            torch.testing.assert_close(out.logp.double(), wanted, rtol=2e-5, atol=2e-5)
            grads = torch.autograd.grad(out.logp.sum() + out.entropy.sum(), (hidden, weight))
            for ours, theirs in zip(grads, exact):
                assert (ours.double() - theirs).norm() <= bound * theirs.norm()


@pytest.mark.parametrize("value", [1 + 1j, True, "nan", "tiny", "huge"])
def test_bad_temperatures_of_rows_are_refused(value):
    hidden, weight, target = head_inputs(T, V, D)
    row = {"nan": torch.nan, "tiny": 1e-40, "huge": 1e30}.get(value, value)
    temperature = torch.full((T,), row)
    for call_op in (
        lambda: pk.linear_logprob(hidden, weight, target, temperature=temperature),
        lambda: pk.token_logprob(torch.zeros(T, V), target, temperature=temperature),
    ):
        with pytest.raises((TypeError, ValueError), match="logprob: expected temperature "):
            call_op()


PACKING = [
    (lambda x: pack_groups([], x), "packing", "budget"),
    (lambda x: overlong_penalty(torch.ones(2), limit=x, buffer=1), "overlong_penalty", "limit"),
    (lambda x: overlong_penalty(torch.ones(2), limit=4, buffer=x), "overlong_penalty", "buffer"),
    (lambda x: overlong_penalty(torch.ones(2), limit=4, buffer=1, penalty=x), "overlong_penalty", "penalty"),
    (
        lambda x: pk.Routing.from_topk(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), x),
        "moe_route.from_topk",
        "num_experts",
    ),
]


@pytest.mark.parametrize("run, op, name", PACKING, ids=[name for *_, name in PACKING])
def test_hostile_scalars_of_the_helpers(run, op, name):
    for label, value in HOSTILE.items():
        try:
            run(value)
        except (ValueError, TypeError) as error:
            assert str(error).startswith(f"{op}: expected ") and name in str(error), f"{label}: {error!r}"


def test_a_softcap_far_below_the_temperature_is_refused():
    """Its slope is computed from the logarithms of exponentials, in which it is lost."""
    hidden, weight, target = head_inputs(T, V, D)
    for temperature in (2.0, torch.full((T,), 2.0)):
        with pytest.raises(ValueError, match=r"expected softcap of at least a quarter of the temperature 2, got 0\.4"):
            pk.linear_logprob(hidden, weight, target, softcap=0.4, temperature=temperature)
