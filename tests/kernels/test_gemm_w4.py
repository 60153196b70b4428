"""Products with packed 4- and 8-bit weights in Triton's interpreter, which has no assembly, in fp16 and fp32, against float64."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from quantized_products import check_integer

from kernels import gemm_many, gemm_w4
from kernels.split_k import Tile

HALF = torch.empty(0, dtype=torch.float16)
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, 384])
@pytest.mark.parametrize("zeros", ["whole", "none", "broken"])
def test_groups_and_zeros(bits, group, zeros):
    check_integer(HALF, bits, 3, 128, 384, group, zeros=zeros)


@pytest.mark.parametrize("rows, outputs, inputs, group",
                         [(1, 96, 160, 32), (5, 200, 192, 64), (17, 130, 96, 96), (33, 257, 256, 128)])
def test_uneven_shapes_with_a_bias(rows, outputs, inputs, group):
    check_integer(HALF, 4, rows, outputs, inputs, group, bias=True)


@pytest.mark.parametrize("tile", [Tile(16, 64, 4, 3, 1), Tile(16, 64, 4, 3, 25), Tile(16, 128, 4, 3, 7), Tile(32, 256, 8, 3, 40)])
def test_tiles_and_splits(tile):
    check_integer(HALF, 4, 20, 300, 768, 128, bias=True, tile=tile)


def test_float32_and_a_column_order():
    check_integer(torch.empty(0), 4, 2, 64, 256, 64, perm=True)
    check_integer(torch.empty(0), 8, 2, 64, 256, 32, perm=True)


def test_many_rows_go_to_the_dequantized_weights(monkeypatch):
    monkeypatch.setattr(gemm_w4, "MOST_ROWS", 4)
    monkeypatch.setattr(gemm_w4, "MOST_BESIDE_COPY", 4)
    check_integer(HALF, 4, 5, 130, 256, 128, bias=True, perm=True)


@pytest.mark.parametrize("bias", [True, False])
def test_many_rows_are_added_at_once(monkeypatch, bias):
    added = []
    monkeypatch.setattr(gemm_w4, "MOST_ROWS", 4)
    monkeypatch.setattr(gemm_w4, "MOST_BESIDE_COPY", 4)
    monkeypatch.setattr(gemm_many, "takes_added", lambda *tensors: True)
    monkeypatch.setattr(gemm_many, "add_product",
                        lambda x, weight, residual: added.append(len(x)) or residual.add_(x @ weight.T))
    for rows in (4, 5):
        check_integer(HALF, 4, rows, 130, 256, 128, bias=bias, perm=True)
    assert added == ([] if bias else [5, 5])


def test_groups_that_no_block_holds_are_refused():
    with pytest.raises(ValueError, match="groups of 96 are not supported"):
        check_integer(HALF, 4, 1, 64, 192, 96)
