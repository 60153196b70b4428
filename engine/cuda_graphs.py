"""CUDA graphs of a part of a step, one for each padded shape of it.

A graph reads the row table's arrays, which the staged writes of the step have filled, so nothing is copied in; what stands past
the step's rows is the dummy row. Graphs share one memory pool: they replay one after another on the compute stream.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, KeysView, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from engine.memory import is_out_of_memory

Key = TypeVar("Key", bound=Hashable)

_log = logging.getLogger(__name__)

MARGIN = 1.03           # what two measurements of one graph may differ by


def graph_sizes(most: int) -> list[int]:
    """Padded numbers of rows up to `most`: fine steps where a row is a large share of the step, coarse ones above."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 32), *range(256, 1024, 64), *range(1024, most, 128)]
    return [n for n in steps if n < most] + [most]


def unbeaten(sizes: list[int], seconds: Mapping[int, float]) -> list[int]:
    """`sizes`, which ascend, without those that a larger one beats clearly; what was not measured stays.

    A library chooses its kernels by rules of thumb: cuBLAS takes nearly twice as long for 448 rows of a 7B's MLP as for 512.
    """
    kept, least = [], math.inf
    for n in reversed(sizes):
        if seconds.get(n, 0.0) <= MARGIN * least:
            kept.append(n)
        least = min(least, seconds.get(n, math.inf))
    return kept[::-1]


def padded(sizes: list[int], n: int) -> int:
    """The least of `sizes`, which ascend, that holds n."""
    return sizes[bisect_left(sizes, n)]


class CudaGraphs(Generic[Key]):
    def __init__(self, launch: Callable[[Key], Tensor], pool: Any) -> None:
        """launch(key): launch it in the shape that the key names. What it returns lives as long as the graph."""
        self._launch, self._pool = launch, pool
        self._stream = torch.cuda.Stream()       # one for all: what the allocator caches, it caches for each stream apart
        self._graphs: dict[Key, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._full = False

    @property
    def captured(self) -> KeysView[Key]:
        return self._graphs.keys()

    def replay(self, key: Key) -> Tensor:
        """-> the result, valid until the next replay."""
        graph, result = self._graphs[key]
        graph.replay()
        return result

    def seconds(self, key: Key) -> float:
        """What a replay takes on the device, which it did not leave idle before."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.replay(key)
        start.record()
        self.replay(key)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def launch_and_capture(self, key: Key) -> Tensor:
        """Launched as it is, which makes what a capture of this shape may not, and captured besides. Where the memory for a graph
        is not there, the step is none the worse for it; no other capture is tried then."""
        result = self._launch(key)
        if not self._full:
            try:
                self._capture(key)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._full = True
                _log.warning("no memory for more CUDA graphs: steps of other sizes than so far are launched without one, slower; "
                             "lower engine.gpu_memory")
        return result

    def prepare(self, keys: Iterable[Key]) -> None:
        """At start-up, so that no step of the job waits for a capture; the largest first, in whose memory the others find room.

        A first run outside the capture loads the kernels (and compiles what is not yet) and makes the handles; it does what the
        replay does once more.
        """
        for key in keys:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._launch(key)
                self._stream.synchronize()
            self._capture(key)
            torch.cuda.current_stream().wait_stream(self._stream)

    def _capture(self, key: Key) -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = self._launch(key)
            finally:
                graph.capture_end()
        self._graphs[key] = graph, result
