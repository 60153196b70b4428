"""What the Gluon kernels for Hopper share."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.runtime.jit import constexpr_function

from kernels.shapes import next_power_of_2

# By their names of before Triton 3.9, and of since.
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret

GROUP = gl.constexpr(128)       # threads of a warp group
SHARED_BYTES = 226 << 10        # of one multiprocessor, less what the system keeps
WARPS = gl.constexpr(2)         # that bring weights to a ring, and that bring x
FLAT = gl.constexpr(gl.BlockedLayout([1, 4], [1, 32], [1, 4], [1, 0]))
LEAST_ROWS = 9                  # of x: gemm_few.py has fewer
MOST_BESIDE = 64                # rows of x for two programs on a multiprocessor


@constexpr_function
def least_power_of_2(n):
    """As shapes.next_power_of_2, for kernels."""
    return 1 << (n - 1).bit_length()


@constexpr_function
def lines(width, each, warps=4):
    """Rows of `width` elements over a warp group, or so many warps, `each` together in a thread."""
    return gl.BlockedLayout([1, each], [32 * each // width, width // each], [warps, 1], [1, 0])


@gluon.jit
def arrive_when_copied(ready):
    """Each of this partition's threads arrives once all that it has begun to copy is there: `ready` counts them."""
    async_copy.mbarrier_arrive(ready, increment_count=False)


@gluon.jit
def await_operands(ready, phase):
    """Wait for what another group brings, as the tensor cores' operands."""
    mbarrier.wait(ready, phase)
    # They read shared memory by another way than copies and stores reach it. Here, since the group that brings would wait at the
    # fence for all that it has begun to copy.
    fence_async_shared()


@gluon.jit
def add_splits(acc, partial, at, size, counter, split, splits, MOST: gl.constexpr = 4096):
    """This group's sums, or, if its program is the last of its splits, those of all in their order: (sums, whether it is).

    `at`: where in partial split 0 leaves its sums, `size` elements before the next one's; of few tiles, so that int32 counts
    them. The counter is 0 before and after. MOST: elements whose loads are in flight together, at least a split's.
    """
    gl.store(partial + (at + split * size), acc)
    barrier()      # all of the group's stores come before its ticket
    last = gl.atomic_add(counter, 1, sem="acq_rel") == splits - 1
    if last:
        acc = gl.zeros_like(acc)
        AT_ONCE: gl.constexpr = max(1, MOST // (acc.shape[0] * acc.shape[1]))
        for first in range(0, splits, AT_ONCE):
            for other in gl.static_range(AT_ONCE):
                there = first + other < splits
                acc += gl.load(partial + (at + (first + other) * size), mask=there, other=0.0, cache_modifier=".cg")
        gl.store(counter, 0)
    return acc, last


@gluon.jit
def in_lines(sums):
    """[64, N] as wgmma leaves them -> [N / 8, 512], line by line what the threads hold, 16 bytes of each together, as FLAT.

    A line is eight columns of the product.
    """
    parts = gl.permute(gl.reshape(sums, [4, 2, 8, sums.shape[1] // 8, 4, 2]), [3, 0, 2, 4, 1, 5])
    return gl.convert_layout(gl.reshape(parts, [sums.shape[1] // 8, 512]), FLAT, assert_trivial=True)


@gluon.jit
def finish(acc, part, sizes, ends, SPLIT: gl.constexpr, BIAS: gl.constexpr, SUMS: gl.constexpr, MOST: gl.constexpr = 4096):
    """Write y of the weight's rows 64 part .. 64 part + 64, bias added, from a group's sums, float32 [64, rows of x] as SUMS.

    SPLIT: from the sums of all splits, by the last of them; see add_splits.
    """
    M, N = sizes
    bias, out, partial, arrived, splits, split = ends
    BLOCK_M: gl.constexpr = acc.shape[1]
    if BIAS:        # once, by the first split
        row = part * 64 + gl.arange(0, 64, gl.SliceLayout(1, SUMS))
        acc += gl.load(bias + row, mask=split == 0, other=0.0).to(gl.float32)[:, None]
    LINES: gl.constexpr = BLOCK_M // 8
    acc = in_lines(acc)
    last = True
    if SPLIT:
        line, place = gl.arange(0, LINES, gl.SliceLayout(1, FLAT)), gl.arange(0, 512, gl.SliceLayout(0, FLAT))
        at = (part * LINES + line)[:, None] * 512 + place[None, :]
        acc, last = add_splits(acc, partial, at, N * BLOCK_M, arrived + part, split, splits, MOST)
    if last:
        ROWS: gl.constexpr = lines(64, 8)       # of y
        m, n = gl.arange(0, BLOCK_M, gl.SliceLayout(1, ROWS)), part * 64 + gl.arange(0, 64, gl.SliceLayout(0, ROWS))
        y = gl.permute(gl.reshape(acc, [LINES, 4, 8, 4, 2, 2]), [0, 3, 5, 1, 4, 2])
        y = gl.convert_layout(gl.reshape(y, [BLOCK_M, 64]).to(out.dtype.element_ty), ROWS)
        gl.store(out + (m[:, None] * N + n[None, :]), y, mask=(m < M)[:, None])


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a Hopper; 0 elsewhere: later chips have other tensor cores."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


def block_m(rows: int) -> int:
    """Rows of x that a program has room for."""
    return max(16, next_power_of_2(rows))


def takes(x: Tensor) -> bool:
    """Whether x is where and what the rings are made for: on a Hopper, copied 16 bytes at a time.

    Triton knows of a stride whether 16 divides it, and of no smaller power of two.
    """
    whole = x.element_size() <= 2 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0
    return whole and x.shape[0] >= LEAST_ROWS and processors(x.device) > 0
