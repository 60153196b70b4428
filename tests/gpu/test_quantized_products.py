"""Products with quantised weights as compiled for this GPU, against float64, and in a CUDA graph."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)

from quantized_products import check_fp8, check_fp8_blocks, check_fused_quantization, check_integer

from kernels import gemm_w4

HALVES = [torch.empty(0, dtype=dtype, device="cuda") for dtype in (torch.bfloat16, torch.float16)]
ROWS = [1, 4, 16, 17, 33, 64, 100, 192, 300]
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("like", HALVES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, 1536])
@pytest.mark.parametrize("zeros", ["whole", "none", "broken"])
def test_groups_and_zeros(like, bits, group, zeros):
    for rows in (1, 40):
        check_integer(like, bits, rows, 512, 1536, group, zeros=zeros, bias=rows == 1)


@pytest.mark.parametrize("like", HALVES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_rows(like, rows):
    check_integer(like, 4, rows, 1152, 896, 128, bias=True, perm=True)
    check_integer(like, 4, rows, 960, 576, 64)


def test_the_same_bits_again_and_in_a_graph():
    like = HALVES[0]
    packed = gemm_w4.w4_pack(torch.randint(0, 16, (4096, 4096), dtype=torch.uint8, device="cuda"))
    scales = torch.rand(32, 4096, device="cuda").to(like.dtype).t()
    x = torch.randn(8, 4096, device="cuda").to(like.dtype)
    first = gemm_w4.w4_matmul(x, packed, scales, None, 128, None, None, None)
    assert all(torch.equal(first, gemm_w4.w4_matmul(x, packed, scales, None, 128, None, None, None)) for _ in range(50))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [gemm_w4.w4_matmul(x, packed, scales, None, 128, None, None, None) for _ in range(5)]
    for _ in range(20):
        graph.replay()
    assert all(torch.equal(first, out) for out in outs)


@pytest.mark.parametrize("like", HALVES, ids=str)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_fp8(like, static, rows):
    check_fp8(like, rows, 1152, 896, static=static, bias=True)
    check_fp8(like, rows, 960, 576, static=static)
    check_fp8(like, rows, 72, 200, static=static)


@pytest.mark.parametrize("rows", ROWS)
def test_fp8_blocks(rows):
    check_fp8_blocks(HALVES[0], rows, 1152, 896)


@pytest.mark.parametrize("like", HALVES, ids=str)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("rows, width", [(1, 4096), (300, 14336), (17, 896)])
def test_fused_quantization(like, static, rows, width):
    check_fused_quantization(like, rows, width, static)
