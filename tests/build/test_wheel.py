"""The wheel has the right tag and contents, and works without a compiler and without the source tree."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow

PROGRAM = ROOT / "tests" / "build" / "wheel_program.py"


def run(*command, cwd=ROOT, **environment):
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, cwd=cwd, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # build from a copy, so that nothing is written into the source tree and no earlier build gets into the wheel
    tree = folder / "tree"
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tree)
    for name in ("csrc", "prism", "prism_kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(folder / "dist")]
    # without CUDA: it takes much longer to compile, and this test does not check it
    run(*pip, str(tree), PRISM_KERNELS_CUDA="0", PRISM_KERNELS_REQUIRE="1")
    (built,) = (folder / "dist").glob("*.whl")
    return built


def test_tag_and_contents(wheel):
    _, _, python, abi, platform = wheel.stem.split("-")
    assert (python, abi) == ("py3", "none")
    assert platform != "any"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        tag = next(archive.read(name).decode() for name in names if name.endswith(".dist-info/WHEEL"))
    assert f"Tag: py3-none-{platform}" in tag
    assert {"prism/py.typed", "prism_kernels/py.typed", "prism_kernels/_C.so"} <= set(names)
    assert "prism_kernels/ops/anchored_rows/eager.py" in names
    # one library, whose name has no Python version, and no sources
    assert [name for name in names if name.endswith(".so")] == ["prism_kernels/_C.so"]
    assert {name.split("/")[0].split("-")[0] for name in names} == {"prism", "prism_kernels"}
    assert not [name for name in names if name.endswith((".cpp", ".cu", ".cuh", ".h"))]


def test_works_without_a_compiler_and_without_the_sources(wheel, tmp_path):
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    python = str(home / "bin" / "python")
    release = torch.__version__.split("+")[0]
    run(python, "-m", "pip", "install", "--quiet", f"torch=={release}", "numpy", cwd=tmp_path)
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel), cwd=tmp_path)
    # PATH has only the venv's programs, so no compiler is found
    assert "values agree" in run(python, "-P", str(PROGRAM), cwd=tmp_path, PATH=str(home / "bin"), PYTHONPATH="")
