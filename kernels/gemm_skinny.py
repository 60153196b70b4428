"""Products of few rows with a dense weight on CUDA, y = x W^T for M <= 128: the weights stream once, at the memory's speed.

The transposed product W x^T puts the weights' rows where the tensor cores want 64 or 16 of them, and x's few rows where 8 do. All
programs are on the chip at once (a row of tiles, each cut along K where the tiles alone are too few), so that none waits for a
second wave; the last program of a tile to finish adds its partial sums in their order, so that timing changes nothing.

The gated activation folds in, rounded where its own kernel rounds. (So did the residual sum and RMSNorm before the product, but
every program has to find the mean square anew, and that cost what the launch saved.) Launches overlap (programmatic dependent
launch, CUDA's guide, section 4.5): a program asks the L2 for its first weights before it waits for the kernel that makes its x.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.overlap import after, launch_options, overlaps, prefetch
from kernels.pointwise import gate
from kernels.shapes import cdiv, next_power_of_2
from kernels.split_k import TILES, counters

AHEAD_BYTES = 2 << 20     # of the weight, asked of the L2 before the wait


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program does, and how."""

    rows: int               # of the weight: 16 or 32 (mma), 64 or 128 (wgmma); any power of two in registers
    depth: int              # elements along K a turn
    splits: int             # programs that share K
    warps: int
    stages: int
    vector: bool = False    # one row of x, multiplied in registers

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.depth}/{self.splits} w{self.warps} s{self.stages}{' vector' if self.vector else ''}"

    def block(self, m: int) -> int:
        """Rows of x that a program holds for m of them."""
        return 1 if self.vector else max(16, next_power_of_2(m))


@triton.jit
def _prefetch(rows, count, LINE: tl.constexpr):
    """Ask the L2 for the first `count` elements of every row, in lines of LINE elements; returns at once."""
    line = tl.arange(0, 8)[None, :] * LINE
    for start in range(0, count, 8 * LINE):
        prefetch(rows[:, None] + tl.minimum(start + line, count - 1))


