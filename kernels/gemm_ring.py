"""Products of 9 to 256 rows with dense weights, 128 with FP8 ones, on Hopper, in Gluon: y^T = W x^T through a ring of blocks.

A program has 128 of the weight's rows. One of its warp groups copies them and x, a block of 128 bytes of each row at a time, into
what is free of a ring in shared memory; the two others multiply 64 rows each by wgmma. So the memory is asked for more while the
tensor cores work, which Triton's own loops, waiting for every product, do not do. Where there are few tiles their K is split, and
the last program of a tile adds the sums up in their order, as split_k.py says.

FP8: the tensor cores add e4m3 products in fewer bits than float32 has (arXiv 2412.19437, section 3.3.2), so their sums are taken
over 128 of K only, and those are added up in float32.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from kernels import hopper
from kernels.hopper import SHARED_BYTES, arrive_when_copied, async_load, await_operands, barrier, lines, processors
from kernels.overlap import after, launch_options, overlaps
from kernels.pointwise import gate
from kernels.shapes import next_power_of_2
from kernels.split_k import counters

GROUP = gl.constexpr(hopper.GROUP)
BLOCK_N = 128           # of the weight's rows
BLOCK_BYTES = 128       # of each row at a time


@gluon.jit
def _weight_row(tile, r, width, GATED: gl.constexpr):
    """The weight's row of row r, 0 to 127, of a tile. GATED: gate's and up's, `width` apart, in turns of 8: a lane has both."""
    return tile * 64 + r // 16 * 8 + r % 8 + r // 8 % 2 * width if GATED else tile * 128 + r


