"""On macOS and Windows the kernels import and work, and no module of either package needs one of POSIX."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# what these need of the system is theirs; os.name stays, since pathlib depends on it
LIBRARIES = """
import numpy, torch, torch._dynamo, asyncio, multiprocessing.connection, subprocess
import transformers.models.auto.modeling_auto, transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe
import transformers.models.qwen2_vl.image_processing_pil_qwen2_vl, huggingface_hub, pydantic, rich.progress
"""
IMPORTS = """
import importlib, pkgutil
import other_system
other_system.pretend("{system}")
for package in ("prism_kernels", "prism"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        # Triton's own kernels, which only Linux imports, native code, which is no module of Python, and programs
        if not module.name.endswith((".kernels", "._C", "._C_cuda", ".__main__")):
            importlib.import_module(module.name)
            print(module.name)
"""
WORKS = """
import torch, prism_kernels
from prism_kernels.backend import backend_status
from prism_kernels.packing import Branch, Kind, PrefixGroup, build_pack

reasons = {(op, backend): reason for op, backend, reason in backend_status()}
assert "triton is not installed" in reasons["linear_logprob", "triton"]
assert reasons["linear_logprob", "torch"] is None
hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8)
out = prism_kernels.linear_logprob(hidden, weight, torch.arange(5), backend="torch", entropy=True)
out.logp.sum().backward()
assert torch.allclose(out.logp, torch.log_softmax(hidden @ weight.T, -1)[range(5), range(5)], atol=1e-5)
advantage = prism_kernels.group_advantage(torch.tensor([0.0, 1.0, 1.0]), torch.zeros(3, dtype=torch.long))
loss, _ = prism_kernels.policy_loss(
    out.logp, out.logp.detach(), advantage, torch.tensor([0, 2, 3, 5]), backend="torch"
)
assert loss.isfinite()
pack = build_pack([PrefixGroup([1, 2], [Branch([3, 4], Kind.ANSWER)])])
assert pack.position.tolist() == [[0, 1, 2, 3]] * 3

from prism.runtime.memory import begin_peak, peak_bytes

begin_peak(torch.device("cpu"))
assert peak_bytes(torch.device("cpu")) > 0
"""


def run(code, **variables):
    environment = {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1", "PATH": "", **variables}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_the_kernels_and_the_trainer_import_on_other_systems_and_the_kernels_work(system):
    modules = run(LIBRARIES + IMPORTS.format(system=system) + WORKS).split()
    assert len([name for name in modules if name.startswith("prism_kernels.")]) > 50
    assert len([name for name in modules if name.startswith("prism.")]) > 70


# the same tests run on this system too
@pytest.mark.full
def test_pure_python_tests_pass_on_another_system():
    # some of those that .github/workflows/ci.yml runs on macOS and Windows themselves
    files = [f"tests/kernels/test_{name}.py" for name in ("arguments", "grammar", "packing", "reward_shaping")]
    code = f"import sys, pytest; sys.exit(pytest.main(['-p', 'other_system', *{files}]))"
    assert " passed" in run(code, PRETEND="darwin")


@pytest.mark.parametrize("unbuffered", ["", pytest.param("1", marks=pytest.mark.full)])
def test_a_reader_that_closes_the_report_is_no_error(unbuffered):
    environment = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered, "PATH": ""}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-m", "prism_kernels"], stdout=pipe, stderr=pipe, env=environment, cwd=ROOT
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=120) == 141
