"""The KV pages of the running rows: prefixes that they take over, pages that they grow by, and all that they give back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.block_pool import BlockPool, Node, OutOfPages
from engine.prefix_groups import PrefixGroups
from engine.rows import Rows
from engine.window import Waiting


class RowPages:
    """groups: to be told which rows share prefixes; None where nothing is to be gained by it."""

    def __init__(self, rows: Rows, pool: BlockPool, groups: PrefixGroups | None) -> None:
        self._rows, self._pool, self._groups, self._page = rows, pool, groups, pool.page_size
        self._copies: dict[int, tuple[int, int]] = {}       # for the next step: row -> pages (from, to)
        self._offers: list[tuple[Node, int, int]] = []      # (node, row, tokens): tails that the step computes
        self.prompt_tokens = self.cached_tokens = 0

    def arrive(self, row: int) -> None:
        """Before its first chunk a row takes the pages of its prefix that are computed by now, or will be in this step."""
        r = self._rows
        if r.arrived[row]:
            return
        waiting = r.live[row].waiting
        r.arrived[row] = True
        cached = self._take_prefix(row, waiting) if waiting.path else 0
        if waiting.cached_tokens is None:
            waiting.cached_tokens = cached
            self.prompt_tokens += waiting.request.prompt.size
            self.cached_tokens += cached

    def _take_prefix(self, row: int, waiting: Waiting) -> int:
        """Returns how many tokens need not be computed."""
        r, shared = self._rows, self._pool.arrive(waiting.path)
        n, cached = shared.size, shared.size * self._page
        r.live[row].published = n
        r.pages[row, :n], r.num_pages[row] = shared, n
        if n == len(waiting.path):
            cached += self._copy_tail(row, waiting.path[-1])
        r.computed[row] = cached
        if not waiting.request.params.has_penalties:                         # they read the whole history
            r.staged[row] = cached
        if self._groups is not None:
            self._groups.join(waiting.path)
        return cached

    def _copy_tail(self, row: int, node: Node) -> int:
        """Take over the tokens after the last full page that a row before has computed too; returns how many.

        The page copied from is held until the step is planned, so that none is both read and written by the step's copies. So a
        row copies only if there are pages for all its tokens besides: else it might be that page that it waits for.
        """
        r = self._rows
        n = int(r.num_pages[row])
        first = n * self._page
        page, same = self._pool.tail(node, r.tokens[row, first : int(r.prompt_len[row]) - 1])  # one is left, for its logits
        if not same:
            return 0
        source = np.array([page], dtype=np.int32)
        self._pool.hold(source)
        try:
            self.grow(row, int(r.known[row]))
        except OutOfPages:
            self._pool.release(source)
            return 0
        self._copies[row] = page, int(r.pages[row, n])
        return same

    def grow_decodes(self, decode: np.ndarray) -> None:
        """Give decode rows the page that their next token needs. Raises OutOfPages, and changes nothing, if there are too few."""
        r = self._rows
        short = decode[r.computed[decode] // self._page >= r.num_pages[decode]]
        r.pages[short, r.num_pages[short]] = self._pool.alloc(short.size)
        r.num_pages[short] += 1

    def grow(self, row: int, upto: int) -> None:
        """Give a row pages for positions below `upto`. Raises OutOfPages, and changes nothing, if there are too few."""
        have = int(self._rows.num_pages[row])
        need = -(-upto // self._page) - have
        if need > 0:
            self._rows.pages[row, have : have + need] = self._pool.alloc(need)
            self._rows.num_pages[row] += need

    def publish(self, row: int, upto: int) -> None:
        """Offer the full pages below position `upto` that others expect; a launch later in stream order may read them."""
        live, page = self._rows.live[row], self._page
        while live.published < len(live.waiting.path) and (live.published + 1) * page <= upto:
            self._pool.publish(live.waiting.path[live.published], int(self._rows.pages[row, live.published]))
            live.published += 1
        size = min(upto - live.published * page, page)
        if live.waiting.path and live.published == len(live.waiting.path) and size > 0:
            self._offers.append((live.waiting.path[-1], row, size))

    def copies(self) -> np.ndarray:
        """int32 [C, 2] pages (from, to) that the step has to copy before it computes anything."""
        return np.array(list(self._copies.values()), dtype=np.int32).reshape(-1, 2)

    def planned(self) -> None:
        """What the step computes can be copied from the next one on, and what it copies from may be freed."""
        for node, row, size in self._offers:
            first = node.depth * self._page
            self._pool.offer_tail(node, self._rows.tokens[row, first : first + size], int(self._rows.pages[row, node.depth]))
        for source, _ in self._copies.values():
            self._pool.release(np.array([source], dtype=np.int32))
        self._copies, self._offers = {}, []

    def paths(self) -> dict[int, list[Node]]:
        return {row: live.waiting.path for row, live in self._rows.live.items() if self._rows.arrived[row]}

    def leave(self, rows: Sequence[int]) -> None:
        """These rows end: what they hold is given back, and they are free."""
        held = []
        for row in rows:
            path, arrived = self._rows.live[row].waiting.path, bool(self._rows.arrived[row])
            self.depart(path, arrived)
            if path and arrived and self._groups is not None:
                self._groups.leave(row, path)
            if row in self._copies:
                held.append(np.array([self._copies.pop(row)[0]], dtype=np.int32))
            held.append(self._rows.pages[row, : self._rows.num_pages[row]])
        self._pool.release(np.concatenate(held))
        self._rows.leave(rows)

    def depart(self, path: list[Node], arrived: bool) -> None:
        """A request ends its interest in the prefixes of its path."""
        if path and not arrived:
            self._pool.release(self._pool.arrive(path))
        self._pool.forget(path)
