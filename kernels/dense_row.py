"""Products of one row with 16-bit weights on Hopper, in Gluon: in registers, without the tensor cores.

As dense_few.py, but a warp takes 512 bytes of each of its program's rows of the weight at a time, which a lane multiplies by the
numbers of x that it has for all of them: in a step 5 % faster than 8 columns of which one is filled.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.fragments import HALVES, count, weight_rows
from kernels.overlap import after, launch_options, overlaps, prefetch
from kernels.pointwise import gate

DEPTH = 256                             # inputs in a block
WIDTH = tl.constexpr(DEPTH // 2)        # words


@gluon.constexpr_function
def lines_layout(warps, outputs):
    """Of words [warps, outputs, 128]: a lane has 16 bytes of each output's."""
    return gl.BlockedLayout([1, outputs, 4], [1, 1, 32], [warps, 1, 1], [2, 1, 0])


@gluon.jit
def _words(turn, at, blocks, EVICT: tl.constexpr, WARPS: tl.constexpr, layout: tl.constexpr):
    """Words of each warp's block of this turn [WARPS, outputs or 1, 128]; 0 past the last."""
    return gl.load(at, mask=turn * WARPS + count(WARPS, 0, 3, layout) < blocks, other=0, eviction_policy=EVICT)


@gluon.jit
def _floats(words, DTYPE: tl.constexpr):
    """Both numbers of each word."""
    low, high = gl.inline_asm_elementwise(HALVES, "=h,=h,r", [words], (gl.int16, gl.int16), is_pure=True, pack=1)
    return low.to(DTYPE, bitcast=True).to(gl.float32), high.to(DTYPE, bitcast=True).to(gl.float32)


@gluon.jit
def _product_kernel(x, weight, bias, out, N, WORDS, BIAS: tl.constexpr, GATED: tl.constexpr, GELU: tl.constexpr,
                    OUTPUTS: tl.constexpr, AHEAD: tl.constexpr, OVERLAP: tl.constexpr, WARPS: tl.constexpr):
    """x [WORDS] and weight, N rows of WORDS (GATED: 2 N): int32 of two numbers each."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    lines: tl.constexpr = lines_layout(WARPS, OUTPUTS)
    blocks = WORDS // WIDTH
    row = weight_rows(count(OUTPUTS, 1, 3, lines), N, GATED, OUTPUTS)
    place = count(WARPS, 0, 3, lines) * WIDTH + count(WIDTH, 2, 3, lines)
    weight_at = weight + row.to(gl.int64) * WORDS + place
    ahead = ()  # type: tuple
    for i in gl.static_range(AHEAD):
        ahead += (_words(i, weight_at, blocks, "evict_first", WARPS, lines),)
        weight_at += WARPS * WIDTH
    if BIAS:
        prefetch(bias + weight_rows(0, N, GATED, OUTPUTS))
    after(OVERLAP)

    x_at = x + place
    inputs = _words(0, x_at, blocks, "", WARPS, lines)
    lanes: tl.constexpr = gl.BlockedLayout([1, OUTPUTS, 1], [1, 1, 32], [WARPS, 1, 1], [2, 1, 0])
    acc = gl.full([WARPS, OUTPUTS, WIDTH // 4], 0.0, gl.float32, lanes)
    for begin in range(0, gl.cdiv(blocks, WARPS), AHEAD):
        fetched = ()  # type: tuple
        for i in gl.static_range(AHEAD):
            x_low, x_high = _floats(inputs, DTYPE)
            x_at += WARPS * WIDTH
            inputs = _words(begin + i + 1, x_at, blocks, "", WARPS, lines)
            low, high = _floats(ahead[i], DTYPE)
            product = gl.reshape(low * x_low + high * x_high, [WARPS, OUTPUTS, WIDTH // 4, 4])
            acc += gl.convert_layout(gl.sum(product, 3), lanes, assert_trivial=True)
            fetched += (_words(begin + i + AHEAD, weight_at, blocks, "evict_first", WARPS, lines),)
            weight_at += WARPS * WIDTH
        ahead = fetched

    whole: tl.constexpr = gl.BlockedLayout([OUTPUTS], [32], [WARPS], [0])       # all outputs in every lane
    y = gl.convert_layout(gl.sum(gl.sum(acc, 2), 0), whole)
    if BIAS:
        y += gl.load(bias + weight_rows(gl.arange(0, OUTPUTS, whole), N, GATED, OUTPUTS)).to(gl.float32)
    y = y.to(DTYPE)
    if GATED:
        low, up = gl.split(gl.permute(gl.reshape(y, [2, OUTPUTS // 2]), [1, 0]))
        half: tl.constexpr = gl.BlockedLayout([OUTPUTS // 2], [32], [WARPS], [0])
        y = gl.convert_layout(gate(low.to(gl.float32), up.to(gl.float32), GELU, DTYPE), half)
        n = gl.program_id(0) * (OUTPUTS // 2) + gl.arange(0, OUTPUTS // 2, half)
    else:
        n = gl.program_id(0) * OUTPUTS + gl.arange(0, OUTPUTS, whole)
    gl.store(out + n, y)


class Tile(NamedTuple):
    """What one program does, and how."""

    warps: int          # they share K
    outputs: int        # a power of two from 2 on
    ahead: int          # blocks that a warp has asked for while it multiplies one
    registers: int = 0  # of a thread, at most; 0: as many as the compiler takes


def product(x: Tensor, weight: Tensor, bias: Tensor | None, tile: Tile, activation: str = "",
            out: Tensor | None = None) -> Tensor:
    """x [1, K] and weight [N, K], both of the same 16 bits -> [1, N], into `out` if given; with an activation its gated_act.

    K is a multiple of 256, N of tile.outputs.
    """
    features = weight.shape[0]
    if out is None:
        out = torch.empty((1, features // 2 if activation else features), dtype=x.dtype, device=x.device)
    words = weight.view(torch.int32)
    limit = {"maxnreg": tile.registers} if tile.registers else {}
    _product_kernel[features // tile.outputs,](
        x.view(torch.int32), words, out if bias is None else bias, out, out.shape[1], words.shape[1], BIAS=bias is not None,
        GATED=bool(activation), GELU=activation == "gelu_tanh", OUTPUTS=tile.outputs, AHEAD=tile.ahead, WARPS=tile.warps,
        num_warps=tile.warps, **limit, **launch_options(overlaps(x.device)))
    return out
