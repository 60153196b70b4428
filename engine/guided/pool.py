"""GrammarPool: compile each distinct guide once, in threads, under limits. What failed once is not tried again."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from queue import SimpleQueue
from typing import Any

from engine.guided.front import GuideSpec
from engine.guided.grammar import Grammar, GrammarBackend, SchemaError

_log = logging.getLogger(__name__)


class _Job:
    """One distinct guide on its way to a grammar."""

    def __init__(self, spec: GuideSpec) -> None:
        self.spec = spec
        self.started = threading.Event()
        self.start_time = 0.0
        self.future: Future[Grammar] = Future()


class GrammarPool:
    """Compiles guides for one backend. Thread-safe.

    seconds: time limit of one guide, from when its compilation starts.
    max_bytes, max_depth: of a schema's JSON, checked before anything else.
    max_grammars: how many are kept; the least recently used goes first (rows that use it keep it alive).
    """

    def __init__(self, backend: GrammarBackend, workers: int | None = None, seconds: float = 10.0, max_bytes: int = 1 << 20,
                 max_depth: int = 100, max_grammars: int = 512) -> None:
        self._backend, self._seconds, self._max_bytes, self._max_depth = backend, seconds, max_bytes, max_depth
        self._max_grammars = max_grammars
        self._jobs: OrderedDict[GuideSpec, _Job] = OrderedDict()
        self._lock = threading.RLock()
        self._closed = False
        self._moved = time.monotonic()                   # when a worker last took up a guide or laid one down
        self._waiting: SimpleQueue[_Job | None] = SimpleQueue()
        # Daemons: one that is lost in a compilation that was given up must not keep the process from ending.
        self._workers = [threading.Thread(target=self._work, name=f"grammar_{i}", daemon=True)
                         for i in range(workers or max(2, min(8, os.cpu_count() or 1)))]
        for worker in self._workers:
            worker.start()

    def submit(self, source: Any) -> Future[Grammar]:
        """Start compiling, if nobody has. The future gives the grammar or raises SchemaError; see `get` for the time limit.

        Raises SchemaError at once where `source` is no guide at all.
        """
        return self._job(source).future

    def get(self, source: Any) -> Grammar:
        """The grammar, waited for. Raises SchemaError (also the second time) where it cannot be kept or takes too long."""
        job = self._job(source)
        if not job.future.done():
            self._await_start(job)
            try:
                job.future.exception(max(0.0, job.start_time + self._seconds - time.monotonic()))
            except FutureTimeout:
                reason = f"compiling took longer than {self._seconds:g} s: make the schema simpler"
                self._settle(job, error=SchemaError("", reason))
        error = job.future.exception()
        if isinstance(error, SchemaError):               # a new one: raising the same object again would grow its traceback
            raise SchemaError(error.pointer, error.reason)
        return job.future.result()

    def close(self) -> None:
        """Drop what has not started; whoever waits for it gets a RuntimeError."""
        with self._lock:
            self._closed = True
            for _ in self._workers:
                self._waiting.put(None)
            for job in self._jobs.values():
                if not job.started.is_set():
                    self._settle(job, error=RuntimeError("the grammar pool is closed"))
                    job.started.set()

    def _job(self, source: Any) -> _Job:
        spec = source if isinstance(source, GuideSpec) else GuideSpec.of(source)
        with self._lock:
            job = self._jobs.get(spec)
            if job is None and self._closed:
                raise RuntimeError("the grammar pool is closed")
            if job is None:
                job = self._jobs[spec] = _Job(spec)
                self._waiting.put(job)
                while len(self._jobs) > self._max_grammars:
                    self._jobs.popitem(last=False)
            else:
                self._jobs.move_to_end(spec)
        return job

    def _await_start(self, job: _Job) -> None:
        """Until a worker takes `job` up, or it is refused: where none moves, all are lost in what was given up."""
        while not job.started.wait(self._seconds):
            if time.monotonic() - self._moved > 2 * self._seconds:
                with self._lock:
                    self._jobs.pop(job.spec, None)       # it may be tried again
                reason = "not compiled: all compilers are still busy with schemas that took too long; make those simpler"
                self._settle(job, error=SchemaError("", reason))
                job.started.set()

    def _work(self) -> None:
        while (job := self._waiting.get()) is not None:
            if not job.future.done():                    # refused or closed while it waited
                self._moved = time.monotonic()
                self._run(job)
                self._moved = time.monotonic()

    def _run(self, job: _Job) -> None:
        job.start_time = time.monotonic()
        job.started.set()
        try:
            result = self._compile(job.spec)
        except SchemaError as error:                     # handed to whoever asks for the grammar
            self._settle(job, error=error)
        except Exception as error:
            # A schema that trips the compiler is this row's misfortune, not the job's; the log has where it happened.
            _log.exception("a schema tripped the compiler: %.500s", job.spec.text)
            reason = f"cannot be compiled: {type(error).__name__}: {' '.join(str(error).split())}"
            self._settle(job, error=SchemaError("", reason))
        else:
            self._settle(job, result)

    def _compile(self, spec: GuideSpec) -> Grammar:
        if len(spec.text.encode()) > self._max_bytes:
            raise SchemaError("", f"larger than {self._max_bytes} bytes")
        if spec.kind == "regex":
            return self._backend.compile_regex(spec.text)
        value = json.loads(spec.text)
        if spec.kind == "tools":
            form, tools, choice = spec.read_tools()
            for tool in tools:
                self._check_depth(tool.parameters)
            return self._backend.compile_tools(form, tools, choice)
        if spec.kind == "choice":
            return self._backend.compile_choice(value)
        self._check_depth(value)
        return self._backend.compile_loose(value) if spec.kind == "loose" else self._backend.compile_schema(value)

    def _check_depth(self, schema: Any) -> None:
        if _depth(schema) > self._max_depth:
            raise SchemaError("", f"nested deeper than {self._max_depth} levels")

    def _settle(self, job: _Job, grammar: Grammar | None = None, error: Exception | None = None) -> None:
        with self._lock:                                 # the thread and a waiter that lost patience may both come here
            if job.future.done():
                return
            if grammar is not None:
                job.future.set_result(grammar)
            else:
                job.future.set_exception(error)


def _depth(value: Any) -> int:
    deepest, stack = 0, [(value, 1)]
    while stack:
        node, depth = stack.pop()
        deepest = max(deepest, depth)
        children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        stack.extend((child, depth + 1) for child in children)
    return deepest
