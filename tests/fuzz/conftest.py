"""Shares FUZZ_SECONDS, which `make fuzz` sets, among the fuzz targets; without it each runs one round, always the same.

A target is a test that decorates a function with the fixture `fuzz`: see test_ops.py. A file for each group of targets.
"""

import os
import random
import time

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
SEED = int(os.environ.get("FUZZ_SEED", random.SystemRandom().randrange(2**32) if SECONDS else 0))
ROUND = settings(
    max_examples=20,
    deadline=None,
    database=None,
    # a failing example is shrunk; nothing else is worth the time
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
# of targets that are plain hypothesis tests
settings.register_profile("fuzz", max_examples=max(25, int(4 * SECONDS)), print_blob=True)


def pytest_report_header():
    return f"fuzz: {SECONDS:g} s for all targets, FUZZ_SEED={SEED}"


@pytest.fixture
def fuzz(request):
    """Calls a function with hypothesis's `draw` in rounds of new examples, until its share of the time is over."""
    share = SECONDS / sum("fuzz" in item.fixturenames for item in request.session.items)

    def run(target):
        end = time.monotonic() + share
        rounds = 0
        while rounds == 0 or time.monotonic() < end:
            seed(SEED + rounds)(ROUND(given(st.data())(lambda data: target(data.draw))))()
            rounds += 1
        print(f"{request.node.name}: {rounds * ROUND.max_examples} examples")

    return run
