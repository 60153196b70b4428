"""Paged attention on CUDA: split-KV decode and varlen prefill, FlashAttention-2's online softmax (arXiv 2307.08691) in Triton.

The caches are [pages, K, P, D]. A tile of keys finds its pages key by key in the block table, so no tile depends on the page size and a window
may start anywhere. All the query heads of a key/value head share one dot product, so a key is read once for all of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ref import QUERY_TILE

LOG2E = 1.4426950408889634
MASKED = tl.constexpr(-1.0e30)      # finite: a row that sees nothing of its first tiles has its sums wiped by the first key that it does see
MAX_SPLITS = 64
DECODE_PROGRAMS = 1024              # enough to fill the largest chips; fewer rows than that are split along their keys


@triton.jit
def _attend(q, k_cache, v_cache, table, head, lo, hi, positions, peak, total, acc, scale, window, cap,
            K: tl.constexpr, P: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
            MASK: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Fold keys lo .. hi of one row and KV head into (peak, total, acc) of the queries q [M, D], in log2 units; MASK: not all see all."""
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    page = tl.load(table + (lo + n) // P, mask=lo + n < hi, other=0)
    for start in range(lo, hi, BLOCK_N):
        key = start + n
        at = ((page.to(tl.int64) * K + head) * P + key % P)[:, None] * D + d[None, :]
        # The next tile's pages are fetched a turn ahead, so that the loads of keys and values never wait for the table.
        page = tl.load(table + (key + BLOCK_N) // P, mask=key + BLOCK_N < hi, other=0)
        if MASK and BLOCK_D == D:
            k = tl.load(k_cache + at, mask=(key < hi)[:, None], other=0.0)
            v = tl.load(v_cache + at, mask=(key < hi)[:, None], other=0.0)
        elif BLOCK_D == D:
            k = tl.load(k_cache + at)
            v = tl.load(v_cache + at)
        else:
            k = tl.load(k_cache + at, mask=(key < hi)[:, None] & (d < D)[None, :], other=0.0)
            v = tl.load(v_cache + at, mask=(key < hi)[:, None] & (d < D)[None, :], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if SOFTCAP:     # scale holds 2 log2(e) / cap, cap is in log2 units: cap * tanh(x) = cap * (1 - 2 / (exp(2 x) + 1))
            scores = cap - 2.0 * cap / (tl.exp2(scores) + 1.0)
        if MASK:
            visible = key[None, :] <= positions[:, None]
            if WINDOW:
                visible = visible & (key[None, :] > positions[:, None] - window)
            scores = tl.where(visible, scores, MASKED)
        higher = tl.maximum(peak, tl.max(scores, 1))
        shrink = tl.exp2(peak - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        peak = higher
    return peak, total, acc


@triton.jit
def _decode_kernel(q, k_cache, v_cache, block_table, rows, positions, out, partial, scale, window, cap, table_stride, q_stride, splits,
                   H: tl.constexpr, K: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                   SPLIT: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    head, split, i = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    hi = tl.load(positions + i) + 1
    lo = tl.maximum(hi - window, 0) if WINDOW else 0
    if SPLIT:
        share = tl.cdiv(tl.cdiv(hi - lo, BLOCK_N), splits) * BLOCK_N
        lo += split * share
        hi = tl.minimum(lo + share, hi)
        if lo >= hi:
            return
    G: tl.constexpr = H // K
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    real = (m < G)[:, None] & (d < D)[None, :]
    queries = tl.load(q + i * q_stride + (head * G + m)[:, None] * D + d[None, :], mask=real, other=0.0).to(k_cache.dtype.element_ty)
    peak = tl.full([BLOCK_M], MASKED, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    table = block_table + tl.load(rows + i).to(tl.int64) * table_stride
    peak, total, acc = _attend(queries, k_cache, v_cache, table, head, lo, hi, tl.full([BLOCK_M], hi - 1, tl.int32), peak, total, acc, scale,
                               window, cap, K, P, D, BLOCK_N, BLOCK_D, True, False, SOFTCAP, PRECISION)
    if SPLIT:
        # partial: N H splits sums of D, then as many peaks, then as many totals
        base = (i * H + head * G + m) * splits + split
        ends = tl.num_programs(2).to(tl.int64) * H * splits
        tl.store(partial + base[:, None] * D + d[None, :], acc, mask=real)
        tl.store(partial + ends * D + base, peak, mask=m < G)
        tl.store(partial + ends * (D + 1) + base, total, mask=m < G)
    else:
        result = (acc / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + (i * H + head * G + m)[:, None] * D + d[None, :], result, mask=real)


@triton.jit
def _combine_kernel(partial, positions, out, window, splits, H: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                    BLOCK_S: tl.constexpr, WINDOW: tl.constexpr):
    head, i = tl.program_id(0), tl.program_id(1).to(tl.int64)
    count = tl.load(positions + i) + 1
    if WINDOW:
        count = tl.minimum(count, window)
    tiles = tl.cdiv(count, BLOCK_N)
    used = tl.cdiv(tiles, tl.cdiv(tiles, splits))
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    base = (i * H + head) * splits + s
    ends = tl.num_programs(1).to(tl.int64) * H * splits
    peak = tl.load(partial + ends * D + base, mask=s < used, other=MASKED)
    total = tl.load(partial + ends * (D + 1) + base, mask=s < used, other=0.0)
    acc = tl.load(partial + base[:, None] * D + d[None, :], mask=(s < used)[:, None] & (d < D)[None, :], other=0.0)
    weights = tl.exp2(peak - tl.max(peak, 0))
    result = tl.sum(acc * weights[:, None], 0) / tl.sum(total * weights, 0)
    tl.store(out + (i * H + head) * D + d, result.to(out.dtype.element_ty), mask=d < D)


def _log2_scales(scale: float, softcap: float) -> tuple[float, float]:
    """What scores are multiplied by, and the cap, such that exp2 takes the place of exp."""
    return (2 * LOG2E * scale / softcap, LOG2E * softcap) if softcap else (LOG2E * scale, 0.0)


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, rows: Tensor, positions: Tensor,
                     scale: float, window: int, softcap: float, max_context: int) -> Tensor:
    """See ref.decode_attention. Safe in a CUDA graph: the grid follows from N and max_context, every length is read on the device."""
    n, heads, dim = q.shape
    kv_heads, page = k_cache.shape[1], k_cache.shape[2]
    block_m = max(16, triton.next_power_of_2(heads // kv_heads))
    block_d = triton.next_power_of_2(dim)
    exact = k_cache.dtype == torch.float32
    block_n = 32 if exact else 64 if dim >= 128 else 128
    reach = min(max_context, window) if window else max_context
    splits = min(triton.next_power_of_2(triton.cdiv(DECODE_PROGRAMS, n * kv_heads)), MAX_SPLITS, triton.cdiv(reach, block_n))
    out = torch.empty((n, heads, dim), dtype=q.dtype, device=q.device)
    partial = torch.empty(n * heads * splits * (dim + 2), dtype=torch.float32, device=q.device) if splits > 1 else out
    factor, cap = _log2_scales(scale, softcap)
    _decode_kernel[kv_heads, splits, n](
        q, k_cache, v_cache, block_table, rows, positions, out, partial, factor, window, cap, block_table.stride(0), q.stride(0), splits,
        H=heads, K=kv_heads, P=page, D=dim, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d, SPLIT=splits > 1, WINDOW=window > 0,
        SOFTCAP=softcap > 0, PRECISION="ieee" if exact else "tf32", num_warps=4, num_stages=3)
    if splits > 1:
        _combine_kernel[heads, n](partial, positions, out, window, splits, H=heads, D=dim, BLOCK_N=block_n, BLOCK_D=block_d,
                                  BLOCK_S=triton.next_power_of_2(splits), WINDOW=window > 0, num_warps=4)
    return out


@triton.jit
def _prefill_kernel(q, k_cache, v_cache, block_table, rows, starts, cu_q, tiles, out, scale, window, cap, table_stride, q_stride,
                    H: tl.constexpr, K: tl.constexpr, P: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    # A tile's queries times the G heads of a KV head are TILE G rows of the dot product, in blocks of BLOCK_M. Blocks run from the end
    # of the work list: late queries see the most keys, and the longest work should start first.
    G: tl.constexpr = H // K
    BLOCKS: tl.constexpr = (TILE * G + BLOCK_M - 1) // BLOCK_M
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    head, block = pid % K, pid // K
    i = tl.load(tiles + block // BLOCKS * 2)
    first = tl.load(tiles + block // BLOCKS * 2 + 1)
    begin = tl.load(cu_q + i)
    queries = tl.minimum(tl.load(cu_q + i + 1) - begin - first, TILE)
    r = block % BLOCKS * BLOCK_M
    if r >= queries * G:
        return
    start = tl.load(starts + i)
    low = start + first + r // G                                                # positions of the block's first and last query
    high = start + first + (tl.minimum(r + BLOCK_M, queries * G) - 1) // G
    m = r + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    real = (m < queries * G)[:, None] & (d < D)[None, :]
    at = (begin + first + m // G).to(tl.int64)
    column = ((head * G + m % G) * D)[:, None] + d[None, :]
    block_q = tl.load(q + at[:, None] * q_stride + column, mask=real, other=0.0).to(k_cache.dtype.element_ty)
    where = start + first + m // G
    peak = tl.full([BLOCK_M], MASKED, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    table = block_table + tl.load(rows + i).to(tl.int64) * table_stride
    # Whole tiles of keys from lo: first those that the window hides from some query, then those that all see, then the diagonal.
    lo = tl.maximum(low + 1 - window, 0) if WINDOW else 0
    full = lo
    if WINDOW:
        full = lo + tl.cdiv(tl.maximum(high + 1 - window - lo, 0), BLOCK_N) * BLOCK_N
        peak, total, acc = _attend(block_q, k_cache, v_cache, table, head, lo, tl.minimum(full, high + 1), where, peak, total, acc, scale,
                                   window, cap, K, P, D, BLOCK_N, BLOCK_D, True, True, SOFTCAP, PRECISION)
    edge = tl.maximum(lo + (low + 1 - lo) // BLOCK_N * BLOCK_N, full)
    peak, total, acc = _attend(block_q, k_cache, v_cache, table, head, full, edge, where, peak, total, acc, scale, window, cap,
                               K, P, D, BLOCK_N, BLOCK_D, False, False, SOFTCAP, PRECISION)
    peak, total, acc = _attend(block_q, k_cache, v_cache, table, head, edge, high + 1, where, peak, total, acc, scale, window, cap,
                               K, P, D, BLOCK_N, BLOCK_D, True, WINDOW, SOFTCAP, PRECISION)
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + at[:, None] * (H * D) + column, result, mask=real)


def prefill_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, rows: Tensor, starts: Tensor, cu_q: Tensor,
                      tiles: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    """See ref.prefill_attention. Rows of the output past cu_q[-1] are left as they are."""
    _, heads, dim = q.shape
    kv_heads, page = k_cache.shape[1], k_cache.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not tiles.shape[0]:
        return out
    block_d = triton.next_power_of_2(dim)
    exact = k_cache.dtype == torch.float32
    block_m, block_n = (32, 32) if exact else (128, 64)
    factor, cap = _log2_scales(scale, softcap)
    grid = tiles.shape[0] * triton.cdiv(QUERY_TILE * (heads // kv_heads), block_m) * kv_heads
    _prefill_kernel[grid,](
        q, k_cache, v_cache, block_table, rows, starts, cu_q, tiles, out, factor, window, cap, block_table.stride(0), q.stride(0),
        H=heads, K=kv_heads, P=page, D=dim, TILE=QUERY_TILE, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d, WINDOW=window > 0,
        SOFTCAP=softcap > 0, PRECISION="ieee" if exact else "tf32", num_warps=8, num_stages=2)
    return out
