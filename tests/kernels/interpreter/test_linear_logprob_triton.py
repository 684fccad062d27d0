import math

import pytest
import torch

from prism_kernels.ops.anchored_rows import eager
from prism_kernels.ops.linear_logprob import kernels as fused

NAN, INF = math.nan, math.inf


def head(rows, columns, depth, seed=0):
    make = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, depth, generator=make)
    weight = torch.randn(columns, depth, generator=make) * 0.6
    target = torch.randint(0, columns, (rows,), generator=make)
    bias = torch.randn(columns, generator=make)
    inv_temperature = 0.5 + torch.rand(rows, generator=make)
    return hidden, weight, target, bias, inv_temperature


def exact(hidden, weight, target, inv_temperature, bias, softcap):
    """Returns each row's stats by their definition in float64, and the scale of their rounding."""
    x = hidden.double() @ weight.double().t()
    if bias is not None:
        x = x + bias.double()
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    anchor = x.gather(1, target[:, None])[:, 0]
    s = inv_temperature.double()
    top = x.amax(1)
    c = torch.where((top - anchor) * s > 28, top, anchor)
    d = (x - c[:, None]) * s[:, None]
    e = torch.where(torch.arange(weight.shape[0]) == target[:, None], 0.0, d.exp())
    moments = torch.where(e == 0, 0.0, e * d)
    stats = torch.stack((c, e.sum(1), moments.sum(1), e.square().sum(1)))
    return anchor, stats, torch.stack((c.abs() + 1, e.sum(1), (moments.abs() + e).sum(1), e.square().sum(1)))


def both(hidden, weight, target, bias, inv_temperature, softcap=0.0):
    anchor = fused.target_logits(hidden, weight, target, bias, softcap)
    return anchor, fused.fused_forward(hidden, weight, target, anchor, inv_temperature, bias, softcap)


@pytest.mark.parametrize("with_bias, softcap", [(False, 0.0), (True, 5.0)])
@pytest.mark.parametrize("rows, columns, depth", [(37, 133, 40), (32, 128, 32), (5, 31, 33), (1, 300, 12), (60, 33, 7)])
def test_fused_forward_is_the_definition(rows, columns, depth, with_bias, softcap):
    hidden, weight, target, bias, inv_temperature = head(rows, columns, depth)
    bias = bias if with_bias else None
    # some rows end far from their target
    hidden[1::6] *= 15
    anchor, stats = both(hidden, weight, target, bias, inv_temperature, softcap)
    exact_anchor, expected, scale = exact(hidden, weight, target, inv_temperature, bias, softcap)
    far = expected[0] != exact_anchor
    assert bool(far.any()) == (rows > 1 and softcap == 0), "some rows must be far, except under a soft cap"
    # a rounding of the logits, which reach 100, is a relative error of the exponentials
    tolerance = 1e-5 + 4e-7 * hidden.abs().sum(1).double()
    assert ((anchor - exact_anchor).abs() <= 1e-5 + 1e-6 * hidden.norm(dim=1)).all()
    assert ((stats - expected).abs() <= tolerance * scale + 1e-30).all()


@pytest.mark.parametrize("depth", [12, 13])
def test_fused_forward_counts_no_columns_beyond_the_last(depth):
    hidden, weight, target, _, ones = head(20, 40, depth)
    # all logits are near -50: one phantom logit of 0 would count e^50
    hidden, weight = hidden.abs() + 1, -(weight.abs() + 50 / depth)
    _, stats = both(hidden, weight, target, None, torch.ones_like(ones))
    exact_anchor, expected, scale = exact(hidden, weight, target, torch.ones_like(ones), None, 0.0)
    assert exact_anchor.max() < -40
    assert ((stats - expected).abs() <= 5e-5 * scale).all()


def test_fused_forward_does_not_depend_on_the_other_rows_nor_on_how_many_there_are(monkeypatch):
    hidden, weight, target, bias, inv_temperature = head(40, 133, 40)
    # multiples of 1/8: the products are exact, since numpy's, unlike a GPU's, depend on a row's place in its tile
    hidden, weight = (hidden * 8).round() / 8, (weight * 8).round() / 8
    hidden[1::6] *= 15
    anchor, stats = both(hidden, weight, target, bias, inv_temperature)
    assert torch.equal(both(hidden, weight, target, bias, inv_temperature)[1], stats)
    for t in (0, 1, 17, 39):
        one = slice(t, t + 1)
        alone = both(hidden[one], weight, target[one], bias, inv_temperature[one])
        assert torch.equal(alone[0], anchor[one])
        assert torch.equal(alone[1], stats[:, one])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    shuffled = both(hidden[order], weight, target[order], bias, inv_temperature[order])
    assert torch.equal(shuffled[1], stats[:, order])
    monkeypatch.setattr(fused, "ROWS_OF_LAUNCH", 16)
    assert torch.equal(both(hidden, weight, target, bias, inv_temperature)[1], stats)


