"""Products of few rows, interpreted, against float64 of the separate kernels' roundings; and the rule that picks their tiles."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from functools import partial

import pytest
import torch
from kernel_cases import check_linear, randn

from kernels import linear, ref
from kernels.gemm_skinny import Tile, product
from kernels.split_k import counters

HOPPER = 132


def run(tile, x, weight, bias, activation, out):
    return product(x, weight, bias, tile, activation, out)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype, m, features, depth, tile", [
    (torch.float16, 1, 36, 256, Tile(16, 64, 2, 4, 2, vector=True)),
    (torch.float16, 1, 96, 128, Tile(32, 64, 1, 4, 2)),
    (torch.float16, 5, 100, 192, Tile(32, 64, 3, 4, 2)),
    (torch.float32, 33, 64, 128, Tile(64, 64, 1, 4, 2)),
])
@pytest.mark.parametrize("activation, bias", [("", False), ("", True), ("silu", True), ("gelu_tanh", False)])
def test_product(dtype, m, features, depth, tile, activation, bias):
    check_linear(partial(run, tile), torch.empty(0, dtype=dtype), m, features, depth, activation, bias)
    assert not counters(torch.device("cpu")).any()


@pytest.mark.parametrize("m", [1, 2, 16, 17, 64])
@pytest.mark.parametrize("features, depth", [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (32000, 4096), (960, 576),
                                             (576, 576), (576, 1536), (49152, 576), (1536, 8960), (151936, 896), (2048, 1536)])
def test_the_rule_gives_tiles_that_divide_the_weight_and_fit(m, features, depth):
    tile = linear.choose(m, features, depth, False, torch.bfloat16, HOPPER)
    assert tile is not None
    assert depth % (tile.splits * tile.depth) == 0
    assert tile.stages * (tile.rows + tile.block(m)) * tile.depth * 2 <= 224 << 10
    many = features * depth > 1 << 24
    assert not many or -(-features // tile.rows) * tile.splits > HOPPER / 2


def test_the_rule_leaves_the_rest_to_the_library():
    assert linear.choose(65, 4096, 4096, False, torch.bfloat16, HOPPER) is None
    assert linear.choose(1, 4096, 4096, False, torch.float32, HOPPER) is None
    assert linear.choose(1, 4096, 4000, False, torch.bfloat16, HOPPER) is None
    assert linear.choose(1, 4096, 4096, False, torch.bfloat16, 0) is None       # on a chip that the tiles do not fit


@pytest.mark.parametrize("rows", [3, 65])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_ops_are_their_twins_whatever_the_rule_says(rows, activation, monkeypatch):
    monkeypatch.setattr(linear, "_processors", lambda device: HOPPER)
    like = torch.empty(0, dtype=torch.float16)
    x, weight, bias = randn(rows, 128, like=like), randn(96, 128, like=like) / 11, randn(96, like=like)
    near = partial(torch.testing.assert_close, rtol=2e-3, atol=2e-2)
    near(linear.linear(x, weight, bias, None), ref.linear(x, weight, bias, None))
    near(linear.gated_linear(x, weight, bias, activation), ref.gated_linear(x, weight, bias, activation))


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_products_are_added_at_once_by_the_rule_alone(taken, with_bias, monkeypatch):
    monkeypatch.setattr(linear, "_processors", lambda device: 0)
    monkeypatch.setattr(linear.gemm_many, "takes_added", lambda *tensors: taken)
    monkeypatch.setattr(linear.gemm_many, "add_product", lambda x, weight, residual: residual.add_(x @ weight.T))
    x, weight, before = torch.randn(5, 32), torch.randn(16, 32), torch.randn(5, 16)
    bias, residual = torch.randn(16) if with_bias else None, before.clone()
    left = linear.linear_onto(x, weight, bias, residual)
    assert (left is None) == (taken and not with_bias)
    assert left is None or torch.equal(residual, before)
    want = ref.linear(x, weight, bias, None) + before
    torch.testing.assert_close(residual if left is None else residual + left, want)
