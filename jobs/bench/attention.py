"""Attention on one GPU: decode in TB/s of keys and values, prefill in TFLOP/s, for several tiles and ways to share the work.

    python jobs/bench/attention.py [decode] [prefill]

Each call is checked on some rows against the torch twin. Times are of CUDA graphs of several calls over caches that do not fit in
L2 together, median of the replays. Decode's ways: "split" is kernels/attention.py; "fused" merges the splits of a row in the last
of its programs to finish; "list" gives every program of a fixed grid the same number of tiles. NaN: does not fit on the chip.
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
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kernels import attention, ref
from kernels.attention import MASKED, _attend, _log2_scales, _precision

DEVICE, DTYPE = "cuda", torch.bfloat16
PAGE = 32
MAX_MODEL_LEN = 8192        # what a captured graph passes as max_context
READ_RATE = 4.41            # TB/s, measured on an H200
L2_BYTES = 64 << 20
MERGED = 16                 # partial sums merged at a time
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)


# --- two more ways to decode ----------------------------------------------------------------------------------------------------


@triton.jit
def _merge_into(out, partial, capacity, base, stride, skip, count, column, G: tl.constexpr, D: tl.constexpr,
                BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr):
    """Merge the sums of slots base, base + stride + skip, base + 2 stride + skip ... into G heads of the output."""
    d = tl.arange(0, BLOCK_D)
    for g in range(G):
        peak = tl.full([], MASKED, tl.float32)
        total = tl.full([], 0.0, tl.float32)
        acc = tl.zeros([BLOCK_D], tl.float32)
        for s0 in range(0, count, BLOCK_S):
            s = s0 + tl.arange(0, BLOCK_S)
            at = (base + s * stride + tl.where(s > 0, skip, 0)) * G + g
            there = s < count
            peaks = tl.load(partial + capacity * G * D + at, mask=there, other=MASKED, cache_modifier=".cg")
            totals = tl.load(partial + capacity * G * (D + 1) + at, mask=there, other=0.0, cache_modifier=".cg")
            accs = tl.load(partial + at[:, None] * D + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0,
                           cache_modifier=".cg")
            higher = tl.maximum(peak, tl.max(peaks, 0))
            weights = tl.exp2(peaks - higher)
            shrink = tl.exp2(peak - higher)
            total = total * shrink + tl.sum(totals * weights, 0)
            acc = acc * shrink + tl.sum(accs * weights[:, None], 0)
            peak = higher
        tl.store(out + column + g * D + d, (acc / total).to(out.dtype.element_ty), mask=d < D)


@triton.jit
def _put_partial(partial, capacity, slot, peak, total, acc, G: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_D: tl.constexpr):
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    at = slot * G + m
    tl.store(partial + at[:, None] * D + d[None, :], acc, mask=(m < G)[:, None] & (d < D)[None, :])
    tl.store(partial + capacity * G * D + at, peak, mask=m < G)
    tl.store(partial + capacity * G * (D + 1) + at, total, mask=m < G)
    tl.debug_barrier()      # every thread's sums are out before one thread says so


@triton.jit(do_not_specialize=["splits"])
def _fused_kernel(q, k_cache, v_cache, block_table, rows, positions, out, partial, arrivals, scale, inner, window, table_stride,
                  q_stride, splits, H: tl.constexpr, K: tl.constexpr, P: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
                  BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
                  PRECISION: tl.constexpr, BLOCK_S: tl.constexpr):
    head, split, i = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    hi = tl.load(positions + i) + 1
    lo = tl.maximum(hi - window, 0) if WINDOW else 0
    used = 1
    if SPLIT:
        tiles = tl.cdiv(hi - lo, BLOCK_N)
        share = tl.cdiv(tiles, splits)
        used = tl.cdiv(tiles, share)
        lo += split * share * BLOCK_N
        hi = tl.minimum(lo + share * BLOCK_N, hi)
        if lo >= hi:
            return
    G: tl.constexpr = H // K
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    real = (m < G)[:, None] & (d < D)[None, :]
    column = (head * G + m)[:, None] * D + d[None, :]
    queries = tl.load(q + i * q_stride + column, mask=real, other=0.0).to(k_cache.dtype.element_ty)
    table = block_table + tl.load(rows + i).to(tl.int64) * table_stride
    peak, total, acc = _attend(queries, k_cache, v_cache, table, head, lo, hi, scale, inner, K, P, D, BLOCK_M, BLOCK_N, BLOCK_D,
                               SOFTCAP, PRECISION)
    if used == 1:
        tl.store(out + i * H * D + column, (acc / total[:, None]).to(out.dtype.element_ty), mask=real)
    else:
        pair = i * K + head
        capacity = tl.num_programs(2).to(tl.int64) * K * splits
        _put_partial(partial, capacity, pair * splits + split, peak, total, acc, G, D, BLOCK_M, BLOCK_D)
        if tl.atomic_add(arrivals + pair, 1, sem="acq_rel") == used - 1:
            tl.store(arrivals + pair, 0)
            _merge_into(out, partial, capacity, pair * splits, 1, 0, used, (i * H + head * G) * D, G, D, BLOCK_D, BLOCK_S)


@triton.jit(do_not_specialize=["n"])
def _list_kernel(q, k_cache, v_cache, block_table, rows, positions, out, partial, arrivals, scale, inner, window, table_stride,
                 q_stride, n, H: tl.constexpr, K: tl.constexpr, P: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
                 PRECISION: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr):
    # The tiles of all rows and KV heads stand in one line, (row, head, tile). Every program takes the same stretch of it.
    pid = tl.program_id(0)
    c = tl.arange(0, CHUNK)
    count = 0
    for r0 in range(0, n, CHUNK):
        keys = tl.load(positions + r0 + c, mask=r0 + c < n, other=-1) + 1
        if WINDOW:
            keys = tl.minimum(keys, window)
        count += tl.sum((keys + BLOCK_N - 1) // BLOCK_N, 0) * K
    share = tl.cdiv(count, tl.num_programs(0))
    at = pid * share
    end = tl.minimum(at + share, count)
    if at >= end:
        return
    row = 0         # the row that tile `at` belongs to, and where its tiles begin
    begin = 0
    passed = 0
    for r0 in range(0, n, CHUNK):
        keys = tl.load(positions + r0 + c, mask=r0 + c < n, other=-1) + 1
        if WINDOW:
            keys = tl.minimum(keys, window)
        upto = passed + tl.cumsum((keys + BLOCK_N - 1) // BLOCK_N, 0) * K
        before = (upto <= at) & (r0 + c < n)
        row += tl.sum(before.to(tl.int32), 0)
        begin = tl.maximum(begin, tl.max(tl.where(before, upto, 0), 0))
        passed = tl.max(upto, 0)
    G: tl.constexpr = H // K
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    real = (m < G)[:, None] & (d < D)[None, :]
    capacity = tl.num_programs(0) * 2
    while at < end:
        i = row.to(tl.int64)
        hi = tl.load(positions + i) + 1
        lo = tl.maximum(hi - window, 0) if WINDOW else 0
        tiles = tl.cdiv(hi - lo, BLOCK_N)
        head = (at - begin) // tiles
        tile = (at - begin) % tiles
        stop = tl.minimum(tiles, tile + end - at)
        column = (head * G + m)[:, None] * D + d[None, :]
        queries = tl.load(q + i * q_stride + column, mask=real, other=0.0).to(k_cache.dtype.element_ty)
        table = block_table + tl.load(rows + i).to(tl.int64) * table_stride
        hi = tl.minimum(lo + stop * BLOCK_N, hi)
        peak, total, acc = _attend(queries, k_cache, v_cache, table, head, lo + tile * BLOCK_N, hi, scale, inner, K, P, D,
                                   BLOCK_M, BLOCK_N, BLOCK_D, SOFTCAP, PRECISION)
        if stop - tile == tiles:
            tl.store(out + i * H * D + column, (acc / total[:, None]).to(out.dtype.element_ty), mask=real)
        else:   # the first program of a row and head has slot 2 pid + 1, those that go on with it 2 pid
            first = (at - tile) // share
            last = (at - tile + tiles - 1) // share
            _put_partial(partial, capacity, pid * 2 + (pid == first).to(tl.int32), peak, total, acc, G, D, BLOCK_M, BLOCK_D)
            if tl.atomic_add(arrivals + first, 1, sem="acq_rel") == last - first:
                tl.store(arrivals + first, 0)
                _merge_into(out, partial, capacity, 2 * first + 1, 2, -1, last - first + 1, (i * H + head * G) * D, G, D, BLOCK_D,
                            BLOCK_S)
        at += stop - tile
        if at - begin == tiles * K:
            row += 1
            begin = at


@functools.cache
def _arrivals(device: torch.device, count: int) -> Tensor:
    """Zeros; every launch leaves them zero."""
    return torch.zeros(count, dtype=torch.int32, device=device)


def fused(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, rows: Tensor, positions: Tensor,
          scale: float, window: int, softcap: float, max_context: int) -> Tensor:
    n, heads, dim = q.shape
    kv_heads = k_cache.shape[1]
    block_n, options = attention._decode_tile(k_cache)
    tiles = triton.cdiv(min(max_context, window) if window else max_context, block_n)
    splits = min(triton.next_power_of_2(triton.cdiv(attention.DECODE_PROGRAMS, n * kv_heads)), attention.MAX_SPLITS, tiles)
    out = torch.empty((n, heads, dim), dtype=q.dtype, device=q.device)
    partial = torch.empty(n * heads * splits * (dim + 2), dtype=torch.float32, device=q.device) if splits > 1 else out
    factor, inner = _log2_scales(scale, softcap)
    _fused_kernel[kv_heads, splits, n](
        q, k_cache, v_cache, block_table, rows, positions, out, partial, _arrivals(q.device, 1 << 16), factor, inner, window,
        block_table.stride(0), q.stride(0), splits, H=heads, K=kv_heads, P=k_cache.shape[2], D=dim,
        BLOCK_M=max(16, triton.next_power_of_2(heads // kv_heads)), BLOCK_N=block_n, BLOCK_D=triton.next_power_of_2(dim),
        SPLIT=splits > 1, WINDOW=window > 0, SOFTCAP=softcap > 0, PRECISION=_precision(k_cache), BLOCK_S=MERGED, **options)
    return out


RESIDENT = 3            # programs of the "list" way on each multiprocessor


def listed(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, rows: Tensor, positions: Tensor,
           scale: float, window: int, softcap: float, max_context: int) -> Tensor:
    n, heads, dim = q.shape
    kv_heads = k_cache.shape[1]
    block_n, options = attention._decode_tile(k_cache)
    programs = RESIDENT * torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 11
    out = torch.empty((n, heads, dim), dtype=q.dtype, device=q.device)
    partial = torch.empty(2 * programs * (heads // kv_heads) * (dim + 2), dtype=torch.float32, device=q.device)
    factor, inner = _log2_scales(scale, softcap)
    _list_kernel[programs,](
        q, k_cache, v_cache, block_table, rows, positions, out, partial, _arrivals(q.device, 1 << 16), factor, inner, window,
        block_table.stride(0), q.stride(0), n, H=heads, K=kv_heads, P=k_cache.shape[2], D=dim,
        BLOCK_M=max(16, triton.next_power_of_2(heads // kv_heads)), BLOCK_N=block_n, BLOCK_D=triton.next_power_of_2(dim),
        WINDOW=window > 0, SOFTCAP=softcap > 0, PRECISION=_precision(k_cache), BLOCK_S=MERGED, CHUNK=1024,
        **options)
    return out


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

    def bytes(self, model: Model) -> int:
        """Of keys and values."""
        return 2 * 2 * sum(self.contexts) * model.kv_heads * model.dim


@dataclass(frozen=True)
class PrefillShape:
    name: str
    rows: int
    prefix: int
    queries: int


@dataclass(frozen=True)
class DecodeWay:
    way: str
    tile: tuple[int, int, int]      # keys of a tile at head size 128, warps, stages
    programs: int                   # split, fused: DECODE_PROGRAMS; list: RESIDENT

    @property
    def name(self) -> str:
        return f"{self.way} {'/'.join(map(str, self.tile))} {self.programs}"


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
    DecodeWay("split", (64, 4, 3), 1024), DecodeWay("split", (64, 4, 2), 1024), DecodeWay("split", (128, 4, 2), 1024),
    DecodeWay("split", (128, 4, 3), 1024), DecodeWay("split", (32, 4, 4), 1024), DecodeWay("split", (64, 4, 3), 2048),
    DecodeWay("fused", (64, 4, 3), 1024), DecodeWay("fused", (64, 4, 3), 2048), DecodeWay("fused", (64, 4, 2), 2048),
    DecodeWay("list", (64, 4, 3), 3), DecodeWay("list", (64, 4, 2), 4), DecodeWay("list", (128, 4, 2), 2),
    DecodeWay("list", (32, 4, 4), 4),
]
PREFILL_SHAPES = [PrefillShape("8 x 2048", 8, 0, 2048), PrefillShape("16 x 1024", 16, 0, 1024),
                  PrefillShape("64 x 150 after 800", 64, 800, 150)]
PREFILL_TILES = {
    MISTRAL: [Tile(128, 64, 8, 3), Tile(128, 64, 8, 4), Tile(128, 128, 8, 2), Tile(128, 128, 8, 3), Tile(128, 64, 8, 2, 128),
              Tile(128, 32, 8, 3, 128), Tile(128, 64, 4, 2), Tile(64, 64, 4, 2)],
    SMOLLM: [Tile(128, 64, 8, 3), Tile(128, 128, 8, 2), Tile(128, 128, 8, 3), Tile(128, 64, 4, 3), Tile(64, 64, 4, 3),
             Tile(64, 128, 4, 3)],
    GEMMA: [Tile(128, 64, 8, 2), Tile(128, 32, 8, 3), Tile(64, 64, 4, 2), Tile(64, 32, 4, 3)],
}


class Pool:
    """Random keys and values, and the block tables of any contexts over shuffled pages of it."""

    def __init__(self, model: Model, pages: int) -> None:
        shape = (pages, model.kv_heads, PAGE, model.dim)
        self.k, self.v = (torch.empty(shape, dtype=DTYPE, device=DEVICE).normal_() for _ in range(2))
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


def seconds(calls: list[Callable[[], Tensor]]) -> float:
    """Median time of one call, of CUDA graphs that make all of them one after the other."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    times = []
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    while len(times) < 5 or (sum(times) < 40 and len(times) < 200):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    del kept
    return sorted(times)[len(times) // 2] / len(calls) / 1e3


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
    global RESIDENT
    size = shape.bytes(model)
    function = {"split": attention.decode_attention, "fused": fused, "list": listed}[way.way]
    n, scale, contexts = len(shape.contexts), model.dim**-0.5, ints(shape.contexts)
    tables = pool.tables(contexts.repeat(copies(size) if timed else 1)).split(n)
    q = torch.randn(n, model.heads, model.dim, dtype=DTYPE, device=DEVICE)
    rows = ints(range(n))
    RESIDENT = way.programs
    keys, warps, stages = way.tile
    tile = mock.Mock(return_value=(keys * 128 // model.dim, {"num_warps": warps, "num_stages": stages}))
    with mock.patch.multiple(attention, DECODE_PROGRAMS=way.programs, _decode_tile=tile):
        calls = [functools.partial(function, q, pool.k, pool.v, table, rows, contexts - 1, scale, 0, 0.0, MAX_MODEL_LEN)
                 for table in tables]
        got = calls[0]()
        if not timed:
            return 0.0
        few = min(n, 8)
        want = ref.decode_attention(q[:few], pool.k, pool.v, tables[0], rows[:few], contexts[:few] - 1, scale, 0, 0.0,
                                    max(shape.contexts[:few]))
        check(f"{model.name} {shape.name} {way.name}", got[:few], want)
        return size / seconds(calls) / 1e12


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
        call = functools.partial(attention.prefill_attention, *inputs, ints(cu_q), tiles, scale, 0, 0.0)
        got = call()
        if not timed:
            return 0.0
        last = [x[-1:] for x in inputs[4:]]
        want = ref.prefill_attention(q[-shape.queries :], *inputs[1:4], *last, ints([0, shape.queries]), tiles, scale, 0, 0.0)
        check(f"{model.name} {shape.name} {tile.name}", got[-shape.queries :], want)
        return flops / seconds([call] * 4) / 1e12


def torch_prefill(model: Model, shape: PrefillShape, backend: SDPBackend) -> float:
    """TFLOP/s of torch's own causal attention over keys that lie in order."""
    q, k, v = (torch.randn(shape.rows, heads, shape.queries, model.dim, dtype=DTYPE, device=DEVICE)
               for heads in (model.heads, model.kv_heads, model.kv_heads))
    with sdpa_kernel(backend):
        call = functools.partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
        call()
        return 2 * shape.rows * model.heads * model.dim * shape.queries * (shape.queries + 1) / seconds([call] * 4) / 1e12


def attempt(measure: Callable[..., float], *args: object) -> float:
    """NaN where the tile does not fit on the chip."""
    try:
        return measure(*args)
    except triton.runtime.errors.OutOfResources:
        return float("nan")


def compile_one(job: tuple[str, object, Model]) -> None:
    """In a process of its own: fill Triton's cache on disk with one way or tile."""
    kind, what, model = job
    pool = Pool(model, 64)
    if kind == "decode":
        for shape in (DecodeShape("one launch", (600,) * 2048), DecodeShape("split", (600,) * 8)):
            attempt(decode, what, model, shape, pool, False)
    else:
        attempt(prefill, what, model, PrefillShape("", 1, 16, 128), pool, False)


def table_of(title: str, columns: Sequence[str], lines: Sequence[tuple[str, Sequence[float]]], digits: int) -> None:
    print(f"\n{title}\n" + "".join(f"  [{i}] {name}\n" for i, name in enumerate(columns)), end="")
    print(f"{'':22}" + "".join(f"{f'[{i}]':>7}" for i in range(len(columns))))
    for name, values in lines:
        print(f"{name:22}" + "".join(f"{value:7.{digits}f}" for value in values), flush=True)


def main() -> None:
    what = sys.argv[1:] or ["decode", "prefill"]
    begin = time.perf_counter()
    jobs: list[tuple[str, object, Model]] = []
    if "decode" in what:
        jobs += [("decode", way, model) for model in DECODE_SHAPES for way in DECODE_WAYS]
    if "prefill" in what:
        jobs += [("prefill", tile, model) for model, tiles in PREFILL_TILES.items() for tile in tiles]
    with ProcessPoolExecutor(12, mp_context=multiprocessing.get_context("spawn")) as workers:
        list(workers.map(compile_one, jobs))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; "
          f"{len(jobs)} ways compiled in {time.perf_counter() - begin:.0f} s")
    if "decode" in what:
        for model, shapes in DECODE_SHAPES.items():
            pool = Pool(model, max(s.pages * copies(s.bytes(model)) for s in shapes))
            lines = [(s.name, [attempt(decode, way, model, s, pool, True) for way in DECODE_WAYS]) for s in shapes]
            table_of(f"decode, {model.name}, bf16: TB/s of keys and values (reading runs at {READ_RATE})",
                     [w.name for w in DECODE_WAYS], lines, 2)
            del pool
    if "prefill" in what:
        for model, tiles in PREFILL_TILES.items():
            pool = Pool(model, 64 * 30 + 8 * 64)
            lines = []
            for s in PREFILL_SHAPES:
                own = [attempt(prefill, tile, model, s, pool, True) for tile in tiles]
                lines.append((s.name, own + [torch_prefill(model, s, backend) for backend in BACKENDS if not s.prefix]))
            table_of(f"prefill, {model.name}, bf16: TFLOP/s",
                     [*(tile.name for tile in tiles), *(f"torch {b.name}" for b in BACKENDS)], lines, 0)
    print(f"\n{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
