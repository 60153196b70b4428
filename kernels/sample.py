"""Sampling on CUDA: one launch for all rows, greedy or filtered, without a sort.

The draw is an argmax of scaled logits plus Gumbel noise, so top-p needs no threshold: draw among all, then ask in one more pass
whether the token lies in the nucleus, that is whether the mass of likelier tokens is below top_p. If so, it is also the argmax
over the nucleus; if not, neither it nor anything less likely is in the nucleus, and the draw is repeated, with the same noise,
among the likelier tokens (a rejection sampler, as in arXiv 2501.01005). The first token is kept with a probability of top_p at
least. The k-th largest logit is searched for over the bits of order-preserving keys, from the k-th largest of the lanes' maxima
on, which it mostly is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import ref
from kernels.shapes import cdiv

NEG_INF = tl.constexpr(float("-inf"))
LOG2E = tl.constexpr(1.4426950408889634)
COLDEST = tl.constexpr(ref.COLDEST)
LARGEST_NOISE = tl.constexpr(ref.LARGEST_NOISE + 0.001)
COLUMNS = tl.constexpr(ref.PARAM_COLUMNS)
TEMPERATURE, TOP_P, MIN_P = (tl.constexpr(column) for column in (ref.TEMPERATURE, ref.TOP_P, ref.MIN_P))
TOP_K, SEED_LOW, SEED_HIGH = (tl.constexpr(column) for column in (ref.TOP_K, ref.SEED_LOW, ref.SEED_HIGH))
MASK_BYTES = 256    # of the mask, to a program
FEW_ROWS = 128      # up to so many, the program of a row fills a multiprocessor; of more, several share one, to hide latency
# Keys leave out as many low bits of a float32 as its values have zeros.
ZERO_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}


@triton.jit
def _hash32(x):
    """ref.hash32 on uint32."""
    x = x ^ (x >> 16)
    x = x * 0x21F0AAAD
    x = x ^ (x >> 15)
    x = x * 0xD35A2D97
    return x ^ (x >> 15)


@triton.jit
def _uniform(columns, key, second_key):
    """ref.uniform of one row: key and second_key are uint32 scalars."""
    x = columns.to(tl.uint32) * 0x9E3779B1 + key
    x = x ^ (x >> 16)
    x = x * 0x21F0AAAD
    x = x ^ (x >> 15) ^ second_key
    x = x * 0xD35A2D97
    x = x ^ (x >> 15)
    # 23 bits as the mantissa of a number in [1, 2), less 1 - 2^-24: (bits + 0.5) / 2^23, exactly.
    return ((x >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 0.99999994039535522


@triton.jit
def _to_key(x, ZEROS: tl.constexpr):
    """int32 that orders as the float32 x does."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> ZEROS


@triton.jit
def _from_key(key, ZEROS: tl.constexpr):
    bits = key << ZEROS
    bits = tl.where(bits < 0, (bits | ((1 << ZEROS) - 1)) ^ 0x7FFFFFFF, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _narrow(lo, hi, mid, above, k):
    """One turn of the search for the least key with fewer than k values above it. Exactly k above: they are the top k, done."""
    hi = tl.where(above < k, mid, hi)
    lo = tl.where(above < k, lo, mid + 1)
    return lo, tl.where(above == k, lo, hi)


@triton.jit
def _lane_maxima(logits, V, BLOCK: tl.constexpr):
    """Of every lane the first largest value and its column; -inf and 0 where it has none."""
    best = tl.full([BLOCK], NEG_INF, tl.float32)
    at = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < V, other=NEG_INF).to(tl.float32)
        better = x > best       # false for NaN
        best = tl.where(better, x, best)
        at = tl.where(better, column, at)
    return best, at


@triton.jit
def _kth_largest(logits, V, k, lanes, top, BLOCK: tl.constexpr, ZEROS: tl.constexpr):
    """A threshold that the k largest logits and those that tie with the k-th reach, and no others."""
    lo = _to_key(tl.full([], NEG_INF, tl.float32), ZEROS)
    hi = _to_key(top, ZEROS)
    while lo < hi:
        mid = (lo & hi) + ((lo ^ hi) >> 1)
        lo, hi = _narrow(lo, hi, mid, tl.sum((lanes > _from_key(mid, ZEROS)).to(tl.int32), 0), k)
    hi = _to_key(top, ZEROS)
    mid = lo
    while lo < hi:
        threshold = _from_key(mid, ZEROS)
        above = tl.zeros([BLOCK], tl.int32)
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(logits + column, mask=column < V, other=NEG_INF).to(tl.float32)
            above += (x > threshold).to(tl.int32)
        lo, hi = _narrow(lo, hi, mid, tl.sum(above, 0), k)
        mid = (lo & hi) + ((lo ^ hi) >> 1)
    return _from_key(lo, ZEROS)


@triton.jit
def _draw(logits, V, floor, below, shift, scale, key, second_key, BLOCK: tl.constexpr):
    """The column with the largest (x - shift) * scale + Gumbel noise among below < x, floor <= x; -1 if there is none."""
    best = tl.full([], NEG_INF, tl.float32)
    token = tl.full([], -1, tl.int32)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < V, other=NEG_INF).to(tl.float32)
        x = tl.where((x >= floor) & (x > below), x - shift, NEG_INF) * scale
        if tl.max(x, 0) + LARGEST_NOISE > best:
            # The noise is -log(-log(u)), and -log(u) >= 1 - u: only where 1 - u < exp(x - best) can x + noise exceed best. So the
            # two exact logarithms are taken in the few blocks alone that may improve on it; 0.001 covers what rounding may add.
            u = _uniform(column, key, second_key)
            if tl.max((1.0 - u < tl.exp(x - best + 0.001)).to(tl.int32), 0) > 0:
                z = x - tl.log(-tl.log(u))
                top = tl.max(z, 0)
                if top > best:
                    best = top
                    token = tl.min(tl.where(z == top, column, V), 0)
    return token


