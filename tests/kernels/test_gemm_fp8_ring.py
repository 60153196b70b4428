"""Products of e4m3 numbers through a ring of shared memory by an emulator of their partitions (tests/gpu runs them on a GPU)."""

from __future__ import annotations

import pytest
import torch
from partitions import emulated, gate

from kernels import gemm_fp8_ring, hopper, ref
from kernels.gemm_fp8_ring import Tile

ring = emulated(gemm_fp8_ring, "_product_kernel", gate=gate)


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("tile", [Tile(1, 3, 1), Tile(1, 4, 2), Tile(2, 4, 2), Tile(3, 5, 1)])
@pytest.mark.parametrize("rows, bias", [(9, False), (16, True), (40, True), (128, False)])
def test_scales_and_tiles(rows, bias, tile, blocks):
    x, weight = torch.randn(rows, 640), torch.randn(384, 640)
    x[3] *= 1000
    if blocks:
        x_scales = x.view(rows, 5, 128).abs().amax(-1) / ref.E4M3_MAX
        x = (x.view(rows, 5, 128) / x_scales[:, :, None]).view(rows, 640).to(torch.float8_e4m3fn)
    else:
        x, x_scales = ref.fp8_quantize(x)
    weight_scales = torch.rand(3, 5) + 0.5 if blocks else torch.rand(384) + 0.5
    weight = weight.to(torch.float8_e4m3fn)
    if blocks:
        want = (x.double().view(rows, 5, 128) * x_scales.double()[:, :, None]).view(rows, -1) @ (
            weight.double().view(3, 128, 5, 128) * weight_scales.double()[:, None, :, None]).view(384, -1).T
    else:
        want = (x.double() * x_scales.double().view(-1, 1)) @ (weight.double() * weight_scales.double()[:, None]).T
    shift = torch.randn(384).bfloat16()
    strided = torch.zeros(rows, 656, dtype=x.dtype)
    strided[:, :640] = x
    got = ring.product(strided[:, :640], x_scales, weight, weight_scales, shift if bias else None, torch.bfloat16, tile)
    want += shift.double() if bias else 0
    assert got.shape == want.shape
    assert float((got.double() - want).norm() / want.norm()) < 4e-3
    assert not gemm_fp8_ring.counters(x.device).any()


@pytest.mark.parametrize("rows, stages, activation", [(9, 2, "silu"), (40, 3, "gelu_tanh"), (64, 4, "silu")])
def test_gated_products(rows, stages, activation):
    x, x_scales = ref.fp8_quantize(torch.randn(rows, 640))
    for features in (128, 384):
        weight, scales = ref.fp8_quantize(torch.randn(features, 640) / 25)
        got = ring.product(x, x_scales, weight, scales.flatten(), None, torch.bfloat16, Tile(1, stages, 2), activation)
        exact = (x.double() * x_scales.double()) @ (weight.double() * scales.double()).T
        want = ref.gated_act(exact.bfloat16(), activation).double()
        assert got.shape == want.shape
        assert float((got.double() - want).norm() / want.norm()) < 4e-3


@pytest.mark.parametrize("rows", [9, 16, 33, 64, 65, 128])
@pytest.mark.parametrize("features, depth", [(28672, 4096), (17920, 1536), (37888, 3584), (6144, 4096), (16896, 4096)])
def test_which_products_are_gated(rows, features, depth):
    tile = gemm_fp8_ring.tile_of(rows, features, depth, 132, gated=True)
    assert (tile is not None) == (features // 128 > 132 and rows <= 64)
    assert tile is None or (tile == Tile(1, tile.stages, 2) and tile.stages > 3)


def test_what_cannot_be_copied_16_bytes_at_a_time_goes_elsewhere(monkeypatch):
    for module in (hopper, gemm_fp8_ring):
        monkeypatch.setattr(module, "processors", lambda device: 132)
    wide, dtype = torch.empty(16, 288, dtype=torch.float8_e4m3fn), torch.bfloat16
    assert gemm_fp8_ring.tile_for(wide[:, :256], 256, dtype, False) == gemm_fp8_ring.tile_for(wide[:, 32:], 256, dtype, False)
    for x in (wide[:, 8:264], torch.empty(16, 264, dtype=wide.dtype)[:, :256], wide[:8, :256], wide[:, :256].float()):
        assert gemm_fp8_ring.tile_for(x, 256, dtype, False) is None
    assert gemm_fp8_ring.tile_for(wide[:, :192], 256, dtype, False) is None        # no whole blocks
    assert gemm_fp8_ring.tile_for(wide[:, :256], 192, dtype, False) is None
    assert gemm_fp8_ring.tile_for(wide[:, :256], 256, torch.float32, False) is None
