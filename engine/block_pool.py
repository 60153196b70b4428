"""KV pages: who holds them, and which hold a prefix that others can share.

Ownership. Page 0 is the dummy page, nobody's. Every other page is free, or held by one or more rows, or cached (held by the
prefix tree alone), or both held and cached. refs[page] counts rows plus one for the tree. What a second holder may read
of a page is never written again: rows write past it.

Prefix tree. A node stands for one full page of tokens after its parent's, keyed by the tokens themselves, so a match is exact.
`pending` counts the requests in the window that still need the node: the dataset is known, so pages nobody waits for are evicted
first. A node may also have a tail: a page that goes on where the node ends, of which others need the first few tokens. It is not
shared but copied, since its row goes on writing past those.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


class OutOfPages(Exception):
    """The pool cannot provide the pages asked for, not even by evicting."""


TAIL = b"tail?"          # the key of a node's tail; those of full pages have a multiple of four bytes


class Node:
    """One page of a prefix. `page` is 0 while no row has computed it; `parent` is None once the node has left the tree."""

    __slots__ = ("children", "depth", "key", "page", "parent", "pending", "running", "tokens")

    def __init__(self, parent: Node | None, key: bytes) -> None:
        self.parent, self.key, self.page, self.pending = parent, key, 0, 0
        self.depth: int = parent.depth + 1 if parent is not None else 0           # pages from the root, its own included
        self.running = 0                                                     # running rows whose prefix goes through it
        self.children: dict[bytes, Node] = {}
        self.tokens: np.ndarray | None = None                                # of a tail: what its page holds, int32

    @property
    def wanted(self) -> bool:
        """Some request in the window still needs it. A tail may serve whoever needs what stands before it."""
        return bool(self.parent.pending if self.key == TAIL and self.parent is not None else self.pending)


class BlockPool:
    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 2:
            raise ValueError(f"a KV pool needs at least 2 pages, got {num_pages}")
        self.num_pages, self.page_size = num_pages, page_size
        self.refs = np.zeros(num_pages, dtype=np.int32)
        self._free = np.arange(num_pages - 1, 0, -1, dtype=np.int32)     # a stack: the lowest pages come first
        self._top = num_pages - 1
        self._root = Node(None, b"")
        self._cached: dict[int, Node] = {}                               # page -> node, oldest first
        self._in_tree = np.zeros(num_pages, dtype=bool)                  # the same as a mask

    # --- pages ---

    @property
    def usable(self) -> int:
        return self.num_pages - 1

    @property
    def used(self) -> int:
        """Pages that rows hold; what only the tree holds can be evicted at once and counts as free."""
        return self.usable - self._top - self.evictable

    @property
    def evictable(self) -> int:
        return int(np.count_nonzero(self._in_tree & (self.refs == 1)))

    @property
    def shared(self) -> int:
        """Pages of the tree that rows hold."""
        return int(np.count_nonzero(self._in_tree & (self.refs > 1)))

    def unheld(self, paths: Iterable[Sequence[Node]]) -> int:
        """Nodes of these paths that no row holds a page of, each counted once: pages that are taken when rows with them run."""
        nodes = {node for path in paths for node in path}
        return sum(1 for node in nodes if not node.page or self.refs[node.page] == 1)

    def alloc(self, n: int) -> np.ndarray:
        """n pages, int32, held once each, evicting cached ones at need. Raises OutOfPages and changes nothing if it cannot."""
        if n > self._top:
            if n > self._top + self.evictable:
                raise OutOfPages
            self._evict(n - self._top)
        pages = self._free[self._top - n : self._top][::-1].copy()
        self._top -= n
        self.refs[pages] = 1
        return pages

    def hold(self, pages: np.ndarray) -> None:
        self.refs[pages] += 1

    def release(self, pages: np.ndarray) -> None:
        """Give back one hold on each page, as often as it is in `pages`."""
        np.subtract.at(self.refs, pages, 1)
        freed = np.unique(pages[self.refs[pages] == 0])
        self._free[self._top : self._top + freed.size] = freed[::-1]
        self._top += freed.size

    # --- prefixes ---

    def expect(self, tokens: np.ndarray, pages: int, start: Sequence[Node] = ()) -> list[Node]:
        """The nodes of the first `pages` full pages of `tokens`, made where missing; each is pending once more.

        `start`: the first of these nodes, where the caller has them; it need not have all, and may have more.
        """
        path = list(start[:pages])
        node = path[-1] if path else self._root
        for i in range(len(path), pages):
            key = tokens[i * self.page_size : (i + 1) * self.page_size].tobytes()
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = Node(node, key)
            path.append(child)
            node = child
        for node in path:
            node.pending += 1
        return path

    def known(self, tokens: np.ndarray, start: Sequence[Node] = ()) -> int:
        """How many full pages from the start of `tokens` the tree has nodes for; `start`: the first of these nodes."""
        node, n = (start[-1] if start else self._root), len(start)
        while (child := node.children.get(tokens[n * self.page_size : (n + 1) * self.page_size].tobytes())) is not None:
            node, n = child, n + 1
        return n

    def arrive(self, path: Sequence[Node]) -> np.ndarray:
        """A request that expected `path` runs (or leaves): no longer pending. Returns the pages computed so far, held for it."""
        pages = []
        for node in path:
            node.pending -= 1
        for node in path:
            if not node.page:
                break
            pages.append(node.page)
        held = np.array(pages, dtype=np.int32)
        self.hold(held)
        return held

    def publish(self, node: Node, page: int) -> None:
        """Offer a row's page for sharing, once the step that computes it is planned (later launches read it in stream order)."""
        if node.page == 0 and node.parent is not None:
            node.page = page
            self.refs[page] += 1
            self._cached[page] = node
            self._in_tree[page] = True

    def offer_tail(self, node: Node, tokens: np.ndarray, page: int) -> None:
        """Offer a row's page for copying: it goes on after `node` with `tokens`, which are computed and stay as they are."""
        tail = node.children.get(TAIL)
        if tail is not None and tail.page == page:
            tail.tokens = tokens.copy()                  # the row has come further
        elif tail is None and node.parent is not None and node.pending:
            tail = node.children[TAIL] = Node(node, TAIL)
            tail.tokens = tokens.copy()
            self.publish(tail, page)

    def tail(self, node: Node, tokens: np.ndarray) -> tuple[int, int]:
        """(page, n): a page that goes on after `node` as `tokens` do for n tokens; n is 0 where there is none."""
        tail = node.children.get(TAIL)
        if tail is None or tail.tokens is None:
            return 0, 0
        n = min(tail.tokens.size, tokens.size)
        if n and tail.tokens[0] != tokens[0]:            # mostly so; spares the rest
            return tail.page, 0
        differs = np.flatnonzero(tail.tokens[:n] != tokens[:n])
        return tail.page, int(differs[0]) if differs.size else n

    def forget(self, path: Sequence[Node]) -> None:
        """A request that ran with `path` (or left) needs it no longer: what it alone kept in the tree goes."""
        if path:
            self._prune(path[-1])

    def _prune(self, node: Node | None) -> None:
        """Take a node out of the tree, and then its parents, as far as nobody waits for them and they hold no page."""
        while node is not None and node.parent is not None and not (node.page or node.pending or node.children):
            del node.parent.children[node.key]
            node.parent, node = None, node.parent

    def _evict(self, n: int) -> None:
        """Free n pages or more that only the tree holds, if there are as many: the oldest that nobody waits for first.

        A parent is pending wherever a child is, so dropping a node with all below it never drops what is waited for early.
        """
        n = max(n, len(self._cached) // 16)      # some at a time, since finding them costs a walk
        candidates = [node for page, node in self._cached.items() if self.refs[page] == 1]
        unwanted = [node for node in candidates if not node.wanted]
        wanted = [node for node in reversed(candidates) if node.wanted]
        for node in (*unwanted, *wanted):
            if n <= 0:
                return
            if node.page:
                n -= self._drop(node)

    def drop_cached(self) -> None:
        """Uncache every prefix. Pages that rows hold stay theirs; what is waited for stays expected."""
        for node in list(self._cached.values()):
            if node.page:
                self._drop(node)

    def _drop(self, node: Node) -> int:
        """Uncache a node and everything below it: without it they cannot be reached. Returns the pages freed."""
        below = [node]
        for n in below:                          # grows as it goes; a recursion would be as deep as a prefix has pages
            below.extend(n.children.values())
        freed = 0
        for n in reversed(below):                # children before their parents
            if n.page:
                freed += self._uncache(n)
            self._prune(n)
        return freed

    def _uncache(self, node: Node) -> int:
        """Take its page from a node. Returns the pages freed: 1, or 0 where a row still holds it."""
        page, node.page = node.page, 0
        del self._cached[page]
        self._in_tree[page] = False
        self.refs[page] -= 1
        if self.refs[page]:
            return 0
        self._free[self._top] = page
        self._top += 1
        return 1

    def check_integrity(self, holdings: Sequence[np.ndarray]) -> None:
        """Raise AssertionError unless the counts agree with the rows' block tables (`holdings`) and the tree."""
        refs = np.zeros_like(self.refs)
        for pages in holdings:
            np.add.at(refs, pages, 1)
        for page, node in self._cached.items():
            assert node.page == page, f"page {page} is cached by a node that holds {node.page}"
            refs[page] += 1
        assert (refs == self.refs).all(), f"counts differ on pages {np.flatnonzero(refs != self.refs).tolist()}"
        free = np.sort(self._free[: self._top])
        expected = np.flatnonzero(self.refs == 0)[1:]
        assert (free == expected).all(), "the free list and the counts disagree"
