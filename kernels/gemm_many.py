"""Products of many rows on Hopper, in Gluon, that end with what follows: gate and up with act(x gate^T) * (x up^T), o and down
with their sum with the residual stream. There is no pass over the product.

A program has 128 rows of x, 64 to each of two warp groups that multiply, and 128 rows of the weight's first half (gate) with the
same 128 of the second (up), which are one operand of 256. One more warp brings 64 of K at a time of all these by TMA into a ring
in shared memory. Every thread finds gate and up of the same places in its own registers, so the activation moves nothing; sums
with the residual are made where it lies, by the L2. As one program fills a multiprocessor, it takes tile after tile: what the
next one needs is on its way before this one is done, and while one group ends its tile, the other has the tensor cores.

Tiles are taken in bands of x, whose weights' columns lie side by side, so that those at work together share what the L2 holds.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin, ir
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


@builtin
def _add(desc, coord, src, _semantic=None):
    """Triton 3.6 has the operation, and no name for it."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, src.handle)


# By their names of before Triton 3.7, and of since.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
tma_add = getattr(tma, "async_atomic_add", None) or _add

GROUPS = gl.constexpr(2)        # warp groups that multiply
ROWS = gl.constexpr(64)         # of x, to a warp group
HALF = gl.constexpr(128)        # rows of the weight's first half (gate), and of its second (up)
DEPTH = gl.constexpr(64)        # of K, in a block of the ring
STAGES = gl.constexpr(4)        # blocks of the ring
BAND = gl.constexpr(16)         # tiles of x
BOTH = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
EACH = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))


@gluon.jit
def _tile(number, sizes):
    """(tile of x, tile of the weight) of one number: BAND tiles of x by all of the weight's, one of these after the other."""
    m_tiles, n_tiles, _ = sizes
    band = number // (BAND * n_tiles)
    rows = gl.minimum(m_tiles - band * BAND, BAND)
    place = number % (BAND * n_tiles)
    return band * BAND + place % rows, place // rows


