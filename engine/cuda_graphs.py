"""CUDA graphs of the whole decode step, one for each padded number of rows, captured when first needed.

A graph reads the row table's `rows` and `starts`, which the staged writes of the step have filled, so nothing is copied in; what stands
past the step's rows is the dummy row. All graphs share one memory pool: they replay one after another on the compute stream.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def padded(rows: int) -> int:
    """The number of rows a graph is captured for: fine steps where a row is a large share, coarse ones above."""
    for limit, step in ((4, 1), (64, 8), (256, 16), (512, 32), (1024, 64)):
        if rows <= limit:
            return -(-rows // step) * step
    return -(-rows // 128) * 128


class CudaGraphs:
    def __init__(self, forward: Callable[[int], Tensor]) -> None:
        """forward(n): launch the decode step of the first n rows of the table; returns logits [n, V]."""
        self._forward = forward
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def replay(self, n: int) -> Tensor:
        """-> logits [n, V], valid until the next replay."""
        if n not in self._graphs:
            self._graphs[n] = self._capture(n)
        graph, logits = self._graphs[n]
        graph.replay()
        return logits

    def _capture(self, n: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        main = torch.cuda.current_stream()
        side = torch.cuda.Stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            self._forward(n)                         # compiles kernels and makes handles, which a capture must not do
            side.synchronize()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=self._pool)
            try:
                logits = self._forward(n)
            finally:
                graph.capture_end()
        main.wait_stream(side)
        return graph, logits
