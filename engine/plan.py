"""StepPlan: what one step runs. Made by the scheduler, launched by the runner, read again when its tokens are back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.guided.grammar import Guide
from engine.request import SamplingParams


@dataclass(frozen=True, slots=True)
class Special:
    """A sampled row that wants more than the sampling kernel does. `index`: into the plan's sampled rows."""

    index: int
    row: int
    params: SamplingParams
    prompt_len: int
    length: int                 # tokens before the one to be sampled
    forbidden: np.ndarray       # int32 ids that must not come yet (min_tokens)


@dataclass(slots=True, eq=False)
class StepPlan:
    """One step: table rows [decode | rest], with one query each and with any number, mostly several."""

    rows: np.ndarray            # int32 [N]
    starts: np.ndarray          # int32 [N] position of the first query
    counts: np.ndarray          # int32 [N] queries
    num_decode: int
    sampled: np.ndarray         # int32 [S] index into rows, of those that sample a token
    generations: np.ndarray     # int32 [S] of the sampled rows, so that late results are known
    guides: list[Guide]         # of the sampled rows under a grammar ...
    guided: np.ndarray          # ... int32, and their index into sampled
    by_automata: bool           # some row is under an automaton
    special: list[Special]
    shared: np.ndarray | None          # int32 [num_decode] and [M, 2]: see PrefixGroups.arrange
    prefix_tiles: np.ndarray | None
    copies: np.ndarray                 # int32 [C, 2] pages (from, to) to copy before anything is computed

    @property
    def num_tokens(self) -> int:
        return int(self.counts.sum())


def rehearsal(row: int, decode: int, counts: np.ndarray, sharing: bool) -> StepPlan:
    """A step in which one row stands for all: `decode` with one query and one with each of `counts`.

    As many sample as there are rows below it. sharing: they may say which prefix they share, and share none.
    """
    size, none, pairs = decode + counts.size, np.empty(0, dtype=np.int32), np.empty((0, 2), dtype=np.int32)
    each = np.concatenate([np.ones(decode, dtype=np.int32), counts.astype(np.int32)])
    return StepPlan(np.full(size, row, dtype=np.int32), np.zeros(size, dtype=np.int32), each, decode,
                    np.arange(min(size, row), dtype=np.int32), np.zeros(size, dtype=np.int32), [], none, False, [],
                    np.zeros(decode, dtype=np.int32) if sharing else None, pairs if sharing else None, pairs)
