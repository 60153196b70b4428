"""A model folder as Hugging Face lays it out: safetensors in shards, their index, config.json, generation_config.json."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.models.spec import ModelError, text_config
from engine.weights import Checkpoint

_SHARD_BYTES = 4 << 30
_CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
            "qwen3": "Qwen3ForCausalLM", "gemma3": "Gemma3ForCausalLM"}


class FolderWriter:
    """Takes tensors one by one, and writes a shard whenever enough of them have come together."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors: dict[str, Tensor] = {}
        self._bytes = self._total = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Raises ModelError for values that are not finite; those of float8 have a scale that is not, and are not looked at."""
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and not all(end.isfinite() for end in tensor.aminmax()):
            raise ModelError(f"tensor {name} would be written with values that are not finite: set dtype=bfloat16, which holds "
                             "what float16 cannot, or mend the model that it is made of")
        tensor = tensor.to("cpu", copy=True).contiguous()      # a copy: views of one storage cannot be saved
        size = tensor.numel() * tensor.element_size()
        if self._tensors and self._bytes + size > _SHARD_BYTES:
            self._flush()
        self._tensors[name] = tensor
        self._bytes += size
        self._total += size

    def finish(self) -> None:
        self._flush()
        count = len(self._shards)
        if count == 1:
            self._part(0).rename(self._folder / "model.safetensors")
            return
        where: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05}-of-{count:05}.safetensors"
            self._part(number).rename(self._folder / file)
            where |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total}, "weight_map": where}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        save_file(self._tensors, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._tensors))
        self._tensors, self._bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number:05}.safetensors"


def write_config(checkpoint: Checkpoint, quantization: dict[str, Any], dtype: str, folder: Path) -> None:
    """config.json of the model's text decoder, and generation_config.json where the model came with one."""
    config = {**hf_config(checkpoint), "torch_dtype": dtype, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    beside = checkpoint.path / "generation_config.json"
    if beside.exists():
        shutil.copyfile(beside, folder / beside.name)


def hf_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint's config as transformers reads it: of its text decoder alone, and without what only GGUF files say.

    Raises ModelError for a rope that Hugging Face's configs have no words for.
    """
    config, spec = dict(text_config(checkpoint.config)), checkpoint.spec
    for key in ("dtype", "quantization_config"):       # the latter: what blocks the GGUF file has
        config.pop(key, None)
    if "text_config" in checkpoint.config:
        config |= {"model_type": "gemma3_text", "tie_word_embeddings": spec.tied_embeddings,
                   "eos_token_id": list(spec.eos_token_ids)}
    if not config.get("num_local_experts", 1):
        del config["num_local_experts"]
    if (config.get("rope_scaling") or {}).get("rope_type") == "factors":
        config["rope_scaling"] = _llama3_rope(checkpoint)
    return {**config, "architectures": [_CLASSES[spec.family]]}       # nulls too: a key left out is the class's default


def _llama3_rope(checkpoint: Checkpoint) -> dict[str, Any]:
    """GGUF files hold the divisors that Llama 3.1's rule gives, not its numbers; released models differ in `factor` alone."""
    rope = checkpoint.spec.layers[0].rope
    scaling = {"rope_type": "llama3", "factor": max(rope.factors), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}
    rule = replace(rope, scaling="llama3", factor=max(rope.factors), low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_positions=8192, factors=())
    if not torch.allclose(rule.inv_freq(), rope.inv_freq(), rtol=1e-4, atol=0):
        raise ModelError(f"{checkpoint.path}: its rope factors are not Llama 3.1's, and config.json has no other form for them")
    return scaling
