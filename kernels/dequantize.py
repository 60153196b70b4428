"""Integer codes to weights on CUDA, in one pass: for formats whose groups are too fine for the fused products."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.shapes import cdiv, next_power_of_2


@triton.jit
def _dequantize_kernel(codes, scales, out, row_stride, group_stride, WIDTH: tl.constexpr, GROUP: tl.constexpr,
                       MIDDLE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < WIDTH
    code = tl.load(codes + row * WIDTH + k, mask=inside, other=0).to(tl.float32) - MIDDLE
    scale = tl.load(scales + row * row_stride + k // GROUP * group_stride, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + k, (code * scale).to(out.dtype.element_ty), mask=inside)


def dequantize_symmetric(codes: Tensor, scales: Tensor, group: int) -> Tensor:
    """See ref.dequantize_symmetric. codes contiguous."""
    rows, width = codes.shape
    out = torch.empty((rows, width), dtype=scales.dtype, device=codes.device)
    block = min(2048, next_power_of_2(width))
    _dequantize_kernel[rows, cdiv(width, block)](
        codes, scales, out, *scales.stride(), WIDTH=width, GROUP=group, MIDDLE=128, BLOCK=block, num_warps=4)
    return out
