"""Prefill attention on Hopper by an emulator of its partitions (tests/gpu/test_attention.py runs it on a GPU)."""

from __future__ import annotations

import sys

import pytest
import torch
from attention_cases import error, exact, make_case, work_list
from partitions import emulated

from kernels import prefill_hopper, ref
from kernels.split_k import counters

LIMIT = {torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2, torch.float32: 2e-6}
programs = 132      # at most
hopper = emulated(prefill_hopper, "_prefill_kernel", processors=lambda device: programs)


@pytest.fixture(autouse=True, params=[132, 2], ids=["block a program", "blocks a program"])
def share(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of one block, and such as have several."""
    monkeypatch.setattr(sys.modules[__name__], "programs", request.param)


def check(counts: list[int], starts: list[int], heads: int, kv_heads: int, dim: int, page: int, window: int = 0, padding: int = 0,
          fp8: bool = False, dtype: torch.dtype = torch.float16, unused: int = 0) -> None:
    cu_q = [0, *torch.tensor(counts).cumsum(0).tolist()]
    contexts = [start + count for start, count in zip(starts, counts, strict=True)]
    firsts = [max(start + 1 - window, 0) if window else 0 for start in starts]
    case = make_case(contexts, cu_q[-1] + padding, heads, kv_heads, dim, page, dtype, seed=cu_q[-1] + dim, firsts=firsts)
    case = case.as_fp8() if fp8 else case
    out = torch.full_like(case.q, 7.0)
    tiles = torch.cat((work_list(cu_q), torch.tensor([(0, max(counts))] * unused, dtype=torch.int32).view(-1, 2)))
    got = hopper.prefill_attention(
        case.q, case.k_cache, case.v_cache, case.block_table, case.rows, torch.tensor(starts, dtype=torch.int32),
        torch.tensor(cu_q, dtype=torch.int32), tiles, case.scale, window, 0.0, out, case.kv_scales)
    want = exact(case.plain() if fp8 else case, cu_q, starts, window, 0.0)
    assert got is out
    assert not counters(out.device).any()       # for the next launch
    assert error(got[: cu_q[-1]], want) < LIMIT[dtype]
    assert (got[cu_q[-1] :] == 7).all()


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("heads, kv_heads, dim", [(4, 1, 64), (2, 2, 128), (7, 1, 64), (3, 1, 128)])
def test_head_sizes(heads, kv_heads, dim, fp8):
    check([60, 1, 13], [0, 340, 390], heads, kv_heads, dim, 32, fp8=fp8)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("page", [16, 32, 64, 128, 256])
def test_page_sizes(page, fp8):
    check([page + 1, 150], [page - 1, 260], 4, 2, 64, page, fp8=fp8)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("window", [1, 20, 64, 128, 150, 300, 1000])
def test_windows(window, fp8):
    check([140, 60, 3], [0, 430, 300], 3, 1, 64, 32, window, fp8=fp8)


def test_long_rows_take_several_tiles_and_padding_is_left_alone():
    tile = ref.QUERY_TILE
    check([tile + 1, tile, 2 * tile + 5], [3, 0, 64], 3, 1, 64, 32, padding=9)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("window", [0, 200])
def test_rows_of_unequal_length_and_unused_tiles(window, fp8):
    check([200, 3, 70, 129, 1], [0, 700, 130, 300, 255], 4, 2, 64, 32, window, fp8=fp8, unused=3)


def test_queries_of_another_type_than_the_tiles():
    check([60, 140], [300, 0], 4, 1, 128, 32, fp8=True, dtype=torch.bfloat16)


def test_bfloat16_and_queries_inside_a_wider_row():
    check([33], [600], 2, 1, 128, 32, dtype=torch.bfloat16)
    case = make_case([50], 20, 2, 1, 64, 32, torch.float16)
    wide = torch.full((20, 5, 64), float("nan"), dtype=torch.float16)
    wide[:, 1:3] = case.q
    one = torch.tensor([30], dtype=torch.int32), torch.tensor([0, 20], dtype=torch.int32), work_list([0, 20]), case.scale, 0, 0.0
    got, want = (hopper.prefill_attention(q, case.k_cache, case.v_cache, case.block_table, case.rows, *one)
                 for q in (wide[:, 1:3], case.q))
    assert torch.equal(got, want)


def test_what_it_is_not_made_for_goes_elsewhere():
    elsewhere = emulated(prefill_hopper, "_prefill_kernel", processors=lambda device: 132, attention=ref)
    for dim, dtype, softcap in ((80, torch.float16, 0.0), (64, torch.float32, 0.0), (64, torch.float16, 30.0)):
        case = make_case([30], 30, 2, 1, dim, 32, dtype)
        start, cu_q = torch.tensor([0], dtype=torch.int32), torch.tensor([0, 30], dtype=torch.int32)
        got = elsewhere.prefill_attention(case.q, case.k_cache.nan_to_num(), case.v_cache.nan_to_num(), case.block_table,
                                          case.rows, start, cu_q, work_list([0, 30]), case.scale, 0, softcap)
        assert error(got, exact(case, [0, 30], [0], 0, softcap)) < LIMIT[dtype]
