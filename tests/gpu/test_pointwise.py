"""The norms and gated activations, compiled, against float64."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import check_gated_act, check_norms

if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)

from kernels import pointwise

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("tokens, width", [(1, 576), (16384, 576), (1, 4096), (4097, 4096), (3, 8192), (1000, 5120), (77, 2560),
                                           (9, 100)])
def test_norms(dtype, plus_one, tokens, width):
    check_norms(pointwise, torch.empty(0, dtype=dtype, device="cuda"), tokens, width, plus_one)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("tokens, width", [(1, 1536), (16384, 1536), (1, 14336), (2049, 14336), (33, 18944), (9, 100)])
def test_gated_act(dtype, activation, tokens, width):
    check_gated_act(pointwise, torch.empty(0, dtype=dtype, device="cuda"), tokens, width, activation)
