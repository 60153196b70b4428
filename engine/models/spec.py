"""ModelSpec: what a decoder is made of, read once from a Hugging Face style config.

One Decoder serves every family; what differs between them is data and stands here. A key that changes results and is not
supported is refused by name, never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.models.config_keys import (
    COUNT,
    FLAG,
    NUMBER,
    OBJECT,
    POSITIVE,
    SIZE,
    TEXT,
    TEXTS,
    TOKENS,
    check_keys,
    check_value,
    list_of,
    needed,
    whole,
)
from engine.models.errors import ModelError as ModelError
from engine.models.quantization import Quantization

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding of one layer, half-split layout: dims i and i + rotary_dim/2 turn together (Su et al., 2021).

    `scaling`: "none"; "linear" (every frequency over `factor`); "llama3" (long wavelengths over `factor`, short ones kept,
    a ramp between: the Llama 3.1 release); "factors" (frequency i over `factors[i]`, as GGUF files store it).
    """

    theta: float
    rotary_dim: int
    scaling: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_positions: int = 0
    factors: tuple[float, ...] = ()

    def inv_freq(self) -> torch.Tensor:
        """Radians a position, float32 [rotary_dim / 2]; worked out in float64."""
        import torch  # here alone, so that a config can be checked without it

        exponent = torch.arange(0, self.rotary_dim, 2, dtype=torch.float64) / self.rotary_dim
        freq = self.theta**-exponent
        if self.scaling == "linear":
            freq = freq / self.factor
        elif self.scaling == "llama3":
            turns = self.original_max_positions * freq / (2 * math.pi)   # full turns within the trained context
            keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            keep = keep.clamp(0.0, 1.0)
            freq = keep * freq + (1.0 - keep) * freq / self.factor
        elif self.scaling == "factors":
            freq = freq / torch.tensor(self.factors, dtype=torch.float64)
        return freq.to(torch.float32)


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What may differ from layer to layer.

    `window`: 0 for full causal attention; w > 0: the key at position j is visible to the query at position i iff
    0 <= i - j < w, so a token sees itself and the w - 1 before it.
    """

    window: int
    rope: RopeSpec


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only transformer with pre-norm blocks, grouped-query attention, rotary positions and a gated MLP."""

    family: str                       # llama | mistral | qwen2 | qwen3 | gemma3
    vocab_size: int                   # rows of the embedding, padding included
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    activation: str                   # "silu" | "gelu_tanh", of the gate
    norm_eps: float
    norm_plus_one: bool               # RMSNorm weights are stored as w - 1
    qk_norm: bool                     # RMSNorm over head_dim on queries and keys, before rope
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    sandwich_norms: bool              # four norms a block: before and after attention, before and after the MLP
    embed_scale: float                # multiplies the embedding; to be rounded to the embedding's dtype first, as in training
    tied_embeddings: bool             # the LM head is the embedding
    attn_scale: float                 # multiplies q.k
    attn_softcap: float               # c * tanh(score / c); 0: none
    logit_softcap: float              # likewise on the logits; 0: none
    max_positions: int
    layers: tuple[LayerSpec, ...]
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: str                        # of the stored weights: "bfloat16", "float16", "float32"
    quantization: Quantization | None   # None: weights are plain

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelSpec:
        """Read a config.json, old or new (transformers 5) form, also the text part of multimodal Gemma 3. Raises ModelError."""
        check_value(config, OBJECT, "the model", "its config")
        check_keys(config, {"text_config": OBJECT})
        text = text_config(config)
        check_keys(text, {"model_type": TEXT})
        family = _FAMILIES.get(text.get("model_type") or "")
        if family is None:
            supported = ", ".join(sorted(set(_FAMILIES.values())))
            raise ModelError(f"model_type {text.get('model_type')!r} is not supported; supported families: {supported}")
        for part in (config, text):      # not before: of other families, the same keys hold other kinds
            check_keys(part, _KINDS)
        gemma = family == "gemma3"
        if gemma:
            text = {**_GEMMA3_DEFAULTS, **text}
        _refuse_unsupported(text)

        num_layers, num_heads, hidden_size = (
            needed(text, key) for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
        num_kv_heads = text.get("num_key_value_heads") or num_heads
        if num_heads % num_kv_heads:
            raise ModelError(f"num_attention_heads ({num_heads}) is not a multiple of num_key_value_heads ({num_kv_heads})")
        head_dim = text.get("head_dim") or (128 if family == "qwen3" else hidden_size // num_heads)
        if head_dim < 2 or head_dim % 2:
            raise ModelError(f"heads have {head_dim} dimensions; they must be a multiple of 2, of which rope turns pairs")
        attention_bias = bool(text.get("attention_bias", False)) and family in ("llama", "qwen3", "gemma3")
        max_positions = needed(text, "max_position_embeddings")
        kinds, window = _attention_kinds(text, family, num_layers)
        ropes = {kind: _rope(text, family, kind, head_dim, max_positions) for kind in set(kinds)}
        stored = config.get("quantization_config") or text.get("quantization_config") or config.get("compression_config")
        spec = cls(
            family=family,
            vocab_size=needed(text, "vocab_size"),
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=needed(text, "intermediate_size"),
            activation=_activation(text, "hidden_activation" if gemma else "hidden_act"),
            norm_eps=float(_present(text).get("rms_norm_eps", 1e-6)),
            norm_plus_one=gemma,
            qk_norm=family in ("qwen3", "gemma3"),
            qkv_bias=family == "qwen2" or attention_bias,
            o_bias=attention_bias,
            mlp_bias=family == "llama" and bool(text.get("mlp_bias", False)),
            sandwich_norms=gemma,
            embed_scale=math.sqrt(hidden_size) if gemma else 1.0,
            tied_embeddings=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", gemma))),
            attn_scale=float(needed(text, "query_pre_attn_scalar") if gemma else head_dim) ** -0.5,
            attn_softcap=float(text.get("attn_logit_softcapping") or 0.0) if gemma else 0.0,
            logit_softcap=float(text.get("final_logit_softcapping") or 0.0) if gemma else 0.0,
            max_positions=max_positions,
            layers=tuple(LayerSpec(window if kind == _SLIDING else 0, ropes[kind]) for kind in kinds),
            eos_token_ids=merge_token_ids(text.get("eos_token_id"), config.get("eos_token_id")),
            bos_token_id=text.get("bos_token_id", config.get("bos_token_id")),
            dtype=str(text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or config.get("torch_dtype")
                      or "float32").removeprefix("torch."),
            quantization=Quantization.read(stored, multimodal="text_config" in config) if stored else None,
        )
        if spec.quantization is not None:
            spec.quantization.check(spec.linears())
        return spec

    @property
    def fits_float16(self) -> bool:
        """Whether hidden states stay in the range of float16: Gemma 3's leave it, whatever its weights are stored in."""
        return self.family != "gemma3"

    def run_dtype(self, asked: str, device: str) -> str:
        """What it runs in on a "cuda" or "cpu" device. "auto": float32 on the CPU, else bfloat16, but float16 for integer weights
        whose scales are that. Raises ModelError for float16 where that has not the range."""
        if asked == "float16" and not self.fits_float16:
            raise ModelError(f"engine.dtype=float16: {self.family}'s hidden states leave its range; set auto, or bfloat16")
        if asked != "auto":
            return asked
        if device == "cpu":
            return "float32"
        in_half = self.quantization and self.quantization.integer and self.dtype == "float16" and self.fits_float16
        return "float16" if in_half else "bfloat16"

    def linears(self) -> Iterator[tuple[str, int, int]]:
        """(name in checkpoints, inputs, outputs) of every linear layer of the blocks."""
        hidden, wide = self.hidden_size, self.intermediate_size
        heads, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        for i in range(self.num_layers):
            for name, inputs, outputs in (
                    ("self_attn.q_proj", hidden, heads), ("self_attn.k_proj", hidden, kv), ("self_attn.v_proj", hidden, kv),
                    ("self_attn.o_proj", heads, hidden), ("mlp.gate_proj", hidden, wide), ("mlp.up_proj", hidden, wide),
                    ("mlp.down_proj", wide, hidden)):
                yield f"model.layers.{i}.{name}", inputs, outputs


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config: `text_config` where the config is multimodal, else the config itself."""
    return config.get("text_config") or config


def merge_token_ids(*values: int | Iterable[int] | None) -> tuple[int, ...]:
    """Token ids as config files write them (an id, a list or null), joined in order without repeats."""
    ids: dict[int, None] = {}
    for value in values:
        for token in () if value is None else (value,) if isinstance(value, int) else value:
            ids[int(token)] = None
    return tuple(ids)


_FULL, _SLIDING = "full_attention", "sliding_attention"
_FAMILIES = {name: name for name in ("llama", "mistral", "qwen2", "qwen3", "gemma3")} | {"gemma3_text": "gemma3"}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}

_LAYERS = whole(1, 4096)         # so that a hostile number is refused before so many are listed
_KINDS = {
    "quantization_config": OBJECT, "compression_config": OBJECT, "rope_parameters": OBJECT,
    "rope_scaling": OBJECT, "num_hidden_layers": _LAYERS, "layer_types": TEXTS, "sliding_window": COUNT,
    "max_window_layers": COUNT, "bos_token_id": whole(-1), "eos_token_id": TOKENS,
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
                     "max_position_embeddings", "sliding_window_pattern", "_sliding_window_pattern"), SIZE),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), COUNT),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq", "partial_rotary_factor", "query_pre_attn_scalar"), POSITIVE),
    **dict.fromkeys(("rms_norm_eps", "attn_logit_softcapping", "final_logit_softcapping"), NUMBER),
    **dict.fromkeys(("attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window"), FLAG),
    **dict.fromkeys(("hidden_act", "hidden_activation"), TEXT),
}
_ROPE_KINDS = {
    "rope_type": TEXT, "type": TEXT, "original_max_position_embeddings": SIZE, "factors": list_of(POSITIVE),
    **dict.fromkeys(("rope_theta", "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor"), POSITIVE),
}

# What published Gemma 3 text_configs leave out, because it is the default of their config class.
_GEMMA3_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256,
    "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 131_072, "sliding_window": 4096,
    "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 1,
}


def _present(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if value is not None}


def _activation(config: Mapping[str, Any], key: str) -> str:
    name = config.get(key, "silu")
    if name not in _ACTIVATIONS:
        raise ModelError(f"{key} {name!r} is not supported; supported: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if (config.get(key) or 0) > 1:
            raise ModelError(f"{key}={config[key]}: mixture-of-experts models are not supported")
    if config.get("use_bidirectional_attention"):
        raise ModelError("use_bidirectional_attention: encoders are not supported, only causal decoders")


def _attention_kinds(config: Mapping[str, Any], family: str, num_layers: int) -> tuple[list[str], int]:
    """Each layer's attention kind, and the window of the sliding ones."""
    window = config.get("sliding_window", 4096 if family == "mistral" else None)
    if family == "llama" or (family in ("qwen2", "qwen3") and not config.get("use_sliding_window", False)):
        window = None
    if not window:
        kinds = [_FULL] * num_layers
    elif config.get("layer_types"):
        kinds = list(config["layer_types"])
    elif family == "gemma3":
        pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
        kinds = [_SLIDING if (i + 1) % pattern else _FULL for i in range(num_layers)]
    elif family == "mistral":
        kinds = [_SLIDING] * num_layers
    else:
        first = _present(config).get("max_window_layers", 28)
        kinds = [_SLIDING if i >= first else _FULL for i in range(num_layers)]
    if unknown := set(kinds) - {_FULL, _SLIDING}:
        raise ModelError(f"layer_types {', '.join(sorted(unknown))} not supported; supported: {_FULL}, {_SLIDING}")
    if len(kinds) != num_layers:
        raise ModelError(f"layer_types has {len(kinds)} entries for num_hidden_layers={num_layers}")
    return kinds, int(window or 0)


def _rope(config: Mapping[str, Any], family: str, kind: str, head_dim: int, max_positions: int) -> RopeSpec:
    """One attention kind's rope: rope_parameters (transformers 5; flat or by kind), or rope_theta and rope_scaling."""
    local = family == "gemma3" and kind == _SLIDING
    theta = config.get("rope_local_base_freq") or 10_000.0 if local else config.get("rope_theta")
    params: Mapping[str, Any] = config.get("rope_parameters") or {}
    if _FULL in params or _SLIDING in params:
        check_keys(params, {kind: OBJECT}, prefix="rope_parameters.")
        params = params.get(kind) or {}
    elif local:
        params = {}                      # flat parameters and rope_scaling are those of Gemma's full attention layers
    if config.get("rope_scaling") and not local:
        params = {**params, **config["rope_scaling"]}
    params = _present(params)
    check_keys(params, _ROPE_KINDS, prefix="rope: ")

    theta = float(params.get("rope_theta") or theta or (1_000_000.0 if family == "gemma3" else 10_000.0))
    if (params.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ModelError("partial_rotary_factor other than 1 is not supported")
    scaling = params.get("rope_type") or params.get("type") or "default"
    try:
        match scaling:
            case "default":
                return RopeSpec(theta, head_dim)
            case "linear":
                return RopeSpec(theta, head_dim, "linear", factor=float(params["factor"]))
            case "llama3":
                low, high = float(params["low_freq_factor"]), float(params["high_freq_factor"])
                if low >= high:
                    raise ModelError(f"rope: low_freq_factor ({low:g}) must be below high_freq_factor ({high:g})")
                return RopeSpec(
                    theta, head_dim, "llama3", factor=float(params["factor"]), low_freq_factor=low, high_freq_factor=high,
                    original_max_positions=params.get("original_max_position_embeddings") or max_positions)
            case "factors":
                if len(params["factors"]) != head_dim // 2:
                    raise ModelError(f"rope: {len(params['factors'])} factors for {head_dim // 2} frequencies")
                return RopeSpec(theta, head_dim, "factors", factors=tuple(float(x) for x in params["factors"]))
    except KeyError as missing:
        raise ModelError(f"rope scaling {scaling!r} needs the key {missing}") from None
    raise ModelError(f"rope scaling {scaling!r} is not supported; supported: default, linear, llama3")
