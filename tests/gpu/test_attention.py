"""The attention kernels as compiled for this GPU, in bf16, fp16 and fp32, against float64."""

from __future__ import annotations

import pytest
import torch
from attention_cases import error, exact, make_case, shared_prefix_error, work_list

if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)

from kernels import ops, ref
from kernels.attention import decode_attention

LIMIT = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-6}
DTYPES = list(LIMIT)
MODELS = [(9, 3, 64), (8, 2, 80), (6, 2, 96), (32, 8, 128), (12, 2, 128), (8, 4, 256), (5, 5, 128), (20, 1, 64)]
pytestmark = pytest.mark.usefixtures("poisoned")


def ragged(count: int, low: int, high: int, seed: int) -> list[int]:
    return torch.randint(low, high, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def check_decode(contexts: list[int], heads: int, kv_heads: int, dim: int, page: int, dtype: torch.dtype, window: int = 0,
                 softcap: float = 0.0) -> None:
    firsts = [max(c - window, 0) if window else 0 for c in contexts]
    case = make_case(contexts, len(contexts), heads, kv_heads, dim, page, dtype, "cuda", sum(contexts), firsts)
    positions = torch.tensor(contexts, dtype=torch.int32, device="cuda") - 1
    got = decode_attention(case.q, case.k_cache, case.v_cache, case.block_table, case.rows, positions, case.scale, window,
                           softcap, 8192)
    assert error(got, exact(case, list(range(len(contexts) + 1)), [c - 1 for c in contexts], window, softcap)) < LIMIT[dtype]


def check_prefill(counts: list[int], starts: list[int], heads: int, kv_heads: int, dim: int, page: int, dtype: torch.dtype,
                  window: int = 0, softcap: float = 0.0) -> None:
    cu_q = [0, *torch.tensor(counts).cumsum(0).tolist()]
    contexts = [s + c for s, c in zip(starts, counts, strict=True)]
    firsts = [max(s + 1 - window, 0) if window else 0 for s in starts]
    case = make_case(contexts, cu_q[-1] + 7, heads, kv_heads, dim, page, dtype, "cuda", sum(contexts), firsts)
    starts_, cu_q_ = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in (starts, cu_q))
    got = ops.prefill_attention(case.q, case.k_cache, case.v_cache, case.block_table, case.rows, starts_, cu_q_,
                                work_list(cu_q).cuda(), case.scale, window, softcap)
    assert error(got[: cu_q[-1]], exact(case, cu_q, starts, window, softcap)) < LIMIT[dtype]
    assert got[cu_q[-1] :].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads, dim", MODELS)
def test_decode_head_sizes(dtype, heads, kv_heads, dim):
    check_decode([1, 3000, *ragged(30, 1, 900, dim)], heads, kv_heads, dim, 32, dtype)


@pytest.mark.parametrize("rows", [1, 7, 64, 300])
@pytest.mark.parametrize("page", [16, 32, 64, 128])
def test_decode_rows_and_pages(rows, page):
    check_decode(ragged(rows, 1, 1500, rows), 8, 4, 128, page, torch.bfloat16)


@pytest.mark.parametrize("window, softcap", [(1, 0.0), (100, 0.0), (512, 30.0), (0, 30.0)])
@pytest.mark.parametrize("dim", [64, 256])
def test_decode_window_and_softcap(dim, window, softcap):
    check_decode(ragged(40, 1, 2000, dim), 8, 2, dim, 32, torch.bfloat16, window, softcap)


