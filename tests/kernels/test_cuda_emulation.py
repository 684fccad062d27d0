"""The CUDA row kernels at odd widths, alignments and values: on a GPU if there is one, else emulated.

What the emulation cannot show (races, the exponential instruction, 2^31 elements) is at the end, for a GPU alone.
"""

import pytest
import torch
from cuda_emulator import DEVICE, needs_gpu
from cuda_emulator import kernels as emulated

pytestmark = pytest.mark.slow

GUARD = 3.0e4
KINDS = ("near", "far", "confident", "masked", "sliced", "hot", "target_masked", "nan", "inf")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    operators = ("anchored_rows_fwd", "anchored_rows_bwd")
    yield from emulated("anchored_rows", operators, tmp_path_factory.mktemp("emulated"))


@pytest.fixture(autouse=True)
def on_device():
    with torch.device(DEVICE):
        yield


def guarded(T: int, V: int, dtype: torch.dtype, offset: int, gap: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that start `offset` elements into a buffer, `gap` elements apart, and the buffer around them."""
    buffer = torch.full((offset + T * (V + gap) + 16,), GUARD, dtype=dtype)
    return buffer.as_strided((T, V), (V + gap, 1), offset), buffer


def intact(buffer: torch.Tensor, rows: torch.Tensor) -> bool:
    inside = torch.zeros_like(buffer, dtype=torch.bool)
    inside.as_strided(rows.shape, rows.stride(), rows.storage_offset()).fill_(True)
    return bool((buffer[~inside] == GUARD).all())


def logits(V: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One row of each kind, its target and anchor."""
    z = (torch.randn(len(KINDS), V, dtype=torch.float64) * 3).to(dtype)
    target = torch.randint(V, (len(KINDS),))
    other = (target + 1 + torch.randint(max(V - 1, 1), target.shape)) % V
    for row, kind in enumerate(KINDS):
        y, w = target[row], other[row]
        if kind == "far":
            z[row, w] = 80
        elif kind == "confident":
            z[row, y] = 35
        elif kind == "masked":
            z[row, torch.rand(V) < 0.5] = -torch.inf
            z[row, y] = 1.5
        elif kind == "target_masked":
            z[row, : V // 2] = -torch.inf
            z[row, y] = -torch.inf
        elif kind == "nan":
            z[row, w] = torch.nan
        elif kind == "inf":
            z[row, w] = torch.inf
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    anchor = z.gather(1, target[:, None])[:, 0].to(compute)
    anchor[KINDS.index("sliced")] = 2.0
    target[KINDS.index("sliced")] = -7 if V % 2 else V + 7
    # far already without its largest logits: the anchor is not one of the row's
    anchor[KINDS.index("hot")] = -60.0
    return z, target, anchor


def transformed(z: torch.Tensor, bias: torch.Tensor | None, softcap: float) -> torch.Tensor:
    x = z.double() if bias is None else z.double() + bias.double()
    return softcap * torch.tanh(x / softcap) if softcap else x


def off_target(target: torch.Tensor, V: int) -> torch.Tensor:
    return torch.arange(V) != target[:, None]


def expected_forward(z, target, anchor, inv_temperature, bias, softcap, chain):
    x, c, k = transformed(z, bias, softcap), anchor.double(), inv_temperature.double()
    top = x.amax(1)
    c = torch.where((top - c) * k > 28, top, c)
    d = (x - c[:, None]) * k[:, None]
    keep = off_target(target, z.shape[1])
    e = torch.where(keep, d.exp(), 0.0)
    dot = torch.where(d == -torch.inf, 0.0, e * d).where(keep, 0.0)
    stats = torch.stack([c, e.sum(1), dot.sum(1), e.square().sum(1)])
    exp = e * (1 - (x / softcap).square()) if chain and softcap else e
    exp = torch.where(keep & stats[1].isfinite()[:, None], exp, 0.0)
    return exp, stats


def element_tolerance(compute: torch.dtype, out: torch.dtype, softcap: float) -> float:
    # an exponent of 130, the largest with a result above 2^-126, is rounded three times; a slope of 1 - tanh(4)^2
    # has lost ten bits
    arithmetic = 300 if not softcap else 2000
    return arithmetic * torch.finfo(compute).eps + torch.finfo(out).eps


CASES = [
    # V, z, exp, offset of z, gap of z, offset of exp, gap of exp
    (1, "fp32", "bf16", 0, 0, 0, 0),
    (2, "bf16", "bf16", 1, 0, 1, 0),
    (7, "fp32", "bf16", 3, 0, 3, 0),
    (33, "fp16", "bf16", 5, 2, 2, 1),
    (64, "fp64", "fp64", 1, 1, 0, 3),
    (2051, "fp32", "bf16", 0, 0, 0, 0),
    (4099, "bf16", "fp32", 0, 0, 0, 0),
    (4099, "bf16", "bf16", 7, 2, 7, 2),
    (8192, "fp32", "bf16", 0, 8, 0, 8),
    (8205, "fp32", "fp32", 2, 0, 1, 0),
    (8205, "fp16", "fp16", 0, 0, 0, 0),
    (16411, "fp32", "bf16", 0, 0, 0, 0),
    (16411, "bf16", None, 3, 0, 0, 0),
    (8205, "fp32", None, 0, 0, 0, 0),
    (3, "fp32", None, 2, 0, 0, 0),
    (1001, "fp64", None, 0, 0, 0, 0),
]


@pytest.mark.parametrize(
    "softcap, bias_dtype, chain", [(0.0, None, True), (0.0, "bf16", False), (20.0, "fp32", True), (20.0, None, False)]
)
@pytest.mark.parametrize("V, z_dtype, exp_dtype, offset, gap, exp_offset, exp_gap", CASES)
def test_forward_sums_and_exponentials(
    kernels, V, z_dtype, exp_dtype, offset, gap, exp_offset, exp_gap, softcap, bias_dtype, chain
):
    torch.manual_seed(V)
    dtype = DTYPES[z_dtype]
    values, target, anchor = logits(V, dtype)
    T = len(KINDS)
    z, z_buffer = guarded(T, V, dtype, offset, gap)
    z.copy_(values)
    bias = None if bias_dtype is None else torch.randn(V, dtype=DTYPES[bias_dtype])
    inv_temperature = torch.full((1,), 1 / 0.8, dtype=anchor.dtype).expand(T)
    stats = torch.full((4, T + 3), torch.nan, dtype=anchor.dtype)[:, 1 : T + 1]
    exp = exp_buffer = None
    if exp_dtype is not None:
        exp, exp_buffer = guarded(T, V, DTYPES[exp_dtype], exp_offset, exp_gap)
        exp.fill_(torch.nan)
    kernels.anchored_rows_fwd(z, target, anchor, inv_temperature, bias, softcap, chain, exp, stats)

    want_exp, want_stats = expected_forward(values, target, anchor, inv_temperature, bias, softcap, chain)
    eps = torch.finfo(anchor.dtype).eps
    torch.testing.assert_close(stats[0].double(), want_stats[0], rtol=10 * eps, atol=0, equal_nan=True)
    # 1e-30: terms below 2^-126 are left out of the sums
    torch.testing.assert_close(stats[1:].double(), want_stats[1:], rtol=80 * eps, atol=1e-30, equal_nan=True)
    assert intact(z_buffer, z)
    assert z.equal(values) or not values.isfinite().all()
    if exp is not None:
        assert intact(exp_buffer, exp)
        error = (exp.double() - want_exp).abs()
        allowed = (
            element_tolerance(anchor.dtype, exp.dtype, softcap) * want_exp + torch.finfo(exp.dtype).smallest_normal
        )
        assert (error <= allowed)[want_exp < torch.finfo(exp.dtype).max].all()
        assert not exp[want_exp == 0].any()


@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("V, name, offset", [(2051, "fp32", 0), (4099, "bf16", 5), (1, "fp16", 0), (640, "fp64", 1)])
def test_forward_in_place_gives_the_same_bits(kernels, V, name, offset, softcap):
    torch.manual_seed(V)
    values, target, anchor = logits(V, DTYPES[name])
    T = len(KINDS)
    inv_temperature = torch.rand(T, dtype=anchor.dtype) + 0.5
    z, _ = guarded(T, V, DTYPES[name], offset, 0)
    z.copy_(values)
    apart, _ = guarded(T, V, DTYPES[name], offset, 0)
    stats, stats_in_place = torch.full((2, 4, T), torch.nan, dtype=anchor.dtype)
    kernels.anchored_rows_fwd(z, target, anchor, inv_temperature, None, softcap, True, apart, stats)
    kernels.anchored_rows_fwd(z, target, anchor, inv_temperature, None, softcap, True, z, stats_in_place)
    torch.testing.assert_close(stats_in_place, stats, rtol=0, atol=0, equal_nan=True)
    assert z.equal(apart)


def expected_backward(source, from_exp, target, anchor, inv_temperature, coefficients, bias, softcap):
    c, k = anchor.double()[:, None], inv_temperature.double()[:, None]
    alpha, beta, at_target = coefficients.double()[:, :, None]
    if from_exp:
        e = source.double()
        d = torch.where(e == 0, 0.0, e.log())
        x = d / k + c
    else:
        x = transformed(source, bias, softcap)
        d = (x - c) * k
        e = d.exp()
        d = torch.where(e == 0, 0.0, d)
    f = e * (alpha + beta * d)
    if softcap:
        f = torch.where(e == 0, 0.0, f * (1 - (x / softcap).square()))
    f = torch.where((coefficients == 0).all(0)[:, None], 0.0, f)
    return torch.where(off_target(target, source.shape[1]), f, at_target)


BACKWARD_CASES = [
    # V, source, out, offset of source, offset of out
    (1, "fp32", "fp32", 0, 0),
    (3, "bf16", "bf16", 1, 1),
    (2051, "bf16", "bf16", 0, 0),
    (2051, "fp32", "bf16", 0, 0),
    (4100, "fp16", "fp16", 0, 3),
    (4100, "bf16", "fp32", 4, 4),
    (8205, "fp32", "fp32", 3, 3),
    (1001, "fp64", "fp64", 0, 1),
]


# dtypes and offsets choose the vector loads; in place, the source and the softcap choose the inner loop
@pytest.mark.grid
@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("from_exp", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("V, source_dtype, out_dtype, offset, out_offset", BACKWARD_CASES)
def test_backward_gradients(kernels, V, source_dtype, out_dtype, offset, out_offset, in_place, from_exp, softcap):
    if in_place and (source_dtype, offset) != (out_dtype, out_offset):
        out_dtype, out_offset = source_dtype, offset
    torch.manual_seed(V)
    T, dtype = 6, DTYPES[source_dtype]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    values = torch.randn(T, V, dtype=torch.float64) * 1.5
    values[:, ::3] = -torch.inf
    target = torch.randint(V, (T,))
    target[1] = V
    anchor = torch.randn(T, dtype=compute)
    inv_temperature = torch.rand(T, dtype=compute) + 0.5
    if from_exp:
        values = ((values - anchor[:, None]) * inv_temperature[:, None]).exp()
    values = values.to(dtype)
    # alpha, beta, at_target; row 2 is dead (and bad), row 3 needs no logarithm
    coefficients = torch.randn(T, 3, dtype=compute).mul(0.1).T
    coefficients[:, 2] = 0
    coefficients[1, 3] = 0
    coefficients[:2, 4] = 0
    values[2] = torch.nan
    bias = torch.randn(V, dtype=torch.float32) if softcap else None

    source, source_buffer = guarded(T, V, dtype, offset, 1)
    source.copy_(values)
    out, out_buffer = (source, source_buffer) if in_place else guarded(T, V, DTYPES[out_dtype], out_offset, 1)
    if not in_place:
        out.fill_(torch.nan)
    kernels.anchored_rows_bwd(source, from_exp, target, anchor, inv_temperature, coefficients, bias, softcap, out)
    want = expected_backward(values, from_exp, target, anchor, inv_temperature, coefficients, bias, softcap)
    largest = want.abs().amax(1, keepdim=True)
    error = (out.double() - want).abs()
    # alpha + beta * d may cancel
    allowed = element_tolerance(compute, out.dtype, softcap) * want.abs() + 20 * torch.finfo(compute).eps * largest
    assert (error <= allowed).all()
    assert not out[2].any() and intact(out_buffer, out) and intact(source_buffer, source)


def test_no_rows(kernels):
    nothing = torch.empty(0)
    target = torch.empty(0, dtype=torch.int64)
    kernels.anchored_rows_fwd(
        torch.empty(0, 9), target, nothing, nothing, None, 0.0, False, torch.empty(0, 9), torch.empty(4, 0)
    )
    kernels.anchored_rows_bwd(
        torch.empty(0, 9), False, target, nothing, nothing, torch.empty(3, 0), None, 0.0, torch.empty(0, 9)
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"anchor": torch.zeros(3)}, r"anchored_rows_fwd: expected anchor of shape \(2\), got \(3\)"),
        ({"target": torch.zeros(2)}, "anchored_rows_fwd: expected target of dtype Long"),
        ({"z": torch.zeros(5, 2).T}, "anchored_rows_fwd: expected z with rows of stride 1"),
        ({"exp": torch.zeros(2, 5, dtype=torch.float64)}, "anchored_rows_fwd: expected exp of dtype"),
        ({"stats": torch.zeros(3, 2)}, "anchored_rows_fwd: expected stats of shape"),
    ],
)
def test_bad_arguments(kernels, change, message):
    arguments = {
        "z": torch.zeros(2, 5),
        "target": torch.zeros(2, dtype=torch.int64),
        "anchor": torch.zeros(2),
        "inv_temperature": torch.ones(2),
        "bias": None,
        "softcap": 0.0,
        "chain": False,
        "exp": None,
        "stats": torch.zeros(4, 2),
    }
    with pytest.raises(RuntimeError, match=message):
        kernels.anchored_rows_fwd(**(arguments | change))


