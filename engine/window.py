"""The window of waiting requests, ordered so that rows that share a prefix come together and long ones come first."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import islice, pairwise

import numpy as np

from engine.block_pool import BlockPool, Node
from engine.guided.grammar import Guide
from engine.request import Request, TokenLogprobs


@dataclass(slots=True, eq=False)
class Waiting:
    """A request without a row. After a preemption `tokens` also holds what it had produced, and the rest what was counted."""

    request: Request
    tokens: np.ndarray
    path: list[Node] = field(default_factory=list)       # the pages of its prompt that others share or will share
    guide: Guide | None = None
    state: int = 0                                       # of its automaton, where it has one
    cached_tokens: int | None = None
    forced_tokens: int = 0
    logprobs: list[TokenLogprobs | None] | None = None
    began: float = 0.0                                   # time.monotonic() when it was first let in
    key: bytes = b""                                     # until it is ordered: its tokens, the highest byte of each first


class Window:
    """Arrivals are ordered in batches: when the ordered ones run out, or when half a window has arrived."""

    def __init__(self, pool: BlockPool, size: int, sharing: bool) -> None:
        self._pool, self._size, self._sharing = pool, size, sharing
        self._arrived: list[Waiting] = []
        self._ordered: deque[Waiting] = deque()

    def __len__(self) -> int:
        return len(self._arrived) + len(self._ordered)

    def add(self, waiting: Waiting) -> None:
        if self._sharing:
            waiting.key = prefix_order(waiting.tokens)           # not when all are ordered, since a step waits for that
        self._arrived.append(waiting)

    def put_back(self, waiting: Waiting) -> None:
        """A preempted row goes first: what it holds of the job's work is the oldest."""
        self._ordered.appendleft(waiting)

    def put_back_all(self, batch: list[Waiting]) -> None:
        """The same for many, which may share prefixes again."""
        for waiting in batch:
            waiting.key = prefix_order(waiting.tokens)
        self._ordered.extendleft(waiting for group in reversed(self._grouped(batch)) for waiting in reversed(group))

    def ready(self, most: int) -> list[Waiting]:
        """The first `most` in order, still in the window."""
        if self._arrived and (not self._ordered or len(self._arrived) * 2 >= self._size):
            self._order()
        return list(islice(self._ordered, most))

    def take(self, n: int) -> list[Waiting]:
        return [self._ordered.popleft() for _ in range(n)]

    def remove(self, ids: set | None) -> list[Waiting]:
        """Take out those whose request id is in `ids` (None: all)."""
        gone = [w for w in (*self._ordered, *self._arrived) if ids is None or w.request.id in ids]
        out = set(map(id, gone))
        self._ordered = deque(w for w in self._ordered if id(w) not in out)
        self._arrived = [w for w in self._arrived if id(w) not in out]
        return gone

    def _order(self) -> None:
        batch, self._arrived = self._arrived, []
        groups = self._grouped(batch)
        groups.sort(key=lambda group: -max(w.request.params.max_tokens for w in group))
        self._ordered.extend(w for group in groups for w in group)

    def _grouped(self, batch: list[Waiting]) -> list[list[Waiting]]:
        return self._groups(batch) if self._sharing else [[w] for w in batch]

    def _groups(self, batch: list[Waiting]) -> list[list[Waiting]]:
        """Runs of rows, in the order of their tokens, where neighbours share a page or more; notes what each will share."""
        page = self._pool.page_size
        batch.sort(key=lambda w: w.key)
        shared = [_common(a.key, b.key, 4 * page) for a, b in pairwise(batch)]
        groups: list[list[Waiting]] = []
        for i, waiting in enumerate(batch):
            before = shared[i - 1] if i else 0
            after = shared[i] if i < len(shared) else 0
            most = (waiting.tokens.size - 1) // page        # at least one token is computed, for its logits
            start = batch[i - 1].path[:before] if before else []
            pages = max(before, after, self._pool.known(waiting.tokens, start))
            waiting.path = self._pool.expect(waiting.tokens, min(pages, most), start)
            if before:
                groups[-1].append(waiting)
            else:
                groups.append([waiting])
        for waiting in batch:
            waiting.key = b""
        return groups


def prefix_order(tokens: np.ndarray) -> bytes:
    """What sorts token ids, int32 [tokens], so that common prefixes stand together: bytes, the highest of each id first."""
    return tokens.astype(">i4").tobytes()


def _common(a: bytes, b: bytes, size: int) -> int:
    """How many pieces of `size` bytes two strings have in common from their start."""
    if a[:size] != b[:size]:             # most often
        return 0
    n = min(len(a), len(b))
    differs = (np.frombuffer(a, np.uint8, n) != np.frombuffer(b, np.uint8, n)).tobytes().find(1)
    return (n if differs < 0 else differs) // size
