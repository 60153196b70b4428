"""Products through a ring of shared memory by an emulator of their partitions (tests/gpu runs them on a GPU)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from partitions import emulated
from torch import Tensor

from kernels import gemm_ring, ref
from kernels.gemm_ring import Tile


def gate(low: Tensor, up: Tensor, gelu: bool, dtype: torch.dtype) -> Tensor:
    act = F.gelu(low, approximate="tanh") if gelu else F.silu(low)
    return (act.to(dtype).float() * up).to(dtype)


ring = emulated(gemm_ring, "_product_kernel", gate=gate)
TILES = [Tile(1, 3, 1), Tile(2, 4, 2), Tile(3, 5, 1)]


def check(x: Tensor, weight: Tensor, want: Tensor, tile: Tile, limit: float, **options: object) -> None:
    got = ring.product(x, weight, options.pop("bias", None), tile, **options)
    assert got.shape == want.shape
    assert float((got.double() - want).norm() / want.norm()) < limit
    assert not gemm_ring.counters(x.device).any()


@pytest.mark.parametrize("dtype, limit", [(torch.float16, 6e-4), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("rows, bias", [(9, False), (16, True), (33, True), (64, False), (100, True), (256, False)])
def test_dense(rows, bias, tile, dtype, limit):
    x = torch.randn(rows, 320 + 64).to(dtype)[:, :320]
    weight, shift = torch.randn(256, 320).to(dtype), torch.randn(256).to(dtype)
    want = x.double() @ weight.double().T + (shift.double() if bias else 0)
    check(x, weight, want, tile, limit, bias=shift if bias else None)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("bias", [False, True])
def test_gated(bias, tile, activation):
    x, weight, shift = torch.randn(20, 256).half(), torch.randn(384, 256).half() / 16, torch.randn(384).half()
    want = ref.gated_linear(x, weight, shift if bias else None, activation)
    check(x, weight, want.double(), tile, 1e-3, bias=shift if bias else None, activation=activation)


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("rows", [9, 40, 128])
def test_fp8(rows, tile, blocks):
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
    check(x, weight, want, tile, 4e-3, x_scales=x_scales, weight_scales=weight_scales, dtype=torch.bfloat16)


def test_what_cannot_be_copied_16_bytes_at_a_time_goes_elsewhere(monkeypatch):
    monkeypatch.setattr(gemm_ring, "processors", lambda device: 132)
    wide = torch.empty(16, 160, dtype=torch.bfloat16)
    assert gemm_ring.tile_for(wide[:, :128], 256, wide.dtype) == gemm_ring.tile_for(wide[:, 32:], 256, wide.dtype)
    for x in (wide[:, 4:132], torch.empty(16, 136, dtype=wide.dtype)[:, :128], wide[:8, :128], wide[:, :128].float()):
        assert gemm_ring.tile_for(x, 256, wide.dtype) is None
    assert gemm_ring.tile_for(wide[:, :96], 256, wide.dtype) is None        # no whole blocks
    assert gemm_ring.tile_for(wide[:, :128], 192, wide.dtype) is None
