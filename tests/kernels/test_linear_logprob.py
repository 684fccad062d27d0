"""linear_logprob against its float64 reference, on every backend of this machine."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_kernels import linear_logprob, use_backend
from prism_kernels.ops.linear_logprob import eager
from prism_kernels.ops.linear_logprob.reference import linear_logprob_reference
from prism_kernels.testing import assert_close, confident_inputs, double, gradients, head_inputs, relative_error

TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}


def extras(device, dtype, rows, columns, width, names):
    """The optional arguments by name, as leaves."""
    make = torch.Generator().manual_seed(1)

    def rand(*shape):
        return torch.randn(*shape, generator=make).to(device, dtype)

    values = {
        "bias": lambda: rand(columns).requires_grad_(),
        "softcap": lambda: 5.0,
        "temperature": lambda: torch.rand(rows, generator=make).to(device) + 0.5,
        "entropy": lambda: True,
        "lora": lambda: ((rand(3, width) / width**0.5).requires_grad_(), rand(columns, 3).requires_grad_(), 0.7),
    }
    return {name: values[name]() for name in names}


def leaves_of(hidden, weight, options):
    leaves = [hidden, weight]
    if "bias" in options:
        leaves.append(options["bias"])
    if "lora" in options:
        leaves += options["lora"][:2]
    return leaves


def run(op, hidden, weight, target, upstream, options):
    out = op(hidden, weight, target, **options)
    outputs = [(out.logp, upstream[0])]
    if out.entropy is not None:
        outputs.append((out.entropy, upstream[1]))
    return out, gradients(outputs, leaves_of(hidden, weight, options))


def compare(hidden, weight, target, options, call, tiny):
    """Three-way: ours and plain torch at the same dtype, each against float64."""
    upstream = torch.randn(2, *target.shape, generator=torch.Generator().manual_seed(2)).to(hidden.device)
    ours, our_grads = run(linear_logprob, hidden, weight, target, upstream, {**options, **call})
    plain, plain_grads = run(linear_logprob_reference, hidden, weight, target, upstream, options)
    exact, exact_grads = run(
        linear_logprob_reference, double(hidden), double(weight), target, upstream, double(options)
    )
    for name in ("logp", "entropy", "lse", "sum_pi_squared"):
        if getattr(exact, name) is not None:
            assert_close(getattr(ours, name), getattr(plain, name), getattr(exact, name), name=name, tiny=tiny)
    for name, a, b, c in zip(("hidden", "weight", "third", "fourth", "fifth"), our_grads, plain_grads, exact_grads):
        assert a.dtype == b.dtype
        assert_close(a, b, c, name=f"gradient of {name}", tiny=2 * tiny)
    return ours, exact


OPTIONS = [
    (),
    ("bias",),
    ("softcap",),
    ("temperature",),
    ("lora",),
    ("entropy",),
    ("entropy", "softcap"),
    ("bias", "softcap", "temperature", "lora", "entropy"),
]


# dtype and cache choose the stored exponentials, names the terms of the row kernels; they meet in pairs
@pytest.mark.grid
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("cache", [None, 0, "part"])
@pytest.mark.parametrize("names", OPTIONS, ids="+".join)
def test_linear_logprob_matches_float64(backend, device, dtype, cache, names):
    rows, columns, width = 70, 515, 48
    hidden, weight, target = head_inputs(rows, columns, width, dtype=dtype, device=device, scale=3)
    target[::7] = -100
    options = extras(device, dtype, rows, columns, width, names)
    cache_bytes = 33 * columns * max(hidden.element_size(), 2) if cache == "part" else cache
    compare(hidden, weight, target, options, {"backend": backend, "cache_bytes": cache_bytes}, TOLERANCE[dtype])


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 40),
    columns=st.integers(1, 300),
    width=st.integers(1, 40),
    names=st.sets(st.sampled_from(["bias", "softcap", "temperature", "entropy", "lora"])),
    cache=st.sampled_from([None, 0, 999]),
    seed=st.integers(0, 2**16),
)
def test_linear_logprob_any_shape(rows, columns, width, names, cache, seed):
    hidden, weight, target = head_inputs(rows, columns, width, scale=4, seed=seed)
    options = extras("cpu", torch.float32, rows, columns, width, sorted(names))
    compare(hidden, weight, target, options, {"cache_bytes": cache}, 1e-5)


@pytest.mark.parametrize("rows", [513, 1030, 2051])
def test_linear_logprob_rows_beyond_a_block(backend, device, rows):
    hidden, weight, target = head_inputs(rows, 130, 16, device=device, scale=3)
    for cache in (None, 0, 700 * 130 * 4):
        compare(hidden, weight, target, {}, {"backend": backend, "cache_bytes": cache}, 2e-6)


def test_linear_logprob_is_exact_to_large_logits(backend, device):
    hidden, weight, target = head_inputs(64, 1000, 64, device=device, scale=11)
    logits = hidden.double() @ weight.double().t()
    assert 40 < logits.abs().max() < 60
    out = linear_logprob(hidden, weight, target, entropy=True, backend=backend)
    exact = linear_logprob_reference(hidden.double(), weight.double(), target, entropy=True)
    assert (out.logp - exact.logp).abs().max() <= 1e-4
    assert (out.entropy - exact.entropy).abs().max() <= 1e-4
    assert (out.lse - exact.lse).abs().max() <= 1e-4


@pytest.mark.parametrize("cache", [None, 0])
@pytest.mark.parametrize(
    "names", [(), ("entropy",), ("bias",), ("temperature",), ("lora",), ("softcap",)], ids="+".join
)
def test_linear_logprob_keeps_confident_tokens(backend, device, cache, names):
    """Relative accuracy where 1 - p is 1e-9 to 1e-3; dense fp32 loses it altogether."""
    gaps = torch.logspace(-9, -3, 25, dtype=torch.float64)
    hidden, weight, target = confident_inputs(gaps, 500, 64, device=device)
    options = extras(device, torch.float32, gaps.numel(), 500, 64, names)
    if "bias" in options:
        options["bias"] = (options["bias"].detach() * 0.01).requires_grad_()
    if "lora" in options:
        a, b, _ = options["lora"]
        options["lora"] = (a, b, 1e-3)
    if "softcap" in options:
        options["softcap"] = 200.0
    if "temperature" in options:
        options["temperature"] = options["temperature"] * 0.2 + 0.9
    exact_options = double(options)
    exact = linear_logprob_reference(hidden.double(), weight.double(), target, **exact_options)
    missing = -torch.expm1(exact.logp)
    assert missing.min() < 1e-8 and missing.max() < 2e-2
    out = linear_logprob(hidden, weight, target, cache_bytes=cache, backend=backend, **options)
    dense = linear_logprob_reference(hidden, weight, target, **options)

    def worst(value, wanted):
        return float(((value.double() - wanted) / wanted).abs().max().detach())

    assert worst(out.logp, exact.logp) <= 1e-4
    assert worst(dense.logp, exact.logp) > 0.1
    if "entropy" in names:
        assert worst(out.entropy, exact.entropy) <= 1e-4

    # each row's own gradient, so that no row hides behind a larger one
    def row_gradients(op, *inputs, **kwargs):
        h, w = (x.detach().requires_grad_() for x in inputs)
        result = op(h, w, target, **kwargs)
        chosen = result.entropy if "entropy" in names else result.logp
        return torch.autograd.grad(chosen.sum(), h)[0].double()

    wanted = row_gradients(linear_logprob_reference, hidden.double(), weight.double(), **exact_options)
    ours = row_gradients(linear_logprob, hidden, weight, cache_bytes=cache, backend=backend, **options)
    errors = (ours - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert float(errors.max()) <= 1e-4


@pytest.mark.parametrize("cache", [None, 0])
@pytest.mark.parametrize("distance", [60.0, 200.0])
def test_linear_logprob_rows_far_above_the_target(backend, device, cache, distance):
    hidden, weight, target = head_inputs(20, 300, 32, device=device, scale=2)
    bias = torch.zeros(300, device=device)
    bias[7] = distance
    target[target == 7] = 8
    target[3] = 7
    bias.requires_grad_()
    call = {"backend": backend, "cache_bytes": cache}
    ours, exact = compare(hidden, weight, target, {"bias": bias}, call, 1e-5)
    assert float(exact.logp.min()) < -distance / 2
    assert (ours.logp - exact.logp).abs().max() <= 1e-4
    # the entropy of such a row is of the order of exp(-distance): absolute, and its gradient beside that of logp
    upstream = torch.ones(2, *target.shape, device=device)
    options = {"bias": bias, "entropy": True}
    ours, grads = run(linear_logprob, hidden, weight, target, upstream, {**options, **call})
    exact, wanted = run(linear_logprob_reference, double(hidden), double(weight), target, upstream, double(options))
    assert (ours.entropy - exact.entropy).abs().max() <= 1e-5
    for grad, want in zip(grads, wanted):
        assert relative_error(grad, want) <= 1e-5


def test_linear_logprob_bf16_gradients_beat_pytorch(backend, device):
    hidden, weight, target = head_inputs(96, 2000, 64, dtype=torch.bfloat16, device=device, scale=4)
    upstream = torch.randn(2, 96, generator=torch.Generator().manual_seed(3)).to(device)
    _, ours = run(linear_logprob, hidden, weight, target, upstream, {"backend": backend})
    _, plain = run(linear_logprob_reference, hidden, weight, target, upstream, {})
    _, exact = run(
        linear_logprob_reference,
        hidden.detach().double().requires_grad_(),
        weight.detach().double().requires_grad_(),
        target,
        upstream,
        {},
    )
    for a, b, c in zip(ours, plain, exact):
        assert relative_error(a, c) <= 2 * relative_error(b, c)


def test_linear_logprob_every_combination_of_gradients(backend, device):
    hidden, weight, target = head_inputs(12, 90, 8, device=device)
    options = extras(device, torch.float32, 12, 90, 8, ("bias", "lora"))
    all_leaves = leaves_of(hidden, weight, options)
    full = dict(
        zip(
            map(id, all_leaves),
            torch.autograd.grad(
                linear_logprob(hidden, weight, target, backend=backend, **options).logp.sum(), all_leaves
            ),
        )
    )
    for wanted in itertools.product([False, True], repeat=5):
        for leaf, flag in zip(all_leaves, wanted):
            leaf.requires_grad_(flag)
        out = linear_logprob(hidden, weight, target, backend=backend, **options).logp.sum()
        assert out.requires_grad == any(wanted)
        if any(wanted):
            chosen = [leaf for leaf, flag in zip(all_leaves, wanted) if flag]
            for leaf, grad in zip(chosen, torch.autograd.grad(out, chosen)):
                torch.testing.assert_close(grad, full[id(leaf)], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cache", [None, 0])
def test_linear_logprob_skips_rows_without_gradient(backend, device, cache):
    """Rows whose incoming gradient is 0 change nothing, even where they hold NaN."""
    hidden, weight, target = head_inputs(40, 200, 16, device=device)
    mask = torch.arange(40, device=device) % 3 == 0
    upstream = torch.where(mask, torch.randn(40, device=device), 0.0)
    out = linear_logprob(hidden, weight, target, entropy=True, cache_bytes=cache, backend=backend)
    grads = torch.autograd.grad((out.logp * upstream).sum(), (hidden, weight))
    few = linear_logprob(hidden[mask], weight, target[mask], cache_bytes=cache, backend=backend)
    wanted = torch.autograd.grad((few.logp * upstream[mask]).sum(), (hidden, weight))
    for grad, want in zip(grads, wanted):
        torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-6)
    assert (grads[0][~mask] == 0).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("cache", [None, 0])
@pytest.mark.parametrize("entropy", [False, True])
def test_linear_logprob_a_poisoned_row_touches_itself_alone(backend, device, poison, cache, entropy):
    hidden, weight, target = head_inputs(30, 200, 16, device=device)
    clean = linear_logprob(hidden, weight, target, entropy=entropy, backend=backend)
    bad = hidden.detach().clone()
    bad[11, 3] = poison
    bad.requires_grad_()
    others = torch.arange(30, device=device) != 11
    out = linear_logprob(bad, weight, target, entropy=entropy, cache_bytes=cache, backend=backend)
    assert out.logp[11].isnan()
    assert torch.equal(out.logp[others], clean.logp[others])
    entropy_term = 0.5 * out.entropy.sum() if entropy else 0
    grads = torch.autograd.grad(out.logp.sum() + entropy_term, (bad, weight))
    assert grads[0][11].isnan().all()
    kept = linear_logprob(hidden[others], weight, target[others], entropy=entropy, cache_bytes=cache, backend=backend)
    entropy_term = 0.5 * kept.entropy.sum() if entropy else 0
    wanted = torch.autograd.grad(kept.logp.sum() + entropy_term, (hidden, weight))
    torch.testing.assert_close(grads[0][others], wanted[0][others], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads[1], wanted[1], rtol=1e-5, atol=1e-6)


def test_linear_logprob_rows_of_minus_infinity(backend, device):
    hidden, weight, target = head_inputs(6, 50, 8, device=device)
    bias = torch.full((50,), -torch.inf, device=device)
    out = linear_logprob(hidden, weight, target, bias=bias, backend=backend)
    assert out.logp.isnan().all()
    bias[:10] = 0
    target = target % 10
    target[2] = 30
    out = linear_logprob(hidden, weight, target, bias=bias, entropy=True, backend=backend)
    exact = linear_logprob_reference(hidden.double(), weight.double(), target, bias=bias.double(), entropy=True)
    assert out.logp[2] == -torch.inf
    assert torch.allclose(out.logp.double(), exact.logp, atol=1e-5)
    assert torch.allclose(out.entropy.double(), exact.entropy, atol=1e-5)
    grads = torch.autograd.grad(out.logp.sum() + out.entropy.sum(), (hidden, weight))
    wanted_h, wanted_w = double(hidden), double(weight)
    exact = linear_logprob_reference(wanted_h, wanted_w, target, bias=bias.double())
    assert all(g.isfinite().all() for g in grads)
    logp = linear_logprob(hidden, weight, target, bias=bias, backend=backend).logp
    ours = torch.autograd.grad(logp.sum(), (hidden, weight))
    for grad, want in zip(ours, torch.autograd.grad(exact.logp.sum(), (wanted_h, wanted_w))):
        assert relative_error(grad, want) < 1e-5


def test_linear_logprob_all_rows_ignored_and_none(backend, device):
    hidden, weight, target = head_inputs(9, 40, 8, device=device)
    target[:] = -100
    for h, y in ((hidden, target), (hidden[:0], target[:0])):
        out = linear_logprob(h, weight, y, entropy=True, backend=backend)
        assert all((x == 0).all() and x.shape == y.shape for x in out)
        grads = torch.autograd.grad(out.logp.sum() + out.entropy.sum(), (hidden, weight))
        assert all((g == 0).all() for g in grads)


def test_linear_logprob_batch_of_sequences_expanded_and_strided(backend, device):
    hidden, weight, target = head_inputs(24, 70, 8, device=device)
    flat = linear_logprob(hidden, weight, target, backend=backend)
    batch = linear_logprob(hidden.view(4, 6, 8), weight, target.view(4, 6), backend=backend)
    assert torch.equal(batch.logp.reshape(-1), flat.logp)
    strided = torch.stack((hidden, hidden), 2)[..., 1]
    assert not strided.is_contiguous()
    wide = torch.cat((weight, weight), 1)[:, :8]
    assert torch.allclose(linear_logprob(strided, wide, target, backend=backend).logp, flat.logp, atol=1e-6)
    one = hidden[:1].expand(24, 8)
    out = linear_logprob(one, weight, target, backend=backend)
    # an expanded incoming gradient
    (grad,) = torch.autograd.grad(out.logp.sum(), hidden)
    assert grad[0].abs().sum() > 0 and (grad[1:] == 0).all()


def test_linear_logprob_tied_weights(backend, device):
    _, weight, target = head_inputs(10, 60, 8, device=device)

    def loss(w, op, **kwargs):
        hidden = torch.nn.functional.embedding(target.flip(0), w).tanh()
        return op(hidden, w, target, **kwargs).logp.sum()

    (ours,) = torch.autograd.grad(loss(weight, linear_logprob, backend=backend), weight)
    exact = weight.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(exact, linear_logprob_reference), exact)
    assert relative_error(ours, wanted) < 1e-5


def test_linear_logprob_autocast(backend, device):
    hidden, weight, target = head_inputs(20, 80, 16, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = linear_logprob(hidden, weight, target, backend=backend)
        (grad,) = torch.autograd.grad(out.logp.sum(), weight)
    lowered = linear_logprob(hidden.bfloat16(), weight.bfloat16(), target, backend=backend)
    assert out.logp.dtype == torch.float32 and grad.dtype == torch.float32
    torch.testing.assert_close(out.logp, lowered.logp)
    exact = linear_logprob_reference(hidden.bfloat16().double(), weight.bfloat16().double(), target)
    assert (out.logp - exact.logp).abs().max() < 1e-4


def test_linear_logprob_second_backward_is_the_same(backend, device):
    for cache, softcap in itertools.product((None, 0), (None, 10.0)):
        hidden, weight, target = head_inputs(30, 90, 8, device=device)
        out = linear_logprob(hidden, weight, target, entropy=True, softcap=softcap, cache_bytes=cache, backend=backend)
        loss = out.logp.sum() + out.entropy.square().sum()
        first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        second = torch.autograd.grad(loss, (hidden, weight))
        assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_linear_logprob_is_repeatable_bitwise(backend, device):
    hidden, weight, target = head_inputs(600, 700, 32, device=device)

    def once():
        out = linear_logprob(hidden, weight, target, entropy=True, backend=backend)
        return [*out, *torch.autograd.grad(out.logp.sum() + out.entropy.sum(), (hidden, weight))]

    assert all(torch.equal(a, b) for a, b in zip(once(), once()))


@pytest.mark.parametrize("width", [64, 512])
def test_linear_logprob_is_batch_invariant(backend, device, width):
    """A row's bits do not depend on its neighbours, their number, or its position among them."""
    hidden, weight, target = head_inputs(2300, 600, width, device=device)
    for grad in (False, True):
        for cache in (None, 0) if grad else (None,):
            with torch.set_grad_enabled(grad):

                def logp(h, y, cache=cache):
                    return linear_logprob(h, weight, y, entropy=True, cache_bytes=cache, backend=backend)

                whole = logp(hidden, target)
                for rows in (slice(0, 1), slice(5, 70), slice(3, 1100), slice(2299, 2300)):
                    part = logp(hidden[rows], target[rows])
                    assert all(torch.equal(a[rows], b) for a, b in zip(whole, part))


