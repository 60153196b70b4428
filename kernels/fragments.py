"""Operands of mma.sync in registers, as Gluon has them: what the kernels share that multiply few rows straight from memory.

Tensors have a leading dimension of a program's warps, each of which makes a product of its own: [warps, rows, columns]. Which
numbers along K a lane has is up to what it loads at once, and is the same for both operands. For Triton the programs of a cluster
have the same elements.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


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


HALVES = tl.constexpr("mov.b32 {$0, $1}, $2;")


@gluon.jit
def halves(words, KIND: tl.constexpr):
    """int32 [warps, rows, C / 2] of two 16-bit numbers each, four of them a lane -> these, [warps, rows, C], as an operand."""
    WARPS: tl.constexpr = words.shape[0]
    low, high = gl.inline_asm_elementwise(HALVES, "=h,=h,r", [words], (gl.int16, gl.int16), is_pure=True, pack=1)
    whole = gl.reshape(gl.join(low, high).to(KIND, bitcast=True), [WARPS, words.shape[1], words.shape[2] * 2])
    return gl.convert_layout(whole, operand_layout(0, WARPS, 8, gl.num_ctas()), assert_trivial=True)
