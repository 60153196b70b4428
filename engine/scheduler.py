"""The scheduler: which rows run in the next step, and what its results mean. CPU only, vectorised over rows.

There are no prefill and decode phases. A row has `known` tokens, of which `computed` have their keys and values; a step runs
some of the difference (its queries), and if it runs all of it, samples the next token. One query is a decode; a chunk of a prompt
or of forced tokens is several. `known` counts tokens that the device has sampled and the host has not read yet, so that step
N + 1 can be planned before step N's tokens are back; `seen` counts those the host has. Rows under a grammar that the device
cannot step by itself (engine/automata.py) are planned only when the host has seen everything.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from engine.admission import LengthPredictor, admissible
from engine.automata import Automata
from engine.block_pool import BlockPool, Node, OutOfPages
from engine.config import EngineConfig
from engine.guided.grammar import Guide
from engine.plan import Special, StepPlan
from engine.prefix_groups import PrefixGroups
from engine.request import Completion, EngineStats, FinishReason, Request, TokenLogprobs
from engine.row_table import RowTable
from engine.stop_strings import StopStrings
from engine.window import Waiting, Window

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_STOP_IDS = 16
KV_SHARE = 0.99         # of the pool that the forecast may fill
STEPS_AHEAD = 2         # full steps of prompt tokens that rows are let in for


@dataclass(slots=True, eq=False)
class Live:
    """What a running row has beyond the arrays."""

    waiting: Waiting
    guide: Guide | None
    stop: StopStrings | None
    logprobs: list[TokenLogprobs] | None
    published: int = 0          # nodes of the path that it has offered or found computed


class Scheduler:
    def __init__(self, config: EngineConfig, table: RowTable, pool: BlockPool, max_step_tokens: int, end_ids: tuple[int, ...],
                 automata: Automata, tokenizer: PreTrainedTokenizerFast | None = None,
                 groups: PrefixGroups | None = None) -> None:
        self._table, self._pool, self.end_ids, self._automata = table, pool, end_ids, automata
        self.row_limit, self.max_step_tokens = table.max_rows, max_step_tokens      # engine.recovery lowers them
        self.window = Window(pool, config.window, config.prefix_sharing)
        self._window_size, self._tokenizer = config.window, tokenizer
        self._predictor = LengthPredictor()
        rows = table.max_rows
        self.tokens = np.zeros((rows, table.max_len + 1), dtype=np.int32)     # what the host has seen
        self.pages = np.zeros((rows, table.pages_per_row), dtype=np.int32)
        self.num_pages = np.zeros(rows, dtype=np.int32)
        self.active = np.zeros(rows, dtype=bool)
        self.guided = np.zeros(rows, dtype=bool)                              # by a guide
        self.state = np.zeros(rows, dtype=np.int32)                           # of its automaton, after what is seen; 0: none
        self.stale = np.zeros(rows, dtype=bool)                               # the device has another state of the row
        self.fresh = np.zeros(rows, dtype=bool)                               # the device has not its sampling parameters
        self.forced = np.zeros(rows, dtype=np.int32)                          # tokens that the grammar left no choice for
        self.arrived = np.zeros(rows, dtype=bool)                             # on the device: see _arrive
        self.exact = np.zeros(rows, dtype=bool)                               # ends at its limit and nowhere else
        self.generation = np.zeros(rows, dtype=np.int32)
        self.watched = np.zeros(rows, dtype=bool)       # a guide or stop strings: looked at after each token
        self.special = np.zeros(rows, dtype=bool)       # penalties, min_tokens or logprobs: more than the kernel does
        self.known, self.seen, self.computed = (np.zeros(rows, dtype=np.int32) for _ in range(3))
        self.staged, self.staged_pages = (np.zeros(rows, dtype=np.int32) for _ in range(2))     # the device has so many
        self.prompt_len, self.limit, self.least = (np.zeros(rows, dtype=np.int32) for _ in range(3))
        self.order, self.shared_pages = (np.zeros(rows, dtype=np.int32) for _ in range(2))
        self.stop_ids = np.full((rows, MAX_STOP_IDS), -1, dtype=np.int32)
        self._groups = groups
        self._copies: dict[int, tuple[int, int]] = {}       # for the next step: row -> pages (from, to)
        self._offers: list[tuple[Node, int, int]] = []      # (node, row, tokens): tails that the step computes
        self.live: dict[int, Live] = {}
        self._free_rows = deque(range(rows))
        self._admitted = 0
        self._finished: list[Completion] = []
        self._prompt_tokens = self._cached_tokens = self._generated = self._forced = self._preemptions = self._done = 0

    # --- requests in ---

    def submit(self, waiting: Waiting) -> None:
        self.window.add(waiting)

    @property
    def pending(self) -> int:
        return len(self.window) + len(self.live) + len(self._finished)

    def room(self) -> int:
        return max(0, self._window_size - len(self.window))

    def refill(self) -> None:
        """Give rows to waiting requests, as many as the forecast of KV use lets in and the next steps can compute.

        A step with a prompt in it costs more than a plain decode step, so a few requests are let in together, not one by one.
        Those that the next steps do not come to are left to later calls, which the device does not wait for.
        """
        free = self.row_limit - len(self.live)
        few = max(1, self.row_limit // 64)
        if not len(self.window) or free < (few if self.live else 1):
            return
        ready = self._next(free, few)
        least = min(few, len(ready)) if self.live else 1         # alone, a request is always let in
        if not ready or (self.live and self._fitting(ready[:least]) < least):
            return
        rows = self._admit(self.window.take(max(self._fitting(ready), least)))
        held = rows[self.active[rows] & (self.state[rows] > 0)]
        if held.size:
            self._append_forced(held, least=1)

    def _next(self, most: int, few: int) -> list[Waiting]:
        """The first waiting requests, as many as the next steps have room for, or `few`; none if the rows already fill these."""
        rows, page = np.flatnonzero(self.active), self._table.page_size
        due = self.known[rows] - np.maximum(self.computed[rows], self.shared_pages[rows] * page)
        room, ready = STEPS_AHEAD * self.max_step_tokens - int(due.sum()), self.window.ready(most)
        if room <= 0:
            return []
        needed = np.cumsum([waiting.tokens.size - len(waiting.path) * page for waiting in ready])
        return ready[: max(int(np.searchsorted(needed, room)) + 1, few)]

    def _fitting(self, ready: list[Waiting]) -> int:
        """How many of `ready` the forecast lets in. Pages shared through the tree are counted once, a row's own by the row."""
        page, rows = self._table.page_size, np.flatnonzero(self.active)
        left = self._predictor.remaining(self.known[rows] - self.prompt_len[rows], self.limit[rows] - self.prompt_len[rows],
                                         self.exact[rows])
        held = _in_pages(self.known[rows], left, page) - self.shared_pages[rows] * page
        new = np.array([(w.tokens.size, w.request.prompt.size, self._limit(w.request), len(w.path), w.request.params.ignore_eos)
                        for w in ready], dtype=np.int64)
        new_left = self._predictor.remaining(new[:, 0] - new[:, 1], new[:, 2] - new[:, 1], new[:, 4].astype(bool))
        new_held = _in_pages(new[:, 0], new_left, page) - new[:, 3] * page
        begun = rows[self.computed[rows] < self.shared_pages[rows] * page].tolist()
        coming = (*ready, *(self.live[row].waiting for row in begun))
        unheld = self._pool.unheld({w.path[-1]: w.path for w in coming if w.path}.values())
        capacity = int(self._pool.usable * KV_SHARE) - self._pool.shared - unheld
        return admissible(held, left, new_held, new_left, capacity * page)

    def _limit(self, request: Request) -> int:
        return min(request.prompt.size + request.params.max_tokens, self._table.max_len)

    def _admit(self, batch: list[Waiting]) -> np.ndarray:
        """Give a row to each; returns the rows, of which a guide may have ended some at once."""
        rows = np.array([self._free_rows.popleft() for _ in batch])
        numbers = np.array([(w.tokens.size, w.request.prompt.size, self._limit(w.request), w.request.params.min_tokens,
                             len(w.path), w.forced_tokens) for w in batch])
        known, prompt_len, self.limit[rows], least, self.shared_pages[rows], self.forced[rows] = numbers.T
        self.known[rows] = self.seen[rows] = known
        self.prompt_len[rows], self.least[rows] = prompt_len, prompt_len + least
        self.computed[rows] = self.staged[rows] = self.num_pages[rows] = self.staged_pages[rows] = 0
        self.active[rows], self.arrived[rows], self.stale[rows], self.fresh[rows] = True, False, True, True
        self.order[rows] = np.arange(self._admitted, self._admitted + rows.size)
        self._admitted += rows.size
        kinds = np.array([self._enter(row, waiting) for row, waiting in zip(rows.tolist(), batch, strict=True)])
        self.exact[rows], endless, self.guided[rows], self.watched[rows], self.special[rows] = kinds[:, :5].T.astype(bool)
        self.state[rows] = kinds[:, 5]
        self.stop_ids[rows] = -1
        self.stop_ids[rows[~endless], : len(self.end_ids)] = self.end_ids
        for row, waiting in zip(rows.tolist(), batch, strict=True):
            if (ids := waiting.request.params.stop_token_ids) and waiting.request.grammar is None:
                self.stop_ids[row, -len(ids) :] = ids
        for row in rows[self.guided[rows]].tolist():
            if (guide := self.live[row].guide) is not None:
                self._follow(row, guide)
        return rows

    def _enter(self, row: int, waiting: Waiting) -> tuple[bool, bool, bool, bool, bool, int]:
        """What a row has beyond numbers. Returns whether it is exact, endless (end tokens do not end it), guided, watched and
        special, and the state of its automaton. Under a grammar an output ends where the grammar says so: anything else would
        cut it."""
        request, params = waiting.request, waiting.request.params
        self.tokens[row, : waiting.tokens.size] = waiting.tokens
        free, stop = request.grammar is None, None
        state, guide = (0, None) if free else self._start(waiting)
        if params.stop and free and self._tokenizer is not None:
            stop = StopStrings(self._tokenizer, params.stop)
            for token in waiting.tokens[request.prompt.size :].tolist():
                stop.find(token)
        logprobs = waiting.logprobs if waiting.logprobs is not None or params.logprobs is None else []
        self.live[row] = Live(waiting, guide, stop, logprobs)
        waiting.began = waiting.began or time.monotonic()
        endless = free and params.ignore_eos
        special = params.has_penalties or params.min_tokens > 0 or params.logprobs is not None
        return (endless and not params.stop and not params.stop_token_ids, endless, guide is not None,
                guide is not None or stop is not None, special, state)

    def _start(self, waiting: Waiting) -> tuple[int, Guide | None]:
        """The state of the row's automaton, 0: none, and its guide where it has a grammar and no automaton."""
        grammar = waiting.request.grammar
        if grammar is None or waiting.state or waiting.guide is not None:
            return waiting.state, waiting.guide
        state = self._automata.place(grammar.automaton) if grammar.automaton is not None else 0
        return state, None if state else grammar.start()

    # --- the next step ---

    def schedule(self) -> StepPlan | None:
        """Plan a step over all that can run: decodes first, then chunks of the rest in order of admission, within the budget."""
        plan = self._schedule()
        if plan is not None:
            for node, row, size in self._offers:         # what this step computes can be copied from the next one on
                first = node.depth * self._table.page_size
                self._pool.offer_tail(node, self.tokens[row, first : first + size], int(self.pages[row, node.depth]))
            for source, _ in self._copies.values():
                self._pool.release(np.array([source], dtype=np.int32))
            self._copies, self._offers = {}, []
        return plan

    def _schedule(self) -> StepPlan | None:
        ready = self.active & (self.known < self.limit) & ~(self.guided & (self.seen < self.known))
        rows = np.flatnonzero(ready).astype(np.int32)
        if rows.size == 0:
            return None
        queries = self.known[rows] - self.computed[rows]
        decode = rows[queries == 1]
        for row in decode[~self.arrived[decode]].tolist():                   # prompts of one token
            self._arrive(row)
        decode = self._grown(decode)
        rest: list[int] = []
        chunks: list[int] = []
        budget = self.max_step_tokens - decode.size
        several = rows[queries > 1]
        for row in several[np.argsort(self.order[several])].tolist():
            if budget <= 0:
                break
            if not self.active[row]:
                continue
            self._arrive(row)
            chunk = min(int(self.known[row] - self.computed[row]), budget)
            if not self._grow(row, int(self.computed[row]) + chunk, keep=rest):
                continue
            rest.append(row)
            chunks.append(chunk)
            budget -= chunk
            self._publish(row, int(self.computed[row]) + chunk)
        decode = decode[self.active[decode]]                                 # growing the rest may have preempted some
        if decode.size + len(rest) == 0:
            return None
        return self._plan(decode, np.array(rest, dtype=np.int32), np.array(chunks, dtype=np.int32))

    def _arrive(self, row: int) -> None:
        """Before its first chunk a row takes the pages of its prefix that are computed by now, or will be in this step."""
        if self.arrived[row]:
            return
        waiting = self.live[row].waiting
        self.arrived[row] = True
        cached = self._take_prefix(row, waiting) if waiting.path else 0
        if waiting.cached_tokens is None:
            waiting.cached_tokens = cached
            self._prompt_tokens += waiting.request.prompt.size
            self._cached_tokens += cached

    def _take_prefix(self, row: int, waiting: Waiting) -> int:
        """Returns how many tokens need not be computed."""
        shared = self._pool.arrive(waiting.path)
        n, cached = shared.size, shared.size * self._table.page_size
        self.live[row].published = n
        self.pages[row, :n], self.num_pages[row] = shared, n
        if n == len(waiting.path):
            cached += self._copy_tail(row, waiting.path[-1])
        self.computed[row] = cached
        if not waiting.request.params.has_penalties:                         # they read the whole history
            self.staged[row] = cached
        if self._groups is not None:
            self._groups.join(waiting.path)
        return cached

    def _copy_tail(self, row: int, node: Node) -> int:
        """Take over the tokens after the last full page that a row before has computed too; returns how many.

        The page copied from is held until the step is planned, so that none is both read and written by the step's copies.
        """
        n = int(self.num_pages[row])
        first = n * self._table.page_size
        page, same = self._pool.tail(node, self.tokens[row, first : int(self.prompt_len[row]) - 1])  # one is left, for its logits
        if not same:
            return 0
        source = np.array([page], dtype=np.int32)
        self._pool.hold(source)
        try:
            copy = self._pool.alloc(1)
        except OutOfPages:
            self._pool.release(source)
            return 0
        self.pages[row, n], self.num_pages[row] = copy[0], n + 1
        self._copies[row] = page, int(copy[0])
        return same

    def _plan(self, decode: np.ndarray, rest: np.ndarray, chunks: np.ndarray) -> StepPlan:
        shared = prefix_tiles = None
        if self._groups is not None:
            decode, shared, prefix_tiles = self._groups.arrange(decode, self._paths)
        rows = np.concatenate([decode, rest])
        counts = np.concatenate([np.ones_like(decode), chunks])
        starts = self.computed[rows]
        ends = starts + counts
        behind = self.staged[rows] < ends                       # prompts and forced tokens: not sampled on the device
        if behind.any():
            self._table.stage_tokens(rows[behind], self.staged[rows[behind]], ends[behind], self.tokens)
            self.staged[rows[behind]] = ends[behind]
        self.computed[rows] = ends
        paged = rows[self.staged_pages[rows] < self.num_pages[rows]]
        if paged.size:
            self._table.stage_pages(paged, self.staged_pages[paged], self.num_pages[paged], self.pages)
            self.staged_pages[paged] = self.num_pages[paged]
        fresh = rows[self.fresh[rows]]
        if fresh.size:
            self._table.stage_params(fresh, [self.live[row].waiting.request.params for row in fresh.tolist()])
            self.fresh[fresh] = False
        sampled = np.flatnonzero(ends == self.known[rows]).astype(np.int32)
        to_sample = rows[sampled]
        stale = rows[self.stale[rows]]
        if stale.size:
            self._table.stage_grammar(stale, self.state[stale])
            self.stale[stale] = False
        self.known[to_sample] += 1
        self.staged[to_sample] += 1
        guided = np.flatnonzero(self.guided[to_sample]).astype(np.int32)
        guides = [guide for row in to_sample[guided].tolist() if (guide := self.live[row].guide) is not None]
        special = [self._special(i, int(to_sample[i])) for i in np.flatnonzero(self.special[to_sample]).tolist()]
        return StepPlan(rows, starts, counts, decode.size, sampled, self.generation[to_sample], guides, guided,
                        bool(self.state[to_sample].any()), special, shared, prefix_tiles,
                        np.array(list(self._copies.values()), dtype=np.int32).reshape(-1, 2))

    def _paths(self) -> dict[int, list[Node]]:
        return {row: live.waiting.path for row, live in self.live.items() if self.arrived[row]}

    def _special(self, index: int, row: int) -> Special:
        length = int(self.known[row]) - 1
        forbidden = self.stop_ids[row][self.stop_ids[row] >= 0] if length < self.least[row] else np.empty(0, dtype=np.int32)
        return Special(index, row, self.live[row].waiting.request.params, int(self.prompt_len[row]), length, forbidden)

    def _grown(self, rows: np.ndarray) -> np.ndarray:
        """Give decode rows the page their next token needs; preempts if the pool is out. Returns the rows still there."""
        while True:
            rows = rows[self.active[rows]]
            short = rows[self.computed[rows] // self._table.page_size >= self.num_pages[rows]]
            try:
                pages = self._pool.alloc(short.size)
            except OutOfPages:
                self._preempt(self._victim(()))
                continue
            self.pages[short, self.num_pages[short]] = pages
            self.num_pages[short] += 1
            return rows

    def _grow(self, row: int, upto: int, keep: list[int]) -> bool:
        """Give a row pages for positions below `upto`; preempts rows outside `keep` if the pool is out. False: not now."""
        have = int(self.num_pages[row])
        need = -(-upto // self._table.page_size) - have
        if need <= 0:
            return True
        while True:
            try:
                pages = self._pool.alloc(need)
                break
            except OutOfPages:
                victim = self._victim((*keep, row))
                if victim < 0 or self.order[victim] < self.order[row]:
                    return False
                self._preempt(victim)
        self.pages[row, have : have + need] = pages
        self.num_pages[row] += need
        return True

    def _victim(self, keep: Iterable[int]) -> int:
        """The row that was let in last, outside `keep`: the least work is lost. -1 if there is none."""
        candidates = self.active.copy()
        candidates[list(keep)] = False
        rows = np.flatnonzero(candidates)
        return int(rows[np.argmax(self.order[rows])]) if rows.size else -1

    def _publish(self, row: int, upto: int) -> None:
        """Offer the full pages below position `upto` that others expect; a launch later in stream order may read them."""
        live, page = self.live[row], self._table.page_size
        while live.published < len(live.waiting.path) and (live.published + 1) * page <= upto:
            self._pool.publish(live.waiting.path[live.published], int(self.pages[row, live.published]))
            live.published += 1
        size = min(upto - live.published * page, page)
        if live.waiting.path and live.published == len(live.waiting.path) and size > 0:
            self._offers.append((live.waiting.path[-1], row, size))

    def _preempt(self, row: int) -> None:
        self.window.put_back(self._withdraw(row))

    def _withdraw(self, row: int) -> Waiting:
        """End the row; its request keeps the tokens the host has seen, and later results of it are dropped."""
        live, n = self.live[row], int(self.seen[row])
        live.waiting.tokens = self.tokens[row, :n].copy()
        live.waiting.guide, live.waiting.logprobs = live.guide, live.logprobs
        live.waiting.state, live.waiting.forced_tokens = int(self.state[row]), int(self.forced[row])
        self._leave([row])
        live.waiting.path = []
        self._preemptions += 1
        return live.waiting

    def evacuate(self) -> None:
        """Put every running row back, and forget what was staged and cached: a step was planned and did not run, so that pages it
        offered for sharing hold nothing."""
        rows = sorted(self.live, key=lambda row: int(self.order[row]))
        waiting = [self._withdraw(row) for row in rows]
        self._pool.drop_cached()
        self._table.discard_staged()
        self.window.put_back_all(waiting)

    def fail(self, row: int, error: str) -> None:
        """End a running row as ERROR."""
        self._finish([row], FinishReason.ERROR, error=error)

    def _leave(self, rows: Sequence[int]) -> None:
        held = []
        for row in rows:
            path, arrived = self.live.pop(row).waiting.path, bool(self.arrived[row])
            self._depart(path, arrived)
            if path and arrived and self._groups is not None:
                self._groups.leave(row, path)
            if row in self._copies:
                held.append(np.array([self._copies.pop(row)[0]], dtype=np.int32))
            held.append(self.pages[row, : self.num_pages[row]])
        self._pool.release(np.concatenate(held))
        self._free_rows.extend(rows)
        gone = np.array(rows)
        self.active[gone] = False
        self.generation[gone] += 1

    def _depart(self, path: list[Node], arrived: bool) -> None:
        """A request ends its interest in the prefixes of its path."""
        if path and not arrived:
            self._pool.release(self._pool.arrive(path))
        self._pool.forget(path)

    # --- results ---

    def retire(self, plan: StepPlan, tokens: np.ndarray, logprobs: dict[int, TokenLogprobs]) -> None:
        """Take in a step's sampled tokens, int32 [S]; `logprobs` by index into them. Results of rows that left are dropped."""
        rows = plan.rows[plan.sampled]
        current = self.active[rows] & (self.generation[rows] == plan.generations)
        rows, tokens = rows[current], tokens[current]
        self.tokens[rows, self.seen[rows]] = tokens
        self.seen[rows] += 1
        self._generated += rows.size
        ended = (tokens[:, None] == self.stop_ids[rows]).any(1)
        for i, entry in logprobs.items():
            if current[i] and (kept := self.live[int(plan.rows[plan.sampled[i]])].logprobs) is not None:
                kept.append(entry)
        for row in rows[self.watched[rows] & ~ended].tolist():
            self._watch(row)
        by_automata = ~ended & (self.state[rows] > 0)
        if by_automata.any():
            self._step(rows[by_automata], tokens[by_automata])
        self._take_back(rows[ended])
        self._end(rows[ended], FinishReason.STOP)        # of a grammar's: it ended there, or gave up on the row
        full = rows[~ended]
        full = full[self.active[full]]
        self._end(full[self.seen[full] >= self.limit[full]], FinishReason.LENGTH)

    def _end(self, rows: np.ndarray, reason: FinishReason) -> None:
        """No more tokens come of these; those under a grammar end as it says."""
        bound = self.guided[rows] | (self.state[rows] > 0)
        self._finish(rows[~bound].tolist(), reason)
        for row in rows[bound].tolist():
            self._settle(row)

    def _take_back(self, rows: np.ndarray) -> None:
        """The token that each sampled last is not part of its output."""
        self.seen[rows] -= 1
        for row in rows[self.special[rows]].tolist():
            if kept := self.live[row].logprobs:
                kept.pop()

    def _step(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        """Take the rows' automata on by what the device has sampled, as it has done itself."""
        before = self.state[rows]
        after = self._automata.step(before, tokens)
        self._take_back(rows[after < 0])                 # no number was left above -inf: the model's logits are broken
        for row in rows[after < 0].tolist():
            self._settle(row)
        rows, before, after = rows[after >= 0], before[after >= 0], after[after >= 0]
        without_choice = self._automata.chain_size[before] > 0
        self.forced[rows] += without_choice
        self._forced += int(without_choice.sum())
        self.state[rows] = after
        self._append_forced(rows, self._automata.jump)

    def _append_forced(self, rows: np.ndarray, least: int) -> None:
        """Append what their automata force, where that is `least` tokens or more, or the end; finish rows that are complete.

        The device may have sampled the first of these tokens already, in the step in flight: it allows no other. So that step's
        result says nothing new, and is dropped like one of a row that left.
        """
        automata, state = self._automata, self.state[rows]
        size, end = automata.chain_size[state], automata.chain_end[state]
        jump = np.flatnonzero((size >= least) | (size > 0) & automata.finished[end])
        if jump.size:
            to, state, end = rows[jump], state[jump], end[jump]
            count = np.minimum(size[jump], self.limit[to] - self.seen[to])
            i = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
            self.tokens[np.repeat(to, count), np.repeat(self.seen[to], count) + i] = automata.chain[
                np.repeat(automata.chain_start[state], count) + i]
            self.generation[to] += self.known[to] > self.seen[to]
            self.seen[to] += count
            self.known[to] = self.seen[to]
            self.state[to] = np.where(count == size[jump], end, state)
            self.stale[to] = True
            self.forced[to] += count
            self._forced += int(count.sum())
            self._generated += int(count.sum())
        complete = automata.finished[self.state[rows]]
        done = rows[complete | (self.seen[rows] >= self.limit[rows])]
        valid = automata.final[self.state[done]] & automata.sound[self.state[done]]
        self._finish(done[valid].tolist(), FinishReason.STOP)
        for row in done[~valid].tolist():
            self._settle(row)

    def _watch(self, row: int) -> None:
        """A row that the host must look at after each token: it has a guide or stop strings."""
        live = self.live[row]
        token = int(self.tokens[row, self.seen[row] - 1])
        if live.guide is not None:
            if live.guide.accept([token]):
                self._follow(row, live.guide)
            else:
                self._take_back(np.array([row]))
                self._settle(row)
        elif live.stop is not None and (text := live.stop.find(token)) is not None and self.seen[row] >= self.least[row]:
            self._finish([row], FinishReason.STOP, text=text)

    def _follow(self, row: int, guide: Guide) -> None:
        """Append the tokens that the grammar forces, with no forward pass of their own; finish where nothing may follow."""
        if guide.error is None and not guide.finished:
            n = int(self.known[row])
            forced = np.array(guide.forced(), dtype=np.int32)[: int(self.limit[row]) - n]
            if forced.size:
                guide.accept(forced.tolist())
                self.tokens[row, n : n + forced.size] = forced
                self.known[row] = self.seen[row] = n + forced.size
                self.forced[row] += forced.size
                self._forced += forced.size
                self._generated += forced.size
        if guide.error is not None or guide.finished or self.seen[row] >= self.limit[row]:
            self._settle(row)

    def _settle(self, row: int) -> None:
        """End a row under a grammar: as it stands if that is valid, else trimmed and closed.

        What the grammar lets through may not pass the final check yet (numbers beyond a double); of most automata it is known to.
        """
        state, grammar, guide = int(self.state[row]), self.live[row].waiting.request.grammar, self.live[row].guide
        assert grammar is not None
        may_end = bool(self._automata.final[state]) if guide is None else guide.error is None and guide.accepting
        if state and may_end and self._automata.sound[state]:
            self._finish([row], FinishReason.STOP)
            return
        produced = self.tokens[row, self.prompt_len[row] : self.seen[row]]
        budget = int(self.limit[row] - self.prompt_len[row])
        if grammar.min_tokens > budget:
            if may_end:
                self._finish([row], FinishReason.STOP)
            else:
                self._finish([row], FinishReason.ERROR, error=f"the schema needs {grammar.min_tokens} tokens and there is room "
                             f"for {budget}: raise max_tokens, or shorten the prompt")
            return
        closed = grammar.close(produced.tolist(), budget)
        reason = FinishReason.STOP if np.array_equal(closed, produced) else FinishReason.LENGTH_CLOSED
        self.tokens[row, self.prompt_len[row] : self.prompt_len[row] + closed.size] = closed
        self.seen[row] = self.prompt_len[row] + closed.size
        self._finish([row], reason)

    def _finish(self, rows: Sequence[int], reason: FinishReason, text: str | None = None, error: str | None = None) -> None:
        if not rows:
            return
        for row in rows:
            live, output = self.live[row], self.tokens[row, self.prompt_len[row] : self.seen[row]].copy()
            self._predictor.observe(output.size)
            live.waiting.forced_tokens = int(self.forced[row])
            self._emit(live.waiting, output, reason, text, error, live.logprobs)
        self._leave(rows)

    def _emit(self, waiting: Waiting, output: np.ndarray, reason: FinishReason, text: str | None = None, error: str | None = None,
              logprobs: list[TokenLogprobs] | None = None) -> None:
        self._finished.append(Completion(waiting.request.id, output, reason, waiting.request.prompt.size,
                                         waiting.cached_tokens or 0, waiting.forced_tokens, text, error, logprobs))
        self._done += 1

    def finished(self) -> list[Completion]:
        done, self._finished = self._finished, []
        return done

    def overdue(self, seconds: float) -> list[Hashable]:
        """Requests that were let in more than so many seconds ago and run still."""
        latest = time.monotonic() - seconds
        return [live.waiting.request.id for live in self.live.values() if live.waiting.began < latest]

    def abort(self, ids: Iterable[Hashable] | None) -> None:
        """End requests as ABORTED, with what they have produced; None: all."""
        wanted = None if ids is None else set(ids)
        for row in [r for r, live in self.live.items() if wanted is None or live.waiting.request.id in wanted]:
            self._finish([row], FinishReason.ABORTED)
        for waiting in self.window.remove(wanted):
            self._depart(waiting.path, arrived=False)
            self._emit(waiting, waiting.tokens[waiting.request.prompt.size :], FinishReason.ABORTED, logprobs=waiting.logprobs)

    def stats(self, steps: int, graph_steps: int) -> EngineStats:
        return EngineStats(len(self.live), len(self.window), self._pool.used, self._pool.usable, self._prompt_tokens,
                           self._cached_tokens, self._generated, self._forced, steps, graph_steps, self._preemptions, self._done)

    def check_integrity(self) -> None:
        """Raise AssertionError unless rows, pages and counts agree; for tests and for an idle engine."""
        rows = np.flatnonzero(self.active)
        assert set(rows.tolist()) == set(self.live), "active rows and live requests differ"
        assert sorted([*self._free_rows, *rows.tolist()]) == list(range(self._table.max_rows)), "a row is lost or doubled"
        self._pool.check_integrity([self.pages[row, : self.num_pages[row]] for row in rows.tolist()])
        assert (self.computed[rows] <= self.num_pages[rows] * self._table.page_size).all(), "a row computed past its pages"
        for row in rows[self.state[rows] > 0].tolist():
            automaton = self.live[row].waiting.request.grammar.automaton     # type: ignore[union-attr]
            state = np.array([self._automata.place(automaton)])              # type: ignore[arg-type]
            for token in self.tokens[row, self.prompt_len[row] : self.seen[row]]:
                state = self._automata.step(state, token)
            assert state[0] == self.state[row], "a row's automaton is not where its tokens lead"


def _in_pages(known: np.ndarray, left: np.ndarray, page: int) -> np.ndarray:
    """Tokens that rows hold now, with what stays empty of their last page when they end: that is when they hold the most."""
    return -(-(known + left) // page) * page - left