@pytest.mark.parametrize("cache", [None, 0])
def test_linear_logprob_compiles_whole(backend, device, cache):
    hidden, weight, target = head_inputs(20, 70, 8, device=device)
    target[3] = -100

    def f(h, w, y):
        out = linear_logprob(h, w, y, entropy=True, softcap=20.0, cache_bytes=cache, backend=backend)
        return (out.logp + 0.1 * out.entropy).sum()

    compiled = torch.compile(f, fullgraph=True)
    for rows in (20, 11):
        h, y = hidden[:rows], target[:rows]
        ours = torch.autograd.grad(compiled(h, weight, y), (hidden, weight))
        eager = torch.autograd.grad(f(h, weight, y), (hidden, weight))
        for a, b in zip(ours, eager):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_linear_logprob_backend_by_context_and_environment(device, monkeypatch):
    hidden, weight, target = head_inputs(4, 20, 8, device=device)
    plain = linear_logprob(hidden, weight, target, backend="torch").logp
    with use_backend("torch"):
        assert torch.equal(linear_logprob(hidden, weight, target).logp, plain)
    monkeypatch.setenv("PRISM_KERNELS_BACKEND", "cuda" if device == "cpu" else "cpu")
    with pytest.raises(RuntimeError, match=r"linear_logprob: backend .* is not available"):
        linear_logprob(hidden, weight, target)
    with use_backend("torch"):
        linear_logprob(hidden, weight, target)