@gluon.jit
def _bring(x, weight, sizes, rings, bars):
    """Block after block of all of the program's tiles, whatever is free of the ring."""
    columns, weights = rings
    ready, free = bars
    m_tiles, n_tiles, blocks = sizes
    turn = 0
    for number in range(gl.program_id(0), m_tiles * n_tiles, gl.num_programs(0)):
        m, n = _tile(number, sizes)
        for block in range(blocks):
            stage = turn % STAGES
            mbarrier.wait(free.index(stage), turn // STAGES & 1 ^ 1)
            bar = ready.index(stage)
            mbarrier.expect(bar, (GROUPS * ROWS + 2 * HALF) * DEPTH * 2)
            for group in gl.static_range(GROUPS):
                tma_load(x, [(m * GROUPS + group) * ROWS, block * DEPTH], bar, columns.index(stage * GROUPS + group))
            for half in gl.static_range(2):
                tma_load(weight, [(half * n_tiles + n) * HALF, block * DEPTH], bar, weights.index(stage * 2 + half))
            turn += 1


# Two numbers at once: one at a time, conversions run at a quarter of the speed.
ROUND_BF16 = gl.constexpr("{.reg .b32 t; cvt.rn.bf16x2.f32 t, $3, $2; shl.b32 $0, t, 16; and.b32 $1, t, 0xffff0000;}")
ROUND_FP16 = gl.constexpr("{.reg .b32 t; .reg .b16 a, b; cvt.rn.f16x2.f32 t, $3, $2; mov.b32 {a, b}, t; "
                          "cvt.f32.f16 $0, a; cvt.f32.f16 $1, b;}")


@gluon.jit
def _rounded(x, DTYPE: gl.constexpr):
    """float32, as if it had been stored as DTYPE in between."""
    return gl.inline_asm_elementwise(ROUND_BF16 if DTYPE == gl.bfloat16 else ROUND_FP16, "=f,=f,f,f", [x], gl.float32,  # noqa: SIM300
                                     is_pure=True, pack=2)


@gluon.jit
def _halves(sums):
    """A group's sums, float32 [64, first half | second], apart; each thread keeps its own."""
    first, second = gl.split(gl.permute(gl.reshape(sums, [ROWS, 2, HALF]), [0, 2, 1]))
    return gl.convert_layout(first, EACH, assert_trivial=True), gl.convert_layout(second, EACH, assert_trivial=True)


@gluon.jit
def _write_gated(sums, row, column, out, y, GELU: gl.constexpr):
    """A group's tile of the gated activation, through y, its part of shared memory."""
    DTYPE: gl.constexpr = out.dtype
    gate, up = _halves(sums)
    # Rounded where the separate kernels round.
    gated = _rounded(activate(_rounded(gate, DTYPE), GELU), DTYPE) * _rounded(up, DTYPE)
    tma.store_wait(0)       # of the tile before
    y.store(gated.to(DTYPE))
    fence_async_shared()
    tma_store(out, [row, column], y)    # nothing past the last row


@gluon.jit
def _add_both(sums, row, column, half, out, y):
    """Add a group's tiles of both halves of the columns, `half` apart, to out. One product is added to each number there, so that
    no order can change a bit."""
    halves = _halves(sums)
    for part in gl.static_range(2):
        tma.store_wait(0)       # of the tile, or half, before
        y.store(halves[part].to(out.dtype))
        fence_async_shared()
        tma_add(out, [row, part * half + column], y)


@gluon.jit
def _multiply(group: gl.constexpr, out, sizes, rings, bars, results, END: gl.constexpr):
    """The tensor cores are asked for a block before the one before it is done, but for the last of a turn around the ring.

    At the end of a turn none is with them: the compiler would wait for each instruction if it had to follow them around the loop.
    """
    columns, weights = rings
    ready, free = bars
    of_both: gl.constexpr = gl.NVMMASharedLayout.get_default_for([2 * HALF, DEPTH], weights.dtype)
    pairs = reinterpret(weights, weights.dtype, [STAGES, 2 * HALF, DEPTH], of_both)
    m_tiles, n_tiles, blocks = sizes
    turn = 0
    for number in range(gl.program_id(0), m_tiles * n_tiles, gl.num_programs(0)):
        sums = gl.zeros([ROWS, 2 * HALF], gl.float32, BOTH)
        for _ in range(0, blocks, STAGES):
            for stage in gl.static_range(STAGES):
                mbarrier.wait(ready.index(stage), turn & 1)
                x = columns.index(stage * GROUPS + group)
                sums = warpgroup_mma(x, pairs.index(stage).permute((1, 0)), sums, is_async=True)
                if stage > 0:
                    sums = warpgroup_mma_wait(1, deps=(sums,))
                    mbarrier.arrive(free.index(stage - 1), count=1)
            sums = warpgroup_mma_wait(0, deps=(sums,))
            mbarrier.arrive(free.index(STAGES - 1), count=1)
            turn += 1
        m, n = _tile(number, sizes)
        row, y = (m * GROUPS + group) * ROWS, results.index(group)
        if END == "add":
            _add_both(sums, row, n * HALF, n_tiles * HALF, out, y)
        else:
            _write_gated(sums, row, n * HALF, out, y, END == "gelu_tanh")
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M"])
def _product_kernel(x, weight, out, M, N, K, END: gl.constexpr, MULTIPLYING: gl.constexpr, BRINGING: gl.constexpr):
    columns = gl.allocate_shared_memory(x.dtype, [STAGES * GROUPS, ROWS, DEPTH], x.layout)
    weights = gl.allocate_shared_memory(x.dtype, [STAGES * 2, HALF, DEPTH], weight.layout)
    results = gl.allocate_shared_memory(x.dtype, [GROUPS, ROWS, HALF], out.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=GROUPS)
    sizes = (M + GROUPS * ROWS - 1) // (GROUPS * ROWS), N // (2 * HALF), K // DEPTH
    rings = columns, weights
    bars = ready, free
    gl.warp_specialize([(_multiply, (0, out, sizes, rings, bars, results, END)),
                        (_multiply, (1, out, sizes, rings, bars, results, END)),
                        (_bring, (x, weight, sizes, rings, bars))], [4, 1], [MULTIPLYING, BRINGING])


LEAST_GATED = 832           # rows of x: of fewer, cuBLAS and pointwise.py are as fast or faster
LEAST_ADDED = 4096          # likewise, where the sum with the residual is all that is saved
LEAST_FULL = 0.93           # the share of the programs' turns that have a tile: their last one may find few
N_STEP, K_STEP = 256, 256   # of these N and K are multiples: of a tile, and of a turn around the ring
# Registers of a thread: on average, of the groups that multiply, of the warp that brings.
REGISTERS, MULTIPLYING, BRINGING = 168, 232, 40
BLOCKS = [64, 64], [128, 64], [64, 128]         # of x, the weight and what is written, as TMA has them
LAYOUTS = {dtype: tuple(gl.NVMMASharedLayout.get_default_for(block, kind) for block in BLOCKS)
           for dtype, kind in ((torch.bfloat16, gl.bfloat16), (torch.float16, gl.float16))}


def _takes(x: Tensor, weight: Tensor, *others: Tensor) -> bool:
    """Whether the kernel can multiply these: on a Hopper, where and what TMA can bring; it writes to the others."""
    tensors = (x, weight, *others)
    if x.dtype not in LAYOUTS or any(t.dtype != x.dtype for t in tensors) or not processors(x.device):
        return False
    lies = all(t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0 for t in tensors)
    return lies and weight.shape[0] % N_STEP == 0 and weight.shape[1] % K_STEP == 0


def takes_gated(x: Tensor, weight: Tensor) -> bool:
    """Whether gated_product is the way for these."""
    return x.shape[0] >= LEAST_GATED and _takes(x, weight)


def takes_added(x: Tensor, weight: Tensor, residual: Tensor) -> bool:
    """Whether add_product is the way for these."""
    if x.shape[0] < LEAST_ADDED or not _takes(x, weight, residual):
        return False
    tiles, at_once = _tiles(x, weight), processors(x.device)
    return tiles >= LEAST_FULL * at_once * cdiv(tiles, at_once)


def _tiles(x: Tensor, weight: Tensor) -> int:
    return cdiv(x.shape[0], 128) * (weight.shape[0] // N_STEP)


def _launch(x: Tensor, weight: Tensor, out: Tensor, end: str) -> None:
    described = (TensorDescriptor.from_tensor(*of) for of in zip((x, weight, out), BLOCKS, LAYOUTS[x.dtype], strict=True))
    _product_kernel[min(_tiles(x, weight), processors(x.device)),](
        *described, x.shape[0], *weight.shape, END=end, MULTIPLYING=MULTIPLYING, BRINGING=BRINGING, num_warps=4,
        maxnreg=REGISTERS)


def gated_product(x: Tensor, weight: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """x [M, K] times the weight [gate | up], [N, K], both of one 16-bit dtype -> gated_act of it, [M, N / 2].

    N and K are multiples of 256; rows of x may be strided.
    """
    out = torch.empty((x.shape[0], weight.shape[0] // 2), dtype=x.dtype, device=x.device) if out is None else out
    _launch(x, weight, out, activation)
    return out


def add_product(x: Tensor, weight: Tensor, residual: Tensor) -> None:
    """residual [M, N] += x [M, K] times the weight [N, K], all of one 16-bit dtype; rounded before the sum and after.

    N and K are multiples of 256; rows of x and of the residual may be strided.
    """
    _launch(x, weight, residual, "add")


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """See ref.gated_linear, for many rows, which may be strided: what is not for this kernel by cuBLAS and pointwise.py."""
    if bias is None and takes_gated(x, weight):
        return gated_product(x, weight, activation)
    return gated_act(ref.linear(x, weight, bias, None), activation)


def linear_onto(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor | None:
    """See ref.linear_onto, likewise."""
    if bias is None and takes_added(x, weight, residual):
        add_product(x, weight, residual)
        return None
    return ref.linear(x, weight, bias, None)
