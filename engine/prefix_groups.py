"""Running rows that share a prefix, put side by side so that decode attention reads the prefix once for all of them (cascade).

Two rows share the tokens of a node of the prefix tree that both their paths go through, whichever of them computed the page.
Every row belongs to the deepest node that enough running rows go through. Membership is looked at afresh every few steps: a row
that is in no group yet is only slower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from engine.block_pool import Node
from kernels import ops

EVERY = 16               # steps between two looks at who shares what
MIN_ROWS = 16            # of a group: fewer leave most of a tile of the prefix pass empty
MIN_TOKENS = 128         # of its prefix
MIN_BYTES = 64 << 20     # of keys and values that a layer need not read: at the memory's speed, what two more launches take


class PrefixGroups:
    def __init__(self, max_rows: int, page_size: int, token_bytes: int) -> None:
        """token_bytes: size of a token's keys and values in one layer."""
        self._page_size, self._token_bytes = page_size, token_bytes
        self._group = np.zeros(max_rows, dtype=np.int32)      # 0: none
        self._length = np.zeros(max_rows, dtype=np.int32)     # tokens of its prefix
        self._changed, self._age = False, 0

    def join(self, path: Sequence[Node]) -> None:
        for node in path:
            node.running += 1
        self._changed = self._changed or bool(path)

    def leave(self, row: int, path: Sequence[Node]) -> None:
        for node in path:
            node.running -= 1
        self._group[row] = 0

    def arrange(self, rows: np.ndarray,
                paths: Callable[[], Mapping[int, Sequence[Node]]]) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Decode rows of a step with groups side by side; the tokens each shares, int32 [N], and the tiles, int32 [M, 2].

        None twice where sharing would not pay. `paths`: asked for those of every running row, now and then.
        """
        self._age += 1
        if self._changed and self._age >= EVERY:
            self._look(paths())
        groups = self._group[rows]
        if not groups.any():
            return rows, None, None
        order = np.argsort(groups, kind="stable")
        arranged, groups = rows[order], groups[order]
        first = np.flatnonzero(np.diff(groups, prepend=-1))
        counts = np.diff(first, append=rows.size)
        kept = (groups[first] > 0) & (counts >= MIN_ROWS)
        first, counts = first[kept], counts[kept]
        lengths = self._length[arranged[first]]
        if int((counts * lengths).sum()) * self._token_bytes < MIN_BYTES:
            return rows, None, None
        shared = np.zeros(rows.size, dtype=np.int32)
        tiles = []
        for start, count, length in zip(first.tolist(), counts.tolist(), lengths.tolist(), strict=True):
            shared[start : start + count] = length
            tiles += [(at, min(ops.PREFIX_TILE, start + count - at)) for at in range(start, start + count, ops.PREFIX_TILE)]
        return arranged, shared, np.array(tiles, dtype=np.int32)

    def _look(self, paths: Mapping[int, Sequence[Node]]) -> None:
        self._changed, self._age = False, 0
        self._group[:] = 0
        numbers: dict[int, int] = {}
        for row, path in paths.items():
            node = next((n for n in reversed(path) if n.running >= MIN_ROWS), None)
            if node is not None and node.depth * self._page_size >= MIN_TOKENS:
                self._group[row] = numbers.setdefault(id(node), len(numbers) + 1)
                self._length[row] = node.depth * self._page_size
