"""Products of 1 to 8 rows with 4-bit and e4m3 weights on Hopper, in Gluon: y^T = W x^T by mma.sync, straight from memory.

The warps of a program share K: each takes every WARPS-th block of 128 inputs for the same outputs, so that nothing is left to
add over programs, and no warp waits for another before the end. That is a batch of products, one a warp: tensors are [WARPS,
outputs, inputs], and their sum over the warps goes through shared memory once. Weights go from memory to the registers that the
tensor cores read, 16 bytes a lane at a time and AHEAD blocks ahead; the first are asked for before the wait for x.

Layouts are those of mma.sync's operands: which inputs a lane has is up to what it loads at once, and the same for weights and x.
Triton sees to it that elements get where they belong, and refuses to compile where that would take moving them between lanes.
Weights are carried as words of 32 bits; of smaller ones each would take a register.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from kernels.fragments import MOST_ROWS, ROWS, count, finish, numbers, operand_layout, sums_layout, weight_rows
from kernels.hopper import processors
from kernels.overlap import after, launch_options, overlaps, prefetch

DEPTH = 128                     # inputs in a block
BLOCK = tl.constexpr(DEPTH)

# --- 4-bit weights --------------------------------------------------------------------------------------------------------------


@gluon.constexpr_function
def _as_stored(warps, tiles):
    """Of pairs of words [warps, 2, tiles, 32, 4]: a lane copies 16 bytes at a time, as gemm_w4._pack has put them."""
    return gl.BlockedLayout([1, 2, tiles, 1, 4], [1, 1, 1, 32, 1], [warps, 1, 1, 1, 1], [4, 1, 2, 3, 0])


@gluon.constexpr_function
def _unpacking(kind, code):
    """PTX that makes numbers (bf16, f16) of one code of the four in each half of $2 and of $3, less the zero in $4.

    As in gemm_w4.py: a code's bits are put into the mantissa of 128 (bf16) or 1024 (f16), every second one's four bits up, for a
    sixteenth of it; the zero comes as that number plus itself, for a sixteenth as -64 less itself.
    """
    up = kind == "f16" and code % 2 == 1
    shift = code // 2 * 8 if kind == "f16" else code * 4
    mask, number = "0x00f000f0" if up else "0x000f000f", "0x64006400" if kind == "f16" else "0x43004300"
    lines = [".reg .b32 t, sixteenth;", "mov.b32 sixteenth, 0x2c002c00;"]
    for out, word in ("$0", "$2"), ("$1", "$3"):
        lines.append(f"shr.u32 t, {word}, {shift};")
        lines.append(f"lop3.b32 {out}, t, {mask}, {number}, 0xea;")
        lines.append(f"fma.rn.f16x2 {out}, {out}, sixteenth, $4;" if up else f"sub.{kind}x2 {out}, {out}, $4;")
    return "{\n" + "\n".join(lines) + "\n}"


@gluon.jit
def _unpack(words, zero, code: tl.constexpr, ZERO: tl.constexpr, WHOLE: tl.constexpr, DTYPE: tl.constexpr):
    """Code 0 to 3 of pairs of words [WARPS, outputs, 16], less its zero: inputs 32 code to + 16 of the block, and the next 16.

    WHOLE: zeros are integers below 128, so that the differences are exact; else these are rounded to DTYPE.
    """
    KIND: tl.constexpr = "bf16" if DTYPE == gl.bfloat16 else "f16"      # noqa: SIM300
    less = zero.to(gl.int16) if ZERO and WHOLE else gl.full_like(words, 0 if ZERO else 8).to(gl.int16)
    if KIND == "bf16":      # in bits, as _unpacking wants it
        less = less | 0x4300
    elif code % 2 == 0:
        less = less | 0x6400
    else:
        less = less << 4 | -0x2C00
    low, high = gl.inline_asm_elementwise(_unpacking(KIND, code), "=&r,=&r,r,r,r", [words, less], (gl.int16, gl.int16),
                                          is_pure=True, pack=2)
    low, high = low.to(DTYPE, bitcast=True), high.to(DTYPE, bitcast=True)
    if ZERO and not WHOLE:
        low, high = low - zero, high - zero
    return low, high


@gluon.jit
def _of_group(block, piece: tl.constexpr, at, blocks, stride_g, GROUP: tl.constexpr, PIECES: tl.constexpr):
    """Scales or zeros [WARPS, outputs, 1] of a piece of each warp's block; 0 past the last."""
    if GROUP == 0:
        group = 0
    elif PIECES == 1:
        group = block // (GROUP // BLOCK)
    else:
        group = block * PIECES + piece
    return gl.load(at + group * stride_g, mask=block < blocks, other=0)


