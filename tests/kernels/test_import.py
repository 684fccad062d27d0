"""`import prism_kernels` without torch, and that everything registers on first use, in fresh processes."""

import io
import pickle
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

import prism_kernels
from prism_kernels import TokenLogProbs, token_logprob

ROOT = Path(__file__).parents[2]


def fresh(program, *arguments):
    """Returns the output of a program in a fresh process."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


LIGHT = """
import sys
import prism_kernels, prism_kernels.grammar, prism.rewards, prism.rewards.worker
assert prism_kernels.grammar.parse_response("")
assert prism_kernels.__version__
assert "linear_logprob" in dir(prism_kernels)
heavy = {"torch", "numpy", "sympy"} & set(sys.modules)
assert not heavy, heavy
"""


def test_neither_the_package_nor_rewards_import_torch():
    fresh(LIGHT)


def test_names_are_those_of_the_public_modules():
    assert set(prism_kernels.__all__) <= set(dir(prism_kernels))
    for name in prism_kernels.__all__:
        value = getattr(prism_kernels, name)
        assert name == "__version__" or value.__name__ == name
        # kept, so that a name is one object
        assert vars(prism_kernels)[name] is value
    with pytest.raises(AttributeError, match="module 'prism_kernels' has no attribute 'linear_logprobs'"):
        prism_kernels.linear_logprobs  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'linear_logprobs' from 'prism_kernels'"):
        exec("from prism_kernels import linear_logprobs")


def test_star_imports_all_public_names():
    names = {}
    exec("from prism_kernels import *", names)
    assert set(prism_kernels.__all__) <= set(names)


COMPILED = """
import torch, prism_kernels

def logp(logits, target):
    # the first use of a public name of this process
    return prism_kernels.token_logprob(logits, target).logp

logits, target = torch.randn(3, 7, requires_grad=True), torch.tensor([0, 3, 6])
assert not hasattr(torch.ops.prism_kernels, "token_logprob_fwd")
compiled = torch.compile(logp, fullgraph=True, backend="aot_eager")(logits, target)
assert torch.equal(compiled, logp(logits, target))
compiled.sum().backward()
assert logits.grad.isfinite().all()
"""


def test_the_first_use_may_be_inside_torch_compile():
    fresh(COMPILED)


LOADED = """
import pickle, sys
import torch
path, = sys.argv[1:]
saved = torch.load(path + "/saved.pt", weights_only=False)
with open(path + "/saved.pickle", "rb") as file:
    pickled = pickle.load(file)
import prism_kernels
for rows, function in (saved, pickled):
    assert type(rows) is prism_kernels.TokenLogProbs and function is prism_kernels.token_logprob
    assert rows.logp.tolist() == [1.0, 2.0] and rows.entropy is None
"""


def test_results_load_in_a_fresh_process(tmp_path):
    rows = TokenLogProbs(torch.tensor([1.0, 2.0]), None, torch.zeros(2), torch.zeros(2))
    torch.save((rows, token_logprob), tmp_path / "saved.pt")
    (tmp_path / "saved.pickle").write_bytes(pickle.dumps((rows, token_logprob)))
    fresh(LOADED, tmp_path)


REGISTERED = """
import torch
from prism_kernels.backend import backend_status
print([tuple(status) for status in backend_status()])
print(sorted(s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("prism_kernels::")))
"""


def test_the_backends_alone_register_all_operators():
    ours = io.StringIO()
    # this process has used all names
    with redirect_stdout(ours):
        exec(REGISTERED)
    assert "prism_kernels::token_logprob_fwd" in ours.getvalue()
    assert fresh(REGISTERED) == ours.getvalue()
