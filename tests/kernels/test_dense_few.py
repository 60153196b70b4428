"""Products of few rows with dense weights, interpreted: what the layouts say is checked when they are compiled."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from layoutless import interpreted

from kernels import dense_few, linear
from kernels.dense_few import Tile

HALF = torch.empty(0, dtype=torch.float16)
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(scope="module")
def kernels():
    with pytest.MonkeyPatch.context() as patch:
        yield interpreted("kernels.dense_few", patch)


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("tile", [Tile(1, 16, 32, 1), Tile(4, 32, 64, 2), Tile(8, 64, 32, 3), Tile(8, 16, 128, 2)])
def test_rows_and_tiles(kernels, rows, tile):
    """Seven blocks of 128: none of most tiles' turns come out even. Strided rows, a bias, an output that is given."""
    x = torch.randn(rows, 912).half()[:, :896]
    weight, bias = torch.randn(192, 896).half() / 30, torch.randn(192).half()
    exact = x.double() @ weight.double().t()
    for b, out in ((bias, None), (None, torch.empty(rows, 192).half())):
        got = kernels.product(x, weight, b, tile, out)
        want = exact + (0 if b is None else b.double())
        assert got.dtype == torch.float16
        assert out is None or got is out
        assert float((got.double() - want).norm() / want.norm()) < 5e-4


def test_who_takes_a_row(monkeypatch):
    for features, depth in ((6144, 4096), (4096, 4096), (4096, 14336), (1536, 8960)):
        tile = dense_few.tile_of(1, features, depth)
        assert tile is not None
        assert not features % tile.outputs and not depth % tile.inputs
    assert dense_few.tile_of(2, 4096, 4096) is None
    assert dense_few.tile_of(1, 28672, 4096) is None
    assert dense_few.tile_of(1, 4096, 4160) is None
    assert dense_few.tile_for(torch.zeros(1, 128).half(), torch.zeros(16, 128).half()) is None      # no Hopper
    taken = []
    monkeypatch.setattr(dense_few, "processors", lambda device: 132)
    monkeypatch.setattr(dense_few, "product", lambda *args: taken.append(args))
    monkeypatch.setattr(linear, "_tile", lambda *args, **options: None)
    for rows, features in ((1, 4096), (1, 512), (2, 4096)):         # large; small; two rows
        linear.linear(torch.zeros(rows, 2048).half(), torch.zeros(features, 2048).half(), None, None)
    assert len(taken) == 1
