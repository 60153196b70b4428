"""ModelSpec.from_hf: each family, old and new config forms, against transformers' own reading; what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from models import TINY_FAMILIES, tiny_checkpoint

from engine.models.quantization import Quantization
from engine.models.spec import ModelError, ModelSpec, RopeSpec
from engine.weights import open_checkpoint

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "eos_token_id": 2,
}
LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def spec(**changes: Any) -> ModelSpec:
    return ModelSpec.from_hf({**LLAMA, **changes})


@pytest.mark.parametrize("odd", [{"intermediate_size": [1, 2]}, {"num_key_value_heads": [1, 2]}, {"sliding_window": -1}])
def test_another_family_is_refused_as_such(odd):
    """Whatever it means by keys that families here have too."""
    with pytest.raises(ModelError, match="model_type 'openelm' is not supported"):
        ModelSpec.from_hf({"model_type": "openelm", **odd})
    with pytest.raises(ModelError, match="model_type 'gemma3n_text' is not supported"):
        ModelSpec.from_hf({"model_type": "gemma3n", "text_config": {"model_type": "gemma3n_text", **odd}})


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_agrees_with_the_config_class(family, tmp_path):
    checkpoint = open_checkpoint(tiny_checkpoint(family, tmp_path))
    config, got = transformers.AutoConfig.from_pretrained(checkpoint.path), checkpoint.spec
    assert got.family == family.split("-")[0].replace("llama3", "llama")
    assert (got.vocab_size, got.hidden_size, got.num_layers) == (config.vocab_size, config.hidden_size, config.num_hidden_layers)
    assert (got.num_heads, got.num_kv_heads) == (config.num_attention_heads, config.num_key_value_heads)
    assert got.head_dim == (getattr(config, "head_dim", None) or 16)
    assert got.tied_embeddings == config.tie_word_embeddings
    assert got.eos_token_ids == (258,)
    assert got.dtype == "float32"
    assert {"model.layers.0.self_attn.q_proj.bias" in checkpoint.names()} == {got.qkv_bias}
    assert {"model.layers.0.self_attn.o_proj.bias" in checkpoint.names()} == {got.o_bias}
    assert {"model.layers.0.mlp.up_proj.bias" in checkpoint.names()} == {got.mlp_bias}
    assert {"model.layers.0.self_attn.q_norm.weight" in checkpoint.names()} == {got.qk_norm}
    assert {"model.layers.0.pre_feedforward_layernorm.weight" in checkpoint.names()} == {got.sandwich_norms}


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_frequencies_are_those_of_the_model(family, tmp_path):
    path = tiny_checkpoint(family, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * 3
    for kind, layer in zip(kinds, open_checkpoint(path).spec.layers, strict=True):
        rotary = model.model.rotary_emb
        expected = getattr(rotary, f"{kind}_inv_freq") if family == "gemma3" else rotary.inv_freq
        torch.testing.assert_close(layer.rope.inv_freq(), expected, rtol=1e-6, atol=0)
        assert layer.rope.inv_freq().dtype == torch.float32


def test_llama_scaling_old_and_new_form():
    old = spec(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA3_ROPE})
    new = spec(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3_ROPE})
    assert old == new
    assert old.layers[0].rope == RopeSpec(5e5, 16, "llama3", 8.0, 1.0, 4.0, 8192)
    older = spec(rope_scaling={"type": "linear", "factor": 2.0})
    assert older.layers[0].rope == RopeSpec(10_000.0, 16, "linear", factor=2.0)
    torch.testing.assert_close(older.layers[0].rope.inv_freq() * 2, spec().layers[0].rope.inv_freq())


def test_llama3_scaling_by_hand():
    rope = RopeSpec(10_000.0, 4, "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=1000)
    # Frequency 1 turns 159 times in 1000 positions and is kept; 0.01 turns 1.59 times and lies on the ramp from 1 to 4.
    keep = (1000 * 0.01 / (2 * torch.pi) - 1.0) / 3.0
    torch.testing.assert_close(rope.inv_freq(), torch.tensor([1.0, 0.01 * keep + 0.01 / 8 * (1 - keep)]))


def test_factors_divide():
    rope = RopeSpec(10_000.0, 4, "factors", factors=(1.0, 8.0))
    torch.testing.assert_close(rope.inv_freq(), torch.tensor([1.0, 0.01 / 8]))


def test_mistral_window():
    assert {layer.window for layer in spec(model_type="mistral", sliding_window=None).layers} == {0}
    assert {layer.window for layer in spec(model_type="mistral", sliding_window=256).layers} == {256}
    assert {layer.window for layer in spec(model_type="mistral").layers} == {4096}      # the class's default


def test_qwen_window():
    def windows(**keys):
        return [layer.window for layer in spec(model_type="qwen2", sliding_window=32, max_window_layers=3, **keys).layers]

    assert windows(use_sliding_window=False) == [0, 0, 0, 0]
    assert windows(use_sliding_window=True) == [0, 0, 0, 32]
    kinds = ["sliding_attention", "full_attention"] * 2
    assert windows(use_sliding_window=True, layer_types=kinds) == [32, 0, 32, 0]


GEMMA = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "model_type": "gemma3_text", "sliding_window": 512}


def test_gemma_old_and_new_form():
    old = ModelSpec.from_hf({**GEMMA, "sliding_window_pattern": 3, "rope_theta": 5e5, "rope_local_base_freq": 2e4,
                             "rope_scaling": {"rope_type": "linear", "factor": 8.0}})
    new = ModelSpec.from_hf({**GEMMA, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
                             "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
                                                 "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}})
    assert old == new
    assert [layer.window for layer in old.layers] == [512, 512, 0] * 2
    assert old.layers[0].rope == RopeSpec(2e4, 256)
    assert old.layers[2].rope == RopeSpec(5e5, 256, "linear", factor=8.0)
    assert (old.embed_scale, old.attn_scale, old.norm_plus_one, old.tied_embeddings) == (8.0, 0.0625, True, True)


def test_gemma_defaults_are_the_config_class_defaults():
    config = transformers.Gemma3TextConfig().to_dict()
    assert ModelSpec.from_hf({key: config[key] for key in ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers")}
                             | {"dtype": "float32"}) == ModelSpec.from_hf(config)


def test_multimodal_gemma_takes_the_text_part():
    nested = ModelSpec.from_hf({"model_type": "gemma3", "text_config": GEMMA, "vision_config": {}, "eos_token_id": [1, 106],
                                "torch_dtype": "bfloat16"})
    plain = ModelSpec.from_hf({**GEMMA, "torch_dtype": "bfloat16", "eos_token_id": [1, 106]})
    assert nested == plain


def test_tie_and_quantization():
    quantization = {"quant_method": "awq", "bits": 4, "group_size": 32}
    got = spec(quantization_config=quantization, tie_word_embeddings=True, torch_dtype="float16", eos_token_id=[2, 5, 2])
    assert (got.quantization, got.tied_embeddings, got.dtype, got.eos_token_ids) == (
        Quantization.read(quantization), True, "float16", (2, 5))
    assert [model.run_dtype("auto", "cuda") for model in (got, spec(torch_dtype="float16"))] == ["float16", "bfloat16"]
    assert (got.run_dtype("auto", "cpu"), got.run_dtype("bfloat16", "cuda")) == ("float32", "bfloat16")
    assert not spec().tied_embeddings


def test_gemma_does_not_run_in_float16():
    """Its hidden states leave that range, whatever the weights are stored in."""
    stored = {**GEMMA, "torch_dtype": "float16", "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32}}
    for got in (ModelSpec.from_hf(stored), ModelSpec.from_hf({**GEMMA, "torch_dtype": "float16"})):
        assert [got.run_dtype(asked, "cuda") for asked in ("auto", "bfloat16", "float32")] == ["bfloat16", "bfloat16", "float32"]
        with pytest.raises(ModelError, match=r"engine\.dtype=float16: gemma3's hidden states leave its range"):
            got.run_dtype("float16", "cuda")


@pytest.mark.parametrize(("changes", "names"), [
    ({"model_type": "phi3"}, "phi3"),
    ({"model_type": "qwen3_moe"}, "qwen3_moe"),
    ({"num_local_experts": 8}, "num_local_experts"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "dynamic"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"hidden_act": "relu"}, "relu"),
    ({"hidden_size": None}, "hidden_size"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ({"model_type": "mistral", "sliding_window": 8, "layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
    ({"model_type": "mistral", "sliding_window": 8, "layer_types": ["full_attention"]}, "layer_types"),
])
def test_refusals_name_the_key(changes, names):
    with pytest.raises(ModelError, match=names):
        spec(**changes)


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32}
PACKED = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}


@pytest.mark.parametrize(("changes", "says"), [
    ({"hidden_size": "abc"}, r"holds 'abc' as hidden_size, which must be a whole number from 1 to 2147483647"),
    ({"hidden_size": -64}, "holds -64 as hidden_size"),
    ({"hidden_size": True}, "holds True as hidden_size"),
    ({"vocab_size": None}, "has no vocab_size"),
    ({"num_hidden_layers": 10**9}, "as num_hidden_layers, which must be a whole number from 1 to 4096"),
    ({"head_dim": 7}, "heads have 7 dimensions"),
    ({"hidden_size": 4, "num_attention_heads": 8}, "heads have 0 dimensions"),
    ({"rms_norm_eps": [1]}, r"holds \[1\] as rms_norm_eps"),
    ({"rms_norm_eps": float("nan")}, "holds nan as rms_norm_eps"),
    ({"rope_theta": "abc"}, "as rope_theta, which must be a number above 0"),
    ({"rope_theta": -1.0}, "as rope_theta"),
    ({"rope_scaling": [8.0]}, "as rope_scaling, which must be an object"),
    ({"rope_scaling": {"rope_type": "linear", "factor": None}}, "factor"),
    ({"rope_scaling": {"rope_type": ["linear"]}}, "as rope: rope_type"),
    ({"rope_scaling": {"rope_type": "llama3", **LLAMA3_ROPE, "high_freq_factor": 1.0}}, "must be below high_freq_factor"),
    ({"rope_parameters": {"full_attention": [1]}}, "as rope_parameters.full_attention"),
    ({"num_local_experts": "8"}, "as num_local_experts"),
    ({"hidden_act": ["silu"]}, "as hidden_act"),
    ({"model_type": ["llama"]}, "as model_type"),
    ({"eos_token_id": "abc"}, "as eos_token_id"),
    ({"eos_token_id": [2, -1]}, "as eos_token_id"),
    ({"text_config": [1]}, "as text_config"),
    ({"model_type": "mistral", "layer_types": [1, 2, 3, 4]}, "as layer_types"),
    ({"model_type": "mistral", "sliding_window": "abc"}, "as sliding_window"),
    ({"quantization_config": ["awq"]}, "as quantization_config"),
    ({"quantization_config": {**AWQ, "quant_method": ["awq"]}}, r"as quantization_config\.quant_method"),
    ({"quantization_config": {**AWQ, "group_size": 32.0}}, r"holds 32\.0 as quantization_config\.group_size"),
    ({"quantization_config": {**AWQ, "modules_to_not_convert": 5}}, "modules_to_not_convert"),
    ({"quantization_config": {"quant_method": "compressed-tensors", "config_groups": [1]}}, "config_groups"),
    ({"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized",
                              "config_groups": {"group_0": {"weights": {**PACKED, "num_bits": "4"}}}}},
     r"holds '4' as quantization_config\.config_groups\.group_0\.weights\.num_bits"),
])
def test_values_of_another_kind_are_refused_by_name(changes, says):
    with pytest.raises(ModelError, match=says) as error:
        spec(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", [[], "abc", None, 5])
def test_a_config_that_is_no_object_is_refused(config):
    with pytest.raises(ModelError, match="must be an object"):
        ModelSpec.from_hf(config)
