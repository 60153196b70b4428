"""Keys and values as FP8: the model's logits, its scales and the engine's memory, on the CPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import finish, full_logits, load_decoder, mixed_requests, running, tokens_of
from models import tiny_checkpoint
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig
from engine.engine import _check_fp8
from engine.memory import page_bytes
from engine.models.errors import ModelError
from engine.weights import open_checkpoint
from kernels import ops, ref

PROMPT = torch.randint(0, 200, (90,), generator=torch.Generator().manual_seed(0)).tolist()


def rope_and_rounded_cache(*inputs: Any) -> torch.Tensor:
    """ref.rope_and_cache that rounds what is in a float32 cache to e4m3."""
    q = ref.rope_and_cache(*inputs)
    for cache in inputs[8:10]:
        cache.copy_(cache.to(torch.float8_e4m3fn))
    return q


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_logits_are_those_of_rounded_keys_and_values(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_checkpoint(family, tmp_path)
    model, plain = (load_decoder(path, torch.float32, fp8_kv=fp8) for fp8 in (True, False))
    got, decoded = full_logits(model, PROMPT), full_logits(model, PROMPT, decode=60)
    monkeypatch.setattr(ops, "rope_and_cache", rope_and_rounded_cache)
    want = full_logits(plain, PROMPT)
    assert float((got - want).norm() / want.norm()) < 1e-5
    # Where the last bit of a float32 differs, a number may be rounded the other way.
    assert float((decoded - want).norm() / want.norm()) < 2e-2
    assert 4 * page_bytes(model, 16) == page_bytes(plain, 16)


def with_tensors(path: Path, **tensors: torch.Tensor) -> Path:
    """The checkpoint with these as tensors of the first layer's attention too."""
    file = path / "model.safetensors"
    added = {f"model.layers.0.self_attn.{name.replace('__', '.')}": tensor for name, tensor in tensors.items()}
    save_file(load_file(file) | added, file)
    return path


def scales(path: Path) -> torch.Tensor:
    return load_decoder(path, torch.float32, fp8_kv=True).make_cache(1, 16).layers[0].scales


def test_scales_are_the_checkpoints_where_it_has_them(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path)
    heads = load_decoder(path, torch.float32).spec.num_kv_heads
    assert torch.equal(scales(path), torch.ones(2, heads))
    each = torch.arange(1.0, heads + 1)
    with_tensors(path, k_scale=each, v_proj__v_scale=torch.tensor([0.5]))
    assert torch.equal(scales(path), torch.stack([each, torch.full((heads,), 0.5)]))
    with_tensors(path, k_scale=torch.zeros(1))
    with pytest.raises(ModelError, match=r"k_scale .* must be one positive number"):
        scales(path)


def test_large_biases_of_keys_stay_in_range(tmp_path: Path) -> None:
    path = tiny_checkpoint("qwen2", tmp_path)
    spec = load_decoder(path, torch.float32).spec
    bias = torch.zeros(spec.num_kv_heads, spec.head_dim)
    bias[0, 0], bias[0, spec.head_dim // 2] = 300.0, -400.0       # turned against each other, a radian a token: 500
    with_tensors(path, k_proj__bias=bias.flatten())
    model = load_decoder(path, torch.float32, fp8_kv=True)
    cache = model.make_cache(1, 16).layers[0]
    assert cache.scales[0, 0] == pytest.approx(1000 / 448, rel=0.05)
    assert cache.scales.flatten()[1:].tolist() == [1.0] * (2 * spec.num_kv_heads - 1)
    assert bool(full_logits(model, PROMPT).isfinite().all())


def test_a_scale_of_the_checkpoint_leaves_what_remains_of_a_bias_in_range(tmp_path: Path) -> None:
    path = tiny_checkpoint("qwen2", tmp_path)
    spec = load_decoder(path, torch.float32).spec
    bias = torch.zeros(spec.num_kv_heads, spec.head_dim)
    bias[0, 0] = 500.0
    with_tensors(path, k_proj__bias=bias.flatten(), k_scale=torch.full((spec.num_kv_heads,), 1.5))
    found = scales(path)
    assert found[0, 0] == pytest.approx(1000 / 448, rel=0.05) and found[0, 1:].tolist() == [1.5] * (spec.num_kv_heads - 1)


def test_what_all_keys_have_in_common_is_not_stored(tmp_path: Path) -> None:
    """A bias of hundreds where the rotary embedding turns slowly, as Qwen2 has: rounded with it, keys would be alike."""
    path = tiny_checkpoint("qwen2", tmp_path, rope_theta=1e7)
    spec = load_decoder(path, torch.float32).spec
    half = spec.head_dim // 2
    bias = torch.zeros(spec.num_kv_heads, spec.head_dim)
    bias[:, half - 1], bias[:, -1] = 400.0, -400.0
    with_tensors(path, k_proj__bias=bias.flatten())
    model, plain = (load_decoder(path, torch.float32, fp8_kv=fp8) for fp8 in (True, False))

    shift, turned = model.kv_scales[0].k_shift, torch.zeros(spec.num_kv_heads, spec.head_dim)
    for cos, sin in zip(*model.cos_sin[0].chunk(2, dim=-1), strict=True):
        turned[:, :half] += bias[:, :half] * cos - bias[:, half:] * sin
        turned[:, half:] += bias[:, half:] * cos + bias[:, :half] * sin
    torch.testing.assert_close(shift, turned / len(model.cos_sin[0]), rtol=1e-4, atol=1e-3)

    def off(decode: int) -> float:
        want = full_logits(plain, PROMPT, decode)
        return float((full_logits(model, PROMPT, decode) - want).norm() / want.norm())

    with_shift = off(0), off(60)
    model.kv_scales[0].k_shift, model.kv_scales[0].scales[0] = None, 2 * 566 / 448
    assert with_shift[0] == pytest.approx(with_shift[1], rel=0.01)
    assert off(0) > 2 * with_shift[0]


def test_engine_gives_the_same_tokens_however_it_runs(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path)
    outputs = []
    for config in ({"depth": 1}, {"depth": 2}, {"depth": 2, "prefix_sharing": False, "max_step_tokens": 24}):
        with running(path, kv_dtype="fp8", **config) as engine:
            outputs.append(tokens_of(finish(engine, mixed_requests(12))))
    assert outputs[0] == outputs[1] == outputs[2]


def test_twice_the_pages_of_16_bits_fit(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path)
    pages = {}
    for kind in ("auto", "fp8"):
        with running(path, dtype="bfloat16", kv_dtype=kind, cpu_kv_gib=0.002, max_rows=64) as engine:
            pages[kind] = engine.stats().kv_pages_total
    assert pages["fp8"] - 2 * pages["auto"] in (0, 1, 2)


def test_other_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"engine\.kv_dtype=int4: give auto or fp8"):
        dataclasses.replace(EngineConfig(), kv_dtype="int4")


@pytest.mark.parametrize("config, what", [({"kv_dtype": "fp8"}, "kv_dtype=fp8"), ({"quantization": "fp8"}, "quantization=fp8")])
def test_gpus_without_fp8_are_refused(config: dict[str, str], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = open_checkpoint(tiny_checkpoint("llama", tmp_path)).spec
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=rf"engine\.{what}: FP8 needs a GPU of compute capability 8\.9 .* has 8\.0; leave it at"):
        _check_fp8(EngineConfig(**config), spec, torch.device("cuda"))
    _check_fp8(EngineConfig(), spec, torch.device("cuda"))
    _check_fp8(EngineConfig(**config), spec, torch.device("cpu"))
