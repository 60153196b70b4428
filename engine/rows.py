"""The running rows as the host knows them: an array for each number that a row has, and one object for the rest.

A row has `known` tokens, of which `computed` have their keys and values. `known` counts tokens that the device has sampled and
the host has not read yet, so that step N + 1 can be planned before step N's tokens are back; `seen` counts those the host has.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.guided.grammar import Guide
from engine.request import Request, TokenLogprobs
from engine.row_table import RowTable
from engine.stop_strings import StopStrings
from engine.window import Waiting

MAX_STOP_IDS = 16


@dataclass(slots=True, eq=False)
class Live:
    """What a running row has beyond the arrays."""

    waiting: Waiting
    guide: Guide | None
    stop: StopStrings | None
    logprobs: list[TokenLogprobs | None] | None
    published: int = 0          # nodes of the path that it has offered or found computed


class Rows:
    def __init__(self, table: RowTable, end_ids: tuple[int, ...]) -> None:
        self.end_ids, self.max_len = end_ids, table.max_len
        rows = table.max_rows

        def numbers() -> np.ndarray:
            return np.zeros(rows, dtype=np.int32)

        def flags() -> np.ndarray:
            return np.zeros(rows, dtype=bool)

        self.tokens = np.zeros((rows, table.max_len + 1), dtype=np.int32)     # what the host has seen
        self.pages = np.zeros((rows, table.pages_per_row), dtype=np.int32)
        self.num_pages = numbers()
        self.known, self.seen, self.computed = numbers(), numbers(), numbers()
        self.staged, self.staged_pages = numbers(), numbers()                 # tokens and pages that the device has of it
        self.prompt_len, self.limit, self.least = numbers(), numbers(), numbers()
        self.shared_pages = numbers()                                         # of the path
        self.order = numbers()                                                # of admission
        self.generation = numbers()                                           # results of an older one are dropped
        self.state = numbers()                          # of its automaton, after what is seen; 0: none
        self.forced = numbers()                         # tokens that the grammar left no choice for
        self.stop_ids = np.full((rows, MAX_STOP_IDS), -1, dtype=np.int32)
        self.active = flags()
        self.arrived = flags()                          # has taken the pages of its prefix: see RowPages.arrive
        self.stale = flags()                            # the device has another state of the row
        self.fresh = flags()                            # the device has not its sampling parameters
        self.exact = flags()                            # ends at its limit and nowhere else
        self.guided = flags()                           # by a guide
        self.watched = flags()                          # a guide or stop strings: looked at after each token
        self.special = flags()                          # penalties, min_tokens or logprobs: more than the kernel does
        self.live: dict[int, Live] = {}
        self.free = deque(range(rows))
        self._entered = 0

    def limit_of(self, request: Request) -> int:
        """The most tokens it may come to, its prompt included."""
        return min(request.prompt.size + request.params.max_tokens, self.max_len)

    def enter(self, batch: Sequence[Live], states: Sequence[int]) -> np.ndarray:
        """Give a row to each; `states`: of their automata. Returns the rows."""
        rows = np.array([self.free.popleft() for _ in batch])
        numbers, kinds = np.array([_numbers(live) for live in batch]), np.array([_kinds(live) for live in batch], dtype=bool)
        self.known[rows], self.prompt_len[rows], least, self.shared_pages[rows], self.forced[rows] = numbers.T
        self.seen[rows], self.least[rows] = self.known[rows], self.prompt_len[rows] + least
        self.limit[rows], self.state[rows] = [self.limit_of(live.waiting.request) for live in batch], states
        self.computed[rows] = self.staged[rows] = self.num_pages[rows] = self.staged_pages[rows] = 0
        self.active[rows], self.arrived[rows], self.stale[rows], self.fresh[rows] = True, False, True, True
        self.order[rows] = np.arange(self._entered, self._entered + rows.size)
        self._entered += rows.size
        endless, self.exact[rows], self.guided[rows], self.watched[rows], self.special[rows] = kinds.T
        self.stop_ids[rows] = -1
        self.stop_ids[rows[~endless], : len(self.end_ids)] = self.end_ids
        now = time.monotonic()
        for row, live in zip(rows.tolist(), batch, strict=True):
            self.live[row], waiting = live, live.waiting
            waiting.began = waiting.began or now
            self.tokens[row, : waiting.tokens.size] = waiting.tokens
            if (ids := waiting.request.params.stop_token_ids) and waiting.request.grammar is None:
                self.stop_ids[row, -len(ids) :] = ids
        return rows

    def leave(self, rows: Sequence[int]) -> None:
        for row in rows:
            del self.live[row]
        self.free.extend(rows)
        gone = np.array(rows)
        self.active[gone] = False
        self.generation[gone] += 1


def _numbers(live: Live) -> tuple[int, int, int, int, int]:
    """known, prompt_len, tokens before it may end, shared_pages, forced"""
    waiting = live.waiting
    return (waiting.tokens.size, waiting.request.prompt.size, waiting.request.params.min_tokens, len(waiting.path),
            waiting.forced_tokens)


def _kinds(live: Live) -> tuple[bool, bool, bool, bool, bool]:
    """endless: end tokens do not end it; exact, guided, watched, special. A grammar says itself where its row ends."""
    params, guided = live.waiting.request.params, live.guide is not None
    endless = params.ignore_eos and live.waiting.request.grammar is None
    return (endless, endless and not params.stop and not params.stop_token_ids, guided, guided or live.stop is not None,
            params.has_penalties or params.min_tokens > 0 or params.logprobs is not None)
