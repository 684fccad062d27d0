"""The contenders of each op: ours on each backend, plain PyTorch, and installed peers."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.cases import FORWARD, HALF, TRAIN, Case, Inputs, cases
from prism_kernels import backend_status, linear_logprob, token_logprob
from prism_kernels.backend import unavailable

Outputs = tuple[Tensor, Tensor | None]
Call = Callable[[Inputs], Outputs]

MISSING = "not installed"
OUR_BACKENDS = {"cpu": "C++", "cuda": "CUDA", "triton": "Triton", "torch": "torch"}


@dataclass(frozen=True)
class Contender:
    """One way to compute an op. `load` imports its packages and returns the call, or raises ImportError."""

    name: str
    load: Callable[[], Call]
    passes: tuple[str, ...] = (FORWARD, TRAIN)
    # the distribution whose version is reported; "" needs none
    package: str = ""
    ours: bool = False
    # whether the backward pass overwrites the inputs
    destroys: bool = False
    # whether compiling takes longer than measuring
    first_case_only: bool = False


def contenders(op: str, device: str) -> list[Contender]:
    """Returns the contenders of an op on a device type, ours first."""
    return [*_ours(op, device), *_PEERS[op], *(_CUDA_PEERS[op] if device == "cuda" else ())]


def plan(op: str, device: str) -> list[tuple[Case, Contender, str]]:
    """Returns the cases, contenders and passes of an op on a device type."""
    return [
        (case, contender, pass_)
        for case in cases(op, device)
        for contender in contenders(op, device)
        for pass_ in contender.passes
        if case.is_first() or not contender.first_case_only
    ]


class _Tap(torch.autograd.Function):
    """A view of a leaf that stores the gradient without a copy; autograd copies a gradient that shares memory."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        ctx.leaf = leaf
        return leaf.view_as(leaf)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        ctx.leaf.grad = grad


def _our_call(op: str, device: str, backend: str, in_place: bool, options: dict[str, Any]) -> Callable[[], Call]:
    public = {"linear_logprob": linear_logprob, "token_logprob": token_logprob}[op]

    def call(x: Inputs) -> Outputs:
        leaves = [_Tap.apply(leaf) for leaf in x.leaves] if in_place else x.leaves
        result = public(*leaves, x.target, backend=backend, **options)
        return result.logp, result.entropy

    def load() -> Call:
        why = unavailable(op, backend, device)
        if why is not None:
            raise ImportError(why)
        return call

    return load


def _ours(op: str, device: str) -> list[Contender]:
    elsewhere = {"cpu": ("cuda", "triton"), "cuda": ("cpu",)}[device]
    found = []
    for backend in [s.backend for s in backend_status() if s.op == op and s.backend not in elsewhere]:

        def add(suffix: str, passes: tuple[str, ...], in_place: bool = False, backend: str = backend, **options: Any):
            load = _our_call(op, device, backend, in_place, options)
            name = f"ours, {OUR_BACKENDS[backend]}{suffix}"
            found.append(Contender(name, load, passes, ours=True, destroys=in_place))

        if op == "linear_logprob":
            add("", (FORWARD, TRAIN, HALF) if device == "cuda" else (FORWARD, TRAIN))
            add(", cache_bytes=0", (TRAIN,), cache_bytes=0)
        else:
            add("", (FORWARD, TRAIN))
            add(", in place", (TRAIN,), in_place=True, inplace_backward=True)
        if backend != "torch":
            add(", with entropy", (TRAIN,), entropy=True)
    return found


def _dense(logits: Tensor, target: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), -1).gather(-1, target[:, None])[:, 0]


