"""The kernel of rows with one query each as compiled for this GPU, in bf16, fp16 and fp32, against float64."""

from __future__ import annotations

import pytest
import torch
from attention_cases import rope_and_decode_error

if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)

from kernels import ops

LIMIT = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-6}


pytestmark = pytest.mark.usefixtures("poisoned")


def ragged(count: int, low: int, high: int, seed: int) -> list[int]:
    return torch.randint(low, high, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("dtype", list(LIMIT))
@pytest.mark.parametrize("heads, kv_heads, dim, norm", [(9, 3, 64, False), (8, 2, 80, False), (32, 8, 128, False),
                                                        (12, 2, 128, True), (8, 4, 256, True), (20, 1, 64, False)])
def test_heads(dtype, heads, kv_heads, dim, norm):
    contexts = [1, 2, 64, 65, 3000, *ragged(20, 1, 900, dim)]
    assert rope_and_decode_error(ops, contexts, heads, kv_heads, dim, 32, dtype, "cuda", norm=norm) < LIMIT[dtype]


@pytest.mark.parametrize("rows", [1, 7, 20, 64, 300])
@pytest.mark.parametrize("page", [16, 128])
def test_rows_and_pages(rows, page):
    assert rope_and_decode_error(ops, ragged(rows, 1, 1500, rows), 8, 4, 128, page, torch.bfloat16, "cuda") < 8e-3


@pytest.mark.parametrize("contexts", [[1], [2], [17], [300], [4001], [1, 2700], [65, 1, 129, 4000], [1, 2, 3, 1500, 64, 700, 16]])
@pytest.mark.parametrize("heads, kv_heads, dim", [(32, 8, 128), (8, 1, 64), (8, 8, 128), (7, 1, 64), (32, 2, 128), (12, 2, 128)])
def test_programs_that_share_keys(contexts, heads, kv_heads, dim):
    """Clusters of all the rule's sizes, the largest where there may be many keys; some of their programs have none."""
    for dtype, fp8 in ((torch.bfloat16, False), (torch.float16, False), (torch.float16, True)):
        for window, most in ((0, 1 << 12), (40, 1 << 12), (0, 1 << 14), (1 << 14, 1 << 14)):
            found = rope_and_decode_error(ops, contexts, heads, kv_heads, dim, 32, dtype, "cuda", window, fp8=fp8,
                                          max_context=most)
            assert found < LIMIT[dtype], (dtype, fp8, window, most)


@pytest.mark.parametrize("rows, shared", [(1, 0), (4, 0), (20, 3)])
def test_same_bits_each_time(rows, shared):
    """In a graph too, with launches that overlap. shared: pages that all rows have in common."""
    page, heads, kv_heads, dim = 32, 32, 8, 128
    caches = [torch.randn(100 * rows, kv_heads, page, dim, device="cuda", dtype=torch.float16) for _ in range(2)]
    table = torch.arange(100 * rows, device="cuda", dtype=torch.int32).view(rows, 100)
    index = torch.arange(rows, device="cuda", dtype=torch.int32)
    table[:, :shared] = table[0, :shared]
    prefix = (None, None)
    if shared:
        prefix = torch.full_like(index, shared * page), torch.tensor([(0, rows)], device="cuda", dtype=torch.int32)
    positions = 2900 // (index + 1)
    slots = (table[index.long(), positions.long() // page] * page + positions % page).int()
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim, device="cuda", dtype=torch.float16)
    cos_sin = torch.rand(4096, dim, device="cuda")

    def step() -> torch.Tensor:
        return ops.rope_and_decode(qkv, None, None, 1e-6, False, cos_sin, positions, slots, *caches, heads, table, index,
                                   dim**-0.5, 0, 0.0, 4096, None, None, *prefix)

    want = step().clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [step() for _ in range(50)]
    for _ in range(20):
        graph.replay()
        assert all(torch.equal(x, want) for x in found)


@pytest.mark.parametrize("window, softcap", [(1, 0.0), (100, 0.0), (512, 30.0), (0, 30.0)])
def test_window_and_softcap(window, softcap):
    assert rope_and_decode_error(ops, ragged(40, 1, 2000, 7), 8, 2, 64, 32, torch.bfloat16, "cuda", window, softcap) < 8e-3


@pytest.mark.parametrize("heads, kv_heads, dim", [(32, 8, 128), (9, 3, 64), (12, 2, 128), (16, 1, 64), (8, 1, 64), (8, 2, 80)])
def test_prefixes_that_rows_share(heads, kv_heads, dim):
    """In the ways that the rule has for so many rows; of few KV heads by clusters of all sizes."""
    for rows in (16, 20, 40, 300):
        contexts = [161, 170, 1000, 192, 161, 3, *ragged(rows - 6, 33, 900, dim)]
        for dtype, fp8 in ((torch.bfloat16, False), (torch.float32, False), (torch.float16, True)):
            found = rope_and_decode_error(ops, contexts, heads, kv_heads, dim, 32, dtype, "cuda", fp8=fp8,
                                          groups=[(0, 5, 5), (6, rows, 1)])
            assert found < LIMIT[dtype], (dtype, fp8, rows)


@pytest.mark.parametrize("rows", [3, 15, 40])
@pytest.mark.parametrize("heads, kv_heads, dim", [(32, 8, 128), (8, 2, 64), (40, 4, 128), (8, 2, 80)])
def test_fp8_cache(rows, heads, kv_heads, dim):
    for shifted in (False, True):
        found = rope_and_decode_error(ops, ragged(rows, 1, 1500, dim), heads, kv_heads, dim, 32, torch.bfloat16, "cuda", fp8=True,
                                      shifted=shifted)
        assert found < 8e-3, shifted
