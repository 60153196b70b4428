"""What a step's tokens mean: where outputs end, what grammars force, and the completions that come of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from engine.admission import LengthPredictor
from engine.automata import Automata
from engine.plan import StepPlan
from engine.request import Completion, FinishReason, TokenLogprobs
from engine.row_pages import RowPages
from engine.rows import Live, Rows
from engine.stop_strings import StopStrings
from engine.window import Waiting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Ending(NamedTuple):
    reason: FinishReason
    text: str | None = None
    error: str | None = None


def of_this_row_alone(error: Exception) -> Ending:
    return Ending(FinishReason.ERROR, error=f"the engine failed on this row alone ({in_one_line(error)})")


def in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class Outputs:
    """predictor: to be told how long outputs come to be."""

    def __init__(self, rows: Rows, pages: RowPages, automata: Automata, predictor: LengthPredictor,
                 tokenizer: PreTrainedTokenizerFast | None) -> None:
        self._rows, self._pages, self._automata = rows, pages, automata
        self._predictor, self._tokenizer = predictor, tokenizer
        self._finished: list[Completion] = []
        self.generated = self.forced = self.done = 0

    @property
    def pending(self) -> int:
        """Completions that nobody has fetched yet."""
        return len(self._finished)

    def finished(self) -> list[Completion]:
        done, self._finished = self._finished, []
        return done

    # --- rows in ---

    def open(self, batch: Sequence[Waiting]) -> tuple[list[Live], list[int]]:
        """The rows with their guides and stop strings up to where their outputs are, and their automata's states, 0: none."""
        lives, states = [], []
        for waiting in batch:
            state, grammar = waiting.state, waiting.request.grammar
            if grammar is not None and grammar.automaton is not None and not state and waiting.guide is None:
                state = self._automata.place(grammar.automaton)
            try:
                lives.append(self._live(waiting, state))
                states.append(state)
            except Exception as error:               # of its grammar or its stop strings, as in _each
                self._pages.depart(waiting.path, arrived=False)
                self.emit(waiting, waiting.tokens[waiting.request.prompt.size :], of_this_row_alone(error), waiting.logprobs)
        return lives, states

    def _live(self, waiting: Waiting, state: int) -> Live:
        request, params, guide, stop = waiting.request, waiting.request.params, waiting.guide, None
        if request.grammar is not None and not state and guide is None:
            guide = request.grammar.start()
        if params.stop and request.grammar is None and self._tokenizer is not None:
            stop = StopStrings(self._tokenizer, params.stop)
            for token in waiting.tokens[request.prompt.size :].tolist():
                stop.find(token)
        logprobs = waiting.logprobs if waiting.logprobs is not None or params.logprobs is None else []
        return Live(waiting, guide, stop, logprobs)

    def begin(self, rows: np.ndarray) -> None:
        """Append what grammars force before anything is sampled; that may be all."""
        r = self._rows
        self._each(rows[r.guided[rows]], self._follow)
        held = rows[r.active[rows] & (r.state[rows] > 0)]
        if held.size:
            self._append_forced(held, least=1)

    # --- results ---

    def retire(self, plan: StepPlan, tokens: np.ndarray, logprobs: dict[int, TokenLogprobs]) -> None:
        """Take in a step's sampled tokens, int32 [S], -1: none; `logprobs` by index into them. Results of rows that left are
        dropped."""
        r = self._rows
        rows = plan.rows[plan.sampled]
        current = r.active[rows] & (r.generation[rows] == plan.generations)
        self._each(rows[current & (tokens < 0)], self._without_token)
        current &= tokens >= 0
        rows, tokens = rows[current], tokens[current]
        r.tokens[rows, r.seen[rows]] = tokens
        r.seen[rows] += 1
        self.generated += rows.size
        ended = (tokens[:, None] == r.stop_ids[rows]).any(1)
        for i, entry in logprobs.items():
            row = int(plan.rows[plan.sampled[i]])
            if current[i] and (kept := r.live[row].logprobs) is not None:
                _fit(kept, int(r.seen[row] - r.prompt_len[row]) - 1)         # after tokens that were not sampled
                kept.append(entry)
        self._each(rows[r.watched[rows] & ~ended], self._watch)
        by_automata = ~ended & (r.state[rows] > 0)
        if by_automata.any():
            self._step(rows[by_automata], tokens[by_automata])
        self._take_back(rows[ended])
        self._end(rows[ended], FinishReason.STOP)        # of a grammar's: it ended there, or gave up on the row
        full = rows[~ended]
        full = full[r.active[full]]
        self._end(full[r.seen[full] >= r.limit[full]], FinishReason.LENGTH)

    def _end(self, rows: np.ndarray, reason: FinishReason) -> None:
        """No more tokens come of these; those under a grammar end as it says."""
        r = self._rows
        bound = r.guided[rows] | (r.state[rows] > 0)
        self.finish(rows[~bound].tolist(), Ending(reason))
        self._each(rows[bound], self._settle)

    def _each(self, rows: np.ndarray, judge: Callable[[int], Ending | None]) -> None:
        """End those of `rows` that `judge` has an ending for. What it raises comes of the row's own grammar or stop strings: that
        row ends, and no other."""
        for row in rows.tolist():
            try:
                ending = judge(row)
            except Exception as error:
                ending = of_this_row_alone(error)
            if ending is not None:
                self.finish([row], ending)

    def _take_back(self, rows: np.ndarray) -> None:
        """The token that each sampled last is not part of its output."""
        self._rows.seen[rows] -= 1

    def _step(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        """Take the rows' automata on by what the device has sampled, as it has done itself."""
        r = self._rows
        before = r.state[rows]
        after = self._automata.step(before, tokens)
        self._take_back(rows[after < 0])                 # a mask would have forbidden it
        self._each(rows[after < 0], self._settle)
        rows, before, after = rows[after >= 0], before[after >= 0], after[after >= 0]
        without_choice = self._automata.chain_size[before] > 0
        r.forced[rows] += without_choice
        self.forced += int(without_choice.sum())
        r.state[rows] = after
        self._append_forced(rows, self._automata.jump)

    def _without_token(self, row: int) -> Ending:
        """No logit was above -inf."""
        r, guide = self._rows, self._rows.live[row].guide
        if guide is not None and (guide.error is not None or (guide.accepting and r.seen[row] < r.least[row])):
            return self._settle(row)                     # it gave up, or allows the end alone, which min_tokens forbids
        return Ending(FinishReason.ERROR, error="the model's logits are not numbers: its values are too large for engine.dtype "
                      "(set engine.dtype=bfloat16), or its weights are broken")

    def _append_forced(self, rows: np.ndarray, least: int) -> None:
        """Append what their automata force, where that is `least` tokens or more, or the end; finish rows that are complete.

        The device may have sampled the first of these tokens already, in the step in flight: it allows no other. So that step's
        result says nothing new, and is dropped like one of a row that left.
        """
        r = self._rows
        automata, state = self._automata, r.state[rows]
        size, end = automata.chain_size[state], automata.chain_end[state]
        jump = np.flatnonzero((size >= least) | (size > 0) & automata.finished[end])
        if jump.size:
            to, state, end = rows[jump], state[jump], end[jump]
            count = np.minimum(size[jump], r.limit[to] - r.seen[to])
            i = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
            r.tokens[np.repeat(to, count), np.repeat(r.seen[to], count) + i] = automata.chain[
                np.repeat(automata.chain_start[state], count) + i]
            r.generation[to] += r.known[to] > r.seen[to]
            r.seen[to] += count
            r.known[to] = r.seen[to]
            r.state[to] = np.where(count == size[jump], end, state)
            r.stale[to] = True
            r.forced[to] += count
            self.forced += int(count.sum())
            self.generated += int(count.sum())
        complete = automata.finished[r.state[rows]]
        done = rows[complete | (r.seen[rows] >= r.limit[rows])]
        valid = automata.final[r.state[done]] & automata.sound[r.state[done]]
        self.finish(done[valid].tolist(), Ending(FinishReason.STOP))
        self._each(done[~valid], self._settle)

    def _watch(self, row: int) -> Ending | None:
        """A row that the host must look at after each token: it has a guide or stop strings. Whether it ends there."""
        r = self._rows
        live = r.live[row]
        token = int(r.tokens[row, r.seen[row] - 1])
        if live.guide is not None:
            if live.guide.accept([token]):
                return self._follow(row)
            self._take_back(np.array([row]))
            return self._settle(row)
        if live.stop is not None and (text := live.stop.find(token)) is not None and r.seen[row] >= r.least[row]:
            return Ending(FinishReason.STOP, text=text)
        return None

    def _follow(self, row: int) -> Ending | None:
        """Append the tokens that the grammar forces, with no forward pass of their own; the row ends where nothing may follow."""
        r, guide = self._rows, self._rows.live[row].guide
        assert guide is not None, "a guided row has one"
        if guide.error is None and not guide.finished:
            n = int(r.known[row])
            forced = np.array(guide.forced(), dtype=np.int32)[: int(r.limit[row]) - n]
            if forced.size:
                guide.accept(forced.tolist())
                r.tokens[row, n : n + forced.size] = forced
                r.known[row] = r.seen[row] = n + forced.size
                r.forced[row] += forced.size
                self.forced += forced.size
                self.generated += forced.size
        return self._settle(row) if guide.error is not None or guide.finished or r.seen[row] >= r.limit[row] else None

    def _settle(self, row: int) -> Ending:
        """How a row under a grammar ends: as it stands if that is valid, else trimmed and closed.

        What the grammar lets through may not pass the final check yet (numbers beyond a double); of most automata it is known to.
        """
        r = self._rows
        state, grammar, guide = int(r.state[row]), r.live[row].waiting.request.grammar, r.live[row].guide
        assert grammar is not None
        may_end = bool(self._automata.final[state]) if guide is None else guide.error is None and guide.accepting
        if state and may_end and self._automata.sound[state]:
            return Ending(FinishReason.STOP)
        produced = r.tokens[row, r.prompt_len[row] : r.seen[row]]
        budget = int(r.limit[row] - r.prompt_len[row])
        if grammar.min_tokens > budget:
            if may_end:
                return Ending(FinishReason.STOP)
            return Ending(FinishReason.ERROR, error=f"the schema needs {grammar.min_tokens} tokens and there is room for "
                          f"{budget}: raise max_tokens, or shorten the prompt")
        closed = grammar.close(produced.tolist(), budget)
        reason = FinishReason.STOP if np.array_equal(closed, produced) else FinishReason.LENGTH_CLOSED
        if kept := r.live[row].logprobs:
            least = min(closed.size, produced.size)
            differs = np.flatnonzero(closed[:least] != produced[:least])
            del kept[differs[0] if differs.size else least :]
        r.tokens[row, r.prompt_len[row] : r.prompt_len[row] + closed.size] = closed
        r.seen[row] = r.prompt_len[row] + closed.size
        return Ending(reason)

    def finish(self, rows: Sequence[int], ending: Ending) -> None:
        """End running rows."""
        if not rows:
            return
        r = self._rows
        for row in rows:
            live, output = r.live[row], r.tokens[row, r.prompt_len[row] : r.seen[row]].copy()
            self._predictor.observe(output.size)
            live.waiting.forced_tokens = int(r.forced[row])
            self.emit(live.waiting, output, ending, live.logprobs)
        self._pages.leave(rows)

    def emit(self, waiting: Waiting, output: np.ndarray, ending: Ending, logprobs: list[TokenLogprobs | None] | None) -> None:
        if logprobs is not None:
            _fit(logprobs, output.size)
        self._finished.append(Completion(waiting.request.id, output, ending.reason, waiting.request.prompt.size,
                                         waiting.cached_tokens or 0, waiting.forced_tokens, ending.text, ending.error, logprobs))
        self.done += 1


def _fit(logprobs: list[TokenLogprobs | None], size: int) -> None:
    """One for each of `size` tokens: less for what is no output, None where a token was not sampled."""
    del logprobs[size:]
    logprobs.extend([None] * (size - len(logprobs)))
