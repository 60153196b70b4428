"""Tiny checkpoints of every weight format, each beside a plain one that holds what its weights stand for."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from models import tiny_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Of sizes that groups and blocks of 128 divide.
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2}

Converted = tuple[dict[str, Tensor], Tensor]        # the stored tensors of one layer by their last name, and its weight float32
Convert = Callable[[str, Tensor], Converted]


def quantized_pair(folder: Path, config: dict[str, Any], convert: Convert, family: str = "llama", skip: Sequence[str] = (),
                   **overrides: Any) -> tuple[Path, Path]:
    """Write a tiny model with its linear layers converted, but for those whose name holds one of `skip`, and the plain one."""
    plain = tiny_checkpoint(family, folder, **{**SHAPE, **overrides})
    tensors, dense = load_file(plain / "model.safetensors"), {}
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        if layer.endswith(LINEARS) and name.endswith(".weight") and not any(part in layer for part in skip):
            parts, tensor = convert(layer, tensor)
            stored |= {f"{layer}.{part}": value.contiguous() for part, value in parts.items()}
            dense[name] = tensor
        else:
            stored[name] = dense[name] = tensor
    folder = plain.with_name(plain.name + "-quantized")
    folder.mkdir()
    for path in plain.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            (folder / path.name).write_bytes(path.read_bytes())
    settings = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": config}))
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    save_file(dense, plain / "model.safetensors", {"format": "pt"})
    return folder, plain


def round_to_grid(weight: Tensor, bits: int, group: int, symmetric: bool, g_idx: Tensor | None = None) -> tuple[Tensor, ...]:
    """Round-to-nearest: codes [N, K], scales (float16 values) and zeros [N, G], the weight they stand for [N, K]; all float32."""
    n, k = weight.shape
    size = k if group == -1 else group
    g_idx = torch.arange(k) // size if g_idx is None else g_idx
    top, scales, zeros = (1 << bits) - 1, torch.empty(n, k // size), torch.empty(n, k // size)
    for g in range(k // size):
        part = weight[:, g_idx == g]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if symmetric:
            scales[:, g] = torch.maximum(-low, high) * 2 / top
            zeros[:, g] = 1 << (bits - 1)
        else:
            scales[:, g] = (high - low) / top
            zeros[:, g] = torch.round(-low / scales[:, g])
    scales = scales.half().float()
    zeros = zeros.clamp(0, top)
    codes = torch.round(weight / scales[:, g_idx] + zeros[:, g_idx]).clamp(0, top)
    return codes, scales, zeros, (codes - zeros[:, g_idx]) * scales[:, g_idx]


def pack_words(fields: Tensor, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """Integers [R, C] into int32 words along the last dimension, lowest bits first; order[i]: which of a word's is the i-th."""
    per = 32 // bits
    grouped = fields.long().view(fields.shape[0], -1, per)[..., list(order or range(per))]
    words = (grouped << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def awq_layer(codes: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
    """As autoawq's WQLinear_GEMM stores it (test_packed_layers compares)."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {"qweight": pack_words(codes.t(), 4, order), "qzeros": pack_words(zeros.t(), 4, order), "scales": scales.t().half()}


def gptq_layer(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, v2: bool, g_idx: Tensor) -> dict[str, Tensor]:
    """As AutoGPTQ and gptqmodel store it (test_packed_layers compares); v2: zero points as they are, else less one."""
    one = 0 if v2 else 0x11111111 if bits == 4 else 0x01010101
    return {"qweight": pack_words(codes, bits).t(),
            "qzeros": pack_words(zeros.t(), bits) - one, "scales": scales.t().half(), "g_idx": g_idx.int()}


def awq_pair(folder: Path, group: int = 32, **more: Any) -> tuple[Path, Path]:
    def convert(name: str, weight: Tensor) -> Converted:
        codes, scales, zeros, dense = round_to_grid(weight, 4, group, symmetric=False)
        return awq_layer(codes, scales, zeros), dense

    skip = more.get("skip")
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm",
              "modules_to_not_convert": skip}
    return quantized_pair(folder, config, convert, **more)


def gptq_pair(folder: Path, bits: int = 4, group: int = 32, symmetric: bool = True, ordered: bool = False, v2: bool = False,
              **more: Any) -> tuple[Path, Path]:
    def convert(name: str, weight: Tensor) -> Converted:
        k = weight.shape[1]
        g_idx = torch.arange(k) // (k if group == -1 else group)
        if ordered:         # one order for all layers that read the same inputs
            g_idx = g_idx[torch.randperm(k, generator=torch.Generator().manual_seed(k))]
        codes, scales, zeros, dense = round_to_grid(weight, bits, group, symmetric, g_idx)
        return gptq_layer(codes, scales, zeros, bits, v2, g_idx), dense

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": ordered,
              "checkpoint_format": "gptq_v2" if v2 else "gptq"}
    return quantized_pair(folder, config, convert, **more)


def compressed_pair(folder: Path, weights: dict[str, Any], inputs: dict[str, Any] | None = None, input_scale: float = 0.02,
                    **more: Any) -> tuple[Path, Path]:
    """compressed-tensors' own compression of weights, args as its QuantizationArgs; input_scale: of static inputs."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights),
                                input_activations=QuantizationArgs(**inputs) if inputs else None)
    stored = "pack-quantized" if weights["type"] == "int" else "float-quantized"
    compressor = BaseCompressor.get_value_from_registry(stored)
    static = inputs is not None and not inputs.get("dynamic")

    def convert(name: str, weight: Tensor) -> Converted:
        n, k = weight.shape
        match weights["strategy"]:
            case "tensor":
                parts = weight.reshape(1, 1, -1)
            case "channel":
                parts = weight[:, None]
            case "group":
                parts = weight.view(n, -1, weights["group_size"])
            case "block":
                parts = weight.view(n // 128, 128, k // 128, 128).transpose(1, 2).flatten(2)
        scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), scheme.weights)
        if weights["strategy"] == "tensor":
            scale, zero = scale.view(1), zero.view(1)
        state = compressor.compress({"weight": weight, "weight_scale": scale, "weight_zero_point": zero}, scheme)
        dense = compressor.decompress(state, scheme)["weight"]
        return {**state, **({"input_scale": torch.tensor([input_scale])} if static else {})}, dense

    plain = ["lm_head", *(f"re:.*{part}" for part in more.get("skip", ()))]
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=plain, format=stored, quantization_status="compressed")
    return quantized_pair(folder, json.loads(config.model_dump_json()), convert, **more)
