"""When to stop: signals, budgets and the end of a Slurm allocation, as one question that the run's loop asks."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

from pipeline.config import LimitKeys

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_MARGIN = 30.0  # seconds kept, after the grace, for the journal and the shutdown of the device


class Stop:
    """The handler only sets a flag: the loop drains at its next turn. A second signal ends the process at once.

    `install` again after a library was loaded that may have put its own handlers in place.
    """

    def __init__(self, limits: LimitKeys, gpus: int = 0) -> None:
        self._limits, self._started, self._signal = limits, time.monotonic(), 0
        self.gpus = gpus
        end = os.environ.get("SLURM_JOB_END_TIME", "")  # seconds since the epoch
        self._slurm_end = float(end) if end.isdigit() else None

    def install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal:
            os._exit(128 + number)  # nothing to flush: the journal is written as rows finish
        self._signal = number

    def reason(self, generated_tokens: int = 0) -> str | None:
        """Why to stop now, or None. `generated_tokens`: by this attempt."""
        if self._signal:
            return f"signal {signal.Signals(self._signal).name}"
        limits, elapsed = self._limits, time.monotonic() - self._started
        if limits.max_seconds is not None and elapsed >= limits.max_seconds:
            return f"limits.max_seconds={limits.max_seconds:g}"
        if limits.max_tokens is not None and generated_tokens >= limits.max_tokens:
            return f"limits.max_tokens={limits.max_tokens}"
        if limits.max_gpu_hours is not None and elapsed / 3600 * self.gpus >= limits.max_gpu_hours:
            return f"limits.max_gpu_hours={limits.max_gpu_hours:g}"
        if self._slurm_end is not None and time.time() >= self._slurm_end - limits.grace_seconds - _MARGIN:
            return "the end of the Slurm allocation"
        return None
