"""Loop: the turns of a job between the feed, the engine and the collector, in one thread."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Hashable

from engine.request import Completion, FinishReason
from pipeline.collect import Collect
from pipeline.config import LimitKeys
from pipeline.input.feed import Feed, Work
from pipeline.input.formats import first_line
from pipeline.model import EngineLike
from pipeline.observe.metrics import Metrics
from pipeline.observe.progress import Progress
from pipeline.output.rows import Status
from pipeline.signals import Stop, Watchdog


class Loop:
    """The turns between the feed, the engine and the collector."""

    def __init__(self, engine: EngineLike, feed: Feed, collect: Collect, stop: Stop, progress: Progress, metrics: Metrics,
                 total: int) -> None:
        self._engine, self._feed, self._collect = engine, feed, collect
        self._stop, self._progress, self._metrics, self._total = stop, progress, metrics, total
        self._ready: deque[Work] = deque()
        self._running: dict[Hashable, Work] = {}  # what the engine holds
        self._numbers = itertools.count()
        self._looked = 0.0
        self._generated = 0
        self._given_up: str | None = None  # the error of rows that become `aborted`, from then on

    def run(self, limits: LimitKeys) -> str | None:
        """Until all is done (None) or a stop is asked for (why). Raises what the threads of feed and collector ran into."""
        with Watchdog(limits.hang_seconds, "no step for") as watchdog:
            return self._run(limits, watchdog)

    def _run(self, limits: LimitKeys, watchdog: Watchdog) -> str | None:
        self._progress.phase("prefill and decode")
        self._progress.begin(self._total)
        reason = self._turns(lambda: self._stop.interrupted() or self._stop.spent(self._generated), limits, watchdog)
        if reason is not None:
            if limits.on_budget == "finish" and self._stop.interrupted() is None:
                self._given_up = f"not done by {reason}"
                self._feed.give_up(self._given_up)
            self._drain(reason, limits, watchdog)
        if self._given_up is not None:
            reason = self._turns(self._stop.interrupted, limits, watchdog)
        elif self._over():
            reason = None    # what still ran was the end of it
        self._feed.stop()
        self._collect.close()
        self._look(limits, now=True)
        return reason

    def _turns(self, stop: Callable[[], str | None], limits: LimitKeys, watchdog: Watchdog) -> str | None:
        """Until there is nothing left to do (None), or `stop` gives a reason."""
        while not self._over():
            if reason := stop():
                return reason
            self._admit()
            if self._engine.pending:
                self._step()
            else:
                self._ready.extend(self._feed.take(wait=0.05))
            self._look(limits)
            watchdog.turn()
        return None

    def _over(self) -> bool:
        """There is nothing left to do."""
        return not self._engine.pending and not self._ready and self._feed.exhausted

    def _admit(self) -> None:
        """Row by row as there is room: whole batches would wait for their slowest row."""
        for _ in range(self._engine.room()):
            if not self._ready:
                self._ready.extend(self._feed.take())
                if not self._ready:
                    return
            self._submit(self._ready.popleft())

    def _submit(self, work: Work) -> None:
        if self._given_up is not None:
            self._collect.refuse(work, Status.ABORTED, self._given_up)
            return
        limit, output = self._engine.max_model_len, work.ask.guide.grammar.min_tokens if work.ask.guide else 1
        if len(work.tokens) + output > limit:
            error = f"{len(work.tokens)} prompt tokens leave no room for an output of {output} in engine.max_model_len={limit}"
            self._collect.refuse(work, Status.PROMPT_TOO_LONG, error)
            return
        work.most = min(work.ask.params.max_tokens, limit - len(work.tokens))
        number = next(self._numbers)
        try:
            self._engine.submit(work.request(number))
        except ValueError as error:
            self._collect.refuse(work, Status.ENGINE_ERROR, first_line(error))
            return
        self._running[number] = work

    def _step(self) -> None:
        for completion in self._engine.step():
            work = self._running.pop(completion.id)
            if completion.finish_reason is FinishReason.ERROR and not work.tries:
                work.tries = 1  # once more: what failed may have been the company it kept
                self._ready.appendleft(work)
            elif self._to_resample(work, completion):
                work.resampled += 1
                self._ready.appendleft(work)
            elif completion.finish_reason is FinishReason.ABORTED and work.cut is None:
                self._ready.appendleft(work)  # still to do, by the next attempt
            else:
                self._collect.put(work, completion)

    def _to_resample(self, work: Work, completion: Completion) -> bool:
        """The grammar is only near to the row's schema, and this output does not fit."""
        guide = work.ask.guide
        if guide is None or work.resampled >= guide.retries:
            return False
        if completion.finish_reason in (FinishReason.ERROR, FinishReason.ABORTED):
            return False
        return not self._collect.fits(work, completion)

    def _drain(self, reason: str, limits: LimitKeys, watchdog: Watchdog) -> None:
        """Admit nothing more, give running rows their grace, then abort the rest: the next attempt computes those again, unless
        they are given up."""
        self._progress.line(f"{reason}: finishing the rows that run, at most {limits.grace_seconds:g} s")
        deadline = time.monotonic() + limits.grace_seconds
        while self._engine.pending and time.monotonic() < deadline:
            self._step()
            self._look(limits)
            watchdog.turn()
        if self._given_up is not None:
            for work in self._running.values():
                work.cut = Status.ABORTED, self._given_up
        self._engine.abort()
        while self._engine.pending:
            self._step()

    def _cut_overdue(self, seconds: float) -> None:
        ids = self._engine.overdue(seconds)
        for id in ids:
            self._running[id].cut = Status.TIMEOUT, f"ran longer than limits.row_seconds={seconds:g}"
        if ids:
            self._engine.abort(ids)

    def _look(self, limits: LimitKeys, now: bool = False) -> None:
        """A few times a second: errors of the threads, rows that take too long, progress, metrics."""
        if not now and time.monotonic() - self._looked < 0.1:
            return
        self._looked = time.monotonic()
        self._feed.check()
        self._collect.check()
        if limits.row_seconds is not None:
            self._cut_overdue(limits.row_seconds)
        stats = self._engine.stats()
        self._generated = stats.generated_tokens
        self._progress.update(
            self._collect.done, self._collect.recovered, stats.prompt_tokens, stats.generated_tokens, stats.running, stats.waiting
        )
        self._metrics.tick(self._collect.results, stats, now)
