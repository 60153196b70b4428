"""Activations to e4m3 on CUDA, token by token: alone, or behind the norm or the activation that makes them, in the same pass."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import ref
from kernels.overlap import after, launch_options, overlaps
from kernels.pointwise import add_and_normalise, factors, gate, row_shape
from kernels.shapes import cdiv

LARGEST = tl.constexpr(ref.E4M3_MAX)


@triton.jit
def within_e4m3(y):
    """y as far as e4m3 reaches. NaN stays NaN, so that a broken layer is seen at the end of the model."""
    return tl.clamp(y, -LARGEST, LARGEST, tl.PropagateNan.ALL)


@triton.jit
def _write_row(y, out, scales, static, row, columns, inside, WIDTH: tl.constexpr, STATIC: tl.constexpr):
    """The row y (0 past WIDTH) as e4m3 and its scale: its largest / 448, or what `static` holds."""
    y = y.to(tl.float32)
    scale = tl.load(static) if STATIC else tl.div_rn(tl.maximum(tl.max(tl.abs(y), 0), 1e-12), LARGEST)
    y = within_e4m3(y * tl.div_rn(1.0, scale))       # rounded as torch rounds
    tl.store(out + row * WIDTH + columns, y.to(tl.float8e4nv), mask=inside)
    tl.store(scales + row, scale)


@triton.jit
def _quantize_kernel(x, out, scales, static, x_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STATIC: tl.constexpr,
                     OVERLAP: tl.constexpr):
    after(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    y = tl.load(x + row * x_stride + columns, mask=inside, other=0.0)
    _write_row(y, out, scales, static, row, columns, inside, WIDTH, STATIC)


@triton.jit
def _add_rms_norm_kernel(x, residual, weight, out, scales, static, x_stride, residual_stride, eps, WIDTH: tl.constexpr,
                         BLOCK: tl.constexpr, PLUS_ONE: tl.constexpr, STATIC: tl.constexpr, OVERLAP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    w = factors(weight, columns, inside)
    after(OVERLAP)
    y = add_and_normalise(x + row * x_stride, residual + row * residual_stride, w, columns, inside, eps, WIDTH, PLUS_ONE)
    _write_row(y, out, scales, static, row, columns, inside, WIDTH, STATIC)


@triton.jit
def _gated_act_kernel(x, out, scales, static, x_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr,
                      STATIC: tl.constexpr, OVERLAP: tl.constexpr):
    after(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    low = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_stride + WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    _write_row(gate(low, up, GELU, x.dtype.element_ty), out, scales, static, row, columns, inside, WIDTH, STATIC)


@triton.jit
def _quantize_blocks_kernel(x, out, scales, x_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    after(OVERLAP)
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x + row * x_stride + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(y), 0), 1e-12), LARGEST)
    y *= tl.div_rn(1.0, scale)
    tl.store(out + row * WIDTH + columns, within_e4m3(y).to(tl.float8e4nv), mask=columns < WIDTH)
    tl.store(scales + row * tl.num_programs(1) + block, scale)


def _outputs(x: Tensor, width: int, groups: int = 1) -> tuple[Tensor, Tensor]:
    rows = x.shape[0]
    return (torch.empty((rows, width), dtype=torch.float8_e4m3fn, device=x.device),
            torch.empty((rows, groups), dtype=torch.float32, device=x.device))


def _options(x: Tensor, width: int, scale: Tensor | None) -> dict[str, Any]:
    """A row a program, as kernels.pointwise has it."""
    block, warps = row_shape(width)
    return {"WIDTH": width, "BLOCK": block, "STATIC": scale is not None, "num_warps": warps, **launch_options(overlaps(x.device))}


def fp8_quantize(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See ref.fp8_quantize; rows of x may be strided. The scales are always [M, 1]."""
    rows, width = x.shape
    out, scales = _outputs(x, width)
    _quantize_kernel[rows,](x, out, scales, scales if scale is None else scale, x.stride(0), **_options(x, width, scale))
    return out, scales


def add_rms_norm_fp8(x: Tensor, residual: Tensor, weight: Tensor, eps: float, plus_one: bool,
                     scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ref.add_rms_norm_fp8; rows may be strided."""
    rows, width = x.shape
    out, scales = _outputs(x, width)
    _add_rms_norm_kernel[rows,](x, residual, weight, out, scales, scales if scale is None else scale, x.stride(0),
                                residual.stride(0), eps, PLUS_ONE=plus_one, **_options(x, width, scale))
    return out, scales


def gated_act_fp8(x: Tensor, activation: str, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ref.gated_act_fp8; rows may be strided."""
    rows, width = x.shape[0], x.shape[1] // 2
    out, scales = _outputs(x, width)
    _gated_act_kernel[rows,](x, out, scales, scales if scale is None else scale, x.stride(0), GELU=activation == "gelu_tanh",
                             **_options(x, width, scale))
    return out, scales


def quantize_blocks(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Every `block` inputs of a row by their largest -> e4m3 [M, K], float32 [M, K / block]."""
    rows, width = x.shape
    out, scales = _outputs(x, width, cdiv(width, block))
    _quantize_blocks_kernel[rows, scales.shape[1]](x, out, scales, x.stride(0), WIDTH=width, BLOCK=block, num_warps=1,
                                                   **launch_options(overlaps(x.device)))
    return out, scales
