"""What ops on rows share: dtypes, memory layout, temperatures, and whether values may be read from the device."""

import torch
from torch import Tensor

from prism_kernels import check

# the dtypes of every op's inputs
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype that inputs of a dtype are computed in: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def contiguous(x: Tensor | None) -> Tensor | None:
    """Returns x with its elements side by side, as the native kernels take them."""
    return x if x is None or x.is_contiguous() else x.contiguous()


def may_synchronise(tensor: Tensor) -> bool:
    """Returns whether values may be read from a tensor's device: not while compiling or while a graph is captured."""
    if torch.compiler.is_compiling():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def row_temperature(op: str, temperature: float | Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the temperature of each row, (T,), after every check that needs no value from a device."""
    if isinstance(temperature, Tensor):
        if temperature.dim() == 0:
            temperature = temperature.expand(target.shape)
        check.shape(op, "temperature", temperature, tuple(target.shape))
        check.device(op, "temperature", temperature, target, "target")
        return temperature.detach().to(dtype).reshape(-1)
    check.positive(op, "temperature", temperature)
    return torch.full((target.numel(),), temperature, dtype=dtype, device=target.device)


def inverse(temperature: Tensor) -> Tensor:
    """Returns 1 / temperature, NaN where a temperature is not positive."""
    return torch.where(temperature > 0, 1 / temperature, torch.nan)


def has_gradient(grad_logp: Tensor, grad_entropy: Tensor | None) -> Tensor:
    """Returns which rows have an incoming gradient that is not 0."""
    has = grad_logp != 0
    return has if grad_entropy is None else has | (grad_entropy != 0)
