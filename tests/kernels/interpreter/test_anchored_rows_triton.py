import math

import pytest
import torch
import triton
import triton.language as tl

from prism_kernels.ops.anchored_rows import eager, kernels

NAN, INF = math.nan, math.inf
# three blocks of 64 columns, the last not full
V = 150
FORWARD_DTYPES = [
    ("float32", None),
    ("float32", "bfloat16"),
    ("float32", "in place"),
    ("bfloat16", None),
    ("bfloat16", "in place"),
    ("float16", "float32"),
    ("float64", "float64"),
    ("float64", None),
]
FLAGS = [(False, 0.0, False), (True, 0.0, True), (True, 8.0, True)]


def rows(dtype, seed=0, count=6):
    """Ordinary, far, -inf-holding and targetless rows; anchors and temperatures in the accumulator's dtype."""
    make = torch.Generator().manual_seed(seed)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    z = (torch.randn(count, V, generator=make, dtype=torch.float64) * 3).to(dtype)
    target = torch.randint(0, V, (count,), generator=make)
    z[1, 70] = 60
    z[2, 10:90] = -INF
    # ids of another slice, one of which wraps into this one as an int32
    target[3], target[4] = 2**32 + 5, -1
    z[2, target[2]] = 0.5
    bias = torch.randn(V, generator=make, dtype=torch.float64).to(accumulator)
    inv_temperature = (0.5 + torch.rand(count, generator=make, dtype=torch.float64)).to(accumulator)
    return z, target, bias, inv_temperature


def logits(z, bias, softcap):
    x = z.double()
    if bias is not None:
        x = x + bias.double()
    return softcap * torch.tanh(x / softcap) if softcap else x


def anchors(z, target, bias, softcap, dtype):
    here = (target >= 0) & (target < z.shape[1])
    x = logits(z, bias, softcap).gather(1, torch.where(here, target, 0)[:, None])[:, 0]
    return torch.where(here, x, 0.25).to(dtype)


def exact_forward(z, target, anchor, inv_temperature, bias, softcap, chain):
    """Returns stats and exponentials by their definition in float64, and the scale of the stats' rounding."""
    x = logits(z, bias, softcap)
    c, s = anchor.double(), inv_temperature.double()
    top = x.amax(1)
    c = torch.where((top - c) * s > 28, top, c)
    d = (x - c[:, None]) * s[:, None]
    live = torch.arange(z.shape[1]) != target[:, None]
    e = torch.where(live, d.exp(), 0.0)
    moments = torch.where(e == 0, 0.0, e * d)
    stats = torch.stack((c, e.sum(1), moments.sum(1), e.square().sum(1)))
    scale = torch.stack((c.abs(), e.sum(1), moments.abs().sum(1), e.square().sum(1)))
    return stats, e * (1 - (x / softcap).square()) if chain and softcap else e, scale


def run_forward(module, z, target, anchor, inv_temperature, bias, softcap, chain, exp):
    """Returns stats and exponentials; both are NaN before, and stats has strided rows."""
    z = z.clone()
    stats = torch.full((4, z.shape[0] + 3), NAN, dtype=anchor.dtype)[:, : z.shape[0]]
    out = None
    if exp is not None:
        out = z if exp == "in place" else torch.full(z.shape, NAN, dtype=getattr(torch, exp))
    module.forward(z, target, anchor, inv_temperature, bias, softcap, chain, out, stats)
    return stats, out


