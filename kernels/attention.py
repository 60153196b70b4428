"""Paged attention on CUDA: split-KV decode and varlen prefill, FlashAttention-2's online softmax (arXiv 2307.08691) in Triton.

The caches are [pages, K, P, D]. No tile depends on the page size: a tile of keys finds its pages in the block table, key by key
or in pieces of a page. All the query heads of a KV head share one dot product, so that a key is read once for all of them.
FP8 keys and values become float16 as they arrive, which is exact, and their scales, one a head, multiply scores and sums.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.overlap import after, launch_options, overlaps
from kernels.ref import PREFIX_TILE, QUERY_TILE
from kernels.shapes import cdiv, next_power_of_2

LOG2E = 1.4426950408889634
MASKED = tl.constexpr(-1.0e30)      # the score of a key that a query does not see
LOWEST = tl.constexpr(-1.0e20)      # peaks start here: above a masked score by far, so that no rounding of one lets it weigh
DECODE_PROGRAMS = 264               # fill an H100 at a head size of 128, more at a smaller one; with fewer, keys are split
MAX_SPLITS = 64
COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)
# Four e4m3 to four float16: Triton's own conversion is 4 % slower.
WIDEN = tl.constexpr("""{
.reg .b16 low, high;
mov.b32 {low, high}, $2;
cvt.rn.f16x2.e4m3x2 $0, low;
cvt.rn.f16x2.e4m3x2 $1, high;
}""")


@triton.jit
def _widened(x, DTYPE: tl.constexpr):
    """Keys or values in the type that they are multiplied in."""
    if COMPILED and x.dtype == tl.float8e4nv:
        return tl.inline_asm_elementwise(WIDEN, "=&r,=&r,r", [x], tl.float16, is_pure=True, pack=4)
    return x.to(DTYPE)


@triton.jit
def _fold(scores, v, peak, total, acc, scale, PRECISION: tl.constexpr):
    """Online softmax: add the values `v`, weighed by exp2(scores * scale - peak), to the sums so far."""
    higher = tl.maximum(peak, tl.max(scores, 1) * scale)
    shrink = tl.exp2(peak - higher)
    weights = tl.exp2(scores * scale - higher[:, None])
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return higher, total, acc


@triton.jit
def softcapped(scores, inner):
    """tanh of half the scores, by exp2(scores * inner): tanh(x) = 1 - 2 / (exp(2 x) + 1)."""
    return 1.0 - 2.0 / (tl.exp2(scores * inner) + 1.0)


@triton.jit
def key_scaled(scale, inner, k_scale, SOFTCAP: tl.constexpr):
    """scale and inner times the scale of a head's keys."""
    if SOFTCAP:
        return scale, inner * k_scale
    return scale * k_scale, inner


def log2_scales(scale: float, softcap: float) -> tuple[float, float]:
    """(scale, inner) of _fold and softcapped: exp2 takes the place of exp."""
    return (LOG2E * softcap, 2 * LOG2E * scale / softcap) if softcap else (LOG2E * scale, 0.0)


def _precision(cache: Tensor) -> str:
    return "ieee" if cache.dtype == torch.float32 else "tf32"


def _fp8(cache: Tensor) -> bool:
    return cache.dtype == torch.float8_e4m3fn


# --- decode ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def attend(queries, k_cache, v_cache, table, head, lo, hi, peak, total, acc, scale, inner, K: tl.constexpr, P: tl.constexpr,
            D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Fold keys lo .. hi of the row whose pages `table` points at into the softmax sums of queries [BLOCK_M, D]."""
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    page = tl.load(table + (lo + n) // P, mask=lo + n < hi, other=0)
    for start in range(lo, hi, BLOCK_N):
        key = start + n
        at = ((page.to(tl.int64) * K + head) * P + key % P)[:, None] * D + d[None, :]
        there = (key < hi)[:, None]
        if D < BLOCK_D:
            there = there & (d < D)[None, :]
        # The next tile's pages are fetched a turn ahead, so that the loads of keys and values never wait for the table.
        page = tl.load(table + (key + BLOCK_N) // P, mask=key + BLOCK_N < hi, other=0)
        k = tl.load(k_cache + at, mask=there, other=0.0)
        v = tl.load(v_cache + at, mask=there, other=0.0)
        k, v = _widened(k, queries.dtype), _widened(v, queries.dtype)
        scores = tl.dot(queries, tl.trans(k), input_precision=PRECISION)
        if SOFTCAP:
            scores = softcapped(scores, inner)
        scores = tl.where((key < hi)[None, :], scores, MASKED)
        peak, total, acc = _fold(scores, v, peak, total, acc, scale, PRECISION)
    return peak, total, acc


@triton.jit
def part_of(lo, hi, split, splits, TILE: tl.constexpr):
    """The keys lo .. hi that are a split's, in whole tiles; none for the last ones where there are too few tiles."""
    share = tl.cdiv(tl.cdiv(hi - lo, TILE), splits) * TILE
    lo += split * share
    return lo, tl.minimum(lo + share, hi)