def test_decode_in_a_graph_follows_the_lengths_on_the_device():
    contexts, steps = [5, 600, 1, 1], 40
    case = make_case([c + steps for c in contexts], 4, 8, 2, 128, 32, torch.float16, "cuda")
    positions = torch.tensor(contexts, dtype=torch.int32, device="cuda") - 1
    inputs = (case.q, case.k_cache, case.v_cache, case.block_table, case.rows, positions, case.scale, 0, 0.0, 8192)
    decode_attention(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(*inputs)
    for step in range(0, steps, 13):
        positions.copy_(torch.tensor(contexts, device="cuda") - 1 + step)
        graph.replay()
        assert error(out, exact(case, list(range(5)), [c - 1 + step for c in contexts], 0, 0.0)) < LIMIT[torch.float16]


def test_decode_gives_the_same_bits_again():
    contexts = ragged(50, 1, 3000, 1)
    case = make_case(contexts, 50, 8, 2, 128, 32, torch.bfloat16, "cuda")
    positions = torch.tensor(contexts, dtype=torch.int32, device="cuda") - 1
    inputs = (case.q, case.k_cache, case.v_cache, case.block_table, case.rows, positions, case.scale, 0, 0.0, 4096)
    first = decode_attention(*inputs)
    assert all(torch.equal(first, decode_attention(*inputs)) for _ in range(20))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads, dim", MODELS)
def test_prefill_head_sizes(dtype, heads, kv_heads, dim):
    check_prefill([300, 1, 40, 129], [0, 500, 17, 64], heads, kv_heads, dim, 32, dtype)


@pytest.mark.parametrize("page", [16, 32, 64, 128])
def test_prefill_pages_and_long_rows(page):
    check_prefill([1500, 2 * ref.QUERY_TILE, 3], [0, 700, 2000], 8, 2, 128, page, torch.bfloat16)


@pytest.mark.parametrize("window, softcap", [(1, 0.0), (20, 0.0), (64, 30.0), (300, 0.0), (4000, 30.0), (0, 30.0)])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_prefill_window_and_softcap(dim, window, softcap):
    check_prefill([700, 60, 3], [0, 1130, 300], 8, 4, dim, 32, torch.bfloat16, window, softcap)


@pytest.mark.parametrize("heads, kv_heads, dim, page", [(32, 8, 128, 32), (9, 3, 64, 16), (12, 2, 128, 64)])
def test_decode_reads_a_shared_prefix_once(heads, kv_heads, dim, page):
    assert shared_prefix_error(decode_attention, heads, kv_heads, dim, page, torch.bfloat16, "cuda") < 5e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, kv_heads, dim", MODELS)
@pytest.mark.parametrize("window, softcap", [(0, 0.0), (300, 30.0)])
def test_fp8_caches(dtype, heads, kv_heads, dim, window, softcap):
    contexts = [1, 3000, *ragged(30, 1, 900, dim)]
    firsts = [max(c - window, 0) if window else 0 for c in contexts]
    case = make_case(contexts, len(contexts), heads, kv_heads, dim, 32, dtype, "cuda", sum(contexts), firsts).as_fp8()
    want = exact(case.plain(), list(range(len(contexts) + 1)), [c - 1 for c in contexts], window, softcap)
    positions = torch.tensor(contexts, dtype=torch.int32, device="cuda") - 1
    got = decode_attention(case.q, case.k_cache, case.v_cache, case.block_table, case.rows, positions, case.scale, window,
                           softcap, 8192, kv_scales=case.kv_scales)
    assert error(got, want) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("page, window", [(32, 0), (16, 0), (128, 150)])
def test_fp8_prefill(dtype, dim, page, window):
    counts, starts = [300, 1, 40, 129], [0, 500, 17, 640]
    cu_q = [0, *torch.tensor(counts).cumsum(0).tolist()]
    contexts = [s + c for s, c in zip(starts, counts, strict=True)]
    firsts = [max(s + 1 - window, 0) if window else 0 for s in starts]
    case = make_case(contexts, cu_q[-1], 8, 2, dim, page, dtype, "cuda", dim, firsts).as_fp8()
    starts_, cu_q_ = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in (starts, cu_q))
    got = ops.prefill_attention(case.q, case.k_cache, case.v_cache, case.block_table, case.rows, starts_, cu_q_,
                                work_list(cu_q).cuda(), case.scale, window, 0.0, kv_scales=case.kv_scales)
    assert error(got, exact(case.plain(), cu_q, starts, window, 0.0)) < LIMIT[dtype]


def test_decode_reads_a_shared_fp8_prefix_once():
    assert shared_prefix_error(decode_attention, 32, 8, 128, 32, torch.bfloat16, "cuda", fp8=True) < 5e-3
