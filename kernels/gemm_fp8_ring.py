"""Products of 9 to 128 rows of e4m3 numbers on Hopper, in Gluon: y^T = W x^T through a ring of blocks of K in shared memory.

A program has 64 of the weight's rows. Two of its warps copy them, 128 of K at a time, into what is free of the ring, and two
copy x; a warp group multiplies by wgmma. So the memory is asked for more while the tensor cores work, which Triton's own loops,
waiting for every product, do not do; and the ring is filled with weights before the kernel that makes x has finished. K may be
split, and the last program of a tile adds the sums up in their order, as split_k.py says.

GATED: the weight is [gate | up], a program has 64 rows of each, and writes their gated activation.

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
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from kernels.formats import FP8_BLOCK
from kernels.hopper import (
    MOST_BESIDE,
    SHARED_BYTES,
    WARPS,
    arrive_when_copied,
    async_load,
    await_operands,
    block_m,
    finish,
    lines,
    processors,
    takes,
)
from kernels.overlap import after, launch_options, overlaps, prefetch
from kernels.pointwise import gate
from kernels.split_k import counters

ONCE = gl.constexpr(gl.BlockedLayout([1], [32], [2], [0]))      # a number a thread of theirs


@gluon.jit
def _bring_weights(weight, scales, K, span, ring, of_scales, bars, BLOCKS: gl.constexpr):
    """Blocks begin to end of K. Nothing here waits for the kernel before: no kernel writes weights."""
    tile, begin, end = span
    ready, free = bars
    STAGES: gl.constexpr = ready.shape[0]
    PARTS: gl.constexpr = ring.shape[0] // STAGES
    BLOCK_N: gl.constexpr = ring.shape[1]
    BLOCK_K: gl.constexpr = ring.shape[2]
    by: gl.constexpr = lines(BLOCK_K, 16, WARPS)
    n = tile * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, by))
    k = begin * BLOCK_K + gl.arange(0, BLOCK_K, gl.SliceLayout(0, by))
    to_up = gl.num_programs(0) * BLOCK_N        # rows
    at = ()  # type: tuple
    for part in gl.static_range(PARTS):
        at += (weight + ((n + part * to_up).to(gl.int64)[:, None] * K + k[None, :]),)
        if not BLOCKS:
            async_load(of_scales.index(part), scales + (tile * BLOCK_N + part * to_up + gl.arange(0, BLOCK_N, ONCE)))
    for turn in range(end - begin):
        stage = turn % STAGES
        if turn >= STAGES:
            mbarrier.wait(free.index(stage), turn // STAGES & 1 ^ 1)
        for part in gl.static_range(PARTS):
            async_load(ring.index(stage * PARTS + part), at[part] + turn * BLOCK_K, eviction_policy="evict_first")
        if BLOCKS:      # the same for each row of x
            SAME: gl.constexpr = of_scales.shape[1]
            block = tile * BLOCK_N // BLOCK_K * (K // BLOCK_K) + begin + turn
            async_load(of_scales.index(stage), scales + gl.full([SAME], block, gl.int32, ONCE))
        arrive_when_copied(ready.index(stage))


@gluon.jit
def _bring_x(x, scales, sizes, span, ring, of_scales, bars, BLOCKS: gl.constexpr, OVERLAP: gl.constexpr):
    M, K, x_stride = sizes
    _, begin, end = span
    ready, free = bars
    STAGES: gl.constexpr = ready.shape[0]
    BLOCK_M: gl.constexpr = ring.shape[1]
    BLOCK_K: gl.constexpr = ring.shape[2]
    by: gl.constexpr = lines(BLOCK_K, 16, WARPS)
    m = gl.arange(0, BLOCK_M, gl.SliceLayout(1, by))
    k = begin * BLOCK_K + gl.arange(0, BLOCK_K, gl.SliceLayout(0, by))
    row = gl.arange(0, BLOCK_M, ONCE)
    after(OVERLAP)
    if not BLOCKS:
        async_load(of_scales.index(0), scales + row, mask=row < M)
    for turn in range(end - begin):
        stage = turn % STAGES
        if turn >= STAGES:
            mbarrier.wait(free.index(stage), turn // STAGES & 1 ^ 1)
        async_load(ring.index(stage), x + (m[:, None] * x_stride + k[None, :] + turn * BLOCK_K), mask=(m < M)[:, None])
        if BLOCKS:
            async_load(of_scales.index(stage), scales + (row * (K // BLOCK_K) + begin + turn), mask=row < M)
        arrive_when_copied(ready.index(stage))


@gluon.jit
def _begin(rows, columns, SUMS: gl.constexpr):
    """The product of a block of the weight's rows and the one of x."""
    BLOCK_M: gl.constexpr = columns.shape[0]
    none = gl.zeros([64, BLOCK_M], gl.float32, SUMS)
    return warpgroup_mma(rows, columns.permute((1, 0)), none, use_acc=False, is_async=True)


