"""Bad arguments: each error names the argument, what was expected and what came."""

import re

import pytest
import torch

from prism_kernels import linear_logprob, token_logprob, use_backend
from prism_kernels.testing import head_inputs

T, V, D = 6, 30, 8


def call(**changes):
    hidden, weight, target = head_inputs(T, V, D)
    arguments = {"hidden": hidden, "weight": weight, "target": target, **changes}
    return linear_logprob(**arguments)


LINEAR = [
    ({"hidden": [1.0]}, TypeError, "expected hidden to be a tensor, got list"),
    ({"hidden": torch.zeros(D)}, ValueError, "expected hidden of shape (T, D) or (B, L, D), got (8,)"),
    ({"hidden": torch.zeros(T, D, dtype=torch.int64)}, TypeError, "expected hidden of dtype float32, bfloat16"),
    ({"hidden": torch.zeros(T, D, device="meta")}, ValueError, "expected hidden on a device with memory, got meta"),
    ({"hidden": torch.zeros(T, D).to_sparse()}, TypeError, "expected hidden to be a dense tensor, got sparse_coo"),
    ({"entropy": 1}, TypeError, "expected entropy to be True or False, got int"),
    ({"ignore_index": 2**63}, ValueError, "expected ignore_index in [-9223372036854775808, 9223372036854775807], got"),
    ({"weight": torch.zeros(V, D + 1)}, ValueError, "expected weight of shape (V, 8), got (30, 9)"),
    ({"weight": torch.zeros(0, D)}, ValueError, "expected weight of shape (V, D) with V > 0, got (0, 8)"),
    ({"weight": torch.zeros(V, D, dtype=torch.int8)}, TypeError, "expected weight of dtype"),
    ({"weight": torch.zeros(V, D, device="meta")}, ValueError, "expected weight on hidden's device cpu, got meta"),
    ({"target": torch.zeros(T + 1, dtype=torch.int64)}, ValueError, "expected target of shape (6,), got (7,)"),
    ({"target": torch.zeros(T)}, TypeError, "expected target of dtype int64, got float32"),
    ({"target": torch.full((T,), V)}, ValueError, "expected target in [0, 30) or ignore_index -100, got 30 in row 0"),
    ({"target": torch.full((T,), -1)}, ValueError, "expected target in [0, 30) or ignore_index -100, got -1 in row 0"),
    ({"bias": torch.zeros(V + 1)}, ValueError, "expected bias of shape (30,), got (31,)"),
    ({"bias": 1.0}, TypeError, "expected bias to be a tensor, got float"),
    ({"temperature": 0.0}, ValueError, "expected temperature > 0 and finite, got 0.0"),
    ({"temperature": float("nan")}, ValueError, "expected temperature > 0 and finite, got nan"),
    ({"temperature": torch.ones(T + 1)}, ValueError, "expected temperature of shape (6,), got (7,)"),
    (
        {"temperature": torch.tensor([1, 1, -2.0, 1, 1, 1])},
        ValueError,
        "expected temperature > 0 and finite, got -2.0 in row 2",
    ),
    ({"softcap": 0.0}, ValueError, "expected softcap > 0 and finite, got 0.0"),
    ({"lora": (torch.zeros(2, D), torch.zeros(V, 2))}, TypeError, "expected lora to be a tuple (A, B, scale), got"),
    ({"lora": (torch.zeros(2, D + 1), torch.zeros(V, 2), 1.0)}, ValueError, "expected lora A of shape (r, 8)"),
    (
        {"lora": (torch.zeros(2, D), torch.zeros(V, 3), 1.0)},
        ValueError,
        "expected lora B of shape (30, 2), got (30, 3)",
    ),
    ({"cache_bytes": -1}, ValueError, "expected cache_bytes >= 0 or None, got -1"),
    ({"backend": "cudnn"}, ValueError, "expected backend to be one of 'cuda', 'triton', 'cpu', 'torch', got 'cudnn'"),
]


@pytest.mark.parametrize("changes, error, message", LINEAR, ids=[m[9:40] for _, _, m in LINEAR])
def test_linear_logprob_names_the_bad_argument(changes, error, message):
    with pytest.raises(error, match=re.escape(f"linear_logprob: {message}")):
        call(**changes)


TOKEN = [
    ({"logits": torch.zeros(V)}, ValueError, "expected logits of shape (..., V) with V > 0, got (30,)"),
    ({"logits": torch.zeros(T, V, dtype=torch.int32)}, TypeError, "expected logits of dtype float32"),
    ({"target": torch.zeros(T, 1, dtype=torch.int64)}, ValueError, "expected target of shape (6,), got (6, 1)"),
    ({"target": torch.zeros(T, dtype=torch.int32)}, TypeError, "expected target of dtype int64, got int32"),
    ({"target": torch.tensor([0, 1, 2, 99, 4, 5])}, ValueError, "got 99 in row 3"),
    ({"temperature": -1.0}, ValueError, "expected temperature > 0 and finite, got -1.0"),
]


@pytest.mark.parametrize("changes, error, message", TOKEN, ids=[m[9:40] for _, _, m in TOKEN])
def test_token_logprob_names_the_bad_argument(changes, error, message):
    arguments = {"logits": torch.zeros(T, V), "target": torch.zeros(T, dtype=torch.int64), **changes}
    with pytest.raises(error, match="token_logprob: .*" + re.escape(message)):
        token_logprob(**arguments)


def test_a_custom_ignore_index_may_be_a_token():
    hidden, weight, target = head_inputs(T, V, D)
    target[2] = 0
    out = linear_logprob(hidden, weight, target, ignore_index=0)
    assert (out.logp == 0).equal(target == 0)


def test_use_backend_lists_what_is_known():
    message = "use_backend: expected name to be one of 'cuda', 'triton', 'cpu', 'torch', got 'rocm'"
    with pytest.raises(ValueError, match=message), use_backend("rocm"):
        raise AssertionError("entered")


def test_an_impossible_backend_gives_the_reason():
    hidden, weight, target = head_inputs(T, V, D)
    wrong = "cpu" if torch.cuda.is_available() else "cuda"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with pytest.raises(RuntimeError, match=f"backend '{wrong}' is not available for {device} tensors: it takes"):
        linear_logprob(hidden.to(device), weight.to(device), target.to(device), backend=wrong)
