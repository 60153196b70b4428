"""Feed: reads, renders and tokenises ahead of the engine, in threads, and hands over work ordered by prefix."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from engine.request import Request
from engine.window import prefix_order
from pipeline.input.formats import Chunk
from pipeline.input.plan import Shard
from pipeline.input.prompts import Ask, Prompt, PromptBuilder, row_seed
from pipeline.input.sources import Input
from pipeline.output.rows import RowResult, Status
from pipeline.output.shards import ShardWriter

OPEN_ROWS = 32768  # rows of shards that were begun and are not published: the tail of one does not idle the engine
OPEN_SHARDS = 64
RESAMPLING_TEMPERATURE = 0.7  # at least, where an output did not fit: at 0 it would be the same again
_AHEAD = 2  # windows ready before the engine asks for them


@dataclass(eq=False)
class OpenShard:
    """A shard in the making. `greedy`: what is computed once for all rows that ask the same; `lock` guards its works' targets."""

    shard: Shard
    writer: ShardWriter
    greedy: dict[tuple, Work] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(slots=True, frozen=True)
class Target:
    """Where a result goes: one sample of one row."""

    row: int
    sample: int
    samples: int
    note: str | None = None


@dataclass(slots=True, eq=False)
class Work:
    """One request to the engine and the rows that get its result."""

    state: OpenShard
    tokens: np.ndarray
    ask: Ask
    seed: int
    targets: list[Target]
    result: RowResult | None = None  # set once, under the shard's lock; rows that come later take a copy
    tries: int = 0
    cut: tuple[Status, str] | None = None  # why the loop ended it: its status and error
    resampled: int = 0  # how often its output did not fit a schema that is kept by trying
    most: int = 0  # tokens that its output may have: max_tokens, or what the context leaves; set when it is submitted

    def request(self, number: int) -> Request:
        grammar = self.ask.guide.grammar if self.ask.guide else None
        params = self.ask.params if self.ask.params.seed == self.seed else replace(self.ask.params, seed=self.seed)
        if self.resampled:
            params = replace(params, seed=row_seed(self.seed, "resampled", self.resampled),
                             temperature=max(params.temperature, RESAMPLING_TEMPERATURE))
        return Request(number, self.tokens, params, grammar, self.ask.adapter)


class Shards(Protocol):
    """Which shards to do: Assigned, or pipeline.output.claims.Claims."""

    def __iter__(self) -> Iterator[Shard]: ...

    def release(self, shard: Shard) -> None:
        """It is published."""

    def stop(self) -> None:
        """End the iteration, should it wait for something."""


class Assigned:
    """Shards that are this worker's by their number: nobody else does them."""

    def __init__(self, shards: list[Shard]) -> None:
        self._shards = shards

    def __iter__(self) -> Iterator[Shard]:
        return iter(self._shards)

    def release(self, shard: Shard) -> None:
        """Nothing was taken."""

    def stop(self) -> None:
        """Nothing waits."""