@gluon.jit
def _ask(turn, rings, ready, SUMS: gl.constexpr):
    """A block's product, begun as soon as it is there."""
    weights, columns, _, _ = rings
    STAGES: gl.constexpr = ready.shape[0]
    stage = turn % STAGES
    await_operands(ready.index(stage), turn // STAGES & 1)
    return _begin(weights.index(stage), columns.index(stage), SUMS)


@gluon.jit
def _add(acc, product, turn, rings, free, BLOCKS: gl.constexpr, SUMS: gl.constexpr):
    """acc and a product that is there. Its block is given back."""
    _, _, weight_scales, x_scales = rings
    STAGES: gl.constexpr = free.shape[0]
    stage = turn % STAGES
    if BLOCKS:
        columns: gl.constexpr = gl.SliceLayout(0, SUMS)
        product *= (x_scales.index(stage).load(columns) * weight_scales.index(stage).load(columns))[None, :]
    mbarrier.arrive(free.index(stage), count=1)
    return acc + product


@gluon.jit
def _multiply(ends, M, span, rings, bars, SPLIT: gl.constexpr, BIAS: gl.constexpr, BLOCKS: gl.constexpr):
    """Two blocks a turn: a product is added while the tensor cores have the next one.

    At the end of a turn none is with them: the compiler would wait for each instruction if it had to follow them around the loop.
    """
    tile, begin, end = span
    _, columns, weight_scales, x_scales = rings
    ready, free = bars
    BLOCK_M: gl.constexpr = columns.shape[1]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 32])
    acc = gl.zeros([64, BLOCK_M], gl.float32, SUMS)
    turns = end - begin
    paired = turns // 2 * 2
    for turn in range(0, paired, 2):
        first = _ask(turn, rings, ready, SUMS)
        second = _ask(turn + 1, rings, ready, SUMS)
        first = warpgroup_mma_wait(1, deps=(first,))
        acc = _add(acc, first, turn, rings, free, BLOCKS, SUMS)
        second = warpgroup_mma_wait(0, deps=(second,))
        acc = _add(acc, second, turn + 1, rings, free, BLOCKS, SUMS)
    for turn in range(paired, turns):
        product = warpgroup_mma_wait(0, deps=(_ask(turn, rings, ready, SUMS),))
        acc = _add(acc, product, turn, rings, free, BLOCKS, SUMS)
    if not BLOCKS:
        acc *= weight_scales.index(0).load(gl.SliceLayout(1, SUMS))[:, None]
        acc *= x_scales.index(0).load(gl.SliceLayout(0, SUMS))[None, :]
    # As many of the splits' sums at once as there were products.
    finish(acc, tile, (M, gl.num_programs(0) * 64), ends, SPLIT, BIAS, SUMS, max(4096, 128 * BLOCK_M))


