"""When to stop: signals, budgets and the end of a Slurm allocation, asked by the run's loop; and what ends a run that hangs."""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType

from pipeline.config import LimitKeys
from pipeline.exits import Exit

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_MARGIN = 30.0  # seconds kept, after the grace, for the journal and the shutdown of the device


class Stop:
    """The handler only sets a flag: the loop drains at its next turn. A second signal ends the process at once, also where the
    main thread is stuck in a call that does not return, and so runs no handler: a thread of our own listens too.

    `install` again after a library was loaded that may have put its own handlers in place.
    """

    def __init__(self, limits: LimitKeys, gpus: int = 0) -> None:
        self._limits, self._started, self._signal = limits, time.monotonic(), 0
        self.gpus = gpus
        end = os.environ.get("SLURM_JOB_END_TIME", "")  # seconds since the epoch
        self._slurm_end = float(end) if end.isdigit() else None
        self._heard, self._told = socket.socketpair()
        self._told.setblocking(False)

    def __enter__(self) -> Stop:
        self.install()
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Nobody listens from here on; the handlers stay, since a process that ends may be told so once more."""
        signal.set_wakeup_fd(-1)
        self._told.close()

    def install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        signal.set_wakeup_fd(self._told.fileno(), warn_on_full_buffer=False)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal:
            os._exit(128 + number)  # nothing to flush: the journal is written as rows finish
        self._signal = number
        os.write(2, b"\nstopping; once more to stop at once\n")

    def _listen(self) -> None:
        """Python's own part of a signal's handling writes its number here, whatever the main thread does."""
        ours = 0
        with self._heard:
            while data := self._heard.recv(64):
                for number in data:
                    ours += number in SIGNALS
                    if ours > 1:
                        os._exit(128 + number)

    def interrupted(self) -> str | None:
        """What wants this process to end now, and another to go on."""
        if self._signal:
            return f"signal {signal.Signals(self._signal).name}"
        if self._slurm_end is not None and time.time() >= self._slurm_end - self._limits.grace_seconds - _MARGIN:
            return "the end of the Slurm allocation"
        return None

    def spent(self, generated_tokens: int) -> str | None:
        """The budget that is used up, or None. `generated_tokens`: by this attempt."""
        limits, elapsed = self._limits, time.monotonic() - self._started
        if limits.max_seconds is not None and elapsed >= limits.max_seconds:
            return f"limits.max_seconds={limits.max_seconds:g}"
        if limits.max_tokens is not None and generated_tokens >= limits.max_tokens:
            return f"limits.max_tokens={limits.max_tokens}"
        if limits.max_gpu_hours is not None and elapsed / 3600 * self.gpus >= limits.max_gpu_hours:
            return f"limits.max_gpu_hours={limits.max_gpu_hours:g}"
        return None


class Interrupted(Exception):
    """A stop was asked for before there was anything to drain; the text says by what."""


class Watchdog(threading.Thread):
    """While it is entered, ends a process in which there was no `turn` for so many seconds. What is journalled stays, and the job
    may be started anew, perhaps elsewhere. `what`: "no step for", what is then said of the seconds."""

    def __init__(self, seconds: float, what: str) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._seconds, self._what, self._turns, self._over = seconds, what, 0, threading.Event()

    def __enter__(self) -> Watchdog:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self.join()

    def turn(self) -> None:
        """It is alive."""
        self._turns += 1

    def run(self) -> None:
        """Seconds are counted by looks and not by the clock: what was suspended for hours, all of it, has not hung."""
        every = min(self._seconds / 4, 5.0)
        seen, still = self._turns, 0.0
        while not self._over.wait(every):
            turns = self._turns
            seen, still = turns, still + every if turns == seen else 0.0
            if still > self._seconds:
                print(f"stopped: {self._what} limits.hang_seconds={self._seconds:g}; the same command goes on from here. "
                      "What every thread is doing:", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(all_threads=True)
                os._exit(Exit.DRAINED)
