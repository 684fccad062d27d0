import os
import signal

import pytest
import torch

from prism_kernels.backend import unavailable
from prism_kernels.testing import poison_allocations

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("cuda", "triton", "torch") if DEVICE == "cuda" else ("cpu", "torch")


def pytest_configure(config):
    # a shell's background job ignores Ctrl-C, and so would the processes of the tests, which some of them interrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # the machine's own core count makes timings and reduction orders differ; two is what CI has
    if DEVICE == "cpu":
        torch.set_num_threads(min(2, os.cpu_count() or 1, int(os.environ.get("OMP_NUM_THREADS", "2"))))


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture(params=BACKENDS)
def backend(request):
    why = unavailable("linear_logprob", request.param, DEVICE)
    assert why is None, f"backend {request.param} must be available in the tests: {why}"
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Every torch.empty is filled with NaN, so that an output that is not written shows."""
    undo = poison_allocations()
    yield
    undo()
