"""Checks an installed wheel outside the source tree: it has native code, needs no compiler and computes right values.

Run `python -P tests/build/wheel_program.py` in a fresh environment with torch, numpy and the wheel. CI runs it with
every Python and one wheel.
"""

import shutil
import sys

import torch

import prism_kernels.ops
from prism_kernels import linear_logprob
from prism_kernels.backend import backend_status

assert not any(map(shutil.which, ("c++", "g++", "clang++", "cc", "nvcc"))), (
    "this check is for a machine without compilers"
)
assert "site-packages" in prism_kernels.__file__, prism_kernels.__file__
unavailable = {(op, backend): reason for op, backend, reason in backend_status() if reason}
assert ("linear_logprob", "cpu") not in unavailable, unavailable["linear_logprob", "cpu"]

torch.manual_seed(0)
hidden, weight = torch.randn(5, 64), torch.randn(1003, 64)
target = torch.tensor([0, 1002, 500, 17, 3])
logp = linear_logprob(hidden.requires_grad_(), weight, target, temperature=0.7, backend="cpu").logp
logp.sum().backward()

exact_hidden = hidden.detach().double().requires_grad_()
exact = torch.log_softmax(exact_hidden @ weight.double().t() / 0.7, -1)[torch.arange(5), target]
exact.sum().backward()
torch.testing.assert_close(logp.double(), exact, rtol=1e-5, atol=0)
torch.testing.assert_close(hidden.grad.double(), exact_hidden.grad, rtol=1e-4, atol=1e-5)
print(f"Python {sys.version.split()[0]}: values agree")
