"""Gated products of many rows on Hopper, in Gluon: y = act(x gate^T) * (x up^T), with cuBLAS's speed and no pass over the halves.

A program has 64 rows of x to each of its warp groups that multiply, and 128 rows of gate with the same 128 of up; one warp brings
64 of K at a time of all these by TMA into a ring in shared memory. Every thread finds gate and up of the same place in registers
of its own, so the activation moves nothing. As one program fills a multiprocessor, it takes tile after tile: what the next one
needs is on its way before this one is done, and while one group ends its tile, the others have the tensor cores.

Tiles are taken in bands of x, whose weights' columns lie side by side, so that those at work together share what the L2 holds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels import ref
from kernels.hopper import processors, reinterpret
from kernels.pointwise import activate, gated_act
from kernels.shapes import cdiv

# By their names of before Triton 3.7, and of since.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

ROWS = gl.constexpr(64)         # of x, to a warp group
HALF = gl.constexpr(128)        # of the weight's rows, of gate and of up each
DEPTH = gl.constexpr(64)        # of K, in a block of the ring
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
BOTH = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))

# --- the order of tiles, and what brings them -----------------------------------------------------------------------------------


@gluon.jit
def _tile(number, sizes, BAND: gl.constexpr):
    """(tile of x, tile of the weight) of one number: BAND tiles of x by all of the weight's, one of these after the other."""
    m_tiles, n_tiles, _, _, _ = sizes
    band = number // (BAND * n_tiles)
    rows = gl.minimum(m_tiles - band * BAND, BAND)
    place = number % (BAND * n_tiles)
    return band * BAND + place % rows, place // rows


