"""Products of few rows on one GPU: every tile of kernels/gemm_skinny.py against cuBLAS, and chains of layers with what folds in.

    python jobs/bench/gemm.py [--models NAME ...] [--rows M ...] [--save FILE]

Each tile is checked against float64 and for equal bits in two runs. Times are of CUDA graphs over copies of the weights that do
not fit in the L2 together, median of the replays. --save writes every time as JSON.

rule: what linear.choose gives. On Hopper up to 8 rows of large weights go elsewhere before (dense_row.py, dense_few.py), which
only the chains "as the rule has it" show.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jobs.bench.graph_timing import replay_seconds
from kernels import gemm_skinny, pointwise
from kernels import linear as dense
from kernels.gemm_skinny import Tile, product, tile_of
from kernels.linear import choose

DEVICE, DTYPE, EPS = "cuda", torch.bfloat16, 1e-5
L2_BYTES = 64 << 20
ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 256)
SWEPT = (1, 16, 32, 64, 128)            # at these all tiles are tried; other numbers of rows take the next one's best
CHAIN_ROWS = (1, 8, 16, 56, 128)
TOLERANCE = 4e-3                        # of the norm; one rounding to bf16 gives 1.7e-3, the activation's three a little more
# By the rows of x in a program, 1: in registers. (rows, depth, warps)
SHAPES = {
    1: [(4, 512, 4), (8, 512, 4), (16, 256, 4), (32, 64, 4)],
    16: [(64, 64, 4), (64, 128, 4), (32, 128, 4), (32, 64, 4), (16, 256, 4), (16, 64, 4)],
    32: [(64, 64, 4), (64, 128, 4), (32, 128, 4), (16, 64, 4)],
    64: [(64, 64, 4), (64, 128, 4), (128, 64, 4), (32, 64, 4), (16, 64, 4)],
    128: [(64, 64, 4), (128, 64, 4), (128, 64, 8), (32, 64, 4)],
}
SPLITS = (1, 2, 3, 4, 8)


# --- the shapes -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """One linear layer with what is folded into it."""

    name: str
    features: int
    depth: int
    gated: bool = False

    @property
    def bytes(self) -> int:
        return 2 * self.features * self.depth

    @property
    def label(self) -> str:
        return f"{self.name} {self.features}x{self.depth}"


@dataclass(frozen=True)
class Model:
    name: str
    layers: int
    hidden: int
    inner: int
    qkv: int
    heads: int      # heads x head size: what o reads
    vocab: int

    def kinds(self) -> list[Kind]:
        return [Kind("qkv", self.qkv, self.hidden), Kind("o", self.hidden, self.heads),
                Kind("gate_up", 2 * self.inner, self.hidden, gated=True), Kind("down", self.hidden, self.inner),
                Kind("head", self.vocab, self.hidden)]


MODELS = {m.name: m for m in (
    Model("mistral-7b", 32, 4096, 14336, 6144, 4096, 32000),
    Model("smollm2", 30, 576, 1536, 960, 576, 49152),
    Model("qwen2.5-1.5b", 28, 1536, 8960, 2048, 1536, 151936),
    Model("qwen2.5-0.5b", 24, 896, 4864, 1152, 896, 151936),
)}


@functools.cache
def processors() -> int:
    return torch.cuda.get_device_properties(DEVICE).multi_processor_count


def candidates(kind: Kind, m: int) -> Iterator[Tile]:
    """Tiles that keep the memory busy with all programs on the chip at once: cut along K where too few are left otherwise."""
    for block in (1, 16) if m == 1 else (max(16, triton.next_power_of_2(m)),):
        for rows, step, warps in SHAPES[block]:
            tiles = triton.cdiv(kind.features, rows)
            for splits in SPLITS:
                tile = tile_of(m, kind.features, kind.depth, kind.gated, (rows, step, splits, warps), processors(), block == 1)
                if tile is None or tiles * splits < min(0.7 * processors(), kind.bytes >> 16):
                    continue
                if splits == 1 or (tiles < processors() and tiles * splits <= 4.5 * processors() and kind.depth // splits >= 192):
                    yield tile
                    if block == 1:      # registers can be filled without a detour through shared memory
                        yield replace(tile, stages=1)


# --- measuring ------------------------------------------------------------------------------------------------------------------


@triton.jit
def _read_kernel(x, out, n, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK, num_stages=4):
        total ^= tl.load(x + start + tl.arange(0, BLOCK))
    tl.store(out + tl.program_id(0), tl.xor_sum(total, 0))


def read_rate() -> float:
    """Bytes a second that a plain kernel reads."""
    n = 1 << 29
    x = torch.randint(-(2**31), 2**31 - 1, (n,), dtype=torch.int32, device=DEVICE)
    out = torch.empty(132 * 8, dtype=torch.int32, device=DEVICE)
    times = [replay_seconds([lambda p=p: _read_kernel[p,](x, out, n, BLOCK=4096, num_warps=8)]) for p in (132 * 4, 132 * 8)]
    return 4 * n / min(times)


def randn(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=DTYPE, device=DEVICE).normal_()


class Case:
    """Random inputs of one kind at one number of rows, and what comes out in float64 of the roundings of the separate kernels."""

    def __init__(self, kind: Kind, m: int, weights: list[Tensor]) -> None:
        self.kind, self.m, self.weights = kind, m, weights
        self.x = randn(m, kind.depth)
        y = (self.x.double() @ weights[0].double().T).to(DTYPE)
        if kind.gated:
            gate, up = y.double().chunk(2, -1)
            y = F.silu(gate) * up
        self.want = y.double()

    def separate(self, weight: Tensor) -> Tensor:
        y = F.linear(self.x, weight)
        return pointwise.gated_act(y, "silu") if self.kind.gated else y

    def fused(self, weight: Tensor, tile: Tile, out: Tensor | None = None, overlap: bool | None = None) -> Tensor:
        return product(self.x, weight, None, tile, "silu" if self.kind.gated else "", out, overlap)

    def check(self, tile: Tile) -> None:
        outs = [torch.full_like(self.want, float("nan"), dtype=DTYPE) for _ in range(2)]
        for out in outs:
            self.fused(self.weights[0], tile, out)
        error = float((outs[0].double() - self.want).norm() / self.want.norm())
        assert error < TOLERANCE, f"{self.kind.label} M={self.m} {tile.name}: off by {error}"
        assert torch.equal(*outs), f"{self.kind.label} M={self.m} {tile.name}: two runs differ"

    def microseconds(self, run: Callable[[Tensor], object]) -> float:
        return 1e6 * replay_seconds([functools.partial(run, weight) for weight in self.weights])


# --- chains of layers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """How a chain is run; each way has all that the one before it has."""

    name: str
    skinny: bool = False
    overlap: bool = False
    gated: bool = False
    ahead: int = gemm_skinny.AHEAD_BYTES
    ruled: bool = False     # kernels/linear.py decides


WAYS = [Way("cuBLAS"), Way("skinny", True), Way("+ overlap", True, True), Way("+ gate", True, True, True),
        Way("+ gate, nothing ahead", True, True, True, 0), Way("+ gate, 8 MB ahead", True, True, True, 8 << 20),
        Way("as the rule has it", ruled=True)]


class Chain:
    """The layers of a decode step without attention: o reads the first columns of qkv."""

    def __init__(self, model: Model) -> None:
        self.model = model
        kinds = model.kinds()
        self.layers = [{k.name: randn(k.features, k.depth).mul_(k.depth**-0.5) for k in kinds[:4]} for _ in range(model.layers)]
        self.head, self.norm = randn(model.vocab, model.hidden), 1 + randn(model.hidden) * 0.1
        self.bytes = sum(k.bytes for k in kinds[:4]) * model.layers + kinds[4].bytes

    def run(self, x: Tensor, start: Tensor, way: Way, best: dict[str, Tile]) -> Tensor:
        residual = start.clone()

        def linear(name: str, x: Tensor, weight: Tensor) -> Tensor:
            if way.ruled:
                return dense.linear(x, weight, None, None)
            if way.skinny and name in best:
                return product(x, weight, None, best[name], overlap=way.overlap, ahead=way.ahead)
            return F.linear(x, weight)

        def gated(x: Tensor, weight: Tensor) -> Tensor:
            if way.ruled:
                return dense.gated_linear(x, weight, None, "silu")
            if way.gated and "gate_up" in best:
                return product(x, weight, None, best["gate_up"], "silu", overlap=True, ahead=way.ahead)
            return pointwise.gated_act(linear("gate_up", x, weight), "silu")

        def norm(x: Tensor) -> Tensor:
            return pointwise.add_rms_norm(x, residual, self.norm, EPS, False)

        for layer in self.layers:
            x = linear("o", linear("qkv", norm(x), layer["qkv"])[:, : self.model.heads], layer["o"])
            x = linear("down", gated(norm(x), layer["gate_up"]), layer["down"])
        return linear("head", norm(x), self.head)


# --- the program ----------------------------------------------------------------------------------------------------------------


def compile_one(job: tuple[Kind, int, Tile, bool]) -> None:
    """In a process of its own: fill Triton's cache on disk with one kernel."""
    kind, m, tile, overlap = job
    depth = tile.depth * tile.splits
    small = replace(kind, features=max(4 * tile.rows, 64), depth=depth)
    case = Case(small, m, [randn(small.features, depth)])
    with contextlib.suppress(triton.runtime.errors.OutOfResources):
        case.fused(case.weights[0], tile, None, overlap)