@gluon.jit
def _fetch(turn, words_at, scales_at, zeros_at, blocks, stride_g, GROUP: tl.constexpr, PIECES: tl.constexpr, ZERO: tl.constexpr,
           TILES: tl.constexpr, WARPS: tl.constexpr):
    """Words, scales and zeros of each warp's block of this turn; 0 past the last."""
    block = turn * WARPS + count(WARPS, 0, 5, _as_stored(WARPS, TILES))
    words = gl.load(words_at, mask=block < blocks, other=0, eviction_policy="evict_first")
    scale = ()  # type: tuple
    zero = ()  # type: tuple
    for piece in gl.static_range(PIECES):
        block = turn * WARPS + count(WARPS, 0, 3, sums_layout(WARPS))
        scale += (_of_group(block, piece, scales_at, blocks, stride_g, GROUP, PIECES),)
        if ZERO:
            block = turn * WARPS + count(WARPS, 0, 3, operand_layout(0, WARPS, 2))
            zero += (_of_group(block, piece, zeros_at, blocks, stride_g, GROUP, PIECES),)
        else:
            zero += (0,)
    return words, scale, zero


@gluon.jit(do_not_specialize=["M"])
def _w4_kernel(x, packed, scales, zeros, bias, out, M, N, K, x_stride, stride_n, stride_g, units,
               GROUP: tl.constexpr, PIECES: tl.constexpr, ZERO: tl.constexpr, WHOLE: tl.constexpr, BIAS: tl.constexpr,
               GATED: tl.constexpr, GELU: tl.constexpr, OUTPUTS: tl.constexpr, AHEAD: tl.constexpr, OVERLAP: tl.constexpr,
               WARPS: tl.constexpr):
    """packed: pairs of gemm_w4._pack's words, int32 [blocks, units, 2048]; N: of out."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    TILES: tl.constexpr = OUTPUTS // 16
    sums: tl.constexpr = sums_layout(WARPS)
    left: tl.constexpr = operand_layout(0, WARPS, 2)
    right: tl.constexpr = operand_layout(1, WARPS, 2)
    stored: tl.constexpr = _as_stored(WARPS, TILES)
    blocks = K // BLOCK
    if GATED:
        tile = weight_rows(count(TILES, 2, 5, stored), N // 16, GATED, TILES)
        start = tile // 8 * 2048 + tile % 8 * 128
    else:       # of one unit, one after another
        first = gl.program_id(0) * TILES
        start = first // 8 * 2048 + first % 8 * 128 + count(TILES, 2, 5, stored) * 128
    words_at = (packed + count(WARPS, 0, 5, stored) * units * 2048 + start + count(2, 1, 5, stored) * 1024
                + count(32, 3, 5, stored) * 4 + count(4, 4, 5, stored))
    scales_at = scales + weight_rows(count(OUTPUTS, 1, 3, sums), N, GATED, OUTPUTS) * stride_n
    zeros_at = zeros + weight_rows(count(OUTPUTS, 1, 3, left), N, GATED, OUTPUTS) * stride_n
    ahead = ()  # type: tuple
    for i in gl.static_range(AHEAD):
        ahead += (_fetch(i, words_at, scales_at, zeros_at, blocks, stride_g, GROUP, PIECES, ZERO, TILES, WARPS),)
        words_at += WARPS * 2048 * units
    after(OVERLAP)

    s = count(WARPS, 0, 3, right)
    x_at = x + gl.minimum(count(ROWS, 2, 3, right), M - 1) * x_stride + count(16, 1, 3, right)
    acc = gl.full([WARPS, OUTPUTS, ROWS], 0.0, gl.float32, sums)
    for begin in range(0, gl.cdiv(blocks, WARPS), AHEAD):
        fetched = ()  # type: tuple
        for i in gl.static_range(AHEAD):
            words, scale, zero = ahead[i]
            words = gl.permute(gl.reshape(words, [WARPS, 2, TILES, 8, 4, 2, 2]), [0, 2, 6, 3, 5, 4, 1])
            words = gl.convert_layout(gl.reshape(words, [WARPS, OUTPUTS, 16]), left, assert_trivial=True)
            inputs = x_at + gl.minimum((begin + i) * WARPS + s, blocks - 1) * BLOCK
            for piece in gl.static_range(PIECES):
                product = gl.full([WARPS, OUTPUTS, ROWS], 0.0, gl.float32, sums)
                for code in gl.static_range(piece * 4 // PIECES, (piece + 1) * 4 // PIECES):
                    low, high = _unpack(words, zero[piece], code, ZERO, WHOLE, DTYPE)
                    product = mma_v2(low, gl.load(inputs + code * 32), product)
                    product = mma_v2(high, gl.load(inputs + code * 32 + 16), product)
                acc += product * scale[piece].to(gl.float32)
            turn = begin + i + AHEAD
            fetched += (_fetch(turn, words_at, scales_at, zeros_at, blocks, stride_g, GROUP, PIECES, ZERO, TILES, WARPS),)
            words_at += WARPS * 2048 * units
        ahead = fetched
    finish(acc, bias, out, M, N, BIAS, GATED, GELU, OUTPUTS, WARPS)


# --- e4m3 weights ---------------------------------------------------------------------------------------------------------------


@gluon.jit
def _fetch_fp8(turn, weight_at, scales_at, blocks, BLOCKS: tl.constexpr, WARPS: tl.constexpr):
    """Words [WARPS, outputs, 32] of each warp's block of this turn, and BLOCKS: its scales [WARPS, 1, 1]; 0 past the last."""
    block = turn * WARPS + count(WARPS, 0, 3, operand_layout(0, WARPS, 4))
    words = gl.load(weight_at, mask=block < blocks, other=0, eviction_policy="evict_first")
    scale = 1.0
    if BLOCKS:
        block = turn * WARPS + count(WARPS, 0, 3, sums_layout(WARPS))
        scale = gl.load(scales_at + block, mask=block < blocks, other=0.0)
    return words, scale


