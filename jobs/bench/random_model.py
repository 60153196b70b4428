"""A checkpoint of random weights in the shape of a config.json, made on the device: for measuring speed without a download."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from engine.layers.linear import ParamSpec
from engine.layers.quantized import linear_methods
from engine.models.spec import ModelSpec
from engine.weights import Checkpoint

STD = 0.02
FP8_SCALE = STD / 100        # puts weights well inside the range of float8_e4m3fn


class RandomCheckpoint(Checkpoint):
    """Weights drawn from N(0, 0.02^2), or random codes with scales that make them as large; norm weights are 1.

    Names and shapes are Hugging Face's, the linear layers' those of the config's quantization.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self.path, self.files, self.config = folder, [], json.loads((folder / "config.json").read_text())
        self.spec, self._device = ModelSpec.from_hf(self.config), device
        spec = self.spec
        self._symmetric = self.config.get("quantization_config", {}).get("sym", False)
        self._norms = {"q_norm": spec.head_dim, "k_norm": spec.head_dim}
        self._linears = {name: (inputs, outputs) for name, inputs, outputs in spec.linears()}
        self._method_of = linear_methods(spec, "stored", torch.device(device))

    def has(self, name: str) -> bool:
        return False            # of what a model may have and may be without

    def tensor(self, name: str) -> torch.Tensor:
        layer, _, kind = name.rpartition(".")
        if layer in self._linears:
            inputs, outputs = self._linears[layer]
            specs = self._method_of(layer).specs(inputs, outputs, True, torch.bfloat16)
            return self._parameter(kind, specs)
        if layer.endswith("norm"):
            return torch.ones(self._norms.get(layer.rpartition(".")[2], self.spec.hidden_size), device=self._device)
        return self._normal((self.spec.vocab_size, self.spec.hidden_size)).to(torch.bfloat16)

    def _parameter(self, kind: str, specs: dict[str, ParamSpec]) -> torch.Tensor:
        shape, dtype, device = specs[kind].shape, specs[kind].dtype, self._device
        eight_bits = self.config.get("quantization_config", {}).get("bits") == 8
        if kind == "bias":
            return torch.zeros(shape, device=device)
        if kind == "g_idx":                                     # one order for all layers of these inputs, as calibration gives
            order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(shape[0]))
            return (order % specs["scales"].shape[0]).int().to(device)
        if kind == "qzeros" and self._symmetric:                # the middle code, stored less one
            return torch.full(shape, 0x7F7F7F7F if eight_bits else 0x77777777, dtype=torch.int32, device=device)
        if dtype == torch.int32:
            return torch.randint(-(1 << 31), 1 << 31, shape, dtype=torch.int32, device=device)
        if dtype == torch.float8_e4m3fn:
            return (self._normal(shape) / FP8_SCALE).to(torch.float8_e4m3fn)
        if kind == "weight":
            return self._normal(shape).to(torch.bfloat16)
        if kind == "input_scale":
            return torch.full(shape, 0.02, device=device)
        if "weight" in specs:
            return torch.full(shape, FP8_SCALE, device=device)
        return torch.full(shape, STD / (74 if eight_bits else 4.6), dtype=torch.float16, device=device)   # of uniform codes

    def _normal(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, device=self._device).normal_(std=STD)
