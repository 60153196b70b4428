"""The scheduler: which requests get a row, and which rows run in the next step. CPU only, vectorised over rows.

There are no prefill and decode phases. A step runs some of the tokens that a row knows and has not computed (its queries), and if
it runs all of them, samples the next token. One query is a decode; a chunk of a prompt or of forced tokens is several. Rows under
a grammar that the device cannot step by itself (engine/automata.py) are planned only when the host has seen everything.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from engine.admission import LengthPredictor, admissible
from engine.automata import Automata
from engine.block_pool import BlockPool, OutOfPages
from engine.config import EngineConfig
from engine.outputs import Ending, Outputs, of_this_row_alone
from engine.plan import Special, StepPlan
from engine.prefix_groups import PrefixGroups
from engine.request import Completion, EngineStats, FinishReason, TokenLogprobs
from engine.row_pages import RowPages
from engine.row_table import RowTable
from engine.rows import Live, Rows
from engine.window import Waiting, Window

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

KV_SHARE = 0.99         # of the pool that the forecast may fill
STEPS_AHEAD = 2         # full steps of prompt tokens that rows are let in for


class Scheduler:
    def __init__(self, config: EngineConfig, table: RowTable, pool: BlockPool, max_step_tokens: int, end_ids: tuple[int, ...],
                 automata: Automata, tokenizer: PreTrainedTokenizerFast | None = None,
                 groups: PrefixGroups | None = None) -> None:
        self._table, self._pool, self._automata, self._groups = table, pool, automata, groups
        self.row_limit, self.max_step_tokens = table.max_rows, max_step_tokens      # engine.recovery lowers them
        self.window = Window(pool, config.window, config.prefix_sharing)
        self._window_size = config.window
        self.rows = Rows(table, end_ids)
        self._pages = RowPages(self.rows, pool, groups)
        self._predictor = LengthPredictor()
        self._outputs = Outputs(self.rows, self._pages, automata, self._predictor, tokenizer)
        self._preemptions = 0

    # --- requests in ---

    def submit(self, waiting: Waiting) -> None:
        self.window.add(waiting)

    @property
    def live(self) -> dict[int, Live]:
        """By row, of those that run."""
        return self.rows.live

    @property
    def pending(self) -> int:
        return len(self.window) + len(self.live) + self._outputs.pending

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
        batch, states = self._outputs.open(self.window.take(max(self._fitting(ready), least)))
        if batch:
            self._outputs.begin(self.rows.enter(batch, states))

    def _next(self, most: int, few: int) -> list[Waiting]:
        """The first waiting requests, as many as the next steps have room for, or `few`; none if the rows already fill these."""
        r, page = self.rows, self._table.page_size
        rows = np.flatnonzero(r.active)
        due = r.known[rows] - np.maximum(r.computed[rows], r.shared_pages[rows] * page)
        room, ready = STEPS_AHEAD * self.max_step_tokens - int(due.sum()), self.window.ready(most)
        if room <= 0:
            return []
        needed = np.cumsum([waiting.tokens.size - len(waiting.path) * page for waiting in ready])
        return ready[: max(int(np.searchsorted(needed, room)) + 1, few)]

    def _fitting(self, ready: list[Waiting]) -> int:
        """How many of `ready` the forecast lets in. Pages shared through the tree are counted once, a row's own by the row."""
        r, page = self.rows, self._table.page_size
        rows = np.flatnonzero(r.active)
        left = self._predictor.remaining(r.known[rows] - r.prompt_len[rows], r.limit[rows] - r.prompt_len[rows], r.exact[rows])
        held = r.known[rows] - r.shared_pages[rows] * page
        new = np.array([(w.tokens.size, w.request.prompt.size, r.limit_of(w.request), len(w.path), w.request.params.ignore_eos)
                        for w in ready], dtype=np.int64)
        new_left = self._predictor.remaining(new[:, 0] - new[:, 1], new[:, 2] - new[:, 1], new[:, 4].astype(bool))
        new_held = new[:, 0] - new[:, 3] * page
        begun = rows[r.computed[rows] < r.shared_pages[rows] * page].tolist()
        coming = (*ready, *(self.live[row].waiting for row in begun))
        unheld = self._pool.unheld({w.path[-1]: w.path for w in coming if w.path}.values())
        capacity = int(self._pool.usable * KV_SHARE) - self._pool.shared - unheld
        return admissible((held, left), (new_held, new_left), capacity * page, page)

    # --- the next step ---

    def schedule(self) -> StepPlan | None:
        """Plan a step over all that can run: decodes first, then chunks of the rest in order of admission, within the budget."""
        r = self.rows
        rows = np.flatnonzero(r.active & (r.known < r.limit) & ~(r.guided & (r.seen < r.known))).astype(np.int32)
        if rows.size == 0:
            return None
        queries = r.known[rows] - r.computed[rows]
        decode = rows[queries == 1]
        for row in decode[~r.arrived[decode]].tolist():                      # prompts of one token
            self._pages.arrive(row)
        decode = self._grown(decode)
        several = rows[queries > 1]
        rest, chunks = self._chunks(several[np.argsort(r.order[several])], self.max_step_tokens - decode.size)
        decode = decode[r.active[decode]]                                    # growing the rest may have preempted some
        if decode.size + rest.size == 0:
            return None
        plan = self._plan(decode, rest, chunks)
        self._pages.planned()
        return plan

    def _chunks(self, rows: np.ndarray, budget: int) -> tuple[np.ndarray, np.ndarray]:
        """Those of `rows`, in order, that come within the budget of tokens and have pages, and how many queries each."""
        r = self.rows
        rest: list[int] = []
        chunks: list[int] = []
        for row in rows.tolist():
            if budget <= 0:
                break
            if not r.active[row]:
                continue
            self._pages.arrive(row)
            start = int(r.computed[row])
            chunk = min(int(r.known[row]) - start, budget)
            if not self._grow(row, start + chunk, keep=rest):
                continue
            rest.append(row)
            chunks.append(chunk)
            budget -= chunk
            self._pages.publish(row, start + chunk)
        return np.array(rest, dtype=np.int32), np.array(chunks, dtype=np.int32)

    def _plan(self, decode: np.ndarray, rest: np.ndarray, chunks: np.ndarray) -> StepPlan:
        r, shared, prefix_tiles = self.rows, None, None
        decode = decode[np.argsort(-r.computed[decode], kind="stable")]      # attention begins with the longest: none drags on
        if self._groups is not None:
            decode, shared, prefix_tiles = self._groups.arrange(decode, self._pages.paths)
        rows = np.concatenate([decode, rest])
        counts = np.concatenate([np.ones_like(decode), chunks])
        starts = r.computed[rows]
        ends = starts + counts
        self._stage(rows, ends)
        r.computed[rows] = ends
        sampled = np.flatnonzero(ends == r.known[rows]).astype(np.int32)
        to_sample = rows[sampled]
        r.known[to_sample] += 1
        r.staged[to_sample] += 1
        guided = np.flatnonzero(r.guided[to_sample]).astype(np.int32)
        guides = [guide for row in to_sample[guided].tolist() if (guide := self.live[row].guide) is not None]
        special = [self._special(i, int(to_sample[i])) for i in np.flatnonzero(r.special[to_sample]).tolist()]
        return StepPlan(rows, starts, counts, decode.size, sampled, r.generation[to_sample], guides, guided,
                        bool(r.state[to_sample].any()), special, shared, prefix_tiles, self._pages.copies())

    def _stage(self, rows: np.ndarray, ends: np.ndarray) -> None:
        """Stage what the device has not yet of rows that run up to `ends`."""
        r, table = self.rows, self._table
        behind = r.staged[rows] < ends                          # prompts and forced tokens: not sampled on the device
        if behind.any():
            table.stage_tokens(rows[behind], r.staged[rows[behind]], ends[behind], r.tokens)
            r.staged[rows[behind]] = ends[behind]
        grown = rows[r.staged_pages[rows] < r.num_pages[rows]]
        if grown.size:
            table.stage_pages(grown, r.staged_pages[grown], r.num_pages[grown], r.pages)
            r.staged_pages[grown] = r.num_pages[grown]
        fresh = rows[r.fresh[rows]]
        if fresh.size:
            table.stage_params(fresh, [self.live[row].waiting.request.params for row in fresh.tolist()])
            r.fresh[fresh] = False
        stale = rows[r.stale[rows]]
        if stale.size:
            table.stage_grammar(stale, r.state[stale])
            r.stale[stale] = False

    def _special(self, index: int, row: int) -> Special:
        r = self.rows
        length = int(r.known[row]) - 1
        forbidden = r.stop_ids[row][r.stop_ids[row] >= 0] if length < r.least[row] else np.empty(0, dtype=np.int32)
        return Special(index, row, self.live[row].waiting.request.params, int(r.prompt_len[row]), length, forbidden)

    # --- too few pages ---

    def _grown(self, decode: np.ndarray) -> np.ndarray:
        """Give decode rows the page their next token needs; preempts if the pool is out. Returns the rows still there."""
        while True:
            decode = decode[self.rows.active[decode]]
            try:
                self._pages.grow_decodes(decode)
                return decode
            except OutOfPages:
                self._preempt(self._victim(()))

    def _grow(self, row: int, upto: int, keep: list[int]) -> bool:
        """Give a row pages for positions below `upto`; preempts rows outside `keep` if the pool is out. False: not now."""
        while True:
            try:
                self._pages.grow(row, upto)
                return True
            except OutOfPages:
                victim = self._victim((*keep, row))
                if victim < 0 or self.rows.order[victim] < self.rows.order[row]:
                    return False
                self._preempt(victim)

    def _victim(self, keep: Iterable[int]) -> int:
        """The row that was let in last, outside `keep`: the least work is lost. -1 if there is none."""
        candidates = self.rows.active.copy()
        candidates[list(keep)] = False
        rows = np.flatnonzero(candidates)
        return int(rows[np.argmax(self.rows.order[rows])]) if rows.size else -1

    def _preempt(self, row: int) -> None:
        self.window.put_back(self._withdraw(row))

    def _withdraw(self, row: int) -> Waiting:
        """End the row; its request keeps the tokens the host has seen, and later results of it are dropped."""
        r, live = self.rows, self.live[row]
        waiting = live.waiting
        waiting.tokens = r.tokens[row, : int(r.seen[row])].copy()
        waiting.guide, waiting.logprobs = live.guide, live.logprobs
        waiting.state, waiting.forced_tokens = int(r.state[row]), int(r.forced[row])
        self._pages.leave([row])
        waiting.path = []
        self._preemptions += 1
        return waiting

    def evacuate(self) -> None:
        """Put every running row back, and forget what was staged and cached: a step was planned and did not run, so that pages it
        offered for sharing hold nothing."""
        rows = sorted(self.live, key=lambda row: int(self.rows.order[row]))
        waiting = [self._withdraw(row) for row in rows]
        self._pool.drop_cached()
        self._table.discard_staged()
        self.window.put_back_all(waiting)

    # --- results ---

    def retire(self, plan: StepPlan, tokens: np.ndarray, logprobs: dict[int, TokenLogprobs]) -> None:
        """Take in a step's sampled tokens, int32 [S]; `logprobs` by index into them."""
        self._outputs.retire(plan, tokens, logprobs)

    def finished(self) -> list[Completion]:
        return self._outputs.finished()

    def fail(self, row: int, error: Exception) -> None:
        """End a running row that is to blame for `error`."""
        self._outputs.finish([row], of_this_row_alone(error))

    def overdue(self, seconds: float) -> list[Hashable]:
        """Requests that were let in more than so many seconds ago and run still."""
        latest = time.monotonic() - seconds
        return [live.waiting.request.id for live in self.live.values() if live.waiting.began < latest]

    def abort(self, ids: Iterable[Hashable] | None) -> None:
        """End requests as ABORTED, with what they have produced; None: all."""
        wanted = None if ids is None else set(ids)
        running = [row for row, live in self.live.items() if wanted is None or live.waiting.request.id in wanted]
        self._outputs.finish(running, Ending(FinishReason.ABORTED))
        for waiting in self.window.remove(wanted):
            self._pages.depart(waiting.path, arrived=False)
            self._outputs.emit(waiting, waiting.tokens[waiting.request.prompt.size :], Ending(FinishReason.ABORTED),
                               waiting.logprobs)

    def stats(self, steps: int, graph_steps: int) -> EngineStats:
        pages, outputs = self._pages, self._outputs
        return EngineStats(len(self.live), len(self.window), self._pool.used, self._pool.usable, pages.prompt_tokens,
                           pages.cached_tokens, outputs.generated, outputs.forced, steps, graph_steps, self._preemptions,
                           outputs.done)

    def check_integrity(self) -> None:
        """Raise AssertionError unless rows, pages and counts agree; for tests and for an idle engine."""
        r = self.rows
        rows = np.flatnonzero(r.active)
        assert set(rows.tolist()) == set(self.live), "active rows and live requests differ"
        assert sorted([*r.free, *rows.tolist()]) == list(range(self._table.max_rows)), "a row is lost or doubled"
        self._pool.check_integrity([r.pages[row, : r.num_pages[row]] for row in rows.tolist()])
        assert (r.computed[rows] <= r.num_pages[rows] * self._table.page_size).all(), "a row computed past its pages"
        for row in rows[r.state[rows] > 0].tolist():
            automaton = self.live[row].waiting.request.grammar.automaton     # type: ignore[union-attr]
            state = np.array([self._automata.place(automaton)])              # type: ignore[arg-type]
            for token in r.tokens[row, r.prompt_len[row] : r.seen[row]]:
                state = self._automata.step(state, token)
            assert state[0] == r.state[row], "a row's automaton is not where its tokens lead"
