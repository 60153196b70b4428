"""Products of 1 to 8 rows: their Gluon kernels interpreted without layouts, against float64."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
import torch
from layoutless import interpreted, run_ptx
from quantized_products import (
    check_few_fp8,
    check_few_w4,
    check_fp8,
    check_fp8_blocks,
    check_gated,
    check_integer,
    mend_interpreted_casts,
)

from kernels import gemm_few, gemm_fp8, gemm_w4
from kernels.gemm_few import Tile

HALF = torch.empty(0, dtype=torch.float16)
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(scope="module")
def kernels():
    with pytest.MonkeyPatch.context() as patch:
        yield interpreted("kernels.gemm_few", patch)


@pytest.mark.parametrize("group", [32, 64, 128, 256, 768])
@pytest.mark.parametrize("zeros", ["whole", "none", "broken"])
def test_groups_and_zeros(kernels, group, zeros):
    check_few_w4(kernels, HALF, 3, 64, 768, group, Tile(4, 16, 1), zeros=zeros)


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize("tile", [Tile(1, 16, 1), Tile(4, 32, 2), Tile(8, 64, 3), Tile(16, 16, 2)])
def test_rows_and_tiles(kernels, rows, tile):
    """Seven blocks: more or fewer than the warps, and none of the tiles' turns come out even."""
    check_few_w4(kernels, HALF, rows, 192, 896, 128, tile, bias=True)
    check_few_fp8(kernels, HALF, rows, 192, 896, tile, bias=True)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("width, tile", [(48, Tile(4, 32, 1)), (160, Tile(2, 64, 2))])
def test_gated(kernels, activation, width, tile):
    """The upper half begins within a unit of 128 packed rows."""
    check_few_w4(kernels, HALF, 4, 2 * width, 512, 128, tile, bias=True, activation=activation)
    check_few_fp8(kernels, HALF, 4, 2 * width, 512, tile, bias=True, activation=activation)
    check_few_fp8(kernels, HALF, 3, 2 * width, 512, Tile(4, 16, 1), bias=True, activation=activation)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("tile", [Tile(2, 16, 1), Tile(4, 64, 2), Tile(8, 128, 1)])
def test_fp8_blocks(kernels, rows, tile):
    check_few_fp8(kernels, HALF, rows, 256, 640, tile, blocks=True)


@pytest.mark.parametrize("kind, dtype", [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_unpacking_is_exact(kernels, kind, dtype):
    """All words of two codes, all zeros: the difference of integers."""
    codes = np.arange(1 << 16, dtype=np.uint32)
    words = codes | codes[::-1] << 16
    for code in range(4):
        for zero in (0, 1, 8, 16, 127):
            up = kind == "f16" and code % 2 == 1
            bits = torch.tensor(-64.0 - zero if up else zero + (1024.0 if kind == "f16" else 128.0)).to(dtype).view(torch.int16)
            less = np.full_like(words, (int(bits) & 0xFFFF) * 0x10001)
            done = run_ptx(kernels._unpacking(kind, code), {"$2": words, "$3": words[::-1].copy(), "$4": less})
            for out, given in ((done["$0"], words), (done["$1"], words[::-1])):
                got = torch.from_numpy(out.view(np.int16).copy()).view(dtype)
                want = (given.view(np.uint16) if given.flags.c_contiguous else given.copy().view(np.uint16)) >> 4 * code & 15
                assert torch.equal(got.double(), torch.from_numpy(want.astype(np.float64)) - zero)


@pytest.fixture
def on_hopper(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "processors", lambda device: 132)
    for module in (gemm_w4, gemm_fp8):
        monkeypatch.setattr(module, "gemm_few", kernels)


@pytest.mark.parametrize("rows, inputs, group", [(8, 256, 64), (8, 192, 192), (9, 256, 64), (3, 256, 256)])
def test_ops_are_their_twins_whatever_the_rule_says(on_hopper, rows, inputs, group):
    check_integer(HALF, 4, rows, 96, inputs, group, bias=True, perm=True)
    check_gated(HALF, rows, 96, inputs, group)


def test_fp8_ops_are_their_twins(on_hopper, monkeypatch):
    mend_interpreted_casts(monkeypatch)
    check_fp8(HALF, 5, 64, 256, static=True, bias=True)
    check_fp8(HALF, 5, 64, 160)         # for the other kernel
    check_fp8_blocks(HALF, 3, 128, 256)


@pytest.mark.parametrize("rows, inputs, taken", [(8, 256, True), (9, 256, False), (8, 192, False)])
def test_few_rows_go_to_their_kernels(on_hopper, kernels, monkeypatch, rows, inputs, taken):
    calls = []
    for name in ("w4_product", "fp8_product"):
        own = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *args, own=own, **options: calls.append(own) or own(*args, **options))
    mend_interpreted_casts(monkeypatch)
    check_integer(HALF, 4, rows, 64, inputs, 64)
    check_gated(HALF, rows, 64, inputs, 64)
    check_fp8(HALF, rows, 64, inputs)
    assert len(calls) == (7 if taken else 0)        # check_integer multiplies four times
    calls.clear()
    check_integer(HALF, 8, rows, 64, inputs, 64)
    check_integer(HALF.float(), 4, rows, 64, inputs, 64)
    assert calls == []


def test_the_rule_gives_tiles_that_divide_the_weight():
    for features, depth in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (1152, 896), (896, 4864), (37888, 3584)):
        for bits, gated in ((4, False), (4, True), (8, False), (8, True)):
            tile = gemm_few.tile_of(1, features, depth, bits, gated)
            assert tile is not None
            assert features % tile.outputs == 0
            assert tile.outputs >= 32 or not gated or bits == 8     # packed rows stand in tiles of 16
            blocks = depth // 128
            assert blocks % (tile.warps * tile.ahead) == 0 or tile.ahead == 1


def test_the_rule_leaves_the_rest_to_other_kernels():
    assert gemm_few.tile_of(9, 4096, 4096, 4) is None
    assert gemm_few.tile_of(0, 4096, 4096, 4) is None
    assert gemm_few.tile_of(1, 576, 576, 4) is None         # K is no multiple of 128
    assert gemm_few.tile_of(1, 4100, 4096, 4) is None
    assert gemm_few.tile_of(1, 1040, 1024, 4, gated=True) is None       # half of it is no multiple of 16
    assert not gemm_few.processors(torch.device("cpu"))
