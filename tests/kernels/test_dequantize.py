"""Weights from integer codes, interpreted, against their torch twin."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from kernels import dequantize, ref


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("rows, width", [(1, 16), (3, 96), (2, 4864)])
def test_dequantize(dtype, rows, width):
    gen = torch.Generator().manual_seed(width)
    codes = torch.randint(0, 256, (rows, width), dtype=torch.uint8, generator=gen)
    scales = torch.randn(width // 16, rows, generator=gen).to(dtype).t()       # a group's side by side, as layers keep them
    assert torch.equal(dequantize.dequantize_symmetric(codes, scales, 16), ref.dequantize_symmetric(codes, scales, 16))
