"""Token automata on CUDA: mask the logits of rows by their states, and move the states on by what was sampled."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels import ref
from kernels.shapes import cdiv

NEG_INF = tl.constexpr(float("-inf"))
COLUMNS = tl.constexpr(ref.STATE_COLUMNS)
MASK, NEXT, CLASSES = (tl.constexpr(column) for column in (ref.STATE_MASK, ref.STATE_NEXT, ref.STATE_CLASSES))
MASK_BYTES = 256    # of the mask, to a program


# Where a slice of the plan begins must not decide whether a step compiles this anew.
@triton.jit(do_not_specialize_on_alignment=["rows"])
def _mask_kernel(logits, states, rows, table, masks, logits_stride, V, W, BYTES: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    state = tl.load(states + tl.load(rows + i))
    if state > 0:
        masks += tl.load(table + state * COLUMNS + MASK).to(tl.int64) * W
        byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
        bit = tl.arange(0, 8)[None, :]
        bits = (tl.load(masks + byte // 4, mask=byte // 4 < W, other=0) >> (byte % 4 * 8)) & 0xFF
        column = byte[:, None] * 8 + bit
        at = logits + i * logits_stride + column
        # Whole vectors are written, which is fast; read is only where there is something to keep.
        x = tl.load(at, mask=(bits != 0)[:, None] & (column < V), other=NEG_INF)
        tl.store(at, tl.where(((bits[:, None] >> bit) & 1) != 0, x, NEG_INF), mask=column < V)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["rows", "sampled"])
def _advance_kernel(states, rows, sampled, table, next, classes, V, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    row = tl.load(rows + i, mask=inside, other=0)
    state = tl.load(states + row, mask=inside, other=0)
    live = state > 0
    token = tl.maximum(tl.load(sampled + i, mask=live, other=0), 0)
    line = table + state * COLUMNS
    kind = tl.load(classes + tl.load(line + CLASSES, mask=live, other=0).to(tl.int64) * V + token, mask=live, other=0)
    after = tl.load(next + tl.load(line + NEXT, mask=live, other=0) + kind, mask=live, other=0)
    tl.store(states + row, tl.maximum(after, 0), mask=live)


def mask_by_state(logits: Tensor, states: Tensor, rows: Tensor, table: Tensor, masks: Tensor) -> None:
    """See ref.mask_by_state."""
    n, width = logits.shape
    grid = n, cdiv(width, 8 * MASK_BYTES)
    _mask_kernel[grid](logits, states, rows, table, masks, logits.stride(0), width, masks.shape[1], BYTES=MASK_BYTES, num_warps=4)


def advance(states: Tensor, rows: Tensor, sampled: Tensor, table: Tensor, next: Tensor, classes: Tensor) -> None:
    """See ref.advance."""
    n, width = rows.shape[0], classes.shape[1]
    _advance_kernel[cdiv(n, 128),](states, rows, sampled, table, next, classes, width, n, BLOCK=128, num_warps=4)
