"""A GGUF file seen as a Hugging Face checkpoint: its config.json, its tensor names, and what the converter did undone."""

from __future__ import annotations

import re
from typing import Any

import torch

from engine.gguf import GgufFile
from engine.models.config_keys import COUNT, FLAG, SIZE, TEXT, TEXTS, Kind, check_keys, either, list_of, needed, whole
from engine.models.quantization import GGUF_KEPT
from engine.models.spec import ModelError, merge_token_ids

_MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
_GEMMA_BLOCK = {**_BLOCK, "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
                "post_ffw_norm": "post_feedforward_layernorm"}
_ROPE_FACTORS = "rope_freqs.weight"            # Llama 3's frequency divisors: part of the config, not of the weights

# End-of-turn tokens that chat models emit; the metadata names one end token only.
_END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<end_of_turn>")
_CONTROL, _USER_DEFINED = 3, 4

# What is worked with here; the rest is checked as the config that is made of it.
_BY_LAYER = either(SIZE, list_of(SIZE))
_KINDS = {
    **dict.fromkeys(("embedding_length", "attention.key_length"), SIZE), "rope.scaling.type": TEXT,
    **dict.fromkeys(("attention.head_count", "attention.head_count_kv", "feed_forward_length"), _BY_LAYER),
    "attention.sliding_window_pattern": either(SIZE, list_of(FLAG)),
}
_TOKENIZER_KINDS = {
    **dict.fromkeys(("model", "pre"), TEXT), **dict.fromkeys(("tokens", "merges"), TEXTS), "token_type": list_of(COUNT),
    "scores": list_of(Kind("a number", lambda value: isinstance(value, (int, float)))),
    **dict.fromkeys([f"{name}_token_id" for name in ("bos", "eos", "eot", "eom", "unknown")], COUNT),
}


class GgufTensors:
    """The tensors of a GGUF file under Hugging Face's names and conventions.

    A layer whose weights can be kept packed has `blocks` beside `weight`: the same as they are stored, see GgufFile.read_blocks.
    """

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.config = hf_config(file)
        self._stored = {_hf_name(file, name): name for name in file.tensors if name != _ROPE_FACTORS}
        kinds = {name.removesuffix(".weight"): file.tensors[stored].kind.name for name, stored in self._stored.items()
                 if name.startswith("model.layers.")}
        self._kept = {name: kind for name, kind in kinds.items() if kind in GGUF_KEPT}
        if self._kept:
            self.config["quantization_config"] = {"quant_method": "gguf", "types": self._kept}

    def names(self) -> set[str]:
        return set(self._stored) | {f"{name}.blocks" for name in self._kept}

    def tensor(self, name: str) -> torch.Tensor:
        if name.endswith(".blocks"):
            weight = self.file.read_blocks(self._stored[f"{name.removesuffix('.blocks')}.weight"])
        else:
            weight = self.file.read(self._stored[name])
        if self.config["model_type"] == "gemma3_text" and name.endswith("norm.weight"):
            return weight - 1.0                # the file holds the factor itself, Hugging Face what is added to 1
        if self.config["model_type"] in ("llama", "mistral") and ".q_proj." in name:
            return _split_halves(weight, self.config["num_attention_heads"])
        if self.config["model_type"] in ("llama", "mistral") and ".k_proj." in name:
            return _split_halves(weight, self.config["num_key_value_heads"])
        return weight


