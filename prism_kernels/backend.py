"""Chooses the implementation that runs: by an argument, a context, an environment variable, else a measured table."""

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch

from prism_kernels.check import fail, one_of
from prism_kernels.library import native_reason

BACKENDS = ("cuda", "triton", "cpu", "torch")

# per op and device type, the fastest first. measured on the cpu (bench/results); on cuda a prediction until it is
# measured there
_PREFERENCE: dict[str, dict[str, tuple[str, ...]]] = {
    "linear_logprob": {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")},
    "token_logprob": {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")},
    "linear_policy_loss": {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")},
    "policy_loss": {"cpu": ("cpu", "torch"), "cuda": ("cuda", "torch")},
    "group_advantage": {"cpu": ("cpu", "torch"), "cuda": ("cuda", "torch")},
    "prism_advantage": {"cpu": ("cpu", "torch"), "cuda": ("cuda", "torch")},
    "prefix_attention": {"cpu": ("torch",), "cuda": ("torch",)},
    "moe_route": {"cpu": ("torch",), "cuda": ("cuda", "torch")},
    "moe_experts": {"cpu": ("torch",), "cuda": ("triton", "torch")},
}
_OTHER_DEVICES = ("torch",)

_forced: ContextVar[str | None] = ContextVar("prism_kernels_backend", default=None)


class Status(NamedTuple):
    """One op on one backend: `reason` is None where it is available."""

    op: str
    backend: str
    reason: str | None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every op inside the context on one backend; an op that cannot run there raises with the reason."""
    one_of("use_backend", "name", name, BACKENDS)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


# torch.compile cannot trace a context variable: the backend at the time of compilation is compiled in
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def resolve(op: str, device: torch.device, requested: str | None = None) -> str:
    """Returns the backend that `op` runs on for tensors of `device`. Public functions call it once and pass it on.

    The argument comes first, then `use_backend`, then PRISM_KERNELS_BACKEND: such a choice raises where it is
    impossible. Without one it is the first available backend of the table.
    """
    if requested is not None:
        one_of(op, "backend", requested, BACKENDS)
    wanted = requested or _forced.get() or os.environ.get("PRISM_KERNELS_BACKEND")
    if wanted:
        if wanted not in BACKENDS:
            one_of(op, "backend", wanted, BACKENDS)
        reason = unavailable(op, wanted, device.type)
        if reason is not None:
            raise RuntimeError(f"{op}: backend {wanted!r} is not available for {device.type} tensors: {reason}")
        return wanted
    for name in _PREFERENCE[op].get(device.type, _OTHER_DEVICES):
        if unavailable(op, name, device.type) is None:
            return name
    raise RuntimeError(f"{op}: no backend for {device.type} tensors")


def unavailable(op: str, backend: str, device: str) -> str | None:
    """Returns why a backend cannot run an op on a device type, with the remedy; None if it can."""
    if op not in _PREFERENCE:
        fail("backend", f"op to be one of {', '.join(_PREFERENCE)}", repr(op))
    if backend == "torch":
        return None
    if backend not in _implementations(op):
        return f"{op} has no implementation for it; it has {', '.join(_implementations(op))}"
    if backend == "cpu":
        if device != "cpu":
            return "it takes CPU tensors only; move the tensors or choose another backend"
        return _native_reason("_C")
    if backend == "cuda":
        if device != "cuda":
            return "it takes CUDA tensors only; move the tensors or choose another backend"
        return _native_reason("_C_cuda") or _no_gpu()
    if not _has_triton():
        return "triton is not installed; `pip install triton` (Linux)"
    if device == "cuda":
        return _no_gpu()
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "it needs a CUDA device (or TRITON_INTERPRET=1, set before triton is imported, to interpret it on the CPU)"


def _implementations(op: str) -> list[str]:
    return [name for name in BACKENDS if any(name in names for names in _PREFERENCE[op].values())]


def _native_reason(extension: str) -> str | None:
    if extension not in native_reason:
        # the extensions are loaded with the ops
        importlib.import_module("prism_kernels.ops")
    return native_reason[extension]


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _no_gpu() -> str | None:
    return None if torch.cuda.is_available() else "torch sees no CUDA device (torch.cuda.is_available() is False)"


def backend_status() -> list[Status]:
    """Returns each op and backend, with the reason where it is not available on this machine."""
    device = {"cuda": "cuda", "triton": "cuda" if torch.cuda.is_available() else "cpu", "cpu": "cpu", "torch": "cpu"}
    return [
        Status(op, backend, unavailable(op, backend, device[backend]))
        for op, devices in _PREFERENCE.items()
        for backend in BACKENDS
        if any(backend in names for names in devices.values())
    ]
