"""From the fused projection to attention's inputs in one pass: norms of heads, rotary embedding, keys and values to pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.overlap import after, launch_options, overlaps
from kernels.quantize import within_e4m3
from kernels.shapes import cdiv, next_power_of_2

TILE = 2048     # elements of q that one program handles: 16 a lane


@triton.jit
def rotation(cos_sin, position, d, ROTARY: tl.constexpr):
    """Of dimensions d at a position: the partner that each is rotated against, cosines, and sines with the sign of the half."""
    HALF: tl.constexpr = ROTARY // 2
    turned = d < ROTARY
    first = d < HALF
    partner = tl.where(first, d + HALF, tl.where(turned, d - HALF, d))
    angles = cos_sin + position.to(tl.int64) * ROTARY + tl.where(first, d, d - HALF)
    cos = tl.load(angles, mask=turned, other=1.0)
    sin = tl.load(angles + HALF, mask=turned, other=0.0)
    return partner, cos, tl.where(first, -sin, sin)


@triton.jit
def rotated(x, heads, inside, d, partner, cos, sin, weight, eps, D: tl.constexpr, NORM: tl.constexpr, PLUS_ONE: tl.constexpr):
    """Heads [HEADS] of the token at x, normed and rotated -> float32 [HEADS, BLOCK_D].

    Every element reads its partner of the other half too: the line is in L1, and every head size and rotary share take one path.
    """
    a = tl.load(x + heads[:, None] * D + d[None, :], mask=inside, other=0.0)
    b = tl.load(x + heads[:, None] * D + partner[None, :], mask=inside, other=0.0)
    kind = a.dtype
    a, b = a.to(tl.float32), b.to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(a * a, 1) / D + eps)[:, None]
        wa = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        wb = tl.load(weight + partner, mask=d < D, other=0.0).to(tl.float32)[None, :]
        if PLUS_ONE:
            a = (a * scale * (1.0 + wa)).to(kind).to(tl.float32)
            b = (b * scale * (1.0 + wb)).to(kind).to(tl.float32)
        else:
            a = ((a * scale).to(kind).to(tl.float32) * wa).to(kind).to(tl.float32)
            b = ((b * scale).to(kind).to(tl.float32) * wb).to(kind).to(tl.float32)
    return a * cos[None, :] + b * sin[None, :]


@triton.jit
def shifted(k, shift, heads, inside, d, D: tl.constexpr):
    """Keys [HEADS, BLOCK_D] less what all keys of their heads have in common."""
    return k.to(tl.float32) - tl.load(shift + heads[:, None] * D + d[None, :], mask=inside, other=0.0)


@triton.jit
def scaled(x, scale):
    """x over its scale, within what e4m3 holds."""
    return within_e4m3(x.to(tl.float32) / scale)


# Where in their buffer positions and slots begin must not decide whether a step compiles this anew.
@triton.jit(do_not_specialize_on_alignment=["positions", "slots"])
def _rope_and_cache_kernel(qkv, q_weight, k_weight, cos_sin, positions, slots, q_out, k_cache, v_cache, kv_scales, k_shift,
                           qkv_stride, eps, H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
                           ROTARY: tl.constexpr, HEADS_Q: tl.constexpr, HEADS_K: tl.constexpr, BLOCK_D: tl.constexpr,
                           Q_NORM: tl.constexpr, K_NORM: tl.constexpr, PLUS_ONE: tl.constexpr, FP8: tl.constexpr,
                           SHIFT: tl.constexpr, OVERLAP: tl.constexpr):
    after(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    Q_BLOCKS: tl.constexpr = (H + HEADS_Q - 1) // HEADS_Q
    x = qkv + token * qkv_stride
    d = tl.arange(0, BLOCK_D)
    partner, cos, sin = rotation(cos_sin, tl.load(positions + token), d, ROTARY)
    if block < Q_BLOCKS:
        heads = block * HEADS_Q + tl.arange(0, HEADS_Q)
        inside = (heads < H)[:, None] & (d < D)[None, :]
        q = rotated(x, heads, inside, d, partner, cos, sin, q_weight, eps, D, Q_NORM, PLUS_ONE)
        tl.store(q_out + (token * H + heads[:, None]) * D + d[None, :], q.to(q_out.dtype.element_ty), mask=inside)
    else:
        kv_heads = (block - Q_BLOCKS) * HEADS_K + tl.arange(0, HEADS_K)
        kv_inside = (kv_heads < K)[:, None] & (d < D)[None, :]
        v = tl.load(x + (H + K + kv_heads[:, None]) * D + d[None, :], mask=kv_inside)
        k = rotated(x + H * D, kv_heads, kv_inside, d, partner, cos, sin, k_weight, eps, D, K_NORM, PLUS_ONE)
        k = k.to(qkv.dtype.element_ty)
        if SHIFT:
            k = shifted(k, k_shift, kv_heads, kv_inside, d, D)
        if FP8:
            k = scaled(k, tl.load(kv_scales + kv_heads, mask=kv_heads < K, other=1.0)[:, None])
            v = scaled(v, tl.load(kv_scales + K + kv_heads, mask=kv_heads < K, other=1.0)[:, None])
        slot = tl.load(slots + token)
        at = (((slot // P).to(tl.int64) * K + kv_heads) * P + slot % P)[:, None] * D + d[None, :]
        tl.store(k_cache + at, k.to(k_cache.dtype.element_ty), mask=kv_inside)
        tl.store(v_cache + at, v.to(v_cache.dtype.element_ty), mask=kv_inside)


def rope_and_cache(qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, plus_one: bool, cos_sin: Tensor,
                   positions: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor, num_heads: int,
                   kv_scales: Tensor | None = None, k_shift: Tensor | None = None) -> Tensor:
    """See ref.rope_and_cache; rows of qkv may be strided."""
    tokens = qkv.shape[0]
    _, kv_heads, page, dim = k_cache.shape
    q = torch.empty((tokens, num_heads, dim), dtype=qkv.dtype, device=qkv.device)
    block_d = next_power_of_2(dim)
    heads_q = min(next_power_of_2(num_heads), max(TILE // block_d, 1))
    heads_k = min(next_power_of_2(kv_heads), max(TILE // 2 // block_d, 1))
    grid = tokens, cdiv(num_heads, heads_q) + cdiv(kv_heads, heads_k)
    _rope_and_cache_kernel[grid](
        qkv, qkv if q_weight is None else q_weight, qkv if k_weight is None else k_weight, cos_sin, positions, slots,
        q, k_cache, v_cache, q if kv_scales is None else kv_scales, q if k_shift is None else k_shift, qkv.stride(0), eps,
        H=num_heads, K=kv_heads, D=dim, P=page, ROTARY=cos_sin.shape[1], HEADS_Q=heads_q, HEADS_K=heads_k, BLOCK_D=block_d,
        Q_NORM=q_weight is not None, K_NORM=k_weight is not None, PLUS_ONE=plus_one, FP8=k_cache.dtype == torch.float8_e4m3fn,
        SHIFT=k_shift is not None, num_warps=min(max(heads_q * block_d // 512, 1), 4), **launch_options(overlaps(qkv.device)))
    return q


@triton.jit(do_not_specialize_on_alignment=["pages"])
def _copy_pages_kernel(storage, pages, part_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    pair = pages + tl.program_id(0) * 2
    part = storage + tl.program_id(1).to(tl.int64) * part_stride
    source, target = tl.load(pair).to(tl.int64), tl.load(pair + 1).to(tl.int64)
    for first in range(0, SIZE, BLOCK):
        i = first + tl.arange(0, BLOCK)
        tl.store(part + target * SIZE + i, tl.load(part + source * SIZE + i, mask=i < SIZE), mask=i < SIZE)


def copy_pages(storage: Tensor, pages: Tensor) -> None:
    """See ref.copy_pages; storage is contiguous, a page a multiple of four bytes."""
    words = storage.view(torch.int32)
    parts, size = words.shape[0], words[0, 0].numel()
    block = min(4096, next_power_of_2(size))
    _copy_pages_kernel[pages.shape[0], parts](words, pages, words.stride(0), SIZE=size, BLOCK=block, num_warps=4)