@triton.jit
def _mass(logits, V, floor, value, top, scale, BLOCK: tl.constexpr):
    """Sums of exp((x - top) scale) over x > value and over x >= floor."""
    above = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < V, other=NEG_INF).to(tl.float32)
        weight = tl.where(x >= floor, tl.exp2((x - top) * (scale * LOG2E)), 0.0)
        total += weight
        above += tl.where(x > value, weight, 0.0)
    return tl.sum(above, 0), tl.sum(total, 0)


# Where a slice of the plan begins must not decide whether a step compiles this anew.
@triton.jit(do_not_specialize_on_alignment=["rows", "positions"])
def _sample_kernel(logits, table, rows, positions, out, logits_stride, V, ZEROS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    logits += i * logits_stride
    table += tl.load(rows + i).to(tl.int64) * COLUMNS
    temperature = tl.load(table + TEMPERATURE).to(tl.float32, bitcast=True)
    token = tl.zeros([], tl.int32)
    if temperature < COLDEST:
        lanes, at = _lane_maxima(logits, V, BLOCK)
        largest = tl.max(lanes, 0)
        token = tl.where(largest > NEG_INF, tl.min(tl.where(lanes == largest, at, V), 0), -1)
    else:
        scale = 1.0 / temperature
        key = tl.load(table + SEED_LOW).to(tl.uint32) ^ _hash32(tl.load(positions + i).to(tl.uint32))
        key = _hash32(_hash32(key) ^ tl.load(table + SEED_HIGH).to(tl.uint32))
        second_key = _hash32(key ^ 0x9E3779B9)
        top_p = tl.load(table + TOP_P).to(tl.float32, bitcast=True)
        min_p = tl.load(table + MIN_P).to(tl.float32, bitcast=True)
        k = tl.load(table + TOP_K)
        limited = (k > 0) & (k < V)
        floor = tl.full([], NEG_INF, tl.float32)
        top = tl.full([], NEG_INF, tl.float32)
        if limited | (top_p < 1.0) | (min_p > 0.0):
            lanes, at = _lane_maxima(logits, V, BLOCK)
            top = tl.max(lanes, 0)
            if min_p > 0.0:
                floor = top + temperature * tl.log(min_p)
            if limited:
                floor = tl.maximum(floor, _kth_largest(logits, V, k, lanes, top, BLOCK, ZEROS))
        # Relative to the largest, where that is known and finite: it can be drawn however cold it is, so the search below ends.
        shift = tl.where(tl.abs(top) < float("inf"), top, 0.0)
        token = _draw(logits, V, floor, NEG_INF, shift, scale, key, second_key, BLOCK)
        if top_p < 1.0:
            value = tl.load(logits + tl.maximum(token, 0)).to(tl.float32)
            above, total = _mass(logits, V, floor, value, top, scale, BLOCK)
            while (above >= top_p * total) & (value < top):
                token = _draw(logits, V, floor, value, shift, scale, key, second_key, BLOCK)
                value = tl.load(logits + tl.maximum(token, 0)).to(tl.float32)
                above, total = _mass(logits, V, floor, value, top, scale, BLOCK)
    tl.store(out + i, token)


@triton.jit(do_not_specialize_on_alignment=["index"])
def _mask_kernel(logits, mask, index, logits_stride, mask_stride, V, W, BYTES: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    bit = tl.arange(0, 8)[None, :]
    bits = (tl.load(mask + i * mask_stride + byte // 4, mask=byte // 4 < W, other=0) >> (byte % 4 * 8)) & 0xFF
    column = byte[:, None] * 8 + bit
    at = logits + tl.load(index + i).to(tl.int64) * logits_stride + column
    # Whole vectors are written, which is fast; read is only where there is something to keep.
    x = tl.load(at, mask=(bits != 0)[:, None] & (column < V), other=NEG_INF)
    tl.store(at, tl.where(((bits[:, None] >> bit) & 1) != 0, x, NEG_INF), mask=column < V)


def mask_logits(logits: Tensor, mask: Tensor, index: Tensor) -> None:
    """See ref.mask_logits; index must not name a row twice."""
    width = logits.shape[1]
    grid = index.shape[0], cdiv(width, 8 * MASK_BYTES)
    _mask_kernel[grid](logits, mask, index, logits.stride(0), mask.stride(0), width, mask.shape[1], BYTES=MASK_BYTES, num_warps=4)


def sample(logits: Tensor, params: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """See ref.sample; rows of logits may be strided. Safe in a CUDA graph."""
    n, width = logits.shape
    out = torch.empty(n, dtype=torch.int32, device=logits.device)
    block, warps = (4096, 8) if n > FEW_ROWS else (16384, 32)
    _sample_kernel[n,](logits, params, rows, positions, out, logits.stride(0), width, ZEROS=ZERO_BITS[logits.dtype], BLOCK=block,
                       num_warps=warps)
    return out