@gluon.jit
def _bring(x, weight, sizes, span, rings, bars, GATED: gl.constexpr, OVERLAP: gl.constexpr):
    """Blocks begin to end of K. The first of the weights are asked for before the wait for the kernel that makes x."""
    M, K, x_stride, width = sizes
    tile, begin, end = span
    weights, columns = rings
    ready, free = bars
    STAGES: gl.constexpr = weights.shape[0]
    BLOCK_K: gl.constexpr = weights.shape[2]
    by: gl.constexpr = lines(BLOCK_K, BLOCK_K // 8)             # 16 bytes a thread
    r = gl.arange(0, weights.shape[1], gl.SliceLayout(1, by))
    m = gl.arange(0, columns.shape[1], gl.SliceLayout(1, by))
    k = begin * BLOCK_K + gl.arange(0, BLOCK_K, gl.SliceLayout(0, by))
    weight_at = weight + (_weight_row(tile, r, width, GATED).to(gl.int64)[:, None] * K + k[None, :])
    x_at = x + (gl.minimum(m, M - 1)[:, None] * x_stride + k[None, :])
    turns = end - begin
    for turn in range(gl.minimum(turns, STAGES)):
        async_load(weights.index(turn), weight_at + turn * BLOCK_K, eviction_policy="evict_first")
    after(OVERLAP)
    for turn in range(turns):
        stage = turn % STAGES
        if turn >= STAGES:
            mbarrier.wait(free.index(stage), turn // STAGES & 1 ^ 1)
            async_load(weights.index(stage), weight_at + turn * BLOCK_K, eviction_policy="evict_first")
        async_load(columns.index(stage), x_at + turn * BLOCK_K)
        arrive_when_copied(ready.index(stage))


@gluon.jit
def _multiply(half: gl.constexpr, scales, ends, sizes, span, rings, bars, SPLIT: gl.constexpr, GATED: gl.constexpr,
              GELU: gl.constexpr, BIAS: gl.constexpr, BLOCKS: gl.constexpr):
    """Rows 64 half .. 64 half + 64 of the tile's."""
    M, K, _, width = sizes
    tile, begin, end = span
    weights, columns = rings
    ready, free = bars
    STAGES: gl.constexpr = weights.shape[0]
    BLOCK_K: gl.constexpr = weights.shape[2]
    BLOCK_M: gl.constexpr = columns.shape[1]
    FP8: gl.constexpr = weights.dtype == gl.float8e4nv
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, BLOCK_K // 4])
    m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, SUMS))
    r = half * 64 + gl.arange(0, 64, gl.SliceLayout(1, SUMS))
    x_scales, weight_scales = scales
    acc = gl.zeros([64, BLOCK_M], gl.float32, SUMS)
    turns = end - begin
    for turn in range(turns):
        stage = turn % STAGES
        await_operands(ready.index(stage), turn // STAGES & 1)
        rows = weights.index(stage).slice(half * 64, 64)
        if FP8:
            product = warpgroup_mma(rows, columns.index(stage).permute((1, 0)), acc, use_acc=False)
            mbarrier.arrive(free.index(stage), count=1)
            if BLOCKS:
                x_scale = gl.load(x_scales + gl.minimum(m, M - 1) * (K // BLOCK_K) + begin + turn)
                acc += product * (x_scale * gl.load(weight_scales + tile * (K // BLOCK_K) + begin + turn))[None, :]
            else:
                acc += product
        else:
            acc = warpgroup_mma(rows, columns.index(stage).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            if turn > 0:
                mbarrier.arrive(free.index((turn - 1) % STAGES), count=1)
    if not FP8:
        acc = warpgroup_mma_wait(0, deps=(acc,))
    elif not BLOCKS:
        acc *= gl.load(weight_scales + _weight_row(tile, r, width, GATED))[:, None]
        acc *= gl.load(x_scales + gl.minimum(m, M - 1))[None, :]
    _finish(acc, ends, M, width, tile, half, r, m, SPLIT, GATED, GELU, BIAS)


@gluon.jit
def add_splits(acc, partial, at, size, inside, counter, split, splits):
    """This group's sums, or, if its program is the last of its splits, those of all in their order: (sums, whether it is).

    `at`: where in partial split 0 leaves its sums, `size` elements before the next one's; of few tiles, so that int32 counts
    them. The counter is 0 before and after.
    """
    gl.store(partial + (at + split * size), acc, mask=inside)
    barrier()      # all of the group's stores come before its ticket
    last = gl.atomic_add(counter, 1, sem="acq_rel") == splits - 1
    if last:
        acc = gl.zeros_like(acc)
        AT_ONCE: gl.constexpr = max(1, 4096 // (acc.shape[0] * acc.shape[1]))       # splits whose loads are in flight together
        for first in range(0, splits, AT_ONCE):
            for other in gl.static_range(AT_ONCE):
                there = inside & (first + other < splits)
                acc += gl.load(partial + (at + (first + other) * size), mask=there, other=0.0, cache_modifier=".cg")
        gl.store(counter, 0)
    return acc, last


@gluon.jit
def _finish(acc, ends, M, width, tile, half: gl.constexpr, r, m, SPLIT: gl.constexpr, GATED: gl.constexpr, GELU: gl.constexpr,
            BIAS: gl.constexpr):
    """Write the sums, float32 [64, BLOCK_M] of rows r of the tile, to out [M, width], bias added; SPLIT: as split_k.finish."""
    bias, out, partial, arrived, splits, split = ends
    BLOCK_M: gl.constexpr = acc.shape[1]
    DTYPE: gl.constexpr = out.dtype.element_ty
    inside = (m < M)[None, :]
    last = True
    if SPLIT:
        N = gl.num_programs(0) * 128
        at = m[None, :] * N + tile * 128 + r[:, None]
        acc, last = add_splits(acc, partial, at, M * N, inside, arrived + tile * 2 + half, split, splits)
    if last:
        row = _weight_row(tile, r, width, GATED)
        if BIAS:
            acc += gl.load(bias + row).to(gl.float32)[:, None]
        if GATED:       # rounded where the separate kernels round
            flat: gl.constexpr = gl.BlockedLayout([1, BLOCK_M // 4], [32, 1], [1, 4], [0, 1])
            pairs = gl.permute(gl.reshape(acc.to(DTYPE).to(gl.float32), [4, 2, 8, BLOCK_M]), [0, 2, 3, 1])
            low, up = gl.split(pairs)
            y = gl.convert_layout(gl.reshape(gate(low, up, GELU, DTYPE), [32, BLOCK_M]), flat)
            n = tile * 64 + half * 32 + gl.arange(0, 32, gl.SliceLayout(1, flat))
            line = gl.arange(0, BLOCK_M, gl.SliceLayout(0, flat))
            gl.store(out + (line[None, :] * width + n[:, None]), y.to(DTYPE), mask=(line < M)[None, :])
        else:
            gl.store(out + (m[None, :] * width + row[:, None]), acc.to(DTYPE), mask=inside)


@gluon.jit(do_not_specialize=["M", "splits"])
def _product_kernel(x, x_scales, weight, weight_scales, bias, out, partial, arrived, M, K, width, x_stride, splits,
                    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
                    SPLIT: gl.constexpr, GATED: gl.constexpr, GELU: gl.constexpr, BIAS: gl.constexpr, BLOCKS: gl.constexpr,
                    OVERLAP: gl.constexpr, MULTIPLYING: gl.constexpr, BRINGING: gl.constexpr):
    """Programs are (tile of the weight's rows, split of K). width: outputs, with GATED half the weight's rows."""
    DTYPE: gl.constexpr = weight.dtype.element_ty
    tile, split = gl.program_id(0), gl.program_id(1)
    blocks = K // BLOCK_K
    of_weights: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_K], DTYPE)
    of_columns: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_K], DTYPE)
    weights = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, BLOCK_K], of_weights)
    columns = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, BLOCK_K], of_columns)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=GROUP)
        mbarrier.init(free.index(stage), count=2)       # both groups have read it
    sizes = M, K, x_stride, width
    span = tile, split * blocks // splits, (split + 1) * blocks // splits
    rings = weights, columns
    bars = ready, free
    scales = x_scales, weight_scales
    ends = bias, out, partial, arrived, splits, split
    gl.warp_specialize([(_multiply, (0, scales, ends, sizes, span, rings, bars, SPLIT, GATED, GELU, BIAS, BLOCKS)),
                        (_multiply, (1, scales, ends, sizes, span, rings, bars, SPLIT, GATED, GELU, BIAS, BLOCKS)),
                        (_bring, (x, weight, sizes, span, rings, bars, GATED, OVERLAP))],
                       [4, 4], [MULTIPLYING, BRINGING])


class Tile(NamedTuple):
    """How a product is cut, and how many programs share a multiprocessor: 1 or 2."""

    splits: int         # programs that share K
    stages: int
    programs: int


LEAST_ROWS = 9                  # of x
MOST_ROWS = {1: 128, 2: 256}    # by the bytes of an element: what there are registers for
# Registers of a thread: what the warps of so many programs have on average, and how those that multiply and bring share it.
REGISTERS = {1: (168, 216, 72), 2: (80, 96, 48)}
MOST_BESIDE = 64                # rows of x for two programs on a multiprocessor


@cache
def tile_of(rows: int, features: int, depth: int, itemsize: int, chips: int) -> Tile | None:
    """The tile for rows of x and a weight [features, depth] on so many multiprocessors; None: not for this kernel.

    Guessed so far: jobs/bench/quantized.py --only ring --sweep measures all.
    """
    block = BLOCK_BYTES // itemsize
    if rows > MOST_ROWS[itemsize] or features % BLOCK_N or depth % block:
        return None
    tiles, blocks = features // BLOCK_N, depth // block
    programs = 2 if tiles > chips and rows <= MOST_BESIDE else 1
    stages = most_stages(rows, programs)
    return Tile(max(1, min(programs * chips // tiles, blocks // stages)), stages, programs)


def most_stages(rows: int, programs: int) -> int:
    """Blocks that fit into a program's share of a multiprocessor, up to 8; 4 KB are left for what a gated sum goes through."""
    return min((SHARED_BYTES // programs - (5 << 10)) // ((BLOCK_N + block_m(rows)) * BLOCK_BYTES), 8)


def block_m(rows: int) -> int:
    """Rows of x that a program has room for."""
    return max(16, next_power_of_2(rows))


def takes(x: Tensor) -> bool:
    """Whether x is where and what these kernels are made for: on a Hopper, copied 16 bytes at a time.

    Triton knows of a stride whether 16 divides it, and of no smaller power of two.
    """
    whole = x.element_size() <= 2 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0
    return whole and x.shape[0] >= LEAST_ROWS and processors(x.device) > 0


def tile_for(x: Tensor, features: int, dtype: torch.dtype) -> Tile | None:
    """tile_of x; None too where the device or the dtype of the result is none for this kernel."""
    if dtype.itemsize != 2 or not takes(x):
        return None
    return tile_of(x.shape[0], features, x.shape[1], x.element_size(), processors(x.device))


def product(x: Tensor, weight: Tensor, bias: Tensor | None, tile: Tile, activation: str = "", x_scales: Tensor | None = None,
            weight_scales: Tensor | None = None, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """x [M, K] times the weight [N, K] of the same dtype -> [M, N]; with an activation its gated_act, [M, N / 2].

    M up to MOST_ROWS, N a multiple of 128, K of 128 bytes; rows of x may be strided. dtype: of the
    result, if not x's; out: where to.
    FP8: x_scales and weight_scales are float32 [M], [N], or of blocks of 128 [M, K / 128], [N / 128, K / 128].
    """
    (rows, depth), features = x.shape, weight.shape[0]
    width = features // 2 if activation else features
    out = torch.empty((rows, width), dtype=dtype or x.dtype, device=x.device) if out is None else out
    partial = torch.empty((tile.splits, rows, features), dtype=torch.float32, device=x.device) if tile.splits > 1 else out
    registers, multiplying, bringing = REGISTERS[tile.programs]
    _product_kernel[features // BLOCK_N, tile.splits](
        x, out if x_scales is None else x_scales, weight, out if weight_scales is None else weight_scales,
        out if bias is None else bias, out, partial, counters(x.device), rows, depth, width, x.stride(0), tile.splits,
        BLOCK_M=block_m(rows), BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_BYTES // x.element_size(), STAGES=tile.stages,
        SPLIT=tile.splits > 1, GATED=bool(activation), GELU=activation == "gelu_tanh", BIAS=bias is not None,
        BLOCKS=weight_scales is not None and weight_scales.dim() == 2, MULTIPLYING=multiplying, BRINGING=bringing,
        num_warps=4, maxnreg=registers, **launch_options(overlaps(x.device)))
    return out
