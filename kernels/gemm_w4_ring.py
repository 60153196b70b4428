"""Products of 9 to 128 rows with 4-bit weights on Hopper, in Gluon: as gemm_fp8_ring.py, but those who multiply unpack codes.

A program has one or two units of gemm_w4.py's packed layout, 128 of the weight's rows each: the more, the less often x is read.
A lane finds what it holds of the left operand as 16 bytes. Weights are scaled before they are multiplied, and so rounded as where
they are unpacked beforehand: all blocks add to one sum, and a left operand is unpacked while the tensor cores have the last one.
Scales and zeros come through the ring too: the compiler puts off loads into registers to where they are waited for.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from kernels.assembly import HALF_OPERANDS, SCALE_BF16, SCALE_FP16
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
from kernels.overlap import after, launch_options, overlaps, prefetch
from kernels.split_k import counters


@gluon.jit
def _bring(x, tables, sizes, span, rings, bars, OVERLAP: gl.constexpr):
    """Blocks begin to end of K. The L2 is asked for the first of the weights before the wait for the kernel that makes x."""
    packed, scales, zeros, stride_g, every = tables
    M, units, x_stride = sizes
    tile, begin, end = span
    weights, columns, of_scales, of_zeros = rings
    ready, free = bars
    STAGES: gl.constexpr = weights.shape[0]
    BLOCK_M: gl.constexpr = columns.shape[1]
    RUNS: gl.constexpr = weights.shape[1]       # of 256 words: 16 rows by 16 words, as a warp holds them
    UNITS: gl.constexpr = RUNS // 16
    of_words: gl.constexpr = lines(256, 8)
    of_x: gl.constexpr = lines(64, 8)
    run, word = gl.arange(0, RUNS, gl.SliceLayout(1, of_words)), gl.arange(0, 256, gl.SliceLayout(0, of_words))
    m, k = gl.arange(0, BLOCK_M, gl.SliceLayout(1, of_x)), gl.arange(0, 64, gl.SliceLayout(0, of_x))
    packed += (begin * units + tile * UNITS) * 4096
    packed_at = packed + (run[:, None] * 256 + word[None, :])
    x_at = x + (m[:, None] * x_stride + (begin * 128 + k)[None, :])
    inside = (m < M)[:, None]
    n = tile * UNITS * 128 + gl.arange(0, UNITS * 128, gl.BlockedLayout([2], [32], [4], [0]))       # 4 bytes a thread: the least
    zero_n = tile * UNITS * 128 + gl.arange(0, UNITS * 128, gl.BlockedLayout([4], [32], [4], [0]))
    turns = end - begin
    line = packed + gl.arange(0, UNITS * 64, gl.BlockedLayout([1], [32], [4], [0])) * 64
    for turn in range(gl.minimum(turns, STAGES)):
        prefetch(line + turn * units * 4096)
    after(OVERLAP)
    for turn in range(turns):
        stage = turn % STAGES
        if turn >= STAGES:
            mbarrier.wait(free.index(stage), turn // STAGES & 1 ^ 1)
        group = (begin + turn) // every * stride_g
        async_load(weights.index(stage), packed_at + turn * units * 4096, eviction_policy="evict_first")
        async_load(of_scales.index(stage), scales + (group + n))
        if of_zeros is not None:
            async_load(of_zeros.index(stage), zeros + (group + zero_n))
        async_load(columns.index(2 * stage), x_at + turn * 128, mask=inside)
        async_load(columns.index(2 * stage + 1), x_at + (turn * 128 + 64), mask=inside)
        arrive_when_copied(ready.index(stage))


@gluon.jit
def _codes(stored, half: gl.constexpr, scale, zero, LEFT: gl.constexpr, DTYPE: gl.constexpr):
    """Two of the four codes of a group's words [4, 256], as they are stored: each less the zeros, by the scales, [64, 16]."""
    words = gl.permute(gl.reshape(stored, [4, 8, 4, 2, 2, 2]), [0, 4, 1, 3, 2, 5])
    words = gl.convert_layout(gl.reshape(words, [64, 16]), LEFT, assert_trivial=True)
    s = gl.broadcast(scale[:, None], words)[0]
    if DTYPE == gl.bfloat16:      # noqa: SIM300
        z = gl.broadcast((zero + 128.0)[:, None], words)[0]
        parts = gl.inline_asm_elementwise(SCALE_BF16[half], HALF_OPERANDS, [words, z, z, s], (gl.bfloat16, gl.bfloat16),
                                          is_pure=True, pack=2)
    else:
        z = gl.broadcast((zero + 1024.0)[:, None], words)[0]
        y = gl.broadcast((-64.0 - zero)[:, None], words)[0]
        parts = gl.inline_asm_elementwise(SCALE_FP16[half], HALF_OPERANDS, [words, z, y, s], (gl.float16, gl.float16),
                                          is_pure=True, pack=2)
    return parts


