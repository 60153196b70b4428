"""All products between two attentions by an emulator of their kernel's partitions (tests/gpu/test_linear.py has a GPU)."""

from __future__ import annotations

import sys
import time

import pytest
import torch
from partitions import SECONDS, Pointer, emulated, gate

from kernels import chain, ref
from kernels.split_k import counters


def awaited(counter: Pointer, count: int) -> None:
    """Until so many have signed; no instruction of the chip's is needed for that here."""
    until = time.monotonic() + SECONDS
    while int(counter.base[int(counter.at)]) < count:
        assert time.monotonic() < until, "deadlock"
        time.sleep(1e-3)


chips = 4       # multiprocessors
emulated_chain = emulated(chain, "_chain_kernel", together=True, processors=lambda device: chips, gate=gate, SMALL_BYTES=0,
                          _await=awaited, _fence=lambda pointer: None)


@pytest.mark.parametrize("programs, rows, heads, hidden, inner, qkv, activation, plus_one", [
    (4, 9, 256, 256, 512, 384, "silu", False),
    (4, 20, 512, 256, 384, 0, "gelu_tanh", True),
    (4, 64, 128, 384, 512, 256, "silu", True),
    (3, 12, 256, 128, 384, 16, "silu", False),      # of o, down and qkv there is nothing left for the third
])
def test_between(programs, rows, heads, hidden, inner, qkv, activation, plus_one, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "chips", programs)
    monkeypatch.setattr(chain, "LEAST_BUSY", 0.6)
    generator = torch.Generator().manual_seed(rows)

    def draw(*shape):
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).half()

    h, residual = draw(rows, heads) * 16, draw(rows, hidden) * 16
    o, gate_up, down = draw(hidden, heads), draw(2 * inner, hidden), draw(hidden, inner)
    mlp_norm, norm = draw(hidden), draw(hidden)
    into = draw(qkv, hidden) if qkv else None
    exact = residual.double()
    want = ref.between(h.double(), exact, o.double(), mlp_norm.double(), gate_up.double(), down.double(), norm.double(),
                       None if into is None else into.double(), 1e-5, plus_one, activation)
    got = emulated_chain.between(h, residual, o, mlp_norm, gate_up, down, norm, into, 1e-5, plus_one, activation)
    assert got is not None and got.shape == want.shape
    assert float((residual.double() - exact).norm() / exact.norm()) < 1e-3
    assert float((got.double() - want).norm() / want.norm()) < 2e-3
    assert not counters(h.device).any()


def test_shapes_are_cut_among_programs():
    """Each of four weights covered once by (tiles, splits), as many programs as there are or fewer."""
    def shapes(hidden, inner, heads, qkv):
        return tuple(map(torch.Size, ((hidden, heads), (2 * inner, hidden), (hidden, inner), (qkv, hidden))))

    for hidden, inner, heads, qkv in ((4096, 14336, 4096, 6144), (4096, 12288, 4096, 6144), (3072, 8192, 3072, 5120)):
        programs, cuts = chain.cuts_of(shapes(hidden, inner, heads, qkv), 132)
        assert 119 <= programs <= 132
        for (features, depth), (rows, splits, blocks) in zip(shapes(hidden, inner, heads, qkv), cuts, strict=True):
            halves = 2 if features == 2 * inner else 1
            assert features % (rows * halves) == 0 and rows <= 128 and splits * blocks * 128 == depth
            assert features // (rows * halves) * splits <= programs and programs % splits == 0
    assert chain.cuts_of(shapes(5120, 13824, 5120, 7168), 132) is None     # for 108 programs
    assert chain.cuts_of(shapes(3584, 18944, 3584, 4608), 132) is None     # for more than there are
    assert chain.cuts_of(shapes(4096, 11520, 4096, 6144), 132) is None     # o for 64 of 120
    assert chain.cuts_of(shapes(4096, 14336, 4096, 6144), 114) is None     # o for 64 of 112
