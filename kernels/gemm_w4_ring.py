"""Products of 9 to 128 rows with 4-bit weights on Hopper, in Gluon: as gemm_ring.py, codes unpacked by the groups that multiply.

A program has one or two units of gemm_w4.py's packed layout, 128 of the weight's rows each, and two warp groups for each unit.
A lane finds what it holds of the left operand as 16 bytes; groups take turns at unpacking and at waiting for the tensor cores.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from kernels.assembly import OPERANDS, UNPACK_BF16, UNPACK_FP16
from kernels.gemm_ring import GROUP, MOST_BESIDE, add_splits, block_m, takes
from kernels.hopper import SHARED_BYTES, arrive_when_copied, async_load, await_operands, lines, processors
from kernels.overlap import after, launch_options, overlaps
from kernels.split_k import counters


@gluon.jit
def _bring(x, packed, sizes, span, rings, bars, OVERLAP: gl.constexpr):
    """Blocks begin to end of K. The first of the weights are asked for before the wait for the kernel that makes x."""
    M, units, x_stride = sizes
    tile, begin, end = span
    weights, columns = rings
    ready, free = bars
    STAGES: gl.constexpr = weights.shape[0]
    BLOCK_M: gl.constexpr = columns.shape[1]
    TILES: gl.constexpr = weights.shape[1]      # of 16 rows by 16 words, as a warp holds them
    UNITS: gl.constexpr = TILES // 16
    of_words: gl.constexpr = lines(256, 8)
    of_x: gl.constexpr = lines(64, 8)
    line, word = gl.arange(0, TILES, gl.SliceLayout(1, of_words)), gl.arange(0, 256, gl.SliceLayout(0, of_words))
    packed_at = packed + ((begin * units + tile * UNITS) * 4096 + line[:, None] * 256 + word[None, :])
    m = gl.arange(0, BLOCK_M, gl.SliceLayout(1, of_x))
    k = begin * 128 + gl.arange(0, 64, gl.SliceLayout(0, of_x))
    x_at = x + (gl.minimum(m, M - 1)[:, None] * x_stride + k[None, :])
    turns = end - begin
    for turn in range(gl.minimum(turns, STAGES)):
        async_load(weights.index(turn), packed_at + turn * units * 4096, eviction_policy="evict_first")
    after(OVERLAP)
    for turn in range(turns):
        stage = turn % STAGES
        if turn >= STAGES:
            mbarrier.wait(free.index(stage), turn // STAGES & 1 ^ 1)
            async_load(weights.index(stage), packed_at + turn * units * 4096, eviction_policy="evict_first")
        async_load(columns.index(2 * stage), x_at + turn * 128)
        async_load(columns.index(2 * stage + 1), x_at + (turn * 128 + 64))
        arrive_when_copied(ready.index(stage))


@gluon.jit
def _unpack(words, zero, LEFT: gl.constexpr, DTYPE: gl.constexpr):
    """Words [4, 256] of a group as they are stored, zeros [64, 1] -> its four codes less the zeros, each [64, 16]."""
    words = gl.permute(gl.reshape(words, [4, 8, 4, 2, 2, 2]), [0, 4, 1, 3, 2, 5])
    words = gl.convert_layout(gl.reshape(words, [64, 16]), LEFT, assert_trivial=True)
    if DTYPE == gl.bfloat16:      # noqa: SIM300
        z = gl.broadcast(zero + 128.0, words)[0]
        parts = gl.inline_asm_elementwise(UNPACK_BF16, OPERANDS, [words, z, z, z, z], (gl.bfloat16,) * 4, is_pure=True, pack=2)
    else:
        z = gl.broadcast(zero + 1024.0, words)[0]
        y = gl.broadcast(-64.0 - zero, words)[0]
        parts = gl.inline_asm_elementwise(UNPACK_FP16, OPERANDS, [words, z, y, z, y], (gl.float16,) * 4, is_pure=True, pack=2)
    return parts


@gluon.jit
def _beside(a, b):
    """[N, A] and [N, A] -> [N, 2 A]."""
    return gl.reshape(gl.permute(gl.join(a, b), [0, 2, 1]), [a.shape[0], 2 * a.shape[1]])


@gluon.jit
def _left(words, FIRST: gl.constexpr, half: gl.constexpr, zero, LEFT: gl.constexpr, DTYPE: gl.constexpr):
    """Half of a block's columns, [64, 64]. The words are read for each half: so less is in registers at a time."""
    stored: gl.constexpr = lines(256, 8)
    low = _unpack(words.slice(FIRST, 4).load(stored), zero, LEFT, DTYPE)
    high = _unpack(words.slice(FIRST + 8, 4).load(stored), zero, LEFT, DTYPE)
    parts = _beside(_beside(low[2 * half], high[2 * half]), _beside(low[2 * half + 1], high[2 * half + 1]))
    return gl.convert_layout(parts, LEFT, assert_trivial=True)