@pytest.mark.parametrize("with_bias, softcap, chain", FLAGS)
@pytest.mark.parametrize("dtype, exp", FORWARD_DTYPES)
def test_forward_is_the_definition(dtype, exp, with_bias, softcap, chain):
    dtype = getattr(torch, dtype)
    z, target, bias, inv_temperature = rows(dtype)
    bias = bias if with_bias else None
    anchor = anchors(z, target, bias, softcap, bias.dtype if with_bias else inv_temperature.dtype)
    stats, out = run_forward(kernels, z, target, anchor, inv_temperature, bias, softcap, chain, exp)
    expected, e, scale = exact_forward(z, target, anchor, inv_temperature, bias, softcap, chain)
    assert (softcap > 0) == bool((expected[0] == anchor.double()).all()), "one row must be far without a soft cap"
    tolerance = 1e-13 if dtype == torch.float64 else 2e-5
    assert ((stats.double() - expected).abs() <= tolerance * scale + 1e-30).all()
    if out is not None:
        rounding = torch.finfo(out.dtype).eps + tolerance
        _, plain, _ = exact_forward(z, target, anchor, inv_temperature, bias, softcap, False)
        # the slope cancels next to the cap; and fp16 has subnormals, whose rounding is absolute
        bound = rounding * e.abs() + tolerance * plain + torch.finfo(out.dtype).tiny
        assert ((out.double() - e).abs() <= bound).all()


@pytest.mark.parametrize("exp", [None, "float32", "in place"])
def test_forward_of_broken_rows_agrees_with_eager_and_touches_no_other(exp):
    z, target, _, inv_temperature = rows(torch.float32, count=12)
    anchor = anchors(z, target, None, 0.0, torch.float32)
    clean, clean_exp = run_forward(kernels, z, target, anchor, inv_temperature, None, 0.0, False, exp)
    z[6, 100] = NAN
    z[7, 3] = INF
    z[8] = -INF
    anchor[8] = -INF
    # the target alone has probability 0, and the stand-in for its -inf overflows
    inv_temperature[9] = 2.0
    anchor[9] = z[9, target[9]] = -INF
    anchor[10] = NAN
    z[11, 5], z[11, 120] = NAN, 200.0
    stats, out = run_forward(kernels, z, target, anchor, inv_temperature, None, 0.0, False, exp)
    expected, _ = run_forward(eager, z, target, anchor, inv_temperature, None, 0.0, False, exp)
    assert torch.equal(stats.isnan(), expected.isnan())
    assert torch.equal(stats[0].nan_to_num(), expected[0].nan_to_num())
    torch.testing.assert_close(stats[:, 9], expected[:, 9], rtol=2e-5, atol=0)
    assert stats[1, 6:].isnan().tolist() == [True, True, True, False, True, True]
    assert torch.equal(stats[:, :6], clean[:, :6])
    if out is not None:
        assert (out[stats[1].isnan()] == 0).all()
        assert torch.equal(out[:6], clean_exp[:6])
        assert out[9].isfinite().all() and (out[9] > 0).any()


@pytest.mark.parametrize("exp", [None, "float32"])
def test_forward_follows_a_maximum_that_rises_from_block_to_block(exp):
    z, target, _, inv_temperature = rows(torch.float32)
    z += torch.arange(V)[None, :] // 20 * 15.0
    anchor = anchors(z, target, None, 0.0, torch.float32)
    stats, _ = run_forward(kernels, z, target, anchor, inv_temperature, None, 0.0, False, exp)
    expected, _, scale = exact_forward(z, target, anchor, inv_temperature, None, 0.0, False)
    assert (expected[0] != anchor.double()).sum() >= 3
    assert torch.equal(stats[0].double(), expected[0])
    assert ((stats.double() - expected).abs() <= 2e-5 * scale).all()


@pytest.mark.parametrize("exp", [None, "float32", "in place"])
def test_forward_is_far_only_beyond_28(exp):
    z = torch.zeros(2, V)
    z[0, 100], z[1, 100] = 14.0, math.nextafter(14.0, 15.0) + 1e-6
    two, zero = torch.full((2,), 2.0), torch.zeros(2)
    stats, _ = run_forward(kernels, z, zero.long(), zero, two, None, 0.0, False, exp)
    assert stats[0].tolist() == [0.0, z[1, 100].item()]


