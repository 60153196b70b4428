"""Programmatic dependent launch (CUDA programming guide): a kernel starts while the one before it in the stream still runs.

A kernel launched with `launch_options` may do what neither reads nor writes anything of the step, asking for weights say (what it
reads then, two kernels that do not take part have to stand behind: the last before it need not have finished); then it
calls `after` in every program, and from there on all kernels before it have finished, since each of them waited in the same way.
Kernels that do not take part, cuBLAS's among them, run after whatever precedes them has finished, as always.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl


@triton.jit
def after(OVERLAP: tl.constexpr):
    """Let the next kernel start, and wait until all that came before this one has finished and can be read."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch(pointers):
    """Ask the L2 for the lines that these point into; returns at once."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)], dtype=tl.int32,
                              is_pure=False, pack=1)


@cache
def overlaps(device: torch.device) -> bool:
    """Whether launches can overlap there: from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(overlap: bool) -> dict[str, bool]:
    """What a launch adds to its options: the kernel's constant, and the attribute of the launch."""
    return {"OVERLAP": True, "launch_pdl": True} if overlap else {"OVERLAP": False}