@triton.jit
def store_sums(peak, total, acc, out, partial, i, head, split, splits, H: tl.constexpr, K: tl.constexpr,
               D: tl.constexpr, SPLIT: tl.constexpr):
    """The softmax sums of row i's queries of a KV head: divided to `out`, or a split's as they are to `partial`, for combine.

    partial: the sums [N, H, splits, D], then the peaks [N, H, splits], then the totals. Rows are the grid's third dimension.
    """
    G: tl.constexpr = H // K
    m = tl.arange(0, acc.shape[0])
    d = tl.arange(0, acc.shape[1])
    real = (m < G)[:, None] & (d < D)[None, :]
    at = i * H + head * G + m
    if SPLIT:
        base = at * splits + split
        ends = tl.num_programs(2).to(tl.int64) * H * splits
        tl.store(partial + base[:, None] * D + d[None, :], acc, mask=real)
        tl.store(partial + ends * D + base, peak, mask=m < G)
        tl.store(partial + ends * (D + 1) + base, total, mask=m < G)
    else:
        tl.store(out + at[:, None] * D + d[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["rows", "positions", "shared"])
def _decode_kernel(q, k_cache, v_cache, kv_scales, block_table, rows, positions, shared, prefix, out, partial, scale, inner,
                   window, table_stride, q_stride, splits, H: tl.constexpr, K: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                   SPLIT: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SHARED: tl.constexpr, FP8: tl.constexpr,
                   PRECISION: tl.constexpr, OVERLAP: tl.constexpr):
    after(OVERLAP)
    head, split, i = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    hi = tl.load(positions + i) + 1
    lo = tl.load(shared + i) if SHARED else tl.maximum(hi - window, 0) if WINDOW else 0
    if SHARED:
        resuming = tl.where(split == 0, tl.minimum(lo, 1), 0)   # 1 where what the prefix kernel has summed goes on here
    if SPLIT:
        lo, hi = part_of(lo, hi, split, splits, BLOCK_N)
        if lo >= hi:
            return
    G: tl.constexpr = H // K
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    real = (m < G)[:, None] & (d < D)[None, :]
    column = (head * G + m)[:, None] * D + d[None, :]
    queries = tl.load(q + i * q_stride + column, mask=real, other=0.0)
    queries = queries.to(tl.float16 if FP8 else k_cache.dtype.element_ty)
    if FP8:
        scale, inner = key_scaled(scale, inner, tl.load(kv_scales + head), SOFTCAP)
    table = block_table + tl.load(rows + i).to(tl.int64) * table_stride
    if SHARED:
        at = i * H + head * G + m
        count = tl.num_programs(2).to(tl.int64) * H
        peak = tl.load(prefix + count * D + at, mask=m < G * resuming, other=LOWEST)
        total = tl.load(prefix + count * (D + 1) + at, mask=m < G * resuming, other=0.0)
        acc = tl.load(prefix + at[:, None] * D + d[None, :], mask=(m < G * resuming)[:, None] & (d < D)[None, :], other=0.0)
    else:
        peak = tl.full([BLOCK_M], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak, total, acc = attend(queries, k_cache, v_cache, table, head, lo, hi, peak, total, acc, scale, inner, K, P, D,
                              BLOCK_N, BLOCK_D, SOFTCAP, PRECISION)
    if FP8:
        acc *= tl.load(kv_scales + K + head)
    store_sums(peak, total, acc, out, partial, i, head, split, splits, H, K, D, SPLIT)


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["positions", "shared"])
def _combine_kernel(partial, positions, shared, out, window, splits, H: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr,
                    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, WINDOW: tl.constexpr, SHARED: tl.constexpr,
                    OVERLAP: tl.constexpr):
    head, i = tl.program_id(0), tl.program_id(1).to(tl.int64)
    keys = tl.load(positions + i) + 1
    if SHARED:
        keys -= tl.load(shared + i)
    after(OVERLAP)
    if WINDOW:
        keys = tl.minimum(keys, window)
    tiles = tl.cdiv(keys, BLOCK_N)
    used = tl.cdiv(tiles, tl.cdiv(tiles, splits))
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    base = (i * H + head) * splits + s
    count = tl.num_programs(1).to(tl.int64) * H * splits
    peak = tl.load(partial + count * D + base, mask=s < used, other=MASKED)
    total = tl.load(partial + count * (D + 1) + base, mask=s < used, other=0.0)
    acc = tl.load(partial + base[:, None] * D + d[None, :], mask=(s < used)[:, None] & (d < D)[None, :], other=0.0)
    weights = tl.exp2(peak - tl.max(peak, 0))
    result = tl.sum(acc * weights[:, None], 0) / tl.sum(total * weights, 0)
    tl.store(out + (i * H + head) * D + d, result.to(out.dtype.element_ty), mask=d < D)


def decode_keys(cache: Tensor) -> int:
    """Keys of a tile."""
    return 32 if cache.dtype == torch.float32 else 64


def decode_options(cache: Tensor, splits: int) -> dict[str, int]:
    """Of the launch, as jobs/bench/attention.py measured them."""
    if cache.dtype == torch.float32:
        return {"num_warps": 8, "num_stages": 2}
    if _fp8(cache):
        return {"num_warps": 2 if splits == 1 and cache.shape[3] >= 128 else 4, "num_stages": 3}
    return {"num_warps": 4, "num_stages": 2}


def split_keys(out: Tensor, kv_heads: int, max_context: int, window: int, block_n: int) -> tuple[int, Tensor]:
    """How many programs share the keys of a row of `out` [N, H, D], and where their sums go: see store_sums."""
    n, heads, dim = out.shape
    programs = DECODE_PROGRAMS * 128 // dim
    tiles = cdiv(min(max_context, window) if window else max_context, block_n)
    splits = min(next_power_of_2(cdiv(programs, n * kv_heads)), MAX_SPLITS, tiles)
    return splits, torch.empty(n * heads * splits * (dim + 2), dtype=torch.float32, device=out.device) if splits > 1 else out


def combine(partial: Tensor, positions: Tensor, shared: Tensor | None, out: Tensor, window: int, splits: int,
            block_n: int) -> Tensor:
    """out [N, H, D] from what its rows' splits have left, if there are several; keys before shared [N] are not among theirs."""
    if splits > 1:
        n, heads, dim = out.shape
        _combine_kernel[heads, n](
            partial, positions, positions if shared is None else shared, out, window, splits, H=heads, D=dim, BLOCK_N=block_n,
            BLOCK_D=next_power_of_2(dim), BLOCK_S=next_power_of_2(splits), WINDOW=window > 0,
            SHARED=shared is not None, num_warps=4, **launch_options(overlaps(out.device)))
    return out


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, rows: Tensor, positions: Tensor,
                     scale: float, window: int, softcap: float, max_context: int, shared: Tensor | None = None,
                     prefix_tiles: Tensor | None = None, out: Tensor | None = None, kv_scales: Tensor | None = None) -> Tensor:
    """See ref.decode_attention. Safe in a CUDA graph: the grid follows from N and max_context, lengths are read on the device."""
    n, heads, dim = q.shape
    kv_heads, page = k_cache.shape[1], k_cache.shape[2]
    block_m = max(16, next_power_of_2(heads // kv_heads))
    block_d = next_power_of_2(dim)
    block_n = decode_keys(k_cache)
    out = torch.empty((n, heads, dim), dtype=q.dtype, device=q.device) if out is None else out
    splits, partial = split_keys(out, kv_heads, max_context, window, block_n)
    factor, inner = log2_scales(scale, softcap)
    prefix, lengths = out, positions        # not read without SHARED
    scales = out if kv_scales is None else kv_scales
    if shared is not None and prefix_tiles is not None:
        prefix = prefix_sums(q, k_cache, v_cache, kv_scales, block_table, rows, shared, prefix_tiles, scale, softcap)
        lengths = shared
    _decode_kernel[kv_heads, splits, n](
        q, k_cache, v_cache, scales, block_table, rows, positions, lengths, prefix, out, partial, factor, inner, window,
        block_table.stride(0), q.stride(0), splits, H=heads, K=kv_heads, P=page, D=dim,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d, SPLIT=splits > 1, WINDOW=window > 0,
        SOFTCAP=softcap > 0, SHARED=shared is not None, FP8=_fp8(k_cache), PRECISION=_precision(k_cache),
        **decode_options(k_cache, splits), **launch_options(overlaps(q.device)))
    return combine(partial, positions, lengths if shared is not None else None, out, window, splits, block_n)


# --- prefill --------------------------------------------------------------------------------------------------------------------


@triton.jit
def _attend_block(queries, positions, k_cache, v_cache, table, head, begin, end, lo, hi, peak, total, acc, scale, inner, window,
                  K: tl.constexpr, P: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                  MASK: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Fold the tiles begin .. end (multiples of BLOCK_N) of a row's keys into the softmax sums of a block of queries.

    MASK: some query does not see some key, and only keys lo .. hi are there at all; otherwise all see all.
    """
    PIECE: tl.constexpr = min(P, BLOCK_N)   # keys that lie together: one address a piece, the rest is constant
    piece = tl.arange(0, BLOCK_N // PIECE) * PIECE
    slot = tl.arange(0, PIECE)[None, :, None]
    d = tl.arange(0, BLOCK_D)[None, None, :]
    n = tl.arange(0, BLOCK_N)
    page = tl.load(table + (begin + piece) // P, mask=(begin + piece + PIECE > lo) & (begin + piece < hi), other=0)
    for start in range(begin, end, BLOCK_N):
        first = start + piece
        at = ((page.to(tl.int64) * K + head) * P + first % P)[:, None, None] * D + (slot * D + d)
        ahead = first + BLOCK_N
        page = tl.load(table + ahead // P, mask=(ahead + PIECE > lo) & (ahead < hi), other=0)
        if MASK or D < BLOCK_D:
            key = first[:, None, None] + slot
            there = (key >= lo) & (key < hi)
            if D < BLOCK_D:
                there = there & (d < D)
            k = tl.load(k_cache + at, mask=there, other=0.0)
            v = tl.load(v_cache + at, mask=there, other=0.0)
        else:
            k = tl.load(k_cache + at)
            v = tl.load(v_cache + at)
        k = _widened(tl.reshape(k, [BLOCK_N, BLOCK_D]), queries.dtype)
        v = _widened(tl.reshape(v, [BLOCK_N, BLOCK_D]), queries.dtype)
        scores = tl.dot(queries, tl.trans(k), input_precision=PRECISION)
        if SOFTCAP:
            scores = softcapped(scores, inner)
        if MASK:
            visible = (start + n)[None, :] <= positions[:, None]
            if WINDOW:
                visible = visible & ((start + n)[None, :] > positions[:, None] - window)
            scores = tl.where(visible, scores, MASKED)
        peak, total, acc = _fold(scores, v, peak, total, acc, scale, PRECISION)
    return peak, total, acc


@triton.jit(do_not_specialize_on_alignment=["rows", "starts", "cu_q", "tiles"])
def _prefill_kernel(q, k_cache, v_cache, kv_scales, block_table, rows, starts, cu_q, tiles, out, scale, inner, window,
                    table_stride, q_stride, H: tl.constexpr, K: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
                    TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, FP8: tl.constexpr, PRECISION: tl.constexpr):
    # A tile's queries times the G heads of a KV head are TILE G rows of a dot product, in blocks of BLOCK_M; row m is head m % G
    # of query m // G. Blocks run from the list's end: late queries see the most keys, and long work should start first.
    G: tl.constexpr = H // K
    BLOCKS: tl.constexpr = (TILE * G + BLOCK_M - 1) // BLOCK_M
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    head, block = pid % K, pid // K
    i = tl.load(tiles + block // BLOCKS * 2)
    first = tl.load(tiles + block // BLOCKS * 2 + 1)
    token = tl.load(cu_q + i) + first
    count = tl.minimum(tl.load(cu_q + i + 1) - token, TILE) * G
    r = block % BLOCKS * BLOCK_M
    if r >= count:
        return
    m = r + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    real = (m < count)[:, None] & (d < D)[None, :]
    column = ((head * G + m % G) * D)[:, None] + d[None, :]
    row = (token + m // G).to(tl.int64)[:, None]
    queries = tl.load(q + row * q_stride + column, mask=real, other=0.0).to(tl.float16 if FP8 else k_cache.dtype.element_ty)
    if FP8:
        scale, inner = key_scaled(scale, inner, tl.load(kv_scales + head), SOFTCAP)
    start = tl.load(starts + i) + first
    positions = start + m // G
    low = start + r // G                                            # positions of the block's first and last query
    high = start + (tl.minimum(r + BLOCK_M, count) - 1) // G
    lo = tl.maximum(low + 1 - window, 0) if WINDOW else 0           # the keys that any of them sees
    hi = high + 1
    table = block_table + tl.load(rows + i).to(tl.int64) * table_stride
    peak = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    full = 0
    if WINDOW:      # the tiles that the window hides from some query
        full = tl.cdiv(tl.maximum(hi - window, 0), BLOCK_N) * BLOCK_N
        peak, total, acc = _attend_block(
            queries, positions, k_cache, v_cache, table, head, lo // BLOCK_N * BLOCK_N, tl.minimum(full, hi), lo, hi, peak, total,
            acc, scale, inner, window, K, P, D, BLOCK_N, BLOCK_D, True, True, SOFTCAP, PRECISION)
    edge = tl.maximum((low + 1) // BLOCK_N * BLOCK_N, full)     # from here on the diagonal crosses
    peak, total, acc = _attend_block(
        queries, positions, k_cache, v_cache, table, head, full, edge, lo, hi, peak, total, acc,
        scale, inner, window, K, P, D, BLOCK_N, BLOCK_D, False, False, SOFTCAP, PRECISION)
    peak, total, acc = _attend_block(
        queries, positions, k_cache, v_cache, table, head, edge, hi, lo, hi, peak, total, acc,
        scale, inner, window, K, P, D, BLOCK_N, BLOCK_D, True, WINDOW, SOFTCAP, PRECISION)
    if FP8:
        acc *= tl.load(kv_scales + K + head)
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + row * (H * D) + column, result, mask=real)


def _prefill_tile(cache: Tensor) -> tuple[int, int, dict[str, int]]:
    """Rows (queries times heads) and keys of a tile, and launch options."""
    if cache.dtype == torch.float32:
        return 16, 16, {"num_warps": 8, "num_stages": 2}
    if cache.shape[3] <= (128 if _fp8(cache) else 64):
        return 128, 64, {"num_warps": 4, "num_stages": 3}
    if cache.shape[3] <= 128:
        return 128, 64, {"num_warps": 8, "num_stages": 2, "maxnreg": 128}     # two programs to a multiprocessor
    return 128, 64, {"num_warps": 8, "num_stages": 2 if _shared_bytes(cache.device) >= 160 << 10 else 1}


@cache
def _shared_bytes(device: torch.device) -> int:
    """What Triton lets a program have of shared memory there: 227 KB on an H100, 163 KB on an A100, 99 KB on most others."""
    if device.type != "cuda":
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]


def prefill_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, rows: Tensor, starts: Tensor,
                      cu_q: Tensor, tiles: Tensor, scale: float, window: int, softcap: float,
                      out: Tensor | None = None, kv_scales: Tensor | None = None) -> Tensor:
    """See ref.prefill_attention. What lies past cu_q[-1] in the output is not written."""
    _, heads, dim = q.shape
    kv_heads, page = k_cache.shape[1], k_cache.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if not tiles.shape[0]:
        return out
    block_m, block_n, options = _prefill_tile(k_cache)
    block_d = next_power_of_2(dim)
    factor, inner = log2_scales(scale, softcap)
    grid = tiles.shape[0] * cdiv(QUERY_TILE * (heads // kv_heads), block_m) * kv_heads
    _prefill_kernel[grid,](
        q, k_cache, v_cache, out if kv_scales is None else kv_scales, block_table, rows, starts, cu_q, tiles, out, factor, inner,
        window, block_table.stride(0), q.stride(0), H=heads, K=kv_heads, P=page, D=dim, TILE=QUERY_TILE, BLOCK_M=block_m,
        BLOCK_N=block_n, BLOCK_D=block_d, WINDOW=window > 0, SOFTCAP=softcap > 0, FP8=_fp8(k_cache),
        PRECISION=_precision(k_cache), **options)
    return out


# --- a prefix that rows of a decode step share ----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["rows", "shared", "tiles"])
def _prefix_kernel(q, k_cache, v_cache, kv_scales, block_table, rows, shared, tiles, prefix, scale, inner, n, table_stride,
                   q_stride, H: tl.constexpr, K: tl.constexpr, P: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                   SOFTCAP: tl.constexpr, FP8: tl.constexpr, PRECISION: tl.constexpr):
    # As in prefill, a tile's rows times the G heads of a KV head are the rows of a dot product; all of them see all keys.
    G: tl.constexpr = H // K
    BLOCKS: tl.constexpr = (TILE * G + BLOCK_M - 1) // BLOCK_M
    head, block = tl.program_id(0), tl.program_id(1)
    first = tl.load(tiles + block // BLOCKS * 2)
    count = tl.load(tiles + block // BLOCKS * 2 + 1) * G
    r = block % BLOCKS * BLOCK_M
    if r >= count:
        return
    m = r + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    real = (m < count)[:, None] & (d < D)[None, :]
    row = (first + m // G).to(tl.int64)
    column = (head * G + m % G)[:, None] * D + d[None, :]
    queries = tl.load(q + row[:, None] * q_stride + column, mask=real, other=0.0)
    queries = queries.to(tl.float16 if FP8 else k_cache.dtype.element_ty)
    if FP8:
        scale, inner = key_scaled(scale, inner, tl.load(kv_scales + head), SOFTCAP)
    hi = tl.load(shared + first)
    table = block_table + tl.load(rows + first).to(tl.int64) * table_stride
    peak = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    positions = tl.full([BLOCK_M], hi - 1, tl.int32)
    whole = hi // BLOCK_N * BLOCK_N
    peak, total, acc = _attend_block(queries, positions, k_cache, v_cache, table, head, 0, whole, 0, hi, peak, total, acc,
                                     scale, inner, 0, K, P, D, BLOCK_N, BLOCK_D, False, False, SOFTCAP, PRECISION)
    peak, total, acc = _attend_block(queries, positions, k_cache, v_cache, table, head, whole, hi, 0, hi, peak, total, acc,
                                     scale, inner, 0, K, P, D, BLOCK_N, BLOCK_D, True, False, SOFTCAP, PRECISION)
    at = row * H + head * G + m % G     # prefix: the sums [N, H, D], then the peaks [N, H], then the totals
    ends = n.to(tl.int64) * H
    tl.store(prefix + at[:, None] * D + d[None, :], acc, mask=real)
    tl.store(prefix + ends * D + at, peak, mask=m < count)
    tl.store(prefix + ends * (D + 1) + at, total, mask=m < count)


def prefix_sums(q: Tensor, k_cache: Tensor, v_cache: Tensor, kv_scales: Tensor | None, block_table: Tensor, rows: Tensor,
                shared: Tensor, tiles: Tensor, scale: float, softcap: float) -> Tensor:
    """Softmax sums of every row over the prefix it shares, whose keys and values a tile of rows reads once (arXiv 2402.05099).

    One after another the sums [N, H, D], of FP8 values still over their scale, the peaks [N, H] and the totals, all in float32;
    of rows that share nothing whatever was there.
    """
    n, heads, dim = q.shape
    kv_heads, page = k_cache.shape[1], k_cache.shape[2]
    block_m, block_n, options = _prefill_tile(k_cache)
    factor, inner = log2_scales(scale, softcap)
    prefix = torch.empty(n * heads * (dim + 2), dtype=torch.float32, device=q.device)
    grid = kv_heads, tiles.shape[0] * cdiv(PREFIX_TILE * (heads // kv_heads), block_m)
    _prefix_kernel[grid](
        q, k_cache, v_cache, prefix if kv_scales is None else kv_scales, block_table, rows, shared, tiles, prefix, factor, inner,
        n, block_table.stride(0), q.stride(0), H=heads, K=kv_heads, P=page, D=dim, TILE=PREFIX_TILE, BLOCK_M=block_m,
        BLOCK_N=block_n, BLOCK_D=next_power_of_2(dim), SOFTCAP=softcap > 0, FP8=_fp8(k_cache), PRECISION=_precision(k_cache),
        **options)
    return prefix
