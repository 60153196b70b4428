"""Attention of rows with one query each, from the fused projection on, in one launch (here two where keys are split;
three, or four here, where rows share a prefix).

It does what kv_cache.rope_and_cache and attention.decode_attention do one after the other: of few rows a launch takes as long as
its work. The softmax sums begin with the new token, so that no program reads what another writes.
decode_few.py does it for 16-bit and FP8 caches of heads of 64 and 128 on Hopper. A prefix that rows share is attention.py's,
whose pass wants the queries as they are after the rotation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import decode_few
from kernels.attention import (
    LOWEST,
    attend,
    combine,
    decode_attention,
    decode_keys,
    decode_options,
    key_scaled,
    log2_scales,
    part_of,
    prefix_sums,
    softcapped,
    split_keys,
    store_sums,
)
from kernels.kv_cache import rope_and_cache, rotated, rotation, scaled, shifted
from kernels.overlap import after, launch_options, overlaps, prefetch
from kernels.shapes import next_power_of_2


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["rows", "positions", "slots"])
def _decode_step_kernel(qkv, q_weight, k_weight, cos_sin, positions, slots, k_cache, v_cache, kv_scales, k_shift, block_table,
                        rows, out, partial, scale, inner, eps, window, table_stride, qkv_stride, splits,
                        H: tl.constexpr, K: tl.constexpr, P: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr,
                        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
                        WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
                        PLUS_ONE: tl.constexpr, FP8: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr,
                        OVERLAP: tl.constexpr):
    # Before the wait: what the projection did not make. Positions, rows, slots and tables are complete when a model's first
    # overlapping kernel starts, since the look-up of the embeddings before it does not overlap; so are the keys before this one.
    head, split, i = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    position = tl.load(positions + i)
    lo = tl.maximum(position + 1 - window, 0) if WINDOW else 0
    hi = position + 1
    if SPLIT:
        lo, hi = part_of(lo, hi, split, splits, BLOCK_N)
        if lo >= hi:
            return
    own = hi > position             # the new token is among this program's keys: the last of them, and not read from the cache
    hi = tl.minimum(hi, position)
    table = block_table + tl.load(rows + i).to(tl.int64) * table_stride
    slot = tl.load(slots + i)
    d = tl.arange(0, BLOCK_D)
    partner, cos, sin = rotation(cos_sin, position, d, ROTARY)
    STORED: tl.constexpr = k_cache.dtype.element_ty
    one = tl.arange(0, 1)
    inside = (d < D)[None, :]
    if OVERLAP:
        n = tl.minimum(lo + tl.arange(0, BLOCK_N), tl.maximum(hi - 1, lo))
        near = ((tl.load(table + n // P).to(tl.int64) * K + head) * P + n % P) * D
        for line in tl.static_range(0, D * STORED.primitive_bitwidth // 8, 128):
            prefetch(k_cache + near + line * 8 // STORED.primitive_bitwidth)
            prefetch(v_cache + near + line * 8 // STORED.primitive_bitwidth)
    if FP8:
        k_scale, v_scale = tl.load(kv_scales + head), tl.load(kv_scales + K + head)
    after(OVERLAP)

    G: tl.constexpr = H // K
    m = tl.arange(0, BLOCK_M)
    real = (m < G)[:, None] & inside
    x = qkv + i * qkv_stride
    kind: tl.constexpr = qkv.dtype.element_ty
    queries = rotated(x, head * G + m, real, d, partner, cos, sin, q_weight, eps, D, Q_NORM, PLUS_ONE).to(kind)
    queries = queries.to(tl.float16 if FP8 else STORED)
    key = rotated(x + H * D, head + one, inside, d, partner, cos, sin, k_weight, eps, D, K_NORM, PLUS_ONE).to(kind)
    value = tl.load(x + (H + K + head) * D + d[None, :], mask=inside, other=0.0)
    if SHIFT:
        key = shifted(key, k_shift, head + one, inside, d, D)
    if FP8:
        key, value = scaled(key, k_scale), scaled(value, v_scale)
        scale, inner = key_scaled(scale, inner, k_scale, SOFTCAP)
    key, value = key.to(STORED), value.to(STORED)
    at = ((slot // P).to(tl.int64) * K + head) * P * D + slot % P * D + d[None, :]
    written = (d < tl.where(own, D, 0))[None, :]
    tl.store(k_cache + at, key, mask=written)
    tl.store(v_cache + at, value, mask=written)

    score = tl.sum(queries.to(tl.float32) * key.to(tl.float32), 1)
    if SOFTCAP:
        score = softcapped(score, inner)
    peak = tl.where(own, score * scale, LOWEST)
    total = tl.where(own, tl.full([BLOCK_M], 1.0, tl.float32), 0.0)
    acc = tl.where(own, tl.broadcast_to(value.to(tl.float32), [BLOCK_M, BLOCK_D]), 0.0)
    peak, total, acc = attend(queries, k_cache, v_cache, table, head, lo, hi, peak, total, acc, scale, inner, K, P, D,
                              BLOCK_N, BLOCK_D, SOFTCAP, PRECISION)
    if FP8:
        acc *= v_scale
    store_sums(peak, total, acc, out, partial, i, head, split, splits, H, K, D, SPLIT)


def rope_and_decode(qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, plus_one: bool, cos_sin: Tensor,
                    positions: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor, num_heads: int, block_table: Tensor,
                    rows: Tensor, scale: float, window: int, softcap: float, max_context: int,
                    kv_scales: Tensor | None = None, k_shift: Tensor | None = None, shared: Tensor | None = None,
                    prefix_tiles: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """See ref.rope_and_decode; rows of qkv may be strided. Safe in a CUDA graph, as attention.decode_attention is."""
    prefix, few = None, decode_few.takes(qkv, k_cache, num_heads, softcap)
    if shared is not None and prefix_tiles is not None:
        q = rope_and_cache(qkv, q_weight, k_weight, eps, plus_one, cos_sin, positions, slots, k_cache, v_cache, num_heads,
                           kv_scales, k_shift)
        if not few:
            return decode_attention(q, k_cache, v_cache, block_table, rows, positions, scale, window, softcap, max_context,
                                    shared, prefix_tiles, out, kv_scales)
        prefix = prefix_sums(q, k_cache, v_cache, kv_scales, block_table, rows, shared, prefix_tiles, scale, softcap)
    if few:
        return decode_few.rope_and_decode(qkv, q_weight, k_weight, eps, plus_one, cos_sin, positions, slots, k_cache, v_cache,
                                          num_heads, block_table, rows, scale, window, max_context, kv_scales, k_shift, shared,
                                          prefix, out)
    n = qkv.shape[0]
    _, kv_heads, page, dim = k_cache.shape
    block_n = decode_keys(k_cache)
    out = torch.empty((n, num_heads, dim), dtype=qkv.dtype, device=qkv.device) if out is None else out
    splits, partial = split_keys(out, kv_heads, max_context, window, block_n)
    factor, inner = log2_scales(scale, softcap)
    _decode_step_kernel[kv_heads, splits, n](
        qkv, qkv if q_weight is None else q_weight, qkv if k_weight is None else k_weight, cos_sin, positions, slots,
        k_cache, v_cache, out if kv_scales is None else kv_scales, out if k_shift is None else k_shift, block_table, rows, out,
        partial, factor, inner, eps, window, block_table.stride(0), qkv.stride(0), splits,
        H=num_heads, K=kv_heads, P=page, D=dim, ROTARY=cos_sin.shape[1],
        BLOCK_M=max(16, next_power_of_2(num_heads // kv_heads)), BLOCK_N=block_n, BLOCK_D=next_power_of_2(dim),
        SPLIT=splits > 1, WINDOW=window > 0, SOFTCAP=softcap > 0, Q_NORM=q_weight is not None, K_NORM=k_weight is not None,
        PLUS_ONE=plus_one, FP8=k_cache.dtype == torch.float8_e4m3fn, SHIFT=k_shift is not None,
        PRECISION="ieee" if k_cache.dtype == torch.float32 else "tf32", **decode_options(k_cache, splits),
        **launch_options(overlaps(qkv.device)))
    return combine(partial, positions, None, out, window, splits, block_n)
