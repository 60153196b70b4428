"""Decode steps from registers: their Gluon kernel interpreted without layouts, in fp16 and FP8, against float64."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from attention_cases import rope_and_decode_error
from layoutless import interpreted
from quantized_products import mend_interpreted_casts

from kernels import decode_step

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(scope="module")
def kernels():
    with pytest.MonkeyPatch.context() as patch:
        few = interpreted("kernels.decode_few", patch)
        patch.setattr(few, "takes", lambda *args: True)
        patch.setattr(decode_step, "decode_few", few)
        yield few


@pytest.fixture
def ways(kernels, monkeypatch):
    def take(*way: int) -> None:
        monkeypatch.setattr(kernels, "way_of", lambda *args: kernels.Way(*way))
    take(2, 1, 1)
    return take


@pytest.mark.parametrize("heads, kv_heads, dim, rotary, norm", [
    (8, 2, 64, 64, False), (4, 1, 128, 32, True), (2, 2, 128, 128, True), (16, 1, 64, 64, False), (9, 1, 128, 128, False)])
def test_heads(ways, heads, kv_heads, dim, rotary, norm):
    found = rope_and_decode_error(decode_step, [1, 2, 64, 65, 77, 300], heads, kv_heads, dim, 16, torch.float16, "cpu",
                                  rotary=rotary, norm=norm)
    assert found < 2e-3


@pytest.mark.parametrize("way", [(1, 1, 1), (4, 1, 2), (2, 2, 1), (4, 2, 2), (8, 1, 1)])
@pytest.mark.parametrize("page", [16, 48])
def test_ways_and_pages(ways, way, page):
    """Warps, groups, turns ahead: turns are left over, whole ones and parts. Clusters: tests/gpu/test_decode_step.py."""
    ways(*way)
    found = rope_and_decode_error(decode_step, [1, 300, 64, 65, 129, 31], 2, 1, 64, page, torch.float16, "cpu")
    assert found < 2e-3


@pytest.mark.parametrize("window, most", [(0, 4096), (50, 50), (5000, 4096)])
def test_the_rule_counts_the_keys_that_a_row_sees(kernels, monkeypatch, window, most):
    asked = []
    monkeypatch.setattr(kernels, "way_of", lambda *args: asked.append(args[-1]) or kernels.Way(1, 1, 1))
    rope_and_decode_error(decode_step, [20], 1, 1, 64, 16, torch.float16, "cpu", window)
    assert asked == [most]


@pytest.mark.parametrize("window", [1, 50, 128, 1000])
def test_window(ways, window):
    found = rope_and_decode_error(decode_step, [1, 49, 50, 51, 400, 129], 3, 1, 64, 32, torch.float16, "cpu", window)
    assert found < 2e-3


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("heads, dim, groups", [(8, 64, 1), (8, 128, 2), (40, 64, 1)])
def test_fp8_cache(ways, monkeypatch, shifted, heads, dim, groups):
    mend_interpreted_casts(monkeypatch)
    ways(2, groups, 1)
    found = rope_and_decode_error(decode_step, [1, 33, 200], heads, 4, dim, 16, torch.float16, "cpu", fp8=True, shifted=shifted)
    assert found < 2e-3


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("way", [(1, 1, 1), (4, 2, 1), (2, 1, 2)])
def test_prefixes_that_rows_share(ways, monkeypatch, way, fp8):
    """Of 5 pages and of 1; some rows have no key of their own but the new one, one row shares nothing."""
    mend_interpreted_casts(monkeypatch)
    ways(*way)
    contexts = [81, 200, 96, 3, *[20 + i for i in range(8)]]
    found = rope_and_decode_error(decode_step, contexts, 8, 2, 64, 16, torch.float16, "cpu", fp8=fp8,
                                  groups=[(0, 3, 5), (4, 12, 1)])
    assert found < 2e-3


def test_what_is_for_it(monkeypatch):
    from kernels import decode_few

    monkeypatch.setattr(decode_few, "processors", lambda device: 132)

    def taken(dtype, stored, heads=32, dim=128, page=32, softcap=0.0):
        return decode_few.takes(torch.empty(2, 8, dtype=dtype), torch.empty(3, 8, page, dim, dtype=stored), heads, softcap)

    half, e4m3 = torch.bfloat16, torch.float8_e4m3fn
    assert taken(half, half) and taken(half, e4m3) and taken(torch.float16, torch.float16, heads=128, dim=64, page=48)
    assert not taken(torch.float32, torch.float32)
    assert not taken(half, half, heads=160) and not taken(half, half, dim=80) and not taken(half, half, page=8)
    assert not taken(half, half, softcap=30.0)
    monkeypatch.setattr(decode_few, "ENABLED", False)
    assert not taken(half, half)
