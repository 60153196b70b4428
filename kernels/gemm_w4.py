"""Products with 4- and 8-bit weights (AWQ, GPTQ) on CUDA: for few rows the codes are unpacked inside, for many beforehand.

Few rows: y^T = W x^T on the tensor cores, W going from memory to the registers of the left operand without a detour: the packed
layout has every 128 rows as the lanes of a warp group hold them (as Marlin does, arXiv 2408.11743), so a lane copies 16 bytes
at a time, and reads back what it has copied itself. Two codes become two numbers by two instructions and a shift: their bits
are put into the mantissas of 128 (bfloat16) or 1024 (float16), and that plus the zero is taken off, exactly. Scales multiply
the sums of a group, in float32, so that no weight is rounded. Where the tiles of the output do not fill the GPU, K is split.
Many rows: the weights are written to a scratch buffer, and cuBLAS does the rest, or gemm_many.py. 4-bit weights on Hopper:
gemm_few.py up to 8 rows, gemm_w4_ring.py up to 128, but for what their tile_for leaves to this.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels import gemm_few, gemm_w4_ring
from kernels.gemm_many import gated_linear, linear_onto
from kernels.overlap import after, launch_options, overlaps, prefetch
from kernels.pointwise import gated_act
from kernels.ref import in_input_order
from kernels.shapes import cdiv
from kernels.split_k import Tile, counters, finish

ROWS = 128              # of W in one unit of the packed layout
WORDS = 32              # 16-bit words of one row in one unit: 128 codes of 4 bits, 64 of 8
INTERPRET = triton.knobs.runtime.interpret      # by Triton's interpreter, which knows no assembly

# Two words of a row, $4: their four codes less the zeros; $5 to $8 hold a zero and the number whose mantissa bears the code.
UNPACK_BF16 = tl.constexpr("""{
.reg .b32 t;
lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xea;
shr.u32 t, $4, 4;
lop3.b32 $1, t, 0x000f000f, 0x43004300, 0xea;
shr.u32 t, $4, 8;
lop3.b32 $2, t, 0x000f000f, 0x43004300, 0xea;
shr.u32 t, $4, 12;
lop3.b32 $3, t, 0x000f000f, 0x43004300, 0xea;
sub.bf16x2 $0, $0, $5;
sub.bf16x2 $1, $1, $6;
sub.bf16x2 $2, $2, $7;
sub.bf16x2 $3, $3, $8;
}""")
# The mantissa of float16 has room for every second code four bits up: 1024 + 16 code, whose sixteenth is 64 + code.
UNPACK_FP16 = tl.constexpr("""{
.reg .b32 t, sixteenth;
mov.b32 sixteenth, 0x2c002c00;
shr.u32 t, $4, 8;
lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xea;
lop3.b32 $1, $4, 0x00f000f0, 0x64006400, 0xea;
lop3.b32 $2, t, 0x000f000f, 0x64006400, 0xea;
lop3.b32 $3, t, 0x00f000f0, 0x64006400, 0xea;
sub.f16x2 $0, $0, $5;
fma.rn.f16x2 $1, $1, sixteenth, $6;
sub.f16x2 $2, $2, $7;
fma.rn.f16x2 $3, $3, sixteenth, $8;
}""")
OPERANDS = tl.constexpr("=&r,=&r,=&r,=&r,r,r,r,r,r")

# --- the packed layout ----------------------------------------------------------------------------------------------------------


def _pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [N, K] -> int16 [blocks of K, units of N, ROWS * WORDS], zeros beyond N and K.

    Code j of word w of a block is k = WORDS j + w, so that each j is a run of x. Within a unit the bits of a word's place say
    which row (r) and word (w) it is, from the highest: w16, r64 r32 r16, r4 r2 r1, w4 w2, w8, r8, w1. Warp and lane stand in
    the middle; the eight words of the lowest three bits are what a lane holds of the 16 x 16 operand of its warp.
    """
    n, k = codes.shape
    count = 16 // bits
    codes = F.pad(codes, (0, -k % (WORDS * count), 0, -n % ROWS)).to(torch.int32)
    codes = codes.view(codes.shape[0], -1, count, WORDS)
    words = codes[:, :, 0]
    for j in range(1, count):
        words = words | codes[:, :, j] << (bits * j)
    words = torch.where(words > 0x7FFF, words - 0x10000, words).to(torch.int16)
    units, blocks = words.shape[0] // ROWS, words.shape[1]
    parts = words.view(units, 8, 2, 8, blocks, 2, 2, 4, 2)         # unit, r64-16, r8, r4-1, block, w16, w8, w4-2, w1
    return parts.permute(4, 0, 5, 1, 3, 7, 6, 2, 8).reshape(blocks, units, ROWS * WORDS)


