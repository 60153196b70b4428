"""Time kernels as a decode step launches them: in a CUDA graph, so that the host's launches cost nothing."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

LEAST, MOST, MILLISECONDS = 7, 100, 30.0      # replays; more than the least only while they have taken no longer than this


def replay_seconds(calls: Sequence[Callable[[], object]]) -> float:
    """Median time of one call, over replays of a graph that makes all of them one after the other.

    Give each call inputs of its own, more than fit in L2 together, if they are to come from memory. What the calls return is kept
    until all are captured, so that no two write to the same place.
    """
    calls[0]()                                # compiles and loads what capturing may not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times: list[float] = []
    while len(times) < LEAST or (sum(times) < MILLISECONDS and len(times) < MOST):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    del kept
    return statistics.median(times) / len(calls) / 1e3
