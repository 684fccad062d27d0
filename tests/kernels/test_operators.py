"""opcheck of every operator in the namespace, and the report of `python -m prism_kernels`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import prism_kernels.ops
from bench.files_entered import CALLS
from prism_kernels.backend import resolve
from prism_kernels.library import native_reason

T, V, D, R = 7, 33, 8, 2
ROWS = (torch.rand(T) + 0.5, torch.rand(T) + 0.5)


def samples(device):
    """Returns operators and arguments for each, on `device`."""
    make = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=make).to(device)

    target = torch.randint(0, V, (T,), generator=make).to(device)
    tau = torch.ones(T, device=device)
    linear, token = (resolve(op, torch.device(device)) for op in ("linear_logprob", "token_logprob"))
    head = (rand(T, D), rand(V, D), rand(V), rand(T, R), rand(V, R), target, tau, 5.0)
    plain = (rand(T, D), rand(V, D), None, None, None, target, tau, 0.0)
    ops = torch.ops.prism_kernels
    calls = []
    for h, entropy, cache in ((head, True, T), (plain, False, T), (plain, True, 3), (head, False, 0)):
        calls.append((ops.linear_logprob_fwd.default, (*h, -100, entropy, cache, linear)))
        *_, sums, kept = ops.linear_logprob_fwd(*h, -100, entropy, cache, linear)
        grad = rand(T)
        for rows in (None, torch.tensor([1, 2, 5], device=device)):
            needs = [True, True, h[2] is not None, h[3] is not None, h[4] is not None]
            rest = (-100, entropy, sums, kept, grad, grad if entropy else None, rows, needs, linear)
            calls.append((ops.linear_logprob_bwd.default, (*h, *rest)))
    logits = rand(T, V)
    calls.append((ops.token_logprob_fwd.default, (logits, target, tau, -100, token)))
    sums = ops.token_logprob_fwd(logits, target, tau, -100, token)[-1]
    for grad_entropy in (None, rand(T)):
        rest = (target, tau, sums, rand(T), grad_entropy, -100, token)
        calls.append((ops.token_logprob_bwd.default, (logits, *rest)))
        calls.append((ops.token_logprob_bwd_.default, (logits.clone(), *rest)))
    anchor = logits.gather(1, target[:, None])[:, 0]
    rows_fwd, rows_bwd = ops.anchored_rows_fwd.default, ops.anchored_rows_bwd.default
    for exp in (None, torch.empty(T, V, device=device)):
        stats = torch.empty(4, T, device=device)
        calls.append((rows_fwd, (logits, target, anchor, tau, rand(V), 5.0, False, exp, stats)))
    coefficients = torch.ones(3, T, device=device)
    out = torch.empty(T, V, device=device)
    calls.append((rows_bwd, (logits, False, target, anchor, tau, coefficients, None, 0.0, out)))
    return calls


def test_every_operator_passes_opcheck(device):
    calls = samples(device)
    for op, arguments in calls:
        torch.library.opcheck(op, arguments)


def test_no_operator_is_without_opcheck():
    tests = [path.read_text() for path in Path(__file__).parent.rglob("test_*.py")]
    checked = {
        name
        for text in tests
        if "opcheck(" in text
        for name in re.findall(r"\b(?:prism_kernels|ops)\.(\w+_(?:fwd|bwd|order)_?)\b", text)
    }
    defined = {
        s.name.removeprefix("prism_kernels::") for s in torch._C._jit_get_all_schemas() if "prism_kernels" in s.name
    }
    assert {"linear_logprob_fwd", "token_logprob_bwd_"} <= defined
    assert defined <= checked, defined - checked


def test_report_names_every_op_and_backend():
    output = subprocess.run(
        [sys.executable, "-m", "prism_kernels"], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert prism_kernels.__version__ in output and torch.__version__ in output
    for op, backend, reason in prism_kernels.backend_status():
        line = next(line for line in output.splitlines() if line.split()[:2] == [op, backend])
        assert line.endswith("available") == (reason is None)
        assert reason is None or reason in line


@pytest.mark.parametrize("op", ["linear_logprob", "token_logprob"])
def test_every_log_probability_op_has_its_backends(op):
    assert {s.backend for s in prism_kernels.backend_status() if s.op == op} == {"cuda", "triton", "cpu", "torch"}


@pytest.mark.skipif(native_reason["_C"] is not None, reason="the C++ kernels were not built")
def test_linear_logprob_forward_and_backward_enters_six_files():
    entered = CALLS["linear_logprob"]()
    assert len(entered.files) <= 6, entered.report()
    assert "ops/linear_logprob/op.py" in entered.files
