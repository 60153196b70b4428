"""Products with quantised weights as compiled for this GPU, against float64, and in a CUDA graph."""

from __future__ import annotations

import functools

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)

from quantized_products import (
    ROUNDING,
    check_few_fp8,
    check_few_w4,
    check_fp8,
    check_fp8_blocks,
    check_fp8_gated,
    check_fused_quantization,
    check_gated,
    check_integer,
    error,
    integer_layer,
    randn,
)

from kernels import gemm_few, gemm_fp8_ring, gemm_w4, gemm_w4_ring, ops, ref
from kernels.quantize import fp8_quantize, quantize_blocks

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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_many_rows_that_are_added_at_once(dtype):
    """On Hopper, by the rule of gemm_many.py."""
    check_integer(torch.empty(0, dtype=dtype, device="cuda"), 4, 4096, 4096, 512, 128)


TILES = [gemm_few.Tile(warps, outputs, ahead, registers) for warps in (1, 4, 8, 16) for outputs in (16, 32, 64)
         for ahead in (1, 2, 4) for registers in (0, 64) if outputs * ahead <= 64]
HOPPER = pytest.mark.skipif(torch.cuda.get_device_capability()[0] != 9, reason="these kernels are for Hopper")


@HOPPER
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: "-".join(map(str, tile)))
def test_tiles_of_few_rows(tile):
    """Shapes whose blocks do not come out even for most tiles, strided rows, scales and zeros of all kinds."""
    for like, rows, group, zeros in zip(HALVES * 4, (1, 2, 3, 8, 7, 8, 5, 1), (128, 32, 64, 1664, 128, 128, 64, 32),
                                        ("whole", "whole", "none", "whole", "none", "broken", "broken", "none"), strict=True):
        check_few_w4(gemm_few, like, rows, 1152, 1664, group, tile, zeros=zeros, bias=rows != 3)
    for like, rows in zip(HALVES * 2, (1, 8, 3, 6), strict=True):
        check_few_fp8(gemm_few, like, rows, 1152, 1664, tile, bias=True)
        check_few_fp8(gemm_few, like, rows, 1152, 1664, tile, blocks=True)
        check_few_fp8(gemm_few, like, rows, 2 * 480, 1664, tile, bias=True, activation="silu")
        check_few_fp8(gemm_few, like, rows, 2 * 480, 1664, tile, activation="gelu_tanh")
        if tile.outputs >= 32:      # packed rows stand in tiles of 16
            check_few_w4(gemm_few, like, rows, 2 * 480, 1664, 128, tile, bias=rows == 3, activation="silu")
            check_few_w4(gemm_few, like, rows, 2 * 480, 1664, 128, tile, activation="gelu_tanh")


RINGS = [gemm_w4_ring.Tile(outputs, splits, min(stages, gemm_w4_ring.most_stages(64, outputs, programs)), programs)
         for outputs, programs in gemm_w4_ring.REGISTERS for splits in (1, 3) for stages in (3, 8)]


@HOPPER
@pytest.mark.parametrize("tile", RINGS, ids=lambda tile: "-".join(map(str, tile)))
@pytest.mark.parametrize("like", HALVES, ids=str)
def test_tiles_of_the_w4_ring(like, tile):
    for rows, group, zeros in ((9, 128, "whole"), (16, 1664, "none"), (33, 128, "none"), (64, 128, "whole")):
        codes, scales, zero, exact = integer_layer(like, 4, 1024, 1664, group, zeros)
        x, bias = randn(rows, 1680, like=like)[:, :1664], randn(1024, like=like)
        got = gemm_w4_ring.product(x, gemm_w4.w4_pack(codes), scales, zero, group, bias, tile)
        assert error(got, x.double() @ exact.t() + bias.double()) < ROUNDING[like.dtype]
        again = gemm_w4_ring.product(x, gemm_w4.w4_pack(codes), scales, zero, group, bias, tile)
        assert torch.equal(got, again)


@HOPPER
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("stages", [2, 4, 8])
@pytest.mark.parametrize("like", HALVES, ids=str)
def test_gated_products_of_the_w4_ring(like, stages, activation):
    """Halves that begin in the middle of a unit of packed weights, and at one's start."""
    for rows, group, zeros in ((9, 128, "whole"), (16, 1664, "none"), (33, 128, "none"), (64, 128, "whole")):
        tile = gemm_w4_ring.Tile(128, 1, min(stages, gemm_w4_ring.most_stages(rows, 128, 2)), 2)
        for features in (384, 1024):
            codes, scales, zero, exact = integer_layer(like, 4, features, 1664, group, zeros)
            x = randn(rows, 1680, like=like)[:, :1664]
            got, again = (gemm_w4_ring.product(x, gemm_w4.w4_pack(codes), scales, zero, group, None, tile, activation)
                          for _ in range(2))
            want = ref.gated_act((x.double() @ exact.t()).to(like.dtype), activation).double()
            assert error(got, want) < 2 * ROUNDING[like.dtype]
            assert torch.equal(got, again)


spread = functools.partial(torch.repeat_interleave, repeats=128)
FP8_RINGS = [gemm_fp8_ring.Tile(splits, min(stages, gemm_fp8_ring.most_stages(128, programs, True)), programs)
             for programs in gemm_fp8_ring.REGISTERS for splits in (1, 3) for stages in (3, 8)]


