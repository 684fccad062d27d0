"""The row kernels of each backend against a float64 computation written out here, and opcheck."""

import pytest
import torch

from prism_kernels.ops.anchored_rows import ROW_KERNELS

TINY = {torch.float64: 1e-13, torch.float32: 2e-6}
COLUMNS = [1, 3, 17, 64, 1000, 4099]


def problem(rows, columns, device, dtype=torch.float32, seed=0):
    make = torch.Generator().manual_seed(seed)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    z = (torch.randn(rows, columns, generator=make) * 4).to(device, dtype)
    target = torch.randint(0, columns, (rows,), generator=make).to(device)
    inverse = (torch.rand(rows, generator=make) + 0.5).to(device, accumulator)
    bias = torch.randn(columns, generator=make).to(device, accumulator)
    return z, target, inverse, bias


def capped(z, bias, softcap):
    x = z.double() if bias is None else z.double() + bias.double()
    return softcap * torch.tanh(x / softcap) if softcap else x


def exact_forward(z, target, anchor, inverse, bias, softcap, chain):
    x = capped(z, bias, softcap)
    top = x.amax(1)
    centre = torch.where((top - anchor.double()) * inverse.double() > 28, top, anchor.double())
    d = (x - centre[:, None]) * inverse.double()[:, None]
    e = d.exp()
    e[torch.arange(len(z)), target] = 0
    moment = torch.where(e == 0, 0.0, e * d).sum(1)
    stats = torch.stack((centre, e.sum(1), moment, e.square().sum(1)))
    return stats, e * (1 - (x / softcap).square()) if chain and softcap else e


def anchor_of(z, target, bias, softcap, dtype):
    return capped(z, bias, softcap).gather(1, target[:, None])[:, 0].to(dtype)


def close(ours, exact, tiny):
    error = (ours.double() - exact).abs().max() if ours.numel() else torch.zeros(())
    assert error <= tiny * exact.abs().max().clamp(min=1) * 10, float(error)


# columns: one, odd, vector tails and blocks; dtype chooses the load and store, bias and softcap the inner loop
@pytest.mark.grid
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("with_bias, softcap", [(False, 0.0), (True, 0.0), (False, 6.0), (True, 6.0)])
def test_forward_sums_and_exponentials(backend, device, columns, dtype, with_bias, softcap):
    z, target, inverse, bias = problem(19, columns, device, dtype)
    bias = bias if with_bias else None
    anchor = anchor_of(z, target, bias, softcap, inverse.dtype)
    for chain in (False, True):
        exact, exact_exp = exact_forward(z, target, anchor, inverse, bias, softcap, chain)
        stats = torch.full((4, 19), torch.nan, dtype=inverse.dtype, device=device)
        kept = torch.bfloat16 if dtype == torch.float16 else dtype
        exp = torch.full((19, columns), torch.nan, dtype=kept, device=device)
        ROW_KERNELS[backend].forward(z, target, anchor, inverse, bias, softcap, chain, exp, stats)
        tiny = TINY[inverse.dtype]
        for ours, wanted in zip(stats, exact):
            # each row by itself: sums differ by orders of magnitude
            assert ((ours.double() - wanted).abs() <= 20 * tiny * wanted.abs() + 1e-30).all()
        slack = torch.finfo(kept).eps + 20 * tiny
        floor = torch.finfo(kept).tiny
        assert ((exp.double() - exact_exp).abs() <= slack * exact_exp.abs() + floor).all()
        again = torch.full_like(stats, torch.nan)
        ROW_KERNELS[backend].forward(z, target, anchor, inverse, bias, softcap, chain, None, again)
        assert ((again - stats).abs() <= 20 * tiny * stats.abs() + 1e-30).all()


