"""A checkpoint of random weights in the shape of a config.json, made on the device: for measuring speed without a download."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from engine.models.spec import ModelSpec
from engine.weights import Checkpoint


class RandomCheckpoint(Checkpoint):
    """Weights drawn from N(0, 0.02^2); norm weights are 1. Shapes follow Hugging Face's names."""

    def __init__(self, folder: Path, device: str) -> None:
        self.path, self.files, self.config = folder, [], json.loads((folder / "config.json").read_text())
        self.spec, self._device = ModelSpec.from_hf(self.config), device
        spec = self.spec
        h, wide = spec.hidden_size, spec.intermediate_size
        q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self._shapes = {"embed_tokens": (spec.vocab_size, h), "lm_head": (spec.vocab_size, h),
                        "q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, q),
                        "gate_proj": (wide, h), "up_proj": (wide, h), "down_proj": (h, wide),
                        "q_norm": (spec.head_dim,), "k_norm": (spec.head_dim,)}

    def tensor(self, name: str) -> torch.Tensor:
        *_, module, kind = name.split(".")
        if module.endswith("norm"):
            return torch.ones(self._shapes.get(module, (self.spec.hidden_size,)), device=self._device)
        shape = self._shapes[module]
        if kind == "bias":
            return torch.zeros(shape[0], device=self._device)
        return torch.empty(shape, dtype=torch.bfloat16, device=self._device).normal_(std=0.02)