def _dense_linear(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return _dense(linear(hidden, weight), target)


def _plain(function: Callable[..., Tensor], compiled: bool = False) -> Callable[[], Call]:
    def load() -> Call:
        run = torch.compile(function, dynamic=False) if compiled else function
        return lambda x: (run(*x.leaves, x.target), None)

    return load


def _trl_linear(outputs: tuple[str, ...]) -> Callable[[], Call]:
    def load() -> Call:
        function = importlib.import_module("trl.kernels").ChunkedLogProbFunction
        # the width that its trainers use
        chunk = importlib.import_module("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE

        def call(x: Inputs) -> Outputs:
            hidden, weight = x.leaves
            return function.apply(hidden, weight, None, x.target, 1.0, chunk, None, 1.0, outputs)[:2]

        return call

    return load


def _trl_token() -> Call:
    function = importlib.import_module("trl.trainer.utils").selective_log_softmax
    return lambda x: (function(x.leaves[0], x.target), None)


def _verl(from_hidden: bool) -> Callable[[], Call]:
    def load() -> Call:
        function = importlib.import_module("verl.utils.torch_functional").logprobs_from_logits

        def call(x: Inputs) -> Outputs:
            logits = linear(*x.leaves) if from_hidden else x.leaves[0]
            return function(logits, x.target, inplace_backward=from_hidden), None

        return call

    return load


def _verl_kernel() -> Call:
    function = importlib.import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    # it always returns the entropy, so its figures include the entropy, forward and backward
    return lambda x: function(*x.leaves, x.target, 1.0, "none", None)


def _liger_scaled() -> Call:
    module = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    if torch.cuda.get_device_capability() == (9, 0):
        module._load_sm90_function()
    function = module.LigerFusedLinearScaledCrossEntropyFunction
    return lambda x: (-function.apply(*x.leaves, x.target, 1.0), None)


def _liger_fused() -> Call:
    module = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    function = module.LigerFusedLinearCrossEntropyFunction

    def call(x: Inputs) -> Outputs:
        loss = function.apply(*x.leaves, x.target, None, None, -100, 0.0, 0.0, "none")
        return -(loss[0] if isinstance(loss, tuple) else loss), None

    return call


def _cut_cross_entropy() -> Call:
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda x: (-function(*x.leaves, x.target, reduction="none"), None)


def _quack_linear() -> Call:
    function = importlib.import_module("quack.linear_cross_entropy").linear_cross_entropy_func
    return lambda x: (-function(*x.leaves, None, x.target, reduction="none"), None)


def _quack_token() -> Call:
    function = importlib.import_module("quack.cross_entropy").cross_entropy
    return lambda x: (-function(x.leaves[0], x.target, reduction="none"), None)


_PEERS = {
    "linear_logprob": (
        Contender("PyTorch", _plain(_dense_linear)),
        Contender("PyTorch, torch.compile", _plain(_dense_linear, compiled=True), first_case_only=True),
        Contender("TRL ChunkedLogProbFunction", _trl_linear(()), package="trl"),
        Contender("TRL ChunkedLogProbFunction, with entropy", _trl_linear(("entropy",)), (TRAIN,), package="trl"),
        Contender("verl logprobs_from_logits", _verl(True), package="verl"),
    ),
    "token_logprob": (
        Contender("PyTorch", _plain(_dense)),
        Contender("PyTorch, torch.compile", _plain(_dense, compiled=True), first_case_only=True),
        Contender("TRL selective_log_softmax", _trl_token, package="trl"),
        Contender("verl logprobs_from_logits", _verl(False), package="verl"),
    ),
}
_CUDA_PEERS = {
    "linear_logprob": (
        Contender("Liger scaled cross entropy", _liger_scaled, package="liger-kernel"),
        Contender("Liger fused linear cross entropy", _liger_fused, package="liger-kernel"),
        Contender("cut-cross-entropy", _cut_cross_entropy, package="cut-cross-entropy"),
        Contender("quack linear_cross_entropy", _quack_linear, package="quack-kernels"),
        Contender("verl linear_cross_entropy", _verl_kernel, package="verl"),
    ),
    "token_logprob": (Contender("quack cross_entropy", _quack_token, package="quack-kernels"),),
}
