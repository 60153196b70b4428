"""Attention of decode steps on one GPU, in microseconds: decode_step.py's kernel, and ways of decode_few.py's.

    python jobs/bench/decode_step.py [--rows N --context N ...] [--dim 64] [--chain]

Each way is checked against decode_step.py's kernel. Times are of CUDA graphs of several calls over caches that do not fit in L2
together. At the front: the keys and values in MB, and how long they take at 3 TB/s.
--chain: of up to 8 rows, a layer's time in graphs of AWQ's projections as well, each beginning while the one before it ends:
the product that makes q, k and v, attention, the product with its output, which is the next layer's input.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jobs.bench.graph_timing import replay_seconds
from jobs.bench.quantized import Packed
from kernels import decode_few, decode_step, gemm_few
from kernels.decode_few import Way
from kernels.fragments import MOST_ROWS

DEVICE, DTYPE, PAGE, MAX_MODEL_LEN = "cuda", torch.float16, 32, 4096
HEADS, KV_HEADS = 32, 8
LAYERS = 16         # of a chain: their weights are more than fits in L2
SHAPES = [(1, 150), (1, 300), (1, 640), (1, 2000), (4, 300), (16, 400), (50, 256), (50, 384), (128, 300), (512, 600)]
STORED = torch.float8_e4m3fn, DTYPE
WAYS = [*(Way(warps, groups, ahead) for warps in (2, 4, 8, 16) for groups, ahead in ((1, 1), (2, 1), (1, 2))),
        *(Way(warps, 1, 1, programs) for warps in (2, 4, 8) for programs in (2, 4, 8, 16)), Way(4, 2, 1, 8), Way(4, 1, 2, 8)]
MOST_PROGRAMS = 512     # where more share keys than fill the chip


def layers_of(stored: torch.dtype, rows: int, context: int, dim: int, layers: int) -> list[Callable[[Tensor], Tensor]]:
    """Attention of so many layers, each with a cache of its own, from the fused projection on."""
    torch.manual_seed(0)
    pages = -(-context // PAGE)
    shape = (rows * pages + 1, KV_HEADS, PAGE, dim)
    caches = [[torch.randn(shape, device=DEVICE, dtype=DTYPE).to(stored) for _ in range(2)] for _ in range(layers)]
    table = (torch.randperm(rows * pages, device=DEVICE).int() + 1).view(rows, pages)
    table = torch.nn.functional.pad(table, (0, MAX_MODEL_LEN // PAGE - pages)).contiguous()
    index = torch.arange(rows, device=DEVICE, dtype=torch.int32)
    positions = context - 1 - index % 2
    slots = (table[index.long(), positions.long() // PAGE] * PAGE + positions % PAGE).int()
    cos_sin = torch.rand(MAX_MODEL_LEN, dim, device=DEVICE)
    scales = torch.ones(2, KV_HEADS, device=DEVICE) if stored != DTYPE else None

    def layer(k: Tensor, v: Tensor, qkv: Tensor) -> Tensor:
        return decode_step.rope_and_decode(qkv, None, None, 1e-5, False, cos_sin, positions, slots, k, v, HEADS, table, index,
                                           dim**-0.5, 0, 0.0, MAX_MODEL_LEN, scales, None)

    return [functools.partial(layer, k, v) for k, v in caches]


def calls_of(stored: torch.dtype, rows: int, context: int, dim: int, layers: int) -> list[Callable[[], Tensor]]:
    qkv = torch.randn(rows, (HEADS + 2 * KV_HEADS) * dim, device=DEVICE, dtype=DTYPE)
    return [functools.partial(layer, qkv) for layer in layers_of(stored, rows, context, dim, layers)]


def product(weight: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
    packed, scales, zeros = weight
    tile = gemm_few.tile_of(x.shape[0], scales.shape[0], x.shape[1], 4)
    assert tile is not None
    return gemm_few.w4_product(x, packed, scales, zeros, 128, None, tile)


def chain_of(stored: torch.dtype, rows: int, context: int, dim: int) -> Callable[[], Tensor]:
    """LAYERS of them, without norms and MLPs, with weights and caches of their own."""
    width = HEADS * dim
    weights = [Packed((features, width)).copies for features in ((HEADS + 2 * KV_HEADS) * dim, width)]
    first = torch.randn(rows, width, device=DEVICE, dtype=DTYPE)
    attention = layers_of(stored, rows, context, dim, LAYERS)

    def chain() -> Tensor:
        x = first
        for project, attend, output in zip(weights[0], attention, weights[1], strict=False):
            x = product(output, attend(product(project, x)).flatten(1))
        return x

    return chain


def seconds_of(calls: list[Callable[[], Tensor]], chain: Callable[[], Tensor] | None) -> float:
    """Of one call, or of a layer of the chain."""
    return replay_seconds(calls) if chain is None else replay_seconds([chain]) / LAYERS


def in_way(way: Way | None) -> mock._patch:
    """None: decode_step.py's kernel."""
    if way is None:
        return mock.patch.object(decode_few, "ENABLED", False)
    return mock.patch.object(decode_few, "way_of", return_value=way)


def compile_way(way: Way, dim: int) -> str:
    try:
        with in_way(way):
            for stored in STORED:
                calls_of(stored, 1, 64, dim, 1)[0]()
            torch.cuda.synchronize()
    except Exception as e:
        return f"{way}: {e}"[:200]
    return ""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="*", default=[])
    parser.add_argument("--context", type=int, nargs="*", default=[])
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--best", type=int, default=6)
    parser.add_argument("--chain", action="store_true")
    args = parser.parse_args()
    with ProcessPoolExecutor(14, mp_context=multiprocessing.get_context("spawn")) as pool:
        failed = [line for line in pool.map(functools.partial(compile_way, dim=args.dim), WAYS, chunksize=4) if line]
    print(*failed, sep="\n", flush=True)
    for stored in STORED:
        for rows, context in list(zip(args.rows, args.context, strict=True)) or SHAPES:
            size = 2 * rows * context * KV_HEADS * args.dim * stored.itemsize
            calls = calls_of(stored, rows, context, args.dim, max(8, min(32, -(-(150 << 20) // size))))
            chain = None
            if args.chain and rows <= MOST_ROWS:
                chain = chain_of(stored, rows, context, args.dim)
            with in_way(None):
                want, now = calls[0]().double(), seconds_of(calls, chain) * 1e6
            chosen = decode_few.way_of(torch.empty(0, dtype=stored), rows * KV_HEADS, HEADS // KV_HEADS, MAX_MODEL_LEN)
            times = []
            for way in WAYS:
                if way.programs > 1 and way.programs * rows * KV_HEADS > MOST_PROGRAMS:
                    continue
                try:
                    with in_way(way):
                        off = float((calls[0]().double() - want).norm() / want.norm())
                        times.append((seconds_of(calls, chain) * 1e6, way))
                except Exception as e:
                    print(f"{way}: {e}"[:200], flush=True)
                    continue
                if not off < 2e-3:
                    print(f"WRONG: {stored} {rows} x {context} {way} is off by {off:.1e}", flush=True)
            rule = next((f"{time:.1f}" for time, way in times if way == chosen), "-")
            best = ", ".join(f"{time:.1f} {tuple(way)}" for time, way in sorted(times)[: args.best])
            print(f"{str(stored)[6:]} {rows} x {context}: {size / 1e6:.1f} MB, {size / 3e6:.1f}; decode_step.py {now:.1f}; "
                  f"rule {rule}; best {best}", flush=True)


if __name__ == "__main__":
    main()
