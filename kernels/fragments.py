"""Operands of mma.sync in registers, as Gluon has them: what the kernels share that multiply few rows straight from memory.

Tensors have a leading dimension of a program's warps, each of which makes a product of its own: [warps, rows, columns]. Which
numbers along K a lane has is up to what it loads at once, and is the same for both operands. For Triton the programs of a cluster
have the same elements.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.pointwise import gate

MOST_ROWS = 8       # of x, which one product of the tensor cores has room for
ROWS = tl.constexpr(MOST_ROWS)


@gluon.constexpr_function
def alike(programs, rank):
    """The part of a cluster's programs in a layout of so many dimensions."""
    return [[0] * rank for _ in range(programs.bit_length() - 1)]


@gluon.constexpr_function
def sums_layout(warps, programs=1):
    """Of float32 [warps, outputs, 8], each warp having sums of its own."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1, 1], instr_shape=[1, 16, 8],
                                     cga_layout=alike(programs, 3))


@gluon.constexpr_function
def operand_layout(index, warps, run, programs=1):
    """Of the weights (0) [warps, outputs, inputs] and of x (1) [warps, inputs, 8]: a lane has `run` inputs after another."""
    return gl.DotOperandLayout(index, sums_layout(warps, programs), run)


@gluon.constexpr_function
def _along(layout, rank, dim):
    """Of what is broadcast along all dimensions but `dim`."""
    for other in reversed(range(rank)):
        if other != dim:
            layout = gl.SliceLayout(other, layout)
    return layout


@gluon.jit
def count(size: tl.constexpr, dim: tl.constexpr, rank: tl.constexpr, layout: tl.constexpr):
    """0 to size along one dimension of a tensor."""
    n = gl.arange(0, size, _along(layout, rank, dim))
    for other in gl.static_range(rank):
        if other != dim:
            n = gl.expand_dims(n, other)
    return n


# Two registers of four e4m3 numbers each as float16, which holds them exactly, and whose products are added in float32. (Hopper's
# mma.sync of e4m3 does the same; its wgmma adds in fewer bits.)
TO_FLOAT16 = tl.constexpr("""{
.reg .b16 a, b, c, d;
mov.b32 {a, b}, $4;
mov.b32 {c, d}, $5;
cvt.rn.f16x2.e4m3x2 $0, a;
cvt.rn.f16x2.e4m3x2 $1, b;
cvt.rn.f16x2.e4m3x2 $2, c;
cvt.rn.f16x2.e4m3x2 $3, d;
}""")


@gluon.jit
def numbers(words):
    """int32 of four e4m3 numbers each -> these in float16, in four parts: which goes where is the same for weights and x."""
    return gl.inline_asm_elementwise(TO_FLOAT16, "=&r,=&r,=&r,=&r,r,r", [words], (gl.float16,) * 4, is_pure=True, pack=2)


# Two halves of a word.
HALVES = tl.constexpr("mov.b32 {$0, $1}, $2;")


@gluon.jit
def halves(words, DTYPE: tl.constexpr):
    """int32 [warps, rows, words] of two 16-bit numbers each -> these [warps, rows, 2 words], in the same lanes."""
    low, high = gl.inline_asm_elementwise(HALVES, "=h,=h,r", [words], (gl.int16, gl.int16), is_pure=True, pack=1)
    return gl.reshape(gl.join(low, high).to(DTYPE, bitcast=True), [words.shape[0], words.shape[1], words.shape[2] * 2])


@gluon.jit
def weight_rows(n, N, GATED: tl.constexpr, OUTPUTS: tl.constexpr):
    """The weight's rows of this program's outputs n, of OUTPUTS; GATED: one half of gate's N rows, the other of up's."""
    if GATED:
        row = gl.program_id(0) * (OUTPUTS // 2) + n % (OUTPUTS // 2) + n // (OUTPUTS // 2) * N
    else:
        row = gl.program_id(0) * OUTPUTS + n
    return row


@gluon.jit
def finish(acc, bias, out, M, N, BIAS: tl.constexpr, GATED: tl.constexpr, GELU: tl.constexpr, OUTPUTS: tl.constexpr,
           WARPS: tl.constexpr):
    """Add up the warps' sums [WARPS, OUTPUTS, 8], and write them to out [M, N], rounded where the separate kernels do."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    WIDTH: tl.constexpr = OUTPUTS // 2 if GATED else OUTPUTS
    LANES: tl.constexpr = min(WIDTH, 16)        # GATED: a lane has both halves' outputs
    apart: tl.constexpr = gl.BlockedLayout([WARPS, 1, 1], [1, LANES, 32 // LANES], [1, 1, WARPS], [0, 1, 2])
    whole: tl.constexpr = gl.SliceLayout(0, apart)
    y = gl.sum(gl.convert_layout(acc, apart), 0)
    if BIAS:
        y += gl.load(bias + weight_rows(count(OUTPUTS, 0, 2, whole), N, GATED, OUTPUTS)).to(gl.float32)
    y = y.to(DTYPE)
    if GATED:
        low, up = gl.split(gl.permute(gl.reshape(y, [2, WIDTH, ROWS]), [1, 2, 0]))
        y = gl.convert_layout(gate(low.to(gl.float32), up.to(gl.float32), GELU, DTYPE), whole)
    n, m = gl.program_id(0) * WIDTH + count(WIDTH, 0, 2, whole), count(ROWS, 1, 2, whole)
    gl.store(out + m * N + n, y, mask=m < M)
