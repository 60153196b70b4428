"""Attention on one GPU: decode in TB/s of keys and values, prefill in TFLOP/s, for several tiles.

    python jobs/bench/attention.py [decode] [prefill] [fp8]

fp8: the caches hold e4m3, else bf16. Each call is checked on some rows against the torch twin. Times are of CUDA graphs of
several calls over caches that do not fit in L2 together, median of the replays. NaN: does not fit on the chip.
"""

from __future__ import annotations

import functools
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jobs.bench.graph_timing import replay_seconds
from kernels import attention, prefill_hopper, ref

DEVICE, DTYPE = "cuda", torch.bfloat16
PAGE = 32
MAX_MODEL_LEN = 8192        # what a captured graph passes as max_context
READ_RATE = 4.41            # TB/s, measured on an H200
L2_BYTES = 64 << 20
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)


# --- the shapes -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    name: str
    heads: int
    kv_heads: int
    dim: int


@dataclass(frozen=True)
class DecodeShape:
    name: str
    contexts: tuple[int, ...]

    @property
    def pages(self) -> int:
        return sum(-(-context // PAGE) for context in self.contexts)

    def bytes(self, model: Model, fp8: bool) -> int:
        """Of keys and values."""
        return 2 * (1 if fp8 else 2) * sum(self.contexts) * model.kv_heads * model.dim


@dataclass(frozen=True)
class PrefillShape:
    name: str
    rows: int
    prefix: int
    queries: int


@dataclass(frozen=True)
class DecodeWay:
    tile: tuple[int, int, int]      # keys of a tile at head size 128, warps, stages
    programs: int                   # DECODE_PROGRAMS

    @property
    def name(self) -> str:
        return f"{'/'.join(map(str, self.tile))} {self.programs}"


@dataclass(frozen=True)
class Tile:
    rows: int
    keys: int
    warps: int
    stages: int
    registers: int = 0

    @property
    def name(self) -> str:
        limit = f" {self.registers} registers" if self.registers else ""
        return f"{self.rows}/{self.keys}/{self.warps}/{self.stages}{limit}"


def _ragged(n: int) -> tuple[int, ...]:
    return tuple(torch.randint(100, 1125, (n,), generator=torch.Generator().manual_seed(n)).tolist())


MISTRAL = Model("7B 32/8 x 128", 32, 8, 128)
SMOLLM = Model("SmolLM2 9/3 x 64", 9, 3, 64)
QWEN = Model("Qwen-1.5B 12/2 x 128", 12, 2, 128)
GEMMA = Model("Gemma-3-4B 8/4 x 256", 8, 4, 256)

DECODE_SHAPES = {
    MISTRAL: [DecodeShape("2048 x 600", (600,) * 2048), DecodeShape("2048 x 2000", (2000,) * 2048),
              DecodeShape("512 x 600", (600,) * 512), DecodeShape("512 x 2000", (2000,) * 512),
              DecodeShape("512 x U(100,1124)", _ragged(512)), DecodeShape("512, 212 padding", (600,) * 300 + (1,) * 212),
              DecodeShape("128 x 600", (600,) * 128), DecodeShape("64 x 600", (600,) * 64),
              DecodeShape("64 x U(100,1124)", _ragged(64)), DecodeShape("8 x 2000", (2000,) * 8), DecodeShape("1 x 600", (600,)),
              DecodeShape("1 x 8000", (8000,))],
    SMOLLM: [DecodeShape("2048 x 600", (600,) * 2048), DecodeShape("512 x U(100,1124)", _ragged(512)),
             DecodeShape("64 x 600", (600,) * 64), DecodeShape("1 x 600", (600,))],
    QWEN: [DecodeShape("2048 x 600", (600,) * 2048), DecodeShape("512 x U(100,1124)", _ragged(512)),
           DecodeShape("64 x 600", (600,) * 64), DecodeShape("1 x 600", (600,))],
}
DECODE_WAYS = [
    DecodeWay((64, 4, 2), 1024), DecodeWay((64, 4, 3), 1024), DecodeWay((128, 4, 2), 1024), DecodeWay((32, 4, 4), 1024),
    DecodeWay((64, 4, 2), 512), DecodeWay((64, 4, 2), 2048),
]
FP8_WAYS = [DecodeWay(tile, 264) for tile in ((64, 4, 2), (64, 4, 3), (64, 2, 3), (64, 4, 4), (64, 2, 4), (128, 4, 3),
                                              (32, 2, 4))]
PREFILL_SHAPES = [PrefillShape("8 x 2048", 8, 0, 2048), PrefillShape("16 x 1024", 16, 0, 1024),
                  PrefillShape("64 x 150 after 800", 64, 800, 150), PrefillShape("64 x 256", 64, 0, 256),
                  PrefillShape("256 x 60", 256, 0, 60)]
PREFILL_TILES = {
    MISTRAL: [Tile(128, 64, 8, 3), Tile(128, 64, 4, 3), Tile(128, 128, 8, 2), Tile(128, 128, 8, 3), Tile(128, 64, 8, 2, 128),
              Tile(128, 64, 8, 2), Tile(128, 32, 8, 3, 128), Tile(128, 64, 4, 2), Tile(64, 64, 4, 2)],
    SMOLLM: [Tile(128, 64, 8, 3), Tile(128, 128, 8, 2), Tile(128, 128, 8, 3), Tile(128, 64, 4, 3), Tile(64, 64, 4, 3),
             Tile(64, 128, 4, 3)],
    GEMMA: [Tile(128, 64, 8, 2), Tile(128, 32, 8, 3), Tile(64, 64, 4, 2), Tile(64, 32, 4, 3)],
}


class Pool:
    """Random keys and values, and the block tables of any contexts over shuffled pages of it."""

    def __init__(self, model: Model, pages: int, fp8: bool) -> None:
        shape = (pages, model.kv_heads, PAGE, model.dim)
        self.k, self.v = (torch.empty(shape, dtype=DTYPE, device=DEVICE).normal_() for _ in range(2))
        self.scales = torch.rand(2, model.kv_heads, device=DEVICE) + 0.5 if fp8 else None
        if fp8:
            self.k, self.v = self.k.to(torch.float8_e4m3fn), self.v.to(torch.float8_e4m3fn)
        self.pages = pages

    def tables(self, contexts: Tensor) -> Tensor:
        """A block table of every row; rows share pages only where the pool is too small."""
        need = (contexts + PAGE - 1) // PAGE
        table = torch.zeros((contexts.numel(), MAX_MODEL_LEN // PAGE), dtype=torch.int32, device=DEVICE)
        used = torch.arange(table.shape[1], device=DEVICE) < need[:, None]
        count = int(need.sum())
        order = torch.randperm(self.pages, device=DEVICE).int().repeat(-(-count // self.pages))
        table[used] = order[:count]
        return table


def check(name: str, got: Tensor, want: Tensor) -> None:
    off = float((got.double() - want.double()).norm() / want.double().norm())
    if not off < 1e-2:
        print(f"WRONG: {name} is off by {off:.2e} against the torch twin", flush=True)


def ints(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def copies(size: int) -> int:
    """How many caches of `size` bytes to go round, so that each is out of L2 when its turn comes."""
    return max(2 if size < 2 * L2_BYTES else 1, min(64, -(-3 * L2_BYTES // size)))


def decode(way: DecodeWay, model: Model, shape: DecodeShape, pool: Pool, timed: bool) -> float:
    """TB/s of keys and values."""
    size = shape.bytes(model, pool.scales is not None)
    n, scale, contexts = len(shape.contexts), model.dim**-0.5, ints(shape.contexts)
    tables = pool.tables(contexts.repeat(copies(size) if timed else 1)).split(n)
    q = torch.randn(n, model.heads, model.dim, dtype=DTYPE, device=DEVICE)
    rows = ints(range(n))
    keys, warps, stages = way.tile
    tile = {"decode_keys": mock.Mock(return_value=keys * 128 // model.dim),
            "decode_options": mock.Mock(return_value={"num_warps": warps, "num_stages": stages})}
    with mock.patch.multiple(attention, DECODE_PROGRAMS=way.programs, **tile):
        calls = [functools.partial(attention.decode_attention, q, pool.k, pool.v, table, rows, contexts - 1, scale, 0, 0.0,
                                   MAX_MODEL_LEN, kv_scales=pool.scales) for table in tables]
        got = calls[0]()
        if not timed:
            return 0.0
        few = min(n, 8)
        want = ref.decode_attention(q[:few], pool.k, pool.v, tables[0], rows[:few], contexts[:few] - 1, scale, 0, 0.0,
                                    max(shape.contexts[:few]), kv_scales=pool.scales)
        check(f"{model.name} {shape.name} {way.name}", got[:few], want)
        return size / replay_seconds(calls) / 1e12


def prefill(tile: Tile, model: Model, shape: PrefillShape, pool: Pool, timed: bool) -> float:
    """TFLOP/s of what the mask leaves; rows share no page."""
    n, scale = shape.rows, model.dim**-0.5
    context = shape.prefix + shape.queries
    flops = 4 * n * model.heads * model.dim * sum(range(shape.prefix + 1, context + 1))
    cu_q = [shape.queries * i for i in range(n + 1)]
    tiles = ints([(i, first) for i in range(n) for first in range(0, shape.queries, ref.QUERY_TILE)])
    q = torch.randn(cu_q[-1], model.heads, model.dim, dtype=DTYPE, device=DEVICE)
    inputs = (q, pool.k, pool.v, pool.tables(ints([context] * n)), ints(range(n)), ints([shape.prefix] * n))
    options = {"num_warps": tile.warps, "num_stages": tile.stages} | ({"maxnreg": tile.registers} if tile.registers else {})
    with mock.patch.object(attention, "_prefill_tile", return_value=(tile.rows, tile.keys, options)):
        call = functools.partial(attention.prefill_attention, *inputs, ints(cu_q), tiles, scale, 0, 0.0, kv_scales=pool.scales)
        got = call()
        if not timed:
            return 0.0
        last = [x[-1:] for x in inputs[4:]]
        want = ref.prefill_attention(q[-shape.queries :], *inputs[1:4], *last, ints([0, shape.queries]), tiles, scale, 0, 0.0,
                                     kv_scales=pool.scales)
        check(f"{model.name} {shape.name} {tile.name}", got[-shape.queries :], want)
        return flops / replay_seconds([call] * 4) / 1e12


def hopper_prefill(model: Model, shape: PrefillShape, pool: Pool, timed: bool) -> float:
    """As `prefill`, of prefill_hopper.py; NaN where it leaves the heads to attention.py."""
    if model.dim != 128 and (model.dim != 64 or pool.scales is None):
        return float("nan")
    with mock.patch.object(attention, "prefill_attention", prefill_hopper.prefill_attention):
        return prefill(PREFILL_TILES[model][0], model, shape, pool, timed)


def torch_prefill(model: Model, shape: PrefillShape, backend: SDPBackend) -> float:
    """TFLOP/s of torch's own causal attention over keys that lie in order."""
    q, k, v = (torch.randn(shape.rows, heads, shape.queries, model.dim, dtype=DTYPE, device=DEVICE)
               for heads in (model.heads, model.kv_heads, model.kv_heads))
    with sdpa_kernel(backend):
        call = functools.partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
        call()
        return 2 * shape.rows * model.heads * model.dim * shape.queries * (shape.queries + 1) / replay_seconds([call] * 4) / 1e12


def attempt(measure: Callable[..., float], *args: object) -> float:
    """NaN where the tile does not fit on the chip."""
    try:
        return measure(*args)
    except triton.runtime.errors.OutOfResources:
        return float("nan")


def compile_one(job: tuple[str, object, Model, bool]) -> None:
    """In a process of its own: fill Triton's cache on disk with one way or tile."""
    kind, what, model, fp8 = job
    pool = Pool(model, 64, fp8)
    if kind == "decode":
        for shape in (DecodeShape("one launch", (600,) * 2048), DecodeShape("split", (600,) * 8)):
            attempt(decode, what, model, shape, pool, False)
    elif kind == "prefill":
        attempt(prefill, what, model, PrefillShape("", 1, 16, 128), pool, False)
    else:
        hopper_prefill(model, PrefillShape("", 1, 16, 128), pool, False)


def table_of(title: str, columns: Sequence[str], lines: Sequence[tuple[str, Sequence[float]]], digits: int) -> None:
    print(f"\n{title}\n" + "".join(f"  [{i}] {name}\n" for i, name in enumerate(columns)), end="")
    print(f"{'':22}" + "".join(f"{f'[{i}]':>7}" for i in range(len(columns))))
    for name, values in lines:
        print(f"{name:22}" + "".join(f"{value:7.{digits}f}" for value in values), flush=True)


def main() -> None:
    fp8 = "fp8" in sys.argv[1:]
    what = [word for word in sys.argv[1:] if word != "fp8"] or ["decode", "prefill"]
    kind, ways = ("e4m3", FP8_WAYS) if fp8 else ("bf16", DECODE_WAYS)
    begin = time.perf_counter()
    jobs: list[tuple[str, object, Model, bool]] = []
    if "decode" in what:
        jobs += [("decode", way, model, fp8) for model in DECODE_SHAPES for way in ways]
    if "prefill" in what:
        jobs += [("hopper", None, model, fp8) for model in PREFILL_TILES]
        jobs += [("prefill", tile, model, fp8) for model, tiles in PREFILL_TILES.items() for tile in tiles]
    with ProcessPoolExecutor(12, mp_context=multiprocessing.get_context("spawn")) as workers:
        list(workers.map(compile_one, jobs))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; "
          f"{len(jobs)} ways compiled in {time.perf_counter() - begin:.0f} s")
    if "decode" in what:
        for model, shapes in DECODE_SHAPES.items():
            pool = Pool(model, max(s.pages * copies(s.bytes(model, fp8)) for s in shapes), fp8)
            lines = [(s.name, [attempt(decode, way, model, s, pool, True) for way in ways]) for s in shapes]
            table_of(f"decode, {model.name}, {kind}: TB/s of keys and values (reading runs at {READ_RATE})",
                     [w.name for w in ways], lines, 2)
            del pool
    if "prefill" in what:
        for model, tiles in PREFILL_TILES.items():
            pool = Pool(model, 64 * 30 + 8 * 64, fp8)
            lines = []
            for s in PREFILL_SHAPES:
                own = [attempt(prefill, tile, model, s, pool, True) for tile in tiles]
                own.append(hopper_prefill(model, s, pool, True))
                lines.append((s.name, own + [torch_prefill(model, s, backend) for backend in BACKENDS if not s.prefix]))
            table_of(f"prefill, {model.name}, {kind}: TFLOP/s",
                     [*(tile.name for tile in tiles), "prefill_hopper.py", *(f"torch {b.name}" for b in BACKENDS)], lines, 0)
    print(f"\n{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
