import os
import signal
import sys
from collections import defaultdict
from itertools import combinations

import pytest
import torch

from prism_kernels.backend import unavailable
from prism_kernels.testing import poison_allocations

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# other systems are tested without native code
ON_CPU = ("cpu", "torch") if sys.platform == "linux" else ("torch",)
BACKENDS = ("cuda", "triton", "torch") if DEVICE == "cuda" else ON_CPU


def pytest_configure(config):
    # a shell's background job ignores SIGINT, and so would the processes that some tests start and interrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # the number of threads changes timings and reduction orders; CI has two cores
    if DEVICE == "cpu":
        torch.set_num_threads(min(2, os.cpu_count() or 1, int(os.environ.get("OMP_NUM_THREADS", "2"))))


# the slowest files run first, so that parallel workers end together
LONGEST = ("trainer/test_demo.py", "kernels/test_triton_aot.py", "build/test_cuda_compile.py", "build/test_build.py")


# must run before pytest's own hook, which selects by markers
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    def rank(item):
        names = [place for place, name in enumerate(LONGEST) if item.path.as_posix().endswith(name)]
        return names[0] if names else len(LONGEST)

    items.sort(key=rank)
    mark_redundant(item for item in items if item.get_closest_marker("grid"))


def mark_redundant(items):
    """Marks a case `full` if earlier cases of its test cover every pair of its parameter values."""
    covered = defaultdict(set)
    for item in items:
        test = item.path, item.originalname
        # compare by identity, because some values cannot be hashed
        values = sorted((name, id(value)) for name, value in item.callspec.params.items())
        pairs = set(combinations(values, 2)) or set(values)
        if pairs <= covered[test]:
            item.add_marker("full")
        covered[test] |= pairs


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
    """Fills every torch.empty with NaN, so that an unwritten output is noticed."""
    undo = poison_allocations()
    yield
    undo()
