"""Products with 4-bit weights through a ring of shared memory by an emulator of their partitions."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from partitions import emulated, gate
from quantized_products import ROUNDING, error, integer_layer

from kernels import gemm_w4, gemm_w4_ring, hopper, ref
from kernels.gemm_w4_ring import Tile

ring = emulated(gemm_w4_ring, "_product_kernel", gate=gate)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tile", [Tile(64, 1, 3, 1), Tile(64, 2, 4, 1), Tile(128, 1, 2, 1), Tile(128, 3, 5, 2),
                                  Tile(256, 1, 4, 1), Tile(256, 2, 3, 1)])
@pytest.mark.parametrize("rows, group, zeros, bias", [
    (9, 128, "whole", False), (33, 256, "whole", True), (64, 896, "none", False), (16, 128, "none", True),
    (100, 128, "whole", False),
])
def test_rows_groups_and_tiles(rows, group, zeros, bias, tile, dtype):
    like = torch.empty(0, dtype=dtype)
    depth = 768 if group == 256 else 896
    codes, scales, zero, exact = integer_layer(like, 4, 512, depth, group, zeros)
    x, shift = torch.randn(rows, depth + 16).to(dtype)[:, :depth], torch.randn(512).to(dtype) if bias else None
    got = ring.product(x, gemm_w4.w4_pack(codes), scales, zero, group, shift, tile)
    assert got.dtype == dtype
    assert error(got, x.double() @ exact.t() + (0 if shift is None else shift.double())) < ROUNDING[dtype]
    assert not bool(gemm_w4.counters(x.device).any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows, group, zeros, activation, stages", [
    (9, 128, "whole", "silu", 2), (50, 896, "none", "gelu_tanh", 3), (64, 128, "whole", "silu", 5),
])
def test_gated_products(rows, group, zeros, activation, stages, dtype):
    """Halves that begin in the middle of a unit of packed weights, and at one's start."""
    like = torch.empty(0, dtype=dtype)
    for features in (384, 512):
        codes, scales, zero, exact = integer_layer(like, 4, features, 896, group, zeros)
        x = torch.randn(rows, 896).to(dtype)
        got = ring.product(x, gemm_w4.w4_pack(codes), scales, zero, group, None, Tile(128, 1, stages, 2), activation)
        want = ref.gated_act((x.double() @ exact.t()).to(dtype), activation)
        assert got.shape == want.shape and got.dtype == dtype
        assert error(got, want.double()) < 2 * ROUNDING[dtype]


@pytest.mark.parametrize("rows", [9, 16, 33, 64, 100, 128])
@pytest.mark.parametrize("features, depth", [(4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (256, 256), (128, 128),
                                             (37888, 3584)])
def test_tiles_fit(rows, features, depth):
    gated = gemm_w4_ring.tile_of(rows, features, depth, 132, gated=True)
    assert (gated is not None) == (features // 128 >= 132 and rows <= 64)
    assert gated is None or 1 < gated.stages <= depth // 128
    tile = gemm_w4_ring.tile_of(rows, features, depth, 132)
    if tile is None:
        assert features // 128 >= 132 and 32 < rows <= 64
        return
    assert not features % tile.outputs and tile.splits >= 1 and tile.splits * tile.turns <= depth // 128
    assert (tile.outputs, tile.programs) in gemm_w4_ring.REGISTERS
    assert tile.turns < tile.stages <= gemm_w4_ring.most_stages(rows, tile.outputs, tile.programs)
    assert rows <= 64 or tile.programs == 1


@pytest.mark.parametrize("tile", [Tile(128, 3, 2, 1), Tile(64, 2, 3, 1), Tile(64, 1, 2, 1), Tile(128, 1, 1, 1)])
def test_what_would_wait_for_ever_is_refused(tile):
    codes, scales, zero, _ = integer_layer(torch.empty(0, dtype=torch.bfloat16), 4, 128, 256, 128, "whole")
    with pytest.raises(AssertionError):
        ring.product(torch.zeros(16, 256).bfloat16(), gemm_w4.w4_pack(codes), scales, zero, 128, None, tile)


def test_what_the_ring_cannot_copy_goes_elsewhere(monkeypatch):
    for module in (hopper, gemm_w4_ring):
        monkeypatch.setattr(module, "processors", lambda device: 132)
    x, scales = torch.zeros(16, 256).bfloat16(), torch.ones(2, 256).bfloat16().t()
    zeros = torch.zeros(2, 256, dtype=torch.uint8).t()
    assert gemm_w4_ring.tile_for(x, scales, zeros, 128) == gemm_w4_ring.tile_for(x, scales, None, 128)
    assert gemm_w4_ring.tile_for(x, scales, None, 128) is not None
    for others in ((x, scales.half(), None, 128), (x, scales.contiguous(), None, 128), (x, scales, zeros.bfloat16(), 128),
                   (x, scales, None, 64), (x[:8], scales, None, 128), (x.float(), scales.float(), None, 128)):
        assert gemm_w4_ring.tile_for(*others) is None