def hf_config(file: GgufFile) -> dict[str, Any]:
    """The metadata as a Hugging Face config (old form). Raises ModelError for an architecture that is not supported."""
    meta = file.metadata
    arch = meta.get("general.architecture")
    if arch not in _MODEL_TYPES:
        raise ModelError(f"{file.path}: GGUF architecture {arch!r} is not supported; supported: {', '.join(_MODEL_TYPES)}")

    where = f"{file.path}: the GGUF metadata"
    check_keys(meta, {f"{arch}.{key}": kind for key, kind in _KINDS.items()}, where)

    def get(key: str, default: Any = None) -> Any:
        return meta.get(f"{arch}.{key}", default)

    def need(key: str) -> Any:
        return needed(meta, f"{arch}.{key}", where)

    def uniform(value: Any, key: str) -> Any:
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise ModelError(f"{file.path}: {arch}.{key} differs from layer to layer, which is not supported")
            return value[0]
        return value

    heads = uniform(need("attention.head_count"), "attention.head_count")
    head_dim = get("attention.key_length", need("embedding_length") // heads)
    if get("attention.value_length", head_dim) != head_dim or get("rope.dimension_count", head_dim) != head_dim:
        raise ModelError(f"{file.path}: value_length and rope.dimension_count must be key_length ({head_dim})")
    window = get("attention.sliding_window")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{file.path} has no matrix token_embd.weight: it is no language model, or damaged")
    config = {
        "model_type": "mistral" if arch == "llama" and window else _MODEL_TYPES[arch],
        "vocab_size": embedding.shape[0],
        "hidden_size": need("embedding_length"),
        "intermediate_size": uniform(need("feed_forward_length"), "feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": uniform(get("attention.head_count_kv", heads), "attention.head_count_kv"),
        "num_local_experts": get("expert_count", 0),
        "head_dim": head_dim,
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": need("context_length"),
        "rope_theta": get("rope.freq_base", 10_000.0),
        "rope_scaling": _rope_scaling(file, arch),
        "sliding_window": window,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(_end_token_ids(tokenizer_keys(file))),
        "torch_dtype": {0: "float32", 1: "float16"}.get(meta.get("general.file_type", -1), "bfloat16"),
    }
    if arch == "gemma3":
        pattern = get("attention.sliding_window_pattern", 6)
        if isinstance(pattern, list):          # one flag a layer
            config["layer_types"] = ["sliding_attention" if local else "full_attention" for local in pattern]
        else:
            config["sliding_window_pattern"] = pattern
        # The file does not say what queries are scaled by; among the released sizes only the 27B departs from head_dim.
        config["query_pre_attn_scalar"] = config["hidden_size"] // heads if config["num_hidden_layers"] == 62 else head_dim
        config["rope_local_base_freq"] = get("rope.freq_base_swa", 10_000.0)
        config["final_logit_softcapping"] = get("final_logit_softcapping")
    return config


def _rope_scaling(file: GgufFile, arch: str) -> dict[str, Any] | None:
    kind = file.metadata.get(f"{arch}.rope.scaling.type", "none")
    if _ROPE_FACTORS in file.tensors:
        return {"rope_type": "factors", "factors": file.read(_ROPE_FACTORS).tolist()}
    if kind == "none":
        return None
    return {"rope_type": kind, "factor": file.metadata.get(f"{arch}.rope.scaling.factor")}


def tokenizer_keys(file: GgufFile) -> dict[str, Any]:
    """The metadata of the tokenizer, without tokenizer.ggml. before the keys. Raises ModelError where it cannot be used."""
    meta = {key.removeprefix("tokenizer.ggml."): value for key, value in file.metadata.items() if key.startswith("tokenizer.")}
    where = f"{file.path}: the GGUF metadata"
    kinds = {f"tokenizer.ggml.{key}": kind for key, kind in _TOKENIZER_KINDS.items()}
    check_keys(file.metadata, {**kinds, "tokenizer.chat_template": TEXT}, where)
    size = len(meta.get("tokens", ()))
    for key in ("token_type", "scores"):
        if key in meta and len(meta[key]) != size:
            raise ModelError(f"{where} has {size} tokens, but {len(meta[key])} entries in tokenizer.ggml.{key}")
    for key, value in meta.items():
        if key.endswith("_token_id") and key in _TOKENIZER_KINDS and "tokens" in meta and value >= size:
            raise ModelError(f"{where} holds {value} as tokenizer.ggml.{key}, of {size} tokens")
    # Nothing is padded, and published files name a token for it that their vocabulary has not.
    if not whole(0, size - 1).holds(meta.get("padding_token_id")):
        meta.pop("padding_token_id", None)
    return meta


def _end_token_ids(meta: dict[str, Any]) -> tuple[int, ...]:
    special = {meta["tokens"][i]: i for i, kind in enumerate(meta.get("token_type", ())) if kind in (_CONTROL, _USER_DEFINED)}
    named = (meta.get(f"{key}_token_id") for key in ("eos", "eot", "eom"))
    return merge_token_ids(*named, *(special.get(token) for token in _END_TOKENS))


def _hf_name(file: GgufFile, name: str) -> str:
    block = _GEMMA_BLOCK if file.metadata["general.architecture"] == "gemma3" else _BLOCK
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        if match[2] in block:
            return f"model.layers.{match[1]}.{block[match[2]]}.{match[3]}"
    elif (stem := name.removesuffix(".weight")) in _TOP:
        return f"{_TOP[stem]}.weight"
    raise ModelError(f"{file.path}: tensor {name} is not known for architecture {file.metadata['general.architecture']}")


def _split_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from rope's interleaved pairs, as the converter orders them, back to Hugging Face's two halves."""
    rows = weight.shape[0]
    if rows % (2 * heads):
        raise ModelError(f"the GGUF metadata speaks of {heads} heads, but queries or keys have {rows} rows: fetch the file again")
    return weight.view(heads, rows // heads // 2, 2, -1).transpose(1, 2).reshape(weight.shape)
