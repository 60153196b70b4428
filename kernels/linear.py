"""Dense linear layers and their neighbours on CUDA: few rows go to gemm_skinny.py, more to cuBLAS between separate kernels."""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor

from kernels import pointwise, ref
from kernels.gemm_skinny import MOST_ROWS, Norm, Tile, product, tile_of

# (rows of the weight, elements along K, warps) by the rows of x in a program, the widest first: the wider, the fewer reads of x.
SHAPES = {16: ((64, 64, 4), (32, 128, 4), (16, 256, 4)), 32: ((64, 64, 4), (32, 128, 4)), 64: ((128, 64, 4), (64, 64, 4)),
          128: ((128, 64, 8), (64, 64, 4))}
SMALL = {16: (16, 64, 4), 32: (16, 64, 4), 64: (32, 64, 4), 128: (32, 64, 4)}
SMALL_BYTES = 8 << 20       # weights up to this take as long as a program does, whatever the memory's speed
FILLED = 1.5                # programs a multiprocessor that keep the memory busy
NORM_BYTES = 16 << 20       # read again by all programs for the norm: past this the norm's own kernel costs less


@cache
def choose(m: int, features: int, depth: int, gated: bool, normed: bool, dtype: torch.dtype, processors: int) -> Tile | None:
    """The tile for m rows of x and a weight [features, depth]; None: what stands in ref.py is as fast.

    The widest tile that fills the chip, else the narrowest, cut along K where not every multiprocessor has one.
    """
    if m > MOST_ROWS or dtype.itemsize != 2:
        return None
    block = max(16, triton.next_power_of_2(m))
    small = dtype.itemsize * features * depth <= SMALL_BYTES
    shapes = (SMALL[block],) if small else SHAPES[block]
    rows, step, warps = next((s for s in shapes if triton.cdiv(features, s[0]) >= FILLED * processors), shapes[-1])
    splits = 1
    while not small and triton.cdiv(features, rows) * splits < processors and depth % (2 * splits * step) == 0:
        splits *= 2
    tile = tile_of(m, features, depth, gated, (rows, step, splits, warps), processors)
    return None if normed and tile is not None and _norm_bytes(tile, m, features, depth) > NORM_BYTES else tile


def _norm_bytes(tile: Tile, m: int, features: int, depth: int) -> int:
    """x and the residual, read twice by every program: for the mean square, and for the product."""
    return 8 * m * depth * triton.cdiv(features, tile.rows)


def _tile(x: Tensor, weight: Tensor, gated: bool = False, normed: bool = False) -> Tile | None:
    return choose(x.shape[0], *weight.shape, gated, normed, x.dtype, _processors(x.device))


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """See ref.linear; rows of x may be strided."""
    tile = _tile(x, weight)
    return ref.linear(x, weight, bias, out) if tile is None else product(x, weight, bias, tile, out=out)


def norm_linear(x: Tensor, residual: Tensor, norm: Tensor, eps: float, plus_one: bool, weight: Tensor,
                bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ref.norm_linear."""
    tile = _tile(x, weight, normed=True)
    if tile is not None:
        fold = Norm(residual, norm, eps, plus_one, torch.empty_like(residual))
        return product(x, weight, bias, tile, norm=fold), fold.summed
    return linear(pointwise.add_rms_norm(x, residual, norm, eps, plus_one), weight, bias, None), residual


def norm_gated_linear(x: Tensor, residual: Tensor, norm: Tensor, eps: float, plus_one: bool, weight: Tensor, bias: Tensor | None,
                      activation: str) -> tuple[Tensor, Tensor]:
    """See ref.norm_gated_linear."""
    tile = _tile(x, weight, gated=True, normed=True)
    if tile is not None:
        fold = Norm(residual, norm, eps, plus_one, torch.empty_like(residual))
        return product(x, weight, bias, tile, activation, fold), fold.summed
    h = pointwise.add_rms_norm(x, residual, norm, eps, plus_one)
    tile = _tile(x, weight, gated=True)
    if tile is not None:
        return product(h, weight, bias, tile, activation), residual
    return pointwise.gated_act(ref.linear(h, weight, bias, None), activation), residual
