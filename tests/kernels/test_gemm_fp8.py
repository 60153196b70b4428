"""FP8 products and quantisation in Triton's interpreter against float64."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from quantized_products import check_fp8, check_fp8_blocks, check_fused_quantization, mend_interpreted_casts

from kernels import quantize
from kernels.split_k import Tile

HALF = torch.empty(0, dtype=torch.float16)
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def mended_casts(monkeypatch):
    mend_interpreted_casts(monkeypatch)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("rows, outputs, inputs", [(1, 64, 128), (17, 200, 160), (40, 130, 576)])
def test_rows(static, rows, outputs, inputs):
    check_fp8(HALF, rows, outputs, inputs, static=static, bias=static)


@pytest.mark.parametrize("tile", [Tile(16, 64, 4, 3, 1), Tile(16, 64, 4, 3, 64), Tile(32, 128, 8, 3, 9)])
def test_tiles_and_splits(tile):
    check_fp8(HALF, 20, 300, 1280, bias=True, tile=tile)


@pytest.mark.parametrize("outputs, inputs", [(40, 160), (64, 200)])
def test_many_rows_of_shapes_that_cublas_has_not(outputs, inputs, monkeypatch):
    """On a GPU torch refuses what is no multiple of 16."""
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **kwargs: pytest.fail("not for cuBLAS"))
    check_fp8(HALF, 70, outputs, inputs)


def test_float32():
    check_fp8(torch.empty(0), 3, 64, 256)


@pytest.mark.parametrize("rows, outputs, inputs", [(1, 128, 256), (70, 256, 384)])
def test_blocks(rows, outputs, inputs):
    check_fp8_blocks(HALF, rows, outputs, inputs)


def test_what_is_no_number_stays_none():
    x = torch.randn(3, 128, dtype=torch.float16)
    x[1, 5], x[2] = float("nan"), float("nan")
    for codes, _ in (quantize.fp8_quantize(x), quantize.fp8_quantize(x, torch.ones(1)), quantize.quantize_blocks(x, 128)):
        assert torch.equal(codes.float().isnan(), x.isnan())


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("rows, width", [(1, 64), (5, 200)])
def test_fused_quantization(static, rows, width):
    check_fused_quantization(HALF, rows, width, static)
