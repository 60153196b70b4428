"""Products of e4m3 numbers on CUDA (arXiv 2209.05433): x quantised token by token, W row by row or in blocks of 128 x 128.

Few rows: y^T = W x^T from shared memory, K split as split_k.py says. The tensor cores add e4m3 products in fewer bits than
float32 has (arXiv 2412.19437, section 3.3.2), so their sums are taken over 128 of K only, and those are added up in float32.
On Hopper up to 8 rows: gemm_few.py; up to 128, of many outputs 64: gemm_fp8_ring.py.
Many rows: cuBLAS, which knows scales of rows and columns, with the tensor cores' own sums, as vLLM has them: 6 to 12 % faster,
and 2.2e-3 to 3.5e-3 off in the 2-norm instead of the 1.7e-3 of bfloat16's rounding. For blocks the kernel here,
as for sizes that are no multiples of 16, which cuBLAS does not take.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import gemm_few, gemm_fp8_ring
from kernels.formats import FP8_BLOCK
from kernels.overlap import after, launch_options, overlaps, prefetch
from kernels.quantize import fp8_quantize, gated_act_fp8, quantize_blocks
from kernels.shapes import cdiv
from kernels.split_k import Tile, counters, finish


@triton.jit(do_not_specialize=["M", "splits"])
def _product_kernel(x, x_scales, weight, weight_scales, bias, out, partial, counters, M, N, K, splits,
                    BLOCKS: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
                    WARPS: tl.constexpr):
    tile, split = tl.program_id(0), tl.program_id(1)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    blocks = tl.cdiv(K, BLOCK_K)
    lo, hi = split * blocks // splits, (split + 1) * blocks // splits
    if OVERLAP:
        prefetch(weight + tl.minimum(n, N - 1).to(tl.int64) * K + lo * BLOCK_K)
    if not BLOCKS:
        weight_scale = tl.load(weight_scales + n, mask=n < N, other=0.0)        # at the end it would be waited for
    after(OVERLAP)
    x += tl.program_id(2).to(tl.int64) * BLOCK_M * K        # of many rows there may be more elements than int32 counts
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if BLOCKS:      # fetched a block ahead
        weight_scale = tl.load(weight_scales + tile * BLOCK_N // BLOCK_K * blocks + lo)
        x_scale = tl.load(x_scales + m * blocks + lo, mask=m < M, other=0.0)
    for block in range(lo, hi):
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        there = (m < M)[None, :] if EVEN_K else (m < M)[None, :] & (k < K)[:, None]
        at = weight + n[:, None].to(tl.int64) * K + k[None, :]
        if EVEN_N and EVEN_K:
            rows = tl.load(at, eviction_policy="evict_first")
        else:
            rows = tl.load(at, mask=(n < N)[:, None] & (k < K)[None, :], other=0.0, eviction_policy="evict_first")
        columns = tl.load(x + tl.arange(0, BLOCK_M)[None, :] * K + k[:, None], mask=there, other=0.0)
        product = tl.dot(rows, columns)
        if BLOCKS:
            acc += product * (x_scale * weight_scale)[None, :]
            weight_scale = tl.load(weight_scales + tile * BLOCK_N // BLOCK_K * blocks + block + 1, mask=block + 1 < hi, other=0.0)
            x_scale = tl.load(x_scales + m * blocks + block + 1, mask=m < tl.where(block + 1 < hi, M, 0), other=0.0)
        else:
            acc += product
    if not BLOCKS:
        acc *= weight_scale[:, None]
        acc *= tl.load(x_scales + m, mask=m < M, other=0.0)[None, :]
    finish(acc, bias, out, partial, counters, n, m, M, N, splits, BIAS, SPLIT, WARPS)


# By the most rows that a tile is for; measured on an H100 with Mistral-7B's shapes (jobs/bench/quantized.py --only fp8 --sweep).
TILES = {
    16: Tile(16, 64, 4, 6, 396),
    32: Tile(32, 64, 4, 4, 264),
    64: Tile(64, 64, 4, 3, 264),
    128: Tile(128, 64, 4, 4, 264),
    1 << 31: Tile(128, 128, 8, 4, 1),
}
MOST_ROWS = 64      # of row scales, up to here the kernel here is the faster one


def _tile(rows: int) -> Tile:
    return next(tile for most, tile in TILES.items() if rows <= most)


def _product(x: Tensor, x_scales: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype,
             blocks: bool, tile: Tile) -> Tensor:
    (rows, width), features = x.shape, weight.shape[0]
    out = torch.empty((rows, features), dtype=dtype, device=x.device)
    grid = tile.grid(rows, features, cdiv(width, FP8_BLOCK))
    splits = grid[1]
    partial = torch.empty((splits, rows, features), dtype=torch.float32, device=x.device) if splits > 1 else out
    _product_kernel[grid](
        x, x_scales, weight, weight_scale, out if bias is None else bias, out, partial, counters(x.device), rows, features, width,
        splits, BLOCKS=blocks, BIAS=bias is not None, SPLIT=splits > 1, EVEN_N=features % tile.block_n == 0,
        EVEN_K=width % FP8_BLOCK == 0, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=FP8_BLOCK,
        WARPS=tile.warps, num_warps=tile.warps, num_stages=tile.stages, **launch_options(overlaps(x.device)))
    return out


def fp8_product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None,
                dtype: torch.dtype) -> Tensor:
    """See ref.fp8_product."""
    tile = gemm_few.tile_for(x, weight.shape[0], 8, dtype)
    if tile is not None:
        return gemm_few.fp8_product(x, x_scale, weight, weight_scale, bias, dtype, False, tile)
    ring = gemm_fp8_ring.tile_for(x, weight.shape[0], dtype, blocks=False)
    if ring is not None:
        return gemm_fp8_ring.product(x, x_scale, weight, weight_scale, bias, dtype, ring)
    few, uneven = x.shape[0] <= MOST_ROWS, any(size % 16 for size in weight.shape)
    if few or uneven or dtype == torch.float32:         # cuBLAS has no float32 outputs for scales of rows
        return _product(x, x_scale, weight, weight_scale, bias, dtype, False, _tile(x.shape[0]))
    return torch._scaled_mm(x, weight.t(), x_scale, weight_scale[None], bias, out_dtype=dtype, use_fast_accum=True)


def fp8_gated_product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype,
                      activation: str, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ref.fp8_gated_product."""
    # A row's activation is one program's work if that quantises it; within a product it is spread over all.
    tile = gemm_few.tile_for(x, weight.shape[0], 8, dtype, gated=True)
    if tile is not None:
        return fp8_quantize(gemm_few.fp8_product(x, x_scale, weight, weight_scale, bias, dtype, False, tile, activation), scale)
    ring = gemm_fp8_ring.tile_for(x, weight.shape[0], dtype, blocks=False, gated=True) if bias is None else None
    if ring is not None:
        return fp8_quantize(gemm_fp8_ring.product(x, x_scale, weight, weight_scale, None, dtype, ring, activation), scale)
    return gated_act_fp8(fp8_product(x, x_scale, weight, weight_scale, bias, dtype), activation, scale)


def fp8_matmul(x: Tensor, weight: Tensor, weight_scale: Tensor, input_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """See ref.fp8_matmul."""
    return fp8_product(*fp8_quantize(x, input_scale), weight, weight_scale, bias, x.dtype)


def fp8_block_matmul(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """See ref.fp8_block_matmul."""
    inputs, tile = quantize_blocks(x, FP8_BLOCK), gemm_few.tile_for(x, weight.shape[0], 8, x.dtype)
    if tile is not None:
        return gemm_few.fp8_product(*inputs, weight, weight_scale, bias, x.dtype, True, tile)
    ring = gemm_fp8_ring.tile_for(inputs[0], weight.shape[0], x.dtype, blocks=True)
    if ring is not None:
        return gemm_fp8_ring.product(*inputs, weight, weight_scale, bias, x.dtype, ring)
    return _product(*inputs, weight, weight_scale, bias, x.dtype, True, _tile(x.shape[0]))
