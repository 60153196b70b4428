"""Prefill attention on Hopper as FlashAttention-3 has it (arXiv 2407.08608), in Gluon: some warps bring keys, others compute.

A program has 128 rows, queries times heads as in attention.py, 64 to each of two warp groups. A third group brings the keys and
values of tile after tile, from the last that a query sees to the first, and page by page, into two rings of shared memory. FP8
ones become float16 on the way, so that the groups that compute find all alike and none is converted twice. These ask the tensor
cores for the scores of a tile and, behind them, for the weighed values of the tile before; they take the softmax of the scores
while the values are added up.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.runtime.jit import constexpr_function

from kernels import attention
from kernels.assembly import WIDEN
from kernels.hopper import GROUP, arrive_when_copied, async_load, await_operands, barrier, lines, processors
from kernels.ref import QUERY_TILE
from kernels.shapes import cdiv

MASKED, LOWEST = attention.MASKED, attention.LOWEST
BLOCK_M = 128               # rows of a program
BLOCK_N = 128               # keys of a tile
STAGES = gl.constexpr(2)    # tiles of each ring
# Registers of a thread: what twelve warps have on average when they fill a multiprocessor, and how those share it.
REGISTERS, COMPUTING, BRINGING = 168, 216, 72

# --- the group that brings keys and values --------------------------------------------------------------------------------------


@gluon.jit
def _copy(cache, t, block, tile, K: gl.constexpr, P: gl.constexpr, layout: gl.constexpr):
    """Begin to copy tile t of the keys or the values; 0 for those that no query sees, which may be another row's by now."""
    head, table, low, high = block
    BLOCK_N: gl.constexpr = tile.shape[0]
    D: gl.constexpr = tile.shape[1]
    PIECE: gl.constexpr = min(P, BLOCK_N)       # keys that lie together
    slot = gl.arange(0, PIECE, gl.SliceLayout(1, layout))
    at = slot[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, layout))[None, :]
    for piece in gl.static_range(BLOCK_N // PIECE):
        first = t * BLOCK_N + piece * PIECE
        page = gl.load(table + first // P, mask=(first + PIECE > low) & (first <= high), other=0).to(gl.int64)
        here = cache + ((page * K + head) * P + first % P) * D
        there = (first + slot >= low) & (first + slot <= high)
        async_load(tile.slice(piece * PIECE, PIECE), here + at, mask=there[:, None])


# Eight lanes have 16 numbers each, of as many rows, which both the copies and the tiles swizzle: each has banks of its own.
WIDENED = gl.constexpr(gl.BlockedLayout([1, 16], [8, 4], [4, 1], [0, 1]))


@constexpr_function
def swizzled(dim):
    return gl.SwizzledSharedLayout(16, 128 // dim, dim // 16, [1, 0])


@gluon.jit
def _widen(raw, tile):
    """e4m3 to float16, in pieces that take few registers."""
    for piece in gl.static_range(raw.shape[0] // 32):
        x = raw.slice(piece * 32, 32).load(WIDENED)
        tile.slice(piece * 32, 32).store(
            gl.inline_asm_elementwise(WIDEN, "=&r,=&r,r", [x], gl.float16, is_pure=True, pack=4))


@gluon.jit
def _bring(cache, block, span, rings, bars, K: gl.constexpr, P: gl.constexpr):
    """16-bit keys and values, whatever is free of their rings: keys of a tile before values of the one before."""
    k_cache, v_cache = cache
    lo, last = span
    k_tiles, v_tiles = rings
    k_ready, k_free, v_ready, v_free = bars
    layout: gl.constexpr = lines(k_tiles.shape[2], 8)
    _copy(k_cache, last, block, k_tiles.index(0), K, P, layout)
    arrive_when_copied(k_ready.index(0))
    for n in range(last - lo + 1):
        if n < last - lo:
            after = (n + 1) % STAGES
            mbarrier.wait(k_free.index(after), (n + 1) // STAGES & 1 ^ 1)
            _copy(k_cache, last - n - 1, block, k_tiles.index(after), K, P, layout)
            arrive_when_copied(k_ready.index(after))
        stage = n % STAGES
        mbarrier.wait(v_free.index(stage), n // STAGES & 1 ^ 1)
        _copy(v_cache, last - n, block, v_tiles.index(stage), K, P, layout)
        arrive_when_copied(v_ready.index(stage))


@gluon.jit
def _hand_over(ready):
    barrier()       # one thread arrives for all
    mbarrier.arrive(ready, count=1)


@gluon.jit
def _bring_widened(cache, block, span, rings, bars, raw, K: gl.constexpr, P: gl.constexpr):
    """FP8 keys and values: copied to `raw`, the next while the one before is widened and computed with."""
    k_cache, v_cache = cache
    lo, last = span
    k_tiles, v_tiles = rings
    k_ready, k_free, v_ready, v_free = bars
    k_raw, v_raw = raw
    layout: gl.constexpr = lines(k_tiles.shape[2], 16)
    turns = last - lo
    _copy(k_cache, last, block, k_raw, K, P, layout)
    async_copy.commit_group()
    _copy(v_cache, last, block, v_raw, K, P, layout)
    async_copy.commit_group()
    async_copy.wait_group(1)
    _widen(k_raw, k_tiles.index(0))
    _hand_over(k_ready.index(0))
    if turns > 0:
        _copy(k_cache, last - 1, block, k_raw, K, P, layout)
    async_copy.commit_group()
    for n in range(turns + 1):
        stage = n % STAGES
        async_copy.wait_group(1)
        mbarrier.wait(v_free.index(stage), n // STAGES & 1 ^ 1)
        _widen(v_raw, v_tiles.index(stage))
        _hand_over(v_ready.index(stage))
        if n < turns:
            _copy(v_cache, last - n - 1, block, v_raw, K, P, layout)
            async_copy.commit_group()
            async_copy.wait_group(1)
            after = (n + 1) % STAGES
            mbarrier.wait(k_free.index(after), (n + 1) // STAGES & 1 ^ 1)
            _widen(k_raw, k_tiles.index(after))
            _hand_over(k_ready.index(after))
        if n + 1 < turns:
            _copy(k_cache, last - n - 2, block, k_raw, K, P, layout)
        async_copy.commit_group()
    async_copy.wait_group(0)


# --- the groups that compute ----------------------------------------------------------------------------------------------------


@gluon.jit
def _mask(scores, t, positions, window, WINDOW: gl.constexpr, SCORES: gl.constexpr):
    BLOCK_N: gl.constexpr = scores.shape[1]
    key = t * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
    visible = key[None, :] <= positions[:, None]
    if WINDOW:
        visible = visible & (key[None, :] > positions[:, None] - window)
    return gl.where(visible, scores, MASKED)


@gluon.jit
def _softmax(scores, peak, total, scale):
    """A turn of the online softmax: (weights, the new peak and total, by what the sums so far shrink)."""
    higher = gl.maximum(peak, gl.max(scores, 1) * scale)
    shrink = gl.exp2(peak - higher)
    weights = gl.exp2(scores * scale - higher[:, None])
    return weights, higher, total * shrink + gl.sum(weights, 1), shrink


@gluon.jit
def _turns(first, end, fixed, sums, MASK: gl.constexpr, WINDOW: gl.constexpr, SCORES: gl.constexpr, OUT: gl.constexpr):
    """Tiles first, first - 1, ... down to end + 1. `weights` are those of the tile before, whose values are not yet in acc."""
    last, queries, positions, window, scale, rings, bars = fixed
    weights, peak, total, acc = sums
    k_tiles, v_tiles = rings
    k_ready, k_free, v_ready, v_free = bars
    ROWS: gl.constexpr = queries.shape[0]
    BLOCK_N: gl.constexpr = k_tiles.shape[1]
    for t in range(first, end, -1):
        n = last - t
        stage = n % STAGES
        before = (n - 1) % STAGES
        await_operands(k_ready.index(stage), n // STAGES & 1)
        nothing = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
        scores = warpgroup_mma(queries, k_tiles.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        await_operands(v_ready.index(before), (n - 1) // STAGES & 1)
        acc = warpgroup_mma(weights, v_tiles.index(before), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=(scores,))
        mbarrier.arrive(k_free.index(stage), count=1)
        if MASK:
            scores = _mask(scores, t, positions, window, WINDOW, SCORES)
        fresh, peak, total, shrink = _softmax(scores, peak, total, scale)
        fresh = gl.convert_layout(fresh.to(weights.dtype), gl.DotOperandLayout(0, OUT, 2))
        # Ready since above. But for the branch in this, ptxas would wait for the values first and take the softmax then.
        mbarrier.wait(v_ready.index(before), (n - 1) // STAGES & 1)
        acc, weights, fresh = warpgroup_mma_wait(0, deps=(acc, weights, fresh))
        mbarrier.arrive(v_free.index(before), count=1)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, OUT))[:, None]
        weights = fresh
    return weights, peak, total, acc


@gluon.jit
def _compute(half: gl.constexpr, known, G: gl.constexpr, K: gl.constexpr, WINDOW: gl.constexpr, FP8: gl.constexpr):
    """Rows 64 half .. 64 half + 64 of the program's."""
    queries, q, q_stride, out, kv_scales, scale, window, mine, block, span, rings, bars = known
    token, count, r, start = mine
    head, _, _, high = block
    lo, last = span
    k_tiles, v_tiles = rings
    k_ready, k_free, v_ready, _ = bars
    BLOCK_N: gl.constexpr = k_tiles.shape[1]
    D: gl.constexpr = k_tiles.shape[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    by: gl.constexpr = lines(D, 8)
    m = r + half * 64 + gl.arange(0, 64, gl.SliceLayout(1, by))
    column = ((head * G + m % G) * D)[:, None] + gl.arange(0, D, gl.SliceLayout(0, by))[None, :]
    at = (token + m // G).to(gl.int64)[:, None] * q_stride + column
    queries = queries.index(half)
    queries.store(gl.load(q + at, mask=(m < count)[:, None], other=0.0).to(queries.dtype))
    fence_async_shared()
    if FP8:
        scale = scale * gl.load(kv_scales + head)
    positions = start + (r + half * 64 + gl.arange(0, 64, gl.SliceLayout(1, SCORES))) // G
    peak = gl.full([64], LOWEST, gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.full([64], 0.0, gl.float32, gl.SliceLayout(1, SCORES))
    acc = gl.zeros([64, D], gl.float32, OUT)
    await_operands(k_ready.index(0), 0)
    nothing = gl.zeros([64, BLOCK_N], gl.float32, SCORES)
    scores = warpgroup_mma(queries, k_tiles.index(0).permute((1, 0)), nothing, use_acc=False)
    mbarrier.arrive(k_free.index(0), count=1)
    weights, peak, total, _ = _softmax(_mask(scores, last, positions, window, WINDOW, SCORES), peak, total, scale)
    weights = gl.convert_layout(weights.to(queries.dtype), gl.DotOperandLayout(0, OUT, 2))
    edge = gl.minimum((start + (r + half * 64) // G + 1) // BLOCK_N, last)      # from this tile on some query does not see all
    inner = lo
    if WINDOW:                                                                  # nor before this one
        inner = gl.minimum(gl.maximum(high + BLOCK_N - window, 0) // BLOCK_N, edge)
    fixed = last, queries, positions, window, scale, rings, bars
    sums = weights, peak, total, acc
    sums = _turns(last - 1, edge - 1, fixed, sums, True, WINDOW, SCORES, OUT)
    sums = _turns(edge - 1, inner - 1, fixed, sums, False, WINDOW, SCORES, OUT)
    if WINDOW:
        sums = _turns(inner - 1, lo - 1, fixed, sums, True, WINDOW, SCORES, OUT)
    weights, peak, total, acc = sums
    n = last - lo
    await_operands(v_ready.index(n % STAGES), n // STAGES & 1)
    acc = warpgroup_mma(weights, v_tiles.index(n % STAGES), acc)
    factor = 1.0 / gl.convert_layout(total, gl.SliceLayout(1, OUT))
    if FP8:
        factor = factor * gl.load(kv_scales + K + head)
    m = r + half * 64 + gl.arange(0, 64, gl.SliceLayout(1, OUT))
    column = ((head * G + m % G) * D)[:, None] + gl.arange(0, D, gl.SliceLayout(0, OUT))[None, :]
    at = (token + m // G).to(gl.int64)[:, None] * (K * G * D) + column
    gl.store(out + at, (acc * factor[:, None]).to(out.dtype.element_ty), mask=(m < count)[:, None])


# --- the program ----------------------------------------------------------------------------------------------------------------


@gluon.jit(do_not_specialize_on_alignment=["rows", "starts", "cu_q", "tiles"])
def _prefill_kernel(q, k_cache, v_cache, kv_scales, block_table, rows, starts, cu_q, tiles, out, scale, window, table_stride,
                    q_stride, H: gl.constexpr, K: gl.constexpr, P: gl.constexpr, D: gl.constexpr, TILE: gl.constexpr,
                    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, WINDOW: gl.constexpr, FP8: gl.constexpr,
                    COMPUTING: gl.constexpr, BRINGING: gl.constexpr):
    # Blocks as in attention.py: from the list's end, since late queries see the most keys and long work should start first.
    G: gl.constexpr = H // K
    BLOCKS: gl.constexpr = (TILE * G + BLOCK_M - 1) // BLOCK_M
    pid = gl.num_programs(0) - 1 - gl.program_id(0)
    head, place = pid % K, pid // K
    i = gl.load(tiles + place // BLOCKS * 2)
    first = gl.load(tiles + place // BLOCKS * 2 + 1)
    token = gl.load(cu_q + i) + first
    count = gl.minimum(gl.load(cu_q + i + 1) - token, TILE) * G
    r = place % BLOCKS * BLOCK_M
    if r < count:
        start = gl.load(starts + i) + first
        high = start + (gl.minimum(r + BLOCK_M, count) - 1) // G        # the last key that any query sees
        low = 0                                                         # and the first
        if WINDOW:
            low = gl.maximum(start + r // G + 1 - window, 0)
        table = block_table + gl.load(rows + i).to(gl.int64) * table_stride
        DTYPE: gl.constexpr = gl.float16 if FP8 else k_cache.dtype.element_ty
        half: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M // 2, D], DTYPE)
        tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, D], DTYPE)
        queries = gl.allocate_shared_memory(DTYPE, [2, BLOCK_M // 2, D], half)
        k_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, D], tile)
        v_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, D], tile)
        k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(STAGES):
            mbarrier.init(k_ready.index(stage), count=1 if FP8 else GROUP)
            mbarrier.init(v_ready.index(stage), count=1 if FP8 else GROUP)
            mbarrier.init(k_free.index(stage), count=2)         # both groups have read it
            mbarrier.init(v_free.index(stage), count=2)
        cache = k_cache, v_cache
        block = head, table, low, high
        span = low // BLOCK_N, high // BLOCK_N
        rings = k_tiles, v_tiles
        bars = k_ready, k_free, v_ready, v_free
        mine = token, count, r, start
        known = queries, q, q_stride, out, kv_scales, scale, window, mine, block, span, rings, bars
        if FP8:
            raw = (gl.allocate_shared_memory(k_cache.dtype.element_ty, [BLOCK_N, D], swizzled(D)),
                   gl.allocate_shared_memory(v_cache.dtype.element_ty, [BLOCK_N, D], swizzled(D)))
            gl.warp_specialize([(_compute, (0, known, G, K, WINDOW, FP8)), (_compute, (1, known, G, K, WINDOW, FP8)),
                                (_bring_widened, (cache, block, span, rings, bars, raw, K, P))], [4, 4], [COMPUTING, BRINGING])
        else:
            gl.warp_specialize([(_compute, (0, known, G, K, WINDOW, FP8)), (_compute, (1, known, G, K, WINDOW, FP8)),
                                (_bring, (cache, block, span, rings, bars, K, P))], [4, 4], [COMPUTING, BRINGING])


def prefill_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, rows: Tensor, starts: Tensor,
                      cu_q: Tensor, tiles: Tensor, scale: float, window: int, softcap: float,
                      out: Tensor | None = None, kv_scales: Tensor | None = None) -> Tensor:
    """See ref.prefill_attention. What lies past cu_q[-1] in the output is not written.

    Heads of 64 and 128 in at most 16 bits are computed here on Hopper, all else by attention.py.
    """
    _, heads, dim = q.shape
    if dim not in (64, 128) or softcap or k_cache.dtype == torch.float32 or not processors(q.device):
        return attention.prefill_attention(q, k_cache, v_cache, block_table, rows, starts, cu_q, tiles, scale, window, softcap,
                                           out, kv_scales)
    kv_heads, page = k_cache.shape[1], k_cache.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if not tiles.shape[0]:
        return out
    grid = tiles.shape[0] * cdiv(QUERY_TILE * (heads // kv_heads), BLOCK_M) * kv_heads
    _prefill_kernel[grid,](
        q, k_cache, v_cache, out if kv_scales is None else kv_scales, block_table, rows, starts, cu_q, tiles, out,
        attention.LOG2E * scale, window, block_table.stride(0), q.stride(0), H=heads, K=kv_heads, P=page, D=dim, TILE=QUERY_TILE,
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, WINDOW=window > 0, FP8=kv_scales is not None, COMPUTING=COMPUTING, BRINGING=BRINGING,
        num_warps=4, maxnreg=REGISTERS)
    return out
