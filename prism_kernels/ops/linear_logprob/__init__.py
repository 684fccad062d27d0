"""Log-probabilities of given tokens straight from hidden states and the LM head; (T, V) never enters autograd."""

import torch
import torch.distributed as dist
from torch import Tensor

from prism_kernels import check
from prism_kernels.backend import resolve
from prism_kernels.ops.linear_logprob.eager import Shard
from prism_kernels.ops.linear_logprob.op import NAME, LinearLogProbFunction
from prism_kernels.ops.rows import FLOATS, HeadArguments, accumulator, cached, may_synchronise, row_temperature, whole
from prism_kernels.outputs import TokenLogProbs


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    entropy: bool = False,
    ignore_index: int = -100,
    cache_bytes: int | None = None,
    process_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> TokenLogProbs:
    """Returns the log-probability of each target under the LM head, without holding the logits in autograd.

    It replaces, with fp32 accumulation and exact also for confident tokens::

        z = hidden @ weight.t() + bias + scale * (hidden @ A.t() @ B.t())
        z = softcap * torch.tanh(z / softcap)
        log_pi = torch.log_softmax(z / temperature[..., None], -1)
        logp = log_pi.gather(-1, target[..., None])[..., 0]
        entropy = -(log_pi.exp() * log_pi).sum(-1)

    Rows with `ignore_index` are skipped; the backward pass also skips rows whose incoming gradient is 0. On a GPU
    each pass reads one count from the device for this; under torch.compile or graph capture it runs all rows instead.

    Args:
        hidden: (T, D) or (B, L, D), fp32, bf16, fp16 or fp64; the products run in its dtype.
        weight: (V, D). A DTensor, here, as bias or in lora, is gathered, and its gradient is the mean over the ranks of
            its mesh, as FSDP2's is by default.
        target: int64, of hidden's leading shape, already aligned (no shift).
        bias: (V,).
        temperature: a number, or a tensor of the target's shape.
        softcap: c of c * tanh(z / c).
        lora: (A (r, D), B (V, r), scale), an adapter on the head.
        entropy: whether to return the entropy too (differentiable).
        ignore_index: rows with this target are 0 throughout and have no gradient.
        cache_bytes: memory for the exponentials that the forward pass keeps for the backward pass: None keeps all
            (three matrix products in total), 0 none (four products, flat memory), a number those of the rows that fit.
        process_group: weight and bias are this rank's slice of V; targets are global, and every rank has the same
            rows. Not under torch.compile, since the ranks exchange the sizes of their slices.
        backend: `cuda`, `triton`, `cpu` or `torch`; see `use_backend`.
    """
    if process_group is not None:
        _check_slice(weight, process_group)
    arguments = head_arguments(NAME, hidden, weight, target, bias, temperature, softcap)
    ignore_index, entropy = check.integer(NAME, "ignore_index", ignore_index), check.flag(NAME, "entropy", entropy)
    if cache_bytes is not None:
        cache_bytes = check.integer(NAME, "cache_bytes", cache_bytes, expected="cache_bytes >= 0 or None", low=0)
    chosen = resolve(NAME, arguments.hidden.device, backend)

    x, flat, row_temperatures = arguments.hidden, target, arguments.temperature
    # only where it changes the shape: a view costs a node of the autograd graph
    if target.dim() == 2:
        x, flat = x.flatten(0, 1), flat.flatten()
    total = flat.shape[0]
    kept = None
    if may_synchronise(x):
        kept = (flat != ignore_index).nonzero()[:, 0]
        kept = None if kept.numel() == total else kept
        if kept is not None:
            x, flat, row_temperatures = (rows.index_select(0, kept) for rows in (x, flat, row_temperatures))
    arguments = with_lora(NAME, arguments._replace(hidden=x, target=flat, temperature=row_temperatures), lora)
    cache_rows = 0
    shard = None if process_group is None else Shard.of(arguments.weight, process_group)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments[:5]):
        cache_rows = arguments.target.shape[0]
        if cache_bytes is not None:
            columns = arguments.weight.shape[0] if shard is None else shard.largest
            cache_rows = min(cache_rows, cache_bytes // (columns * cached(arguments.hidden).itemsize))
    results = LinearLogProbFunction.apply(*arguments, ignore_index, entropy, cache_rows, chosen, shard)
    if kept is not None:
        results = [r.new_zeros(total).index_copy(0, kept, r) for r in results]
    if target.dim() == 2:
        results = [r.view(target.shape) for r in results]
    logp, row_entropy, lse, square = results
    return TokenLogProbs(logp, row_entropy if entropy else None, lse, square)


def _check_slice(weight: Tensor, group: dist.ProcessGroup) -> None:
    """Checks that a DTensor is not split over the ranks that have a slice of V each."""
    mesh = getattr(weight, "device_mesh", None)
    if mesh is None:
        return
    common = set(mesh.mesh.flatten().tolist()) & set(dist.get_process_group_ranks(group))
    if len(common) > 1:
        expected = "weight to be this rank's slice of V with process_group; pass weight.to_local()"
        check.fail(NAME, expected, f"a DTensor over ranks {sorted(common)} of the group")


def head_arguments(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
) -> HeadArguments:
    """Returns the checked arguments: hidden as autocast wants it, weight and bias gathered; without LoRA."""
    if isinstance(weight, Tensor):
        weight = whole(weight)
    for name, value in (("hidden", hidden), ("weight", weight), ("target", target)):
        check.tensor(op, name, value)
    check.memory(op, "hidden", hidden)
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    if hidden.dim() not in (2, 3):
        check.fail(op, "hidden of shape (T, D) or (B, L, D)", tuple(hidden.shape))
    check.shape(op, "weight", weight, ("V", hidden.shape[-1]))
    if weight.shape[0] == 0:
        check.fail(op, "weight of shape (V, D) with V > 0", tuple(weight.shape))
    check.shape(op, "target", target, tuple(hidden.shape[:-1]))
    check.dtype(op, "hidden", hidden, FLOATS)
    check.dtype(op, "weight", weight, FLOATS)
    check.dtype(op, "target", target, (torch.int64,))
    check.device(op, "weight", weight, hidden, "hidden")
    check.device(op, "target", target, hidden, "hidden")
    if bias is not None:
        bias = whole(bias) if isinstance(bias, Tensor) else bias
        check.tensor(op, "bias", bias)
        check.shape(op, "bias", bias, (weight.shape[0],))
        check.dtype(op, "bias", bias, FLOATS)
        check.device(op, "bias", bias, hidden, "hidden")
    cap = check.optional(op, "softcap", softcap)
    row_temperatures = row_temperature(op, temperature, target, accumulator(hidden.dtype))
    return HeadArguments(hidden, weight, bias, None, None, target, row_temperatures, cap)


def with_lora(op: str, arguments: HeadArguments, lora: tuple[Tensor, Tensor, float] | None) -> HeadArguments:
    """Returns the arguments with an adapter: scale * hidden @ A.T, (T, r), in the accumulator's dtype, and B."""
    if lora is None:
        return arguments
    if not isinstance(lora, tuple) or len(lora) != 3:
        check.fail(op, "lora to be a tuple (A, B, scale)", type(lora).__name__, TypeError)
    hidden, scale = arguments.hidden, check.number(op, "lora scale", lora[2])
    a, b = (whole(x) if isinstance(x, Tensor) else x for x in lora[:2])
    check.tensor(op, "lora A", a)
    check.tensor(op, "lora B", b)
    check.shape(op, "lora A", a, ("r", hidden.shape[-1]))
    check.shape(op, "lora B", b, (arguments.weight.shape[0], a.shape[0]))
    for name, value in (("lora A", a), ("lora B", b)):
        check.dtype(op, name, value, FLOATS)
        check.device(op, name, value, hidden, "hidden")
    exact = accumulator(hidden.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        lora_hidden = torch.nn.functional.linear(hidden.to(exact), a.to(exact)) * scale
    return arguments._replace(lora_hidden=lora_hidden, lora_weight=b)
