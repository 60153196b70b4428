"""CUDA graphs of the whole decode step, one for each padded number of rows.

A graph reads the row table's `rows` and `starts`, which the staged writes of the step have filled, so nothing is copied in; what
stands past the step's rows is the dummy row. Graphs share one memory pool: they replay one after another on the compute stream.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def graph_sizes(most: int) -> list[int]:
    """Padded numbers of rows up to `most`: fine steps where a row is a large share of the step, coarse ones above."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 32), *range(256, 1024, 64), *range(1024, most, 128)]
    return [n for n in steps if n < most] + [most]


def coarse_sizes(most: int) -> list[int]:
    """For graphs captured in mid-job: few, since each holds the job up once."""
    return [n for n in (64, 128, *range(256, most, 256)) if n < most] + [most]


class CudaGraphs:
    def __init__(self, forward: Callable[[int], Tensor], sizes: list[int], pool: Any) -> None:
        """forward(n): launch the decode step of the first n rows of the table; returns logits [n, V]. sizes: ascending."""
        self._forward, self._pool = forward, pool
        self._sizes = sizes
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def padded(self, rows: int) -> int:
        """The smallest captured size that holds `rows`."""
        return self._sizes[bisect_left(self._sizes, rows)]

    def replay(self, size: int) -> Tensor:
        """-> logits [size, V], valid until the next replay; `size` as padded() gives it."""
        if size not in self._graphs:
            self._capture(size)
        graph, logits = self._graphs[size]
        graph.replay()
        return logits

    def capture_all(self) -> None:
        """At start-up, so that no step of the job waits for a capture."""
        for size in reversed(self._sizes):
            self._capture(size)

    @torch.inference_mode()
    def _capture(self, size: int) -> None:
        """A first run outside the capture compiles the kernels and makes the handles; it does what the replay does once more."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._forward(size)
            side.synchronize()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=self._pool)
            try:
                logits = self._forward(size)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(side)
        self._graphs[size] = graph, logits
