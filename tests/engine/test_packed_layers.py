"""Layers packed by autoawq, AutoGPTQ and gptqmodel themselves (tests/make_packed_layers.py) stand for the weights they say."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from quantized_models import awq_layer, gptq_layer
from safetensors import safe_open

from engine.layers.linear import Linear
from engine.layers.quantized import linear_methods
from engine.models.quantization import Quantization

FILE = Path(__file__).parents[1] / "packed_layers.safetensors"
with safe_open(FILE, "pt") as opened:
    CONFIGS = json.loads(opened.metadata()["configs"])
    TENSORS = {name: opened.get_tensor(name) for name in opened.keys()}     # noqa: SIM118 (it is no mapping)
NAME = "model.layers.0.mlp.up_proj"
CPU = torch.device("cpu")


def loaded(case: str, dtype: torch.dtype = torch.float32) -> Linear:
    tensors = {name.removeprefix(f"{case}."): tensor for name, tensor in TENSORS.items() if name.startswith(f"{case}.")}
    checkpoint = SimpleNamespace(has=lambda name: name.removeprefix(f"{NAME}.") in tensors,
                                 tensor=lambda name: tensors[name.removeprefix(f"{NAME}.")])
    method = linear_methods(SimpleNamespace(quantization=Quantization.read(CONFIGS[case])), "stored", CPU)(NAME)
    n, k = tensors["weight"].shape
    layer = Linear(k, [(NAME, n)], bias="bias" in tensors, dtype=dtype, method=method)
    layer.load(checkpoint)
    return layer


@pytest.mark.parametrize("case", CONFIGS)
def test_weights(case: str) -> None:
    layer, want = loaded(case), TENSORS[f"{case}.weight"]
    bias = TENSORS.get(f"{case}.bias")
    got = layer(torch.eye(want.shape[1])) - (0 if bias is None else bias.float())
    assert want.unique().numel() > 100
    if bias is None:
        assert torch.equal(got.t().half(), want)        # one rounding of the exact product, as the library's
    else:
        torch.testing.assert_close(got.t(), want.float(), rtol=1e-3, atol=1e-6)
    assert {tensor.dtype for name, tensor in layer.named_buffers() if name in ("scales", "bias")} == {torch.float32}


@pytest.mark.parametrize("case", CONFIGS)
def test_symmetric_zeros_are_not_kept(case: str) -> None:
    assert (loaded(case).zeros is None) == CONFIGS[case].get("sym", False)


def test_order_of_the_columns() -> None:
    assert loaded("gptq-4-32-ordered").perm is not None
    assert loaded("gptq-4-32-sym").perm is None


def test_products_in_half_precision() -> None:
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    for case in CONFIGS:
        want = x.half().double() @ TENSORS[f"{case}.weight"].double().t() + TENSORS.get(f"{case}.bias", torch.zeros(1)).double()
        got = loaded(case, torch.float16)(x.half())
        assert got.dtype == torch.float16
        assert (got.double() - want).abs().max() < 2e-3 * want.abs().max(), case


@pytest.mark.parametrize("case", CONFIGS)
def test_the_packing_of_our_tiny_models_is_theirs(case: str) -> None:
    config, size = CONFIGS[case], 128
    group = size if config["group_size"] == -1 else config["group_size"]
    scales = TENSORS[f"{case}.scales"].float().t()
    zeros = loaded(case).zeros
    zeros = torch.full_like(scales, 1 << (config["bits"] - 1)) if zeros is None else zeros
    g_idx = TENSORS.get(f"{case}.g_idx", torch.arange(size) // group)
    codes = torch.round(TENSORS[f"{case}.weight"].float() / scales[:, g_idx.long()] + zeros[:, g_idx.long()])
    if config["quant_method"] == "awq":
        stored = awq_layer(codes, scales, zeros)
    else:
        stored = gptq_layer(codes, scales, zeros, config["bits"], config.get("checkpoint_format") == "gptq_v2", g_idx)
    for name, tensor in stored.items():
        assert torch.equal(tensor, TENSORS[f"{case}.{name}"]), name
