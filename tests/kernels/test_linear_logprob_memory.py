"""The memory that linear_logprob takes besides its arguments and gradients, measured in a child process."""

import pytest
import torch

from bench.cases import TRAIN, Case
from bench.memory import MemoryChild
from bench.registry import contenders

CASE = Case("memory", "linear_logprob", 1024, 32768, 128, "float32")
MIB = 2**20


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the benchmarks measure it")
def test_linear_logprob_memory_is_one_exponential_per_logit_or_flat():
    known = {c.name: c for c in contenders(CASE.op, "cpu")}
    child = MemoryChild(CASE)
    try:
        kept = child.peak_extra(known["ours, C++"], TRAIN)
        flat = child.peak_extra(known["ours, C++, cache_bytes=0"], TRAIN)
        dense = child.peak_extra(known["PyTorch"], TRAIN)
    finally:
        child.close()
    exponentials = CASE.logits_bytes
    assert exponentials == 128 * MIB
    assert exponentials <= kept <= 1.1 * exponentials + 16 * MIB
    assert flat <= 96 * MIB
    assert dense > 2 * exponentials