@needs_gpu
@pytest.mark.parametrize("V", [151_936, 151_937])
def test_wide_rows_on_a_side_stream(kernels, V):
    T = 300
    z = torch.randn(T, V) * 4
    target = torch.randint(V, (T,))
    z[::7, 1000] = 90.0
    anchor = z.gather(1, target[:, None])[:, 0]
    inv_temperature = torch.full((T,), 1.25)
    late = torch.empty_like(z)
    exp = torch.full((T, V), torch.nan, dtype=torch.bfloat16)
    stats, again = torch.full((2, 4, T), torch.nan)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # a launch on another stream would read what is not there yet
        torch.cuda._sleep(50_000_000)
        late.copy_(z)
        kernels.anchored_rows_fwd(late, target, anchor, inv_temperature, None, 0.0, False, exp, stats)
        kernels.anchored_rows_fwd(late, target, anchor, inv_temperature, None, 0.0, False, exp, again)
    torch.cuda.current_stream().wait_stream(stream)
    assert stats.equal(again)
    for rows in torch.arange(T).split(50):
        want_exp, want_stats = expected_forward(
            z[rows], target[rows], anchor[rows], inv_temperature[rows], None, 0.0, False
        )
        torch.testing.assert_close(stats[:, rows].double(), want_stats, rtol=1e-5, atol=1e-30)
        torch.testing.assert_close(exp[rows].double(), want_exp, rtol=8e-3, atol=2e-38)