def kernel_of(kind: Kind, m: int, tile: Tile) -> tuple[object, ...]:
    """What tells compiled kernels apart."""
    return kind.gated, tile.block(m), tile


Times = dict[str, dict[str, float]]
Swept = dict[tuple[Kind, int], list[Tile]]


def above(kind: Kind, m: int, best: dict[tuple[Kind, int], Tile]) -> int:
    """The number of rows whose best tile serves m rows; 0: none was found."""
    return next((s for s in SWEPT if s >= m and (kind, s) in best), 0)


def sweep(kind: Kind, rows: Sequence[int], swept: Swept, best: dict[tuple[Kind, int], Tile], times: Times, rate: float) -> None:
    """Time cuBLAS and every tile, print the best and keep it in `best`."""
    weights = [randn(kind.features, kind.depth) for _ in range(max(2, min(64, math.ceil(2 * L2_BYTES / kind.bytes))))]
    lines = {}
    for m in sorted(rows, key=lambda m: (kind, m) not in swept):
        case = Case(kind, m, weights)
        row = times[f"{kind.label} M={m}"] = {"cuBLAS": case.microseconds(case.separate)}
        at = above(kind, m, best)
        measured = []
        ruled = choose(m, kind.features, kind.depth, kind.gated, DTYPE, processors())
        tried = swept.get((kind, m)) or ([best[kind, at]] if at else [])
        for tile in tried if ruled is None or ruled in tried else [*tried, ruled]:
            try:
                case.check(tile)
                row[tile.name] = case.microseconds(lambda w, case=case, tile=tile: case.fused(w, tile))
                measured.append(tile)
            except triton.runtime.errors.OutOfResources:
                continue
        line = f"{kind.label:20} M={m:<4}{row['cuBLAS']:7.1f}"
        if measured:
            first = min(measured, key=lambda tile: row[tile.name])
            if (kind, m) in swept:
                best[kind, m] = first
            line += f" ->{row[first.name]:7.1f} {kind.bytes / rate * 1e6 / row[first.name]:4.0%} {first.name}"
            if ruled is not None and ruled.name in row and ruled != first:
                line += f"; rule {row[ruled.name] / row[first.name]:.2f}x"
        lines[m] = line
    print("\n".join(lines[m] for m in sorted(lines)), flush=True)


