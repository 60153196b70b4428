"""How a checkpoint's linear layers are stored, read from config.json's quantization_config alone.

A variant that is not supported is refused here by its key, so before any weights are read, or fetched. What a scheme means for
loading and compute stands in engine/layers/quantized.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from engine.models.config_keys import COUNT, FLAG, OBJECT, TEXT, TEXTS, check_keys, either, list_of, whole
from engine.models.errors import ModelError
from engine.models.names import stored_names
from kernels.formats import FP8_BLOCK

GROUPS = (-1, 32, 64, 128)      # inputs that share a scale; -1: all of them
GGUF_KEPT = ("Q4_0", "Q4_K", "Q6_K", "Q8_0")

_KINDS = {
    **dict.fromkeys(("quant_method", "format"), TEXT), **dict.fromkeys(("bits", "w_bit"), COUNT),
    **dict.fromkeys(("group_size", "q_group_size"), whole(-1)), "modules_in_block_to_quantize": list_of(either(TEXT, TEXTS)),
    **dict.fromkeys(("modules_to_not_convert", "ignored_layers", "ignore"), TEXTS),
    **dict.fromkeys(("dynamic", "sparsity_config", "config_groups", "types"), OBJECT),
}
_GROUP_KINDS = {"targets": TEXTS, "weights": OBJECT, "input_activations": OBJECT, "format": TEXT}
_ARGS_KINDS = {"num_bits": COUNT, "type": TEXT, "strategy": TEXT, "group_size": whole(-1), "symmetric": FLAG}


@dataclass(frozen=True, slots=True)
class Awq:
    """autoawq's `gemm` layout: 4 bits with zero points (arXiv 2306.00978)."""

    group: int

    def multiples(self) -> tuple[int, int]:
        """What the numbers of inputs and outputs of a layer must be multiples of."""
        return max(self.group, 8), 8


@dataclass(frozen=True, slots=True)
class Gptq:
    """AutoGPTQ's layout (arXiv 2210.17323). `ordered`: columns belong to groups by g_idx. `v2`: zero points are as they are."""

    bits: int
    group: int
    ordered: bool
    v2: bool

    def multiples(self) -> tuple[int, int]:
        return max(self.group, 8), 32 // self.bits


@dataclass(frozen=True, slots=True)
class Packed:
    """compressed-tensors' pack-quantized integers. `ordered`: columns belong to groups by weight_g_idx."""

    bits: int
    group: int
    symmetric: bool
    ordered: bool

    def multiples(self) -> tuple[int, int]:
        return max(self.group, 8), 32 // self.bits


@dataclass(frozen=True, slots=True)
class Fp8:
    """float8_e4m3fn weights and inputs, weights with one scale a "tensor", a "channel" (output) or a "block" of 128 x 128.

    `scale`: the tensor's name in the checkpoint. `static`: inputs have one scale from calibration, `input_scale`; else each token
    is scaled by its largest, or every 128 inputs of it where weights have blocks.
    """

    granularity: str
    scale: str
    static: bool

    def multiples(self) -> tuple[int, int]:
        return (FP8_BLOCK, FP8_BLOCK) if self.granularity == "block" else (1, 1)


@dataclass(frozen=True, slots=True)
class Gguf:
    """GGUF's blocks of this type."""

    kind: str

    def multiples(self) -> tuple[int, int]:
        return 1, 1         # the file's reader has seen to that


Scheme = Awq | Gptq | Packed | Fp8 | Gguf


@dataclass(frozen=True, slots=True)
class Quantization:
    """Which layers are stored how. `method`: the config's quant_method; `rules`: (pattern, scheme), the first match counts.

    `multimodal`: patterns may be of the names that layers have in such a checkpoint, see stored_names.
    """

    method: str
    rules: tuple[tuple[re.Pattern[str], Scheme], ...]
    ignored: tuple[re.Pattern[str], ...] = ()
    multimodal: bool = False

    @classmethod
    def read(cls, raw: Mapping[str, Any], multimodal: bool = False) -> Quantization:
        """From a quantization_config. Raises ModelError."""
        check_keys(raw, _KINDS, prefix="quantization_config.")
        method = raw.get("quant_method")
        if method not in _READERS:
            raise ModelError(f"quantization_config.quant_method={method!r} is not supported; supported: {', '.join(_READERS)}")
        found = replace(_READERS[method](raw), multimodal=multimodal)
        if found.scheme("lm_head") is not None:
            raise ModelError("quantization_config: the LM head is quantised, which is not supported; it must stand in ignore")
        return found

    @property
    def integer(self) -> bool:
        return any(isinstance(scheme, (Awq, Gptq, Packed)) for _, scheme in self.rules)

    @property
    def fp8(self) -> bool:
        return any(isinstance(scheme, Fp8) for _, scheme in self.rules)

    def scheme(self, name: str) -> Scheme | None:
        """Of the layer `name` (model.layers.0.self_attn.q_proj); None: its weights are plain."""
        names = stored_names(name) if self.multimodal else [name]
        if any(pattern.match(name) for pattern in self.ignored for name in names):
            return None
        return next((scheme for pattern, scheme in self.rules if any(pattern.match(name) for name in names)), None)

    def check(self, layers: Iterable[tuple[str, int, int]]) -> None:
        """Raise ModelError if one of the layers (name, inputs, outputs) has a shape that its scheme cannot have."""
        for name, inputs, outputs in layers:
            if (scheme := self.scheme(name)) is not None:
                by, out_by = scheme.multiples()
                if inputs % by or outputs % out_by:
                    raise ModelError(f"{name} has {inputs} inputs and {outputs} outputs, which is not supported: {self.method} "
                                     f"weights of {scheme} need multiples of {by} and {out_by}")


