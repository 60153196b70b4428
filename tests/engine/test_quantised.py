"""Models with quantised weights: their logits are those of the weights stood for, and what is not supported is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_cases import finish, full_logits, load_decoder, make_requests, random_prompts, running
from models import load_reference
from quantised_models import awq_pair, gptq_pair
from safetensors.torch import load_file

from engine.config import EngineConfig
from engine.engine import Engine
from engine.layers.linear import Joined, Linear
from engine.request import SamplingParams
from engine.weights import open_checkpoint

PROMPT = random_prompts(1, seed=2, shortest=60, longest=60)[0]
INTEGER = {
    "awq-32": lambda folder: awq_pair(folder),
    "awq-128": lambda folder: awq_pair(folder, group=128),
    "awq-bias": lambda folder: awq_pair(folder, family="qwen2"),
    "awq-skip": lambda folder: awq_pair(folder, skip=["model.layers.1", "v_proj"]),
    "gptq-sym": lambda folder: gptq_pair(folder),
    "gptq-128": lambda folder: gptq_pair(folder, group=128, symmetric=False),
    "gptq-ordered": lambda folder: gptq_pair(folder, symmetric=False, ordered=True),
    "gptq-8": lambda folder: gptq_pair(folder, bits=8, group=-1),
    "gptq-v2": lambda folder: gptq_pair(folder, symmetric=False, v2=True),
    "gptq-8-ordered": lambda folder: gptq_pair(folder, bits=8, symmetric=False, ordered=True, family="qwen3"),
}


def reference_logits(model: Path) -> torch.Tensor:
    with torch.inference_mode():
        return load_reference(model)(torch.tensor([PROMPT])).logits[0]


@pytest.mark.parametrize("case", INTEGER)
def test_logits_are_those_of_the_weights_stood_for(case: str, tmp_path: Path) -> None:
    """Prefill and decode in float32, against transformers on the plain twin."""
    quantised, plain = INTEGER[case](tmp_path)
    decoder, want = load_decoder(quantised, torch.float32), reference_logits(plain)
    for decode in (0, 20):
        assert (full_logits(decoder, PROMPT, decode) - want).abs().max() < 1e-4 * want.std()


@pytest.mark.parametrize("case", ["awq-32", "gptq-ordered", "gptq-8"])
def test_every_layer(case: str, tmp_path: Path) -> None:
    """Each linear layer's product against float64, parts merged as they are."""
    quantised, plain = INTEGER[case](tmp_path)
    weights, layers = load_file(plain / "model.safetensors"), 0
    for layer in load_decoder(quantised, torch.float32).modules():
        if isinstance(layer, Linear):
            weight = torch.cat([weights[f"{source}.weight"] for source, _ in layer.sources])
            x = torch.randn(7, layer.in_features, generator=torch.Generator().manual_seed(layers))
            want = x.double() @ weight.double().t()
            assert (layer(x).double() - want).abs().max() < 1e-5 * want.std()
            layers += 1
    assert layers == 8


def test_parts_that_differ_stand_side_by_side(tmp_path: Path) -> None:
    quantised, _ = awq_pair(tmp_path, skip=["v_proj", "model.layers.1"])
    blocks = load_decoder(quantised, torch.float32).blocks
    assert isinstance(blocks[0].attention.qkv, Joined)
    assert [[source.rpartition(".")[2] for source, _ in part.sources] for part in blocks[0].attention.qkv.parts] == [
        ["q_proj", "k_proj"], ["v_proj"]]
    assert isinstance(blocks[1].attention.qkv, Linear) and hasattr(blocks[1].attention.qkv, "weight")


def test_the_engine_runs_them_and_says_what_they_take(tmp_path: Path) -> None:
    said: list[str] = []
    quantised, plain = awq_pair(tmp_path, group=128)
    tokens, taken = {}, {}
    for model in (quantised, plain):
        with running(model) as engine:
            done = finish(engine, make_requests([PROMPT], SamplingParams(max_tokens=8, ignore_eos=True)))
            tokens[model], taken[model] = done[0].tokens.tolist(), engine.weight_bytes
    assert tokens[quantised] == tokens[plain]
    spec = open_checkpoint(plain).spec
    weights = sum(inputs * outputs for _, inputs, outputs in spec.linears())
    kept = weights // 2 + weights // 128 * 8            # codes; float32 scales and zeros
    assert taken[plain] - taken[quantised] == weights * 4 - kept
    Engine(open_checkpoint(quantised), EngineConfig(device="cpu", max_model_len=64), progress=said.append).close()
    assert f"weights {taken[quantised] / 2**30:.2f} GiB" in said
