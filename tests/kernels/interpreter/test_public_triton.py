"""The public log-probability ops on the Triton backend, and opcheck of its operators."""

import pytest
import torch

from prism_kernels import linear_logprob, token_logprob
from prism_kernels.ops.linear_logprob.reference import linear_logprob_reference
from prism_kernels.ops.token_logprob.reference import token_logprob_reference
from prism_kernels.testing import double, gradients, head_inputs, relative_error


def close(ours, exact):
    for name in ("logp", "entropy", "lse", "sum_pi_squared"):
        assert relative_error(getattr(ours, name), getattr(exact, name)) < 1e-5, name


def weighted(out):
    weight = torch.linspace(-1, 1, out.logp.numel())
    weight[::4] = 0
    return [(out.logp, weight), (out.entropy, 0.3 * weight.flip(0))]


@pytest.mark.parametrize("cache_bytes", [None, 0, 9 * 70 * 4])
@pytest.mark.parametrize("softcap", [None, 6.0])
def test_linear_logprob_on_triton(cache_bytes, softcap):
    hidden, weight, target = head_inputs(20, 70, 16, scale=3)
    target[5] = -100
    bias = torch.randn(70, generator=torch.Generator().manual_seed(4)).requires_grad_()
    options = {"bias": bias, "softcap": softcap, "temperature": 0.7, "entropy": True}
    ours = linear_logprob(hidden, weight, target, cache_bytes=cache_bytes, backend="triton", **options)
    leaves = [hidden, weight, bias]
    exact_leaves = [double(leaf) for leaf in leaves]
    exact = linear_logprob_reference(exact_leaves[0], exact_leaves[1], target, **{**options, "bias": exact_leaves[2]})
    close(ours, exact)
    for grad, wanted in zip(gradients(weighted(ours), leaves), gradients(weighted(exact), exact_leaves)):
        assert relative_error(grad, wanted) < 1e-5


def test_linear_logprob_without_gradients_takes_the_fused_forward(monkeypatch):
    from prism_kernels.ops.linear_logprob import kernels as fused

    calls = []
    forward = fused.fused_forward
    monkeypatch.setattr(fused, "fused_forward", lambda *args: calls.append(1) or forward(*args))
    hidden, weight, target = head_inputs(33, 200, 24, scale=3)
    target[4] = -100
    with torch.no_grad():
        ours = linear_logprob(hidden, weight, target, entropy=True, backend="triton")
    assert calls == [1]
    close(ours, linear_logprob_reference(hidden.double(), weight.double(), target, entropy=True))


@pytest.mark.parametrize("in_place", [False, True])
def test_token_logprob_on_triton(in_place):
    logits = (torch.randn(18, 90, generator=torch.Generator().manual_seed(1)) * 3).requires_grad_()
    target = torch.arange(18) * 5
    ours = token_logprob(logits * 1, target, entropy=True, inplace_backward=in_place, backend="triton")
    exact_logits = double(logits)
    exact = token_logprob_reference(exact_logits, target, entropy=True)
    close(ours, exact)
    grad, wanted = gradients(weighted(ours), [logits])[0], gradients(weighted(exact), [exact_logits])[0]
    assert relative_error(grad, wanted) < 1e-5


def test_the_operators_pass_opcheck():
    ops = torch.ops.prism_kernels
    logits, target, tau = torch.randn(4, 20), torch.tensor([1, 5, 19, 0]), torch.ones(4)
    anchor = logits.gather(1, target[:, None])[:, 0]
    for exp in (None, torch.empty(4, 20)):
        arguments = (logits, target, anchor, tau, torch.randn(20), 5.0, False, exp, torch.empty(4, 4))
        torch.library.opcheck(ops.anchored_rows_fwd.triton, arguments)
    out = torch.empty(4, 20)
    torch.library.opcheck(
        ops.anchored_rows_bwd.triton, (logits, False, target, anchor, tau, torch.ones(3, 4), None, 0.0, out)
    )
