"""Hypothesis strategies of tensors in every layout and of arguments that are damaged."""

import numpy as np
import torch
from hypothesis import strategies as st

from prism_kernels.testing import double

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# of the largest exact value, for the coarsest dtype of a call
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6, torch.bfloat16: 0.15, torch.float16: 5e-2}
DTYPES = (*FLOATS, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.complex64)
SPECIAL = (float("nan"), float("inf"), float("-inf"))
INTEGERS = (-(2**63), -(2**31), -100, -1, 0, 1, 5, 2**31, 2**32, 2**63 - 1)


def _strided(x):
    """Every second element of a larger tensor, in all dimensions."""
    large = x.new_zeros([2 * n for n in x.shape])
    view = large[tuple(slice(None, None, 2) for _ in x.shape)]
    return view.copy_(x)


def _shifted(x):
    """The same at an odd address."""
    memory = x.new_empty(x.numel() + 1)
    return memory[1:].view(x.shape).copy_(x)


LAYOUTS = {
    "plain": lambda x: x,
    "strided": _strided,
    "shifted": _shifted,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() else x,
    "expanded": lambda x: x[:1].expand_as(x) if x.dim() and x.shape[0] else x,
    "expanded columns": lambda x: x[..., :1].expand_as(x) if x.dim() and x.shape[-1] else x,
    "negated twice": lambda x: torch._neg_view(-x) if x.is_floating_point() else x,
}
DAMAGES = {
    "dtype": lambda draw, x: x.to(draw(st.sampled_from(DTYPES))),
    "one dimension more": lambda draw, x: x[None],
    "one dimension less": lambda draw, x: x[0] if x.dim() and x.shape[0] else x,
    "longer": lambda draw, x: torch.cat((x, x[:1])) if x.dim() else x,
    "shorter": lambda draw, x: x[:-1] if x.dim() else x,
    "empty": lambda draw, x: x[:0] if x.dim() else x,
    "wider": lambda draw, x: torch.cat((x, x[..., :1]), -1) if x.dim() else x,
    "narrower": lambda draw, x: x[..., :-1] if x.dim() else x,
    "meta": lambda draw, x: x.to("meta"),
    "sparse": lambda draw, x: x.to_sparse() if x.dim() else x,
    "values": lambda draw, x: _with_values(draw, x),
    "shuffled": lambda draw, x: x.flatten()[torch.randperm(x.numel())].view(x.shape),
    "shifted values": lambda draw, x: x if x.dtype == torch.bool else x + draw(st.sampled_from((-1, 1))),
    "negated": lambda draw, x: x if x.dtype == torch.bool else -x,
    "another": lambda draw, x: draw(
        st.sampled_from((None, 1.0, "x", [1, 2], (), True, np.ones(2), object(), torch.ones(()), 1j))
    ),
}


def _with_values(draw, x):
    if x.dtype == torch.bool or not x.numel():
        return x
    value = draw(st.sampled_from(SPECIAL if x.is_floating_point() or x.is_complex() else INTEGERS))
    place = draw(st.integers(0, x.numel() - 1))
    info = None if x.is_floating_point() or x.is_complex() else torch.iinfo(x.dtype)
    if info is not None and not info.min <= value <= info.max:
        value = info.max if value > 0 else info.min
    flat = x.flatten().clone()
    flat[place] = value
    return flat.view(x.shape)


SCALARS = (
    *(float("nan"), float("inf"), -1.0, 0.0, 1e300, 5e-324, 1e-3, 2.0, 10**400, -(10**400), 2**63, -1, 0, 1, 3),
    *(1j, True, "1", "token", None, [], (1.0,), (0.1, 0.2), np.float32(0.5), np.int64(3), torch.tensor(0.5), object()),
)


def floats(draw, *shape, dtype, scale=1.0):
    """Returns a random tensor in a random layout, which requires its gradient."""
    make = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x = (torch.randn(*shape, generator=make) * scale).to(dtype)
    return lay_out(draw, x).requires_grad_()


def integers(draw, low, high, *shape, dtype=torch.int64):
    """Returns random integers in [low, high) in a random layout."""
    make = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    return lay_out(draw, torch.randint(low, max(high, low + 1), shape, generator=make).to(dtype))


