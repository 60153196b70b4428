"""Collect: behind the engine, in threads: detokenise, validate, journal, and publish each shard once its last row is there."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from engine.request import Completion, FinishReason
from pipeline.input.feed import OpenShard, Work, aimed
from pipeline.input.prompts import Tokenizer
from pipeline.input.sources import Input
from pipeline.output.rows import RowResult, Status

_BATCH = 1024


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
        """Take what is there, at least one item; False once the end was taken."""
        items = [self._queue.get()]
        while items[-1] is not None and len(items) < _BATCH and not self._queue.empty():
            items.append(self._queue.get())
        going = items[-1] is not None
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
        return going

    def _decoded(self, finished: list[tuple[Work, Completion]]) -> Iterator[tuple[Work, RowResult]]:
        texts = iter(self._tokenizer.decode_batch([c.tokens for _, c in finished if c.text is None]))
        for work, completion in finished:
            yield work, row_result(work, completion, completion.text if completion.text is not None else next(texts))

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
            self._publishing.append(self._publisher.submit(self._publish, state))

    def _publish(self, state: OpenShard) -> None:
        state.writer.commit(chunk.table for chunk in self._cursor.read(state.shard))
        self._published(state)


def row_result(work: Work, completion: Completion, text: str) -> RowResult:
    """What the row's columns say of a completion. A guided text is parsed and checked against the original schema, whatever the
    grammar promised."""
    status, error, json = Status.OK, completion.error, None
    guide = work.ask.guide
    reason = completion.finish_reason
    if reason is FinishReason.ERROR:
        status, error = Status.ENGINE_ERROR, error or "the engine gave no reason"
    elif reason is FinishReason.ABORTED:
        assert work.cut is not None, "only rows that the loop has cut come here aborted"
        status, error = work.cut
    elif reason is FinishReason.LENGTH:
        status = Status.LENGTH
    elif guide is not None and guide.validator is not None:
        try:
            guide.validator.check(text)
            json = text
        except ValueError as problem:
            status, error = Status.SCHEMA_ERROR, f"the output does not fit the schema: {problem}"
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
    )
