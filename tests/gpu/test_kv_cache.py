"""Norms of heads, rotary embedding and the write to the cache, compiled, against float64."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import check_copy_pages, check_fp8_cache, check_rope_and_cache

if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)

from kernels import kv_cache

SHAPES = [(9, 3, 64, 64), (32, 8, 128, 128), (4, 4, 80, 32), (3, 1, 96, 96), (4, 1, 256, 256), (40, 20, 128, 64)]
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("heads, kv_heads, dim, rotary", SHAPES)
@pytest.mark.parametrize("tokens", [1, 3000])
def test_head_sizes(dtype, norm, heads, kv_heads, dim, rotary, tokens):
    like = torch.empty(0, dtype=dtype, device="cuda")
    check_rope_and_cache(kv_cache, like, tokens, heads, kv_heads, dim, rotary, norm, plus_one=norm and dim == 256)


@pytest.mark.parametrize("page", [16, 32, 64, 128])
def test_pages(page):
    check_rope_and_cache(kv_cache, torch.empty(0, dtype=torch.bfloat16, device="cuda"), 777, 32, 8, 128, 128, False, page=page)


@pytest.mark.parametrize("shape", [(6, 40, 3, 16, 80), (64, 50, 8, 32, 128)])
def test_copies_of_pages(shape):
    check_copy_pages(kv_cache, torch.bfloat16, "cuda", shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp8_cache(dtype):
    check_fp8_cache(kv_cache, torch.empty(0, dtype=dtype, device="cuda"))
