"""Products of many rows by an emulator of their partitions (tests/gpu/test_linear.py runs them on a GPU)."""

from __future__ import annotations

import sys

import pytest
import torch
from partitions import activate, emulated
from torch import Tensor

from kernels import gemm_many

programs = 132      # at most
many = emulated(gemm_many, "_product_kernel", processors=lambda device: programs, activate=activate,
                _rounded=lambda x, dtype: x.to(dtype).float())


@pytest.fixture(autouse=True, params=[132, 2], ids=["tile a program", "tiles a program"])
def share(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of one tile, and such as have several."""
    monkeypatch.setattr(sys.modules[__name__], "programs", request.param)


def inputs(m: int, features: int, depth: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x, whose rows are strided, and a weight."""
    generator = torch.Generator().manual_seed(m + features + depth)
    x = torch.randn(m, depth + 8, generator=generator).to(dtype)[:, :depth]
    return x, (torch.randn(features, depth, generator=generator) / depth**0.5).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("m, features, depth", [(1, 256, 256), (150, 512, 256), (300, 256, 512)])
def test_gated(dtype, activation, m, features, depth):
    x, weight = inputs(m, features, depth, dtype)
    longer = torch.full((m + 128, features // 2), float("nan"), dtype=dtype)
    many.gated_product(x, weight, activation, longer[:m])
    gate, up = (x.double() @ weight.double().T).to(dtype).float().chunk(2, 1)
    want = activate(gate, activation != "silu").to(dtype).double() * up
    assert float((longer[:m].double() - want).norm() / want.norm()) < (1e-3 if dtype == torch.float16 else 6e-3)
    assert longer[m:].isnan().all()


@pytest.mark.parametrize("m, features, depth", [(1, 256, 256), (150, 512, 256), (300, 256, 512)])
def test_added(m, features, depth):
    x, weight = inputs(m, features, depth, torch.float16)
    longer = torch.randn(m + 128, features + 8).half()
    want = longer.double()
    want[:m, :features] += (x.double() @ weight.double().T).half()
    many.add_product(x, weight, longer[:m, :features])
    assert float((longer.double() - want).norm() / want.norm()) < 1e-3
    assert torch.equal(longer[m:].double(), want[m:]) and torch.equal(longer[:, features:].double(), want[:, features:])
