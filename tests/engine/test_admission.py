"""The forecast of KV use: its peak against a simulation step by step, and the guess of output lengths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.admission import KEPT, MIN_SEEN, QUANTILE, LengthPredictor, admissible, peak_tokens

# (tokens held now, tokens still to come) of each row
futures = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 30)), max_size=12)


def columns(rows: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(rows, dtype=np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def simulated_peak(rows: list[tuple[int, int]], page: int = 1) -> int:
    """All rows grow by one token a step; one that has ended holds nothing."""
    steps = range(max((left for _, left in rows), default=0) + 1)
    return page * max((sum(-(-(held + t) // page) for held, left in rows if left >= t) for t in steps), default=0)


@given(futures)
def test_the_peak_is_that_of_a_simulation(rows: list[tuple[int, int]]) -> None:
    assert peak_tokens(*columns(rows), 1) == simulated_peak(rows)


@given(futures, st.sampled_from([4, 16]))
def test_pages_are_half_empty_but_for_rows_that_end(rows: list[tuple[int, int]], page: int) -> None:
    assert abs(peak_tokens(*columns(rows), page) - simulated_peak(rows, page)) <= len(rows) * page / 2
    alike = [(held, 7) for held, _ in rows]
    assert peak_tokens(*columns(alike), page) == simulated_peak(alike, page)


@given(futures, futures, st.integers(0, 400))
def test_as_many_are_let_in_as_fit(rows: list[tuple[int, int]], new: list[tuple[int, int]], capacity: int) -> None:
    fitting = [n for n in range(len(new) + 1) if simulated_peak(rows + new[:n]) <= capacity]
    assert admissible(columns(rows), columns(new), capacity, 1) == max(fitting, default=0)


def remaining(predictor: LengthPredictor, produced: int, most: int, exact: bool = False) -> int:
    return int(predictor.remaining(np.array([produced]), np.array([most]), np.array([exact]))[0])


def test_max_tokens_is_believed_until_enough_rows_have_ended() -> None:
    predictor = LengthPredictor()
    for _ in range(MIN_SEEN - 1):
        predictor.observe(5)
    assert remaining(predictor, 0, 256) == 256
    predictor.observe(5)
    assert remaining(predictor, 0, 256) == 5


@given(st.lists(st.integers(0, 200), min_size=MIN_SEEN, max_size=300), st.integers(0, 250), st.integers(0, 250))
def test_the_guess_is_a_high_quantile_of_the_longer_outputs(lengths: list[int], produced: int, further: int) -> None:
    predictor = LengthPredictor()
    for length in lengths:
        predictor.observe(length)
    guess = remaining(predictor, produced, produced + further)
    longer = sorted(length for length in lengths if length > produced)
    if further == 0:
        assert guess == 0
    elif longer:
        assert guess == min(further, longer[min(int(len(longer) * QUANTILE), len(longer) - 1)] - produced)
    else:
        assert guess == further, "longer than any output seen: only max_tokens is left to believe"
    assert remaining(predictor, produced, produced + further, exact=True) == further


def test_the_latest_lengths_count() -> None:
    """A job's outputs change as it goes through its rows: what was seen long ago must not decide for ever."""
    predictor = LengthPredictor()
    for _ in range(2 * KEPT):
        predictor.observe(10)
        remaining(predictor, 0, 1000)
    for _ in range(KEPT):
        predictor.observe(500)
        remaining(predictor, 0, 1000)
    assert remaining(predictor, 0, 1000) == 500


@pytest.mark.parametrize("rows", [0, 1, 1024])
def test_shapes(rows: int) -> None:
    predictor = LengthPredictor()
    for length in range(MIN_SEEN):
        predictor.observe(length)
    zeros = np.zeros(rows, dtype=np.int32)
    assert predictor.remaining(zeros, zeros + 7, zeros.astype(bool)).shape == (rows,)