# size moves products into the subnormals of fp16; cache chooses what the backward pass reads
@pytest.mark.grid
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "names", [(), ("softcap",), ("entropy",), ("bias", "softcap", "lora", "entropy")], ids="+".join
)
@pytest.mark.parametrize("cache", [None, 0, "part"])
@pytest.mark.parametrize("size", [1e-6, 1.0])
def test_linear_logprob_with_products_of_low_precision(monkeypatch, dtype, names, cache, size):
    """As on a GPU: operands of 16 bits, products summed in fp32. Small gradients must survive fp16."""

    def multiply(a, b, out, add=False):
        assert a.dtype == b.dtype == dtype
        exact = a.float() @ b.float()
        out.copy_(out + exact if add else exact)

    monkeypatch.setattr(eager, "operand", lambda hidden: hidden.dtype)
    monkeypatch.setattr(eager, "multiply", multiply)
    monkeypatch.setattr(eager, "CPU_SCRATCH", 2**17)
    rows, columns, width = 90, 1300, 32
    hidden, weight, target = head_inputs(rows, columns, width, dtype=dtype, scale=3)
    target[::7] = -100
    options = extras("cpu", dtype, rows, columns, width, names)
    cache_bytes = 50 * columns * 2 if cache == "part" else cache
    upstream = torch.randn(2, rows, generator=torch.Generator().manual_seed(2)) * size
    upstream[:, ::3] = 0
    call = {"cache_bytes": cache_bytes, "backend": "torch"}
    ours, grads = run(linear_logprob, hidden, weight, target, upstream, {**options, **call})
    exact, wanted = run(linear_logprob_reference, double(hidden), double(weight), target, upstream, double(options))
    assert relative_error(ours.logp, exact.logp) < 1e-5
    for grad, want in zip(grads, wanted):
        # where the result itself lies below fp16's smallest normal number, it can only be as good as its rounding
        rounding = float((want.to(grad.dtype).double() - want).norm() / want.norm())
        assert relative_error(grad, want) <= 2 * torch.finfo(torch.bfloat16).eps + 2 * rounding


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("names", OPTIONS, ids="+".join)
def test_linear_logprob_sums_over_blocks_of_columns(backend, device, monkeypatch, dtype, names):
    """Wide heads on the cpu: a row's sums are merged from blocks of columns, some far above the target, some -inf."""
    monkeypatch.setattr(eager, "COLUMNS", 64)
    rows, columns, width = 70, 515, 48
    hidden, weight, target = head_inputs(rows, columns, width, dtype=dtype, device=device, scale=3)
    target[::7] = -100
    options = extras(device, dtype, rows, columns, width, names)
    call = {"backend": backend, "cache_bytes": 0}
    compare(hidden, weight, target, options, call, TOLERANCE[dtype])
    if names == ("bias",):
        bias = options["bias"].detach().clone()
        bias[3], bias[300] = 60, 90
        bias[64:128] = -torch.inf
        target[target // 64 == 1] = 5
        out = linear_logprob(hidden, weight, target, bias=bias, **call)
        exact = linear_logprob_reference(hidden.double(), weight.double(), target, bias=bias.double())
        assert relative_error(out.logp, exact.logp) < 1e-6
        target[1] = 70
        assert linear_logprob(hidden, weight, target, bias=bias, **call).logp[1] == -torch.inf
    poisoned = hidden.detach().clone()
    poisoned[11] = torch.nan
    clean = linear_logprob(hidden, weight, target, **options, **call).logp
    logp = linear_logprob(poisoned, weight, target, **options, **call).logp
    others = torch.arange(rows, device=device) != 11
    assert logp[11].isnan() and torch.equal(logp[others], clean[others])