@HOPPER
@pytest.mark.parametrize("tile", FP8_RINGS, ids=lambda tile: "-".join(map(str, tile)))
@pytest.mark.parametrize("like", HALVES, ids=str)
def test_tiles_of_the_fp8_ring(like, tile):
    for rows in (9, 16, 33, 64) if tile.programs == 2 else (9, 33, 128):
        x, weight, bias = randn(rows, 1680, like=like)[:, :1664], randn(1024, 1664, like=like) / 40, randn(1024, like=like)
        codes, scales = ref.fp8_quantize(x)
        rows8, scales8 = ref.fp8_quantize(weight)
        want = (codes.double() * scales.double()) @ (rows8.double() * scales8.double()).t() + bias.double()
        got = gemm_fp8_ring.product(codes, scales, rows8, scales8.flatten(), bias, like.dtype, tile)
        assert error(got, want) < 2 * ROUNDING[like.dtype]         # the tensor cores' sums of 128 have 14 bits
        again = gemm_fp8_ring.product(codes, scales, rows8, scales8.flatten(), bias, like.dtype, tile)
        assert torch.equal(got, again)
        codes, scales = quantize_blocks(x, 128)
        scales8 = torch.rand(8, 13, device=x.device) + 0.5
        exact = rows8.double() * spread(spread(scales8.double(), dim=0), dim=1)
        want = (codes.double() * spread(scales.double(), dim=1)) @ exact.t()
        got = gemm_fp8_ring.product(codes, scales, rows8, scales8, None, like.dtype, tile)
        assert error(got, want) < 2 * ROUNDING[like.dtype]


@HOPPER
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("stages", [2, 3, 8])
@pytest.mark.parametrize("like", HALVES, ids=str)
def test_gated_products_of_the_fp8_ring(like, stages, activation):
    for rows in (9, 16, 33, 64):
        tile = gemm_fp8_ring.Tile(1, min(stages, gemm_fp8_ring.most_stages(rows, 2, parts=2)), 2)
        for features in (384, 1024):
            codes, scales = ref.fp8_quantize(randn(rows, 1664, like=like))
            rows8, scales8 = ref.fp8_quantize(randn(features, 1664, like=like) / 40)
            x = torch.cat([codes, codes], dim=1)[:, :1664]              # strided
            got, again = (gemm_fp8_ring.product(x, scales, rows8, scales8.flatten(), None, like.dtype, tile, activation)
                          for _ in range(2))
            exact = (codes.double() * scales.double()) @ (rows8.double() * scales8.double()).t()
            want = ref.gated_act(exact.to(like.dtype), activation).double()
            assert error(got, want) < 4 * ROUNDING[like.dtype]          # each sum of 128 has 14 bits, and there are two
            assert torch.equal(got, again)


@HOPPER
@pytest.mark.parametrize("rows", [9, 16, 33, 64])
def test_overlapping_rings_change_nothing(rows, monkeypatch):
    """A chain in a graph whose every kernel reads what the one before has just written, into memory used again and again."""
    like, depth, wide = HALVES[0], 1024, 2048
    layers = []
    for _ in range(10):
        codes, scales, zero, _ = integer_layer(like, 4, depth, wide, 128, "whole")
        gate_up, gate_up_scales = ref.fp8_quantize(randn(2 * wide, depth, like=like) / 32)
        layers.append((gate_up, gate_up_scales.flatten(), gemm_w4.w4_pack(codes), scales, zero))
    first, start, scale = randn(rows, depth, like=like), randn(rows, depth, like=like), randn(depth, like=like)

    def chain():
        x, residual = first, start.clone()
        for gate_up, gate_up_scales, *down in layers:
            h = ops.add_rms_norm(x, residual, scale, 1e-5)
            h = gemm_fp8_ring.product(*fp8_quantize(h), gate_up, gate_up_scales, None, like.dtype, gemm_fp8_ring.Tile(3, 3, 2))
            h = ops.gated_act(h, "silu")
            x = gemm_w4_ring.product(h, *down, 128, None, gemm_w4_ring.Tile(128, 5, 3, 2))
        return torch.cat([x, residual])

    with monkeypatch.context() as patch:
        for kernels in (gemm_fp8_ring, gemm_w4_ring):
            patch.setattr(kernels, "overlaps", lambda device: False)
        alone = chain()
    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    for _ in range(50):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, alone)
    assert not gemm_fp8_ring.counters(like.device).any()


@HOPPER
@pytest.mark.parametrize("like", HALVES, ids=str)
def test_rings_of_many_rows(like):
    x = randn(100, 4096, like=like)
    codes, scales, zero, exact = integer_layer(like, 4, 6144, 4096, 128, "whole")
    tile = gemm_w4_ring.tile_for(x, scales, zero, 128)
    assert tile is not None
    got = gemm_w4_ring.product(x, gemm_w4.w4_pack(codes), scales, zero, 128, None, tile)
    assert error(got, x.double() @ exact.t()) < ROUNDING[like.dtype]
    assert gemm_fp8_ring.tile_for(fp8_quantize(x)[0], 6144, like.dtype, False) is not None
    check_fp8(like, 100, 6144, 4096)


@pytest.mark.parametrize("like", HALVES, ids=str)
@pytest.mark.parametrize("rows", [1, 8, 9, 50, 200, 700])
def test_gated(like, rows):
    check_gated(like, rows, 2 * 896, 896, 128)
    check_gated(like, rows, 2 * 4864, 896, 64)
    check_gated(like, rows, 2 * 8960, 1536, 128)
    check_fp8_gated(like, rows, 2 * 8960, 1536)
    check_fp8_gated(like, rows, 2 * 896, 896, static=True)


@pytest.mark.parametrize("rows", [1, 8, 16])
def test_the_same_bits_again_and_in_a_graph(rows):
    like = HALVES[0]
    packed = gemm_w4.w4_pack(torch.randint(0, 16, (4096, 4096), dtype=torch.uint8, device="cuda"))
    scales = torch.rand(32, 4096, device="cuda").to(like.dtype).t()
    x = torch.randn(rows, 4096, device="cuda").to(like.dtype)
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
