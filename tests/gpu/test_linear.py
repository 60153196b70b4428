"""Products of few rows, compiled, against float64; overlapping launches give what launches one by one give."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kernel_cases import check_linear, randn

if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)

from kernels import dense_few, ops, ref
from kernels.gemm_skinny import Tile, product
from kernels.split_k import counters


def run(tile, x, weight, bias, activation, out):
    return product(x, weight, bias, tile, activation, out)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m, features, depth, tile", [
    (1, 4096, 4096, Tile(8, 512, 1, 4, 1, vector=True)),
    (1, 1000, 576, Tile(32, 64, 3, 4, 4, vector=True)),
    (1, 4096, 4096, Tile(16, 256, 1, 4, 6)),
    (3, 960, 576, Tile(16, 64, 1, 4, 8)),
    (16, 4096, 14336, Tile(64, 64, 4, 4, 8)),
    (30, 1530, 1536, Tile(32, 128, 2, 4, 5)),
    (50, 6144, 4096, Tile(64, 64, 2, 4, 5)),
    (128, 3000, 2048, Tile(128, 64, 2, 8, 3)),
])
@pytest.mark.parametrize("activation, bias", [("", False), ("", True), ("silu", True), ("gelu_tanh", False)])
def test_product(dtype, m, features, depth, tile, activation, bias):
    like = torch.empty(0, dtype=dtype, device="cuda")
    check_linear(partial(run, tile), like, m, features, depth, activation, bias)
    assert not counters(like.device).any()


@pytest.mark.skipif(torch.cuda.get_device_capability()[0] != 9, reason="the kernel is for Hopper")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("warps, outputs, inputs, ahead", [(1, 16, 32, 1), (8, 16, 128, 1), (8, 16, 128, 2), (16, 32, 64, 2),
                                                           (4, 64, 64, 3)])
def test_few_rows_in_registers(dtype, warps, outputs, inputs, ahead):
    like = torch.empty(0, dtype=dtype, device="cuda")
    for m, features, depth in ((1, 1152, 896), (3, 4096, 4096), (8, 576, 1664)):
        x, weight = randn(m, depth + 8, like=like)[:, :depth], randn(features, depth, like=like) / depth**0.5
        bias, out = randn(features, like=like), torch.empty(m, features, dtype=dtype, device="cuda")
        dense_few.product(x, weight, bias, dense_few.Tile(warps, outputs, inputs, ahead), out)
        want = x.double() @ weight.double().T + bias.double()
        assert float((out.double() - want).norm() / want.norm()) < (3e-3 if dtype == torch.bfloat16 else 4e-4)


@pytest.mark.parametrize("m", [1, 7, 16, 56, 100, 128])
@pytest.mark.parametrize("features, depth", [(6144, 4096), (4096, 14336), (3072, 576), (576, 1536), (17920, 1536), (2048, 1536)])
def test_ops_as_the_rule_has_them(m, features, depth):
    like = torch.empty(0, dtype=torch.bfloat16, device="cuda")
    x, weight = randn(m, depth, like=like), randn(features, depth, like=like) / depth**0.5
    got, want = ops.gated_linear(x, weight, None, "silu"), ref.gated_linear(x, weight, None, "silu")
    assert float((got.double() - want.double()).norm() / want.double().norm()) < 6e-3
    got, want = ops.linear(x, weight), x.double() @ weight.double().T
    assert float((got.double() - want).norm() / want.norm()) < 3e-3


@pytest.mark.parametrize("m", [1, 16, 64])
def test_overlapping_launches_change_nothing(m):
    """A chain in a graph whose every kernel reads what the one before has just written, into memory used again and again."""
    like = torch.empty(0, dtype=torch.bfloat16, device="cuda")
    weights = [(randn(1536, 576, like=like) / 24, randn(576, 768, like=like) / 28) for _ in range(40)]
    scale, first, start = randn(576, like=like), randn(m, 576, like=like), randn(m, 576, like=like)
    wide, narrow = Tile(16, 64, 3, 4, 3), Tile(16, 64, 2, 4, 6)
    if m == 64:
        wide = narrow = Tile(64, 64, 1, 4, 3)

    def chain(overlap):
        x, residual = first, start.clone()
        for up, down in weights:
            h = ops.add_rms_norm(x, residual, scale, 1e-5)
            x = product(product(h, up, None, wide, "silu", None, overlap), down, None, narrow, "", None, overlap)
        return torch.cat([x, residual])

    alone = chain(False)
    chain(True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(True)
    for _ in range(50):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, alone)
