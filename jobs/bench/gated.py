"""Gated products of many rows on one Hopper: kernels/gemm_many.py beside cuBLAS and gated_act, in microseconds.

    python jobs/bench/gated.py [--rows M ...] [--shape N K]

Each number of rows is checked against float64 and for equal bits in two runs. Both are timed in turns, in CUDA graphs, as long
each, since a GPU at its power limit runs slower later on; every other round begins with the other one. A time is the median of
the rounds, with the fastest in brackets; at the end the median of the rounds' ratios, and the kernel's TFLOP/s.
N and K are multiples of 256. Needs CUDA; under 20 seconds on one H100.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kernels import pointwise
from kernels.gemm_many import gated_product

DEVICE, DTYPE = "cuda", torch.bfloat16
ROWS = (256, 384, 512, 640, 768, 896, 1024, 1536, 2048, 4096, 8192, 16384)
GATE_UP = (28672, 4096)         # of Mistral-7B
TOLERANCE = 6e-3                # of the norm
ROUNDS, CALLS = 6, 4            # CALLS to a graph
MILLISECONDS = 20.0             # of each in a round


def separate(x: Tensor, weight: Tensor) -> Tensor:
    return pointwise.gated_act(F.linear(x, weight), "silu")


def fused(x: Tensor, weight: Tensor) -> Tensor:
    return gated_product(x, weight, "silu")


def inputs(m: int, depth: int) -> Tensor:
    """Rows that stand in wider ones; one column and one row are larger than the others."""
    x = torch.randn(m, depth + 64, dtype=DTYPE, device=DEVICE)[:, :depth]
    x[:, 7] *= 60
    x[m // 2] *= 10
    return x


def error(x: Tensor, weight: Tensor, got: Tensor) -> float:
    """Of some rows, against float64 rounded where the separate kernels round it."""
    some = torch.randint(0, x.shape[0], (64,), device=DEVICE)
    some[:3] = torch.tensor([0, x.shape[0] // 2, x.shape[0] - 1])
    gate, up = (x[some].double() @ weight.double().T).to(DTYPE).double().chunk(2, -1)
    want = F.silu(gate) * up
    return float((got[some] - want).norm() / want.norm())


def check(x: Tensor, weight: Tensor) -> None:
    got, other = fused(x, weight), separate(x, weight)
    off = error(x, weight, got), float((got.double() - other).norm() / got.double().norm())
    assert max(off) < TOLERANCE, f"M={x.shape[0]}: off by {off}, from float64 and from the separate kernels"
    assert torch.equal(got, fused(x, weight)), f"M={x.shape[0]}: two runs differ"


def captured(call: Callable[[], Tensor]) -> torch.cuda.CUDAGraph:
    """No weights of a layer fit in the L2, so that all calls may have the same."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    graph.replay()      # the first one takes longer
    return graph


def milliseconds(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Of one call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / replays / CALLS


def rounds(x: Tensor, weight: Tensor) -> list[list[float]]:
    """Milliseconds of separate and fused in each round."""
    graphs = [captured(functools.partial(run, x, weight)) for run in (separate, fused)]
    replays = [max(1, round(MILLISECONDS / CALLS / milliseconds(graph, 1))) for graph in graphs]
    times: list[list[float]] = [[], []]
    for n in range(ROUNDS):
        for i in (0, 1) if n % 2 == 0 else (1, 0):
            times[i].append(milliseconds(graphs[i], replays[i]))
    return times


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", nargs="+", type=int, default=ROWS)
    options.add_argument("--shape", nargs=2, type=int, default=GATE_UP)
    given = options.parse_args()
    torch.manual_seed(0)
    features, depth = given.shape
    weight = torch.randn(features, depth, dtype=DTYPE, device=DEVICE).mul_(depth**-0.5)
    print(f"{torch.cuda.get_device_name()}: [{features}, {depth}], us\n{'M':>6}{'cuBLAS + gated_act':>22}{'gemm_many':>22}")
    for m in given.rows:
        x = inputs(m, depth)
        check(x, weight)
        times = rounds(x, weight)
        ratio = statistics.median(ours / theirs for theirs, ours in zip(*times, strict=True))
        cells = "".join(f"{1e3 * statistics.median(each):12.1f} ({1e3 * min(each):7.1f})" for each in times)
        print(f"{m:6}{cells}{ratio:8.3f}{2e-9 * m * features * depth / statistics.median(times[1]):6.0f}", flush=True)


if __name__ == "__main__":
    main()
