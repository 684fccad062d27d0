"""linear_policy_loss against its float64 reference, and against linear_logprob followed by policy_loss."""

import itertools
import re

import pytest
import torch
from policy_cases import bounds, grid

from prism_kernels import linear_logprob, linear_policy_loss, policy_loss
from prism_kernels.ops.linear_policy_loss.reference import linear_policy_loss_reference
from prism_kernels.ops.policy_loss.options import checked_options
from prism_kernels.testing import assert_close, double, head_inputs, poison_allocations

LENGTHS = (5, 0, 7, 1, 12, 3)
V, D, R = 61, 16, 3


def make(lengths=LENGTHS, *, dtype=torch.float32, device="cpu", masked=True, lora=False, bias=False, seed=0):
    """A head and a batch; rows that do not count hold NaN where that is allowed."""
    tokens = sum(lengths)
    hidden, weight, target = head_inputs(tokens, V, D, dtype=dtype, device=device, scale=2.0, seed=seed)
    rng = torch.Generator().manual_seed(seed + 1)

    def rand(*shape, scale=1.0):
        return (torch.randn(*shape, generator=rng) * scale).to(device)

    with torch.no_grad():
        logp = linear_logprob(hidden.double(), weight.double(), target).logp.float()
    batch = {
        "hidden": hidden,
        "weight": weight,
        "target": target,
        "old_logp": logp + rand(tokens, scale=0.3),
        "advantage": rand(len(lengths)),
        "cu_seqlens": bounds(lengths, device),
        "ref_logp": logp + rand(tokens, scale=0.3),
        "rollout_logp": logp + rand(tokens, scale=0.3),
    }
    if masked and tokens:
        drop = torch.rand(tokens, generator=rng) < 0.3
        batch["mask"] = (~drop).to(device)
        target[1] = -100
        for name in ("old_logp", "ref_logp", "rollout_logp"):
            batch[name][drop.to(device)] = torch.nan
    if bias:
        batch["bias"] = rand(V).to(dtype).requires_grad_()
    if lora:
        a, b = rand(R, D, scale=0.3).to(dtype), rand(V, R, scale=0.3).to(dtype)
        batch["lora"] = (a.requires_grad_(), b.requires_grad_(), 0.7)
    return batch


def leaves(batch):
    tensors = [batch["hidden"], batch["weight"]]
    tensors += [batch["bias"]] if "bias" in batch else []
    return tensors + (list(batch["lora"][:2]) if "lora" in batch else [])


def run(op, batch, **options):
    batch = dict(batch)
    first = [batch.pop(k) for k in ("hidden", "weight", "target", "old_logp", "advantage", "cu_seqlens")]
    loss, metrics, logp = op(*first, **batch, **options)
    wanted = leaves({**batch, "hidden": first[0], "weight": first[1]})
    return loss.detach(), torch.autograd.grad(loss * 1.7, wanted), metrics, logp


def check(batch, tiny, call, **options):
    loss, grads, metrics, logp = run(linear_policy_loss, batch, **options, **call)
    plain = run(linear_policy_loss_reference, batch, **options)
    exact = run(linear_policy_loss_reference, double(batch), **options)
    assert not logp.requires_grad
    assert_close(loss, plain[0], exact[0], name="loss", tiny=tiny)
    assert_close(logp, plain[3], exact[3], name="logp", tiny=tiny)
    for i, (ours, p, e) in enumerate(zip(grads, plain[1], exact[1])):
        assert ours.dtype == p.dtype
        assert_close(ours, p, e, name=f"gradient {i}", tiny=tiny)
    for name, value in exact[2].items():
        assert float(getattr(metrics, name)) == pytest.approx(float(value), rel=100 * tiny, abs=100 * tiny), name


# options: the algorithms' choices, sampled; a chunk of 4 rows cuts sequences, None holds all
@pytest.mark.grid
@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("options", list(grid(24)), ids=lambda o: f"{o['objective']}-{o['ratio']}-{o['kl_estimator']}")
def test_linear_policy_loss_matches_float64(backend, device, options, chunk):
    options = dict(options)
    for on_policy, extra in ((False, {}), (True, {"bias": True, "lora": True})):
        batch = make(device=device, **extra)
        if on_policy:
            batch["old_logp"] = None
        # a ratio or a bound that lies within rounding of its threshold may fall on either side; none does here
        check(batch, 2e-6, {"backend": backend, "chunk_tokens": chunk}, **options)


# dtype chooses the products, softcap and entropy the terms of the row kernels
@pytest.mark.grid
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_linear_policy_loss_dtypes(backend, device, dtype, softcap, entropy_coef):
    batch = make(dtype=dtype, device=device, bias=True, lora=True)
    temperature = torch.rand(28, generator=torch.Generator().manual_seed(9)).to(device) + 0.5
    eps = torch.finfo(dtype).eps
    tiny = {torch.float64: 1e-6, torch.float32: 2e-6}.get(dtype, eps)
    options = {"softcap": softcap, "entropy_coef": entropy_coef, "temperature": temperature, "kl_coef": 0.1}
    if dtype == torch.float64:
        options["temperature"] = temperature.double()
    check(batch, tiny, {"backend": backend, "chunk_tokens": 6}, **options)


