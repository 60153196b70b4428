"""The norms and gated activations, interpreted, and their torch twins, against float64."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from kernel_cases import check_gated_act, check_norms

from kernels import pointwise, ref

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("kernels", [pointwise, ref])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("tokens, width", [(1, 576), (5, 80), (3, 1024), (2, 5120)])
def test_norms(kernels, dtype, plus_one, tokens, width):
    check_norms(kernels, torch.empty(0, dtype=dtype), tokens, width, plus_one)


@pytest.mark.parametrize("kernels", [pointwise, ref])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("tokens, width", [(1, 1536), (5, 96), (2, 1024)])
def test_gated_act(kernels, dtype, activation, tokens, width):
    check_gated_act(kernels, torch.empty(0, dtype=dtype), tokens, width, activation)


@pytest.mark.parametrize("activation, limit", [("silu", 0.0), ("gelu_tanh", 0.0)])
def test_gated_act_stays_finite_far_out(activation, limit):
    x = torch.tensor([[-1e4, -200.0, 200.0, 1e4, 1.0, 1.0, 1.0, 1.0]])
    assert pointwise.gated_act(x, activation).tolist() == [[-limit, -limit, 200.0, 1e4]]