def w4_pack(codes: Tensor) -> Tensor:
    """uint8 [N, K] of 0 to 15 -> the layout that w4_matmul reads, int16 [ceil(K / 128), ceil(N / 128), 4096]."""
    return _pack(codes, 4)


def w8_pack(codes: Tensor) -> Tensor:
    """uint8 [N, K] -> the layout that w8_matmul reads, int16 [ceil(K / 64), ceil(N / 128), 4096]."""
    return _pack(codes, 8)


@triton.jit
def _runs(block, units, first, UNITS: tl.constexpr):
    """Where the words of rows from `first` on lie together: two runs a unit, w16 apart; past the last unit, that one again."""
    run = tl.arange(0, 2 * UNITS)
    unit = tl.minimum(first // 128 + run // 2, units - 1)
    return (block * units + unit) * 4096 + run % 2 * 2048 + first % 128 * 16


@triton.jit
def _prefetch_words(packed, block, units, first, ROWS_: tl.constexpr):
    """Ask the L2 for what _load_words reads, in lines of 64 words."""
    UNITS: tl.constexpr = (ROWS_ + 127) // 128
    runs = _runs(block, units, first, UNITS)
    prefetch(packed + runs[:, None] + tl.arange(0, ROWS_ // UNITS // 4)[None, :] * 64)


@triton.jit
def _load_words(packed, block, units, first, ROWS_: tl.constexpr):
    """int16 [ROWS_, 32]: the words of rows first .. first + ROWS_ of a block; ROWS_ is 64 or a multiple of 128."""
    UNITS: tl.constexpr = (ROWS_ + 127) // 128
    EACH: tl.constexpr = ROWS_ // UNITS
    runs = _runs(block, units, first, UNITS)
    words = tl.load(packed + runs[:, None] + tl.arange(0, 16 * EACH)[None, :], eviction_policy="evict_first")
    words = tl.reshape(words, [UNITS, 2, EACH // 16, 8, 4, 2, 2, 2])
    return tl.reshape(tl.permute(words, [0, 2, 6, 3, 1, 5, 4, 7]), [ROWS_, 32])


@triton.jit
def _less_zero(codes, zero, DTYPE: tl.constexpr):
    return (codes.to(tl.float32) - zero.to(tl.float32)[:, None]).to(DTYPE)


@triton.jit
def _spread(zero):
    return tl.broadcast_to(zero[:, None], [zero.shape[0], 32])


@triton.jit
def _unpack_words(words, z0, z1, z2, z3, DTYPE: tl.constexpr):
    """The four codes of words, less whole zeros, by assembly."""
    if DTYPE == tl.bfloat16:      # noqa: SIM300
        parts = tl.inline_asm_elementwise(
            UNPACK_BF16, OPERANDS,
            [words, _spread(z0 + 128.0), _spread(z1 + 128.0), _spread(z2 + 128.0), _spread(z3 + 128.0)],
            (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2)
    else:
        parts = tl.inline_asm_elementwise(
            UNPACK_FP16, OPERANDS,
            [words, _spread(z0 + 1024.0), _spread(-64.0 - z1), _spread(z2 + 1024.0), _spread(-64.0 - z3)],
            (tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2)
    return parts


@triton.jit
def _unpack(words, zero, BITS: tl.constexpr, PIECE: tl.constexpr, WHOLE: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Words [N, 32], and the zeros [N] of each piece of the block -> code less zero [N, 32] for each code, in a tuple.

    WHOLE: zeros are integers, so that the differences are exact; else these are rounded to DTYPE.
    """
    z0, z1 = zero[0], zero[32 // PIECE]
    if BITS == 8:
        parts = (_less_zero(words & 255, z0, DTYPE), _less_zero((words >> 8) & 255, z1, DTYPE))
    else:
        z2, z3 = zero[64 // PIECE], zero[96 // PIECE]
        if not ASM:
            parts = (_less_zero(words & 15, z0, DTYPE), _less_zero((words >> 4) & 15, z1, DTYPE),  # type: ignore[assignment]
                     _less_zero((words >> 8) & 15, z2, DTYPE), _less_zero((words >> 12) & 15, z3, DTYPE))
        elif not WHOLE:
            none = tl.zeros_like(z0)
            codes = _unpack_words(words, none, none, none, none, DTYPE)
            parts = (codes[0] - _spread(z0), codes[1] - _spread(z1),  # type: ignore[assignment]
                     codes[2] - _spread(z2), codes[3] - _spread(z3))
        else:
            parts = _unpack_words(words, z0, z1, z2, z3, DTYPE)
    return parts


@triton.jit
def _beside(a, b):
    """[N, A] and [N, A] -> [N, 2 A]."""
    return tl.reshape(tl.permute(tl.join(a, b), [0, 2, 1]), [a.shape[0], 2 * a.shape[1]])


@triton.jit
def _piece(parts, p: tl.constexpr, PIECE: tl.constexpr):
    """Columns p PIECE .. (p + 1) PIECE of the block that _unpack's tuple makes up."""
    if PIECE == 32:
        piece = parts[p]
    elif PIECE == 64:
        piece = _beside(parts[2 * p], parts[2 * p + 1])
    else:
        piece = _beside(_beside(parts[0], parts[1]), _beside(parts[2], parts[3]))
    return piece


@triton.jit
def _load_group(table, n, group, stride_n, stride_g, N, K, GROUP: tl.constexpr, DTYPE: tl.constexpr):
    """Scales or zeros [N] of rows n in a group; 0 past the last."""
    groups = tl.cdiv(K, GROUP) if GROUP else 1
    return tl.load(table + n * stride_n + group * stride_g, mask=n < tl.where(group < groups, N, 0), other=0).to(DTYPE)


@triton.jit
def _load_groups(table, n, block, stride_n, stride_g, N, K, GROUP: tl.constexpr, BLOCK_K: tl.constexpr, PIECE: tl.constexpr,
                 DTYPE: tl.constexpr):
    """Those of each piece of a block, in a tuple."""
    g = block * BLOCK_K // GROUP if GROUP else 0
    if PIECE == BLOCK_K:
        values = (_load_group(table, n, g, stride_n, stride_g, N, K, GROUP, DTYPE),)
    elif 2 * PIECE == BLOCK_K:
        values = (_load_group(table, n, g, stride_n, stride_g, N, K, GROUP, DTYPE),  # type: ignore[assignment]
                  _load_group(table, n, g + 1, stride_n, stride_g, N, K, GROUP, DTYPE))
    else:
        values = (_load_group(table, n, g, stride_n, stride_g, N, K, GROUP, DTYPE),  # type: ignore[assignment]
                  _load_group(table, n, g + 1, stride_n, stride_g, N, K, GROUP, DTYPE),
                  _load_group(table, n, g + 2, stride_n, stride_g, N, K, GROUP, DTYPE),
                  _load_group(table, n, g + 3, stride_n, stride_g, N, K, GROUP, DTYPE))
    return values


@triton.jit
def _load_zeros(table, n, block, stride_n, stride_g, N, K, GROUP: tl.constexpr, BLOCK_K: tl.constexpr, PIECE: tl.constexpr,
                DTYPE: tl.constexpr, ZERO: tl.constexpr):
    """Zeros as _load_groups; without ZERO, the middle code."""
    if ZERO:
        values = _load_groups(table, n, block, stride_n, stride_g, N, K, GROUP, BLOCK_K, PIECE, DTYPE)
    else:
        middle = tl.full(n.shape, 8 if BLOCK_K == 128 else 128, DTYPE)
        values = (middle, middle, middle, middle)
    return values


# --- few rows: fused ------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["M", "splits"])
def _skinny_kernel(x, packed, scales, zeros, bias, out, partial, counters, M, N, K, x_stride, stride_n, stride_g, units, splits,
                   GROUP: tl.constexpr, PIECE: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, WHOLE: tl.constexpr,
                   BIAS: tl.constexpr, SPLIT: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   ASM: tl.constexpr, OVERLAP: tl.constexpr, WARPS: tl.constexpr):
    DTYPE: tl.constexpr = x.dtype.element_ty
    BLOCK_K: tl.constexpr = 512 // BITS
    tile, split = tl.program_id(0), tl.program_id(1)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    blocks = tl.cdiv(K, BLOCK_K)
    lo, hi = split * blocks // splits, (split + 1) * blocks // splits
    # Scales and zeros are fetched a block ahead, so that no product waits for them: the first like the weights before the wait.
    # Where a block takes long, for many rows, they are asked for before it; for few, after it, which leaves the others' way free.
    EARLY: tl.constexpr = BLOCK_M > 16
    scale = _load_groups(scales, n, lo, stride_n, stride_g, N, K, GROUP, BLOCK_K, PIECE, DTYPE)
    zero = _load_zeros(zeros, n, lo, stride_n, stride_g, N, K, GROUP, BLOCK_K, PIECE, DTYPE, ZERO)
    if OVERLAP:
        _prefetch_words(packed, lo, units, tile * BLOCK_N, BLOCK_N)
    after(OVERLAP)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in range(lo, hi):
        if EARLY:
            next_scale = _load_groups(scales, n, block + 1, stride_n, stride_g, N, K, GROUP, BLOCK_K, PIECE, DTYPE)
            next_zero = _load_zeros(zeros, n, block + 1, stride_n, stride_g, N, K, GROUP, BLOCK_K, PIECE, DTYPE, ZERO)
        words = _load_words(packed, block, units, tile * BLOCK_N, BLOCK_N)
        parts = _unpack(words, zero, BITS, PIECE, WHOLE, DTYPE, ASM)
        for p in tl.static_range(BLOCK_K // PIECE):
            k = block * BLOCK_K + p * PIECE + tl.arange(0, PIECE)
            there = (m < M)[None, :] if EVEN_K else (m < M)[None, :] & (k < K)[:, None]
            columns = tl.load(x + m[None, :] * x_stride + k[:, None], mask=there, other=0.0)
            product = tl.dot(_piece(parts, p, PIECE), columns, input_precision="ieee")
            acc += product * scale[p].to(tl.float32)[:, None]
        if not EARLY:
            next_scale = _load_groups(scales, n, block + 1, stride_n, stride_g, N, K, GROUP, BLOCK_K, PIECE, DTYPE)
            next_zero = _load_zeros(zeros, n, block + 1, stride_n, stride_g, N, K, GROUP, BLOCK_K, PIECE, DTYPE, ZERO)
        scale, zero = next_scale, next_zero
    finish(acc, bias, out, partial, counters, n, m, M, N, splits, BIAS, SPLIT, WARPS)


@cache
def _has_assembly(device: torch.device, dtype: torch.dtype) -> bool:
    """Bfloat16 is subtracted in pairs from Hopper on; nothing is in the interpreter, nor in float32."""
    if INTERPRET or dtype == torch.float32:
        return False
    return dtype == torch.float16 or torch.cuda.get_device_capability(device) >= (9, 0)


def _format(scales: Tensor, zeros: Tensor | None, group: int, bits: int, width: int) -> dict[str, int | bool]:
    """What the kernels are compiled for. GROUP 0: one group for all inputs; PIECE: columns of a block that share a scale."""
    block = WORDS * 16 // bits
    if group != width and group % block and group not in (32, 64):
        raise ValueError(f"groups of {group} are not supported: 32, 64, 128, or all {width} inputs")
    return {"GROUP": 0 if group == width else group, "PIECE": min(group, block) if group in (32, 64) else block, "BITS": bits,
            "ZERO": zeros is not None, "WHOLE": zeros is None or zeros.dtype == torch.uint8,
            "ASM": _has_assembly(scales.device, scales.dtype)}


# By the most rows that they are for: the tile, and the one for many outputs; measured on an H100 with Mistral-7B's shapes
# (jobs/bench/quantized.py --only w4 --sweep).
TILES = {
    16: (Tile(16, 64, 2, 2, 1056), Tile(16, 64, 4, 3, 1056)),
    32: (Tile(32, 64, 4, 3, 528), Tile(32, 128, 8, 3, 264)),
    64: (Tile(64, 64, 4, 3, 396), Tile(64, 128, 8, 3, 264)),
    128: (Tile(128, 64, 4, 3, 264),) * 2,
    192: (Tile(64, 128, 8, 3, 264),) * 2,
    320: (Tile(128, 64, 4, 3, 264),) * 2,
}
MANY_OUTPUTS = 1 << 14
# Up to here the fused product is the faster one (of 4 bits): a layer's four take 286 against 377 us at 256 rows, 453 against 427
# at 384. Where the weights are there unpacked too: 157 against 187 us at 128 rows, 230 against 193 at 160.
MOST_ROWS, MOST_BESIDE_COPY = max(TILES), 128


def _tile(rows: int, features: int) -> Tile:
    tiles = next(tiles for most, tiles in TILES.items() if rows <= most)
    return tiles[features >= MANY_OUTPUTS]


def _skinny(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, group: int, bias: Tensor | None, bits: int,
            tile: Tile) -> Tensor:
    (rows, width), features = x.shape, scales.shape[0]
    out = torch.empty((rows, features), dtype=x.dtype, device=x.device)
    grid = tile.grid(rows, features, packed.shape[0])
    splits = grid[1]
    limit = {"maxnreg": 128} if tile.warps == 8 else {}         # so that two programs share a multiprocessor
    partial = torch.empty((splits, rows, features), dtype=torch.float32, device=x.device) if splits > 1 else out
    _skinny_kernel[grid](
        x, packed, scales, scales if zeros is None else zeros, x if bias is None else bias, out, partial, counters(x.device),
        rows, features, width, x.stride(0), *scales.stride(), packed.shape[1], splits, BIAS=bias is not None, SPLIT=splits > 1,
        EVEN_K=width % (WORDS * 16 // bits) == 0, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        **_format(scales, zeros, group, bits, width), WARPS=tile.warps, num_warps=tile.warps, num_stages=tile.stages,
        **limit, **launch_options(overlaps(x.device)))
    return out


# --- many rows: dequantise, then cuBLAS -----------------------------------------------------------------------------------------


@triton.jit
def _dequantise_kernel(packed, scales, zeros, out, N, K, stride_n, stride_g, units, GROUP: tl.constexpr, PIECE: tl.constexpr,
                       BITS: tl.constexpr, ZERO: tl.constexpr, WHOLE: tl.constexpr, BLOCK_N: tl.constexpr, ASM: tl.constexpr):
    DTYPE: tl.constexpr = out.dtype.element_ty
    BLOCK_K: tl.constexpr = 512 // BITS
    block, tile = tl.program_id(0), tl.program_id(1)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    scale = _load_groups(scales, n, block, stride_n, stride_g, N, K, GROUP, BLOCK_K, PIECE, DTYPE)
    zero = _load_zeros(zeros, n, block, stride_n, stride_g, N, K, GROUP, BLOCK_K, PIECE, DTYPE, ZERO)
    parts = _unpack(_load_words(packed, block, units, tile * BLOCK_N, BLOCK_N), zero, BITS, PIECE, WHOLE, DTYPE, ASM)
    for p in tl.static_range(BLOCK_K // PIECE):
        k = block * BLOCK_K + p * PIECE + tl.arange(0, PIECE)
        weight = _piece(parts, p, PIECE).to(tl.float32) * scale[p].to(tl.float32)[:, None]
        tl.store(out + n[:, None].to(tl.int64) * K + k[None, :], weight.to(DTYPE), mask=(n < N)[:, None] & (k < K)[None, :])


def _dequantise(packed: Tensor, scales: Tensor, zeros: Tensor | None, group: int, bits: int, width: int) -> Tensor:
    """-> the weights [N, K] in the scales' dtype: scratch memory, whose block the allocator gives the next product too."""
    features = scales.shape[0]
    out = torch.empty((features, width), dtype=scales.dtype, device=scales.device)
    _dequantise_kernel[packed.shape[0], cdiv(features, ROWS)](
        packed, scales, scales if zeros is None else zeros, out, features, width, *scales.stride(), packed.shape[1],
        BLOCK_N=ROWS, **_format(scales, zeros, group, bits, width), num_warps=4)
    return out


# --- the ops --------------------------------------------------------------------------------------------------------------------


def _tile_of_few(x: Tensor, scales: Tensor, group: int, bits: int, gated: bool = False) -> gemm_few.Tile | None:
    if bits != 4 or not (group in (32, 64, x.shape[1]) or group % gemm_few.DEPTH == 0):
        return None
    return gemm_few.tile_for(x, scales.shape[0], bits, x.dtype, gated)


def _as_dense(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, group: int, perm: Tensor | None,
              unpacked: Tensor | None, bits: int) -> tuple[Tensor, Tensor] | None:
    """x and the weights as a dense layer takes them; None: of so few rows the fused product is faster."""
    if unpacked is not None and x.shape[0] > MOST_BESIDE_COPY:
        return x, unpacked
    if x.shape[0] <= MOST_ROWS:
        return None
    return _in_order(x, perm), _dequantise(packed, scales, zeros, group, bits, x.shape[1])


def _in_order(x: Tensor, perm: Tensor | None) -> Tensor:
    return x if perm is None else x.index_select(1, perm)


def _matmul(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, group: int, bias: Tensor | None,
            perm: Tensor | None, unpacked: Tensor | None, bits: int) -> Tensor:
    dense = _as_dense(x, packed, scales, zeros, group, perm, unpacked, bits)
    if dense is not None:
        return F.linear(*dense, bias)
    x = _in_order(x, perm)
    few = _tile_of_few(x, scales, group, bits)
    if few is not None:
        return gemm_few.w4_product(x, packed, scales, zeros, group, bias, few)
    ring = gemm_w4_ring.tile_for(x, scales, zeros, group) if bits == 4 else None
    if ring is not None:
        return gemm_w4_ring.product(x, packed, scales, zeros, group, bias, ring)
    return _skinny(x, packed, scales, zeros, group, bias, bits, _tile(x.shape[0], scales.shape[0]))


def _unpack_weight(packed: Tensor, scales: Tensor, zeros: Tensor | None, group: int, perm: Tensor | None, width: int,
                   bits: int) -> Tensor:
    return in_input_order(_dequantise(packed, scales, zeros, group, bits, width), perm)


def w4_matmul(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, group: int, bias: Tensor | None,
              perm: Tensor | None, unpacked: Tensor | None) -> Tensor:
    """See ref.w4_matmul. scales and zeros [N, groups] have the same strides; with N contiguous they are read fastest."""
    return _matmul(x, packed, scales, zeros, group, bias, perm, unpacked, 4)


def w4_matmul_onto(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, group: int, residual: Tensor,
                   bias: Tensor | None, perm: Tensor | None, unpacked: Tensor | None) -> Tensor | None:
    """See ref.w4_matmul_onto."""
    dense = _as_dense(x, packed, scales, zeros, group, perm, unpacked, 4)
    if dense is not None:
        return linear_onto(*dense, bias, residual)
    return _matmul(x, packed, scales, zeros, group, bias, perm, unpacked, 4)


def w4_gated_matmul(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, group: int, activation: str,
                    bias: Tensor | None, perm: Tensor | None, unpacked: Tensor | None) -> Tensor:
    """See ref.w4_gated_matmul, and w4_matmul for the strides."""
    few = _tile_of_few(x, scales, group, 4, gated=True)
    if few is not None:
        return gemm_few.w4_product(_in_order(x, perm), packed, scales, zeros, group, bias, few, activation)
    ring = gemm_w4_ring.tile_for(x, scales, zeros, group, gated=True) if bias is None else None
    if ring is not None:
        return gemm_w4_ring.product(_in_order(x, perm), packed, scales, zeros, group, None, ring, activation)
    dense = _as_dense(x, packed, scales, zeros, group, perm, unpacked, 4)
    if dense is not None:
        return gated_linear(*dense, bias, activation)
    return gated_act(_matmul(x, packed, scales, zeros, group, bias, perm, unpacked, 4), activation)


def w8_matmul(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, group: int, bias: Tensor | None,
              perm: Tensor | None, unpacked: Tensor | None) -> Tensor:
    """See ref.w8_matmul, and w4_matmul for the strides."""
    return _matmul(x, packed, scales, zeros, group, bias, perm, unpacked, 8)


def w4_weight(packed: Tensor, scales: Tensor, zeros: Tensor | None, group: int, perm: Tensor | None, width: int) -> Tensor:
    """See ref.w4_weight."""
    return _unpack_weight(packed, scales, zeros, group, perm, width, 4)


def w8_weight(packed: Tensor, scales: Tensor, zeros: Tensor | None, group: int, perm: Tensor | None, width: int) -> Tensor:
    """See ref.w8_weight."""
    return _unpack_weight(packed, scales, zeros, group, perm, width, 8)