def test_per_token_advantages(backend, device):
    batch = make(device=device)
    batch["advantage"] = torch.linspace(-1, 1, 28, device=device)
    for ratio in ("token", "sequence"):
        check(batch, 2e-6, {"backend": backend, "chunk_tokens": 5}, ratio=ratio, aggregate="seq_mean_token_mean")


def test_is_the_two_ops_one_after_the_other(backend, device):
    for options in ({}, {"ratio": "sequence", "aggregate": "seq_mean_token_mean", "clip": (0.01, 0.01)}):
        batch = make((300, 900, 200, 1), device=device, masked=False)
        ours = run(linear_policy_loss, batch, backend=backend, chunk_tokens=512, **options)
        head = [batch[k] for k in ("hidden", "weight", "target")]
        out = linear_logprob(*head, backend=backend)
        rest = {k: batch[k] for k in ("old_logp", "advantage", "cu_seqlens", "ref_logp", "rollout_logp")}
        loss, metrics = policy_loss(out.logp, **rest, **options)
        grads = torch.autograd.grad(loss * 1.7, head[:2])
        torch.testing.assert_close(ours[0], loss.detach(), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(ours[3], out.logp.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours[2].totals, metrics.totals, rtol=1e-5, atol=1e-4)
        for a, b in zip(ours[1], grads):
            assert float((a - b).norm() / b.norm()) < 2e-6


def test_gradcheck(backend):
    hidden, weight, target = head_inputs(9, 7, 4, dtype=torch.float64)
    bias = torch.linspace(-1, 1, 7, dtype=torch.float64).requires_grad_()
    lora = [torch.randn(2, 4, dtype=torch.float64).requires_grad_(), torch.randn(7, 2).double().requires_grad_()]
    old = linear_logprob(hidden, weight, target).logp.detach() + torch.linspace(-0.5, 0.5, 9).double()
    advantage = torch.tensor([1.0, -1.0], dtype=torch.float64)
    for ratio, entropy in itertools.product(("token", "sequence"), (0.0, 0.1)):

        def f(h, w, b, a1, b1, ratio=ratio, entropy=entropy):
            return linear_policy_loss(
                h, w, target, old, advantage, bounds([5, 4]), bias=b, lora=(a1, b1, 0.5), softcap=4.0, chunk_tokens=3,
                ratio=ratio, ref_logp=old, kl_coef=0.2, kl_estimator="k2", entropy_coef=entropy, backend=backend,
            )[0]  # fmt: skip

        assert torch.autograd.gradcheck(f, (hidden, weight, bias, *lora), fast_mode=True)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (1,), (9,)], ids=str)
def test_few_tokens(backend, device, lengths):
    for ratio in ("token", "sequence"):
        batch = make(lengths, device=device, masked=False)
        for chunk in (None, 2):
            check(batch, 2e-6, {"backend": backend, "chunk_tokens": chunk}, ratio=ratio, entropy_coef=0.1)


def test_nothing_valid(backend, device):
    batch = make(device=device)
    batch["mask"] = torch.zeros(28, dtype=torch.bool, device=device)
    loss, grads, metrics, logp = run(linear_policy_loss, batch, backend=backend)
    assert float(loss) == 0 and (logp == 0).all() and all((g == 0).all() for g in grads)
    assert float(metrics.tokens) == float(metrics.sequences) == 0


def test_rows_that_do_not_count_may_hold_anything(backend, device):
    batch = make(device=device)
    clean = run(linear_policy_loss, batch, backend=backend, entropy_coef=0.1)
    bad = dict(batch, hidden=batch["hidden"].detach().clone())
    drop = ~batch["mask"]
    bad["hidden"][drop] = torch.nan
    bad["hidden"].requires_grad_()
    ours = run(linear_policy_loss, bad, backend=backend, entropy_coef=0.1)
    assert torch.equal(ours[0], clean[0]) and torch.equal(ours[3], clean[3])
    assert all(torch.equal(a, b) for a, b in zip(ours[1], clean[1]))
    assert (ours[1][0][drop] == 0).all()


def test_rows_without_gradient_are_left_out(backend, device):
    """Whole sequences of advantage 0, as in groups of equal rewards."""
    batch = make((40, 40, 40), device=device, masked=False)
    batch["advantage"] = torch.tensor([0.0, 1.0, 0.0], device=device)
    check(batch, 2e-6, {"backend": backend, "chunk_tokens": 30})


