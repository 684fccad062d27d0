"""token_logprob against its float64 reference, on every backend of this machine."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_kernels import token_logprob
from prism_kernels.ops.token_logprob.reference import token_logprob_reference
from prism_kernels.testing import assert_close, double, gradients, relative_error

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def inputs(rows, columns, *, dtype=torch.float32, device="cpu", scale=4.0, seed=0):
    make = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, columns, generator=make) * scale).to(device, dtype).requires_grad_()
    return logits, torch.randint(0, columns, (rows,), generator=make).to(device)


def run(op, logits, target, **options):
    out = op(logits, target, **options)
    weight = torch.linspace(-1, 1, target.numel(), device=logits.device).view(target.shape)
    outputs = [(out.logp, weight)] + ([(out.entropy, weight.flip(0))] if out.entropy is not None else [])
    return out, gradients(outputs, [logits])[0]


def compare(logits, target, tiny, call, **options):
    ours, grad = run(token_logprob, logits, target, **options, **call)
    plain, plain_grad = run(token_logprob_reference, logits, target, **options)
    exact, wanted = run(token_logprob_reference, double(logits), target, **options)
    for name in ("logp", "entropy", "lse", "sum_pi_squared"):
        if getattr(exact, name) is not None:
            assert_close(getattr(ours, name), getattr(plain, name), getattr(exact, name), name=name, tiny=tiny)
    assert grad.dtype == logits.dtype
    assert_close(grad, plain_grad, wanted, name="gradient", tiny=tiny)


# columns: one, odd, a whole and a broken block; dtype chooses the load, entropy adds a term
@pytest.mark.grid
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("columns", [1, 7, 256, 5003])
def test_token_logprob_matches_float64(backend, device, dtype, entropy, columns):
    logits, target = inputs(33, columns, dtype=dtype, device=device)
    target[5] = -100
    temperature = torch.rand(33, generator=torch.Generator().manual_seed(9)).to(device, torch.float32) + 0.5
    tiny = 1e-13 if dtype == torch.float64 else 5e-6
    if dtype in (torch.bfloat16, torch.float16):
        # the gradient is rounded once to the logits' dtype
        tiny = torch.finfo(dtype).eps
    for tau in (1.0, 0.6, temperature.double() if dtype == torch.float64 else temperature):
        compare(logits, target, tiny, {"backend": backend}, entropy=entropy, temperature=tau)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 20), columns=st.integers(1, 200), entropy=st.booleans(), seed=st.integers(0, 2**16))
def test_token_logprob_any_shape(rows, columns, entropy, seed):
    logits, target = inputs(rows, columns, seed=seed)
    compare(logits, target, 1e-5, {}, entropy=entropy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_token_logprob_in_place_backward(backend, device, dtype):
    logits, target = inputs(16, 300, dtype=dtype, device=device)
    _, wanted = run(token_logprob, logits, target, backend=backend, entropy=True)
    scratch = logits * 1
    memory = scratch.data_ptr()
    out = token_logprob(scratch, target, backend=backend, entropy=True, inplace_backward=True)
    weight = torch.linspace(-1, 1, 16, device=device)
    loss = (out.logp * weight).sum() + (out.entropy * weight.flip(0)).sum()
    (grad,) = torch.autograd.grad(loss, scratch, retain_graph=True)
    assert grad.data_ptr() == memory
    assert torch.equal(grad, wanted)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, scratch)


SHARED = {
    "one row for all": lambda x: x[:1].expand(4, 30),
    "one row for all of a batch": lambda x: x[:1].expand(4, 30)[None],
    "windows": lambda x: x.flatten().as_strided((4, 30), (1, 1)),
    "windows that share one element": lambda x: x.flatten().as_strided((3, 30), (29, 1)),
}


@pytest.mark.parametrize("name", SHARED)
def test_rows_that_share_memory_are_refused_in_place(backend, device, name):
    leaf, _ = inputs(5, 30, device=device)
    logits = SHARED[name](leaf * 1)
    target = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"token_logprob: expected logits whose rows do not share memory.*strides"):
        token_logprob(logits, target, backend=backend, inplace_backward=True)
    token_logprob(logits, target, backend=backend).logp.sum().backward()


@pytest.mark.parametrize("name", ["a batch for all", "one row", "every other row", "columns", "a part of the rows"])
def test_other_layouts_are_right_in_place(backend, device, name):
    leaf, _ = inputs(6, 30, device=device)

    def layout():
        x = leaf * 1
        return {
            "a batch for all": lambda: x[None].expand(2, 6, 30),
            "one row": lambda: x[:1].expand(1, 30),
            "every other row": lambda: x[::2],
            "columns": lambda: x.t(),
            "a part of the rows": lambda: x[2:4, 5:20],
        }[name]()

    grads = []
    for in_place in (False, True):
        logits = layout()
        target = torch.arange(logits.shape[:-1].numel(), device=device).view(logits.shape[:-1]) % logits.shape[-1]
        out = token_logprob(logits, target, backend=backend, inplace_backward=in_place, entropy=True)
        grads += torch.autograd.grad(out.logp.sum() + out.entropy.square().sum(), leaf)
    assert torch.equal(*grads)


@pytest.mark.parametrize("shape", [(0, 4), (4, 2), (2, 1), (0, 2)])
def test_every_other_element_of_any_shape(backend, device, shape):
    logits = torch.randn(2 * shape[0], 2 * shape[1], device=device)[::2, ::2].requires_grad_()
    target = torch.zeros(shape[0], dtype=torch.int64, device=device)
    out, grad = run(token_logprob, logits, target, backend=backend)
    assert out.logp.shape == target.shape and grad.shape == logits.shape and grad.isfinite().all()


def test_torch_notices_another_use_of_logits_written_in_place(backend, device):
    """The same memory, or a base of it, is saved for a backward pass that comes later."""
    leaf, target = inputs(6, 30, device=device)
    for pick in (lambda x: x, lambda x: x[1:5], lambda x: x.view(3, 2, 30)[0]):
        base = leaf * 1
        logits = pick(base)
        logp = token_logprob(logits, target[: len(logits)], backend=backend, inplace_backward=True).logp
        squares = base.square().sum()
        logp.sum().backward()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            squares.backward()


def test_token_logprob_keeps_confident_tokens(backend, device):
    gaps = torch.logspace(-9, -3, 13, dtype=torch.float64, device=device)
    logits, target = inputs(13, 400, device=device)
    logits = logits.detach()
    # the target's logit such that its 1 - p is the gap
    rest = logits.double().scatter(1, target[:, None], -torch.inf).logsumexp(1)
    logits.scatter_(1, target[:, None], (rest - torch.logit(gaps)).float()[:, None])
    logits.requires_grad_()
    out, grad = run(token_logprob, logits, target, backend=backend, entropy=True)
    exact, wanted = run(token_logprob_reference, double(logits), target, entropy=True)
    assert -exact.logp.min() > 5e-4 and -exact.logp.max() < 2e-9
    assert ((out.logp - exact.logp) / exact.logp).abs().max() <= 1e-4
    assert ((out.entropy - exact.entropy) / exact.entropy).abs().max() <= 1e-4
    errors = (grad - wanted).norm(dim=1) / wanted.norm(dim=1).clamp(min=1e-300)
    assert errors[wanted.norm(dim=1) > 0].max() <= 1e-4


@pytest.mark.parametrize("distance", [60.0, 200.0])
def test_token_logprob_rows_far_above_the_target(backend, device, distance):
    logits, target = inputs(12, 300, device=device)
    with torch.no_grad():
        logits[:, 7] += distance
    target[:6] = 8
    target[6:] = 7
    compare(logits, target, 1e-5, {"backend": backend})


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("in_place", [False, True])
def test_token_logprob_a_poisoned_row_touches_itself_alone(backend, device, poison, in_place):
    logits, target = inputs(10, 100, device=device)
    clean, wanted = run(token_logprob, logits, target, backend=backend, entropy=True)
    bad = logits.detach().clone()
    bad[4, 50] = poison
    bad.requires_grad_()
    out, grad = run(token_logprob, bad * 1, target, backend=backend, entropy=True, inplace_backward=in_place)
    others = torch.arange(10, device=device) != 4
    assert out.logp[4].isnan() and grad[4].isnan().all()
    assert torch.equal(out.logp[others], clean.logp[others])
    assert torch.equal(grad[others], wanted[others])


def test_token_logprob_masked_vocabulary(backend, device):
    """Logits of -inf, as top-k filtering leaves them: probability 0, and 0 * -inf counts as 0."""
    logits, target = inputs(20, 64, device=device)
    with torch.no_grad():
        logits[:, 10:] = -torch.inf
    target %= 10
    out, grad = run(token_logprob, logits, target, backend=backend, entropy=True)
    exact, _ = run(token_logprob_reference, double(logits), target, entropy=True)
    assert torch.allclose(out.logp.double(), exact.logp, atol=1e-5)
    assert torch.allclose(out.entropy.double(), exact.entropy, atol=1e-5)
    assert grad.isfinite().all() and (grad[:, 10:] == 0).all()


def test_token_logprob_shapes_and_strides(backend, device):
    logits, target = inputs(24, 50, device=device)
    flat, _ = run(token_logprob, logits, target, backend=backend)
    batch = token_logprob(logits.view(2, 3, 4, 50), target.view(2, 3, 4), backend=backend)
    assert torch.equal(batch.logp.reshape(-1), flat.logp)
    turned = logits.t().contiguous().t()
    assert torch.equal(token_logprob(turned, target, backend=backend).logp, flat.logp)
    padded = torch.cat((logits, logits), 1)[:, :50]
    out = token_logprob(padded, target, backend=backend)
    assert torch.equal(out.logp, flat.logp)
    (grad,) = torch.autograd.grad(out.logp.sum(), logits)
    exact = double(logits)
    (wanted,) = torch.autograd.grad(token_logprob_reference(exact, target).logp.sum(), exact)
    assert relative_error(grad, wanted) < 1e-5


def test_token_logprob_compiles_whole(backend, device):
    logits, target = inputs(8, 40, device=device)

    def f(z, y):
        out = token_logprob(z, y, entropy=True, temperature=0.7, backend=backend)
        return (out.logp + out.entropy).sum()

    ours = torch.autograd.grad(torch.compile(f, fullgraph=True)(logits, target), logits)
    torch.testing.assert_close(ours, torch.autograd.grad(f(logits, target), logits))
