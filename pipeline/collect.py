"""Collect: behind the engine, in threads: detokenise, validate, journal, and publish each shard once its last row is there."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import orjson

from engine.request import Completion, FinishReason
from pipeline.input.feed import OpenShard, Work, aimed
from pipeline.input.prompts import Tokenizer
from pipeline.input.sources import Input
from pipeline.output.journal import SYNC_SECONDS
from pipeline.output.rows import RowResult, Status

_BATCH = 1024
_IDLE_SECONDS = 0.4


class Collect(threading.Thread):
    """Owns the writers of the open shards. `put` and `deliver` may be called from any thread.

    `results`: journalled by this attempt; `done`: rows that are whole, `recovered` of them by earlier attempts. An error of the
    threads is raised by `check`.
    """

    def __init__(self, source: Input, tokenizer: Tokenizer, published: Callable[[OpenShard], None]) -> None:
        super().__init__(name="collect", daemon=True)
        self._tokenizer, self._published = tokenizer, published
        self._cursor = source.cursor()
        self._queue: queue.SimpleQueue[tuple[Work, Completion | RowResult] | tuple[OpenShard, list[RowResult]] | None] = (
            queue.SimpleQueue()
        )
        self._open: dict[OpenShard, int] = {}  # rows missing
        self._publisher = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._publishing: list[Future[None]] = []
        self._flushed = time.monotonic()
        self._failure: BaseException | None = None
        self.results = self.done = self.recovered = 0

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure
        for future in [f for f in self._publishing if f.done()]:
            self._publishing.remove(future)
            future.result()

    def opened(self, state: OpenShard) -> None:
        self._queue.put((state, []))

    def deliver(self, state: OpenShard, results: list[RowResult]) -> None:
        """Results that needed no engine."""
        self._queue.put((state, results))

    def put(self, work: Work, completion: Completion) -> None:
        self._queue.put((work, completion))

    def refuse(self, work: Work, status: Status, error: str) -> None:
        """Work that the engine does not take."""
        target = work.targets[0]
        result = RowResult(target.row, target.sample, target.samples, status, error, prompt_tokens=len(work.tokens))
        self._queue.put((work, result))

    def close(self) -> None:
        """Journal all that was put, publish the shards that are whole, and let the others go. Once more does nothing."""
        if self.is_alive():
            self._queue.put(None)
            self.join()
        self._publisher.shutdown()
        while self._open:
            self._open.popitem()[0].writer.close()

    # --- the thread ---

    def run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:
            self._failure = error  # raised again by the loop's next `check`

    def _turn(self) -> bool:
        """Take what is there, within a moment; False once the end was taken."""
        items: list[Any] = []
        with suppress(queue.Empty):
            items.append(self._queue.get(timeout=_IDLE_SECONDS))
        while items and items[-1] is not None and len(items) < _BATCH and not self._queue.empty():
            items.append(self._queue.get())
        going = None not in items
        results: dict[OpenShard, list[RowResult]] = {}
        made: list[tuple[Work, RowResult]] = []
        finished: list[tuple[Work, Completion]] = []
        for item in items:
            match item:
                case OpenShard() as state, list() as rows:
                    results.setdefault(state, []).extend(rows)
                case Work() as work, RowResult() as result:
                    made.append((work, result))
                case Work() as work, Completion() as completion:
                    finished.append((work, completion))
        for work, result in itertools.chain(made, self._decoded(finished)):
            with work.state.lock:
                work.result = result
                targets = work.targets
            results.setdefault(work.state, []).extend(aimed(result, target) for target in targets)
        for state, rows in results.items():
            self._journal(state, rows)
        self._flush()
        return going

    def _decoded(self, finished: list[tuple[Work, Completion]]) -> Iterator[tuple[Work, RowResult]]:
        plain = [
            completion.tokens for work, completion in finished if completion.text is None and not (_calls(work) or _spelled(work))
        ]
        marked = [completion.tokens for work, completion in finished if _calls(work)]
        texts, marked_texts = iter(self._tokenizer.decode_batch(plain)), iter(self._tokenizer.decode_marked(marked))
        for work, completion in finished:
            if _calls(work):
                text = next(marked_texts)
            elif completion.text is not None:
                text = completion.text
            else:
                text = self._decode(work, completion.tokens) if _spelled(work) else next(texts)
            completion, text, outcome = self._checked(work, completion, text)
            yield work, row_result(work, completion, text, outcome)

    def fits(self, work: Work, completion: Completion) -> bool:
        """Whether an output is what its guide asks for; from any thread."""
        assert work.ask.guide is not None
        try:
            work.ask.guide.check(self._decode(work, completion.tokens))
        except ValueError:
            return False
        return True

    def _decode(self, work: Work, tokens: np.ndarray) -> str:
        if _spelled(work):
            assert work.ask.guide is not None
            return work.ask.guide.grammar.text(tokens.tolist())
        decode = self._tokenizer.decode_marked if _calls(work) else self._tokenizer.decode_batch
        return decode([tokens])[0]

    def _checked(self, work: Work, completion: Completion, text: str) -> tuple[Completion, str, Outcome]:
        """A guided output against its schema, whatever the grammar promised. One that fails is trimmed and closed: a grammar lets
        numbers through that no double holds, say."""
        guide, outcome = work.ask.guide, _check(work, completion, text)
        if guide is None or guide.retries or outcome.error is None:
            return completion, text, outcome
        try:
            tokens = guide.grammar.close(completion.tokens.tolist(), work.most)
        except ValueError:                               # too few tokens for any valid output
            return completion, text, outcome
        closed = replace(completion, tokens=tokens, finish_reason=FinishReason.LENGTH_CLOSED)
        closed_text = self._decode(work, tokens)
        mended = _check(work, closed, closed_text)
        return (closed, closed_text, mended) if mended.error is None else (completion, text, outcome)

    def _journal(self, state: OpenShard, results: list[RowResult]) -> None:
        if state not in self._open:
            self._open[state] = state.shard.num_rows
            self.recovered += state.shard.num_rows - state.writer.missing()
        missing = self._open[state]
        if results:
            state.writer.append(*results)
            self.results += len(results)
        self._open[state] = state.writer.missing()
        self.done += missing - self._open[state]
        if not self._open[state]:
            del self._open[state]
            state.writer.flush()    # it may wait for others to be published
            self._publishing.append(self._publisher.submit(self._publish, state))

    def _flush(self) -> None:
        """A journal syncs itself while rows come; where they come seldom, here."""
        if time.monotonic() - self._flushed >= SYNC_SECONDS:
            for state in self._open:
                state.writer.flush()
            self._flushed = time.monotonic()

    def _publish(self, state: OpenShard) -> None:
        state.writer.commit(chunk.table for chunk in self._cursor.read(state.shard))
        self._published(state)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the check of an output came to. `value`: what its guide made of it; `error`: why it does not fit."""

    value: Any = None
    error: str | None = None


