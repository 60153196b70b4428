"""Products of 1 to 8 rows with dense 16-bit weights on Hopper, in Gluon: as gemm_few.py, but there is nothing to unpack."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from kernels.fragments import count, halves, operand_layout, sums_layout
from kernels.gemm_few import MOST_ROWS, finish
from kernels.hopper import processors
from kernels.overlap import after, launch_options, overlaps

ROWS = tl.constexpr(MOST_ROWS)


@gluon.jit
def _fetch(turn, weight_at, blocks, WARPS: tl.constexpr):
    """Words [WARPS, outputs, inputs / 2] of each warp's block of this turn; 0 past the last."""
    block = turn * WARPS + count(WARPS, 0, 3, operand_layout(0, WARPS, 4))
    return gl.load(weight_at, mask=block < blocks, other=0, eviction_policy="evict_first")


@gluon.jit(do_not_specialize=["M"])
def _product_kernel(x, weight, bias, out, M, N, WORDS, x_stride, BIAS: tl.constexpr, OUTPUTS: tl.constexpr,
                    INPUTS: tl.constexpr, AHEAD: tl.constexpr, OVERLAP: tl.constexpr, WARPS: tl.constexpr):
    """weight [N, WORDS]: int32 of two numbers each."""
    KIND: tl.constexpr = x.dtype.element_ty
    sums: tl.constexpr = sums_layout(WARPS)
    left: tl.constexpr = operand_layout(0, WARPS, 4)
    right: tl.constexpr = operand_layout(1, WARPS, 8)
    along: tl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 8, 4], [WARPS, 1, 1], [2, 1, 0])      # of x as it lies in memory
    EACH: tl.constexpr = INPUTS // 2
    blocks = WORDS // EACH
    n = gl.program_id(0) * OUTPUTS + count(OUTPUTS, 1, 3, left)
    weight_at = weight + n.to(gl.int64) * WORDS + count(WARPS, 0, 3, left) * EACH + count(EACH, 2, 3, left)
    ahead = ()  # type: tuple
    for i in gl.static_range(AHEAD):
        ahead += (_fetch(i, weight_at, blocks, WARPS),)
        weight_at += WARPS * EACH
    after(OVERLAP)

    s = count(WARPS, 0, 3, along)
    x_at = x + gl.minimum(count(ROWS, 1, 3, along), M - 1) * x_stride + count(INPUTS, 2, 3, along)
    acc = gl.full([WARPS, OUTPUTS, ROWS], 0.0, gl.float32, sums)
    for begin in range(0, gl.cdiv(blocks, WARPS), AHEAD):
        fetched = ()  # type: tuple
        for i in gl.static_range(AHEAD):
            rows = halves(ahead[i], KIND)
            columns = gl.load(x_at + gl.minimum((begin + i) * WARPS + s, blocks - 1) * INPUTS)
            acc = mma_v2(rows, gl.convert_layout(gl.permute(columns, [0, 2, 1]), right, assert_trivial=True), acc)
            fetched += (_fetch(begin + i + AHEAD, weight_at, blocks, WARPS),)
            weight_at += WARPS * EACH
        ahead = fetched
    finish(acc, bias, out, M, N, BIAS, False, False, OUTPUTS, WARPS)


class Tile(NamedTuple):
    """What one program does, and how."""

    warps: int          # they share K
    outputs: int        # a power of two from 16 to 128
    inputs: int         # of a block of K: 32, 64 or 128
    ahead: int          # blocks that a warp has asked for while it multiplies one


MOST_OUTPUTS = 1 << 13          # of more, gemm_skinny.py has as many bytes in flight


@cache
def tile_of(rows: int, features: int, depth: int) -> Tile | None:
    """The tile for so many rows of x and a weight [features, depth]; None: not for this kernel.

    As measured on an H100 in chains of Mistral-7B's layers, where products of 4 and 8 rows were no faster.
    """
    if rows > 1 or features > MOST_OUTPUTS or features % 16 or depth % 128:
        return None
    return Tile(8, 16, 128, 2 if features <= 32 * 132 else 1)


def tile_for(x: Tensor, weight: Tensor) -> Tile | None:
    """tile_of x and a weight of 16 bits; None too where the device is none for this kernel."""
    if x.element_size() != 2 or not processors(x.device):
        return None
    return tile_of(x.shape[0], *weight.shape)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, tile: Tile, out: Tensor | None = None) -> Tensor:
    """x [M, K], M up to 8, rows may be strided, times weight [N, K] -> [M, N], into `out` if given.

    K is a multiple of tile.inputs, N of tile.outputs.
    """
    (rows, depth), features = x.shape, weight.shape[0]
    if out is None:
        out = torch.empty((rows, features), dtype=x.dtype, device=x.device)
    _product_kernel[features // tile.outputs,](
        x, weight.view(torch.int32), x if bias is None else bias, out, rows, features, depth // 2, x.stride(0),
        BIAS=bias is not None, OUTPUTS=tile.outputs, INPUTS=tile.inputs, AHEAD=tile.ahead, WARPS=tile.warps,
        num_warps=tile.warps, **launch_options(overlaps(x.device)))
    return out