def test_broken_rows_of_the_fused_forward_touch_no_other_and_agree_with_eager():
    hidden, weight, target, bias, inv_temperature = head(24, 133, 40)
    clean_anchor, clean = both(hidden, weight, target, bias, inv_temperature)
    hidden[3, 5] = NAN
    hidden[4, 6] = INF
    target[5], target[6], target[7] = -1, 133, 2**32 + 3
    anchor, stats = both(hidden, weight, target, bias, inv_temperature)
    broken = torch.zeros(24, dtype=torch.bool)
    broken[3:8] = True
    assert anchor[[3, 5, 6, 7]].isnan().all()
    assert stats[1:, broken].isnan().all()
    assert torch.equal(stats[:, ~broken], clean[:, ~broken])
    assert torch.equal(anchor[~broken], clean_anchor[~broken])
    z = hidden @ weight.t()
    theirs = torch.full((4, 24), NAN)
    eager.forward(z, target, anchor, inv_temperature, bias, 0.0, False, None, theirs)
    assert torch.equal(stats.isnan(), theirs.isnan())
    torch.testing.assert_close(stats, theirs, rtol=3e-5, atol=1e-6, equal_nan=True)


def test_fused_forward_takes_columns_banned_by_the_bias_and_anchors_of_another_slice():
    hidden, weight, target, bias, inv_temperature = head(20, 133, 40)
    bias[:70] = -INF
    bias[90] = INF
    target[:10] = 100
    target[10:14] = 3
    # rows 14 and on have their target elsewhere, and an anchor from there
    anchor = fused.target_logits(hidden, weight, target, bias, 0.0)
    assert (anchor[10:14] == -INF).all()
    target[14:] = 2**32 + 100
    # the stand-in for an anchor of -inf then overflows
    inv_temperature[10] = inv_temperature[18] = 2.0
    anchor[14:] = torch.tensor([0.0, 60.0, -60.0, NAN, -INF, 2.0])
    for infinite in (True, False):
        bias[90] = INF if infinite else -1.0
        stats = fused.fused_forward(hidden, weight, target, anchor, inv_temperature, bias, 0.0)
        theirs = torch.full((4, 20), NAN)
        z = hidden @ weight.t()
        eager.forward(z, target, anchor, inv_temperature, bias, 0.0, False, None, theirs)
        assert torch.equal(stats.isnan(), theirs.isnan())
        assert stats[1].isnan().sum() == (20 if infinite else 1)
        torch.testing.assert_close(stats, theirs, rtol=3e-5, atol=1e-6, equal_nan=True)
    bias[:] = -INF
    stats = fused.fused_forward(hidden, weight, target, anchor, inv_temperature, bias, 0.0)
    eager.forward(z, target, anchor, inv_temperature, bias, 0.0, False, None, theirs)
    torch.testing.assert_close(stats, theirs, rtol=0, atol=0, equal_nan=True)


def test_fused_forward_takes_strided_and_unaligned_arguments():
    hidden, weight, target, bias, inv_temperature = head(20, 70, 24)
    anchor, stats = both(hidden, weight, target, bias, inv_temperature)

    def shifted(x):
        return torch.cat((x.new_full((x.shape[0], 1), NAN), x), 1)[:, 1:]

    for h, w in ((shifted(hidden), weight), (hidden, shifted(weight)), (hidden.t().contiguous().t(), weight)):
        assert torch.equal(fused.target_logits(h, w, target, bias, 0.0), anchor)
        assert torch.equal(fused.fused_forward(h, w, target, anchor, inv_temperature, bias, 0.0), stats)
    scalar = torch.tensor(0.7).expand(20)
    expected = fused.fused_forward(hidden, weight, target, anchor, torch.full((20,), 0.7), bias, 0.0)
    doubled = torch.stack((bias, bias), 1)[:, 0]
    assert torch.equal(fused.fused_forward(hidden, weight, target, anchor, scalar, doubled, 0.0), expected)


def test_fused_forward_of_no_rows_and_of_float64():
    hidden, weight, target, bias, inv_temperature = head(4, 33, 8)
    anchor, stats = both(hidden[:0], weight, target[:0], bias, inv_temperature[:0])
    assert anchor.shape == (0,)
    assert stats.shape == (4, 0)
    with pytest.raises(TypeError, match=r"linear_logprob: .* takes bf16, fp16 or fp32, got torch.float64"):
        fused.fused_forward(hidden.double(), weight.double(), target, anchor, inv_temperature, bias, 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_target_logits_are_exact_products_of_half_precision_operands(dtype):
    hidden, weight, target, bias, _ = head(9, 50, 100)
    target[4] = 50
    # the interpreter truncates where the GPU rounds to bf16, so only fp16 shows the cast in the kernel
    given = weight.to(dtype) if dtype == torch.bfloat16 else weight
    logit = fused.target_logits(hidden.to(dtype), given, target, bias, 0.0)
    products = hidden.to(dtype).double() * weight.to(dtype).double()[target.clamp(max=49)]
    exact_logit = products.sum(1) + bias.double()[target.clamp(max=49)]
    exact_logit[4] = NAN
    torch.testing.assert_close(logit.double(), exact_logit, rtol=0, atol=5e-6, equal_nan=True)
