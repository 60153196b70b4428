"""Safetensors folders: the same tensors as transformers reads, what makes a fingerprint, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from models import TINY_FAMILIES, load_reference, tiny_checkpoint
from safetensors.torch import load_file, save_file

from engine.models.spec import ModelError
from engine.weights import open_checkpoint


@pytest.fixture
def folder(tmp_path):
    return tiny_checkpoint("llama", tmp_path)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_tensors_are_those_of_transformers(family, tmp_path):
    path = tiny_checkpoint(family, tmp_path)
    checkpoint, expected = open_checkpoint(path), load_reference(path).state_dict()
    if checkpoint.spec.tied_embeddings:
        del expected["lm_head.weight"]
    assert checkpoint.names() == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.tensor(name), tensor), name
    assert not checkpoint.has("model.layers.9.mlp.up_proj.weight")


def test_shards(folder, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    sharded, single = open_checkpoint(tmp_path / "sharded"), open_checkpoint(folder)
    assert len(sharded.files) > 3
    assert sharded.names() == single.names()
    for name in single.names():
        assert torch.equal(sharded.tensor(name), single.tensor(name))

    sharded.files[-1].unlink()
    with pytest.raises(ModelError, match=f"{sharded.files[-1].name} is missing"):
        open_checkpoint(tmp_path / "sharded")


@pytest.mark.parametrize("place", ["../{}", "{folder}/{}", "./{}"])
def test_an_index_names_files_of_its_folder_only(place, folder):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "here.safetensors").write_bytes(b"")
    file = place.format("model.safetensors", folder=folder.parent)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    with pytest.raises(ModelError, match="no file of its own folder"):
        open_checkpoint(folder)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_multimodal_folder_shows_its_decoder(prefix, tmp_path):
    path = tiny_checkpoint("gemma3", tmp_path)
    plain = load_file(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    nested = tmp_path / "nested"
    nested.mkdir()
    stored = {prefix + name.removeprefix("model."): tensor for name, tensor in plain.items()}
    save_file({**stored, "vision_tower.patch.weight": torch.zeros(2), "model.vision_tower.patch.weight": torch.zeros(2)},
              nested / "model.safetensors")
    (nested / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config}))
    checkpoint = open_checkpoint(nested)
    assert checkpoint.names() == set(plain)
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in plain.items())
    assert checkpoint.spec == open_checkpoint(path).spec


def test_generation_config_adds_end_tokens(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [300, 258]}))
    assert open_checkpoint(folder).spec.eos_token_ids == (258, 300)


def test_fingerprint(folder, tmp_path):
    first = open_checkpoint(folder).fingerprint()
    shutil.copytree(folder, tmp_path / "moved")
    assert open_checkpoint(tmp_path / "moved").fingerprint() == first
    # The same shapes and sizes, other weights.
    assert open_checkpoint(tiny_checkpoint("llama", tmp_path, seed=1)).fingerprint() != first
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert open_checkpoint(folder).fingerprint() != first


def test_missing_tensor_is_named(folder):
    with pytest.raises(ModelError, match=r"no tensor model\.nothing"):
        open_checkpoint(folder).tensor("model.nothing")


def _keep_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _only_config(folder):
    (folder / "model.safetensors").unlink()


def _no_config(folder):
    (folder / "config.json").unlink()


def _adapter(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")


def _bad_json(folder):
    (folder / "config.json").write_text('{"model_type": ')


def _list(folder):
    (folder / "config.json").write_text("[]")


def _deep(folder):
    (folder / "config.json").write_text("[" * 100_000)


def _too_large(folder):
    """More weights than could be asked memory for."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 2**31 - 1}))


def _generation(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": "abc"}')


def _generation_list(folder):
    (folder / "generation_config.json").write_text("[2]")


def _index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": 5}}')


def _index_without_map(folder):
    (folder / "model.safetensors.index.json").write_text("{}")


def _cut(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _gone(folder):
    shutil.rmtree(folder)


@pytest.mark.parametrize(("damage", "says"), [
    (_keep_pickle, "only pickled weights, which are never loaded"), (_only_config, r"no \*.safetensors"),
    (_no_config, "no config.json"), (_adapter, "LoRA adapter"), (_bad_json, "not valid JSON"), (_cut, "cut short or damaged"),
    (_gone, "no model at"), (_list, r"config\.json holds \[\] as its content, which must be an object"),
    (_deep, "not valid JSON"), (_too_large, "weights, which its files are too small for"),
    (_generation, r"generation_config\.json holds 'abc' as eos_token_id"),
    (_generation_list, r"generation_config\.json holds \[2\]"), (_index, r"index\.json holds \{.*\} as weight_map"),
    (_index_without_map, "has no weight_map"),
])
def test_refusals(damage, says, folder):
    damage(folder)
    with pytest.raises(ModelError, match=says) as error:
        open_checkpoint(folder)
    assert "\n" not in str(error.value)
