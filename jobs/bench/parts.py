"""What each part of a layer costs in a decode step on one GPU: the time of a chain of layers, less that of the chain without it.

    python jobs/bench/parts.py [--weights dense w4 fp8] [--rows N ...] [--context N]

Kernels of a step overlap with those before and after them, so what one takes alone says little. The layers are Mistral-7B's, with
weights, keys and values of their own, more than the L2 holds; a part that is left out leaves an input of the same shape behind.
Inputs of FP8 products are quantised by launches of their own here, but for those of down, and count with the product.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jobs.bench.decode_step import MAX_MODEL_LEN, PAGE
from jobs.bench.graph_timing import replay_seconds
from kernels import ops

DEVICE, LAYERS = "cuda", 8
HEADS, KV_HEADS, DIM, HIDDEN, INNER = 32, 8, 128, 4096, 14336
SHAPES = {"qkv": ((HEADS + 2 * KV_HEADS) * DIM, HIDDEN), "o": (HIDDEN, HEADS * DIM), "gate_up": (2 * INNER, HIDDEN),
          "down": (HIDDEN, INNER)}
PARTS = ("norms", "qkv", "attention", "o", "gate_up", "down")
GROUP = 128
Quantised = tuple[Tensor, Tensor]       # numbers, and scales of rows


class Weights:
    """Random weights of one kind, and a layer's products with them."""

    def __init__(self, kind: str) -> None:
        self.kind, self.dtype = kind, torch.float16 if kind == "w4" else torch.bfloat16
        self.layers = [{name: self._made(*shape) for name, shape in SHAPES.items()} for _ in range(LAYERS)]

    def _made(self, n: int, k: int) -> tuple:
        if self.kind == "w4":
            codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=DEVICE)
            scales, zeros = torch.rand(k // GROUP, n, device=DEVICE) * 0.01, torch.randint(0, 16, (k // GROUP, n), device=DEVICE)
            return ops.w4_pack(codes), scales.to(self.dtype).t(), zeros.to(torch.uint8).t(), GROUP
        weight = torch.randn(n, k, device=DEVICE, dtype=self.dtype) / k**0.5
        if self.kind == "dense":
            return (weight,)
        codes, scale = ops.fp8_quantize(weight)
        return codes, scale.flatten()

    def product(self, x: Tensor | Quantised, weight: tuple) -> Tensor:
        match self.kind:
            case "w4":
                return ops.w4_matmul(x, *weight)
            case "fp8":
                return ops.fp8_product(*(ops.fp8_quantize(x) if isinstance(x, Tensor) else x), *weight, None, self.dtype)
            case _:
                return ops.linear(x, *weight)

    def gated(self, x: Tensor, weight: tuple) -> Tensor | Quantised:
        match self.kind:
            case "w4":
                return ops.w4_gated_matmul(x, *weight, "silu")
            case "fp8":
                return ops.fp8_gated_product(*ops.fp8_quantize(x), *weight, None, self.dtype, "silu", None)
            case _:
                return ops.gated_linear(x, *weight, None, "silu")


def attentions(rows: int, context: int, stored: torch.dtype, dtype: torch.dtype) -> list[Callable[[Tensor], Tensor]]:
    """Of each layer, from its projection on, over keys and values in pages of a random order."""
    pages = -(-context // PAGE)
    shape = (rows * pages + 1, KV_HEADS, PAGE, DIM)
    table = (torch.randperm(rows * pages, device=DEVICE).int() + 1).view(rows, pages)
    table = torch.nn.functional.pad(table, (0, MAX_MODEL_LEN // PAGE - pages)).contiguous()
    index = torch.arange(rows, device=DEVICE, dtype=torch.int32)
    positions = context - 1 - index % 2
    slots = (table[index.long(), positions.long() // PAGE] * PAGE + positions % PAGE).int()
    cos_sin = torch.rand(MAX_MODEL_LEN, DIM, device=DEVICE)
    scales = torch.ones(2, KV_HEADS, device=DEVICE) if stored != dtype else None

    def attend(k_cache: Tensor, v_cache: Tensor, qkv: Tensor) -> Tensor:
        return ops.rope_and_decode(qkv, None, None, 1e-5, False, cos_sin, positions, slots, k_cache, v_cache, HEADS, table, index,
                                   DIM**-0.5, 0, 0.0, MAX_MODEL_LEN, scales).flatten(1)

    return [functools.partial(attend, *(torch.randn(shape, device=DEVICE, dtype=dtype).to(stored) for _ in range(2)))
            for _ in range(LAYERS)]


def chain(weights: Weights, rows: int, attend: list[Callable[[Tensor], Tensor]], without: str) -> Callable[[], Tensor]:
    def made(width: int) -> Tensor:
        return torch.randn(rows, width, device=DEVICE, dtype=weights.dtype)

    first, residual, scale = made(HIDDEN), made(HIDDEN), made(HIDDEN)[0]
    instead = {name: made(n if name != "gate_up" else INNER) for name, (n, _) in SHAPES.items()}
    gated = ops.fp8_quantize(instead["gate_up"]) if weights.kind == "fp8" else instead["gate_up"]

    def product(x: Tensor | Quantised, layer: dict[str, tuple], name: str) -> Tensor:
        return instead[name] if name == without else weights.product(x, layer[name])

    def norm(x: Tensor) -> Tensor:
        return x if without == "norms" else ops.add_rms_norm(x, residual, scale, 1e-5)

    def step() -> Tensor:
        x = first
        for layer, attention in zip(weights.layers, attend, strict=True):
            qkv = product(norm(x), layer, "qkv")
            x = qkv[:, : HEADS * DIM] if without == "attention" else attention(qkv)
            x = norm(product(x, layer, "o"))
            x = product(gated if without == "gate_up" else weights.gated(x, layer["gate_up"]), layer, "down")
        return x

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="*", default=["dense", "w4", "fp8"], choices=["dense", "w4", "fp8"])
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16, 50, 128])
    parser.add_argument("--context", type=int, default=300)
    args = parser.parse_args()
    torch.manual_seed(0)
    print("us a layer; of each part, what the chain takes less without it\n" + f"{'weights':>8}{'rows':>6}{'whole':>9}"
          + "".join(f"{part:>11}" for part in PARTS))
    for kind in args.weights:
        weights = Weights(kind)
        for rows in args.rows:
            attend = attentions(rows, args.context, torch.float8_e4m3fn if kind == "fp8" else weights.dtype, weights.dtype)
            whole, *without = (replay_seconds([chain(weights, rows, attend, part)]) * 1e6 / LAYERS for part in ("", *PARTS))
            print(f"{kind:>8}{rows:6}{whole:9.1f}" + "".join(f"{whole - us:11.1f}" for us in without), flush=True)


if __name__ == "__main__":
    main()