@gluon.jit(do_not_specialize=["M"])
def _fp8_kernel(x, x_scales, weight, weight_scales, bias, out, M, N, WORDS, BLOCKS: tl.constexpr, BIAS: tl.constexpr,
                GATED: tl.constexpr, GELU: tl.constexpr, OUTPUTS: tl.constexpr, AHEAD: tl.constexpr, OVERLAP: tl.constexpr,
                WARPS: tl.constexpr):
    """x and weight: int32 of four e4m3 numbers each, WORDS a row; N: of out."""
    sums: tl.constexpr = sums_layout(WARPS)
    left: tl.constexpr = operand_layout(0, WARPS, 4)
    right: tl.constexpr = operand_layout(1, WARPS, 4)
    along: tl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 8, 4], [WARPS, 1, 1], [2, 1, 0])      # of x as it lies in memory
    blocks = WORDS // 32
    n = weight_rows(count(OUTPUTS, 1, 3, left), N, GATED, OUTPUTS)
    weight_at = weight + n.to(gl.int64) * WORDS + count(WARPS, 0, 3, left) * 32 + count(32, 2, 3, left)
    of_blocks = weight_scales + gl.program_id(0) * OUTPUTS // BLOCK * blocks
    ahead = ()  # type: tuple
    for i in gl.static_range(AHEAD):
        ahead += (_fetch_fp8(i, weight_at, of_blocks, blocks, BLOCKS, WARPS),)
        weight_at += WARPS * 32
    if not BLOCKS:      # read at the end, when there are registers for them
        prefetch(weight_scales + weight_rows(0, N, GATED, OUTPUTS))
        if GATED:
            prefetch(weight_scales + weight_rows(OUTPUTS // 2, N, GATED, OUTPUTS))
    after(OVERLAP)

    s, s_sums = count(WARPS, 0, 3, along), count(WARPS, 0, 3, sums)
    x_at = x + gl.minimum(count(ROWS, 1, 3, along), M - 1) * WORDS + count(32, 2, 3, along)
    row = gl.minimum(count(ROWS, 2, 3, sums), M - 1)
    acc = gl.full([WARPS, OUTPUTS, ROWS], 0.0, gl.float32, sums)
    for begin in range(0, gl.cdiv(blocks, WARPS), AHEAD):
        fetched = ()  # type: tuple
        for i in gl.static_range(AHEAD):
            words, scale = ahead[i]
            rows = numbers(words)
            columns = numbers(gl.load(x_at + gl.minimum((begin + i) * WARPS + s, blocks - 1) * 32))
            product = gl.full([WARPS, OUTPUTS, ROWS], 0.0, gl.float32, sums) if BLOCKS else acc
            for part in gl.static_range(4):
                column = gl.convert_layout(gl.permute(columns[part], [0, 2, 1]), right, assert_trivial=True)
                product = mma_v2(rows[part], column, product)
            if BLOCKS:
                block = gl.minimum((begin + i) * WARPS + s_sums, blocks - 1)
                acc += product * (gl.load(x_scales + row * blocks + block) * scale)
            else:
                acc = product
            fetched += (_fetch_fp8(begin + i + AHEAD, weight_at, of_blocks, blocks, BLOCKS, WARPS),)
            weight_at += WARPS * 32
        ahead = fetched
    if not BLOCKS:
        n = weight_rows(count(OUTPUTS, 1, 3, sums), N, GATED, OUTPUTS)
        acc *= gl.load(weight_scales + n) * gl.load(x_scales + row)
    finish(acc, bias, out, M, N, BIAS, GATED, GELU, OUTPUTS, WARPS)


# --- launches -------------------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """What one program does, and how."""

    warps: int          # they share K
    outputs: int        # a power of two from 16 to 128
    ahead: int          # blocks that a warp has asked for while it multiplies one
    registers: int = 0  # of a thread, at most; 0: as many as the compiler takes


MANY_OUTPUTS = 32 * 132         # more than 16 warps for every 16 of them have room for on an H100


@cache
def tile_of(rows: int, features: int, depth: int, bits: int, gated: bool = False) -> Tile | None:
    """The tile for so many rows of x and a weight [features, depth]; None: not for these kernels.

    gated: the weight is [gate | up]. As jobs/bench/quantized.py --only few --sweep measured them on an H100 for the shapes of
    Mistral-7B, at 1 and 8 rows.
    """
    most = 16 if features <= MANY_OUTPUTS else 8
    warps = next((n for n in (most, 8) if depth // DEPTH % n == 0), 4)
    if bits == 8:
        tile = Tile(warps, 16, 1)
    elif gated:
        # For one row the former is slower alone, but faster in a step.
        tile = Tile(2, 32, 2) if rows <= 2 and depth // DEPTH % 4 == 0 else Tile(4, 64, 1)
    elif features >= 1 << 14:
        tile = Tile(4, 32, 1, 72)
    elif rows <= 2:
        tile = Tile(warps, 16, 1, 64 if warps == 16 else 72)
    else:                                       # x is read once for each tile of outputs
        tile = Tile(warps, 32, 1, 72) if warps == 16 else Tile(warps, 32, 2)
    return tile if 1 <= rows <= MOST_ROWS and depth % DEPTH == 0 and features % tile.outputs == 0 else None


def tile_for(x: Tensor, features: int, bits: int, dtype: torch.dtype, gated: bool = False) -> Tile | None:
    """tile_of x, or None too where the device or the dtype of the output is none for these kernels."""
    if dtype.itemsize != 2 or not processors(x.device):
        return None
    return tile_of(x.shape[0], features, x.shape[1], bits, gated)


def _options(tile: Tile, device: torch.device) -> dict[str, int | bool]:
    limit = {"maxnreg": tile.registers} if tile.registers else {}
    return {"OUTPUTS": tile.outputs, "AHEAD": tile.ahead, "WARPS": tile.warps, "num_warps": tile.warps, **limit,
            **launch_options(overlaps(device))}


def w4_product(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, group: int, bias: Tensor | None, tile: Tile,
               activation: str = "") -> Tensor:
    """x [M, K], M up to 8, times weights as gemm_w4.w4_matmul has them -> [M, N]; with an activation its gated_act, [M, N / 2].

    x is of 16 bits, its rows may be strided. K is a multiple of 128, N of tile.outputs; uint8 zeros are below 128.
    """
    (rows, width), features = x.shape, scales.shape[0]
    out = torch.empty((rows, features // 2 if activation else features), dtype=x.dtype, device=x.device)
    _w4_kernel[features // tile.outputs,](
        x, packed.view(torch.int32), scales, scales if zeros is None else zeros, x if bias is None else bias, out, rows,
        out.shape[1], width, x.stride(0), *scales.stride(), packed.shape[1], GROUP=0 if group == width else group,
        PIECES=max(1, DEPTH // group), ZERO=zeros is not None, WHOLE=zeros is None or zeros.dtype == torch.uint8,
        BIAS=bias is not None, GATED=bool(activation), GELU=activation == "gelu_tanh", **_options(tile, x.device))
    return out


def fp8_product(x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype,
                blocks: bool, tile: Tile, activation: str = "") -> Tensor:
    """e4m3 x [M, K], M up to 8, times e4m3 weight [N, K], both contiguous -> [M, N] in a 16-bit dtype.

    With an activation its gated_act, [M, N / 2], where scales are not of blocks.
    x_scales, weight_scales: float32 [M], [N]; of blocks of 128 [M, K / 128], [N / 128, K / 128]. K is a multiple of 128, N of
    tile.outputs.
    """
    rows, features = x.shape[0], weight.shape[0]
    out = torch.empty((rows, features // 2 if activation else features), dtype=dtype, device=x.device)
    words = x.view(torch.int32)
    _fp8_kernel[features // tile.outputs,](
        words, x_scales, weight.view(torch.int32), weight_scales, out if bias is None else bias, out, rows, out.shape[1],
        words.shape[1], BLOCKS=blocks, BIAS=bias is not None, GATED=bool(activation), GELU=activation == "gelu_tanh",
        **_options(tile, x.device))
    return out
