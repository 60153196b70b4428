"""The estimate of a job's time against what was measured (jobs/bench/RESULTS.md), and what it makes of shared prefixes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny_checkpoint
from quantized_models import awq_pair, compressed_pair, gptq_pair

from engine.config import EngineConfig
from engine.engine import Engine
from engine.memory import page_bytes
from engine.models.spec import ModelError, ModelSpec
from engine.weights import open_checkpoint
from pipeline.estimate import H100, Device, ModelSize, Workload, fresh_tokens, seconds, this_device
from pipeline.exits import ConfigError

H200 = Device("H200", "cuda", 690e12, 4.41e12, 130e9, 0.0012, 2048)
MISTRAL = ModelSize(7_110_000_000, 14_500_000_000, 2 * 2 * 32 * 8 * 128)
SMOLLM2 = ModelSize(134_000_000, 269_000_000, 2 * 2 * 30 * 3 * 64)
MISTRAL_CONFIG = {
    "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "max_position_embeddings": 32768, "sliding_window": None,
    "torch_dtype": "float16"}
AWQ = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}}
FP8 = EngineConfig(quantization="fp8", kv_dtype="fp8")


@pytest.mark.parametrize("size, work, measured", [
    (MISTRAL, Workload(1024, 562, 562, 562), 1024 * 562 / 10_760),      # W1
    (MISTRAL, Workload(50, 128, 128, 256), 50 * 256 / 8_450),           # W2
    (MISTRAL, Workload(2048, 950, 150, 60), 2048 * 60 / 9_085),         # W3
    (MISTRAL, Workload(1, 128, 128, 512), 512 / 224),                   # W5
    (SMOLLM2, Workload(1024, 562, 562, 562), 1024 * 562 / 117_412),     # W1
    (SMOLLM2, Workload(2048, 950, 150, 60), 2048 * 60 / 153_000),       # W3
    (SMOLLM2, Workload(512, 2048, 2048, 128), 512 * 128 / 31_660),      # W4
    (SMOLLM2, Workload(1, 128, 128, 512), 512 / 1_007),                 # W5
])
def test_the_estimate_is_near_what_was_measured(size: ModelSize, work: Workload, measured: float) -> None:
    guess = seconds(size, H200, work)
    print(f"{guess:.2f} s, measured {measured:.2f} s")
    assert 0.6 < guess / measured < 1.7


@pytest.mark.parametrize("stored, config, gib, token, measured", [
    (AWQ, EngineConfig(), 3.89, 131_072, (9_884, 10_012, 383.9)),
    ({}, FP8, 6.99, 65_536, (16_207, 9_226, 279.0)),
])
def test_quantized_weights_and_keys_count_as_they_are_kept(stored: dict[str, Any], config: EngineConfig, gib: float, token: int,
                                                           measured: tuple[float, ...]) -> None:
    """W1, W2 and W5 on an H100, in tokens/s."""
    size = ModelSize.of(ModelSpec.from_hf(MISTRAL_CONFIG | stored), config, "cuda")
    assert (size.weights / 2**30, size.token) == (pytest.approx(gib, rel=0.01), token)
    works = (Workload(1024, 562, 562, 562), Workload(50, 128, 128, 256), Workload(1, 128, 128, 512))
    for work, rate in zip(works, measured, strict=True):
        assert 0.6 < seconds(size, H100, work) / (work.rows * work.output / rate) < 1.7


CONFIGS = {"plain": EngineConfig(), "16 bits": EngineConfig(dtype="bfloat16"), "made fp8": FP8}
FP8_WEIGHTS = {"type": "float", "num_bits": 8, "symmetric": True, "strategy": "channel"}
STORED: dict[str, Callable[[Path], tuple[Path, Path]]] = {
    "awq": awq_pair, "gptq": lambda folder: gptq_pair(folder, symmetric=False),
    "gptq-8": lambda folder: gptq_pair(folder, bits=8, symmetric=False),
    "fp8": lambda folder: compressed_pair(folder, FP8_WEIGHTS, {**FP8_WEIGHTS, "strategy": "token", "dynamic": True}),
}


@pytest.mark.parametrize("case", [*CONFIGS, *STORED])
def test_the_size_is_that_of_the_loaded_model(case: str, tmp_path: Path) -> None:
    folder = STORED[case](tmp_path)[0] if case in STORED else tiny_checkpoint("llama", tmp_path)
    checkpoint, config = open_checkpoint(folder), replace(CONFIGS.get(case, EngineConfig()), device="cpu", kv_pages=20)
    engine, size = Engine(checkpoint, config), ModelSize.of(checkpoint.spec, config, "cpu")
    assert size.weights == pytest.approx(engine.weight_bytes, rel=0.03)
    assert size.token == page_bytes(engine._runner.model, 32) / 32


@pytest.mark.parametrize("kind, bits", [("Q4_0", 4.5), ("Q4_K", 5.0), ("Q6_K", 9.0), ("Q8_0", 8.5)])
def test_gguf_blocks_count_as_they_are_kept(kind: str, bits: float) -> None:
    """As integers on a GPU, unpacked on the CPU and where engine.quantization asks for it."""
    spec = ModelSpec.from_hf(MISTRAL_CONFIG)
    types = dict.fromkeys((name for name, _, _ in spec.linears()), kind)
    spec = ModelSpec.from_hf(MISTRAL_CONFIG | {"quantization_config": {"quant_method": "gguf", "types": types}})
    linears = sum(inputs * outputs for _, inputs, outputs in spec.linears())
    plain = 2 * 32000 * 4096

    def of(device: str, quantization: str = "stored") -> int:
        return ModelSize.of(spec, EngineConfig(dtype="bfloat16", quantization=quantization), device).weights - 2 * plain

    assert [of("cuda") * 8 / linears, of("cuda", "dense") * 8 / linears, of("cpu") * 8 / linears] == [bits, 16, 16]


def test_weights_that_cannot_become_fp8_are_one_line() -> None:
    with pytest.raises(ModelError, match=r"^engine\.quantization=fp8 needs plain weights, and the model's are awq"):
        ModelSize.of(ModelSpec.from_hf(MISTRAL_CONFIG | AWQ), FP8, "cuda")


def test_the_cpu_keeps_keys_and_values_beside_the_weights() -> None:
    """A model larger than engine.cpu_kv_gib runs as many rows at once as a smaller one."""
    device = Device("CPU", "cpu", 1e15, 1e15, 2 << 30, 1.0, 32)
    work = Workload(64, 10, 10, 10)
    assert seconds(MISTRAL, device, work) == pytest.approx(20, rel=0.05)       # two rounds of ten steps


def test_unpacked_copies_of_packed_weights_take_their_share() -> None:
    """All that there is room for on a small GPU, each once on a large one, none of plain weights."""
    packed, plain = (ModelSize.of(ModelSpec.from_hf(MISTRAL_CONFIG | more), EngineConfig(), "cuda") for more in (AWQ, {}))
    assert (packed.copies / 2**30, plain.copies) == (pytest.approx(13.0, rel=0.01), 0)
    work = Workload(10**6, 100, 100, 100)

    def steps(size: ModelSize, room: float, share: float) -> float:
        return seconds(size, Device("GPU", "cuda", 1e18, 1e18, size.weights + room, 1.0, 10**6, share), work)

    assert steps(packed, 2e9, 0.5) == pytest.approx(2 * steps(packed, 2e9, 0), rel=0.01)
    assert steps(packed, 1e11, 0.5) == pytest.approx(steps(packed, 1e11 - packed.copies, 0), rel=0.01)
    assert steps(plain, 2e9, 0.5) == steps(plain, 2e9, 0)


def test_a_prefix_is_counted_once() -> None:
    stem = list(range(100))
    prompts = [np.array([*stem, *own], dtype=np.int32) for own in ([1, 2, 3], [1, 2, 4, 5], [9])]
    assert fresh_tokens(prompts) == 103 + 2 + 1
    assert fresh_tokens(prompts[:1] * 5) == 103 + 4


def test_a_device_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"^engine\.device=cuda: torch sees no such device here; .* set engine\.device=cpu$"):
        this_device(EngineConfig(device="cuda"))