@needs_gpu
def test_the_exponential_instruction_is_accurate(kernels):
    d = torch.linspace(-87, 28, 1 << 20)[None]
    zero, one = torch.zeros(1), torch.ones(1)
    outside = torch.full((1,), -1)
    exp, stats = torch.full_like(d, torch.nan), torch.full((4, 1), torch.nan)
    kernels.anchored_rows_fwd(d, outside, zero, one, None, 0.0, False, exp, stats)
    assert stats[0] == 0
    torch.testing.assert_close(exp.double(), d.double().exp(), rtol=1.2e-5, atol=0)


@needs_gpu
def test_rows_beyond_two_to_the_31_elements(kernels):
    stride, V = (1 << 31) + 3, 5000
    if torch.cuda.mem_get_info()[0] < 3 * stride:
        pytest.skip("needs 6 GB of free GPU memory")
    buffer = torch.full((stride + V,), torch.nan, dtype=torch.bfloat16)
    z = buffer.as_strided((2, V), (stride, 1))
    z.copy_(torch.randn(2, V))
    target = torch.tensor([3, 4])
    anchor = z.float().gather(1, target[:, None])[:, 0]
    stats = torch.full((4, 2), torch.nan)
    want_exp, want_stats = expected_forward(z, target, anchor, torch.ones(2), None, 0.0, False)
    kernels.anchored_rows_fwd(z, target, anchor, torch.ones(2), None, 0.0, False, z, stats)
    torch.testing.assert_close(stats.double(), want_stats, rtol=1e-5, atol=0)
    torch.testing.assert_close(z.double(), want_exp, rtol=8e-3, atol=0)