def test_forward_modes_agree_bit_for_bit_on_near_rows_and_rows_do_not_depend_on_each_other():
    z, target, bias, inv_temperature = rows(torch.float32)
    anchor = anchors(z, target, bias, 0.0, torch.float32)
    modes = [
        run_forward(kernels, z, target, anchor, inv_temperature, bias, 0.0, True, m)[0]
        for m in (None, "float32", "in place")
    ]
    again, _ = run_forward(kernels, z, target, anchor, inv_temperature, bias, 0.0, True, None)
    assert torch.equal(again, modes[0])
    near = modes[0][0] == anchor
    assert near.sum() == 5
    assert torch.equal(modes[0][:, near], modes[1][:, near])
    assert torch.equal(modes[1], modes[2])
    for t in range(z.shape[0]):
        one = slice(t, t + 1)
        alone, _ = run_forward(
            kernels, z[one], target[one], anchor[one], inv_temperature[one], bias, 0.0, True, None
        )  # fmt: skip
        assert torch.equal(alone, modes[0][:, one])


@pytest.mark.parametrize("columns", [1, 64, 65])
def test_forward_of_odd_widths_and_no_rows(columns):
    z = torch.randn(3, columns, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, columns - 1, columns])
    anchor, ones = torch.zeros(3), torch.ones(1).expand(3)
    for exp in (None, "float32"):
        stats, out = run_forward(kernels, z, target, anchor, ones, None, 0.0, False, exp)
        expected, e, _ = exact_forward(z, target, anchor, ones, None, 0.0, False)
        torch.testing.assert_close(stats.double(), expected, rtol=2e-5, atol=1e-6)
        if out is not None:
            torch.testing.assert_close(out.double(), e, rtol=2e-5, atol=0)
    empty, _ = run_forward(kernels, z[:0], target[:0], anchor[:0], ones[:0], None, 0.0, False, None)
    assert empty.shape == (4, 0)


def test_strides_of_every_argument_are_followed():
    z, target, bias, inv_temperature = rows(torch.float32)
    anchor = anchors(z, target, bias, 0.0, torch.float32)
    expected, e = run_forward(kernels, z, target, anchor, inv_temperature, bias, 0.0, False, "float32")

    def strided(x):
        return torch.stack((x, x.new_full(x.shape, -7)), -1)[..., 0]

    def columns_first(x):
        return x.t().contiguous().t()

    out, stats = columns_first(torch.full_like(z, NAN)), torch.full((z.shape[0], 4), NAN).t()
    vectors = strided(target), strided(anchor), strided(inv_temperature), strided(bias)
    kernels.forward(columns_first(z), *vectors, 0.0, False, out, stats)
    assert torch.equal(out, e)
    assert torch.equal(stats, expected)

    coefficients = torch.randn(3, z.shape[0], generator=torch.Generator().manual_seed(1))
    plain, gradient = torch.full_like(z, NAN), columns_first(torch.full_like(z, NAN))
    kernels.backward(z, False, target, stats[0].clone(), inv_temperature, coefficients, bias, 0.0, plain)
    strides = strided(target), strided(stats[0]), strided(inv_temperature), coefficients.t().contiguous().t()
    kernels.backward(columns_first(z), False, *strides, strided(bias), 0.0, gradient)
    assert torch.equal(plain, gradient)


def exact_backward(source, source_is_exp, target, anchor, inv_temperature, coefficients, bias, softcap):
    alpha, beta, at_target = coefficients.double()[:, :, None]
    if source_is_exp:
        e = source.double()
        d = e.log()
        x = d / inv_temperature.double()[:, None] + anchor.double()[:, None]
    else:
        x = logits(source, bias, softcap)
        d = (x - anchor.double()[:, None]) * inv_temperature.double()[:, None]
        e = d.exp()
    slope = 1 - (x / softcap).square() if softcap else torch.ones_like(x)
    f = torch.where(e == 0, 0.0, e * (alpha + beta * d) * slope)
    scale = torch.where(e == 0, 0.0, e * (alpha.abs() + (beta * d).abs()))
    here = torch.arange(source.shape[1]) == target[:, None]
    dead = (coefficients == 0).all(0)[:, None]
    gradient = torch.where(dead, 0.0, torch.where(here, at_target, f))
    return gradient, torch.where(dead, 0.0, torch.where(here, at_target.abs(), scale))


