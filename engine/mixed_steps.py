"""Steps in which some rows have several queries: how large their arrays are, and which of these sizes have a CUDA graph.

Launching the kernels of such a step one by one takes the host 10 to 20 ms, whatever the model. Where the GPU takes longer, that
costs nothing, and padding would. A small model would wait at every prompt, so its steps are padded to one of few shapes and
replayed; those whose shape has not come up often enough to make up for capturing it, some 30 ms, are launched as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from engine.cuda_graphs import padded
from engine.plan import StepPlan
from engine.row_table import most_rest
from kernels import ops
from kernels.shapes import cdiv, next_power_of_2

HIDDEN_FLOPS = 5e12     # of a step whose products take the GPU about as long as the host takes to launch it
SPARE = 1.25            # a captured shape serves steps down to so many times fewer tokens
WORTH = 3               # the step of a shape that is captured: two launches have cost by then about what a capture costs
MOST_SHAPES = 256       # that are captured, since every graph keeps some memory
FEWEST = 64             # tokens that shapes begin at
LEVELS = 4              # of decode rows, in the shapes that are captured beforehand
SHORT = 32              # tokens of a prompt there: more tiles of shorter ones would cost the longer ones time


class Shape(NamedTuple):
    """Sizes of a step's arrays."""

    decode: int         # rows with one query
    rest: int           # the other rows, mostly with several ...
    tokens: int         # ... and their queries
    tiles: int          # work of prefill attention
    sharing: bool       # decode rows say which prefix they share


class Shapes:
    """The shapes that are worth a graph. token_flops: of the products that a token goes through."""

    def __init__(self, token_flops: int, max_rows: int, max_len: int, max_step_tokens: int) -> None:
        self._max_rows, self._max_len, self._max_step_tokens = max_rows, max_len, max_step_tokens
        self._most_tiles = most_rest(max_step_tokens, max_rows, max_len)[1]
        self.most_tokens = min(max_step_tokens, int(HIDDEN_FLOPS / token_flops))     # of a step that is worth one
        self._seen: Counter[Shape] = Counter()
        self._rows = [*(n for n in (0, 8, 16, 32, 64, 128, *range(256, max_rows, 256)) if n < max_rows), max_rows]

    def full(self, sharing: bool) -> list[Shape]:
        """Shapes that between them serve steps of the most tokens, if prompts have SHORT tokens on average.

        To be captured before a job begins, which would launch most of its prompts' steps else before any of their shapes had
        come up often enough.
        """
        decode = [self._max_rows * level // LEVELS for level in range(LEVELS + 1)]
        shapes = dict.fromkeys(self._full(least, padded(self._rows, most), sharing) for least, most in pairwise(decode)
                               if least < self.most_tokens)
        return [s for s in shapes if s.decode + s.tokens <= SPARE * self.most_tokens]       # the others would serve none

    def _full(self, least: int, most: int, sharing: bool) -> Shape:
        """Of steps with `least` to `most` decode rows."""
        tokens = min(cdiv(self.most_tokens - least, FEWEST) * FEWEST, self._max_step_tokens)
        rest, _ = most_rest(tokens, self._max_rows, self._max_len)
        return Shape(most, rest, tokens, min(cdiv(tokens, SHORT), self._most_tiles), sharing)

    def of(self, exact: Shape, captured: Collection[Shape]) -> Shape | None:
        """What to run the next step, of this size, in: a captured shape that is not much larger, or one to capture, once it has
        come up often enough. None: as it is."""
        total = exact.decode + exact.tokens
        if total > self.most_tokens:
            return None
        room = max(SPARE * total, FEWEST)
        fitting = [s for s in captured if s.decode >= exact.decode and s.tokens >= exact.tokens and s.tiles >= exact.tiles
                   and s.sharing == exact.sharing and s.decode + s.tokens <= room]
        if fitting:
            return min(fitting, key=lambda s: (s.decode + s.tokens, s.tiles))
        shape = self._padded(exact)
        self._seen[shape] += 1
        return shape if self._seen[shape] >= WORTH and len(captured) < MOST_SHAPES else None

    def _padded(self, exact: Shape) -> Shape:
        tokens = min(_rounded(exact.tokens), self._max_step_tokens)
        rest, _ = most_rest(tokens, self._max_rows, self._max_len)
        tiles = min(next_power_of_2(max(exact.tiles, FEWEST)), self._most_tiles)
        return Shape(padded(self._rows, exact.decode), rest, tokens, tiles, exact.sharing)


def shape_of(plan: StepPlan) -> Shape:
    """As the step is, without padding."""
    counts = plan.counts[plan.num_decode :]
    return Shape(plan.num_decode, counts.size, int(counts.sum()), int(_tiles(counts).sum()), plan.shared is not None)


def _rounded(tokens: int) -> int:
    """Up to a quarter of a power of two."""
    step = max(next_power_of_2(tokens) // 8, FEWEST)
    return cdiv(tokens, step) * step


def _tiles(counts: np.ndarray) -> np.ndarray:
    """Tiles of QUERY_TILE queries of rows with so many."""
    return -(-counts // ops.QUERY_TILE)


def tiles_of(counts: np.ndarray) -> np.ndarray:
    """The work list of prefill attention for rows with so many queries: (row, first query) for each tile of QUERY_TILE queries,
    int32 [M, 2]."""
    tiles = _tiles(counts)
    row = np.repeat(np.arange(counts.size), tiles)
    first = (np.arange(row.size) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * ops.QUERY_TILE
    return np.stack([row, first], axis=1).astype(np.int32)
