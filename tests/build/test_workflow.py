"""The CI workflow names make targets, files and Pythons that exist."""

import re
import tomllib
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def jobs():
    return yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]


def commands(job):
    return [step["run"] for step in job["steps"] if "run" in step]


def test_workflow_names_make_targets_and_files_that_exist(jobs):
    text = "\n".join(line for job in jobs.values() for line in commands(job))
    targets = set(re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"\bmake ([a-z-]+)", text)
    assert set(named) == {"lint", "test", "test-real", "wheel"} and set(named) <= targets
    files = re.findall(r"\btests/\S+\.py", text)
    assert files and all((ROOT / file).exists() for file in files)


def test_workflow_tests_every_supported_python(jobs):
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    tested = jobs["test"]["strategy"]["matrix"]["python"]
    assert tested[0] == oldest and "3.14" in tested
    # the wheel is built with the oldest Python and tested with all others
    (built,) = [s["with"]["python-version"] for s in jobs["wheel"]["steps"] if "setup-python" in s.get("uses", "")]
    assert [built, *jobs["wheel-elsewhere"]["strategy"]["matrix"]["python"]] == tested


def test_workflow_tests_the_kernels_on_other_systems(jobs):
    job = jobs["other-systems"]
    assert {system.split("-")[0] for system in job["strategy"]["matrix"]["system"]} == {"macos", "windows"}
    # neither a compiler nor make is needed there
    assert not any("make" in line for line in commands(job))
    ops = {path.name for path in (ROOT / "prism_kernels" / "ops").iterdir() if (path / "__init__.py").exists()}
    tested = set(re.findall(r"tests/kernels/test_(\w+)\.py", "\n".join(commands(job))))
    # the rows of anchored_rows are tested with the ops that use them
    assert ops - {"anchored_rows"} <= tested