@triton.jit(do_not_specialize=["M", "ahead"])
def _product_kernel(x, weight, bias, out, partial, arrived, M, N, K, share, x_stride, ahead,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
                    STAGES: tl.constexpr, GATED: tl.constexpr, GELU: tl.constexpr, BIAS: tl.constexpr,
                    OVERLAP: tl.constexpr, PRECISION: tl.constexpr):
    tile, split = tl.program_id(0), tl.program_id(1)
    dtype: tl.constexpr = out.dtype.element_ty
    m, r, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    there = (m < M)[:, None]
    if GATED:       # half a tile of gate's rows, half a tile of up's
        HALF: tl.constexpr = BLOCK_N // 2
        width = N // 2
        row = tl.minimum(tile * HALF + r % HALF, width - 1) + r // HALF * width
    else:
        row = tl.minimum(tile * BLOCK_N + r, N - 1)
    begin = split * share
    rows = weight + row.to(tl.int64) * K
    if OVERLAP:
        _prefetch(rows + begin, tl.minimum(share, ahead), 1024 // dtype.primitive_bitwidth)
    after(OVERLAP)

    acc = tl.zeros([BLOCK_N, BLOCK_K if BLOCK_M == 1 else BLOCK_M], tl.float32)
    at = rows[:, None] + k[None, :]
    x_at = x + m[:, None] * x_stride + k[None, :]
    for start in tl.range(begin, begin + share, BLOCK_K, num_stages=STAGES):
        w = tl.load(at + start, eviction_policy="evict_first")
        a = tl.load(x_at + start, mask=there, other=0.0, eviction_policy="evict_last")
        if BLOCK_M == 1:
            acc += w.to(tl.float32) * a.to(tl.float32)
        else:
            acc = tl.dot(w, tl.trans(a), acc, input_precision=PRECISION)
    if BLOCK_M == 1:
        acc = tl.sum(acc, 1)[:, None]

    if SPLITS > 1:
        own = partial + tile * SPLITS * BLOCK_N * BLOCK_M + r[:, None] * BLOCK_M + m[None, :]
        tl.store(own + split * BLOCK_N * BLOCK_M, acc)
        tl.debug_barrier()      # all warps' sums are on their way before one thread says so
        if tl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu") < SPLITS - 1:
            return
        tl.store(arrived + tile, 0)
        acc = tl.load(own, cache_modifier=".cg")
        for other in tl.static_range(1, SPLITS):
            acc += tl.load(own + other * BLOCK_N * BLOCK_M, cache_modifier=".cg")

    if BIAS:
        acc += tl.load(bias + row).to(tl.float32)[:, None]
    y = acc.to(dtype)
    if GATED:
        pair = tl.permute(tl.reshape(y, [2, HALF, BLOCK_M]), [1, 2, 0])
        low, up = tl.split(pair)
        column = tile * HALF + tl.arange(0, HALF)
        tl.store(out + m[None, :] * width + column[:, None], gate(low.to(tl.float32), up.to(tl.float32), GELU, dtype),
                 mask=(m < M)[None, :] & (column < width)[:, None])
    else:
        column = tile * BLOCK_N + r
        tl.store(out + m[None, :] * N + column[:, None], y, mask=(m < M)[None, :] & (column < N)[:, None])


def product(x: Tensor, weight: Tensor, bias: Tensor | None, tile: Tile, activation: str = "", out: Tensor | None = None,
            overlap: bool | None = None, ahead: int = AHEAD_BYTES) -> Tensor:
    """x [M, K], rows may be strided, and weight [N, K] -> [M, N], into `out` if given; with an activation [M, N / 2].

    M is at most 128; K a multiple of tile.splits * tile.depth.
    """
    (rows, depth), features = x.shape, weight.shape[0]
    block = tile.block(rows)
    width = features // 2 if activation else features
    tiles = cdiv(width, tile.rows // 2 if activation else tile.rows)
    if out is None:
        out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    partial, arrived = out, out         # not used without splits
    if tile.splits > 1:
        partial = torch.empty(tiles * tile.splits * tile.rows * block, dtype=torch.float32, device=x.device)
        arrived = counters(x.device)
        assert tiles <= TILES
    _product_kernel[tiles, tile.splits](
        x, weight, weight if bias is None else bias, out, partial, arrived, rows, features, depth, depth // tile.splits,
        x.stride(0), ahead // (features * tile.splits * x.element_size()), BLOCK_M=block, BLOCK_N=tile.rows, BLOCK_K=tile.depth,
        SPLITS=tile.splits, STAGES=tile.stages, GATED=bool(activation), GELU=activation == "gelu_tanh", BIAS=bias is not None,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tile.warps, num_stages=tile.stages, **launch_options(overlaps(x.device) if overlap is None else overlap))
    return out


SHARED_BYTES = 224 << 10    # of one multiprocessor, less what the system keeps


def tile_of(m: int, features: int, depth: int, gated: bool, shape: tuple[int, int, int, int], processors: int,
            vector: bool = False, most_stages: int = 8) -> Tile | None:
    """The tile (rows, depth, splits, warps) with as many stages as fit when all programs are on the chip at once; None: too few.

    features, depth: the weight's shape; processors: multiprocessors of the chip. Also None where the tile does not divide K.
    """
    rows, step, splits, warps = shape
    if depth % (splits * step):
        return None
    if most_stages < 3:
        return Tile(rows, step, splits, warps, most_stages, vector)
    programs = (cdiv(features // 2, rows // 2) if gated else cdiv(features, rows)) * splits
    block = 1 if vector else max(16, next_power_of_2(m))
    for share in range(min(cdiv(programs, processors), 4), 0, -1):       # the wide heads run in several waves
        stages = min((SHARED_BYTES // share - 1024) // ((rows + block) * step * 2), most_stages, depth // (splits * step) + 1)
        if stages >= 3:
            return Tile(rows, step, splits, warps, stages if stages < 5 or share == 1 else stages // 2 * 2, vector)
    return None