def chains(model: Model, best: dict[tuple[Kind, int], Tile], times: Times, rate: float) -> None:
    chain = Chain(model)
    print(f"\n{model.name}, {model.layers} layers and the head without attention, ms; floor {chain.bytes / rate * 1e3:.2f}")
    print(f"{'':22}" + "".join(f"{f'M={m}':>9}" for m in CHAIN_ROWS))
    rows: dict[str, list[float]] = {way.name: [] for way in WAYS}
    for m in CHAIN_ROWS:
        x, start, wanted = randn(m, model.hidden), randn(m, model.hidden), None
        chosen = {}
        for kind in model.kinds():
            at = above(kind, m, best)
            if not at:
                continue
            row, name = times[f"{kind.label} M={at}"], best[kind, at].name
            if row[name] < row["cuBLAS"]:
                chosen[kind.name] = best[kind, at]
        for way in WAYS:
            run = functools.partial(chain.run, x, start, way, chosen)
            got = run().float()
            wanted = got if wanted is None else wanted
            off = float((got - wanted).norm() / wanted.norm())
            assert off < 0.1, f"{model.name} M={m}: {way.name} is off by {off}"
            rows[way.name].append(1e3 * replay_seconds([run]))
    for name, values in rows.items():
        print(f"{name:22}" + "".join(f"{value:9.3f}" for value in values), flush=True)
        times[f"{model.name} chain {name}"] = dict(zip(map(str, CHAIN_ROWS), values, strict=True))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--models", nargs="+", default=list(MODELS)[:3], choices=MODELS)
    options.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    options.add_argument("--save", type=Path)
    given = options.parse_args()
    begin = time.perf_counter()
    models = [MODELS[name] for name in given.models]

    swept: Swept = {(kind, m): list(candidates(kind, m)) for model in models for kind in model.kinds() for m in SWEPT}
    jobs = {kernel_of(kind, m, tile): (kind, m, tile) for (kind, m), tiles in swept.items() for tile in tiles}
    for kind, m in itertools.product({kind for kind, _ in swept}, given.rows):
        tile = choose(m, kind.features, kind.depth, kind.gated, DTYPE, processors())
        if tile is not None:
            jobs.setdefault(kernel_of(kind, m, tile), (kind, m, tile))
    with ProcessPoolExecutor(16, mp_context=multiprocessing.get_context("spawn")) as workers:
        list(workers.map(compile_one, [(*job, True) for job in jobs.values()], chunksize=4))
        rate = read_rate()
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; reads run at "
              f"{rate / 1e12:.2f} TB/s; {len(jobs)} kernels in {time.perf_counter() - begin:.0f} s")
        times: Times = {}
        best: dict[tuple[Kind, int], Tile] = {}
        for model in models:
            print(f"\n{model.name}: cuBLAS and the kernels around it -> best tile, us and share of the floor")
            for kind in model.kinds():
                sweep(kind, sorted({*given.rows, *SWEPT}), swept, best, times, rate)
        plain = {kernel_of(kind, m, tile): (replace(kind, gated=False), m, tile, False) for (kind, m), tile in best.items()}
        list(workers.map(compile_one, plain.values()))
    for model in models:
        chains(model, best, times, rate)
    if given.save:
        given.save.write_text(json.dumps(times, indent=1))
    print(f"\n{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