def _calls(work: Work) -> bool:
    """The markers of tool calls may be special tokens: its text is to keep them."""
    return work.ask.guide is not None and work.ask.guide.spec.kind == "tools"


def _spelled(work: Work) -> bool:
    """All of its text is to be what a regex or choice says, also a space at its start, which some tokenizers leave out."""
    return work.ask.guide is not None and work.ask.guide.spec.kind in ("regex", "choice")


def _check(work: Work, completion: Completion, text: str) -> Outcome:
    guide, reason = work.ask.guide, completion.finish_reason
    if guide is None or reason not in (FinishReason.STOP, FinishReason.LENGTH_CLOSED):
        return Outcome()
    try:
        return Outcome(guide.check(text))
    except ValueError as problem:
        return Outcome(error=str(problem))


def row_result(work: Work, completion: Completion, text: str, outcome: Outcome) -> RowResult:
    """What the row's columns say of a completion."""
    status, error, json, calls = Status.OK, completion.error, None, None
    guide = work.ask.guide
    reason = completion.finish_reason
    if reason is FinishReason.ERROR:
        status, error = Status.ENGINE_ERROR, error or "the engine gave no reason"
    elif reason is FinishReason.ABORTED:
        assert work.cut is not None, "only rows that the loop has cut come here aborted"
        status, error = work.cut
    elif reason is FinishReason.LENGTH:
        status = Status.LENGTH
    elif outcome.error is not None:
        what = "tools" if guide is not None and guide.spec.kind == "tools" else "schema"
        status, error = Status.SCHEMA_ERROR, f"the output does not fit the {what}: {outcome.error}"
    elif guide is not None and guide.spec.kind == "schema":
        json = text
    elif guide is not None and guide.spec.kind == "tools":
        if outcome.value:
            calls = orjson.dumps(outcome.value).decode()
        elif len(completion.tokens) >= work.most or reason is FinishReason.LENGTH_CLOSED:
            status, reason = Status.LENGTH, FinishReason.LENGTH    # free text may end anywhere: the grammar does not tell
    target = work.targets[0]
    return RowResult(
        target.row,
        target.sample,
        target.samples,
        status,
        error,
        text,
        json,
        str(reason),
        completion.prompt_tokens,
        completion.cached_tokens,
        len(completion.tokens),
        calls,
    )
