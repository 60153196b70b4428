"""The page pool and its prefix tree, on random traces against a model that remembers what every page holds."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.block_pool import BlockPool, Node, OutOfPages

PAGE = 4


@dataclass(eq=False)
class Row:
    """A request and, once it runs, the row it has."""

    tokens: np.ndarray
    path: list[Node]
    running: bool = False
    pages: list[int] = field(default_factory=list)
    computed: int = 0                # pages
    published: int = 0


class Trace:
    """Drives a pool as a scheduler would, in any order that its contract allows."""

    def __init__(self, seed: int, num_pages: int) -> None:
        self.random = random.Random(seed)
        self.pool = BlockPool(num_pages, PAGE)
        self.rows: list[Row] = []
        self.content: dict[int, bytes] = {}            # page -> the whole prefix up to its end, once it is computed
        length = self.random.randint(PAGE, 5 * PAGE)
        self.stems = [np.array(self.random.choices(range(3), k=length), dtype=np.int32) for _ in range(3)]

    def turn(self) -> None:
        actions = [self.come, self.come, self.run, self.run, self.grow, self.grow, self.grow, self.leave]
        self.random.choice(actions)()
        self.check()

    def come(self) -> None:
        if len(self.rows) >= 12:
            return
        stem = self.random.choice(self.stems)
        tail = self.random.choices(range(3), k=self.random.randint(1, 2 * PAGE))
        tokens = np.concatenate([stem[: self.random.randint(0, stem.size)], np.array(tail, dtype=np.int32)])
        pages = self.random.randint(0, (tokens.size - 1) // PAGE)
        known = self.pool.known(tokens)
        path = self.pool.expect(tokens, pages)
        assert len(path) == pages
        assert self.pool.known(tokens) == max(known, pages)
        self.rows.append(Row(tokens, path))

    def run(self) -> None:
        waiting = [row for row in self.rows if not row.running]
        if waiting:
            row = self.random.choice(waiting)
            row.running, row.pages = True, self.pool.arrive(row.path).tolist()
            row.computed = row.published = len(row.pages)
            for i, page in enumerate(row.pages):
                assert self.content[page] == self.prefix(row, i), "a page was shared before it was full, or holds another prefix"

    def grow(self) -> None:
        running = [row for row in self.rows if row.running]
        if not running:
            return
        row = self.random.choice(running)
        n = self.random.randint(1, 3)
        held = {page for other in self.rows for page in other.pages}
        before = self.pool.refs.copy()
        try:
            pages = self.pool.alloc(n).tolist()
        except OutOfPages:
            assert n > self.pool.usable - len(held), "refused although there are pages enough"
            assert (self.pool.refs == before).all(), "a refused request changed the pool"
            return
        assert len(set(pages)) == n
        assert 0 not in pages, "the dummy page was given away"
        assert not held & set(pages), "a page was given twice"
        row.pages += pages
        for page in pages:
            self.content.pop(page, None)               # from now on it is written
        while row.computed < len(row.pages) and row.computed < row.tokens.size // PAGE:
            self.content[row.pages[row.computed]] = self.prefix(row, row.computed)
            row.computed += 1
        while row.published < min(row.computed, len(row.path)):
            self.pool.publish(row.path[row.published], row.pages[row.published])
            row.published += 1

    def leave(self) -> None:
        """It ends, is preempted, or is aborted while it waits."""
        if self.rows:
            row = self.rows.pop(self.random.randrange(len(self.rows)))
            if not row.running:
                self.pool.release(self.pool.arrive(row.path))
            self.pool.forget(row.path)
            self.pool.release(np.array(row.pages, dtype=np.int32))

    @staticmethod
    def prefix(row: Row, page: int) -> bytes:
        return row.tokens[: (page + 1) * PAGE].tobytes()

    def check(self) -> None:
        pool = self.pool
        pool.check_integrity([np.array(row.pages, dtype=np.int32) for row in self.rows])
        assert pool.used == len({page for row in self.rows for page in row.pages})
        nodes = tree(pool)
        cached = {node.page for node in nodes if node.page}
        assert pool.evictable + pool.shared == len(cached), "a page is cached where nobody can find it"
        waiting: dict[int, int] = {}
        for row in self.rows:
            for node in row.path if not row.running else ():
                waiting[id(node)] = waiting.get(id(node), 0) + 1
        assert {id(node): node.pending for node in nodes if node.pending} == waiting


def tree(pool: BlockPool) -> list[Node]:
    nodes, stack = [], list(pool._root.children.values())
    while stack:
        node = stack.pop()
        nodes.append(node)
        stack.extend(node.children.values())
    return nodes


@given(seed=st.integers(0, 2**32 - 1), turns=st.integers(1, 400), num_pages=st.integers(2, 40))
def test_random_traces(seed: int, turns: int, num_pages: int) -> None:
    trace = Trace(seed, num_pages)
    for _ in range(turns):
        trace.turn()
    while trace.rows:
        trace.leave()
        trace.check()
    pool = trace.pool
    assert pool.used == pool.shared == 0
    assert sorted(pool.alloc(pool.usable)) == list(range(1, num_pages)), "a page leaked"
    assert tree(pool) == [], "the tree keeps what nobody holds, computes or waits for"


def tokens(*pages: int) -> np.ndarray:
    """One page of equal tokens for each number, and a token past them."""
    return np.array([t for p in pages for t in [p] * PAGE] + [99], dtype=np.int32)


def computed(pool: BlockPool, *pages: int) -> tuple[list[Node], np.ndarray]:
    """A row that has computed and published such a prompt."""
    path = pool.expect(tokens(*pages), len(pages))
    held = pool.arrive(path)
    own = pool.alloc(len(pages) - held.size)
    for node, page in zip(path[held.size :], own.tolist(), strict=True):
        pool.publish(node, page)
    return path, np.concatenate([held, own])


def leave(pool: BlockPool, path: list[Node], pages: np.ndarray) -> None:
    pool.forget(path)
    pool.release(pages)


def test_a_prefix_outlives_its_row_and_is_given_to_the_next() -> None:
    pool = BlockPool(10, PAGE)
    path, pages = computed(pool, 1, 2)
    assert (pool.used, pool.shared, pool.evictable) == (2, 2, 0)
    leave(pool, path, pages)
    assert (pool.used, pool.shared, pool.evictable) == (0, 0, 2)
    again = pool.expect(tokens(1, 2, 3), 3)
    assert pool.arrive(again).tolist() == pages.tolist()
    assert pool.refs[pages].tolist() == [2, 2]


def test_pages_that_nobody_waits_for_are_evicted_first() -> None:
    pool = BlockPool(5, PAGE)
    wanted = computed(pool, 1, 2)
    pool.expect(tokens(1, 2), 2)
    leave(pool, *wanted)
    unwanted = computed(pool, 3, 4)
    leave(pool, *unwanted)
    assert set(pool.alloc(2).tolist()) == set(unwanted[1].tolist())
    assert pool.known(tokens(3, 4)) == 0
    assert pool.known(tokens(1, 2)) == 2
    assert set(pool.alloc(2).tolist()) == set(wanted[1].tolist())      # rather than fail
    assert pool.known(tokens(1, 2)) == 2, "a request still waits for these nodes"


def test_pages_that_rows_hold_stay_cached() -> None:
    """To uncache them would free nothing."""
    pool = BlockPool(8, PAGE)
    held = computed(pool, 1, 2)
    leave(pool, *computed(pool, 3, 4))
    pool.alloc(5)
    assert pool.known(tokens(1, 2)) == 2
    assert pool.arrive(pool.expect(tokens(1, 2), 2)).tolist() == held[1].tolist()


def test_the_dummy_page_is_never_given_away() -> None:
    pool = BlockPool(4, PAGE)
    assert sorted(pool.alloc(3).tolist()) == [1, 2, 3]
    with pytest.raises(OutOfPages):
        pool.alloc(1)


def test_a_refused_request_evicts_nothing() -> None:
    pool = BlockPool(5, PAGE)
    leave(pool, *computed(pool, 1, 2))
    pool.alloc(1)
    with pytest.raises(OutOfPages):
        pool.alloc(4)
    assert pool.known(tokens(1, 2)) == 2
    assert pool.evictable == 2


def test_a_page_published_twice_is_kept_once() -> None:
    pool = BlockPool(6, PAGE)
    paths = [pool.expect(tokens(1), 1) for _ in range(2)]
    for path in paths:
        assert pool.arrive(path).size == 0
    first, second = pool.alloc(1), pool.alloc(1)
    pool.publish(paths[0][0], int(first[0]))
    pool.publish(paths[1][0], int(second[0]))
    assert pool.refs[first[0]] == 2
    assert pool.refs[second[0]] == 1
    pool.check_integrity([first, second])


def test_a_row_may_publish_after_its_prefix_was_evicted() -> None:
    """Two rows computed the same page; the one that published it left, and the pool took the page back."""
    pool = BlockPool(5, PAGE)
    paths = [pool.expect(tokens(1, 2), 2) for _ in range(2)]
    for path in paths:
        pool.arrive(path)
    mine = pool.alloc(2)
    other = pool.alloc(1)
    pool.publish(paths[1][0], int(other[0]))
    pool.forget(paths[1])
    pool.release(other)
    taken = pool.alloc(2)                                # evicts what the other row published
    pool.publish(paths[0][1], int(mine[1]))
    pool.check_integrity([mine, taken])
    leave(pool, paths[0], mine)
    pool.release(taken)
    pool.alloc(4)
    assert tree(pool) == []


def test_a_tail_is_found_by_what_it_shares() -> None:
    pool = BlockPool(6, PAGE)
    path, waiting = pool.expect(tokens(1), 1), pool.expect(tokens(1), 1)
    pool.arrive(path)
    mine = pool.alloc(2)
    pool.publish(path[0], int(mine[0]))
    pool.offer_tail(path[0], np.array([5, 6], dtype=np.int32), int(mine[1]))
    assert pool.tail(path[0], np.array([5, 7, 8], dtype=np.int32)) == (mine[1], 1)
    pool.offer_tail(path[0], np.array([5, 6, 7], dtype=np.int32), int(mine[1]))             # its row has come further
    assert pool.tail(path[0], np.array([5, 6, 7, 8], dtype=np.int32)) == (mine[1], 3)
    assert pool.tail(path[0], np.array([6], dtype=np.int32))[1] == 0
    pool.forget(path)
    pool.release(mine)
    pool.check_integrity([])
    assert pool.evictable == 2                                                              # kept for the one that waits
    pool.release(pool.arrive(waiting))
    pool.forget(waiting)
    pool.alloc(5)
    assert tree(pool) == []


def test_a_tail_nobody_waits_for_is_not_kept() -> None:
    pool = BlockPool(4, PAGE)
    path = pool.expect(tokens(1), 1)
    pool.arrive(path)
    mine = pool.alloc(2)
    pool.publish(path[0], int(mine[0]))
    pool.offer_tail(path[0], np.array([5, 6], dtype=np.int32), int(mine[1]))
    assert pool.tail(path[0], np.array([5], dtype=np.int32)) == (0, 0)


def test_a_prefix_of_many_pages_is_dropped_at_once() -> None:
    """As deep as a context of 128k tokens makes it, which is beyond Python's recursion limit."""
    pool = BlockPool(4098, PAGE)
    leave(pool, *computed(pool, *range(1, 4097)))
    pool.alloc(4097)
    assert tree(pool) == []


def test_a_pool_needs_a_page_besides_the_dummy() -> None:
    with pytest.raises(ValueError, match="at least 2 pages"):
        BlockPool(1, PAGE)
