"""Products of 1 to 8 rows with 16-bit weights on Hopper, in Gluon: y^T = W x^T by mma.sync, straight from memory.

As gemm_few.py: the warps of a program share K, each takes every WARPS-th block of DEPTH inputs for the same outputs; weights go
from memory to the registers that the tensor cores read, as words of two numbers, 16 bytes a lane at a time and AHEAD blocks
ahead. Of x a warp has one block ahead, which mostly comes from the L2: no two warps of a program want the same.

What counts in a step is that the memory has something to do while one product ends and the next begins. So a program asks for
its first weights before the wait for x, and leaves room on its multiprocessor for programs of the kernel to come.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from kernels.fragments import ROWS, count, finish, halves, operand_layout, sums_layout, weight_rows
from kernels.hopper import processors
from kernels.overlap import after, launch_options, overlaps, prefetch


@gluon.jit
def _weights(turn, weight_at, blocks, WARPS: tl.constexpr):
    """Words of each warp's block of this turn [WARPS, outputs, DEPTH / 2]; 0 past the last."""
    block = turn * WARPS + count(WARPS, 0, 3, operand_layout(0, WARPS, 4))
    return gl.load(weight_at, mask=block < blocks, other=0, eviction_policy="evict_first")


@gluon.jit
def _inputs(turn, x_at, blocks, WIDTH: tl.constexpr, WARPS: tl.constexpr, along: tl.constexpr):
    """Words of x for it [WARPS, 8, DEPTH / 2]; past the last those of the last."""
    block = turn * WARPS + count(WARPS, 0, 3, along)
    return gl.load(x_at + gl.minimum(block, blocks - 1) * WIDTH)


@gluon.jit(do_not_specialize=["M"])
def _product_kernel(x, weight, bias, out, M, N, WORDS, x_stride, BIAS: tl.constexpr, GATED: tl.constexpr, GELU: tl.constexpr,
                    OUTPUTS: tl.constexpr, DEPTH: tl.constexpr, AHEAD: tl.constexpr, OVERLAP: tl.constexpr, WARPS: tl.constexpr):
    """x, weight: M and N (GATED: 2 N) rows of WORDS int32 of two numbers each; x_stride: words from row to row of x."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    WIDTH: tl.constexpr = DEPTH // 2        # words of a block
    sums: tl.constexpr = sums_layout(WARPS)
    stored: tl.constexpr = operand_layout(0, WARPS, 4)
    left: tl.constexpr = operand_layout(0, WARPS, 8)
    right: tl.constexpr = operand_layout(1, WARPS, 8)
    along: tl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 8, 4], [WARPS, 1, 1], [2, 1, 0])      # of x as it lies in memory
    blocks = WORDS // WIDTH
    row = weight_rows(count(OUTPUTS, 1, 3, stored), N, GATED, OUTPUTS)
    weight_at = weight + row.to(gl.int64) * WORDS + count(WARPS, 0, 3, stored) * WIDTH + count(WIDTH, 2, 3, stored)
    ahead = ()  # type: tuple
    for i in gl.static_range(AHEAD):
        ahead += (_weights(i, weight_at, blocks, WARPS),)
        weight_at += WARPS * WIDTH
    if BIAS:
        prefetch(bias + weight_rows(0, N, GATED, OUTPUTS))
    after(OVERLAP)

    x_at = x + gl.minimum(count(ROWS, 1, 3, along), M - 1) * x_stride + count(WIDTH, 2, 3, along)
    inputs = _inputs(0, x_at, blocks, WIDTH, WARPS, along)
    acc = gl.full([WARPS, OUTPUTS, ROWS], 0.0, gl.float32, sums)
    for begin in range(0, gl.cdiv(blocks, WARPS), AHEAD):
        fetched = ()  # type: tuple
        for i in gl.static_range(AHEAD):
            rows = gl.convert_layout(halves(ahead[i], DTYPE), left, assert_trivial=True)
            columns = gl.convert_layout(gl.permute(halves(inputs, DTYPE), [0, 2, 1]), right, assert_trivial=True)
            inputs = _inputs(begin + i + 1, x_at, blocks, WIDTH, WARPS, along)
            acc = mma_v2(rows, columns, acc)
            fetched += (_weights(begin + i + AHEAD, weight_at, blocks, WARPS),)
            weight_at += WARPS * WIDTH
        ahead = fetched
    finish(acc, bias, out, M, N, BIAS, GATED, GELU, OUTPUTS, WARPS)


class Tile(NamedTuple):
    """What one program does, and how."""

    warps: int          # they share K
    outputs: int        # a power of two from 16 on
    depth: int          # inputs in a block: 64, 128 or 256
    ahead: int          # blocks that a warp has asked for while it multiplies one


def takes(x: Tensor) -> bool:
    """Whether x is where and what the kernel is made for: on a Hopper, read 16 bytes at a time, in words.

    Triton knows of a stride whether 16 divides it, and of no smaller power of two.
    """
    return x.element_size() == 2 and x.stride(0) % 32 == 0 and x.data_ptr() % 16 == 0 and processors(x.device) > 0


def product(x: Tensor, weight: Tensor, bias: Tensor | None, tile: Tile, activation: str = "",
            out: Tensor | None = None) -> Tensor:
    """x [M, K], M up to 8, and weight [N, K] -> [M, N], into `out` if given; with an activation its gated_act, [M, N / 2].

    Both of the same 16 bits, rows of x may be strided. K is a multiple of tile.depth, N of tile.outputs.
    """
    rows, features = x.shape[0], weight.shape[0]
    if out is None:
        out = torch.empty((rows, features // 2 if activation else features), dtype=x.dtype, device=x.device)
    inputs, words = x.view(torch.int32), weight.view(torch.int32)
    _product_kernel[features // tile.outputs,](
        inputs, words, out if bias is None else bias, out, rows, out.shape[1], words.shape[1], inputs.stride(0),
        BIAS=bias is not None, GATED=bool(activation), GELU=activation == "gelu_tanh", OUTPUTS=tile.outputs, DEPTH=tile.depth,
        AHEAD=tile.ahead, WARPS=tile.warps, num_warps=tile.warps, **launch_options(overlaps(x.device)))
    return out
