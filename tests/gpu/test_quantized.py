"""Layers of quantised models on the GPU against the same ones on the CPU, and whole engines with CUDA graphs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_cases import finish, load_decoder, make_requests, random_prompts, running
from models import tiny_checkpoint
from quantized_models import SHAPE, awq_pair, gptq_pair

from engine.layers.gguf import GgufMethod
from engine.layers.linear import Linear
from engine.models.quantization import GGUF_KEPT
from engine.request import SamplingParams

if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)

HEAD = {"head_dim": 64}      # a head size that real models have
CASES = {
    "awq-32": lambda folder: awq_pair(folder, **HEAD)[0],
    "awq-128": lambda folder: awq_pair(folder, group=128, **HEAD)[0],
    "awq-bias": lambda folder: awq_pair(folder, family="qwen2", skip=["v_proj"], **HEAD)[0],
    "gptq": lambda folder: gptq_pair(folder, group=128, **HEAD)[0],
    "gptq-ordered": lambda folder: gptq_pair(folder, symmetric=False, ordered=True, **HEAD)[0],
    "gptq-8": lambda folder: gptq_pair(folder, bits=8, group=-1, **HEAD)[0],
    "fp8": lambda folder: tiny_checkpoint("llama-bias", folder, **SHAPE | HEAD),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_every_layer(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """From one token to a long prefill. The CPU computes in float32, from inputs and with scales rounded to the GPU's dtype."""
    model, how = CASES[case](tmp_path), "fp8" if case == "fp8" else "stored"
    expected, got = (load_decoder(model, dtype, device, how) for device in ("cpu", "cuda"))
    for a, b in zip(expected.modules(), got.modules(), strict=True):
        if isinstance(a, Linear):
            for name, tensor in a.named_buffers():
                if tensor.dtype == dtype:
                    a.register_buffer(name, tensor.float(), persistent=False)
            for rows in (1, 5, 33, 700):
                x = torch.randn(rows, a.in_features, generator=torch.Generator().manual_seed(rows)).to(dtype)
                want = a(x.float())
                # FP8's sums are as exact as the others', but a tie of a last bit may be rounded the other way.
                close = (0.02 if dtype == torch.float16 else 0.05) * want.std()
                assert (b(x.cuda()).cpu().float() - want).abs().max() < close, (a.sources, rows)
                if b.method.packs:
                    b.keep_unpacked()
                    assert (b(x.cuda()).cpu().float() - want).abs().max() < close, (a.sources, rows, "unpacked")
                    b.unpacked = None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", GGUF_KEPT)
def test_gguf_blocks(name: str, dtype: torch.dtype) -> None:
    """Random blocks with scales of 1 / 64, unpacked on either device."""
    method, gen = GgufMethod.of(name), torch.Generator().manual_seed(0)
    outputs, inputs = 192, 512
    blocks = torch.randint(0, 256, (outputs * inputs // method.kind.weights, method.kind.bytes), dtype=torch.uint8, generator=gen)
    for at in {"Q6_K": [208], "Q4_K": [0, 2]}.get(name, [0]):
        blocks[:, at : at + 2] = torch.tensor([1 / 64], dtype=torch.float16).view(torch.uint8)
    packed = blocks.view(outputs, -1)
    layers = []
    for device in ("cpu", "cuda"):
        with torch.device(device):
            layers.append(Linear(inputs, [("layer", outputs)], bias=False, dtype=dtype, method=method))
        layers[-1].load(SimpleNamespace(has=lambda tensor: tensor == "layer.blocks", tensor=lambda tensor: packed))
    for rows in (1, 33, 700):
        x = torch.randn(rows, inputs, generator=gen).to(dtype)
        want = layers[0](x).float()
        close = (0.02 if dtype == torch.float16 else 0.05) * want.std()
        assert (layers[1](x.cuda()).cpu().float() - want).abs().max() < close, rows
        layers[1].keep_unpacked()
        assert (layers[1](x.cuda()).cpu().float() - want).abs().max() < close, (rows, "unpacked")
        layers[1].unpacked = None


@pytest.mark.parametrize("case", CASES)
def test_graphs_give_what_eager_steps_give(case: str, tmp_path: Path) -> None:
    model, how = CASES[case](tmp_path), "fp8" if case == "fp8" else "stored"
    prompts, params = random_prompts(6, seed=1, shortest=5, longest=40), SamplingParams(max_tokens=12, ignore_eos=True)
    tokens = []
    for graphs in (True, False):
        with running(model, device="cuda", dtype="auto", quantization=how, cuda_graphs=graphs, gpu_memory=0.5) as engine:
            done = finish(engine, make_requests(prompts, params))
            tokens.append([done[i].tokens.tolist() for i in range(len(prompts))])
            assert (engine.stats().graph_steps > 0) == graphs
            assert (engine._runner.model.unpacked_bytes() > 0) == (case != "fp8")
    same = sum(a == b for row, other in zip(*tokens, strict=True) for a, b in zip(row, other, strict=True))
    assert same > 0.5 * sum(map(len, tokens[0]))        # a near tie that falls the other way changes the rest of a row
