"""What a person sees while a job runs: the phase it is in, and rates; a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

LINE_SECONDS = 20.0  # between plain lines: a log of a night stays readable


class Progress:
    """Used by one thread. Totals are rows of this worker's shards."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream, self._started = stream or sys.stderr, time.monotonic()
        self._terminal = self._stream.isatty()
        self._bar: tqdm | None = None
        self._total = 0
        self._began = self._printed = self._started
        self._recent: list[tuple[float, int, int, int]] = []  # time, rows, prompt tokens, completion tokens: the last half minute

    @contextmanager
    def shown_logs(self, name: str) -> Iterator[None]:
        """Meanwhile, what the logger `name` and those below it have to say is shown as phases, errors with their traceback."""
        handler = logging.Handler(logging.INFO)
        handler.emit = lambda record: self.phase(handler.format(record))    # type: ignore[method-assign]
        logger = logging.getLogger(name)
        before = logger.handlers, logger.propagate, logger.level
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.handlers, logger.propagate = before[:2]
            logger.setLevel(before[2])

    def phase(self, name: str) -> None:
        """Say what is being done now."""
        self.line(f"[{time.monotonic() - self._started:6.1f} s] {name}")

    def line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def begin(self, total: int) -> None:
        """Rows are running from now on."""
        self._total, self._began = total, time.monotonic()
        self._printed = self._began
        if self._terminal:
            self._bar = tqdm(total=total, unit="row", file=self._stream, dynamic_ncols=True, smoothing=0.1)

    def update(self, done: int, recovered: int, prompt_tokens: int, completion_tokens: int, running: int, waiting: int) -> None:
        """`recovered`: rows of `done` that cost this attempt no time."""
        now = time.monotonic()
        if now - self._printed < (0.25 if self._terminal else LINE_SECONDS):
            return
        self._printed = now
        self._recent.append((now, done - recovered, prompt_tokens, completion_tokens))
        while now - self._recent[0][0] > 30 and len(self._recent) > 2:
            self._recent.pop(0)
        then = self._recent[0] if len(self._recent) > 1 else (self._began, 0, 0, 0)
        seconds = max(now - then[0], 1e-9)
        rows, prefill, decode = (
            (new - old) / seconds for new, old in zip((done - recovered, prompt_tokens, completion_tokens), then[1:], strict=True)
        )
        rates = f"prefill {prefill:,.0f} tok/s, decode {decode:,.0f} tok/s, {running} running, {waiting} waiting"
        if self._bar is not None:
            self._bar.set_postfix_str(rates, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        average = (done - recovered) / max(now - self._began, 1e-9)
        eta = f", {duration((self._total - done) / average)} left" if average > 0 else ""
        self.phase(f"{done:,} of {self._total:,} rows, {rows:,.1f} rows/s, {rates}{eta}")

    def end(self, done: int) -> None:
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            self._bar.close()
            self._bar = None


def duration(seconds: float) -> str:
    """`1 h 05 min`, `3 min 20 s`, `12 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
