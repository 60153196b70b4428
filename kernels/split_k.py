"""The end of a product whose sums over K are shared among programs: the last one of a tile adds them up, in their order."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.shapes import cdiv

TILES = 1 << 16     # most tiles of one product


class Tile(NamedTuple):
    """How a product is cut. About `programs` programs are started, by splitting K."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    programs: int

    def grid(self, rows: int, features: int, blocks: int) -> tuple[int, int, int]:
        """(tiles of N, splits of K, tiles of M); K has so many blocks."""
        n, m = cdiv(features, self.block_n), cdiv(rows, self.block_m)
        return n, max(1, min(self.programs // (n * m), blocks)), m


@triton.jit
def finish(acc, bias, out, partial, counters, n, m, M, N, splits, BIAS: tl.constexpr, SPLIT: tl.constexpr, WARPS: tl.constexpr):
    """Write this program's sums acc, float32 [BLOCK_N, BLOCK_M] of outputs n and rows m, to out [M, N], bias added.

    Programs are (tile of N, split of K, tile of M). SPLIT: every split leaves its sums in partial, float32 [splits, M, N], and
    the one that finds in `counters` that it is the last adds them all, in their order whoever is last, and sets that back to 0.
    """
    inside = (n < N)[:, None] & (m < M)[None, :]
    last = True
    if SPLIT:       # of few tiles: int32 counts what they leave
        size = M * N
        at = m[None, :] * N + n[:, None]
        tl.store(partial + tl.program_id(1) * size + at, acc, mask=inside)
        tl.debug_barrier()      # all of the program's stores come before its ticket
        counter = counters + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        last = tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1
        if last:
            acc = tl.zeros(acc.shape, tl.float32)
            AT_ONCE: tl.constexpr = min(4, max(1, 2048 * WARPS // acc.numel))      # loads in flight, of 64 registers at most
            for first in range(0, splits, AT_ONCE):
                for i in tl.static_range(AT_ONCE):
                    there = (n < tl.where(first + i < splits, N, 0))[:, None] & (m < M)[None, :]
                    acc += tl.load(partial + (first + i) * size + at, mask=there, other=0.0, cache_modifier=".cg")
            tl.store(counter, 0)
    if last:
        if BIAS:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        rows = out + m.to(tl.int64) * N     # of many rows there may be more elements than int32 counts
        tl.store(rows[None, :] + n[:, None], acc.to(out.dtype.element_ty), mask=inside)


@cache
def counters(device: torch.device) -> Tensor:
    """int32 [TILES] of zeros, which products, and prefill_hopper.py, leave as zeros: these must run one after the other."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a kernel that counts must run once before it is captured in a CUDA graph")
    return torch.zeros(TILES, dtype=torch.int32, device=device)
