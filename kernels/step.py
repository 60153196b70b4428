"""The row table on CUDA: apply a step's writes, expand its plan into the model's inputs, commit sampled tokens; a launch each."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.shapes import cdiv

BLOCK = 1024
SHARES = 4      # programs that share one long segment or one row's queries
# How many rows a step has, and where its slices of the plan begin, must not decide whether it compiles these anew.
PLAN = ["packed", "segments", "rows", "starts", "cu_q", "ids", "positions", "slots", "sampled", "out"]


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=PLAN)
def _apply_writes_kernel(state, packed, segments, BLOCK: tl.constexpr):
    segment = segments + tl.program_id(0) * 3
    dst, src, n = tl.load(segment), tl.load(segment + 1), tl.load(segment + 2)
    for start in range(tl.program_id(1) * BLOCK, n, tl.num_programs(1) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(state + dst + i, tl.load(packed + src + i, mask=i < n), mask=i < n)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=PLAN)
def _expand_kernel(tokens, block_table, rows, starts, cu_q, ids, positions, slots, tokens_stride, table_stride,
                   P: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    row = tl.load(rows + i).to(tl.int64)
    start, begin = tl.load(starts + i), tl.load(cu_q + i)
    n = tl.load(cu_q + i + 1) - begin
    for first in range(tl.program_id(1) * BLOCK, n, tl.num_programs(1) * BLOCK):
        q = first + tl.arange(0, BLOCK)
        inside = q < n
        position = start + q
        page = tl.load(block_table + row * table_stride + position // P, mask=inside, other=0)
        tl.store(ids + begin + q, tl.load(tokens + row * tokens_stride + position, mask=inside), mask=inside)
        tl.store(positions + begin + q, position, mask=inside)
        tl.store(slots + begin + q, page * P + position % P, mask=inside)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=PLAN)
def _expand_decode_kernel(tokens, block_table, rows, starts, cu_q, ids, positions, slots, tokens_stride, table_stride, n,
                          P: tl.constexpr, BLOCK: tl.constexpr):
    """One query a row at most: a lane is a row."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    begin = tl.load(cu_q + i, mask=inside, other=0)
    inside = tl.load(cu_q + i + 1, mask=inside, other=0) > begin
    row = tl.load(rows + i, mask=inside, other=0).to(tl.int64)
    position = tl.load(starts + i, mask=inside, other=0)
    page = tl.load(block_table + row * table_stride + position // P, mask=inside, other=0)
    tl.store(ids + begin, tl.load(tokens + row * tokens_stride + position, mask=inside), mask=inside)
    tl.store(positions + begin, position, mask=inside)
    tl.store(slots + begin, page * P + position % P, mask=inside)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=PLAN)
def _commit_kernel(tokens, rows, positions, sampled, out, tokens_stride, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    token = tl.load(sampled + i, mask=inside)
    row = tl.load(rows + i, mask=inside, other=0).to(tl.int64)
    position = tl.load(positions + i, mask=inside, other=0)
    tl.store(tokens + row * tokens_stride + position + 1, tl.maximum(token, 0), mask=inside)
    tl.store(out + i, token, mask=inside)


def apply_writes(state: Tensor, packed: Tensor, segments: Tensor) -> None:
    """See ref.apply_writes; the segments' destinations must not overlap, since they are written in any order."""
    _apply_writes_kernel[segments.shape[0], SHARES](state, packed, segments, BLOCK=BLOCK, num_warps=4)


def expand(tokens: Tensor, block_table: Tensor, rows: Tensor, starts: Tensor, cu_q: Tensor, max_q: int, page_size: int,
           ids: Tensor, positions: Tensor, slots: Tensor) -> None:
    """See ref.expand."""
    n = rows.shape[0]
    common = tokens, block_table, rows, starts, cu_q, ids, positions, slots, tokens.stride(0), block_table.stride(0)
    if max_q == 1:
        _expand_decode_kernel[cdiv(n, 128),](*common, n, P=page_size, BLOCK=128, num_warps=4)
    else:
        _expand_kernel[n, min(cdiv(max_q, BLOCK), SHARES)](*common, P=page_size, BLOCK=BLOCK, num_warps=4)


def commit(tokens: Tensor, rows: Tensor, positions: Tensor, sampled: Tensor, out: Tensor) -> None:
    """See ref.commit. Rows may repeat (padding): which of their tokens stays is not defined."""
    n = rows.shape[0]
    _commit_kernel[cdiv(n, 128),](tokens, rows, positions, sampled, out, tokens.stride(0), n, BLOCK=128, num_warps=4)