@gluon.jit
def _multiply(group: gl.constexpr, tables, ends, sizes, span, rings, bars, SPLIT: gl.constexpr, BIAS: gl.constexpr,
              ZERO: gl.constexpr):
    """Rows 64 group .. 64 group + 64 of the program's."""
    scales, zeros, stride_n, stride_g, every = tables
    M, _, _ = sizes
    tile, begin, end = span
    weights, columns = rings
    ready, free = bars
    STAGES: gl.constexpr = weights.shape[0]
    BLOCK_N: gl.constexpr = weights.shape[1] * 8
    BLOCK_M: gl.constexpr = columns.shape[1]
    DTYPE: gl.constexpr = columns.dtype
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    FIRST: gl.constexpr = group // 2 * 16 + group % 2 * 4       # of this group's rows of words
    n = tile * BLOCK_N + group * 64 + gl.arange(0, 64, gl.SliceLayout(1, SUMS))
    scale_at = n * stride_n
    zero_at = (tile * BLOCK_N + group * 64 + gl.arange(0, 64, gl.SliceLayout(1, LEFT))) * stride_n
    acc = gl.zeros([64, BLOCK_M], gl.float32, SUMS)
    nothing = gl.zeros([64, BLOCK_M], gl.float32, SUMS)
    zero = gl.full([64], 8.0, DTYPE, gl.SliceLayout(1, LEFT))
    scale = gl.load(scales + (scale_at + begin // every * stride_g))
    if ZERO:
        zero = gl.load(zeros + (zero_at + begin // every * stride_g)).to(DTYPE)
    turns = end - begin
    for turn in range(turns):
        stage = turn % STAGES
        await_operands(ready.index(stage), turn // STAGES & 1)
        ahead = gl.minimum(begin + turn + 1, end - 1) // every * stride_g       # a block ahead: no product waits for them
        next_scale = gl.load(scales + (scale_at + ahead))
        next_zero = zero
        if ZERO:
            next_zero = gl.load(zeros + (zero_at + ahead)).to(DTYPE)
        words = weights.index(stage)
        a = _left(words, FIRST, 0, zero[:, None], LEFT, DTYPE)
        product = warpgroup_mma(a, columns.index(2 * stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        if BLOCK_M > 32:        # there are no registers for both
            product, a = warpgroup_mma_wait(0, deps=(product, a))
        b = _left(words, FIRST, 1, zero[:, None], LEFT, DTYPE)
        product = warpgroup_mma(b, columns.index(2 * stage + 1).permute((1, 0)), product, is_async=True)
        product, a, b = warpgroup_mma_wait(0, deps=(product, a, b))
        mbarrier.arrive(free.index(stage), count=1)
        acc += product * scale.to(gl.float32)[:, None]
        scale, zero = next_scale, next_zero
    bias, out, partial, arrived, splits, split = ends
    N = gl.num_programs(0) * BLOCK_N
    m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, SUMS))
    inside = (m < M)[None, :]
    at = m[None, :] * N + n[:, None]
    last = True
    if SPLIT:
        counter = arrived + tile * (BLOCK_N // 64) + group
        acc, last = add_splits(acc, partial, at, M * N, inside, counter, split, splits)
    if last:
        if BIAS:
            acc += gl.load(bias + n).to(gl.float32)[:, None]
        gl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


@gluon.jit(do_not_specialize=["M", "splits"])
def _product_kernel(x, packed, scales, zeros, bias, out, partial, arrived, M, K, x_stride, stride_n, stride_g, units, every,
                    splits, BLOCK_M: gl.constexpr, UNITS: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr,
                    BIAS: gl.constexpr, ZERO: gl.constexpr, OVERLAP: gl.constexpr, MULTIPLYING: gl.constexpr,
                    BRINGING: gl.constexpr):
    """Programs are (UNITS of the weight's rows, split of K). every: blocks of 128 that share a scale."""
    DTYPE: gl.constexpr = x.dtype.element_ty
    tile, split = gl.program_id(0), gl.program_id(1)
    blocks = K // 128
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    of_columns: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, 64], DTYPE)
    weights = gl.allocate_shared_memory(gl.int16, [STAGES, UNITS * 16, 256], plain)
    columns = gl.allocate_shared_memory(DTYPE, [2 * STAGES, BLOCK_M, 64], of_columns)     # two for each block
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=GROUP)
        mbarrier.init(free.index(stage), count=2 * UNITS)       # all groups have read it
    tables = scales, zeros, stride_n, stride_g, every
    sizes = M, units, x_stride
    span = tile, split * blocks // splits, (split + 1) * blocks // splits
    rings = weights, columns
    bars = ready, free
    ends = bias, out, partial, arrived, splits, split
    if UNITS == 1:
        gl.warp_specialize([(_multiply, (0, tables, ends, sizes, span, rings, bars, SPLIT, BIAS, ZERO)),
                            (_multiply, (1, tables, ends, sizes, span, rings, bars, SPLIT, BIAS, ZERO)),
                            (_bring, (x, packed, sizes, span, rings, bars, OVERLAP))], [4, 4], [MULTIPLYING, BRINGING])
    else:
        gl.warp_specialize([(_multiply, (0, tables, ends, sizes, span, rings, bars, SPLIT, BIAS, ZERO)),
                            (_multiply, (1, tables, ends, sizes, span, rings, bars, SPLIT, BIAS, ZERO)),
                            (_multiply, (2, tables, ends, sizes, span, rings, bars, SPLIT, BIAS, ZERO)),
                            (_multiply, (3, tables, ends, sizes, span, rings, bars, SPLIT, BIAS, ZERO)),
                            (_bring, (x, packed, sizes, span, rings, bars, OVERLAP))],
                           [4, 4, 4, 4], [MULTIPLYING, MULTIPLYING, MULTIPLYING, BRINGING])


class Tile(NamedTuple):
    """How a product is cut: units of a program, programs that share K, blocks in the ring, and programs on a multiprocessor."""

    units: int
    splits: int
    stages: int
    programs: int


# Registers of a thread, by the units of a program and the programs on a multiprocessor: on average, of those that multiply, of
# those that bring.
REGISTERS = {(1, 1): (168, 216, 72), (1, 2): (80, 104, 32), (2, 1): (96, 112, 32)}
MOST_ROWS = 128


@cache
def tile_of(rows: int, features: int, depth: int, chips: int) -> Tile | None:
    """The tile for rows of x and a weight [features, depth] on so many multiprocessors; None: not for this kernel.

    Guessed so far: jobs/bench/quantized.py --only ring --sweep measures all.
    """
    if rows > MOST_ROWS or features % 128 or depth % 128:
        return None
    units = 2 if features % 256 == 0 and rows <= MOST_BESIDE else 1
    tiles, blocks = features // (128 * units), depth // 128
    stages = most_stages(rows, units, 1)
    return Tile(units, max(1, min(chips // tiles, blocks // stages)), stages, 1)


def most_stages(rows: int, units: int, programs: int) -> int:
    """Blocks that fit into a program's share of a multiprocessor, up to 8."""
    return min((SHARED_BYTES // programs - 1024) // (units * 8192 + block_m(rows) * 256), 8)


def tile_for(x: Tensor, scales: Tensor, zeros: Tensor | None, group: int) -> Tile | None:
    """tile_of x; None too where the device, the group or the zeros are none for this kernel."""
    fits = group % 128 == 0 and (zeros is None or zeros.dtype == torch.uint8)
    return tile_of(x.shape[0], scales.shape[0], x.shape[1], processors(x.device)) if fits and takes(x) else None


def product(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, group: int, bias: Tensor | None,
            tile: Tile) -> Tensor:
    """x [M, K] of 16 bits times weights as gemm_w4.w4_matmul has them -> [M, N]; rows of x may be strided.

    M up to MOST_ROWS, with two units or programs MOST_BESIDE; K a multiple of 128, N of 128 tile.units; the group is K or a
    multiple of 128, zeros are uint8.
    """
    (rows, depth), features = x.shape, scales.shape[0]
    out = torch.empty((rows, features), dtype=x.dtype, device=x.device)
    partial = torch.empty((tile.splits, rows, features), dtype=torch.float32, device=x.device) if tile.splits > 1 else out
    registers, multiplying, bringing = REGISTERS[tile.units, tile.programs]
    _product_kernel[features // (128 * tile.units), tile.splits](
        x, packed, scales, scales if zeros is None else zeros, out if bias is None else bias, out, partial, counters(x.device),
        rows, depth, x.stride(0), *scales.stride(), packed.shape[1], group // 128, tile.splits, BLOCK_M=block_m(rows),
        UNITS=tile.units, STAGES=tile.stages, SPLIT=tile.splits > 1, BIAS=bias is not None, ZERO=zeros is not None,
        MULTIPLYING=multiplying, BRINGING=bringing, num_warps=4, maxnreg=registers, **launch_options(overlaps(x.device)))
    return out
