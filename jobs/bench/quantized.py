"""Products with quantised weights on one GPU: right first, then their time against the time that reading the weights takes.

    python jobs/bench/quantized.py [--only w4 w8 fp8 block quant few ring] [--check] [--time] [--sweep]

--check: relative errors against float64, for shapes of Mistral, Llama 3, Qwen2.5 and SmolLM2, all group sizes, 1 to 8,192 rows,
weights and inputs with outliers. --time: microseconds, and the share of the floor: the bytes of weights, inputs and outputs at
the rate of a large copy. --sweep: times of many tiles, to find the best. Without any of the three: --check and --time.
few: the tiles of the kernels for 1 to 8 rows (gemm_few.py), beside the kernels for up to 16. ring: of those for 9 rows and more
(gemm_fp8_ring.py, gemm_w4_ring.py), beside the kernels before them.
Times are of CUDA graphs of several calls over copies of the weights that do not fit in L2 together, median of the replays.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jobs.bench.graph_timing import replay_seconds
from kernels import gemm_few, gemm_fp8, gemm_fp8_ring, gemm_w4, gemm_w4_ring, hopper, pointwise, quantize
from kernels.formats import FP8_BLOCK
from kernels.gemm_few import Tile as FewTile
from kernels.split_k import Tile

DEVICE, DTYPE = "cuda", torch.bfloat16
L2_BYTES = 64 << 20
NAN = float("nan")
LIMIT = {torch.bfloat16: 5e-3, torch.float16: 1e-3}

# Outputs and inputs of each layer's merged projections.
LAYERS = {
    "mistral-7b, llama-3-8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
    "qwen2.5-0.5b": {"qkv": (1152, 896), "o": (896, 896), "gate_up": (9728, 896), "down": (896, 4864)},
    "qwen2.5-1.5b": {"qkv": (2048, 1536), "o": (1536, 1536), "gate_up": (17920, 1536), "down": (1536, 8960)},
    "qwen2.5-3b": {"qkv": (2560, 2048), "o": (2048, 2048), "gate_up": (22016, 2048), "down": (2048, 11008)},
    "qwen2.5-7b": {"qkv": (4608, 3584), "o": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)},
    "smollm2-135m": {"qkv": (960, 576), "o": (576, 576), "gate_up": (3072, 576), "down": (576, 1536)},
}
TIMED = LAYERS["mistral-7b, llama-3-8b"]
GROUPS = (128, 32, 64, 0)           # 0: one group for all inputs
ROWS = (1, 2, 3, 8, 16, 17, 33, 64, 100, 192, 500, 8192)
TIMED_ROWS = (1, 4, 8, 16, 32, 64, 96, 128, 192, 256, 512, 2048)


# --- inputs ---------------------------------------------------------------------------------------------------------------------


def with_outliers(*shape: int) -> Tensor:
    """Normal numbers, one in a thousand of them 20 times larger."""
    x = torch.randn(shape, device=DEVICE)
    return torch.where(torch.rand(shape, device=DEVICE) < 1e-3, 20 * x, x)


@dataclass
class Integer:
    """Random codes of one layer; packed, with the weights they stand for in float64."""

    bits: int
    shape: tuple[int, int]
    group: int
    dtype: torch.dtype = DTYPE
    zero: bool = True
    exact: Tensor = field(init=False)

    def __post_init__(self) -> None:
        n, k = self.shape
        self.group = self.group or k
        codes = torch.randint(0, 1 << self.bits, (n, k), dtype=torch.uint8, device=DEVICE)
        scales = (with_outliers(k // self.group, n).abs() * 0.02 / (1 << self.bits) + 1e-4).to(self.dtype).t()
        zeros = None
        if self.zero:
            zeros = torch.randint(0, 1 << self.bits, (k // self.group, n), dtype=torch.uint8, device=DEVICE).t()
        middle = torch.full_like(scales, 1 << (self.bits - 1)) if zeros is None else zeros
        spread = functools.partial(torch.repeat_interleave, repeats=self.group, dim=1)
        self.exact = (codes.double() - spread(middle.double())) * spread(scales.double())
        packed = (gemm_w4.w4_pack if self.bits == 4 else gemm_w4.w8_pack)(codes)
        self.parts = packed, scales, zeros, self.group

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return (gemm_w4.w4_matmul if self.bits == 4 else gemm_w4.w8_matmul)(x, *self.parts, bias, None, None)


def off(got: Tensor, want: Tensor) -> float:
    """Relative error in the 2-norm; the output of a row that was not written is NaN."""
    return float((got.double() - want).norm() / want.norm())


# --- --check --------------------------------------------------------------------------------------------------------------------


def check_integer(bits: int) -> None:
    for model, layers in LAYERS.items():
        lines = []
        for group in GROUPS:
            worst, where = 0.0, ""
            for (name, shape), dtype in zip(layers.items(), itertools.cycle((torch.bfloat16, torch.float16)), strict=False):
                if group and shape[1] % group:
                    continue
                layer = Integer(bits, shape, group, dtype, zero=name != "o")
                bias = torch.randn(shape[0], device=DEVICE).to(dtype) if name == "qkv" else None
                for rows in ROWS:
                    x = with_outliers(rows, shape[1]).to(dtype)
                    some = torch.randperm(rows, device=DEVICE)[:64]
                    want = x[some].double() @ layer.exact.t() + (0 if bias is None else bias.double())
                    error = off(layer(x, bias)[some], want) / LIMIT[dtype]
                    if not error < worst:
                        worst, where = error, f"{name} x {rows}"
                again = layer(x[:7], bias)
                assert all(torch.equal(again, layer(x[:7], bias)) for _ in range(5)), "the same product gave other bits"
            lines.append(f"group {group or 'K'}: {worst:.2f} of the limit ({where})")
            verdict(worst < 1, f"w{bits} {model} {lines[-1]}")
        print(f"w{bits} {model}: " + "; ".join(lines), flush=True)


def check_fp8() -> None:
    for model, layers in LAYERS.items():
        for block in (False, True):
            worst, where = 0.0, ""
            for name, (n, k) in layers.items():
                if block and (n % FP8_BLOCK or k % FP8_BLOCK):
                    continue
                call, exact = fp8_layer(n, k, block)
                for rows in ROWS:
                    x = with_outliers(rows, k).to(DTYPE)
                    if block:
                        quantized, scale = quantize.quantize_blocks(x, FP8_BLOCK)
                        scale = scale.repeat_interleave(FP8_BLOCK, 1)
                    else:
                        quantized, scale = quantize.fp8_quantize(x)
                        want = (x.float() / (x.float().abs().amax(1, keepdim=True) / 448)).to(torch.float8_e4m3fn).float()
                        verdict((quantized.float() - want).abs().le(0.126 * want.abs()).all(), f"quantised {name}")
                    inputs = quantized.double() * scale.double()
                    some = torch.randperm(rows, device=DEVICE)[:64]
                    error = off(call(x)[some], inputs[some] @ exact.t()) / LIMIT[DTYPE]
                    verdict(off(inputs, x.double()) < 0.03, f"quantised {name} x {rows}: {off(inputs, x.double()):.3f}")
                    if not error < worst:
                        worst, where = error, f"{name} x {rows}"
            verdict(worst < 1, f"fp8 {model}")
            print(f"fp8{' in blocks' * block} {model}: {worst:.2f} of the limit ({where})", flush=True)


def fp8_layer(n: int, k: int, block: bool) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    weight = with_outliers(n, k) * 0.02
    if block:
        scale = weight.view(n // FP8_BLOCK, FP8_BLOCK, k // FP8_BLOCK, FP8_BLOCK).abs().amax((1, 3)) / 448
        spread = scale.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
        codes = (weight / spread).to(torch.float8_e4m3fn)
        return (lambda x: gemm_fp8.fp8_block_matmul(x, codes, scale, None)), codes.double() * spread.double()
    scale = weight.abs().amax(1) / 448
    codes = (weight / scale[:, None]).to(torch.float8_e4m3fn)
    return (lambda x: gemm_fp8.fp8_matmul(x, codes, scale, None, None)), codes.double() * scale[:, None].double()


failures: list[str] = []


def verdict(good: object, what: str) -> None:
    if not bool(good):
        failures.append(what)
        print("WRONG:", what, flush=True)


# --- --time and --sweep ---------------------------------------------------------------------------------------------------------


def read_rate() -> float:
    """Bytes a second of a large copy, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / replay_seconds([lambda: target.copy_(source)] * 3)


