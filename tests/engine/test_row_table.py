"""Staged writes to the row table against plain arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.request import SamplingParams
from engine.row_table import RowTable
from kernels import ref

CPU = torch.device("cpu")
REST = ("rest_rows", "rest_starts", "rest_cu_q", "tiles", "ends")
SAMPLED = ("sampled_rows", "sampled_positions")


class Mirror:
    """The table as arrays that are written at once, in the order of staging."""

    def __init__(self, table: RowTable) -> None:
        self.table = table
        names = ("tokens", "block_table", "params", "rows", "starts", "shared", "prefix_tiles", "grammar", *REST, *SAMPLED)
        self.arrays = {name: getattr(table, name).numpy().copy() for name in names}

    def check(self) -> None:
        for name, want in self.arrays.items():
            np.testing.assert_array_equal(getattr(self.table, name).numpy(), want, err_msg=name)


@given(seed=st.integers(0, 2**32 - 1), flushes=st.integers(1, 20), max_rows=st.integers(1, 6), max_len=st.integers(16, 70))
def test_random_staged_writes(seed: int, flushes: int, max_rows: int, max_len: int) -> None:
    """Rows are written in random order, each place at most once a flush, as a scheduler does."""
    rng = np.random.default_rng(seed)
    table = RowTable(max_rows, max_len, 16, CPU, 64)
    mirror = Mirror(table)
    arrays = mirror.arrays
    for _ in range(flushes):
        chosen = rng.permutation(max_rows)[: rng.integers(0, max_rows + 1)]
        begins = rng.integers(0, max_len, size=chosen.size)
        ends = begins + rng.integers(0, max_len + 2 - begins)
        for row, begin, end in zip(chosen.tolist(), begins.tolist(), ends.tolist(), strict=True):
            arrays["tokens"][row, begin:end] = rng.integers(0, 1000, size=end - begin, dtype=np.int32)
        sampling = []
        for row in chosen.tolist():
            params = SamplingParams(temperature=rng.random(), top_k=int(rng.integers(0, 99)), seed=int(rng.integers(0, 2**63)))
            arrays["params"][row] = bits(params)
            sampling.append(params)
        if chosen.size:
            table.stage_tokens(chosen, begins, ends, arrays["tokens"])
            table.stage_params(chosen, sampling)
        firsts = rng.integers(0, table.pages_per_row, size=chosen.size)
        lasts = firsts + rng.integers(0, table.pages_per_row + 1 - firsts)
        for row, first, last in zip(chosen.tolist(), firsts.tolist(), lasts.tolist(), strict=True):
            arrays["block_table"][row, first:last] = rng.integers(1, 99, size=last - first, dtype=np.int32)
        table.stage_pages(chosen, firsts, lasts, arrays["block_table"])
        arrays["grammar"][chosen] = rng.integers(0, 99, size=chosen.size, dtype=np.int32)
        table.stage_grammar(chosen, arrays["grammar"][chosen])
        n = int(rng.integers(1, max_rows + 1))
        rows, starts = rng.integers(0, max_rows + 1, size=(2, n), dtype=np.int32)
        table.stage_step(rows, starts)
        arrays["rows"][:n], arrays["starts"][:n] = rows, starts
        shared = rng.integers(0, 99, size=n, dtype=np.int32)
        tiles = rng.integers(1, 9, size=(int(rng.integers(0, len(table.prefix_tiles) + 1)), 2), dtype=np.int32)
        table.stage_prefixes(shared, tiles)
        arrays["shared"][:n] = shared
        arrays["prefix_tiles"][: len(tiles)], arrays["prefix_tiles"][len(tiles) :] = tiles, 0
        for names, stage in ((REST, table.stage_rest), (SAMPLED, table.stage_sampled)):
            heads = [arrays[name][: rng.integers(0, len(arrays[name]) + 1)] for name in names]
            for head in heads:
                head[:] = rng.integers(0, 99, size=head.shape)
            stage(*heads)
        extra = rng.integers(-5, 5, size=int(rng.integers(0, 9)), dtype=np.int32)
        np.testing.assert_array_equal(table.flush(extra).numpy(), extra)
        mirror.check()


def bits(params: SamplingParams) -> np.ndarray:
    out = np.zeros(ref.PARAM_COLUMNS, dtype=np.int32)
    for column, value in ((ref.TEMPERATURE, params.temperature), (ref.TOP_P, params.top_p), (ref.MIN_P, params.min_p)):
        out[column] = np.float32(value).view(np.int32)
    out[ref.TOP_K] = params.top_k
    seed = np.array([params.seed & 2**64 - 1], dtype=np.uint64).view(np.int32)
    out[ref.SEED_LOW], out[ref.SEED_HIGH] = seed
    return out


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1, -1])
def test_seeds_keep_all_64_bits(seed: int) -> None:
    table = RowTable(2, 16, 16, CPU, 64)
    params = SamplingParams(seed=seed, temperature=0.7, top_p=0.9, min_p=0.05, top_k=40)
    table.stage_params(np.array([1]), [params])
    table.flush(np.empty(0, dtype=np.int32))
    np.testing.assert_array_equal(table.params[1].numpy(), bits(params))


def test_what_is_staged_waits_for_the_flush() -> None:
    table = RowTable(2, 16, 16, CPU, 64)
    tokens = np.zeros((2, 17), dtype=np.int32)
    tokens[0, 3:5] = 7, 8
    table.stage_tokens(np.array([0]), np.array([3]), np.array([5]), tokens)
    assert table.tokens.count_nonzero() == 0
    table.flush(np.empty(0, dtype=np.int32))
    assert table.tokens[0, 3:5].tolist() == [7, 8]


def test_the_dummy_row_points_at_the_dummy_page() -> None:
    table = RowTable(3, 40, 16, CPU, 64)
    assert table.dummy == 3
    assert table.block_table.shape == (4, 3)
    assert table.block_table[table.dummy].tolist() == [0, 0, 0]


def test_nothing_is_staged_past_the_end_of_its_tensor() -> None:
    table = RowTable(2, 16, 16, CPU, 64)
    rows = np.zeros(len(table.rest_rows) + 1, dtype=np.int32)
    with pytest.raises(IndexError, match=r"^7 values for the row table's rest_rows, which holds 6$"):
        table.stage_rest(rows, *[rows[:1]] * 4)


def test_a_table_beyond_32_bit_offsets_is_refused() -> None:
    with pytest.raises(ValueError, match=r"engine\.max_rows=100000 x engine\.max_model_len=100000 overflows"):
        RowTable(100_000, 100_000, 32, torch.device("meta"), 64)
