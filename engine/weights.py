"""Checkpoints on disk: config, model spec and tensors by Hugging Face's names, whatever the file format.

Safetensors and GGUF only. Pickled weights run code when they are loaded, so they are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from engine.fingerprint import fingerprint_files
from engine.gguf import GgufFile, find_gguf
from engine.gguf_hf import GgufTensors
from engine.models.config_keys import TEXT, TOKENS, check_keys, check_value, mapping_of, needed, read_json
from engine.models.names import text_name
from engine.models.spec import ModelError, ModelSpec, merge_token_ids

LEAST_BITS = 4      # of a weight, in any format that is read


class TensorSource(Protocol):
    def names(self) -> set[str]: ...
    def tensor(self, name: str) -> torch.Tensor: ...


class Checkpoint:
    """A model on disk. Nothing is read before it is asked for.

    `config`: Hugging Face style config.json, its `eos_token_id` joined with generation_config.json's; `spec`: the same as a
    ModelSpec; `files`: what holds the weights and the config.
    """

    def __init__(self, path: Path, config: dict[str, Any], source: TensorSource, files: list[Path]) -> None:
        self.path, self.config, self.files, self._source = path, config, files, source
        self.spec = spec = ModelSpec.from_hf(config)
        self._names = source.names()
        weights = spec.vocab_size * spec.hidden_size + sum(inputs * outputs for _, inputs, outputs in spec.linears())
        if weights > sum(file.stat().st_size for file in files) * 8 // LEAST_BITS:      # before memory is asked for them
            raise ModelError(f"{path}: its config speaks of {weights:,} weights, which its files are too small for: they do not "
                             "belong together, or are cut short")

    def names(self) -> set[str]:
        return set(self._names)

    def has(self, name: str) -> bool:
        return name in self._names

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor on the CPU in its stored dtype, a view of the file where possible; GGUF's packed types as float32."""
        if not self.has(name):
            raise ModelError(f"{self.path} has no tensor {name}, which its config asks for: the files do not belong together")
        return self._source.tensor(name)

    def fingerprint(self) -> str:
        """Hex digest that tells these weights and this config from others; cheap (see fingerprint_files)."""
        return fingerprint_files(self.files)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a .gguf file, a folder that holds one, or a folder of config.json and *.safetensors. Raises ModelError."""
    path = Path(path)
    if (gguf := find_gguf(path)) is not None:
        source = GgufTensors(GgufFile(gguf))
        return Checkpoint(path, source.config, source, [gguf])
    if not path.is_dir():
        raise ModelError(f"no model at {path}: give a folder with config.json and *.safetensors, or a .gguf file")
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        raise ModelError(f"{path} is a LoRA adapter, not a model: give its base model")
    if not (path / "config.json").exists():
        raise ModelError(f"{path} has no config.json: it is not a model folder")
    if not any(path.glob("*.safetensors")):
        pickled = any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth"))
        why = "only pickled weights, which are never loaded: convert them to safetensors" if pickled else "no *.safetensors"
        raise ModelError(f"{path} has {why}")
    files = [path / "config.json"]
    config = read_json(path / "config.json")
    if (generation := path / "generation_config.json").exists():
        files.append(generation)
        defaults = read_json(generation)
        for file, values in zip(files, (config, defaults), strict=True):
            check_keys(values, {"eos_token_id": TOKENS}, str(file))
        config["eos_token_id"] = list(merge_token_ids(config.get("eos_token_id"), defaults.get("eos_token_id")))
    folder = SafetensorsFolder(path, multimodal="text_config" in config)
    return Checkpoint(path, config, folder, files + folder.files)


class SafetensorsFolder:
    """The tensors of one folder, sharded or not, mapped from the files on first use.

    `multimodal`: the folder holds more than a language model; its language part is then shown under a plain decoder's names.
    """

    def __init__(self, folder: Path, multimodal: bool) -> None:
        self._shard: dict[str, Path] = {}        # by stored name
        self._handles: dict[Path, Any] = {}
        index = folder / "model.safetensors.index.json"
        if index.exists():
            files: dict[str, str] = needed(read_json(index), "weight_map", str(index))
            check_value(files, mapping_of(TEXT), str(index), "weight_map")
            for file in sorted(set(files.values())):
                if Path(file).name != file:
                    raise ModelError(f"{index} names {file!r}, which is no file of its own folder: fetch the model again")
            self._shard = {name: folder / file for name, file in files.items()}
            for path in sorted(set(self._shard.values())):
                if not path.exists():
                    raise ModelError(f"{folder}: {path.name} is missing, which {index.name} names: fetch the model again")
        else:
            single = folder / "model.safetensors"
            for path in [single] if single.exists() else sorted(folder.glob("*.safetensors")):
                self._shard.update(dict.fromkeys(self._open(path).keys(), path))
        self.files = sorted(set(self._shard.values()))
        shown = {name: text_name(name) if multimodal else name for name in self._shard}
        self._stored = {name: stored for stored, name in shown.items() if name}

    def names(self) -> set[str]:
        return set(self._stored)

    def tensor(self, name: str) -> torch.Tensor:
        stored = self._stored[name]
        return self._open(self._shard[stored]).get_tensor(stored)

    def _open(self, path: Path) -> Any:
        if path not in self._handles:
            try:
                self._handles[path] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ModelError(f"{path} is cut short or damaged ({error}): fetch it again") from None
        return self._handles[path]