@gluon.jit
def _multiply_gated(ends, M, span, rings, bars, GELU: gl.constexpr):
    """One block a turn, of gate and of up: gate's product is added while the tensor cores have the other."""
    tile, begin, end = span
    weights, columns, weight_scales, x_scales = rings
    ready, free = bars
    STAGES: gl.constexpr = ready.shape[0]
    BLOCK_M: gl.constexpr = columns.shape[1]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 32])
    DTYPE: gl.constexpr = ends[1].dtype.element_ty
    low, up = gl.zeros([64, BLOCK_M], gl.float32, SUMS), gl.zeros([64, BLOCK_M], gl.float32, SUMS)
    for turn in range(end - begin):
        stage = turn % STAGES
        await_operands(ready.index(stage), turn // STAGES & 1)
        first = _begin(weights.index(2 * stage), columns.index(stage), SUMS)
        second = _begin(weights.index(2 * stage + 1), columns.index(stage), SUMS)
        first = warpgroup_mma_wait(1, deps=(first,))
        low += first
        second = warpgroup_mma_wait(0, deps=(second,))
        mbarrier.arrive(free.index(stage), count=1)
        up += second
    x_scale = x_scales.index(0).load(gl.SliceLayout(0, SUMS))[None, :]
    low *= weight_scales.index(0).load(gl.SliceLayout(1, SUMS))[:, None] * x_scale
    up *= weight_scales.index(1).load(gl.SliceLayout(1, SUMS))[:, None] * x_scale
    # Rounded where the separate kernels round.
    y = gate(low.to(DTYPE).to(gl.float32), up.to(DTYPE).to(gl.float32), GELU, DTYPE).to(gl.float32)
    finish(y, tile, (M, gl.num_programs(0) * 64), ends, False, False, SUMS)


@gluon.jit(do_not_specialize=["M", "splits"])
def _product_kernel(x, x_scales, weight, weight_scales, bias, out, partial, arrived, M, K, x_stride, splits,
                    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
                    SPLIT: gl.constexpr, BIAS: gl.constexpr, BLOCKS: gl.constexpr, GATED: gl.constexpr, GELU: gl.constexpr,
                    OVERLAP: gl.constexpr, BRINGING: gl.constexpr):
    """Programs are (tile of the weight's rows, split of K)."""
    DTYPE: gl.constexpr = weight.dtype.element_ty
    PARTS: gl.constexpr = 2 if GATED else 1     # gate and up
    tile, split = gl.program_id(0), gl.program_id(1)
    blocks = K // BLOCK_K
    begin, end = split * blocks // splits, (split + 1) * blocks // splits
    # The L2 has been asked for the first blocks when there is a ring to copy them into, which takes a while.
    n = tile * BLOCK_N + gl.arange(0, BLOCK_N, gl.BlockedLayout([1], [32], [4], [0]))
    for block in gl.static_range(STAGES):
        for part in gl.static_range(PARTS):
            row = (n + part * gl.num_programs(0) * BLOCK_N).to(gl.int64)
            prefetch(weight + (row * K + gl.minimum(begin + block, end - 1) * BLOCK_K))
    of_weights: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_K], DTYPE)
    of_columns: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_K], DTYPE)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    weights = gl.allocate_shared_memory(DTYPE, [STAGES * PARTS, BLOCK_N, BLOCK_K], of_weights)
    columns = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, BLOCK_K], of_columns)
    # Through shared memory too: the compiler puts off loads into registers to where they are waited for.
    of_rows = gl.allocate_shared_memory(gl.float32, [STAGES if BLOCKS else PARTS, BLOCK_M if BLOCKS else BLOCK_N], flat)
    of_x = gl.allocate_shared_memory(gl.float32, [STAGES if BLOCKS else 1, BLOCK_M], flat)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=2 * 32 * WARPS)
        mbarrier.init(free.index(stage), count=1)
    sizes = M, K, x_stride
    span = tile, begin, end
    rings = weights, columns, of_rows, of_x
    bars = ready, free
    ends = bias, out, partial, arrived, splits, split
    if GATED:       # all is written out in both: functions have no variables, and in a named tuple BLOCKS is no constant
        gl.warp_specialize([(_multiply_gated, (ends, M, span, rings, bars, GELU)),
                            (_bring_weights, (weight, weight_scales, K, span, weights, of_rows, bars, BLOCKS)),
                            (_bring_x, (x, x_scales, sizes, span, columns, of_x, bars, BLOCKS, OVERLAP))],
                           [WARPS, WARPS], [BRINGING, BRINGING])
    else:
        gl.warp_specialize([(_multiply, (ends, M, span, rings, bars, SPLIT, BIAS, BLOCKS)),
                            (_bring_weights, (weight, weight_scales, K, span, weights, of_rows, bars, BLOCKS)),
                            (_bring_x, (x, x_scales, sizes, span, columns, of_x, bars, BLOCKS, OVERLAP))],
                           [WARPS, WARPS], [BRINGING, BRINGING])


