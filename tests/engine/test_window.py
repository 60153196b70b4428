"""The window of waiting requests: the order it gives them out in, and the prefixes that it makes the pool expect."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.block_pool import BlockPool, Node
from engine.request import Request, SamplingParams
from engine.window import Waiting, Window

PAGE = 4


def waiting(name: object, tokens: list[int], max_tokens: int = 8) -> Waiting:
    request = Request(name, np.array(tokens, dtype=np.int32), SamplingParams(max_tokens=max_tokens))
    return Waiting(request, request.prompt)


def window(size: int = 100, sharing: bool = True) -> Window:
    return Window(BlockPool(64, PAGE), size, sharing)


def names(requests: list[Waiting]) -> list[object]:
    return [w.request.id for w in requests]


def drain(window: Window) -> list[object]:
    return names(window.take(len(window.ready(len(window)))))


def page(token: int) -> list[int]:
    return [token] * PAGE


def test_rows_that_share_a_page_come_together_and_long_ones_first() -> None:
    w = window()
    w.add(waiting("short a", [*page(1), 7]))
    w.add(waiting("alone", [*page(2), 7], max_tokens=20))
    w.add(waiting("long a", [*page(1), 8], max_tokens=30))
    w.add(waiting("short b", [*page(3), 7]))
    w.add(waiting("b", [*page(3), 8], max_tokens=9))
    assert drain(w) == ["short a", "long a", "alone", "short b", "b"]


def test_paths_reach_as_far_as_a_neighbour_shares() -> None:
    w = window()
    a = waiting("a", page(1) + page(2) + page(3) + [5])
    b = waiting("b", page(1) + page(2) + page(4) + [5])
    c = waiting("c", page(1) + page(9) + [5])
    d = waiting("d", page(6) + page(7))
    for one in (a, b, c, d):
        w.add(one)
    w.ready(1)
    assert [len(one.path) for one in (a, b, c, d)] == [2, 2, 1, 0]
    assert a.path[0] is b.path[0] is c.path[0]
    assert a.path[1] is b.path[1]
    assert [node.pending for node in a.path] == [3, 2]


def test_equal_prompts_share_all_but_the_page_of_the_last_token() -> None:
    """At least one token must be computed: its logits are what the first token is sampled from."""
    w = window()
    whole, longer = [waiting(i, page(1) + page(2)) for i in range(2)], [waiting(i, page(3) + page(4) + [1]) for i in range(2)]
    for one in (*whole, *longer):
        w.add(one)
    w.ready(1)
    assert [len(one.path) for one in (*whole, *longer)] == [1, 1, 2, 2]


def test_later_batches_find_the_prefixes_of_earlier_ones() -> None:
    w = window()
    w.add(waiting("a", page(1) + page(2) + [5]))
    w.add(waiting("b", page(1) + page(2) + [6]))
    assert len(w.ready(2)) == 2
    w.take(2)
    late = waiting("late", page(1) + page(2) + [7])
    w.add(late)
    w.ready(1)
    assert len(late.path) == 2


def test_without_sharing_nothing_is_expected() -> None:
    w = window(sharing=False)
    both = [waiting(i, [*page(1), i]) for i in range(2)]
    for one in both:
        w.add(one)
    assert drain(w) == [0, 1]
    assert [one.path for one in both] == [[], []]


def test_a_preempted_row_goes_first() -> None:
    w = window()
    for i in range(3):
        w.add(waiting(i, [i + 1]))
    first = w.take(len(w.ready(1)))[0]
    w.put_back(first)
    assert w.ready(1) == [first]


def test_arrivals_are_ordered_when_half_a_window_has_come_or_nothing_else_is_left() -> None:
    w = window(size=4)
    w.add(waiting("first", [9]))
    assert names(w.ready(4)) == ["first"]
    w.add(waiting("second", [8]))
    assert names(w.ready(4)) == ["first"]
    w.add(waiting("third", [7]))
    assert names(w.ready(4)) == ["first", "third", "second"]


def test_remove() -> None:
    w = window()
    for i in range(4):
        w.add(waiting(i, [i + 1]))
    w.ready(1)
    w.add(waiting(4, [9]))
    assert sorted(names(w.remove({1, 4, "stranger"}))) == [1, 4]
    assert len(w) == 3
    assert drain(w) == [0, 2, 3]
    w.add(waiting(5, [1]))
    assert names(w.remove(None)) == [5]
    assert len(w) == 0


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(0, 40))
def test_the_order_depends_on_the_requests_alone(seed: int, count: int) -> None:
    """Whatever order they come in, equal batches go out alike, each request once, with groups unbroken."""
    rng = random.Random(seed)
    prompts = [rng.choices((1, 2), k=rng.randint(1, 3 * PAGE)) for _ in range(count)]
    limits = [rng.randint(1, 5) for _ in range(count)]
    orders = []
    for _ in range(2):
        w = window()
        arrivals = [waiting(i, prompts[i], limits[i]) for i in rng.sample(range(count), count)]
        for one in arrivals:
            w.add(one)
        orders.append(w.take(len(w.ready(count))))
    for order in orders:
        assert sorted(names(order)) == list(range(count))
        starts = [tuple(prompts[i][:PAGE]) for i in names(order) if len(prompts[i]) >= PAGE]
        runs = [start for i, start in enumerate(starts) if i == 0 or starts[i - 1] != start]
        assert len(runs) == len(set(runs)), "rows that share a page were torn apart"
    assert [prompts[i] for i in names(orders[0])] == [prompts[i] for i in names(orders[1])]


@given(seed=st.integers(0, 2**32 - 1), sizes=st.lists(st.integers(0, 15), min_size=1, max_size=4))
def test_pages_are_awaited_by_the_requests_that_share_them(seed: int, sizes: list[int]) -> None:
    """Batch after batch, a page is awaited as often as requests have it among those that they share with any other."""
    rng = random.Random(seed)
    pool = BlockPool(64, PAGE)
    w = Window(pool, 100, sharing=True)
    awaited: Counter[bytes] = Counter()
    for size in sizes:
        batch = [waiting(i, rng.choices((1, 2), [4, 1], k=rng.randint(1, 5 * PAGE))) for i in range(size)]
        full = [[one.tokens[:end].tobytes() for end in range(PAGE, one.tokens.size + 1, PAGE)] for one in batch]
        often = Counter(prefix for prefixes in full for prefix in prefixes)
        paths = [[prefix for prefix in prefixes if often[prefix] > 1 or prefix in awaited][: (one.tokens.size - 1) // PAGE]
                 for one, prefixes in zip(batch, full, strict=True)]
        for one in batch:
            w.add(one)
        w.take(len(w.ready(size)))
        assert [[prefix_of(node) for node in one.path] for one in batch] == paths
        awaited.update(prefix for path in paths for prefix in path)
    stack, pending = list(pool._root.children.values()), {}
    while stack:
        node = stack.pop()
        pending[prefix_of(node)] = node.pending
        stack.extend(node.children.values())
    assert pending == awaited


def prefix_of(node: Node | None) -> bytes:
    return prefix_of(node.parent) + node.key if node is not None else b""


@pytest.mark.parametrize("most", [0, 1, 3, 9])
def test_ready_gives_no_more_than_asked_for(most: int) -> None:
    w = window()
    for i in range(3):
        w.add(waiting(i, [i + 1]))
    assert len(w.ready(most)) == min(most, 3)
    assert len(w) == 3