@pytest.mark.parametrize("with_bias, softcap", [(False, 0.0), (True, 8.0)])
@pytest.mark.parametrize(
    "dtype, source_is_exp, out",
    [
        ("float32", False, "bfloat16"),
        ("float32", False, "in place"),
        ("float32", True, "float32"),
        ("bfloat16", True, "in place"),
        ("float16", False, "bfloat16"),
        ("float64", True, "float64"),
        ("float64", False, "in place"),
    ],
)
def test_backward_is_the_definition(dtype, source_is_exp, out, with_bias, softcap):
    z, target, bias, inv_temperature = rows(getattr(torch, dtype))
    bias = bias if with_bias else None
    anchor = anchors(z, target, bias, softcap, inv_temperature.dtype)
    stats, e = run_forward(kernels, z, target, anchor, inv_temperature, bias, softcap, False, dtype)
    source = e if source_is_exp else z
    make = torch.Generator().manual_seed(2)
    # beta beyond 1 would turn 0 * -inf, clamped carelessly, into NaN
    coefficients = torch.full((3, z.shape[0] + 2), NAN, dtype=anchor.dtype)[:, : z.shape[0]]
    coefficients.copy_(torch.randn(3, z.shape[0], generator=make) * 3)
    coefficients[:, 5] = 0
    source[5, ::7] = NAN
    arguments = (source_is_exp, target, stats[0].clone(), inv_temperature, coefficients, bias, softcap)
    expected, scale = exact_backward(source, *arguments)
    gradient = source.clone() if out == "in place" else torch.full(z.shape, NAN, dtype=getattr(torch, out))
    kernels.backward(gradient if out == "in place" else source, *arguments, gradient)
    rounding = torch.finfo(gradient.dtype).eps + (1e-12 if dtype == "float64" else 3e-5)
    wrong = (gradient.double() - expected).abs() > rounding * scale + 1e-6 * (gradient.dtype != torch.float64)
    assert not wrong.any()
    assert gradient.isfinite().all()
    assert (gradient[5] == 0).all()
    theirs = torch.full(z.shape, NAN, dtype=gradient.dtype)
    eager.backward(source, *arguments, theirs)
    assert ((gradient.double() - theirs.double()).abs() <= 2 * rounding * scale + 2e-6).all()


def test_backward_spreads_a_broken_row_no_further_and_takes_no_rows():
    z, target, _, inv_temperature = rows(torch.float32)
    anchor = anchors(z, target, None, 0.0, torch.float32)
    coefficients = torch.ones(3, z.shape[0])
    clean, broken = torch.full_like(z, NAN), torch.full_like(z, NAN)
    kernels.backward(z, False, target, anchor, inv_temperature, coefficients, None, 0.0, clean)
    z[4, 7] = NAN
    kernels.backward(z, False, target, anchor, inv_temperature, coefficients, None, 0.0, broken)
    others = torch.arange(z.shape[0]) != 4
    assert torch.equal(clean[others], broken[others])
    assert broken[4].isnan().sum() == 1
    kernels.backward(
        z[:0], False, target[:0], anchor[:0], inv_temperature[:0], coefficients[:, :0], None, 0.0, clean[:0]
    )  # fmt: skip


@triton.jit
def _tanh_kernel(u, out, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(out + at, kernels.tanh(tl.load(u + at)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tanh_is_within_a_few_ulp(dtype):
    u = torch.cat((torch.linspace(-1.5, 1.5, 2000), torch.logspace(-20, 2, 2000), -torch.logspace(-3, 2, 88)))
    u = torch.cat((u, torch.tensor([0.0, -0.0, INF, -INF, 0.4, -0.4, 1e30, -1e30]))).to(dtype)
    assert u.numel() == 4096
    out = torch.full_like(u, NAN)
    _tanh_kernel[(1,)](u, out, COUNT=4096)
    exact = torch.tensor([math.tanh(x) for x in u.tolist()], dtype=torch.float64)
    assert ((out.double() - exact).abs() <= 4 * torch.finfo(dtype).eps * exact.abs()).all()
    nan = torch.full((4,), NAN, dtype=dtype)
    _tanh_kernel[(1,)](nan, out, COUNT=4)
    assert out[:4].isnan().all()
