"""The kernel of rows with one query each in Triton's interpreter, in fp16 and fp32 (its bf16 dot is wrong), against float64."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from attention_cases import rope_and_decode_error
from quantized_products import mend_interpreted_casts

from kernels import attention, decode_step

LIMIT = {torch.float16: 2e-3, torch.float32: 2e-6}


pytestmark = pytest.mark.usefixtures("poisoned", "few_programs")


@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_prefixes_that_rows_share(softcap):
    contexts = [81, 90, 200, 96, 81, 3, *[20 + i for i in range(8)]]
    assert rope_and_decode_error(decode_step, contexts, 4, 2, 80, 16, torch.float32, "cpu", softcap=softcap,
                                 groups=[(0, 5, 5), (6, 14, 1)]) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("heads, kv_heads, dim, rotary, norm", [
    (8, 2, 64, 64, False), (4, 1, 80, 32, True), (2, 2, 128, 128, True), (2, 1, 256, 256, False), (20, 1, 64, 64, False)])
def test_heads(dtype, heads, kv_heads, dim, rotary, norm):
    found = rope_and_decode_error(decode_step, [1, 2, 64, 65, 77, 300], heads, kv_heads, dim, 16, dtype, "cpu", rotary=rotary,
                                  norm=norm)
    assert found < LIMIT[dtype]


@pytest.mark.parametrize("programs", [1, 24, 200], ids=lambda programs: f"{programs} programs")
@pytest.mark.parametrize("page", [16, 128])
def test_any_number_of_splits(programs, page, monkeypatch):
    monkeypatch.setattr(attention, "DECODE_PROGRAMS", programs)
    assert rope_and_decode_error(decode_step, [1, 700, 64, 65, 129, 31], 2, 1, 128, page, torch.float32, "cpu") < 2e-6


@pytest.mark.parametrize("window, softcap", [(1, 0.0), (50, 0.0), (128, 5.0), (1000, 0.0), (0, 5.0)])
def test_window_and_softcap(window, softcap):
    found = rope_and_decode_error(decode_step, [1, 49, 50, 51, 400, 129], 3, 1, 64, 32, torch.float32, "cpu", window, softcap)
    assert found < 2e-6


@pytest.mark.parametrize("shifted", [False, True])
def test_fp8_cache(shifted, monkeypatch):
    mend_interpreted_casts(monkeypatch)
    found = rope_and_decode_error(decode_step, [1, 33, 200], 8, 4, 64, 16, torch.float32, "cpu", fp8=True, shifted=shifted)
    assert found < 2e-3
