"""Prefill attention on Hopper as FlashAttention-3 has it (arXiv 2407.08608), in Gluon: some warps bring keys, others compute.

A block has 128 rows, queries times heads as in attention.py, 64 to each of two warp groups. A third group brings its queries, and
the keys and values of tile after tile, from the last that a query sees to the first, and page by page, into two rings of shared
memory. FP8 ones become float16 on the way, so that the groups that compute find all alike and none is converted twice. These ask
the tensor cores for the scores of a tile and, behind them, for the weighed values of the tile before; they take the softmax of
the scores while the values are added up, and take turns at asking, so that one's softmax runs beside the other's products.

As one program fills a multiprocessor, it takes block after block, whichever comes next when it has brought all of one: what that
needs is on its way before this one is done.
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
from kernels.hopper import GROUP, arrive_when_copied, async_load, await_operands, barrier, lines, processors, reinterpret
from kernels.ref import QUERY_TILE
from kernels.shapes import cdiv
from kernels.split_k import counters

MASKED, LOWEST, WIDEN = attention.MASKED, attention.LOWEST, attention.WIDEN
BLOCK_M = 128               # rows of a program
BLOCK_N = 128               # keys of a tile
STAGES = gl.constexpr(2)    # tiles of each ring, and blocks whose queries are there
# Registers of a thread: what twelve warps have on average when they fill a multiprocessor, and how those share it.
REGISTERS, COMPUTING, BRINGING = 168, 216, 72

# --- the work list --------------------------------------------------------------------------------------------------------------


@gluon.jit
def _block(n, work, window, G: gl.constexpr, K: gl.constexpr, TILE: gl.constexpr, BLOCK_M: gl.constexpr, WINDOW: gl.constexpr):
    """Block n, as in attention.py: from the list's end, since late queries see the most keys and long work should start first.

    (its row, its KV head, the token of the tile's first query and that one's position, the tile's rows, the first that are the
    block's, the first key that any query sees, the last). There is no work where the block's first row is past the tile's rows.
    """
    tiles, starts, cu_q, blocks = work
    BLOCKS: gl.constexpr = (TILE * G + BLOCK_M - 1) // BLOCK_M
    n = blocks - 1 - n
    head, place = n % K, n // K
    i = gl.load(tiles + place // BLOCKS * 2)
    first = gl.load(tiles + place // BLOCKS * 2 + 1)
    token = gl.load(cu_q + i) + first
    start = gl.load(starts + i) + first
    count = gl.minimum(gl.load(cu_q + i + 1) - token, TILE) * G
    r = place % BLOCKS * BLOCK_M
    low = 0
    if WINDOW:
        low = gl.maximum(start + r // G + 1 - window, 0)
    return i, head, token, start, count, r, low, start + (gl.minimum(r + BLOCK_M, count) - 1) // G


@gluon.jit
def _hand_over(ready):
    barrier()       # one thread arrives for all
    mbarrier.arrive(ready, count=1)


ONE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def _tell(n, names, told, stage):
    """To the groups that compute: their next block is n."""
    names.index(stage).store(gl.full([1], n, gl.int32, ONE))
    _hand_over(told.index(stage))


@gluon.jit
def _next(names, told, taken):
    stage, phase = _turn(taken)
    mbarrier.wait(told.index(stage), phase)
    return gl.max(names.index(stage).load(ONE), 0)


@gluon.jit
def _turn(n):
    """(the place in a ring, the phase of its barriers) of what comes there n-th."""
    return n % STAGES, n // STAGES & 1


# --- the group that brings queries, keys and values -----------------------------------------------------------------------------


@gluon.jit
def _copy_queries(q, q_stride, head, token, count, r, queries, stage, G: gl.constexpr):
    """Begin to copy a block's queries, the halves of both groups; 0 for rows that there are not."""
    ROWS: gl.constexpr = queries.shape[1]
    D: gl.constexpr = queries.shape[2]
    layout: gl.constexpr = lines(D, 8)
    here = q + token.to(gl.int64) * q_stride + head * G * D
    column = gl.arange(0, D, gl.SliceLayout(0, layout))
    for half in gl.static_range(2):
        m = r + half * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        at = (m // G * q_stride + m % G * D)[:, None] + column[None, :]
        async_load(queries.index(stage * 2 + half), here + at, mask=(m < count)[:, None])


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
def _bring_tiles(cache, block, span, turn, rings, bars, K: gl.constexpr, P: gl.constexpr):
    """16-bit keys and values, whatever is free of their rings: keys of a tile before values of the one before."""
    k_cache, v_cache = cache
    lo, last = span
    k_tiles, v_tiles = rings
    k_ready, k_free, v_ready, v_free = bars
    layout: gl.constexpr = lines(k_tiles.shape[2], 8)
    stage, phase = _turn(turn)
    mbarrier.wait(k_free.index(stage), phase ^ 1)
    _copy(k_cache, last, block, k_tiles.index(stage), K, P, layout)
    arrive_when_copied(k_ready.index(stage))
    for t in range(last, lo - 1, -1):
        stage, phase = _turn(turn + last - t)
        if t > lo:
            after, later = _turn(turn + last - t + 1)
            mbarrier.wait(k_free.index(after), later ^ 1)
            _copy(k_cache, t - 1, block, k_tiles.index(after), K, P, layout)
            arrive_when_copied(k_ready.index(after))
        mbarrier.wait(v_free.index(stage), phase ^ 1)
        _copy(v_cache, t, block, v_tiles.index(stage), K, P, layout)
        arrive_when_copied(v_ready.index(stage))


@gluon.jit
def _bring_widened(cache, block, span, turn, rings, bars, raw, K: gl.constexpr, P: gl.constexpr):
    """FP8 keys and values: copied to `raw`, the next while the one before is widened and computed with."""
    k_cache, v_cache = cache
    lo, last = span
    k_tiles, v_tiles = rings
    k_ready, k_free, v_ready, v_free = bars
    k_raw, v_raw = raw
    layout: gl.constexpr = lines(k_tiles.shape[2], 16)
    _copy(k_cache, last, block, k_raw, K, P, layout)
    async_copy.commit_group()
    _copy(v_cache, last, block, v_raw, K, P, layout)
    async_copy.commit_group()
    async_copy.wait_group(1)
    stage, phase = _turn(turn)
    mbarrier.wait(k_free.index(stage), phase ^ 1)
    _widen(k_raw, k_tiles.index(stage))
    _hand_over(k_ready.index(stage))
    if last > lo:
        _copy(k_cache, last - 1, block, k_raw, K, P, layout)
    async_copy.commit_group()
    for t in range(last, lo - 1, -1):
        stage, phase = _turn(turn + last - t)
        async_copy.wait_group(1)
        mbarrier.wait(v_free.index(stage), phase ^ 1)
        _widen(v_raw, v_tiles.index(stage))
        _hand_over(v_ready.index(stage))
        if t > lo:
            _copy(v_cache, t - 1, block, v_raw, K, P, layout)
            async_copy.commit_group()
            async_copy.wait_group(1)
            after, later = _turn(turn + last - t + 1)
            mbarrier.wait(k_free.index(after), later ^ 1)
            _widen(k_raw, k_tiles.index(after))
            _hand_over(k_ready.index(after))
        if t > lo + 1:
            _copy(k_cache, t - 2, block, k_raw, K, P, layout)
        async_copy.commit_group()
    async_copy.wait_group(0)


@gluon.jit
def _bring(inputs, work, counter, tables, window, queries, names, rings, bars, q_bars, raw, G: gl.constexpr, K: gl.constexpr,
           P: gl.constexpr, TILE: gl.constexpr, BLOCK_M: gl.constexpr, WINDOW: gl.constexpr, FP8: gl.constexpr):
    q, q_stride, k_cache, v_cache = inputs
    rows, block_table, table_stride = tables
    told, q_ready, q_free = q_bars
    blocks = work[3]
    BLOCK_N: gl.constexpr = rings[0].shape[1]
    taken, turn = 0, 0      # blocks and tiles so far
    n = gl.program_id(0)
    while n < blocks:
        i, head, token, _, count, r, low, high = _block(n, work, window, G, K, TILE, BLOCK_M, WINDOW)
        if r < count:
            stage, phase = _turn(taken)
            mbarrier.wait(q_free.index(stage), phase ^ 1)
            _tell(n, names, told, stage)
            _copy_queries(q, q_stride, head, token, count, r, queries, stage, G)
            arrive_when_copied(q_ready.index(stage))
            table = block_table + gl.load(rows + i).to(gl.int64) * table_stride
            cache = k_cache, v_cache
            block = head, table, low, high
            span = low // BLOCK_N, high // BLOCK_N
            if FP8:
                _bring_widened(cache, block, span, turn, rings, bars, raw, K, P)
            else:
                _bring_tiles(cache, block, span, turn, rings, bars, K, P)
            taken += 1
            turn += high // BLOCK_N - low // BLOCK_N + 1
        n = gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")
    stage, phase = _turn(taken)
    mbarrier.wait(q_free.index(stage), phase ^ 1)
    _tell(blocks, names, told, stage)
    if gl.atomic_add(counter + 1, 1, sem="acq_rel") == gl.num_programs(0) - 1:      # for the next launch
        gl.store(counter, 0)
        gl.store(counter + 1, 0)


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
def _by_lanes(scores):
    """[M, N] as [M, N / 8, 4, 2]: of a row, the third are the four lanes that share it. All the others lie in a lane."""
    return gl.reshape(scores, [scores.shape[0], scores.shape[1] // 8, 4, 2])


@gluon.jit
def _softmax(scores, peak, total, scale, SCORES: gl.constexpr):
    """A turn of the online softmax: (weights, the new peak and total, by what the sums so far shrink).

    total [M, 4] is each lane's, as they need not be added up but at the end.
    """
    higher = gl.maximum(gl.max(gl.max(gl.max(_by_lanes(scores), 3), 1), 1) * scale, peak)
    shrink = gl.exp2(peak - higher)
    weights = gl.exp2(scores * scale - gl.convert_layout(higher, gl.SliceLayout(1, SCORES), assert_trivial=True)[:, None])
    return weights, higher, total * shrink[:, None] + gl.sum(gl.sum(_by_lanes(weights), 3), 1), shrink


@gluon.jit
def _await_turn(half: gl.constexpr, order, n):
    """Until the other group has asked for its products of turn n, or, of the group that asks first, of turn n - 1."""
    mbarrier.wait(order.index(half), (n + half + 1) & 1)


@gluon.jit
def _turns(half: gl.constexpr, first, end, fixed, sums, MASK: gl.constexpr, WINDOW: gl.constexpr, SCORES: gl.constexpr,
           OUT: gl.constexpr):
    """Tiles first, first - 1, ... down to end + 1. `weights` are those of the tile before, whose values are not yet in acc.

    Tile t is the (turns - t)-th of the program.
    """
    turns, queries, positions, window, scale, rings, bars, order = fixed
    weights, peak, total, acc = sums
    k_tiles, v_tiles = rings
    k_ready, k_free, v_ready, v_free = bars
    ROWS: gl.constexpr = queries.shape[0]
    BLOCK_N: gl.constexpr = k_tiles.shape[1]
    for t in range(first, end, -1):
        stage, phase = _turn(turns - t)
        before, earlier = _turn(turns - t - 1)
        mbarrier.wait(k_ready.index(stage), phase)
        await_operands(v_ready.index(before), earlier)
        _await_turn(half, order, turns - t)
        nothing = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
        scores = warpgroup_mma(queries, k_tiles.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        acc = warpgroup_mma(weights, v_tiles.index(before), acc, is_async=True)
        mbarrier.arrive(order.index(1 - half), count=1)
        scores = warpgroup_mma_wait(1, deps=(scores,))
        mbarrier.arrive(k_free.index(stage), count=1)
        if MASK:
            scores = _mask(scores, t, positions, window, WINDOW, SCORES)
        fresh, peak, total, shrink = _softmax(scores, peak, total, scale, SCORES)
        fresh = gl.convert_layout(fresh.to(weights.dtype), gl.DotOperandLayout(0, OUT, 2))
        # Ready since above. But for the branch in this, ptxas would wait for the values first and take the softmax then.
        mbarrier.wait(v_ready.index(before), earlier)
        acc, weights, fresh = warpgroup_mma_wait(0, deps=(acc, weights, fresh))
        mbarrier.arrive(v_free.index(before), count=1)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, OUT))[:, None]
        weights = fresh
    return weights, peak, total, acc


@gluon.jit
def _attend(half: gl.constexpr, block, turn, queries, out, kv_scales, scale, window, rings, bars, order, G: gl.constexpr,
            K: gl.constexpr, WINDOW: gl.constexpr, FP8: gl.constexpr):
    """Rows 64 half .. 64 half + 64 of a block's, whose queries are there."""
    _, head, token, start, count, r, low, high = block
    k_tiles, v_tiles = rings
    k_ready, k_free, v_ready, v_free = bars
    BLOCK_N: gl.constexpr = k_tiles.shape[1]
    D: gl.constexpr = k_tiles.shape[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    lo, last = low // BLOCK_N, high // BLOCK_N
    r += half * 64
    if FP8:
        scale = scale * gl.load(kv_scales + head)
    positions = start + (r + gl.arange(0, 64, gl.SliceLayout(1, SCORES))) // G
    acc = gl.zeros([64, D], gl.float32, OUT)
    stage, phase = _turn(turn)
    await_operands(k_ready.index(stage), phase)
    _await_turn(half, order, turn)
    nothing = gl.zeros([64, BLOCK_N], gl.float32, SCORES)
    scores = warpgroup_mma(queries, k_tiles.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
    mbarrier.arrive(order.index(1 - half), count=1)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(k_free.index(stage), count=1)
    weights, peak, total, _ = _softmax(_mask(scores, last, positions, window, WINDOW, SCORES), LOWEST, 0.0, scale, SCORES)
    weights = gl.convert_layout(weights.to(queries.dtype), gl.DotOperandLayout(0, OUT, 2))
    edge = gl.minimum((start + r // G + 1) // BLOCK_N, last)    # from this tile on some query does not see all
    inner = lo
    if WINDOW:                                                  # nor before this one
        inner = gl.minimum(gl.maximum(high + BLOCK_N - window, 0) // BLOCK_N, edge)
    fixed = turn + last, queries, positions, window, scale, rings, bars, order
    sums = weights, peak, total, acc
    sums = _turns(half, last - 1, edge - 1, fixed, sums, True, WINDOW, SCORES, OUT)
    sums = _turns(half, edge - 1, inner - 1, fixed, sums, False, WINDOW, SCORES, OUT)
    if WINDOW:
        sums = _turns(half, inner - 1, lo - 1, fixed, sums, True, WINDOW, SCORES, OUT)
    weights, peak, total, acc = sums
    stage, phase = _turn(turn + last - lo)
    await_operands(v_ready.index(stage), phase)
    acc = warpgroup_mma(weights, v_tiles.index(stage), acc)
    mbarrier.arrive(v_free.index(stage), count=1)
    factor = 1.0 / gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, OUT))
    if FP8:
        factor = factor * gl.load(kv_scales + K + head)
    # By way of the queries' memory, so that a row's outputs are written together.
    results = reinterpret(queries, out.dtype.element_ty, queries.shape, queries.layout)
    results.store((acc * factor[:, None]).to(out.dtype.element_ty))
    by: gl.constexpr = lines(D, 8)
    m = r + gl.arange(0, 64, gl.SliceLayout(1, by))
    at = (m // G * (K * G * D) + m % G * D)[:, None] + gl.arange(0, D, gl.SliceLayout(0, by))[None, :]
    there = out + token.to(gl.int64) * (K * G * D) + head * G * D
    gl.store(there + at, results.load(by), mask=(m < count)[:, None])


@gluon.jit
def _compute(half: gl.constexpr, known, G: gl.constexpr, K: gl.constexpr, TILE: gl.constexpr, BLOCK_M: gl.constexpr,
             WINDOW: gl.constexpr, FP8: gl.constexpr):
    work, window, queries, names, out, kv_scales, scale, rings, bars, q_bars, order = known
    told, q_ready, q_free = q_bars
    k_tiles = rings[0]
    BLOCK_N: gl.constexpr = k_tiles.shape[1]
    D: gl.constexpr = k_tiles.shape[2]
    by: gl.constexpr = lines(D, 8)
    taken, turn = 0, 0      # blocks and tiles so far
    n = _next(names, told, taken)
    while n < work[3]:
        block = _block(n, work, window, G, K, TILE, BLOCK_M, WINDOW)
        _, _, _, _, _, _, low, high = block
        stage, phase = _turn(taken)
        await_operands(q_ready.index(stage), phase)
        mine = queries.index(stage * 2 + half)
        if mine.dtype != k_tiles.dtype:     # of FP8 keys: converted where they lie
            converted = reinterpret(mine, k_tiles.dtype, mine.shape, mine.layout)
            converted.store(mine.load(by).to(k_tiles.dtype))
            fence_async_shared()
            _attend(half, block, turn, converted, out, kv_scales, scale, window, rings, bars, order, G, K, WINDOW, FP8)
        else:
            _attend(half, block, turn, mine, out, kv_scales, scale, window, rings, bars, order, G, K, WINDOW, FP8)
        mbarrier.arrive(q_free.index(stage), count=1)
        taken += 1
        turn += high // BLOCK_N - low // BLOCK_N + 1
        n = _next(names, told, taken)


# --- the program ----------------------------------------------------------------------------------------------------------------


@gluon.jit
def _barriers(count: gl.constexpr):
    """One for each place of a ring; `count` arrive."""
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(bars.index(stage), count=count)
    return bars


@gluon.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["rows", "starts", "cu_q", "tiles"])
def _prefill_kernel(q, k_cache, v_cache, kv_scales, block_table, rows, starts, cu_q, tiles, out, counter, scale, window,
                    table_stride, q_stride, blocks, H: gl.constexpr, K: gl.constexpr, P: gl.constexpr, D: gl.constexpr,
                    TILE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, WINDOW: gl.constexpr, FP8: gl.constexpr,
                    COMPUTING: gl.constexpr, BRINGING: gl.constexpr):
    G: gl.constexpr = H // K
    DTYPE: gl.constexpr = gl.float16 if FP8 else k_cache.dtype.element_ty
    half: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M // 2, D], DTYPE)
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, D], DTYPE)
    queries = gl.allocate_shared_memory(q.dtype.element_ty, [STAGES * 2, BLOCK_M // 2, D], half)
    k_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, D], tile)
    v_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, D], tile)
    rings = k_tiles, v_tiles
    raw = rings
    if FP8:
        raw = (gl.allocate_shared_memory(k_cache.dtype.element_ty, [BLOCK_N, D], swizzled(D)),
               gl.allocate_shared_memory(v_cache.dtype.element_ty, [BLOCK_N, D], swizzled(D)))
    ARRIVING: gl.constexpr = 1 if FP8 else GROUP
    # What is read is free again once both groups have read it.
    bars = _barriers(ARRIVING), _barriers(2), _barriers(ARRIVING), _barriers(2)
    names = gl.allocate_shared_memory(gl.int32, [STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))     # the blocks, by number
    q_bars = _barriers(1), _barriers(GROUP), _barriers(2)
    order = _barriers(1)        # one for each group's turn
    work = tiles, starts, cu_q, blocks
    tables = rows, block_table, table_stride
    inputs = q, q_stride, k_cache, v_cache
    known = work, window, queries, names, out, kv_scales, scale, rings, bars, q_bars, order
    gl.warp_specialize([
        (_compute, (0, known, G, K, TILE, BLOCK_M, WINDOW, FP8)),
        (_compute, (1, known, G, K, TILE, BLOCK_M, WINDOW, FP8)),
        (_bring, (inputs, work, counter, tables, window, queries, names, rings, bars, q_bars, raw, G, K, P, TILE, BLOCK_M, WINDOW,
                  FP8)),
    ], [4, 4], [COMPUTING, BRINGING])


def prefill_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, rows: Tensor, starts: Tensor,
                      cu_q: Tensor, tiles: Tensor, scale: float, window: int, softcap: float,
                      out: Tensor | None = None, kv_scales: Tensor | None = None) -> Tensor:
    """See ref.prefill_attention. What lies past cu_q[-1] in the output is not written.

    On Hopper heads of 128 are computed here, of 64 where they come as FP8; all else by attention.py.
    """
    _, heads, dim = q.shape
    programs = processors(q.device)
    if (dim != 128 and (dim != 64 or kv_scales is None)) or softcap or max(q.itemsize, k_cache.itemsize) > 2 or not programs:
        return attention.prefill_attention(q, k_cache, v_cache, block_table, rows, starts, cu_q, tiles, scale, window, softcap,
                                           out, kv_scales)
    kv_heads, page = k_cache.shape[1], k_cache.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if not tiles.shape[0]:
        return out
    blocks = tiles.shape[0] * cdiv(QUERY_TILE * (heads // kv_heads), BLOCK_M) * kv_heads
    _prefill_kernel[min(blocks, programs),](
        q, k_cache, v_cache, out if kv_scales is None else kv_scales, block_table, rows, starts, cu_q, tiles, out,
        counters(q.device), attention.LOG2E * scale, window, block_table.stride(0), q.stride(0), blocks, H=heads, K=kv_heads,
        P=page, D=dim, TILE=QUERY_TILE, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, WINDOW=window > 0, FP8=kv_scales is not None,
        COMPUTING=COMPUTING, BRINGING=BRINGING, num_warps=4, maxnreg=REGISTERS)
    return out