_BLOCKS = re.compile(r"model\.layers\.")        # what methods without targets quantise: not the embedding, not the LM head


def _within(key: str) -> re.Pattern[str]:
    """Modules that have `key` among the parts of their name, themselves or above them: q_proj, self_attn, model.layers.1.

    A dot at its end, which keeps those who look for a part of the name from taking layer 10 for 1, says nothing more.
    """
    return re.compile(rf"(?:.*\.)?{re.escape(key.rstrip('.'))}(?:\.|$)")


def _expression(text: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ModelError(f"quantization_config.{where} holds {text!r}, which is no regular expression: {error}") from None


def _value(raw: Mapping[str, Any], *keys: str, allowed: Iterable[Any], default: Any = None) -> Any:
    """The first of the keys that is set, if its value is one of those allowed."""
    key = next((key for key in keys if raw.get(key) is not None), keys[0])
    value = default if raw.get(key) is None else raw[key]
    if value not in allowed:
        raise ModelError(f"quantization_config.{key}={value!r} is not supported; supported: {', '.join(map(str, allowed))}")
    return value


def _empty(raw: Mapping[str, Any], *keys: str) -> None:
    for key in keys:
        if raw.get(key):
            raise ModelError(f"quantization_config.{key}={raw[key]!r} is not supported")


def _awq(raw: Mapping[str, Any]) -> Quantization:
    _value(raw, "bits", "w_bit", allowed=[4])
    version = raw.get("version") or raw.get("format") or "gemm"
    _value({"version": str(version).lower()}, "version", allowed=["gemm"])
    _value(raw, "zero_point", allowed=[True], default=True)
    scheme = Awq(_value(raw, "group_size", "q_group_size", allowed=GROUPS, default=128))
    return Quantization("awq", ((_BLOCKS, scheme),), tuple(_within(key) for key in raw.get("modules_to_not_convert") or ()))


def _gptq(raw: Mapping[str, Any]) -> Quantization:
    _empty(raw, "lm_head", "is_marlin_format")
    _value(raw, "pack_dtype", allowed=["int32"], default="int32")
    stored = _value(raw, "checkpoint_format", "format", allowed=["gptq", "gptq_v2"], default="gptq")
    scheme = Gptq(_value(raw, "bits", allowed=[4, 8]), _value(raw, "group_size", allowed=GROUPS), bool(raw.get("desc_act")),
                  stored == "gptq_v2")
    # gptqmodel's rules by name: "-:regex" leaves modules as they are, any other changes how they are quantised.
    rules = raw.get("dynamic") or {}
    if changed := [key for key in rules if not key.startswith("-:")]:
        raise ModelError(f"quantization_config.dynamic sets {changed[0]!r} apart, which is not supported")
    ignored = [_expression(key.removeprefix("-:"), "dynamic") for key in rules]
    ignored += [_within(key) for key in raw.get("modules_to_not_convert") or ()]
    listed = raw.get("modules_in_block_to_quantize") or ()         # names, or lists of them
    only = [_within(name) for names in listed for name in ([names] if isinstance(names, str) else names)]
    return Quantization("gptq", tuple((pattern, scheme) for pattern in only or [_BLOCKS]), tuple(ignored))


def _fp8(raw: Mapping[str, Any]) -> Quantization:
    _value(raw, "fmt", allowed=["e4m3"], default="e4m3")
    _value(raw, "scale_fmt", allowed=["float"], default="float")
    static = _value(raw, "activation_scheme", allowed=["static", "dynamic"], default="dynamic") == "static"
    if raw.get("weight_block_size") is None:
        scheme = Fp8("tensor", "weight_scale", static)
    else:
        _value(raw, "weight_block_size", allowed=[[FP8_BLOCK, FP8_BLOCK]])
        _value(raw, "activation_scheme", allowed=["dynamic"], default="dynamic")
        scheme = Fp8("block", "weight_scale_inv", static=False)
    ignored = [*(raw.get("ignored_layers") or ()), *(raw.get("modules_to_not_convert") or ())]
    return Quantization("fp8", ((_BLOCKS, scheme),), tuple(_within(key) for key in ignored))


def _compressed_tensors(raw: Mapping[str, Any]) -> Quantization:
    _empty(raw, "transform_config")
    _value(raw.get("sparsity_config") or {}, "format", allowed=["dense"], default="dense")
    rules = []
    for name, group in (raw.get("config_groups") or {}).items():
        if not isinstance(group, Mapping):
            raise ModelError(f"quantization_config.config_groups.{name}={group!r} is not supported: give its targets and weights")
        check_keys(group, _GROUP_KINDS, prefix=f"quantization_config.config_groups.{name}.")
        _empty(group, "output_activations")
        scheme = _compressed_group(group, str(group.get("format") or raw.get("format")), f"config_groups.{name}")
        rules += [(target, scheme) for target in group.get("targets") or ("Linear",)]
    if not rules:
        raise ModelError("quantization_config.config_groups is empty: give the model's own config.json")
    rules.sort(key=lambda rule: _breadth(rule[0]))
    return Quantization("compressed-tensors", tuple((_target(target, "config_groups"), scheme) for target, scheme in rules),
                        tuple(_target(name, "ignore") for name in raw.get("ignore") or ()))


def _compressed_group(group: Mapping[str, Any], stored: str, where: str) -> Scheme:
    weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
    for name, args in (("weights", weights), ("input_activations", inputs)):
        check_keys(args, _ARGS_KINDS, prefix=f"quantization_config.{where}.{name}.")
    bits = weights.get("num_bits", 8)
    kind = f"{weights.get('type', 'int')}{bits}"
    strategy, symmetric = weights.get("strategy") or "tensor", weights.get("symmetric", True)
    inputs_as = _inputs(inputs)
    if stored == "pack-quantized" and kind in ("int4", "int8") and strategy in ("group", "channel") and inputs_as == "plain":
        size = -1 if strategy == "channel" else _value(weights, "group_size", allowed=GROUPS)
        return Packed(bits, size, symmetric, ordered=weights.get("actorder") in ("group", "dynamic", True))
    if stored in ("float-quantized", "naive-quantized") and kind == "float8" and symmetric:
        if strategy in ("tensor", "channel") and inputs_as in ("static", "token"):
            return Fp8(strategy, "weight_scale", static=inputs_as == "static")
        if strategy == "block" and weights.get("block_structure") == [FP8_BLOCK, FP8_BLOCK] and inputs_as == "group":
            return Fp8("block", "weight_scale", static=False)
    raise ModelError(
        f"quantization_config.{where}: {kind} weights by {strategy} in format {stored} with {inputs_as} inputs are not "
        "supported; supported: pack-quantized int4 and int8 by group or channel with plain inputs, float-quantized float8 by "
        f"tensor or channel with static or token inputs, or by block of {FP8_BLOCK} with group inputs")


def _inputs(args: Mapping[str, Any]) -> str:
    """How input_activations quantises a layer's inputs, in a word."""
    if not args:
        return "plain"
    kind, strategy = f"{args.get('type', 'int')}{args.get('num_bits', 8)}", args.get("strategy") or "tensor"
    dynamic = args.get("dynamic")
    match kind, strategy, bool(dynamic):
        case "float8", "tensor", False:
            return "static"
        case "float8", "token", True:
            return "token"
        case "float8", "group", True if args.get("group_size") == FP8_BLOCK:
            return "group"
    return f"{kind} {strategy} {'dynamic' if dynamic else 'static'}"


def _target(text: str, where: str) -> re.Pattern[str]:
    """compressed-tensors' ways to name modules: a class, re: and a regular expression, or the name."""
    if text == "Linear":
        return re.compile("")
    return _expression(text.removeprefix("re:"), where) if text.startswith("re:") else re.compile(re.escape(text) + "$")


def _breadth(text: str) -> int:
    """Names count before expressions and those before classes, in whichever order a file has them."""
    return 2 if text == "Linear" else int(text.startswith("re:"))


def _gguf(raw: Mapping[str, Any]) -> Quantization:
    if raw.get("types") is None:      # which the file's reader tells
        raise ModelError("quantization_config.quant_method='gguf' is not supported in a config.json: give the .gguf file")
    rules = tuple((re.compile(re.escape(name) + "$"), Gguf(_value({name: kind}, name, allowed=GGUF_KEPT)))
                  for name, kind in raw["types"].items())
    return Quantization("gguf", rules)


_READERS = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed_tensors, "fp8": _fp8, "gguf": _gguf}