# as above; entropy adds a term to the coefficients
@pytest.mark.grid
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("with_bias, softcap", [(False, 0.0), (True, 6.0)])
@pytest.mark.parametrize("entropy", [False, True])
def test_backward_from_logits_and_from_exponentials(backend, device, columns, dtype, with_bias, softcap, entropy):
    z, target, inverse, bias = problem(13, columns, device, dtype)
    bias = bias if with_bias else None
    anchor = anchor_of(z, target, bias, softcap, inverse.dtype)
    stats, e = exact_forward(z, target, anchor, inverse, bias, softcap, False)
    centre = stats[0].to(inverse.dtype)
    make = torch.Generator().manual_seed(7)
    coefficients = torch.randn(3, 13, generator=make).to(device, inverse.dtype)
    if not entropy:
        coefficients[1] = 0
    coefficients[:, 4] = 0

    def exact(e):
        d = torch.where(e > 0, e.log(), 0.0)
        x = d / inverse.double()[:, None] + centre.double()[:, None]
        slope = 1 - (x / softcap).square() if softcap else 1
        alpha, beta, at_target = coefficients.double()[:, :, None]
        g = e * (alpha + beta * d) * slope
        g[torch.arange(13), target] = at_target[:, 0]
        return g

    out = torch.full_like(z, torch.nan)
    ROW_KERNELS[backend].backward(z, False, target, centre, inverse, coefficients, bias, softcap, out)
    wanted = exact(e)
    eps = torch.finfo(dtype).eps + 40 * TINY[inverse.dtype]
    limit = eps * wanted.abs().amax(1, keepdim=True) + torch.finfo(dtype).tiny
    limit = limit + (6e-8 if dtype == torch.float16 else 0)
    fits = wanted.abs() < torch.finfo(dtype).max
    assert (((out.double() - wanted).abs() <= limit) | ~fits).all()
    assert (out[4] == 0).all()

    if dtype == torch.float16:
        return
    kept = e.to(dtype)
    kept[torch.arange(13), target] = -1
    out = torch.full_like(z, torch.nan)
    ROW_KERNELS[backend].backward(kept, True, target, centre, inverse, coefficients, bias, softcap, out)
    wanted = exact(e.to(dtype).double().scatter(1, target[:, None], 0))
    limit = eps * wanted.abs().amax(1, keepdim=True) + torch.finfo(dtype).tiny
    assert ((out.double() - wanted).abs() <= limit).all()
    # in place
    ROW_KERNELS[backend].backward(kept, True, target, centre, inverse, coefficients, bias, softcap, kept)
    assert torch.equal(kept, out)


def test_forward_in_place_equals_out_of_place(backend, device):
    for columns in COLUMNS:
        z, target, inverse, _ = problem(9, columns, device)
        z[2] += 100 * (torch.arange(columns, device=device) == columns // 2)
        anchor = anchor_of(z, target, None, 0.0, torch.float32)
        results = []
        for exp in (torch.full_like(z, torch.nan), z.clone()):
            source = z if exp is not z and torch.isnan(exp).all() else exp
            stats = torch.full((4, 9), torch.nan, device=device)
            ROW_KERNELS[backend].forward(source, target, anchor, inverse, None, 0.0, False, exp, stats)
            results.append((exp, stats))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-30)


def test_targets_outside_the_slice_and_strided_arguments(backend, device):
    z, target, inverse, _ = problem(8, 100, device)
    target[:4] = -1
    target[4:] = 100
    anchor = z.amax(1)
    wide = torch.cat((z, z), 1)[:, :100]
    stats = torch.full((7, 16), torch.nan, device=device)
    exp = torch.full((8, 200), torch.nan, device=device)
    ROW_KERNELS[backend].forward(wide, target, anchor, inverse, None, 0.0, False, exp[:, 100:], stats[1:5, 3:11])
    d = (z.double() - anchor.double()[:, None]) * inverse.double()[:, None]
    torch.testing.assert_close(stats[2, 3:11].double(), d.exp().sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(exp[:, 100:].double(), d.exp(), rtol=1e-5, atol=1e-30)
    assert exp[:, :100].isnan().all() and stats[5:].isnan().all() and stats[0].isnan().all()


@pytest.mark.parametrize("in_place", [False, True])
def test_poisoned_rows_are_zero(backend, device, in_place):
    z, target, inverse, _ = problem(8, 333, device)
    clean = z.clone()
    anchor = anchor_of(z, target, None, 0.0, torch.float32)
    z[1, 200] = torch.nan
    z[3, 5] = torch.inf
    z[5] = -torch.inf
    anchor[5] = -torch.inf
    anchor[6] = torch.nan
    z[7, ::2] = -torch.inf
    source = z.clone()
    exp = source if in_place else torch.full_like(z, torch.nan)
    stats = torch.full((4, 8), torch.nan, device=device)
    ROW_KERNELS[backend].forward(source, target, anchor, inverse, None, 0.0, False, exp, stats)
    for row in (1, 3, 5, 6):
        assert not stats[1, row].isfinite() and (exp[row] == 0).all()
    assert stats[:, [0, 2, 4, 7]].isfinite().all() and exp.isfinite().all()
    exact, _ = exact_forward(clean, target, anchor, inverse, None, 0.0, False)
    for row in (0, 2, 4):
        torch.testing.assert_close(stats[1, row].double(), exact[1, row], rtol=1e-5, atol=0)
    coefficients = torch.zeros(3, 8, device=device)
    out = torch.full_like(z, torch.nan)
    ROW_KERNELS[backend].backward(z, False, target, anchor, inverse, coefficients, None, 0.0, out)
    assert (out == 0).all()


def test_no_rows(backend, device):
    z, target, inverse, _ = problem(0, 50, device)
    stats = torch.empty(4, 0, device=device)
    kernels = ROW_KERNELS[backend]
    kernels.forward(z, target, inverse, inverse, None, 0.0, False, z.clone(), stats)
    kernels.backward(z, False, target, inverse, inverse, torch.empty(3, 0, device=device), None, 0.0, z.clone())
