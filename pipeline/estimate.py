"""How long a job will take, before it runs: what its tokens cost on the device, by its roofline (Williams et al., 2009).

Seconds = tokens x 2 x parameters / speed of products + bytes of weights, keys and values / speed of memory + steps x overhead.
Both speeds are measured on the spot, as torch reaches them; the shares of them that the engine reaches are those of
jobs/bench/RESULTS.md. What comes out is right to a third or so, given the lengths of the outputs, which are the larger unknown.
Products are taken at the speed of 16 bits also where weights are FP8: long prompts then take less than is said.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from engine.config import CPU_ROWS, GPU_ROWS, EngineConfig
from pipeline.exits import ConfigError

if TYPE_CHECKING:
    from engine.models.spec import ModelSpec

PRODUCTS, MEMORY = 0.65, 0.9      # of what torch's product and copy reach


@dataclass(frozen=True, slots=True)
class ModelSize:
    """`params`: multiplied by each token, the LM head's included; in bytes on the device, `weights`, `token`: the keys and values
    of one token over all layers, and `copies`: of all weights that are packed, unpacked, where there is room for them."""

    params: int
    weights: int
    token: int
    copies: int = 0

    @classmethod
    def of(cls, spec: ModelSpec, config: EngineConfig, device: str) -> ModelSize:
        """As the engine will keep it on a "cuda" or "cpu" device. Raises ModelError where it cannot be kept as `config` asks."""
        import torch

        from engine.layers.quantized import linear_methods

        dtype = getattr(torch, spec.run_dtype(config.dtype, device))
        method_of = linear_methods(spec, config.quantization, torch.device(device))
        blocks = sum(method_of(name).kept_bytes(inputs, outputs, dtype) for name, inputs, outputs in spec.linears())
        packed = sum(inputs * outputs for name, inputs, outputs in spec.linears() if method_of(name).packs)
        embedding = spec.vocab_size * spec.hidden_size
        return cls(sum(inputs * outputs for _, inputs, outputs in spec.linears()) + embedding,
                   blocks + embedding * (1 if spec.tied_embeddings else 2) * dtype.itemsize,
                   2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * (1 if config.kv_dtype == "fp8" else dtype.itemsize),
                   packed * dtype.itemsize)


@dataclass(frozen=True, slots=True)
class Device:
    """`kind`: "cuda" or "cpu"; `products`: FLOP/s; `memory`: bytes/s read; `room`: bytes for keys and values, on a GPU with the
    weights, of which `unpack_share` may go to copies of packed ones; `overhead`: seconds a step."""

    name: str
    kind: str
    products: float
    memory: float
    room: float
    overhead: float
    rows: int
    unpack_share: float = EngineConfig().unpack_share


# For jobs that are tried out on a machine without a GPU and will run on one.
H100 = Device("NVIDIA H100 80GB", "cuda", 690e12, 3.0e12, 70e9, 0.0012, GPU_ROWS)


@dataclass(frozen=True, slots=True)
class Workload:
    """`rows` prompts of `prompt` tokens, `fresh` of which no earlier row has computed, each giving `output` tokens."""

    rows: float
    prompt: float
    fresh: float
    output: float


def seconds(size: ModelSize, device: Device, work: Workload) -> float:
    room = device.room
    if device.kind == "cuda":
        room -= size.weights
        room -= min(size.copies, device.unpack_share * room)
    fit = max(room, size.token) / (size.token * (work.prompt + work.output))
    steps = work.rows * work.output / max(1.0, min(device.rows, fit, work.rows))
    products = work.rows * (work.fresh + work.output) * 2 * size.params
    reads = steps * size.weights + work.rows * work.output * (work.prompt + work.output / 2) * size.token
    return products / (PRODUCTS * device.products) + reads / (MEMORY * device.memory) + steps * device.overhead


def fresh_tokens(prompts: Sequence[np.ndarray]) -> int:
    """Tokens of `prompts` beyond what each has in common with its neighbour in order: the engine computes a prefix once."""
    ordered = sorted(prompts, key=lambda tokens: tokens.astype(">i4").tobytes())
    total, before = 0, np.empty(0, dtype=np.int32)
    for tokens in ordered:
        n = min(tokens.size, before.size)
        differs = np.flatnonzero(tokens[:n] != before[:n])
        total += max(1, tokens.size - int(differs[0] if differs.size else n))
        before = tokens
    return total


def this_device(config: EngineConfig) -> Device:
    """The one that `engine.device` names, measured: a second or less. Raises ConfigError if it is not there."""
    import torch

    name = config.device
    if name != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda" if name == "auto" else name)
        a = torch.randn(8192, 8192, dtype=torch.bfloat16, device=device)
        held = torch.empty(1 << 30, dtype=torch.uint8, device=device)
        product = _seconds(lambda: a @ a, lambda: torch.cuda.synchronize(device))
        copy = _seconds(held.clone, lambda: torch.cuda.synchronize(device))
        room = torch.cuda.get_device_properties(device).total_memory * config.gpu_memory
        return Device(torch.cuda.get_device_name(device), "cuda", 2 * 8192**3 / product, 2 * held.nbytes / copy, room,
                      H100.overhead, config.max_rows or GPU_ROWS, config.unpack_share)
    if name not in ("auto", "cpu"):
        raise ConfigError(f"engine.device={name}: torch sees no such device here; leave it at auto, or set engine.device=cpu")
    a, held = torch.randn(1024, 1024), torch.empty(1 << 26, dtype=torch.uint8)
    product, copy = _seconds(lambda: a @ a), _seconds(held.clone)
    label = f"the {os.cpu_count()} CPU cores of this machine"
    return Device(label, "cpu", 2 * 1024**3 / product, 2 * held.nbytes / copy, config.cpu_kv_gib * 2**30, 0.002,
                  config.max_rows or CPU_ROWS)


def _seconds(call: Callable[[], object], wait: Callable[[], None] = lambda: None) -> float:
    """The best of a few."""
    best = float("inf")
    for _ in range(5):
        wait()
        start = time.perf_counter()
        call()
        wait()
        best = min(best, time.perf_counter() - start)
    return best
