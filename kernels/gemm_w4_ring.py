"""Products of 9 to 128 rows with 4-bit weights on Hopper, in Gluon: as gemm_fp8_ring.py, but those who multiply unpack codes.

A program has 64 to 256 of the weight's rows, of half a unit to two of gemm_w4.py's packed layout: the more, the less often x is
read. A lane finds what it holds of the left operand as 16 bytes. Weights are scaled before they are multiplied, and so rounded as
where they are unpacked beforehand: all blocks add to one sum, and a left operand is unpacked while the tensor cores have the last
one. Scales and zeros come through the ring too: the compiler puts off loads into registers to where they are waited for.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from kernels.hopper import (
    FLAT,
    MOST_BESIDE,
    SHARED_BYTES,
    WARPS,
    arrive_when_copied,
    async_load,
    await_operands,
    barrier,
    block_m,
    finish,
    in_lines,
    lines,
    processors,
    reinterpret,
    takes,
)
from kernels.overlap import after, launch_options, overlaps
from kernels.pointwise import gate
from kernels.split_k import counters

# Two words of a row, $2: the first or the last two of their four codes, less the zeros ($3 and $4, as gemm_w4.py has them), by
# the scale, $5.
SCALE_BF16 = gl.constexpr(tuple(f"""{{
.reg .b32 t, u;
shr.u32 t, $2, {shift};
shr.u32 u, $2, {shift + 4};
lop3.b32 $0, t, 0x000f000f, 0x43004300, 0xea;
lop3.b32 $1, u, 0x000f000f, 0x43004300, 0xea;
sub.bf16x2 $0, $0, $3;
sub.bf16x2 $1, $1, $4;
mul.bf16x2 $0, $0, $5;
mul.bf16x2 $1, $1, $5;
}}""" for shift in (0, 8)))
SCALE_FP16 = gl.constexpr(tuple(f"""{{
.reg .b32 t, sixteenth;
mov.b32 sixteenth, 0x2c002c00;
shr.u32 t, $2, {shift};
lop3.b32 $0, t, 0x000f000f, 0x64006400, 0xea;
lop3.b32 $1, t, 0x00f000f0, 0x64006400, 0xea;
sub.f16x2 $0, $0, $3;
fma.rn.f16x2 $1, $1, sixteenth, $4;
mul.f16x2 $0, $0, $5;
mul.f16x2 $1, $1, $5;
}}""" for shift in (0, 8)))
HALF_OPERANDS = gl.constexpr("=&r,=&r,r,r,r,r")


@gluon.jit
def _run(run):
    """Where runs of 256 words begin in a block of K: 16 rows by 16 words each, as a warp holds them; eight are 64 rows.

    In a unit those of its lower words come first; in the ring all of 64 rows lie together.
    """
    return run // 16 * 4096 + run // 8 % 2 * 1024 + run // 4 % 2 * 2048 + run % 4 * 256


@gluon.jit
def _of_tile(tile, n, SIZE: gl.constexpr, half, GATED: gl.constexpr):
    """The n-th of a tile's SIZE rows, or runs; GATED: one half of them are gate's, the other up's, which begin at `half`."""
    return tile * (SIZE // 2) + n % (SIZE // 2) + n // (SIZE // 2) * half if GATED else tile * SIZE + n


@gluon.jit
def _bring_weights(tables, span, rings, bars, GATED: gl.constexpr):
    """Blocks begin to end of K. Nothing here waits for the kernel before: no kernel writes weights."""
    packed, scales, zeros, stride_g, units, every = tables
    tile, begin, end = span
    ring, of_scales, of_zeros = rings
    ready, free = bars
    STAGES: gl.constexpr = ring.shape[0]
    RUNS: gl.constexpr = ring.shape[1]
    by: gl.constexpr = lines(256, 8, WARPS)
    word = gl.arange(0, 256, gl.SliceLayout(0, by))
    run = _of_tile(tile, gl.arange(0, RUNS, gl.SliceLayout(1, by)), RUNS, units * 8, GATED)
    at = packed + (_run(run)[:, None] + word[None, :])
    each: gl.constexpr = gl.BlockedLayout([2], [32], [WARPS], [0])      # 4 bytes a thread: the least
    n = _of_tile(tile, gl.arange(0, RUNS * 8, each), RUNS * 8, units * 64, GATED)
    zero_each: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    zero_n = _of_tile(tile, gl.arange(0, RUNS * 8, zero_each), RUNS * 8, units * 64, GATED)
    for turn in range(end - begin):
        stage = turn % STAGES
        if turn >= STAGES:
            mbarrier.wait(free.index(stage), turn // STAGES & 1 ^ 1)
        async_load(ring.index(stage), at + (begin + turn) * units * 4096, eviction_policy="evict_first")
        group = (begin + turn) // every * stride_g
        async_load(of_scales.index(stage), scales + (group + n))
        if of_zeros.dtype == gl.uint8:
            async_load(of_zeros.index(stage), zeros + (group + zero_n))
        arrive_when_copied(ready.index(stage))


@gluon.jit
def _bring_x(x, sizes, span, ring, bars, OVERLAP: gl.constexpr):
    M, x_stride = sizes
    _, begin, end = span
    ready, free = bars
    STAGES: gl.constexpr = ring.shape[0] // 2
    BLOCK_M: gl.constexpr = ring.shape[1]
    by: gl.constexpr = lines(64, 8, WARPS)
    m = gl.arange(0, BLOCK_M, gl.SliceLayout(1, by))
    k = begin * 128 + gl.arange(0, 64, gl.SliceLayout(0, by))
    after(OVERLAP)
    for turn in range(end - begin):
        stage = turn % STAGES
        if turn >= STAGES:
            mbarrier.wait(free.index(stage), turn // STAGES & 1 ^ 1)
        at = x + (m[:, None] * x_stride + k[None, :] + turn * 128)
        async_load(ring.index(2 * stage), at, mask=(m < M)[:, None])
        async_load(ring.index(2 * stage + 1), at + 64, mask=(m < M)[:, None])
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
def _left(rows: gl.constexpr, half: gl.constexpr, stage, rings, LEFT: gl.constexpr, DTYPE: gl.constexpr):
    """The weights of 64 rows and of half of a block's columns, [64, 64], as the tensor cores' left operand."""
    weights, of_scales, of_zeros = rings
    words = weights.index(stage)
    scale = of_scales.index(stage).slice(rows * 64, 64).load(gl.SliceLayout(1, LEFT))
    zero = gl.full([64], 8.0, DTYPE, gl.SliceLayout(1, LEFT))
    if of_zeros.dtype == gl.uint8:
        zero = of_zeros.index(stage).slice(rows * 64, 64).load(gl.SliceLayout(1, LEFT)).to(DTYPE)
    a = _codes(words.slice(rows * 8, 4).load(lines(256, 8)), half, scale, zero, LEFT, DTYPE)
    b = _codes(words.slice(rows * 8 + 4, 4).load(lines(256, 8)), half, scale, zero, LEFT, DTYPE)
    return gl.convert_layout(_beside(_beside(a[0], b[0]), _beside(a[1], b[1])), LEFT, assert_trivial=True)


@gluon.jit
def _multiply(group: gl.constexpr, ends, sizes, span, rings, columns, bars, SPLIT: gl.constexpr, BIAS: gl.constexpr,
              GATED: gl.constexpr, GELU: gl.constexpr):
    """Half of the program's rows, 64 of them or two times 64; of 64 rows both groups have all, and take the blocks in turn.

    GATED: there is one group, and it has all, 64 rows of gate and the same ones of up.

    While the tensor cores have one left operand, the next one is unpacked. At the end of a turn none is with them: the compiler
    would wait for each instruction if it had to follow them around the loop.
    """
    tile, begin, end = span
    ready, free = bars
    DTYPE: gl.constexpr = columns.dtype
    STAGES: gl.constexpr = rings[0].shape[0]
    PARTS: gl.constexpr = rings[0].shape[1] // 8
    BLOCK_M: gl.constexpr = columns.shape[1]
    EACH: gl.constexpr = PARTS if GATED else max(1, PARTS // 2)
    TURNS: gl.constexpr = 2 if PARTS == 1 else 1
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    ROWS: gl.constexpr = group // TURNS * EACH
    TURN: gl.constexpr = group % TURNS
    first = gl.zeros([64, BLOCK_M], gl.float32, SUMS)
    second = gl.zeros([64, BLOCK_M], gl.float32, SUMS)
    turns = end - begin
    await_operands(ready.index(TURN), 0)
    a = _left(ROWS, 0, TURN, rings, LEFT, DTYPE)
    for turn in range(TURN, turns, TURNS):
        stage = turn % STAGES
        x0, x1 = columns.index(2 * stage).permute((1, 0)), columns.index(2 * stage + 1).permute((1, 0))
        first = warpgroup_mma(a, x0, first, is_async=True)
        b = _left(ROWS, 1, stage, rings, LEFT, DTYPE)
        first, a = warpgroup_mma_wait(0, deps=(first, a))
        first = warpgroup_mma(b, x1, first, is_async=True)
        if EACH == 2:
            a = _left(ROWS + 1, 0, stage, rings, LEFT, DTYPE)
            first, b = warpgroup_mma_wait(0, deps=(first, b))
            second = warpgroup_mma(a, x0, second, is_async=True)
            b = _left(ROWS + 1, 1, stage, rings, LEFT, DTYPE)
            second, a = warpgroup_mma_wait(0, deps=(second, a))
            second = warpgroup_mma(b, x1, second, is_async=True)
        following = turn + TURNS
        if following < turns:
            await_operands(ready.index(following % STAGES), following // STAGES & 1)
            a = _left(ROWS, 0, following % STAGES, rings, LEFT, DTYPE)
        first, second, b = warpgroup_mma_wait(0, deps=(first, second, b))
        if TURN == 0 or following < turns:
            mbarrier.arrive(free.index(stage), count=1)
    if TURNS == 2:      # the second group leaves its sums where x of its last block was, and gives that back then
        final = turns // 2 * 2 - 1
        plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        spare = reinterpret(columns, gl.float32, [STAGES, BLOCK_M // 8, 512], plain).index(final % STAGES)
        if TURN == 1:
            spare.store(in_lines(first))
            barrier()
            mbarrier.arrive(free.index(final % STAGES), count=1)
        else:
            mbarrier.wait(free.index(final % STAGES), final // STAGES & 1)
            others = gl.permute(gl.reshape(spare.load(FLAT), [BLOCK_M // 8, 4, 8, 4, 2, 2]), [1, 4, 2, 0, 3, 5])
            first += gl.convert_layout(gl.reshape(others, [64, BLOCK_M]), SUMS, assert_trivial=True)
    if GATED:
        low, up = first.to(DTYPE).to(gl.float32), second.to(DTYPE).to(gl.float32)
        y = gate(low, up, GELU, DTYPE).to(gl.float32)
        finish(y, tile, (sizes[0], gl.num_programs(0) * 64), ends, False, False, SUMS)
    else:
        N = gl.num_programs(0) * PARTS * 64
        if TURN == 0:
            finish(first, tile * PARTS + ROWS, (sizes[0], N), ends, SPLIT, BIAS, SUMS)
        if EACH == 2:
            finish(second, tile * PARTS + ROWS + 1, (sizes[0], N), ends, SPLIT, BIAS, SUMS)


@gluon.jit(do_not_specialize=["M", "splits"])
def _product_kernel(x, packed, scales, zeros, bias, out, partial, arrived, M, K, x_stride, stride_g, units, every, splits,
                    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr,
                    BIAS: gl.constexpr, ZERO: gl.constexpr, GATED: gl.constexpr, GELU: gl.constexpr,
                    OVERLAP: gl.constexpr, MULTIPLYING: gl.constexpr, BRINGING: gl.constexpr):
    """Programs are (tile of the weight's rows, split of K). every: blocks of 128 that share a scale."""
    DTYPE: gl.constexpr = x.dtype.element_ty
    RUNS: gl.constexpr = BLOCK_N // 8
    tile, split = gl.program_id(0), gl.program_id(1)
    blocks = K // 128
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    of_columns: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, 64], DTYPE)
    weights = gl.allocate_shared_memory(gl.int16, [STAGES, RUNS, 256], plain)
    columns = gl.allocate_shared_memory(DTYPE, [2 * STAGES, BLOCK_M, 64], of_columns)     # two for each block
    of_scales = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N], flat)
    of_zeros = of_scales        # not read
    if ZERO:
        of_zeros = gl.allocate_shared_memory(gl.uint8, [STAGES, BLOCK_N], flat)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=2 * 32 * WARPS)
        mbarrier.init(free.index(stage), count=1 if GATED or BLOCK_N == 64 else 2)      # all that read it have
    tables = packed, scales, zeros, stride_g, units, every
    sizes = M, x_stride
    span = tile, split * blocks // splits, (split + 1) * blocks // splits
    rings = weights, of_scales, of_zeros
    bars = ready, free
    ends = bias, out, partial, arrived, splits, split
    bringing_weights = tables, span, rings, bars, GATED
    bringing_x = x, sizes, span, columns, bars, OVERLAP
    if GATED:
        gl.warp_specialize([(_multiply, (0, ends, sizes, span, rings, columns, bars, SPLIT, BIAS, GATED, GELU)),
                            (_bring_weights, bringing_weights),
                            (_bring_x, bringing_x)],
                           [WARPS, WARPS], [BRINGING, BRINGING])
    else:
        gl.warp_specialize([(_multiply, (0, ends, sizes, span, rings, columns, bars, SPLIT, BIAS, GATED, GELU)),
                            (_multiply, (1, ends, sizes, span, rings, columns, bars, SPLIT, BIAS, GATED, GELU)),
                            (_bring_weights, bringing_weights),
                            (_bring_x, bringing_x)],
                           [4, WARPS, WARPS], [MULTIPLYING, BRINGING, BRINGING])


class Tile(NamedTuple):
    """How a product is cut.

    The weight's rows of a program, programs that share K, blocks in the ring, and programs on a multiprocessor.
    """

    outputs: int
    splits: int
    stages: int
    programs: int

    @property
    def turns(self) -> int:
        """Groups that take the blocks of the same rows in turn."""
        return 2 if self.outputs == 64 else 1


MOST_ROWS = 128                 # of x
# Registers of a thread, by the weight's rows of a program and the programs on a multiprocessor: on average, of those that
# multiply, of those that bring. Of up to MOST_BESIDE rows of x so few that other kernels of a step find room beside one program;
# gated products have one group that multiplies, which has what the others leave.
REGISTERS = {(64, 1): (128, 152, 64), (128, 1): (128, 152, 64), (128, 2): (80, 96, 48), (256, 1): (168, 216, 72)}
MANY_REGISTERS, GATED_REGISTERS = (168, 216, 72), (96, 0, 64)


def registers_of(rows: int, tile: Tile, gated: bool) -> tuple[int, int, int]:
    """Of a thread, as REGISTERS has them, for so many rows of x."""
    if gated:
        return GATED_REGISTERS
    return REGISTERS[tile.outputs, tile.programs] if rows <= MOST_BESIDE else MANY_REGISTERS


@cache
def tile_of(rows: int, features: int, depth: int, chips: int, gated: bool = False) -> Tile | None:
    """The tile for rows of x and a weight [features, depth] on so many multiprocessors; None: not for this kernel.

    gated: the weight is [gate | up]. As jobs/bench/quantized.py --only ring --sweep measured them on an H100 for the shapes of
    Mistral-7B, and gated ones in a step.
    """
    if rows > MOST_ROWS or features % 128 or depth % 128:
        return None
    many = features // 128 >= chips
    if gated:
        return Tile(128, 1, most_stages(rows, 128, 2), 2) if many and rows <= MOST_BESIDE else None
    if many and 32 < rows <= MOST_BESIDE:       # faster alone, but not among the kernels of a step
        return None
    if rows <= 32:
        outputs, programs = 128, 2
    elif many and features % 256 == 0:
        outputs, programs = 256, 1
    else:       # larger tiles read x less often
        outputs, programs = 64 if not many and 128 < depth <= 1 << 13 else 128, 1
    tile = Tile(outputs, 1, most_stages(rows, outputs, programs), programs)
    splits = programs * chips // (features // outputs)
    return tile._replace(splits=max(1, min(splits, depth // 128 // (2 * tile.turns))))


def most_stages(rows: int, outputs: int, programs: int) -> int:
    """Blocks that fit into a program's share of a multiprocessor, up to 12, beside what y goes through."""
    m = block_m(rows)
    return min((SHARED_BYTES // programs - 32 * outputs - 1024) // (outputs * 67 + m * 256 + 16), 12)


def tile_for(x: Tensor, scales: Tensor, zeros: Tensor | None, group: int, gated: bool = False) -> Tile | None:
    """tile_of x; None too where the device, the group, the zeros or how the scales lie are none for this kernel."""
    fits = group % 128 == 0 and scales.dtype == x.dtype and (zeros is None or zeros.dtype == torch.uint8)
    lies = scales.stride(0) == 1 and (scales.shape[1] == 1 or scales.stride(1) % 16 == 0)
    aligned = all(table.data_ptr() % 16 == 0 for table in (scales, zeros) if table is not None)
    if not (fits and lies and aligned and takes(x)):
        return None
    return tile_of(x.shape[0], scales.shape[0], x.shape[1], processors(x.device), gated)


def product(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, group: int, bias: Tensor | None,
            tile: Tile, activation: str = "") -> Tensor:
    """x [M, K] of 16 bits times weights as gemm_w4.w4_matmul has them -> [M, N]; rows of x may be strided.

    With an activation its gated_act, [M, N / 2], of a tile that is for that, without splits or a bias.
    M up to MOST_ROWS, with two programs MOST_BESIDE; K a multiple of 128, N of 128 and of tile.outputs; the group is K or a
    multiple of 128, zeros are uint8; N is contiguous in scales and zeros, their groups a multiple of 16 apart. All that multiply
    have a block of K, and the ring has room for another one, or they would wait for ever.
    """
    (rows, depth), features = x.shape, scales.shape[0]
    assert tile.splits * tile.turns <= depth // 128 and tile.stages > tile.turns
    m = block_m(rows)
    out = torch.empty((rows, features // 2 if activation else features), dtype=x.dtype, device=x.device)
    partial = torch.empty((tile.splits, features, m), dtype=torch.float32, device=x.device) if tile.splits > 1 else out
    registers, multiplying, bringing = registers_of(rows, tile, bool(activation))
    _product_kernel[features // tile.outputs, tile.splits](
        x, packed, scales, scales if zeros is None else zeros, out if bias is None else bias, out, partial, counters(x.device),
        rows, depth, x.stride(0), scales.stride(1) if scales.shape[1] > 1 else 0, packed.shape[1], group // 128, tile.splits,
        BLOCK_M=m, BLOCK_N=tile.outputs, STAGES=tile.stages, SPLIT=tile.splits > 1, BIAS=bias is not None,
        ZERO=zeros is not None, GATED=bool(activation), GELU=activation == "gelu_tanh",
        MULTIPLYING=multiplying, BRINGING=bringing, num_warps=4, maxnreg=registers, **launch_options(overlaps(x.device)))
    return out