class Feed(threading.Thread):
    """Iterates the shards once, in its own thread. `take` gives windows of works; rows that need no engine are delivered at once.

    An error of the thread is raised by `check`.
    """

    def __init__(self, source: Input, shards: Shards, open_shard: Callable[[Shard], ShardWriter], builder: PromptBuilder,
                 seed: int, window: int, threads: int, opened: Callable[[OpenShard], None],
                 deliver: Callable[[OpenShard, list[RowResult]], None]) -> None:
        super().__init__(name="feed", daemon=True)
        self._source, self._shards, self._open_shard, self._builder = source, shards, open_shard, builder
        self._seed, self._window, self._threads = seed, window, threads
        self._opened, self._deliver = opened, deliver
        self._ready: queue.Queue[list[Work]] = queue.Queue(_AHEAD)
        self._stopping = threading.Event()
        self._room = threading.Condition()
        self._open_rows = self._open_shards = 0
        self._finished = False
        self._given_up: str | None = None
        self._failure: BaseException | None = None

    # --- for the loop ---

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def take(self, wait: float = 0.0) -> list[Work]:
        """The next window, or nothing where none is ready within `wait` seconds."""
        try:
            return self._ready.get(timeout=wait) if wait else self._ready.get_nowait()
        except queue.Empty:
            return []

    @property
    def exhausted(self) -> bool:
        return self._finished and self._ready.empty()

    def published(self, state: OpenShard) -> None:
        """A shard is done with: another may be opened."""
        self._shards.release(state.shard)
        with self._room:
            self._open_rows -= state.shard.num_rows
            self._open_shards -= 1
            self._room.notify()

    def give_up(self, error: str) -> None:
        """Make no more prompts: the rows from here on are delivered as `aborted`."""
        self._given_up = error

    def stop(self) -> None:
        """Open nothing more. Returns once the thread is out of the way."""
        self._stopping.set()
        self._shards.stop()
        with self._room:
            self._room.notify()
        if self.is_alive():
            self.join()

    # --- the thread ---

    def run(self) -> None:
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="prompts")
        try:
            cursor = self._source.cursor(self._builder.columns)
            for shard in self._shards:
                if not self._make_room(shard):
                    return
                state = OpenShard(shard, self._open_shard(shard))
                self._opened(state)
                recovered = state.writer.recovered()
                window: list[Work] = []
                ids = shard.row_ids()
                row = 0
                for prompts in () if self._given_up else self._prompts(cursor.read(shard), pool):
                    window += self._works(state, prompts, recovered, ids)
                    row += len(prompts)
                    if len(window) >= self._window and not self._hand_over(window):
                        return
                    if self._given_up:
                        break
                if self._given_up:
                    self._deliver(state, self._aborted(range(row, shard.num_rows), recovered, self._given_up))
                if not self._hand_over(window):
                    return
            self._finished = True
        except BaseException as error:
            self._failure = error  # raised again by the loop's next `check`
        finally:
            pool.shutdown(cancel_futures=True)

    def _make_room(self, shard: Shard) -> bool:
        def fits() -> bool:
            return not self._open_shards or (self._open_rows + shard.num_rows <= OPEN_ROWS and self._open_shards < OPEN_SHARDS)

        with self._room:
            self._room.wait_for(lambda: self._stopping.is_set() or fits())
            self._open_rows += shard.num_rows
            self._open_shards += 1
        return not self._stopping.is_set()

    def _prompts(self, chunks: Iterator[Chunk], pool: ThreadPoolExecutor) -> Iterator[list[Prompt]]:
        """Chunks built in the pool, in order, a few ahead."""
        building: deque[Future[list[Prompt]]] = deque()
        row = 0
        for chunk in chunks:
            building.append(pool.submit(self._builder.build, chunk, row))
            row += chunk.table.num_rows
            if len(building) > 2 * self._threads:
                yield building.popleft().result()
        while building:
            yield building.popleft().result()

    def _works(self, state: OpenShard, prompts: list[Prompt], recovered: Mapping[tuple[int, int], RowResult], ids: Iterator[str]
               ) -> list[Work]:
        """What the engine has to do for these rows; rows that need it not are delivered."""
        works: list[Work] = []
        done: list[RowResult] = []
        for prompt, row_id in zip(prompts, ids, strict=False):
            samples = prompt.ask.n if prompt.ask else 1
            for sample in range(samples):
                if (prompt.row, sample) in recovered:
                    continue
                if prompt.status is not Status.OK:
                    done.append(RowResult(prompt.row, sample, samples, prompt.status, prompt.error))
                    continue
                assert prompt.tokens is not None and prompt.ask is not None
                target = Target(prompt.row, sample, samples, prompt.note)
                if prompt.ask.params.temperature > 0:
                    works.append(Work(state, prompt.tokens, prompt.ask, self._seed_of(prompt.ask, row_id, sample), [target]))
                elif (work := self._shared(state, prompt, target, done)) is not None:
                    works.append(work)
        if done:
            self._deliver(state, done)
        return works

    def _aborted(self, rows: range, recovered: Mapping[tuple[int, int], RowResult], error: str) -> list[RowResult]:
        """What is not there yet of `rows`. How many samples a row asks for itself is not looked up."""
        now = list(recovered.items())      # results of earlier rows come in meanwhile
        samples = {row: result.samples for (row, _), result in now}
        return [RowResult(row, sample, n, Status.ABORTED, error) for row in rows
                for n in [samples.get(row, self._builder.default.n)] for sample in range(n) if (row, sample) not in recovered]

    def _seed_of(self, ask: Ask, row_id: str, sample: int) -> int:
        if ask.seed is None:
            return row_seed(self._seed, row_id, sample)
        return ask.seed if sample == 0 else row_seed(ask.seed, "", sample)

    @staticmethod
    def _shared(state: OpenShard, prompt: Prompt, target: Target, done: list[RowResult]) -> Work | None:
        """At temperature 0 equal requests have equal results: new work for the first, None for those that join it."""
        assert prompt.tokens is not None and prompt.ask is not None
        ask = prompt.ask
        key = (hashlib.blake2b(prompt.tokens.tobytes(), digest_size=16).digest(), ask.params, ask.guide, ask.adapter)
        with state.lock:
            work = state.greedy.get(key)
            if work is None:
                work = state.greedy[key] = Work(state, prompt.tokens, ask, 0, [target])
                return work
            if work.result is None:
                work.targets.append(target)
            else:
                done.append(aimed(work.result, target))
        return None

    def _hand_over(self, window: list[Work]) -> bool:
        """Pass the window on, rows with a common prefix side by side; waits while the engine has enough. False: stopping."""
        works = sorted(window, key=lambda work: prefix_order(work.tokens))
        window.clear()
        while works and not self._stopping.is_set():
            try:
                self._ready.put(works, timeout=0.1)
                break
            except queue.Full:
                continue
        return not self._stopping.is_set()


def aimed(result: RowResult, target: Target) -> RowResult:
    """The result for another of the rows that share it."""
    error = result.error or target.note
    return replace(result, row=target.row, sample=target.sample, samples=target.samples, error=error)