def copies(size: int) -> int:
    return max(2, min(48, -(-3 * L2_BYTES // size)))


@dataclass
class Packed:
    """Random bits in the packed layout: enough of them to time a layer on."""

    shape: tuple[int, int]
    bits: int = 4
    group: int = 128

    def __post_init__(self) -> None:
        n, k = self.shape
        block = gemm_w4.WORDS * 16 // self.bits
        size = -(-k // block), -(-n // gemm_w4.ROWS), gemm_w4.ROWS * gemm_w4.WORDS
        self.bytes = 2 * size[0] * size[1] * size[2] + 3 * n * k // self.group
        self.copies = [
            (torch.randint(-32768, 32768, size, dtype=torch.int16, device=DEVICE),
             (torch.rand(k // self.group, n, device=DEVICE) * 0.01).to(DTYPE).t(),
             torch.randint(0, 1 << self.bits, (k // self.group, n), dtype=torch.uint8, device=DEVICE).t())
            for _ in range(copies(self.bytes))]

    def fused(self, x: Tensor, tile: Tile) -> float:
        return replay_seconds([functools.partial(gemm_w4._skinny, x, *part, self.group, None, self.bits, tile)
                               for part in self.copies])

    def few(self, x: Tensor, tile: FewTile, activation: str = "") -> float:
        return replay_seconds([functools.partial(gemm_few.w4_product, x, *part, self.group, None, tile, activation)
                               for part in self.copies])

    def ring(self, x: Tensor, tile: gemm_w4_ring.Tile) -> float:
        return replay_seconds([functools.partial(gemm_w4_ring.product, x, *part, self.group, None, tile) for part in self.copies])

    def fused_then_gated(self, x: Tensor, tile: Tile) -> float:
        def call(*part: object) -> Tensor:
            return pointwise.gated_act(gemm_w4._skinny(x, *part, self.group, None, self.bits, tile), "silu")
        return replay_seconds([functools.partial(call, *part) for part in self.copies])

    def apart(self, x: Tensor) -> float:
        def call(packed: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
            return F.linear(x, gemm_w4._dequantise(packed, scales, zeros, self.group, self.bits, x.shape[1]))
        return replay_seconds([functools.partial(call, *part) for part in self.copies])


def attempt(measure: Callable[..., float], *args: object) -> float:
    """NaN where the tile does not fit on the chip."""
    try:
        return measure(*args) * 1e6
    except triton.runtime.errors.OutOfResources:
        return NAN


def few_rows(layer: Packed | Fp8, bits: int, x: Tensor) -> float:
    """By the kernels for few rows, as they choose; NaN for more."""
    tile = gemm_few.tile_of(x.shape[0], *layer.shape, bits) if bits == 4 or isinstance(layer, Fp8) else None
    return NAN if tile is None else attempt(layer.few, x, tile)


def dense(shape: tuple[int, int], rows: int) -> float:
    weights = [torch.randn(shape, device=DEVICE).to(DTYPE) for _ in range(copies(2 * shape[0] * shape[1]))]
    x = torch.randn(rows, shape[1], device=DEVICE).to(DTYPE)
    return replay_seconds([functools.partial(F.linear, x, weight) for weight in weights])


def time_integer(bits: int, rate: float) -> None:
    print(f"\nw{bits}a16, group 128, bf16; us for the four products of a layer, and their sum as a share of the floor\n"
          f"{'rows':>6}" + "".join(f"{name:>9}" for name in TIMED) +
          f"{'sum':>9}{'floor':>8}{'share':>7}{'few':>9}{'apart':>9}{'bf16':>9}")
    layers = {name: Packed(shape, bits) for name, shape in TIMED.items()}
    for rows in TIMED_ROWS:
        x = {name: torch.randn(rows, shape[1], device=DEVICE).to(DTYPE) for name, shape in TIMED.items()}
        most = min(rows, gemm_w4.MOST_ROWS)
        fused = [attempt(layer.fused, x[name], gemm_w4._tile(most, layer.shape[0])) if rows <= 512 else NAN
                 for name, layer in layers.items()]
        few = sum(few_rows(layer, bits, x[name]) for name, layer in layers.items())
        apart = sum(attempt(layer.apart, x[name]) for name, layer in layers.items())
        plain = sum(attempt(dense, shape, rows) for shape in TIMED.values())
        floor = sum(layer.bytes + 2 * rows * sum(layer.shape) for layer in layers.values()) / rate * 1e6
        print(f"{rows:6}" + "".join(f"{us:9.1f}" for us in fused) +
              f"{sum(fused):9.1f}{floor:8.1f}{floor / sum(fused):7.2f}{few:9.1f}{apart:9.1f}{plain:9.1f}", flush=True)


@dataclass
class Fp8:
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        n, k = self.shape
        self.bytes = n * k + 4 * n
        self.copies = [(torch.randn(n, k, device=DEVICE).to(torch.float8_e4m3fn), torch.rand(n, device=DEVICE))
                       for _ in range(copies(n * k))]

    def fused(self, x: Tensor, tile: Tile) -> float:
        x, scale = quantize.fp8_quantize(x)
        return replay_seconds([functools.partial(gemm_fp8._product, x, scale, *part, None, DTYPE, False, tile)
                               for part in self.copies])

    def few(self, x: Tensor, tile: FewTile) -> float:
        x, scale = quantize.fp8_quantize(x)
        return replay_seconds([functools.partial(gemm_few.fp8_product, x, scale, *part, None, DTYPE, False, tile)
                               for part in self.copies])

    def ring(self, x: Tensor, tile: gemm_fp8_ring.Tile) -> float:
        x, scale = quantize.fp8_quantize(x)
        return replay_seconds([functools.partial(gemm_fp8_ring.product, x, scale, *part, None, DTYPE, tile)
                               for part in self.copies])

    def few_blocks(self, x: Tensor, tile: FewTile) -> float:
        (n, k), inputs = self.shape, quantize.quantize_blocks(x, FP8_BLOCK)
        scale = torch.rand(n // FP8_BLOCK, k // FP8_BLOCK, device=DEVICE)
        return replay_seconds([functools.partial(gemm_few.fp8_product, *inputs, weight, scale, None, DTYPE, True, tile)
                               for weight, _ in self.copies])

    def fused_blocks(self, x: Tensor, tile: Tile) -> float:
        (n, k), inputs = self.shape, quantize.quantize_blocks(x, FP8_BLOCK)
        scale = torch.rand(n // FP8_BLOCK, k // FP8_BLOCK, device=DEVICE)
        return replay_seconds([functools.partial(gemm_fp8._product, *inputs, weight, scale, None, DTYPE, True, tile)
                               for weight, _ in self.copies])

    def cublas(self, rows: int, fast: bool) -> float:
        x, scale = quantize.fp8_quantize(torch.randn(rows, self.shape[1], device=DEVICE).to(DTYPE))
        call = functools.partial(torch._scaled_mm, out_dtype=DTYPE, use_fast_accum=fast)
        return replay_seconds([functools.partial(call, x, weight.t(), scale, each[None]) for weight, each in self.copies])

    def blocks(self, rows: int) -> float:
        n, k = self.shape
        x = torch.randn(rows, k, device=DEVICE).to(DTYPE)
        scale = torch.rand(n // FP8_BLOCK, k // FP8_BLOCK, device=DEVICE)
        return replay_seconds([functools.partial(gemm_fp8.fp8_block_matmul, x, weight, scale, None) for weight, _ in self.copies])


def time_fp8(rate: float) -> None:
    print(f"\nfp8, us for the four products of a layer (x quantised already), and their sum as a share of the floor\n"
          f"{'rows':>6}" + "".join(f"{name:>9}" for name in TIMED) +
          f"{'sum':>9}{'floor':>8}{'share':>7}{'few':>9}{'cuBLAS':>9}{'fast':>9}{'blocks':>9}")
    layers = {name: Fp8(shape) for name, shape in TIMED.items()}
    for rows in TIMED_ROWS:
        inputs = [torch.randn(rows, layer.shape[1], device=DEVICE).to(DTYPE) for layer in layers.values()]
        fused = [attempt(layer.fused, x, gemm_fp8._tile(rows)) for layer, x in zip(layers.values(), inputs, strict=True)]
        few = sum(few_rows(layer, 8, x) for layer, x in zip(layers.values(), inputs, strict=True))
        cublas, fast = (sum(attempt(layer.cublas, rows, f) for layer in layers.values()) for f in (False, True))
        blocks = sum(attempt(layer.blocks, rows) for layer in layers.values())
        floor = sum(layer.bytes + rows * (layer.shape[1] + 2 * layer.shape[0]) for layer in layers.values()) / rate * 1e6
        print(f"{rows:6}" + "".join(f"{us:9.1f}" for us in fused) +
              f"{sum(fused):9.1f}{floor:8.1f}{floor / sum(fused):7.2f}{few:9.1f}"
              f"{cublas:9.1f}{fast:9.1f}{blocks:9.1f}", flush=True)


def time_quantization() -> None:
    print(f"\nquantising x token by token, us\n{'rows':>6}{'4096':>9}{'14336':>9}")
    for rows in (1, 16, 64, 512, 4096):
        times = []
        for width in (4096, 14336):
            inputs = [torch.randn(rows, width, device=DEVICE).to(DTYPE) for _ in range(min(32, copies(2 * rows * width)))]
            times.append(replay_seconds([functools.partial(quantize.fp8_quantize, x) for x in inputs]) * 1e6)
        print(f"{rows:6}" + "".join(f"{us:9.1f}" for us in times), flush=True)


def tiles(cuts: Sequence[tuple[int, int, int]], stages: Sequence[int], programs: Sequence[int]) -> list[Tile]:
    return [Tile(*cut, s, p) for cut, s, p in itertools.product(cuts, stages, programs)]


def narrow(m: int) -> list[tuple[int, int, int]]:
    return [(m, 64, 4), (m, 128, 4), (m, 128, 8)]


W4_SWEEP = {
    (1, 8, 16): tiles(narrow(16), (3, 5), (132, 264, 396, 528)),
    (32,): tiles(narrow(32), (3, 5), (132, 264, 396)),
    (64,): tiles([*narrow(64), (64, 256, 8)], (3, 4), (132, 264, 396)),
    (128, 192, 256): tiles([(64, 128, 8), (128, 64, 4), (128, 128, 8), (64, 256, 8), (256, 64, 8)], (3, 4), (132, 264)),
}
FP8_SWEEP = {
    (1, 16): tiles(narrow(16), (4, 6), (132, 264, 396, 528)),
    (32,): tiles(narrow(32), (4, 6), (132, 264, 396)),
    (64, 128): tiles([(64, 64, 4), (64, 128, 4), (64, 128, 8), (128, 64, 4), (128, 128, 8)], (3, 4), (132, 264, 396)),
}
SWEEPS = {"w4": W4_SWEEP, "w8": W4_SWEEP, "fp8": FP8_SWEEP}


def sweep(kind: str) -> None:
    layers = {name: Fp8(shape) if kind == "fp8" else Packed(shape, int(kind[1:])) for name, shape in TIMED.items()}
    for counts, ways in SWEEPS[kind].items():
        for rows in counts:
            found = []
            for tile in ways:
                us = [attempt(layer.fused, torch.randn(rows, layer.shape[1], device=DEVICE).to(DTYPE), tile)
                      for layer in layers.values()]
                found.append((sum(us), us, tile))
            found = sorted((f for f in found if f[0] == f[0]), key=lambda f: f[0])
            each = " ".join(f"{name} {min(f[1][i] for f in found):.1f} {tuple(min(found, key=lambda f: f[1][i])[2])}"
                            for i, name in enumerate(layers))
            print(f"{kind} x {rows}: best of each: {each}")
            for total, us, tile in found[:6]:
                print(f"   {total:7.1f} us  {tuple(tile)}  " + " ".join(f"{u:.1f}" for u in us), flush=True)


FEW_TILES = [FewTile(*way) for way in itertools.product((2, 4, 8, 16), (16, 32, 64), (1, 2, 4), (0, 64, 72))
             if way[1] * way[2] <= 64]


def sweep_few(rate: float) -> None:
    """Of 1 and 8 rows, each product by every tile: the best, the one that tile_of gives, and the kernels for up to 16 rows."""
    for bits, title in ((4, "w4"), (8, "fp8")):
        for name, shape in TIMED.items():
            layer = Fp8(shape) if bits == 8 else Packed(shape)
            ways = [(title, layer.few, layer.fused)]
            if bits == 8:
                ways.append(("fp8 in blocks", layer.few_blocks, layer.fused_blocks))
            elif name == "gate_up":
                ways.append(("w4 gated", functools.partial(layer.few, activation="silu"), layer.fused_then_gated))
            for rows, (what, few, fused) in itertools.product((1, 8), ways):
                x, gated = torch.randn(rows, shape[1], device=DEVICE).to(DTYPE), what == "w4 gated"
                chosen = gemm_few.tile_of(rows, *shape, bits, gated)
                before = attempt(fused, x, gemm_w4._tile(rows, shape[0]) if bits == 4 else gemm_fp8._tile(rows))
                found = [(attempt(few, x, tile), tile) for tile in FEW_TILES if tile.outputs >= 32 or not gated]
                best = sorted(way for way in found if way[0] == way[0])[:5]
                print(f"{what} {name} x {rows}: {before:.1f} us before, floor {layer.bytes / rate * 1e6:.1f}; now "
                      f"{attempt(few, x, chosen):.1f} by {tuple(chosen)}; best "
                      + ", ".join(f"{us:.1f} {tuple(tile)}" for us, tile in best), flush=True)
                if bits == 4 and rows > 1:      # rows a power of two apart may fall into the same banks of the L1
                    padded = F.pad(x, (0, 16))[:, : shape[1]]
                    print(f"   {attempt(few, padded, chosen):.1f} and {attempt(few, padded, best[0][1]):.1f} with rows of x "
                          "32 bytes further apart", flush=True)


RING_ROWS = (16, 32, 64, 128)
# Of 4-bit weights by (outputs, programs): those that fill the multiprocessors about once, as 5 do 24 and 48 tiles.
W4_SPLITS = {(64, 1): (1, 2), (128, 1): (1, 2, 3, 4), (128, 2): (1, 4, 5, 8), (256, 1): (1, 2)}


def rings(kind: str, rows: int) -> list[gemm_fp8_ring.Tile] | list[gemm_w4_ring.Tile]:
    few = rows <= hopper.MOST_BESIDE
    if kind == "w4":
        deep = {way: gemm_w4_ring.most_stages(rows, *way) for way in W4_SPLITS}
        return [gemm_w4_ring.Tile(outputs, split, stages, programs) for (outputs, programs), most in deep.items()
                for split in W4_SPLITS[outputs, programs] for stages in sorted({most, min(most, 6 if outputs == 64 else 4)})
                if few or programs == 1]
    most = {programs: gemm_fp8_ring.most_stages(rows, programs) for programs in gemm_fp8_ring.REGISTERS}
    return [gemm_fp8_ring.Tile(split, stages, programs) for programs in most for split in (1, 2, 3, 4)
            for stages in sorted({most[programs], max(most[programs] * 2 // 3, 4)}) if few or programs == 1]


def sweep_ring(rate: float) -> None:
    """Of 16 to 128 rows, each product by every tile: the best, the one that tile_of gives, and the kernel before."""
    chips = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    sums: dict[tuple[str, int], list[float]] = {}
    for name, shape in TIMED.items():
        w4, fp8 = Packed(shape), Fp8(shape)
        for rows in RING_ROWS:
            x = torch.randn(rows, shape[1], device=DEVICE).to(DTYPE)
            of_fp8 = (fp8.fused, x, gemm_fp8._tile(rows)) if rows <= gemm_fp8.MOST_ROWS else (fp8.cublas, rows, True)
            for what, layer, old, chosen in (
                ("w4", w4, (w4.fused, x, gemm_w4._tile(rows, shape[0])), gemm_w4_ring.tile_of(rows, *shape, chips)),
                ("fp8", fp8, of_fp8, gemm_fp8_ring.tile_of(rows, *shape, chips)),
            ):
                if chosen is None:
                    continue
                before, found = attempt(*old), rings(what, rows)
                ways = [(attempt(layer.ring, x, tile), tile) for tile in found]
                best = sorted(way for way in ways if way[0] == way[0])[:4]
                now = attempt(layer.ring, x, chosen)
                print(f"{what} {name} x {rows}: {before:.1f} us before, floor {layer.bytes / rate * 1e6:.1f}; now {now:.1f} by "
                      f"{tuple(chosen)}; best " + ", ".join(f"{us:.1f} {tuple(tile)}" for us, tile in best), flush=True)
                line = sums.setdefault((what, rows), [0.0] * 4)
                for i, value in enumerate((before, now, best[0][0], layer.bytes / rate * 1e6)):
                    line[i] += value
    print("\nthe four products: before, by the tiles chosen, by the best ones, floor")
    for (what, rows), values in sums.items():
        print(f"{what:5} x {rows:3}" + "".join(f"{value:8.1f}" for value in values))


def compile_ring(job: tuple[str, int, NamedTuple]) -> None:
    """In a process of its own: sizes that are as divisible as the timed ones."""
    kind, rows, tile = job
    size = 2048
    x = torch.randn(rows, size, device=DEVICE).to(DTYPE)
    if kind == "w4":
        gemm_w4_ring.product(x, *Integer(4, (size, size), 128).parts, None, tile)
    else:
        codes = torch.zeros(size, size, device=DEVICE).to(torch.float8_e4m3fn)
        gemm_fp8_ring.product(*quantize.fp8_quantize(x), codes, torch.zeros(size, device=DEVICE), None, DTYPE, tile)


# --- compiling beforehand, in processes -----------------------------------------------------------------------------------------


def compile_one(job: tuple[str, tuple[int, ...], int, torch.dtype, bool, bool]) -> None:
    """Fill Triton's cache on disk with one kernel, by a small product of the same kind."""
    kind, tile, group, dtype, zero, bias = job
    tile, k = Tile(*tile), 512
    for programs in (1, 64):        # alone, and with K split
        tile = tile._replace(programs=programs)
        x = torch.randn(tile.block_m, k, device=DEVICE).to(dtype)
        b = torch.zeros(512, device=DEVICE, dtype=dtype) if bias else None
        try:
            if kind in ("w4", "w8"):
                layer = Integer(int(kind[1:]), (512, k), group, dtype, zero)
                gemm_w4._skinny(x, *layer.parts, b, layer.bits, tile)
                gemm_w4._dequantise(*layer.parts, layer.bits, k)
            elif kind == "fp8":
                codes = torch.zeros(512, k, device=DEVICE).to(torch.float8_e4m3fn)
                gemm_fp8._product(*quantize.fp8_quantize(x), codes, torch.zeros(512, device=DEVICE), b, dtype, False, tile)
            else:
                codes = torch.zeros(512, k, device=DEVICE).to(torch.float8_e4m3fn)
                inputs = quantize.quantize_blocks(x, FP8_BLOCK)
                gemm_fp8._product(*inputs, codes, torch.zeros(4, 4, device=DEVICE), b, dtype, True, tile)
        except triton.runtime.errors.OutOfResources:
            pass


def compile_few(job: tuple[str, FewTile]) -> None:
    """Likewise of the kernels for few rows: sizes that are as divisible as the timed ones."""
    kind, tile = job
    size = 2048
    x = torch.randn(1, size, device=DEVICE).to(DTYPE)
    if kind.startswith("w4"):
        gemm_few.w4_product(x, *Integer(4, (size, size), 128).parts, None, tile, "silu" if kind == "w4 gated" else "")
    else:
        codes, blocks = torch.zeros(size, size, device=DEVICE).to(torch.float8_e4m3fn), kind == "block"
        inputs = quantize.quantize_blocks(x, FP8_BLOCK) if blocks else quantize.fp8_quantize(x)
        gemm_few.fp8_product(*inputs, codes, torch.zeros((16, 16) if blocks else size, device=DEVICE), None, DTYPE, blocks, tile)


def jobs_of(kinds: Sequence[str], check: bool, timed: bool, swept: bool) -> Iterable[tuple]:
    packed = {tile for tiles in gemm_w4.TILES.values() for tile in tiles}
    own = {"w4": packed, "w8": packed, "fp8": gemm_fp8.TILES.values(), "block": gemm_fp8.TILES.values()}
    for kind in kinds:
        cuts = [tile._replace(programs=0) for tile in own.get(kind, ())]
        if check and kind in ("w4", "w8"):
            ways = itertools.product(cuts, GROUPS, (torch.bfloat16, torch.float16), ((True, True), (True, False), (False, False)))
            yield from ((kind, tuple(cut), group, dtype, *way) for cut, group, dtype, way in ways)
        elif check or timed:
            yield from ((kind, tuple(cut), 128, DTYPE, True, False) for cut in cuts)
        if swept:
            yield from ((kind, tuple(tile._replace(programs=0)), 128, DTYPE, True, False)
                        for way in SWEEPS.get(kind, {}).values() for tile in way)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", default=["w4", "fp8", "quant"],
                        choices=["w4", "w8", "fp8", "block", "quant", "few", "ring"])
    for name in ("check", "time", "sweep"):
        parser.add_argument(f"--{name}", action="store_true")
    args = parser.parse_args()
    if not (args.check or args.time or args.sweep):
        args.check = args.time = True
    begin = time.perf_counter()
    jobs = list(dict.fromkeys(jobs_of(args.only, args.check, args.time, args.sweep)))
    if args.sweep and "ring" in args.only:      # and the kernels before it
        jobs = list(dict.fromkeys([*jobs, *jobs_of(("w4", "fp8"), False, True, False)]))
    with ProcessPoolExecutor(14, mp_context=multiprocessing.get_context("spawn")) as workers:
        list(workers.map(compile_one, jobs))
        if args.sweep and "few" in args.only:
            list(workers.map(compile_few, [(kind, tile) for kind in ("w4", "w4 gated", "fp8", "block") for tile in FEW_TILES
                                           if kind != "w4 gated" or tile.outputs >= 32], chunksize=4))
        if args.sweep and "ring" in args.only:
            split = {(kind, rows, tile._replace(splits=min(tile.splits, 2)))
                     for rows in RING_ROWS for kind in ("w4", "fp8") for tile in rings(kind, rows)}
            list(workers.map(compile_ring, split, chunksize=2))
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(args.check, warn_only=True)      # torch.empty gives NaN: what no program wrote shows
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; "
          f"{len(jobs)} kinds compiled in {time.perf_counter() - begin:.0f} s", flush=True)
    if args.check:
        for kind in args.only:
            if kind in ("w4", "w8"):
                check_integer(int(kind[1:]))
        if "fp8" in args.only or "block" in args.only:
            check_fp8()
        print(f"{len(failures)} wrong; {time.perf_counter() - begin:.0f} s so far", flush=True)
    torch.use_deterministic_algorithms(False)
    if args.time:
        rate = read_rate()
        print(f"a copy runs at {rate / 1e12:.2f} TB/s")
        for kind in args.only:
            if kind in ("w4", "w8"):
                time_integer(int(kind[1:]), rate)
            elif kind == "fp8":
                time_fp8(rate)
            elif kind == "quant":
                time_quantization()
    if args.sweep:
        for kind in args.only:
            if kind in ("w4", "w8", "fp8"):
                sweep(kind)
            elif kind == "few":
                sweep_few(read_rate())
            elif kind == "ring":
                sweep_ring(read_rate())
    print(f"{time.perf_counter() - begin:.0f} s in all")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