def test_gradients_only_where_they_are_wanted(backend, device):
    batch = make(device=device, bias=True)
    first = [batch[k] for k in ("hidden", "weight", "target", "old_logp", "advantage", "cu_seqlens")]
    for which in range(4):
        given = [x.detach() for x in (*first[:2], batch["bias"])]
        if which < 3:
            given[which].requires_grad_()
        loss, _, _ = linear_policy_loss(
            given[0], given[1], *first[2:], bias=given[2], mask=batch["mask"], backend=backend
        )
        assert loss.requires_grad == (which < 3)
        if which < 3:
            loss.backward()
            assert [x.grad is not None for x in given] == [i == which for i in range(3)]
    with torch.no_grad():
        loss, _, _ = linear_policy_loss(*first, mask=batch["mask"], backend=backend)
    assert not loss.requires_grad and loss.isfinite()


def test_backward_twice_and_repeatable(backend, device):
    batch = make(device=device)
    first = run(linear_policy_loss, batch, backend=backend, chunk_tokens=8)
    second = run(linear_policy_loss, batch, backend=backend, chunk_tokens=8)
    assert torch.equal(first[0], second[0]) and all(torch.equal(a, b) for a, b in zip(first[1], second[1]))
    names = ("hidden", "weight", "target", "old_logp", "advantage", "cu_seqlens")
    loss, _, _ = linear_policy_loss(*(batch[k] for k in names), mask=batch["mask"], backend=backend)
    one = torch.autograd.grad(loss, batch["weight"], retain_graph=True)[0]
    assert torch.equal(one, torch.autograd.grad(loss, batch["weight"])[0])


def test_compiles_whole(backend, device):
    batch = make(device=device)
    rest = [batch[k] for k in ("target", "old_logp", "advantage", "cu_seqlens")]

    def f(h, w):
        loss, metrics, logp = linear_policy_loss(h, w, *rest, mask=batch["mask"], backend=backend)
        return loss * 2 + metrics.ratio.float() + logp.sum()

    head = (batch["hidden"], batch["weight"])
    ours = torch.autograd.grad(torch.compile(f, fullgraph=True)(*head), head)
    torch.testing.assert_close(ours, torch.autograd.grad(f(*head), head))


def test_opcheck(backend, device):
    # opcheck compares two runs, and the operator leaves nothing uninitialised
    poison_allocations()()
    batch = make(device=device, bias=True)
    rank = torch.randn(28, R, device=device), torch.randn(V, R, device=device)
    for i, case in enumerate(itertools.islice(grid(60), 0, 60, 11)):
        denominator = case["denominator"]
        encoded = checked_options("linear_policy_loss", **case, per_token=False).encoded()
        names = ("old_logp", "advantage", "cu_seqlens", "mask", "ref_logp", "rollout_logp")
        head = [batch[k].detach() for k in ("hidden", "weight", "bias")]
        arguments = (
            *head, *(rank if i % 2 else (None, None)), batch["target"], torch.ones(28, device=device), 3.0 * (i % 3),
            -100, *(batch[k] for k in names), denominator if isinstance(denominator, torch.Tensor) else None, *encoded,
            5, [True, i % 2 == 0, True, i % 2 == 1, i % 2 == 1], backend,
        )  # fmt: skip
        torch.library.opcheck(torch.ops.prism_kernels.linear_policy_loss_fwd.default, arguments)


ZERO = torch.zeros(28)
BAD = [
    ({"hidden": torch.zeros(4, 7, D)}, ValueError, "expected hidden of shape (T, D), got (4, 7, 16)"),
    ({"weight": torch.zeros(V, D + 1)}, ValueError, "expected weight of shape (V, 16), got (61, 17)"),
    ({"target": torch.full((28,), V)}, ValueError, "expected target in [0, 61) or ignore_index -100, got 61 in row 0"),
    ({"temperature": 0.0}, ValueError, "expected temperature > 0 and finite, got 0.0"),
    ({"lora": 1.0}, TypeError, "expected lora to be a tuple (A, B, scale), got float"),
    ({"old_logp": ZERO[:3]}, ValueError, "expected old_logp of shape (28,), got (3,)"),
    ({"advantage": ZERO[:3]}, ValueError, "expected advantage of shape (6,), one for each sequence, or (28,)"),
    (
        {"cu_seqlens": bounds(LENGTHS) + 1},
        ValueError,
        "from 0 to 28, the number of tokens, got 1 to 29",
    ),
    ({"ratio": "both"}, ValueError, "expected ratio to be one of 'token', 'sequence', got 'both'"),
    ({"denominator": torch.tensor(0.0)}, ValueError, "expected denominator > 0 and finite, got 0.0"),
    ({"kl_coef": 0.1, "ref_logp": None}, ValueError, "expected ref_logp with kl_coef 0.1, got None"),
    ({"chunk_tokens": 0}, ValueError, "expected chunk_tokens >= 1 or None, got 0"),
]


@pytest.mark.parametrize("changes, error, message", BAD, ids=[m[9:40] for _, _, m in BAD])
def test_linear_policy_loss_names_the_bad_argument(changes, error, message):
    with pytest.raises(error, match="linear_policy_loss: .*" + re.escape(message)):
        linear_policy_loss(**{**make(masked=False), **changes})
