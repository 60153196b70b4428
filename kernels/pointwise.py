"""RMSNorm, alone or fused with the residual sum, and gated activations on CUDA: one read and one write, float32 inside."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.overlap import after, launch_options, overlaps
from kernels.shapes import cdiv, next_power_of_2

SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)
GATE_BLOCK = 1024


@triton.jit
def activate(low, GELU: tl.constexpr):
    """SiLU, or GELU by tanh, of float32."""
    # silu(x) = x / (1 + exp(-x)); GELU too, since (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u))
    slope = SQRT_8_OVER_PI * (low + 0.044715 * low * low * low) if GELU else low
    return low / (1.0 + tl.exp(-slope))


@triton.jit
def gate(low, up, GELU: tl.constexpr, DTYPE: tl.constexpr):
    """act(low) * up, float32 in, rounded where the torch twin rounds."""
    return (activate(low, GELU).to(DTYPE).to(tl.float32) * up).to(DTYPE)


@triton.jit
def factors(weight, columns, inside):
    """A norm's weights. Asked for before the wait: they come from memory, the rows are in the L2."""
    return tl.load(weight + columns, mask=inside, other=0.0)


@triton.jit
def _normalise(h, w, eps, WIDTH: tl.constexpr, PLUS_ONE: tl.constexpr, DTYPE: tl.constexpr):
    """RMSNorm of one row h (float32, 0 past WIDTH), rounded where the torch twin rounds."""
    h *= tl.rsqrt(tl.sum(h * h, 0) / WIDTH + eps)
    w = w.to(tl.float32)
    if PLUS_ONE:
        return (h * (1.0 + w)).to(DTYPE)
    return (h.to(DTYPE).to(tl.float32) * w).to(DTYPE)


@triton.jit
def add_and_normalise(x, residual, w, columns, inside, eps, WIDTH: tl.constexpr, PLUS_ONE: tl.constexpr):
    """Adds the row at x to the one at residual -> the sum's RMSNorm."""
    h = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
    h = (h + tl.load(residual + columns, mask=inside, other=0.0).to(tl.float32)).to(residual.dtype.element_ty)
    tl.store(residual + columns, h, mask=inside)
    return _normalise(h.to(tl.float32), w, eps, WIDTH, PLUS_ONE, residual.dtype.element_ty)


@triton.jit
def _rms_norm_kernel(x, weight, out, x_stride, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PLUS_ONE: tl.constexpr,
                     OVERLAP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    w = factors(weight, columns, inside)
    after(OVERLAP)
    h = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    y = _normalise(h, w, eps, WIDTH, PLUS_ONE, out.dtype.element_ty)
    tl.store(out + row * WIDTH + columns, y, mask=inside)


@triton.jit
def _add_rms_norm_kernel(x, residual, weight, out, x_stride, residual_stride, eps,
                         WIDTH: tl.constexpr, BLOCK: tl.constexpr, PLUS_ONE: tl.constexpr, OVERLAP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    w = factors(weight, columns, inside)
    after(OVERLAP)
    y = add_and_normalise(x + row * x_stride, residual + row * residual_stride, w, columns, inside, eps, WIDTH, PLUS_ONE)
    tl.store(out + row * WIDTH + columns, y, mask=inside)


@triton.jit
def _gated_act_kernel(x, out, x_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr,
                      OVERLAP: tl.constexpr):
    after(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    at = x + row * x_stride + columns
    low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + WIDTH, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + columns, gate(low, up, GELU, out.dtype.element_ty), mask=inside)


def row_shape(width: int) -> tuple[int, int]:
    """The power of two that holds a row, and warps such that a lane has about 16 elements: two 16-byte loads in flight each."""
    block = next_power_of_2(width)
    return block, min(max(block // 512, 1), 16)


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
    """See ref.rms_norm; x [T, width], rows may be strided."""
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    block, warps = row_shape(width)
    _rms_norm_kernel[rows,](x, weight, out, x.stride(0), eps, WIDTH=width, BLOCK=block, PLUS_ONE=plus_one, num_warps=warps,
                           **launch_options(overlaps(x.device)))
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
    """See ref.add_rms_norm; x and residual [T, width], rows may be strided."""
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    block, warps = row_shape(width)
    _add_rms_norm_kernel[rows,](x, residual, weight, out, x.stride(0), residual.stride(0), eps, WIDTH=width, BLOCK=block,
                                PLUS_ONE=plus_one, num_warps=warps, **launch_options(overlaps(x.device)))
    return out


def gated_act(x: Tensor, activation: str) -> Tensor:
    """See ref.gated_act; rows of x may be strided."""
    rows, width = x.shape[0], x.shape[1] // 2
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    _gated_act_kernel[rows, cdiv(width, GATE_BLOCK)](x, out, x.stride(0), WIDTH=width, BLOCK=GATE_BLOCK,
                                                     GELU=activation == "gelu_tanh", num_warps=4,
                                                     **launch_options(overlaps(x.device)))
    return out