class Tile(NamedTuple):
    """How a product is cut: programs that share K, blocks in the ring, and programs on a multiprocessor."""

    splits: int
    stages: int
    programs: int


MOST_ROWS = 128     # of x
BLOCK_N = 64        # of the weight's
# Registers of a thread, by the programs on a multiprocessor: on average, and of those that bring.
REGISTERS = {1: (168, 96), 2: (120, 72)}


@cache
def tile_of(rows: int, features: int, depth: int, chips: int, blocks: bool = False, gated: bool = False) -> Tile | None:
    """The tile for rows of x and a weight [features, depth] on so many multiprocessors; None: not for this kernel.

    gated: the weight is [gate | up]. As jobs/bench/quantized.py --only ring --sweep measured them on an H100 for the shapes of
    Mistral-7B, and gated ones in a step.
    """
    parts = 2 if gated else 1
    many = features // (BLOCK_N * parts) > chips
    if rows > (MOST_BESIDE if many else MOST_ROWS) or features % 128 or depth % FP8_BLOCK:
        return None
    if gated and not many:
        return None
    programs = 2 if many else 1
    splits = 2 if rows > MOST_BESIDE and depth > 1 << 13 else 1
    return Tile(splits, most_stages(rows, programs, blocks, parts), programs)


def most_stages(rows: int, programs: int, blocks: bool = False, parts: int = 1) -> int:
    """Blocks that fit into a program's share of a multiprocessor, up to 12, beside row scales and what y goes through."""
    m, outputs = block_m(rows), BLOCK_N * parts
    stage, rest = (m + outputs) * FP8_BLOCK + 16, 2 * m * BLOCK_N
    stage, rest = (stage + 8 * m, rest) if blocks else (stage, rest + 4 * (m + outputs))
    return min((SHARED_BYTES // programs - rest) // stage, 12)


def tile_for(x: Tensor, features: int, dtype: torch.dtype, blocks: bool, gated: bool = False) -> Tile | None:
    """tile_of x; None too where the device or the dtype of the result is none for this kernel."""
    if dtype.itemsize != 2 or not takes(x):
        return None
    return tile_of(x.shape[0], features, x.shape[1], processors(x.device), blocks, gated)


def product(x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype,
            tile: Tile, activation: str = "") -> Tensor:
    """x [M, K] times the weight [N, K], both e4m3 -> [M, N] of the dtype, of 16 bits; rows of x may be strided.

    With an activation its gated_act, [M, N / 2], of row scales, without splits or a bias.
    M up to MOST_ROWS, with two programs MOST_BESIDE; N and K multiples of 128.
    x_scales and weight_scales: float32 [M] and [N], or, of blocks, [M, K / 128] and [N / 128, K / 128].
    """
    (rows, depth), features = x.shape, weight.shape[0]
    m, parts = block_m(rows), 2 if activation else 1
    out = torch.empty((rows, features // parts), dtype=dtype, device=x.device)
    partial = torch.empty((tile.splits, features, m), dtype=torch.float32, device=x.device) if tile.splits > 1 else out
    registers, bringing = REGISTERS[tile.programs]
    _product_kernel[features // (BLOCK_N * parts), tile.splits](
        x, x_scales, weight, weight_scales, out if bias is None else bias, out, partial, counters(x.device), rows, depth,
        x.stride(0), tile.splits, BLOCK_M=m, BLOCK_N=BLOCK_N, BLOCK_K=FP8_BLOCK, STAGES=tile.stages, SPLIT=tile.splits > 1,
        BIAS=bias is not None, BLOCKS=weight_scales.dim() == 2, GATED=bool(activation), GELU=activation == "gelu_tanh",
        BRINGING=bringing, num_warps=4, maxnreg=registers, **launch_options(overlaps(x.device)))
    return out
