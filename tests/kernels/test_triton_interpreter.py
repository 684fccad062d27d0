import os
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "interpreter"
AT_LEAST = 141


def test_triton_kernels_are_right_under_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    # the command line of this run (-k, -x, --lf) is not for that one
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    summary = run.stdout.strip().splitlines()[-1]
    passed = re.search(r"(\d+) passed", summary)
    assert passed is not None, summary
    assert int(passed[1]) >= AT_LEAST, summary
    assert not re.search(r"skipped|deselected|xfailed", summary), summary
