"""The forward without gradient as one persistent Triton kernel: the logits live in registers only.

T rows, V columns, D hidden. A work item is a tile of rows and a split of the columns; it leaves four partial sums for
each of its rows, and a second kernel merges the splits. Tiles and splits depend on V, the dtype and the hardware, never
on T, and nothing is added atomically: a row's result does not depend on its neighbours, bit for bit.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from prism_kernels.ops.anchored_rows.kernels import FAR, FP_FUSION, architecture, rescaled, tanh

# stands in for an anchor of -inf, since -inf - -inf is NaN
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
# partial sums take 16 bytes for each row and split: 17 MB for this many rows on 132 multiprocessors
ROWS_OF_LAUNCH = 16384


class Tile(NamedTuple):
    """Tile sizes of the fused forward; `group` tiles of rows run side by side and share the weight in the L2 cache."""

    rows: int
    columns: int
    depth: int
    group: int
    num_warps: int
    num_stages: int
    # without a limit ptxas stops at 128 for sm_100 and spills the rest; elsewhere it does better without one
    registers: int | None = None


class Tiles(NamedTuple):
    """The tiles for one architecture: for 2-byte elements, the same with a soft cap, fp32, and unaligned rows.

    The tanh of a soft cap takes registers, and so do the addresses of single elements: larger tiles would spill.
    """

    half: Tile
    half_capped: Tile
    single: Tile
    unaligned: Tile
    # 8.x has no descriptors: emulated there, they load single elements where pointers load 16 bytes
    descriptors: bool


# by compute capability; 0 is the interpreter, where small tiles let small tests cross their edges
TILES = {
    0: Tiles(*[Tile(16, 32, 16, 2, 1, 1)] * 4, descriptors=True),
    80: Tiles(
        half=Tile(128, 128, 64, 16, 8, 3),
        half_capped=Tile(128, 64, 64, 16, 8, 3),
        single=Tile(64, 64, 32, 16, 8, 3),
        unaligned=Tile(32, 32, 32, 16, 4, 3),
        descriptors=False,
    ),
    90: Tiles(
        half=Tile(128, 256, 64, 16, 8, 4),
        half_capped=Tile(128, 128, 64, 16, 8, 4),
        single=Tile(64, 64, 32, 16, 8, 3),
        unaligned=Tile(32, 32, 32, 16, 4, 3),
        descriptors=True,
    ),
    100: Tiles(
        half=Tile(128, 128, 64, 16, 8, 4, registers=255),
        half_capped=Tile(128, 128, 64, 16, 8, 4, registers=255),
        single=Tile(64, 64, 32, 16, 8, 3),
        unaligned=Tile(32, 32, 32, 16, 4, 3),
        descriptors=True,
    ),
}


@triton.jit
def _absorb(x, v0, y, c_y, s, centre, top, R, M, Q, bias, columns, SOFTCAP: tl.constexpr):
    """Returns the centre, the largest logit and the sums of each row after the logits x (rows, columns from v0)."""
    v = v0 + tl.arange(0, x.shape[1])
    if bias is not None:
        x += tl.load(bias + v, mask=v < columns, other=0.0).to(tl.float32)[None, :]
    if SOFTCAP != 0.0:
        x = SOFTCAP * tanh(x * (1.0 / SOFTCAP))
    x = tl.where((v < columns)[None, :], x, float("-inf"))
    top = tl.maximum(top, tl.max(x, 1))
    # +inf never becomes the centre: so R is inf for a row with an infinity and NaN for a row with a NaN
    moved = tl.where(((top - c_y) * s > FAR) & (top < float("inf")), top, centre)
    R, M, Q = rescaled(R, M, Q, (centre - moved) * s)
    d = tl.where(v[None, :] == y[:, None], float("-inf"), (x - moved[:, None]) * s[:, None])
    e = tl.exp(d)
    R += tl.sum(e, 1)
    M += tl.sum(e * tl.maximum(d, LOWEST), 1)
    Q += tl.sum(e * e, 1)
    return moved, top, R, M, Q


@triton.jit(do_not_specialize=["rows", "splits", "tiles_of_split"])
def _linear_logprob_fwd_kernel(
    hidden, hidden_row_stride, hidden_stride, weight, weight_row_stride, weight_stride,
    target, anchor, inv_temperature, bias, partial, rows, columns, depth, splits, tiles_of_split,
    SOFTCAP: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(rows, BLOCK_T)
    steps = tl.cdiv(depth, BLOCK_D)
    for item in range(tl.program_id(0), row_tiles * splits, tl.num_programs(0)):
        first = item // (GROUP * splits) * GROUP
        width = min(row_tiles - first, GROUP)
        within = item % (GROUP * splits)
        t0 = (first + within % width) * BLOCK_T
        split = within // width
        t = t0 + tl.arange(0, BLOCK_T)
        real = t < rows
        y = tl.load(target + t, mask=real, other=-1)
        # an int64 id outside the slice may wrap into it as an int32
        y = tl.where((y >= 0) & (y < columns), y, -1).to(tl.int32)
        c_y = tl.load(anchor + t, mask=real, other=0.0)
        s = tl.load(inv_temperature + t, mask=real, other=1.0)
        centre = tl.where(c_y == float("-inf"), LOWEST, c_y)
        top = tl.full([BLOCK_T], float("-inf"), tl.float32)
        R = tl.zeros([BLOCK_T], tl.float32)
        M = tl.zeros([BLOCK_T], tl.float32)
        Q = tl.zeros([BLOCK_T], tl.float32)
        x = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        begin = split * tiles_of_split
        end = min(begin + tiles_of_split, tl.cdiv(columns, BLOCK_V))
        # one flat loop over (tile of columns, step of depth): the next tile's loads run under this tile's sums
        for step in range((end - begin) * steps):
            v0 = (begin + step // steps) * BLOCK_V
            k0 = step % steps * BLOCK_D
            if DESCRIPTORS:
                h = hidden.load([t0, k0])
                w = weight.load([v0, k0])
            else:
                v = v0 + tl.arange(0, BLOCK_V)
                k = k0 + tl.arange(0, BLOCK_D)
                h_at = hidden + t.to(tl.int64)[:, None] * hidden_row_stride + k[None, :] * hidden_stride
                w_at = weight + v.to(tl.int64)[:, None] * weight_row_stride + k[None, :] * weight_stride
                h = tl.load(h_at, mask=real[:, None] & (k < depth)[None, :], other=0.0)
                w = tl.load(w_at, mask=(v < columns)[:, None] & (k < depth)[None, :], other=0.0)
            x = tl.dot(h, w.T, x, input_precision="ieee")
            if k0 + BLOCK_D >= depth:
                # by halves, which take fewer registers than the whole tile at once
                HALF: tl.constexpr = BLOCK_V // 2
                left, right = tl.split(tl.permute(tl.reshape(x, [BLOCK_T, 2, HALF]), [0, 2, 1]))
                centre, top, R, M, Q = _absorb(
                    left, v0, y, c_y, s, centre, top, R, M, Q, bias, columns, SOFTCAP
                )  # fmt: skip
                centre, top, R, M, Q = _absorb(
                    right, v0 + HALF, y, c_y, s, centre, top, R, M, Q, bias, columns, SOFTCAP
                )  # fmt: skip
                x = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        out = partial + split * 4 * rows + t
        tl.store(out, centre, mask=real)
        tl.store(out + rows, R, mask=real)
        tl.store(out + 2 * rows, M, mask=real)
        tl.store(out + 3 * rows, Q, mask=real)


@triton.jit(do_not_specialize=["stats_row_stride", "rows", "splits"])
def _linear_logprob_merge_kernel(
    partial, anchor, inv_temperature, stats, stats_row_stride, rows, splits,
    SPLITS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    real = t < rows
    split = tl.arange(0, SPLITS)[:, None]
    mask = (split < splits) & real[None, :]
    at = partial + split * 4 * rows + t[None, :]
    c = tl.load(at, mask=mask, other=float("-inf"))
    R = tl.load(at + rows, mask=mask, other=0.0)
    M = tl.load(at + 2 * rows, mask=mask, other=0.0)
    Q = tl.load(at + 3 * rows, mask=mask, other=0.0)
    c_y = tl.load(anchor + t, mask=real, other=0.0)
    s = tl.load(inv_temperature + t, mask=real, other=1.0)
    centre = tl.max(c, 0)
    R, M, Q = rescaled(R, M, Q, (c - centre[None, :]) * s[None, :])
    R = tl.sum(R, 0)
    M = tl.sum(M, 0)
    Q = tl.sum(Q, 0)
    # all logits are -inf, the target's too
    R = tl.where((c_y == float("-inf")) & (centre == LOWEST) & (R == 0), float("nan"), R)
    broken = R - R != 0
    centre = tl.where(R == R, tl.where(broken, R, centre), c_y)
    stats += t
    tl.store(stats, centre, mask=real)
    tl.store(stats + stats_row_stride, tl.where(broken, float("nan"), R), mask=real)
    tl.store(stats + 2 * stats_row_stride, tl.where(broken, float("nan"), M), mask=real)
    tl.store(stats + 3 * stats_row_stride, tl.where(broken, float("nan"), Q), mask=real)


@triton.jit
def _target_logits_kernel(
    hidden, hidden_row_stride, hidden_stride, weight, weight_row_stride, weight_stride,
    target, bias, out, columns, depth, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target + row)
    exists = (y >= 0) & (y < columns)
    hidden += row * hidden_row_stride
    weight += tl.where(exists, y, 0) * weight_row_stride
    z = tl.zeros([BLOCK], tl.float32)
    for k0 in range(0, depth, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        mask = k < tl.where(exists, depth, 0)
        h = tl.load(hidden + k * hidden_stride, mask=mask, other=0.0).to(tl.float32)
        # the operands of the product are in hidden's dtype
        w = tl.load(weight + k * weight_stride, mask=mask, other=0.0).to(hidden.dtype.element_ty)
        z += h * w.to(tl.float32)
    x = tl.sum(z)
    if bias is not None:
        x += tl.load(bias + y, mask=exists, other=0.0).to(tl.float32)
    if SOFTCAP != 0.0:
        x = SOFTCAP * tanh(x * (1.0 / SOFTCAP))
    tl.store(out + row, tl.where(exists, x, float("nan")))


@functools.cache
def _processors(device: torch.device) -> int:
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def _tile(hidden: Tensor, softcap: float, aligned: bool) -> Tile:
    if hidden.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"linear_logprob: the fused forward takes bf16, fp16 or fp32, got {hidden.dtype}")
    tiles = TILES[architecture(hidden.device)]
    if not aligned:
        return tiles.unaligned
    if hidden.dtype == torch.float32:
        return tiles.single
    return tiles.half_capped if softcap else tiles.half


def _aligned(x: Tensor) -> bool:
    """Returns whether rows can be read 16 bytes at a time, which a tensor descriptor needs."""
    return x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0


def target_logits(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, softcap: float) -> Tensor:
    """Returns the logit of each row's target, in fp32, (T,); NaN where the target is outside [0, V)."""
    rows, depth = hidden.shape
    out = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    if rows > 0:
        with torch.cuda.device_of(hidden):
            _target_logits_kernel[(rows,)](
                hidden, hidden.stride(0), hidden.stride(1), weight, weight.stride(0), weight.stride(1),
                target.contiguous(), None if bias is None else bias.contiguous(), out, weight.shape[0], depth,
                SOFTCAP=softcap, BLOCK=64 if architecture(hidden.device) == 0 else 1024, num_warps=4, **FP_FUSION,
            )  # fmt: skip
    return out


