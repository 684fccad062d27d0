"""The row kernels in Triton: one program per row, a block of columns at a time.

T rows, V columns; x is a logit, d its distance to the row's centre in units of the temperature, e = exp(d).
eager.py, beside this file, defines `forward` and `backward`.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prism_kernels.ops.anchored_rows import eager

FAR = tl.constexpr(eager.FAR)
# from 3.10 on, Triton fuses a * b + c only on request; the tiles were chosen, and are tested, with it
FP_FUSION = {"enable_fp_fusion": True}


class RowTile(NamedTuple):
    """A block of fold * lanes columns (half as many in fp64) and the warps that share it.

    Each lane sums its `fold` columns in registers first, so that more loads are in flight for as many running sums.
    """

    fold: int
    lanes: int
    num_warps: int


# by compute capability; 0 is the interpreter, where small blocks let small tests cross their edges
FORWARD_TILES = {0: RowTile(2, 32, 1), 80: RowTile(2, 2048, 8), 90: RowTile(2, 2048, 8), 100: RowTile(2, 2048, 8)}
BACKWARD_TILES = {0: RowTile(2, 32, 1), 80: RowTile(2, 2048, 8), 90: RowTile(2, 2048, 8), 100: RowTile(2, 2048, 8)}


@functools.cache
def architecture(device: torch.device) -> int:
    """Returns the key of the tile tables for a device: 80, 90 or 100, and 0 for the CPU, that is, the interpreter."""
    if device.type == "cpu":
        return 0
    major, _ = torch.cuda.get_device_capability(device)
    # consumer Blackwell (12.x) has the shared memory and the tensor instructions of 8.x, not those of 10.x
    return {9: 90, 10: 100}.get(major, 80)


@triton.jit
def tanh(u):
    """Returns tanh(u) to within a few ulp, in fp32 and fp64 (the interpreter has no libdevice)."""
    u2 = u * u
    # below 0.4 the [7/6] Padé approximant is exact to 1e-17; 1 - exp(-2|u|) would cancel there
    near = tl.abs(u) < 0.4
    t = tl.exp(-2.0 * tl.abs(u))
    above = tl.where(near, u * (135135.0 + u2 * (17325.0 + u2 * (378.0 + u2))), tl.where(u < 0, t - 1.0, 1.0 - t))
    below = tl.where(near, 135135.0 + u2 * (62370.0 + u2 * (3150.0 + u2 * 28.0)), 1.0 + t)
    return above / below


@triton.jit
def rescaled(R, M, Q, delta):
    """Returns the sums of e, e * d and e ** 2 over d + delta, given those over d."""
    s = tl.exp(delta)
    # delta is -inf when the old centre was a stand-in for -inf: those sums vanish, they do not become NaN
    return s * R, s * M + tl.where(s == 0, 0.0, s * delta * R), s * s * Q


@triton.jit
def _columns(v0, FOLD: tl.constexpr, LANES: tl.constexpr):
    return v0 + tl.arange(0, FOLD)[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def _offset(v, stride):
    # a stride of 1 is a constant to the compiler, so that this costs nothing in the usual case
    return v.to(tl.int64) * stride


@triton.jit
def _logits(z, z_stride, bias, bias_stride, v, columns, SOFTCAP: tl.constexpr, dtype: tl.constexpr):
    """Returns x, -inf outside the row, and tanh(x / softcap)."""
    live = v < columns
    x = tl.load(z + _offset(v, z_stride), mask=live, other=float("-inf")).to(dtype)
    if bias is not None:
        x += tl.load(bias + _offset(v, bias_stride), mask=live, other=0.0).to(dtype)
    t = x
    if SOFTCAP != 0.0:
        t = tanh(x * (1.0 / SOFTCAP))
        x = tl.where(live, SOFTCAP * t, float("-inf"))
    return x, t


@triton.jit
def _anchored_pass(
    z, z_stride, bias, bias_stride, exp, exp_stride, target, centre, inv_temperature, columns,
    SOFTCAP: tl.constexpr, CHAIN: tl.constexpr, LOWEST: tl.constexpr,
    FOLD: tl.constexpr, LANES: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Writes the exponentials of a row and returns its sums and its largest logit."""
    R = tl.zeros([LANES], dtype)
    M = tl.zeros([LANES], dtype)
    Q = tl.zeros([LANES], dtype)
    top = tl.full([LANES], float("-inf"), dtype)
    for v0 in range(0, columns, FOLD * LANES):
        v = _columns(v0, FOLD, LANES)
        x, t = _logits(z, z_stride, bias, bias_stride, v, columns, SOFTCAP, dtype)
        top = tl.maximum(top, tl.max(x, 0))
        d = tl.where(v == target, float("-inf"), (x - centre) * inv_temperature)
        e = tl.exp(d)
        R += tl.sum(e, 0)
        M += tl.sum(e * tl.maximum(d, LOWEST), 0)
        Q += tl.sum(e * e, 0)
        if CHAIN and SOFTCAP != 0.0:
            e *= 1.0 - t * t
        tl.store(exp + _offset(v, exp_stride), e.to(exp.dtype.element_ty), mask=v < columns)
    return tl.sum(R), tl.sum(M), tl.sum(Q), tl.max(top)


