"""What the Gluon kernels for Hopper share."""

from __future__ import annotations

from functools import cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.runtime.jit import constexpr_function

# By their names of before Triton 3.9, and of since.
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret

GROUP = 128                     # threads of a warp group
SHARED_BYTES = 226 << 10        # of one multiprocessor, less what the system keeps


@constexpr_function
def lines(width, each):
    """Rows of `width` elements over a warp group, `each` together in a thread."""
    return gl.BlockedLayout([1, each], [32 * each // width, width // each], [4, 1], [1, 0])


@gluon.jit
def arrive_when_copied(ready):
    """Each of this group's threads arrives once all that it has begun to copy is there: `ready` counts GROUP of them."""
    async_copy.mbarrier_arrive(ready, increment_count=False)


@gluon.jit
def await_operands(ready, phase):
    """Wait for what another group brings, as the tensor cores' operands."""
    mbarrier.wait(ready, phase)
    # They read shared memory by another way than copies and stores reach it. Here, since the group that brings would wait at the
    # fence for all that it has begun to copy.
    fence_async_shared()


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a Hopper; 0 elsewhere: later chips have other tensor cores."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count
