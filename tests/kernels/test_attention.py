"""The attention kernels in Triton's interpreter, in fp16 and fp32 (its bf16 dot product is wrong), against ref.py and float64."""

from __future__ import annotations

import os
from dataclasses import replace

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from attention_cases import Case, error, exact, make_case, shared_prefix_error, work_list

from kernels import attention, ref

LIMIT = {torch.float16: 2e-3, torch.float32: 2e-6}
pytestmark = pytest.mark.usefixtures("poisoned", "few_programs")


def decode(case: Case, contexts: list[int], window: int, softcap: float, kernels) -> torch.Tensor:
    positions = torch.tensor(contexts, dtype=torch.int32) - 1
    return kernels.decode_attention(case.q, case.k_cache, case.v_cache, case.block_table, case.rows, positions, case.scale,
                                    window, softcap, 4096, kv_scales=case.kv_scales)


def check_decode(contexts: list[int], heads: int, kv_heads: int, dim: int, page: int, dtype: torch.dtype, window: int = 0,
                 softcap: float = 0.0) -> None:
    firsts = [max(c - window, 0) if window else 0 for c in contexts]
    case = make_case(contexts, len(contexts), heads, kv_heads, dim, page, dtype, seed=len(contexts) + dim + page, firsts=firsts)
    want = exact(case, list(range(len(contexts) + 1)), [c - 1 for c in contexts], window, softcap)
    got = decode(case, contexts, window, softcap, attention)
    assert got.shape == case.q.shape
    assert got.dtype == dtype
    assert error(got, want) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("heads, kv_heads, dim", [(8, 2, 64), (4, 1, 80), (3, 1, 96), (2, 2, 128), (2, 1, 256), (20, 1, 64)])
def test_decode_head_sizes(dtype, heads, kv_heads, dim):
    check_decode([1, 77, 300], heads, kv_heads, dim, 16, dtype)


@pytest.mark.parametrize("page", [16, 32, 64, 128])
def test_decode_page_sizes(page):
    check_decode([page, page + 1, 129, 5 * page - 1], 4, 2, 64, page, torch.float16)


@pytest.mark.parametrize("window, softcap", [(1, 0.0), (50, 0.0), (128, 5.0), (1000, 0.0), (0, 5.0)])
def test_decode_window_and_softcap(window, softcap):
    check_decode([1, 49, 50, 51, 400, 129], 3, 1, 64, 32, torch.float32, window, softcap)


@pytest.mark.parametrize("programs", [1, 24, 200])
def test_decode_with_any_number_of_splits(programs, monkeypatch):
    monkeypatch.setattr(attention, "DECODE_PROGRAMS", programs)
    check_decode([1, 700, 64, 65, 31], 2, 1, 128, 32, torch.float16)


def test_decode_padding_rows_are_finite_and_rows_may_repeat():
    contexts = [200, 1, 1, 1]
    case = make_case(contexts, 4, 4, 2, 64, 32, torch.float32)
    case.rows[2:] = case.rows[1]
    want = exact(case, [0, 1, 2, 3, 4], [c - 1 for c in contexts], 0, 0.0)
    assert error(decode(case, contexts, 0, 0.0, attention), want) < 2e-6


def test_decode_reads_queries_inside_a_wider_row():
    contexts = [90, 130]
    case = make_case(contexts, 2, 4, 2, 64, 16, torch.float32)
    want = decode(case, contexts, 0, 0.0, attention)
    wide = torch.full((2, 8, 64), float("nan"))
    wide[:, :4] = case.q
    case.q = wide[:, :4]
    assert torch.equal(decode(case, contexts, 0, 0.0, attention), want)


def test_decode_agrees_with_the_torch_twin():
    contexts = [33, 257, 100]
    case = make_case(contexts, 3, 8, 2, 64, 32, torch.float32)
    clean = Case(case.q, case.k_cache.nan_to_num(), case.v_cache.nan_to_num(), case.block_table, case.rows, case.scale)
    got, want = decode(case, contexts, 70, 3.0, attention), decode(clean, contexts, 70, 3.0, ref)
    assert error(got, want.double()) < 2e-6


def check_prefill(counts: list[int], starts: list[int], heads: int, kv_heads: int, dim: int, page: int, dtype: torch.dtype,
                  window: int = 0, softcap: float = 0.0, padding: int = 0) -> None:
    cu_q = [0, *torch.tensor(counts).cumsum(0).tolist()]
    contexts = [s + c for s, c in zip(starts, counts, strict=True)]
    firsts = [max(s + 1 - window, 0) if window else 0 for s in starts]
    case = make_case(contexts, cu_q[-1] + padding, heads, kv_heads, dim, page, dtype, seed=cu_q[-1] + dim, firsts=firsts)
    got = attention.prefill_attention(
        case.q, case.k_cache, case.v_cache, case.block_table, case.rows, torch.tensor(starts, dtype=torch.int32),
        torch.tensor(cu_q, dtype=torch.int32), work_list(cu_q), case.scale, window, softcap)
    assert got.shape == case.q.shape
    assert got.dtype == dtype
    assert error(got[: cu_q[-1]], exact(case, cu_q, starts, window, softcap)) < LIMIT[dtype]
    assert got[cu_q[-1] :].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("heads, kv_heads, dim", [(4, 2, 64), (2, 1, 80), (3, 1, 96), (2, 2, 128), (2, 1, 256), (7, 1, 64)])