@triton.jit
def _moving_pass(
    z, z_stride, bias, bias_stride, target, anchor, centre, inv_temperature, columns,
    SOFTCAP: tl.constexpr, LOWEST: tl.constexpr, FOLD: tl.constexpr, LANES: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Returns the sums of a row, its largest logit and the centre they ended at, which follows a far maximum."""
    R = tl.zeros([LANES], dtype)
    M = tl.zeros([LANES], dtype)
    Q = tl.zeros([LANES], dtype)
    top = centre + float("-inf")
    for v0 in range(0, columns, FOLD * LANES):
        v = _columns(v0, FOLD, LANES)
        x, _ = _logits(z, z_stride, bias, bias_stride, v, columns, SOFTCAP, dtype)
        top = tl.maximum(top, tl.max(x))
        # +inf never becomes the centre: so R is inf for a row with an infinity and NaN for a row with a NaN
        if ((top - anchor) * inv_temperature > FAR) & (top > centre) & (top < float("inf")):
            R, M, Q = rescaled(R, M, Q, (centre - top) * inv_temperature)
            centre = top
        d = tl.where(v == target, float("-inf"), (x - centre) * inv_temperature)
        e = tl.exp(d)
        R += tl.sum(e, 0)
        M += tl.sum(e * tl.maximum(d, LOWEST), 0)
        Q += tl.sum(e * e, 0)
    return tl.sum(R), tl.sum(M), tl.sum(Q), top, centre


@triton.jit
def _largest(
    z, z_stride, bias, bias_stride, columns,
    SOFTCAP: tl.constexpr, FOLD: tl.constexpr, LANES: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Returns the largest logit of a row, NaN if one is NaN."""
    top = tl.full([LANES], float("-inf"), dtype)
    nans = tl.zeros([LANES], tl.int32)
    for v0 in range(0, columns, FOLD * LANES):
        v = _columns(v0, FOLD, LANES)
        x, _ = _logits(z, z_stride, bias, bias_stride, v, columns, SOFTCAP, dtype)
        top = tl.maximum(top, tl.max(x, 0))
        nans = tl.maximum(nans, tl.max((x != x).to(tl.int32), 0))
    return tl.where(tl.max(nans) == 0, tl.max(top), float("nan"))


@triton.jit
def _fill(out, stride, columns, value, FOLD: tl.constexpr, LANES: tl.constexpr):
    for v0 in range(0, columns, FOLD * LANES):
        v = _columns(v0, FOLD, LANES)
        tl.store(out + _offset(v, stride), tl.full([FOLD, LANES], value, out.dtype.element_ty), mask=v < columns)


@triton.jit
def _local(target, columns):
    # an int64 id outside the slice may wrap into it as an int32
    return tl.where((target >= 0) & (target < columns), target, -1).to(tl.int32)


_SCALAR_STRIDES = ["target_stride", "anchor_stride", "temperature_stride", "stats_stride", "stats_row_stride"]


@triton.jit(do_not_specialize=_SCALAR_STRIDES)
def _anchored_rows_fwd_kernel(
    z, z_row_stride, z_stride, target, target_stride, anchor, anchor_stride, inv_temperature, temperature_stride,
    bias, bias_stride, exp, exp_row_stride, exp_stride, stats, stats_row_stride, stats_stride, columns,
    SOFTCAP: tl.constexpr, CHAIN: tl.constexpr, IN_PLACE: tl.constexpr, LOWEST: tl.constexpr,
    FOLD: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = stats.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    z += row * z_row_stride
    y = _local(tl.load(target + row * target_stride), columns)
    c_y = tl.load(anchor + row * anchor_stride)
    s = tl.load(inv_temperature + row * temperature_stride).to(dtype)
    # -inf - -inf is NaN, so an anchor of -inf starts as the lowest finite number; with any finite logit the row is far
    start = tl.where(c_y == float("-inf"), LOWEST, c_y)
    if exp is None:
        R, M, Q, top, centre = _moving_pass(
            z, z_stride, bias, bias_stride, y, c_y, start, s, columns, SOFTCAP, LOWEST, FOLD, LANES, dtype
        )
        final = tl.where(((top - c_y) * s > FAR) & (R == R), top, c_y)
        if final != centre:
            R, M, Q = rescaled(R, M, Q, (centre - final) * s)
    else:
        exp += row * exp_row_stride
        if IN_PLACE:
            top = _largest(z, z_stride, bias, bias_stride, columns, SOFTCAP, FOLD, LANES, dtype)
            final = tl.where((top - c_y) * s > FAR, top, c_y)
            R, M, Q, top = _anchored_pass(
                z, z_stride, bias, bias_stride, exp, exp_stride, y, final, s, columns,
                SOFTCAP, CHAIN, LOWEST, FOLD, LANES, dtype,
            )  # fmt: skip
        else:
            R, M, Q, top = _anchored_pass(
                z, z_stride, bias, bias_stride, exp, exp_stride, y, start, s, columns,
                SOFTCAP, CHAIN, LOWEST, FOLD, LANES, dtype,
            )  # fmt: skip
            final = tl.where(((top - c_y) * s > FAR) & (R == R), top, c_y)
            if (final != start) & (c_y == c_y):
                R, M, Q, top = _anchored_pass(
                    z, z_stride, bias, bias_stride, exp, exp_stride, y, final, s, columns,
                    SOFTCAP, CHAIN, LOWEST, FOLD, LANES, dtype,
                )  # fmt: skip
        # NaN or inf
        if R - R != 0:
            _fill(exp, exp_stride, columns, 0.0, FOLD, LANES)
    stats += row * stats_stride
    tl.store(stats, final)
    tl.store(stats + stats_row_stride, R)
    tl.store(stats + 2 * stats_row_stride, M)
    tl.store(stats + 3 * stats_row_stride, Q)


@triton.jit(do_not_specialize=["coefficient_row_stride", "coefficient_stride", *_SCALAR_STRIDES[:3]])
def _anchored_rows_bwd_kernel(
    source, source_row_stride, source_stride, target, target_stride, anchor, anchor_stride,
    inv_temperature, temperature_stride, coefficients, coefficient_row_stride, coefficient_stride,
    bias, bias_stride, out, out_row_stride, out_stride, columns,
    SOURCE_IS_EXP: tl.constexpr, SOFTCAP: tl.constexpr, FOLD: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = anchor.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    source += row * source_row_stride
    out += row * out_row_stride
    coefficients += row * coefficient_stride
    alpha = tl.load(coefficients).to(dtype)
    beta = tl.load(coefficients + coefficient_row_stride).to(dtype)
    at_target = tl.load(coefficients + 2 * coefficient_row_stride).to(dtype)
    if (alpha == 0) & (beta == 0) & (at_target == 0):
        _fill(out, out_stride, columns, 0.0, FOLD, LANES)
    else:
        y = _local(tl.load(target + row * target_stride), columns)
        centre = tl.load(anchor + row * anchor_stride)
        s = tl.load(inv_temperature + row * temperature_stride).to(dtype)
        for v0 in range(0, columns, FOLD * LANES):
            v = _columns(v0, FOLD, LANES)
            live = v < columns
            if SOURCE_IS_EXP:
                e = tl.load(source + _offset(v, source_stride), mask=live, other=0.0).to(dtype)
                d = tl.log(e)
                t = d
                if SOFTCAP != 0.0:
                    t = (d / s + centre) * (1.0 / SOFTCAP)
            else:
                x, t = _logits(source, source_stride, bias, bias_stride, v, columns, SOFTCAP, dtype)
                d = (x - centre) * s
                e = tl.exp(d)
            f = e * (alpha + beta * d)
            if SOFTCAP != 0.0:
                f *= 1.0 - t * t
            # where e is 0, d is -inf or close to it: their product must not become NaN
            f = tl.where(e == 0, 0.0, f)
            f = tl.where(v == y, at_target, f)
            tl.store(out + _offset(v, out_stride), f.to(out.dtype.element_ty), mask=live)


def forward_registers(dtype: torch.dtype, softcap: float) -> int | None:
    """Returns the forward's limit of registers: without one, ptxas stops at 80 and spills the tanh of a soft cap."""
    return 128 if softcap and dtype == torch.float32 else None


def _tile(table: dict[int, RowTile], device: torch.device, dtype: torch.dtype) -> RowTile:
    tile = table[architecture(device)]
    return tile._replace(fold=tile.fold * 4 // dtype.itemsize)


def forward(
    z: Tensor,
    target: Tensor,
    anchor: Tensor,
    inv_temperature: Tensor,
    bias: Tensor | None,
    softcap: float,
    chain: bool,
    exp: Tensor | None,
    stats: Tensor,
) -> None:
    """Writes what eager.forward writes, reading z once, twice where a row is far or where exp is z itself."""
    rows, columns = z.shape
    if rows == 0:
        return
    tile = _tile(FORWARD_TILES, z.device, anchor.dtype)
    with torch.cuda.device_of(z):
        _anchored_rows_fwd_kernel[(rows,)](
            z, z.stride(0), z.stride(1), target, target.stride(0), anchor, anchor.stride(0),
            inv_temperature, inv_temperature.stride(0), bias, 0 if bias is None else bias.stride(0),
            exp, 0 if exp is None else exp.stride(0), 0 if exp is None else exp.stride(1),
            stats, stats.stride(0), stats.stride(1), columns,
            SOFTCAP=softcap, CHAIN=chain, IN_PLACE=exp is not None and exp.data_ptr() == z.data_ptr(),
            LOWEST=torch.finfo(anchor.dtype).min, FOLD=tile.fold, LANES=tile.lanes,
            num_warps=tile.num_warps, maxnreg=forward_registers(anchor.dtype, softcap), **FP_FUSION,
        )  # fmt: skip


def backward(
    source: Tensor,
    source_is_exp: bool,
    target: Tensor,
    anchor: Tensor,
    inv_temperature: Tensor,
    coefficients: Tensor,
    bias: Tensor | None,
    softcap: float,
    out: Tensor,
) -> None:
    """Writes what eager.backward writes, reading the source once and not at all in rows without gradient."""
    rows, columns = source.shape
    if rows == 0:
        return
    tile = _tile(BACKWARD_TILES, source.device, anchor.dtype)
    with torch.cuda.device_of(source):
        _anchored_rows_bwd_kernel[(rows,)](
            source, source.stride(0), source.stride(1), target, target.stride(0), anchor, anchor.stride(0),
            inv_temperature, inv_temperature.stride(0), coefficients, coefficients.stride(0), coefficients.stride(1),
            bias, 0 if bias is None else bias.stride(0), out, out.stride(0), out.stride(1), columns,
            SOURCE_IS_EXP=source_is_exp, SOFTCAP=softcap, FOLD=tile.fold, LANES=tile.lanes,
            num_warps=tile.num_warps, **FP_FUSION,
        )  # fmt: skip
