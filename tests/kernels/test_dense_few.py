"""Products of one row and of few with dense weights, interpreted: what the layouts say is checked when they are compiled."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from layoutless import interpreted

from kernels import dense_few, dense_row, linear, ref

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(scope="module")
def modules():
    with pytest.MonkeyPatch.context() as patch:
        yield {name: interpreted(f"kernels.{name}", patch) for name in ("dense_few", "dense_row")}


def check(kernels, rows, tile):
    """Strided rows, a bias, an output that is given, and gated ones. No tile's turns come out even. Three tiles or more: every
    program is interpreted."""
    features = min(192, 6 * tile.outputs)
    x = torch.randn(rows, 928).half()[:, :896] if kernels.__name__.endswith("few") else torch.randn(rows, 1792).half()
    weight, bias = torch.randn(features, x.shape[1]).half() / 30, torch.randn(features).half()
    exact = x.double() @ weight.double().t()
    for b, activation, out in ((bias, "", None), (None, "", torch.empty(rows, features).half()), (bias, "silu", None),
                               (None, "gelu_tanh", None)):
        got = kernels.product(x, weight, b, tile, activation, out)
        want = exact + (0 if b is None else b.double())
        want = ref.gated_act(want.half(), activation).double() if activation else want
        assert got.dtype == torch.float16
        assert out is None or got is out
        assert float((got.double() - want).norm() / want.norm()) < (2e-3 if activation else 5e-4)


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("tile", [(1, 16, 32, 1), (4, 32, 64, 2), (8, 64, 32, 3), (8, 16, 128, 2)])
def test_few_rows(modules, rows, tile):
    check(modules["dense_few"], rows, dense_few.Tile(*tile))


@pytest.mark.parametrize("tile", [(1, 2, 1), (4, 4, 2), (8, 8, 3), (16, 8, 1)])
def test_one_row(modules, tile):
    check(modules["dense_row"], 1, dense_row.Tile(*tile))


@pytest.mark.parametrize("features, depth", [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (17920, 1536),
                                             (1536, 8960)])
def test_the_rules_give_tiles_that_divide_the_weight(features, depth):
    row = linear.choose_row(1, features, depth)
    assert row is not None
    assert not features % (2 * row.outputs) and not depth % dense_row.DEPTH
    few = linear.choose_few(8, features, depth)
    assert few is not None
    assert not features % (2 * few.outputs) and not depth % few.depth
    assert linear.choose_row(2, features, depth) is None
    assert linear.choose_few(9, features, depth) is None


def test_what_is_left_to_other_kernels():
    assert linear.choose_row(1, 1152, 896) is None      # small
    assert linear.choose_row(1, 9728, 896) is None      # no multiple of 256
    assert linear.choose_few(1, 9728, 896) is not None
    assert linear.choose_few(1, 9728, 928) is None
    assert not dense_few.takes(torch.zeros(1, 128).half())      # no Hopper


def test_rows_go_to_their_kernels(monkeypatch):
    calls = []
    for kernels in (dense_row, dense_few):
        monkeypatch.setattr(kernels, "product", lambda *args, name=kernels.__name__: calls.append(name) or args[0])
    monkeypatch.setattr(dense_few, "processors", lambda device: 132)
    monkeypatch.setattr(linear, "_processors", lambda device: 132)
    monkeypatch.setattr(linear, "choose", lambda *args: None)
    for rows, features in ((1, 4096), (1, 512), (2, 4096)):         # large; small; two rows
        linear.linear(torch.zeros(rows, 2048).half(), torch.zeros(features, 2048).half(), None, None)
    linear.gated_linear(torch.zeros(1, 2048).half(), torch.zeros(8192, 2048).half(), None, "silu")
    assert calls == ["kernels.dense_row", "kernels.dense_few", "kernels.dense_row"]