@gluon.jit
def _bring(x, weight, sizes, rings, bars, BAND: gl.constexpr, GATED: gl.constexpr):
    """Block after block of all of the program's tiles, whatever is free of the ring."""
    columns, weights = rings
    ready, free = bars
    STAGES: gl.constexpr = ready.shape[0]
    GROUPS: gl.constexpr = columns.shape[0] // STAGES
    m_tiles, n_tiles, blocks, _, N = sizes
    apart = N // 2 if GATED else HALF
    turn = 0
    for number in range(gl.program_id(0), m_tiles * n_tiles, gl.num_programs(0)):
        m, n = _tile(number, sizes, BAND)
        row = n * HALF if GATED else n * (2 * HALF)
        for block in range(blocks):
            stage = turn % STAGES
            mbarrier.wait(free.index(stage), turn // STAGES & 1 ^ 1)
            bar = ready.index(stage)
            mbarrier.expect(bar, (GROUPS * ROWS + 2 * HALF) * DEPTH * 2)
            for group in gl.static_range(GROUPS):
                tma_load(x, [(m * GROUPS + group) * ROWS, block * DEPTH], bar, columns.index(stage * GROUPS + group))
            tma_load(weight, [row, block * DEPTH], bar, weights.index(stage * 2))
            tma_load(weight, [row + apart, block * DEPTH], bar, weights.index(stage * 2 + 1))
            turn += 1


# --- the groups that multiply ---------------------------------------------------------------------------------------------------

# Two numbers at once: one at a time, conversions run at a quarter of the speed.
ROUND_BF16 = gl.constexpr("{.reg .b32 t; cvt.rn.bf16x2.f32 t, $3, $2; shl.b32 $0, t, 16; and.b32 $1, t, 0xffff0000;}")
ROUND_FP16 = gl.constexpr("{.reg .b32 t; .reg .b16 a, b; cvt.rn.f16x2.f32 t, $3, $2; mov.b32 {a, b}, t; "
                          "cvt.f32.f16 $0, a; cvt.f32.f16 $1, b;}")


@gluon.jit
def _rounded(x, DTYPE: gl.constexpr):
    """float32, as if it had been stored as DTYPE in between."""
    return gl.inline_asm_elementwise(ROUND_BF16 if DTYPE == gl.bfloat16 else ROUND_FP16, "=f,=f,f,f", [x], gl.float32,  # noqa: SIM300
                                     is_pure=True, pack=2)


def _exchange(first, second, lanes, odd):
    """PTX: of registers first and second, lanes whose bit is set keep the second, the others the first, and swap the rest."""
    return (f"selp.b32 s, {first}, {second}, {odd}; shfl.sync.bfly.b32 s, s, {lanes}, 31, -1; "
            f"selp.b32 {first}, s, {first}, {odd}; selp.b32 {second}, {second}, s, {odd}; ")


# Of rows 0 and 8 in turn: four lanes have two numbers each of every eight columns, and each shall have eight of 32.
TRANSPOSE = gl.constexpr(
    "{.reg .b32 s, l, r<8>; .reg .pred p, q; mov.u32 l, %laneid; and.b32 s, l, 1; setp.ne.u32 p, s, 0; "
    "and.b32 s, l, 2; setp.ne.u32 q, s, 0; "
    + "".join(f"mov.b32 r{i}, ${8 + i}; " for i in range(8))
    + "".join(_exchange(f"r{i}", f"r{i + 2}", 1, "p") + _exchange(f"r{i + 4}", f"r{i + 6}", 1, "p") for i in range(2))
    + "".join(_exchange(f"r{i}", f"r{i + 4}", 2, "q") + _exchange(f"r{i + 2}", f"r{i + 6}", 2, "q") for i in range(2))
    + "".join(f"mov.b32 ${i}, r{i}; " for i in range(8)) + "}")
TRANSPOSED = gl.constexpr(",".join(["=&r"] * 8 + ["r"] * 8))
LINES = gl.constexpr(gl.DistributedLinearLayout(
    [[0, 1], [0, 2], [0, 4], [0, 32], [0, 64], [8, 0]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [],
    [64, 128]))


@gluon.jit
def _write(y, out, row, column, M, width, spare, DIRECT: gl.constexpr):
    """y [64, 128] as SUMS to out [M, width]; DIRECT: 16 bytes a thread, else by TMA by way of the group's spare memory."""
    if DIRECT:
        y = gl.inline_asm_elementwise(TRANSPOSE, TRANSPOSED, [y], y.dtype, is_pure=True, pack=16)
        y = gl.reshape(gl.permute(gl.reshape(y, [64, 4, 4, 4, 2]), [0, 1, 3, 2, 4]), [64, 128])
        y = gl.convert_layout(y, LINES, assert_trivial=True)
        m, n = row + gl.arange(0, 64, gl.SliceLayout(1, LINES)), column + gl.arange(0, 128, gl.SliceLayout(0, LINES))
        gl.store(out + (m.to(gl.int64)[:, None] * width + n[None, :]), y, mask=(m < M)[:, None], eviction_policy="evict_first")
    else:
        tma.store_wait(0)
        spare.store(y)
        fence_async_shared()
        tma_store(out, [row, column], spare)


@gluon.jit
def _stage(round, u: gl.constexpr, U: gl.constexpr, STAGES: gl.constexpr):
    """(the place in the ring, the phase of its barriers) of block u of a round of U."""
    if U == STAGES:
        stage, phase = u, round & 1
    else:
        stage, phase = (round * U + u) % STAGES, (round * U + u) // STAGES & 1
    return stage, phase


@gluon.jit
def _halves(sums):
    gate, up = gl.split(gl.permute(gl.reshape(sums, [ROWS, 2, HALF]), [0, 2, 1]))
    return gl.convert_layout(gate, SUMS, assert_trivial=True), gl.convert_layout(up, SUMS, assert_trivial=True)


@gluon.jit
def _finish(gate, up, group: gl.constexpr, number, out, sizes, spare, GROUPS: gl.constexpr, BAND: gl.constexpr,
            GATED: gl.constexpr, GELU: gl.constexpr, DIRECT: gl.constexpr):
    DTYPE: gl.constexpr = out.dtype.element_ty if DIRECT else out.dtype
    _, _, _, M, N = sizes
    m, n = _tile(number, sizes, BAND)
    row = (m * GROUPS + group) * ROWS
    if GATED:       # rounded where the separate kernels round
        y = _rounded(activate(_rounded(gate, DTYPE), GELU), DTYPE) * _rounded(up, DTYPE)
        _write(y.to(DTYPE), out, row, n * HALF, M, N // 2, spare, DIRECT)
    else:
        _write(gate.to(DTYPE), out, row, n * (2 * HALF), M, N, spare, DIRECT)
        _write(up.to(DTYPE), out, row, n * (2 * HALF) + HALF, M, N, spare, DIRECT)


@gluon.jit
def _multiply_both(group: gl.constexpr, out, sizes, rings, bars, spares, BAND: gl.constexpr, GATED: gl.constexpr,
                   GELU: gl.constexpr, U: gl.constexpr, LAG: gl.constexpr, DIRECT: gl.constexpr):
    """Gate and up by one instruction, of 256 of the weight's rows."""
    columns, weights = rings
    ready, free = bars
    STAGES: gl.constexpr = ready.shape[0]
    GROUPS: gl.constexpr = columns.shape[0] // STAGES
    whole: gl.constexpr = gl.NVMMASharedLayout.get_default_for([2 * HALF, DEPTH], weights.dtype)
    pairs = reinterpret(weights, weights.dtype, [STAGES, 2 * HALF, DEPTH], whole)
    m_tiles, n_tiles, blocks, _, _ = sizes
    spare = spares.index(group)
    round = 0       # carried: Triton 3.6 drops what only an inner loop's bounds would use
    for number in range(gl.program_id(0), m_tiles * n_tiles, gl.num_programs(0)):
        sums = gl.zeros([ROWS, 2 * HALF], gl.float32, BOTH)
        for block in range(0, blocks, U):
            for u in gl.static_range(U):
                stage, phase = _stage(round, u, U, STAGES)
                mbarrier.wait(ready.index(stage), phase)
                rows = columns.index(stage * GROUPS + group)
                sums = warpgroup_mma(rows, pairs.index(stage).permute((1, 0)), sums, is_async=True)
                if u > 0 or LAG:
                    sums = warpgroup_mma_wait(1, deps=(sums,))
                    before, _ = _stage(round + (u - 1) // U, (u - 1) % U, U, STAGES)
                    mbarrier.arrive(free.index(before), count=1, pred=block + u > 0)
            if not LAG:
                sums = warpgroup_mma_wait(0, deps=(sums,))
                last, _ = _stage(round, U - 1, U, STAGES)
                mbarrier.arrive(free.index(last), count=1)
            round += 1
        if LAG:
            sums = warpgroup_mma_wait(0, deps=(sums,))
            last, _ = _stage(round - 1, U - 1, U, STAGES)
            mbarrier.arrive(free.index(last), count=1)
        gate, up = _halves(sums)
        _finish(gate, up, group, number, out, sizes, spare, GROUPS, BAND, GATED, GELU, DIRECT)
    if not DIRECT:
        tma.store_wait(0)


@gluon.jit
def _multiply_each(group: gl.constexpr, out, sizes, rings, bars, spares, BAND: gl.constexpr, GATED: gl.constexpr,
                   GELU: gl.constexpr, U: gl.constexpr, LAG: gl.constexpr, DIRECT: gl.constexpr):
    """Gate and up by instructions of their own: ptxas takes those of 256 rows for no fewer than 154 registers a thread."""
    columns, weights = rings
    ready, free = bars
    STAGES: gl.constexpr = ready.shape[0]
    GROUPS: gl.constexpr = columns.shape[0] // STAGES
    m_tiles, n_tiles, blocks, _, _ = sizes
    spare = spares.index(group)
    round = 0       # carried: Triton 3.6 drops what only an inner loop's bounds would use
    for number in range(gl.program_id(0), m_tiles * n_tiles, gl.num_programs(0)):
        gate = gl.zeros([ROWS, HALF], gl.float32, SUMS)
        up = gl.zeros([ROWS, HALF], gl.float32, SUMS)
        for block in range(0, blocks, U):
            for u in gl.static_range(U):
                stage, phase = _stage(round, u, U, STAGES)
                mbarrier.wait(ready.index(stage), phase)
                rows = columns.index(stage * GROUPS + group)
                gate = warpgroup_mma(rows, weights.index(stage * 2).permute((1, 0)), gate, is_async=True)
                up = warpgroup_mma(rows, weights.index(stage * 2 + 1).permute((1, 0)), up, is_async=True)
                if u > 0 or LAG:
                    gate, up = warpgroup_mma_wait(2, deps=(gate, up))
                    before, _ = _stage(round + (u - 1) // U, (u - 1) % U, U, STAGES)
                    mbarrier.arrive(free.index(before), count=1, pred=block + u > 0)
            if not LAG:
                gate, up = warpgroup_mma_wait(0, deps=(gate, up))
                last, _ = _stage(round, U - 1, U, STAGES)
                mbarrier.arrive(free.index(last), count=1)
            round += 1
        if LAG:
            gate, up = warpgroup_mma_wait(0, deps=(gate, up))
            last, _ = _stage(round - 1, U - 1, U, STAGES)
            mbarrier.arrive(free.index(last), count=1)
        _finish(gate, up, group, number, out, sizes, spare, GROUPS, BAND, GATED, GELU, DIRECT)
    if not DIRECT:
        tma.store_wait(0)


@gluon.jit
def _multiply(group: gl.constexpr, out, sizes, rings, bars, spares, BAND: gl.constexpr, GATED: gl.constexpr,
              GELU: gl.constexpr, U: gl.constexpr, LAG: gl.constexpr, DIRECT: gl.constexpr, EACH: gl.constexpr):
    if EACH:
        _multiply_each(group, out, sizes, rings, bars, spares, BAND, GATED, GELU, U, LAG, DIRECT)
    else:
        _multiply_both(group, out, sizes, rings, bars, spares, BAND, GATED, GELU, U, LAG, DIRECT)


# --- the program ----------------------------------------------------------------------------------------------------------------


@gluon.jit(do_not_specialize=["M"])
def _product_kernel(x, weight, out, M, N, K, GROUPS: gl.constexpr, STAGES: gl.constexpr, U: gl.constexpr, LAG: gl.constexpr,
                    DIRECT: gl.constexpr, BAND: gl.constexpr, GATED: gl.constexpr, GELU: gl.constexpr, EACH: gl.constexpr,
                    MULTIPLYING: gl.constexpr, BRINGING: gl.constexpr):
    columns = gl.allocate_shared_memory(x.dtype, [GROUPS * STAGES, ROWS, DEPTH], x.layout)
    weights = gl.allocate_shared_memory(x.dtype, [2 * STAGES, HALF, DEPTH], weight.layout)
    spares = columns
    if not DIRECT:
        spares = gl.allocate_shared_memory(x.dtype, [GROUPS, ROWS, HALF], out.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=GROUPS)
    sizes = (M + GROUPS * ROWS - 1) // (GROUPS * ROWS), N // (2 * HALF), K // DEPTH, M, N
    rings = columns, weights
    bars = ready, free
    if GROUPS == 2:
        gl.warp_specialize([
            (_multiply, (0, out, sizes, rings, bars, spares, BAND, GATED, GELU, U, LAG, DIRECT, EACH)),
            (_multiply, (1, out, sizes, rings, bars, spares, BAND, GATED, GELU, U, LAG, DIRECT, EACH)),
            (_bring, (x, weight, sizes, rings, bars, BAND, GATED)),
        ], [4, 1], [MULTIPLYING, BRINGING])
    else:
        gl.warp_specialize([
            (_multiply, (0, out, sizes, rings, bars, spares, BAND, GATED, GELU, U, LAG, DIRECT, EACH)),
            (_multiply, (1, out, sizes, rings, bars, spares, BAND, GATED, GELU, U, LAG, DIRECT, EACH)),
            (_multiply, (2, out, sizes, rings, bars, spares, BAND, GATED, GELU, U, LAG, DIRECT, EACH)),
            (_bring, (x, weight, sizes, rings, bars, BAND, GATED)),
        ], [4, 4, 1], [MULTIPLYING, MULTIPLYING, BRINGING])


class Way(NamedTuple):
    """How a product is cut and computed.

    groups: that multiply, of 64 rows each. stages: of the ring. unroll: blocks of a turn of the loop, whose last product is
    waited for at its end, or with lag in the next one. direct: results go out from registers. band: tiles of x taken together.
    each: gate and up by instructions of their own.
    """

    groups: int
    stages: int
    unroll: int
    lag: bool
    direct: bool
    band: int
    each: bool


BEST = Way(2, 4, 4, False, False, 16, False)
LEAST_ROWS = 4096       # of x
# Registers of a thread, by the groups that multiply: on average, of theirs, of the warp that brings.
REGISTERS = {2: (168, 232, 40), 3: (128, 160, 32)}
LAYOUTS = {dtype: tuple(gl.NVMMASharedLayout.get_default_for(block, kind) for block in ([64, 64], [128, 64], [64, 128]))
           for dtype, kind in ((torch.bfloat16, gl.bfloat16), (torch.float16, gl.float16))}


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether a gated product of these is for this kernel: on a Hopper, of many rows, where and what TMA can bring."""
    rows, depth = x.shape
    if rows < LEAST_ROWS or x.dtype not in LAYOUTS or weight.dtype != x.dtype or not processors(x.device):
        return False
    lies = all(t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0 for t in (x, weight))
    return lies and weight.shape[0] % 256 == 0 and depth % (64 * BEST.unroll) == 0


def product(x: Tensor, weight: Tensor, activation: str, way: Way = BEST, out: Tensor | None = None) -> Tensor:
    """x [M, K] times the weight [gate | up], [N, K], both of one 16-bit dtype -> gated_act of it, [M, N / 2].

    Without an activation: the product, [M, N]. N is a multiple of 256, K of 64 times way.unroll; rows of x may be strided.
    """
    (rows, depth), features = x.shape, weight.shape[0]
    assert features % 256 == 0 and depth % (64 * way.unroll) == 0
    width = features // 2 if activation else features
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device) if out is None else out
    of_rows, of_weights, of_out = LAYOUTS[x.dtype]
    registers, multiplying, bringing = REGISTERS[way.groups]
    tiles = cdiv(rows, 64 * way.groups) * (features // 256)
    _product_kernel[min(tiles, processors(x.device)),](
        TensorDescriptor.from_tensor(x, [64, 64], of_rows), TensorDescriptor.from_tensor(weight, [128, 64], of_weights),
        out if way.direct else TensorDescriptor.from_tensor(out, [64, 128], of_out), rows, features, depth, GROUPS=way.groups,
        STAGES=way.stages, U=way.unroll, LAG=way.lag, DIRECT=way.direct, BAND=way.band, GATED=bool(activation),
        GELU=activation == "gelu_tanh", EACH=way.each, MULTIPLYING=multiplying, BRINGING=bringing, num_warps=4, maxnreg=registers)
    return out


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """See ref.gated_linear, for many rows, which may be strided: what is not for this kernel by cuBLAS and pointwise.py."""
    if bias is None and takes(x, weight):
        return product(x, weight, activation)
    return gated_act(ref.linear(x, weight, bias, None), activation)
