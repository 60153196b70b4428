"""Norms of heads, rotary embedding and the write to the cache, interpreted and in torch, against float64."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from kernel_cases import check_copy_pages, check_fp8_cache, check_rope_and_cache
from quantized_products import mend_interpreted_casts

from kernels import kv_cache, ref

pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.parametrize("kernels", [kv_cache, ref])]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("heads, kv_heads, dim, rotary", [(9, 3, 64, 64), (4, 4, 80, 32), (3, 1, 96, 96), (32, 8, 128, 128),
                                                          (4, 1, 256, 256), (40, 20, 128, 64)])
def test_head_sizes(kernels, dtype, norm, heads, kv_heads, dim, rotary):
    check_rope_and_cache(kernels, torch.empty(0, dtype=dtype), 3, heads, kv_heads, dim, rotary, norm)


@pytest.mark.parametrize("page", [16, 32, 128])
@pytest.mark.parametrize("tokens", [1, 37])
def test_pages(kernels, page, tokens):
    check_rope_and_cache(kernels, torch.empty(0), tokens, 4, 2, 64, 64, False, page=page)


def test_norm_with_weights_less_one(kernels):
    check_rope_and_cache(kernels, torch.empty(0), 5, 4, 1, 256, 256, True, plus_one=True)


def test_cache_of_another_type(kernels):
    check_rope_and_cache(kernels, torch.empty(0), 5, 4, 2, 64, 64, False, cache_dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_copies_of_pages(kernels, dtype):
    check_copy_pages(kernels, dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_fp8_cache(kernels, dtype, monkeypatch):
    mend_interpreted_casts(monkeypatch)
    check_fp8_cache(kernels, torch.empty(0, dtype=dtype))
