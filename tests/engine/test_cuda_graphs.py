"""Which padded numbers of rows there are graphs of."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.cuda_graphs import MARGIN, graph_sizes, padded, unbeaten


@pytest.mark.parametrize("most", [1, 3, 64, 100, 1024, 2048])
def test_sizes_ascend_to_the_most(most: int) -> None:
    sizes = graph_sizes(most)
    assert sizes == sorted(set(sizes)) and sizes[-1] == most
    assert [padded(sizes, n) for n in sizes] == sizes


def test_a_size_that_a_larger_one_beats_is_left_out() -> None:
    seconds = {256: 7.99e-3, 320: 9.31e-3, 384: 10.22e-3, 448: 16.14e-3, 512: 11.73e-3, 576: 11.70e-3}
    assert unbeaten([256, 320, 384, 448, 512, 576, 640], seconds) == [256, 320, 384, 512, 576, 640]
    assert padded(unbeaten([*seconds], seconds), 400) == 512


@given(most=st.integers(1, 3000), data=st.data())
def test_no_row_goes_without_a_size(most: int, data: st.DataObject) -> None:
    """What is measured or not, and however: the largest stays, and the size that a step gets is no slower than a larger one."""
    sizes = graph_sizes(most)
    measured = data.draw(st.sets(st.sampled_from(sizes)))
    seconds = {n: data.draw(st.floats(1e-6, 1.0)) for n in sorted(measured)}
    kept = unbeaten(sizes, seconds)
    assert set(sizes) - measured <= set(kept) <= set(sizes) and kept == sorted(kept) and kept[-1] == most
    for n in measured.intersection(kept):
        assert all(seconds[n] <= MARGIN * seconds[m] for m in measured if m > n)
    for n in set(sizes).difference(kept):
        assert any(seconds[n] > MARGIN * seconds[m] for m in measured if m > n)
