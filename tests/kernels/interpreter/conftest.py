import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Triton reads the flag when it is imported, so these run in a process of their own: test_triton_interpreter.py
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


@pytest.fixture(autouse=True)
def interpreted():
    assert INTERPRETED