@gluon.jit
def _beside(a, b):
    """[N, A] and [N, A] -> [N, 2 A]."""
    return gl.reshape(gl.permute(gl.join(a, b), [0, 2, 1]), [a.shape[0], 2 * a.shape[1]])


@gluon.jit
def _left(rows: gl.constexpr, half: gl.constexpr, stage, rings, LEFT: gl.constexpr):
    """The weights of 64 rows and of half of a block's columns, [64, 64], as the tensor cores' left operand."""
    weights, columns, of_scales, of_zeros = rings
    DTYPE: gl.constexpr = columns.dtype
    FIRST: gl.constexpr = rows // 2 * 16 + rows % 2 * 4         # of these rows' runs of words
    words = weights.index(stage)
    scale = of_scales.index(stage).slice(rows * 64, 64).load(gl.SliceLayout(1, LEFT))
    zero = gl.full([64], 8.0, DTYPE, gl.SliceLayout(1, LEFT))
    if of_zeros is not None:
        zero = of_zeros.index(stage).slice(rows * 64, 64).load(gl.SliceLayout(1, LEFT)).to(DTYPE)
    a = _codes(words.slice(FIRST, 4).load(lines(256, 8)), half, scale, zero, LEFT, DTYPE)
    b = _codes(words.slice(FIRST + 8, 4).load(lines(256, 8)), half, scale, zero, LEFT, DTYPE)
    return gl.convert_layout(_beside(_beside(a[0], b[0]), _beside(a[1], b[1])), LEFT, assert_trivial=True)