def booleans(draw, *shape):
    """Returns random booleans."""
    return integers(draw, 0, 2, *shape).bool()


def lay_out(draw, x):
    """Returns a tensor of the same shape in a random layout; expanded ones have other values."""
    return LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](x.detach())


def maybe(draw, make):
    """Returns make() or None."""
    return make() if draw(st.booleans()) else None


def damage(draw, arguments, most=1):
    """Damages up to `most` arguments, none of them in half of the cases where `most` is 1."""
    names = draw(st.lists(st.sampled_from(sorted(arguments)), max_size=most, unique=True))
    return {**arguments, **{name: _damaged(draw, arguments[name]) for name in names}}


def _damaged(draw, value):
    if not isinstance(value, torch.Tensor):
        return draw(st.sampled_from(SCALARS))
    changed = DAMAGES[draw(st.sampled_from(list(DAMAGES)))](draw, value.detach())
    if value.requires_grad and isinstance(changed, torch.Tensor) and changed.is_floating_point():
        return changed.detach().requires_grad_()
    return changed


def refused(error, *names):
    """Asserts that an error is one of ours; lets others through."""
    named = str(error).startswith(tuple(f"{name}: " for name in names))
    if not (named and isinstance(error, ValueError | TypeError | RuntimeError)):
        raise error


def leaves_of(arguments):
    """Returns the tensors that want a gradient, also those inside tuples."""
    return [x for x in tensors_in(arguments) if x.requires_grad]


def tensors_in(arguments):
    """Returns the tensors, also those inside tuples."""
    values = [x for value in arguments.values() for x in (value if isinstance(value, tuple) else (value,))]
    return [x for x in values if isinstance(x, torch.Tensor)]


def gradients(outputs, leaves):
    """Returns the gradients of a weighted sum of the outputs, 0 where a leaf is not used."""
    total = sum(
        (x.double() * torch.linspace(-1, 2, x.numel(), dtype=torch.float64).view(x.shape)).sum() for x in outputs
    )
    if not leaves or not isinstance(total, torch.Tensor) or not total.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    return list(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))


def compare(names, ours, exact, arguments):
    """Asserts that tensors are close to exact ones; where their dtype cannot hold these, anything goes."""
    tolerance = max((TOLERANCE[x.dtype] for x in tensors_in(arguments) if x.dtype in TOLERANCE), default=1e-6)
    for name, x, wanted in zip(names, ours, exact, strict=True):
        assert x.shape == wanted.shape, f"{name}: {x.shape} instead of {wanted.shape}"
        largest = torch.finfo(x.dtype).max if x.is_floating_point() else torch.inf
        wanted, x = wanted.detach().double(), x.detach().double()
        finite = wanted.abs() <= largest
        bound = tolerance * max(1.0, float(wanted[finite].abs().max()) if finite.any() else 0.0)
        error = (x - wanted)[finite].abs()
        assert not error.numel() or float(error.max()) <= bound, f"{name}: {x} instead of {wanted}"


def run(names, op, reference, arguments, outputs, *, finite=False):
    """Compares an op with its reference in float64, values and gradients, or asserts that it refuses the arguments.

    Args:
        names: how the op's errors may begin.
        op: the op.
        reference: its specification.
        arguments: of both, by name.
        outputs: picks the tensors to compare from a result.
        finite: whether NaN and inf in the arguments may spread.
    """
    leaves = leaves_of(arguments)
    try:
        results = outputs(op(**arguments))
        grads = gradients([x for x in results if x.requires_grad], leaves)
    except Exception as error:
        refused(error, *names)
        return
    if any(x.is_meta for x in results) or (finite and not all(x.isfinite().all() for x in tensors_in(arguments))):
        return
    wide = {name: double(value) for name, value in arguments.items() if name != "backend"}
    exact_leaves = leaves_of(wide)
    exact = outputs(reference(**wide))
    wanted = gradients([y for x, y in zip(results, exact) if x.requires_grad], exact_leaves)
    compare([f"result {i}" for i in range(len(results))], results, exact, arguments)
    if all(x.isfinite().all() for x in exact):
        compare([f"gradient {i}" for i in range(len(grads))], grads, wanted, arguments)
