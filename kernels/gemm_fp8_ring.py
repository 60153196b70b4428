"""Products of 9 to 128 rows of e4m3 numbers on Hopper, in Gluon: y^T = W x^T through a ring of blocks of K in shared memory.

A program has 128 of the weight's rows. One of its warp groups copies them and x, a block of 128 of K at a time, into what is
free of the ring; the two others multiply 64 rows each by wgmma. So the memory is asked for more while the
tensor cores work, which Triton's own loops, waiting for every product, do not do. Where there are few tiles their K is split, and
the last program of a tile adds the sums up in their order, as split_k.py says.

The tensor cores add e4m3 products in fewer bits than float32 has (arXiv 2412.19437, section 3.3.2), so their sums are taken
over 128 of K only, and those are added up in float32.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma

from kernels.formats import FP8_BLOCK
from kernels.hopper import (
    GROUP,
    MOST_BESIDE,
    SHARED_BYTES,
    add_splits,
    arrive_when_copied,
    async_load,
    await_operands,
    block_m,
    lines,
    processors,
    takes,
)
from kernels.overlap import after, launch_options, overlaps
from kernels.split_k import counters

BLOCK_N = 128       # of the weight's rows


@gluon.jit
def _bring(x, weight, sizes, span, rings, bars, OVERLAP: gl.constexpr):
    """Blocks begin to end of K. The first of the weights are asked for before the wait for the kernel that makes x."""
    M, K, x_stride = sizes
    tile, begin, end = span
    weights, columns = rings
    ready, free = bars
    STAGES: gl.constexpr = weights.shape[0]
    BLOCK_K: gl.constexpr = weights.shape[2]
    by: gl.constexpr = lines(BLOCK_K, 16)
    r = gl.arange(0, weights.shape[1], gl.SliceLayout(1, by))
    m = gl.arange(0, columns.shape[1], gl.SliceLayout(1, by))
    k = begin * BLOCK_K + gl.arange(0, BLOCK_K, gl.SliceLayout(0, by))
    weight_at = weight + ((tile * 128 + r).to(gl.int64)[:, None] * K + k[None, :])
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
def _multiply(half: gl.constexpr, scales, ends, sizes, span, rings, bars, SPLIT: gl.constexpr, BIAS: gl.constexpr,
              BLOCKS: gl.constexpr):
    """Rows 64 half .. 64 half + 64 of the tile's."""
    M, K, _ = sizes
    tile, begin, end = span
    weights, columns = rings
    ready, free = bars
    STAGES: gl.constexpr = weights.shape[0]
    BLOCK_K: gl.constexpr = weights.shape[2]
    BLOCK_M: gl.constexpr = columns.shape[1]
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
        product = warpgroup_mma(rows, columns.index(stage).permute((1, 0)), acc, use_acc=False)
        mbarrier.arrive(free.index(stage), count=1)
        if BLOCKS:
            x_scale = gl.load(x_scales + gl.minimum(m, M - 1) * (K // BLOCK_K) + begin + turn)
            acc += product * (x_scale * gl.load(weight_scales + tile * (K // BLOCK_K) + begin + turn))[None, :]
        else:
            acc += product
    if not BLOCKS:
        acc *= gl.load(weight_scales + tile * 128 + r)[:, None]
        acc *= gl.load(x_scales + gl.minimum(m, M - 1))[None, :]
    _finish(acc, ends, M, tile, half, r, m, SPLIT, BIAS)


@gluon.jit
def _finish(acc, ends, M, tile, half: gl.constexpr, r, m, SPLIT: gl.constexpr, BIAS: gl.constexpr):
    """Write the sums, float32 [64, BLOCK_M] of rows r of the tile, to out [M, N], bias added; SPLIT: as split_k.finish."""
    bias, out, partial, arrived, splits, split = ends
    N = gl.num_programs(0) * 128
    at = m[None, :] * N + tile * 128 + r[:, None]
    inside = (m < M)[None, :]
    last = True
    if SPLIT:
        acc, last = add_splits(acc, partial, at, M * N, inside, arrived + tile * 2 + half, split, splits)
    if last:
        if BIAS:
            acc += gl.load(bias + tile * 128 + r).to(gl.float32)[:, None]
        gl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


@gluon.jit(do_not_specialize=["M", "splits"])
def _product_kernel(x, x_scales, weight, weight_scales, bias, out, partial, arrived, M, K, x_stride, splits,
                    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
                    SPLIT: gl.constexpr, BIAS: gl.constexpr, BLOCKS: gl.constexpr, OVERLAP: gl.constexpr,
                    MULTIPLYING: gl.constexpr, BRINGING: gl.constexpr):
    """Programs are (tile of the weight's rows, split of K)."""
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
    sizes = M, K, x_stride
    span = tile, split * blocks // splits, (split + 1) * blocks // splits
    rings = weights, columns
    bars = ready, free
    scales = x_scales, weight_scales
    ends = bias, out, partial, arrived, splits, split
    gl.warp_specialize([(_multiply, (0, scales, ends, sizes, span, rings, bars, SPLIT, BIAS, BLOCKS)),
                        (_multiply, (1, scales, ends, sizes, span, rings, bars, SPLIT, BIAS, BLOCKS)),
                        (_bring, (x, weight, sizes, span, rings, bars, OVERLAP))],
                       [4, 4], [MULTIPLYING, BRINGING])


class Tile(NamedTuple):
    """How a product is cut, and how many programs share a multiprocessor: 1 or 2."""

    splits: int         # programs that share K
    stages: int
    programs: int


MOST_ROWS = 128     # of x: what there are registers for
# Registers of a thread: what the warps of so many programs have on average, and how those that multiply and bring share it.
REGISTERS = {1: (168, 216, 72), 2: (80, 96, 48)}


@cache
def tile_of(rows: int, features: int, depth: int, chips: int) -> Tile | None:
    """The tile for rows of x and a weight [features, depth] on so many multiprocessors; None: not for this kernel.

    Guessed so far: jobs/bench/quantized.py --only ring --sweep measures all.
    """
    if rows > MOST_ROWS or features % BLOCK_N or depth % FP8_BLOCK:
        return None
    tiles, blocks = features // BLOCK_N, depth // FP8_BLOCK
    programs = 2 if tiles > chips and rows <= MOST_BESIDE else 1
    stages = most_stages(rows, programs)
    return Tile(max(1, min(programs * chips // tiles, blocks // stages)), stages, programs)


def most_stages(rows: int, programs: int) -> int:
    """Blocks that fit into a program's share of a multiprocessor, up to 8."""
    return min((SHARED_BYTES // programs - 1024) // ((BLOCK_N + block_m(rows)) * FP8_BLOCK), 8)


def tile_for(x: Tensor, features: int, dtype: torch.dtype) -> Tile | None:
    """tile_of x; None too where the device or the dtype of the result is none for this kernel."""
    if dtype.itemsize != 2 or not takes(x):
        return None
    return tile_of(x.shape[0], features, x.shape[1], processors(x.device))


def product(x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype,
            tile: Tile) -> Tensor:
    """x [M, K] times the weight [N, K], both e4m3 -> [M, N] of the dtype, of 16 bits; rows of x may be strided.

    M up to MOST_ROWS, N and K multiples of 128. x_scales and weight_scales: float32 [M] and [N], or, of blocks, [M, K / 128] and
    [N / 128, K / 128].
    """
    (rows, depth), features = x.shape, weight.shape[0]
    out = torch.empty((rows, features), dtype=dtype, device=x.device)
    partial = torch.empty((tile.splits, rows, features), dtype=torch.float32, device=x.device) if tile.splits > 1 else out
    registers, multiplying, bringing = REGISTERS[tile.programs]
    _product_kernel[features // BLOCK_N, tile.splits](
        x, x_scales, weight, weight_scales, out if bias is None else bias, out, partial, counters(x.device), rows, depth,
        x.stride(0), tile.splits, BLOCK_M=block_m(rows), BLOCK_N=BLOCK_N, BLOCK_K=FP8_BLOCK, STAGES=tile.stages,
        SPLIT=tile.splits > 1, BIAS=bias is not None, BLOCKS=weight_scales.dim() == 2, MULTIPLYING=multiplying,
        BRINGING=bringing, num_warps=4, maxnreg=registers, **launch_options(overlaps(x.device)))
    return out
