"""Dense linear layers on CUDA: who multiplies how many rows.

On Hopper one by dense_row.py, up to 8 by dense_few.py, many by gemm_many.py where it can end with what follows; few by
gemm_skinny.py, else cuBLAS.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from kernels import dense_few, dense_row, gemm_many, ref
from kernels.fragments import MOST_ROWS as FEW_ROWS
from kernels.gemm_skinny import SHARED_BYTES, Tile, product, tile_of
from kernels.shapes import cdiv

MOST_ROWS = 64              # cuBLAS is as fast from here on
SMALL_BYTES = 8 << 20       # weights up to this take as long as a program does, whatever the memory's speed


@cache
def choose_row(m: int, features: int, depth: int) -> dense_row.Tile | None:
    """The tile of dense_row.py for m rows of x and a weight [features, depth]; None: not for that kernel.

    As measured on an H100 in chains of Mistral-7B's layers.
    """
    deep, wide = depth > 1 << 13, features > 1 << 13
    tile = dense_row.Tile(16, 8, 1, 64) if deep else dense_row.Tile(8 if wide else 4, 4, 2)
    large = 2 * features * depth > SMALL_BYTES
    return tile if m == 1 and large and depth % dense_row.DEPTH == 0 and features % (2 * tile.outputs) == 0 else None


@cache
def choose_few(m: int, features: int, depth: int) -> dense_few.Tile | None:
    """The tile of dense_few.py, likewise, at 8 rows."""
    tile = dense_few.Tile(8, 16, 128, 1) if features > 1 << 12 else dense_few.Tile(16, 16, 64, 1)
    large = 2 * features * depth > SMALL_BYTES
    return tile if 1 <= m <= FEW_ROWS and large and depth % tile.depth == 0 and features % (2 * tile.outputs) == 0 else None


@cache
def choose(m: int, features: int, depth: int, gated: bool, dtype: torch.dtype, processors: int) -> Tile | None:
    """The tile for m rows of x and a weight [features, depth]; None: what stands in ref.py is as fast, or none divides the depth.

    As jobs/bench/gemm.py measured them on an H100 for the shapes of Mistral-7B and SmolLM2-135M.
    """
    if m > MOST_ROWS or dtype.itemsize != 2 or not processors:
        return None
    small = dtype.itemsize * features * depth <= SMALL_BYTES
    for rows, step, splits, stages in (_vectors if m == 1 else _small if small else _large)(m, features, depth, processors):
        tile = tile_of(m, features, depth, gated, (rows, step, splits, 4), processors, m == 1, stages)
        if tile is not None:
            return tile
    return None


Shapes = list[tuple[int, int, int, int]]    # the first that divides the depth: (rows, depth, splits, most stages)


def _vectors(m: int, features: int, depth: int, processors: int) -> Shapes:
    wide = features >= 16 * processors
    return [(8 if wide else 4, 512, 1, 1 if wide else 8), (32, 64, 1, 8)]


def _small(m: int, features: int, depth: int, processors: int) -> Shapes:
    deep = [(32, 128, 4, 8) if m <= 16 else (64, 128, 3, 8)] if depth > 1024 else []
    return [*deep, (32 if features > 16 * processors else 16, 64, 1, 8)]


def _large(m: int, features: int, depth: int, processors: int) -> Shapes:
    splits = 1 if cdiv(features, 64) > 0.7 * processors else 2
    return [(64, 128, splits, 8), (64, 64, splits, 8), (64, 64, 1, 8)]


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors; 0 where they have less shared memory than the tiles are made for, as before Hopper."""
    chip = torch.cuda.get_device_properties(device)
    return chip.multi_processor_count if chip.shared_memory_per_multiprocessor >= SHARED_BYTES else 0


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, out: Tensor | None) -> Tensor | None:
    """By one of the kernels for few rows; None where what follows is as fast."""
    rows, (features, depth) = x.shape[0], weight.shape
    if dense_few.takes(x):
        row = choose_row(rows, features, depth)
        if row is not None:
            return dense_row.product(x, weight, bias, row, activation, out)
        few = choose_few(rows, features, depth)
        if few is not None:
            return dense_few.product(x, weight, bias, few, activation, out)
    tile = choose(rows, features, depth, bool(activation), x.dtype, _processors(x.device))
    return None if tile is None else product(x, weight, bias, tile, activation, out)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """See ref.linear; rows of x may be strided."""
    y = _product(x, weight, bias, "", out)
    return ref.linear(x, weight, bias, out) if y is None else y


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """See ref.gated_linear; rows of x may be strided."""
    y = _product(x, weight, bias, activation, None)
    return gemm_many.gated_linear(x, weight, bias, activation) if y is None else y


def linear_onto(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor | None:
    """See ref.linear_onto; rows of x may be strided."""
    y = _product(x, weight, bias, "", None)
    return gemm_many.linear_onto(x, weight, bias, residual) if y is None else y