def fused_forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    anchor: Tensor,
    inv_temperature: Tensor,
    bias: Tensor | None,
    softcap: float,
) -> Tensor:
    """Returns the stats (4, T) of anchored_rows' forward for the logits hidden @ weight.T, which are never written.

    hidden (T, D) is bf16, fp16 or fp32, and weight (V, D) is cast to the same; anchor (see `target_logits`) and
    inv_temperature, both (T,), are fp32; target (T,) is int64 and bias (V,) of any floating dtype.
    """
    weight = weight.to(hidden.dtype)
    aligned = _aligned(hidden) and _aligned(weight)
    tile = _tile(hidden, softcap, aligned)
    descriptors = aligned and TILES[architecture(hidden.device)].descriptors
    columns, depth = weight.shape
    column_tiles = triton.cdiv(columns, tile.columns)
    # more splits would keep all multiprocessors busy with a single tile of rows, but double the partial sums
    tiles_of_split = max(1, 2 * column_tiles // _processors(hidden.device))
    splits = triton.cdiv(column_tiles, tiles_of_split)
    target, anchor, inv_temperature = target.contiguous(), anchor.contiguous(), inv_temperature.contiguous()
    bias = None if bias is None else bias.contiguous()
    stats = torch.empty(4, hidden.shape[0], dtype=torch.float32, device=hidden.device)
    with torch.cuda.device_of(hidden):
        w = TensorDescriptor.from_tensor(weight, [tile.columns, tile.depth]) if descriptors else weight
        for begin in range(0, hidden.shape[0], ROWS_OF_LAUNCH):
            some = slice(begin, begin + ROWS_OF_LAUNCH)
            h = hidden[some]
            rows = h.shape[0]
            partial = torch.empty(splits, 4, rows, dtype=torch.float32, device=hidden.device)
            _linear_logprob_fwd_kernel[(min(_processors(hidden.device), triton.cdiv(rows, tile.rows) * splits),)](
                TensorDescriptor.from_tensor(h, [tile.rows, tile.depth]) if descriptors else h,
                h.stride(0), h.stride(1), w, weight.stride(0), weight.stride(1),
                target[some], anchor[some], inv_temperature[some], bias, partial,
                rows, columns, depth, splits, tiles_of_split, SOFTCAP=softcap, DESCRIPTORS=descriptors,
                BLOCK_T=tile.rows, BLOCK_V=tile.columns, BLOCK_D=tile.depth, GROUP=tile.group,
                num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.registers, **FP_FUSION,
            )  # fmt: skip
            _linear_logprob_merge_kernel[(triton.cdiv(rows, 16),)](
                partial, anchor[some], inv_temperature[some], stats[:, some], stats.stride(0), rows, splits,
                SPLITS=triton.next_power_of_2(splits), BLOCK_T=16, num_warps=4, **FP_FUSION,
            )  # fmt: skip
    return stats