def test_prefill_head_sizes(dtype, heads, kv_heads, dim):
    check_prefill([60, 1, 13], [0, 40, 90], heads, kv_heads, dim, 16, dtype)


@pytest.mark.parametrize("page", [16, 32, 64, 128])
def test_prefill_page_sizes(page):
    check_prefill([page + 1, 2 * page], [page - 1, 0], 4, 2, 64, page, torch.float16)


@pytest.mark.parametrize("window, softcap", [(1, 0.0), (20, 0.0), (64, 5.0), (150, 0.0), (1000, 5.0), (0, 5.0)])
def test_prefill_window_and_softcap(window, softcap):
    check_prefill([140, 60, 3], [0, 130, 300], 3, 1, 64, 32, torch.float16, window, softcap)


def test_prefill_long_rows_take_several_tiles_and_padding_is_left_alone():
    tile = ref.QUERY_TILE
    check_prefill([tile + 1, tile, 2 * tile + 5], [3, 0, 64], 3, 1, 64, 32, torch.float16, padding=9)


def test_prefill_of_nothing():
    case = make_case([5], 2, 4, 2, 64, 16, torch.float32)
    zero = torch.zeros(1, dtype=torch.int32)
    out = attention.prefill_attention(case.q, case.k_cache, case.v_cache, case.block_table, case.rows[:0], zero[:0], zero,
                                      work_list([0]), 1.0, 0, 0.0)
    assert out.shape == case.q.shape


def test_prefill_chunks_agree_with_decode_of_every_position():
    n = 80
    case = make_case([n], n, 2, 1, 64, 32, torch.float32)
    whole = attention.prefill_attention(
        case.q, case.k_cache, case.v_cache, case.block_table, case.rows, torch.zeros(1, dtype=torch.int32),
        torch.tensor([0, n], dtype=torch.int32), work_list([0, n]), case.scale, 40, 0.0)
    one = attention.decode_attention(case.q, case.k_cache, case.v_cache, case.block_table, case.rows.expand(n).contiguous(),
                                     torch.arange(n, dtype=torch.int32), case.scale, 40, 0.0, n)
    assert error(one, whole.double()) < 2e-6


@pytest.mark.parametrize("heads, kv_heads, dim, page, programs", [(9, 3, 64, 16, 1), (8, 2, 32, 32, 128)],
                         ids=["one split", "several splits"])
def test_decode_reads_a_shared_prefix_once(heads, kv_heads, dim, page, programs, monkeypatch):
    monkeypatch.setattr(attention, "DECODE_PROGRAMS", programs)
    assert shared_prefix_error(attention.decode_attention, heads, kv_heads, dim, page, torch.float32, "cpu") < 2e-6


@pytest.mark.parametrize("window, softcap", [(0, 0.0), (50, 5.0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_fp8_caches(dtype, window, softcap):
    contexts = [1, 77, 300]
    firsts = [max(c - window, 0) if window else 0 for c in contexts]
    case = make_case(contexts, 3, 8, 2, 64, 16, dtype, firsts=firsts).as_fp8()
    want = exact(case.plain(), [0, 1, 2, 3], [c - 1 for c in contexts], window, softcap)
    assert error(decode(case, contexts, window, softcap, attention), want) < 2e-3
    starts, cu_q = torch.tensor(contexts, dtype=torch.int32) - 1, torch.arange(4, dtype=torch.int32)
    got = attention.prefill_attention(case.q, case.k_cache, case.v_cache, case.block_table, case.rows, starts, cu_q,
                                      work_list([0, 1, 2, 3]), case.scale, window, softcap, kv_scales=case.kv_scales)
    assert error(got, want) < 2e-3


def test_fp8_caches_in_the_torch_twin():
    case = make_case([77, 300], 2, 8, 2, 64, 16, torch.float32)
    case = replace(case, k_cache=case.k_cache.nan_to_num(), v_cache=case.v_cache.nan_to_num()).as_fp8()
    want = exact(case.plain(), [0, 1, 2], [76, 299], 0, 0.0)
    assert error(decode(case, [77, 300], 0, 0.0, ref), want) < 2e-6
    got = ref.prefill_attention(case.q, case.k_cache, case.v_cache, case.block_table, case.rows,
                                torch.tensor([76, 299], dtype=torch.int32), torch.arange(3, dtype=torch.int32),
                                work_list([0, 1, 2]), case.scale, 0, 0.0, kv_scales=case.kv_scales)
    assert error(got, want) < 2e-6


def test_decode_reads_a_shared_fp8_prefix_once(monkeypatch):
    monkeypatch.setattr(attention, "DECODE_PROGRAMS", 1)
    assert shared_prefix_error(attention.decode_attention, 4, 1, 32, 16, torch.float32, "cpu", fp8=True) < 2e-3
