"""CUDA graphs of a part of the decode step, one for each padded number of rows.

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


class CudaGraphs:
    def __init__(self, launch: Callable[[int], Tensor], sizes: list[int], pool: Any) -> None:
        """launch(n): launch it for the first n rows of the table; returns its result, [n, ...]. sizes: ascending."""
        self._launch, self._pool = launch, pool
        self._stream = torch.cuda.Stream()       # one for all: what the allocator caches, it caches for each stream apart
        self._sizes = sizes
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def padded(self, rows: int) -> int:
        """The smallest captured size that holds `rows`."""
        return self._sizes[bisect_left(self._sizes, rows)]

    def replay(self, size: int) -> Tensor:
        """-> the result [size, ...], valid until the next replay; `size` as padded() gives it."""
        graph, result = self._graphs[size]
        graph.replay()
        return result

    def capture(self) -> None:
        """At start-up, so that no step of the job waits for a capture."""
        for size in reversed(self._sizes):
            self._capture(size)

    @torch.inference_mode()
    def _capture(self, size: int) -> None:
        """A first run outside the capture compiles the kernels and makes the handles; it does what the replay does once more."""
        side = self._stream
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._launch(size)
            side.synchronize()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=self._pool)
            try:
                result = self._launch(size)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(side)
        self._graphs[size] = graph, result