@gluon.jit
def _multiply(group: gl.constexpr, GROUPS: gl.constexpr, ends, sizes, span, rings, bars, SPLIT: gl.constexpr,
              BIAS: gl.constexpr):
    """One part of the program's rows in GROUPS: 64 of them or two times 64.

    While the tensor cores have one left operand, the next one is unpacked. At the end of a turn none is with them: the compiler
    would wait for each instruction if it had to follow them around the loop.
    """
    M, _, _ = sizes
    tile, begin, end = span
    weights, columns, _, _ = rings
    ready, free = bars
    STAGES: gl.constexpr = weights.shape[0]
    BLOCK_N: gl.constexpr = weights.shape[1] * 8
    BLOCK_M: gl.constexpr = columns.shape[1]
    EACH: gl.constexpr = BLOCK_N // 64 // GROUPS
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    ROWS: gl.constexpr = group * EACH
    bias, out, partial, arrived, splits, split = ends
    first = gl.zeros([64, BLOCK_M], gl.float32, SUMS)
    second = gl.zeros([64, BLOCK_M], gl.float32, SUMS)
    if BIAS:        # once, by the first split
        bias_at = bias + (tile * BLOCK_N + ROWS * 64 + gl.arange(0, 64, gl.SliceLayout(1, SUMS)))
        first += gl.load(bias_at, mask=split == 0, other=0.0).to(gl.float32)[:, None]
        if EACH == 2:
            second += gl.load(bias_at + 64, mask=split == 0, other=0.0).to(gl.float32)[:, None]
    turns = end - begin
    await_operands(ready.index(0), 0)
    a = _left(ROWS, 0, 0, rings, LEFT)
    for turn in range(turns):
        stage = turn % STAGES
        x0, x1 = columns.index(2 * stage).permute((1, 0)), columns.index(2 * stage + 1).permute((1, 0))
        first = warpgroup_mma(a, x0, first, is_async=True)
        b = _left(ROWS, 1, stage, rings, LEFT)
        first, a = warpgroup_mma_wait(0, deps=(first, a))
        first = warpgroup_mma(b, x1, first, is_async=True)
        if EACH == 2:
            a = _left(ROWS + 1, 0, stage, rings, LEFT)
            first, b = warpgroup_mma_wait(0, deps=(first, b))
            second = warpgroup_mma(a, x0, second, is_async=True)
            b = _left(ROWS + 1, 1, stage, rings, LEFT)
            second, a = warpgroup_mma_wait(0, deps=(second, a))
            second = warpgroup_mma(b, x1, second, is_async=True)
        if turn + 1 < turns:
            following = turn + 1
            await_operands(ready.index(following % STAGES), following // STAGES & 1)
            a = _left(ROWS, 0, following % STAGES, rings, LEFT)
        first, second, b = warpgroup_mma_wait(0, deps=(first, second, b))
        mbarrier.arrive(free.index(stage), count=1)
    # Line by line what the threads hold, 16 bytes of each together: eight columns of the product, and 64 rows.
    FLAT: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [1, 4], [1, 0])
    LINES: gl.constexpr = EACH * BLOCK_M // 8
    if EACH == 2:
        parts = gl.reshape(gl.join(first, second), [4, 2, 8, BLOCK_M // 8, 4, 2, 2])
        parts = gl.permute(parts, [6, 3, 0, 2, 4, 1, 5])
    else:
        parts = gl.permute(gl.reshape(first, [4, 2, 8, BLOCK_M // 8, 4, 2]), [3, 0, 2, 4, 1, 5])
    acc = gl.convert_layout(gl.reshape(parts, [LINES, 512]), FLAT, assert_trivial=True)
    line, place = gl.arange(0, LINES, gl.SliceLayout(1, FLAT)), gl.arange(0, 512, gl.SliceLayout(0, FLAT))
    N = gl.num_programs(0) * BLOCK_N
    part = tile * GROUPS + group
    last = True
    if SPLIT:
        at = (part * LINES + line)[:, None] * 512 + place[None, :]
        acc, last = add_splits(acc, partial, at, N * BLOCK_M, True, arrived + part, split, splits)
    if last:
        m = (line % (BLOCK_M // 8) * 8)[:, None] + (place // 4 % 4 * 2 + place % 2)[None, :]
        row = place // 128 * 16 + place // 2 % 2 * 8 + place // 16 % 8
        n = ((part * EACH + line // (BLOCK_M // 8)) * 64)[:, None] + row[None, :]
        gl.store(out + (m * N + n), acc.to(out.dtype.element_ty), mask=m < M)


@gluon.jit(do_not_specialize=["M", "splits"])
def _product_kernel(x, packed, scales, zeros, bias, out, partial, arrived, M, K, x_stride, stride_g, units, every, splits,
                    BLOCK_M: gl.constexpr, UNITS: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr,
                    BIAS: gl.constexpr, ZERO: gl.constexpr, OVERLAP: gl.constexpr, MULTIPLYING: gl.constexpr,
                    BRINGING: gl.constexpr):
    """Programs are (UNITS of the weight's rows, split of K). every: blocks of 128 that share a scale."""
    DTYPE: gl.constexpr = x.dtype.element_ty
    tile, split = gl.program_id(0), gl.program_id(1)
    blocks = K // 128
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    of_columns: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, 64], DTYPE)
    weights = gl.allocate_shared_memory(gl.int16, [STAGES, UNITS * 16, 256], plain)
    columns = gl.allocate_shared_memory(DTYPE, [2 * STAGES, BLOCK_M, 64], of_columns)     # two for each block
    of_scales = gl.allocate_shared_memory(DTYPE, [STAGES, UNITS * 128], flat)
    of_zeros = None
    if ZERO:
        of_zeros = gl.allocate_shared_memory(gl.uint8, [STAGES, UNITS * 128], flat)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=GROUP)
        mbarrier.init(free.index(stage), count=GROUPS)      # all have read it
    tables = packed, scales, zeros, stride_g, every
    sizes = M, units, x_stride
    span = tile, split * blocks // splits, (split + 1) * blocks // splits
    rings = weights, columns, of_scales, of_zeros
    bars = ready, free
    ends = bias, out, partial, arrived, splits, split
    if GROUPS == 2:
        gl.warp_specialize([(_multiply, (0, 2, ends, sizes, span, rings, bars, SPLIT, BIAS)),
                            (_multiply, (1, 2, ends, sizes, span, rings, bars, SPLIT, BIAS)),
                            (_bring, (x, tables, sizes, span, rings, bars, OVERLAP))], [4, 4], [MULTIPLYING, BRINGING])
    else:
        gl.warp_specialize([(_multiply, (0, 4, ends, sizes, span, rings, bars, SPLIT, BIAS)),
                            (_multiply, (1, 4, ends, sizes, span, rings, bars, SPLIT, BIAS)),
                            (_multiply, (2, 4, ends, sizes, span, rings, bars, SPLIT, BIAS)),
                            (_multiply, (3, 4, ends, sizes, span, rings, bars, SPLIT, BIAS)),
                            (_bring, (x, tables, sizes, span, rings, bars, OVERLAP))],
                           [4, 4, 4, 4], [MULTIPLYING, MULTIPLYING, MULTIPLYING, BRINGING])


class Tile(NamedTuple):
    """How a product is cut.

    Units of a program, groups that multiply, programs that share K, blocks in the ring, and programs on a multiprocessor.
    """

    units: int
    groups: int
    splits: int
    stages: int
    programs: int


# Registers of a thread, by the units of a program, its groups and the programs on a multiprocessor: on average, of those that
# multiply, of those that bring.
REGISTERS = {(1, 2, 1): (168, 216, 72), (1, 2, 2): (80, 96, 48), (2, 2, 1): (168, 216, 72), (2, 4, 1): (96, 104, 64)}
MOST_ROWS = 128


@cache
def tile_of(rows: int, features: int, depth: int, chips: int) -> Tile | None:
    """The tile for rows of x and a weight [features, depth] on so many multiprocessors; None: not for this kernel.

    Guessed so far: jobs/bench/quantized.py --only ring --sweep measures all.
    """
    if rows > MOST_ROWS or features % 128 or depth % 128:
        return None
    units = 2 if features % 256 == 0 and features // 128 >= chips else 1
    groups = 4 if units == 2 and rows <= MOST_BESIDE else 2
    tiles, blocks = features // (128 * units), depth // 128
    stages = most_stages(rows, units, 1)
    return Tile(units, groups, max(1, min(chips // tiles, blocks // stages)), stages, 1)


def most_stages(rows: int, units: int, programs: int) -> int:
    """Blocks that fit into a program's share of a multiprocessor, up to 8."""
    return min((SHARED_BYTES // programs - 1024) // (units * (8192 + 384) + block_m(rows) * 256), 8)


def tile_for(x: Tensor, scales: Tensor, zeros: Tensor | None, group: int) -> Tile | None:
    """tile_of x; None too where the device, the group, the zeros or how the scales lie are none for this kernel."""
    fits = group % 128 == 0 and (zeros is None or zeros.dtype == torch.uint8)
    lies = scales.stride(0) == 1 and (scales.shape[1] == 1 or scales.stride(1) % 16 == 0)
    aligned = all(table.data_ptr() % 16 == 0 for table in (scales, zeros) if table is not None)
    if not (fits and lies and aligned and takes(x)):
        return None
    return tile_of(x.shape[0], scales.shape[0], x.shape[1], processors(x.device))


def product(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, group: int, bias: Tensor | None,
            tile: Tile) -> Tensor:
    """x [M, K] of 16 bits times weights as gemm_w4.w4_matmul has them -> [M, N]; rows of x may be strided.

    M up to MOST_ROWS, with four groups or two programs MOST_BESIDE; K a multiple of 128, N of 128 tile.units; the group is K or
    a multiple of 128, zeros are uint8; N is contiguous in scales and zeros, their groups a multiple of 16 apart.
    """
    (rows, depth), features = x.shape, scales.shape[0]
    m = block_m(rows)
    out = torch.empty((rows, features), dtype=x.dtype, device=x.device)
    partial = torch.empty((tile.splits, features, m), dtype=torch.float32, device=x.device) if tile.splits > 1 else out
    registers, multiplying, bringing = REGISTERS[tile.units, tile.groups, tile.programs]
    _product_kernel[features // (128 * tile.units), tile.splits](
        x, packed, scales, scales if zeros is None else zeros, out if bias is None else bias, out, partial, counters(x.device),
        rows, depth, x.stride(0), scales.stride(1) if scales.shape[1] > 1 else 0, packed.shape[1], group // 128, tile.splits,
        BLOCK_M=m, UNITS=tile.units, GROUPS=tile.groups, STAGES=tile.stages, SPLIT=tile.splits > 1, BIAS=bias is not None,
        ZERO=zeros is not None, MULTIPLYING=multiplying, BRINGING=bringing, num_warps=4, maxnreg=registers,
        **launch_options(overlaps(x.device)))
    return out
