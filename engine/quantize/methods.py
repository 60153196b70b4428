"""The methods, each as what it does to one block: its linear layers are rounded in place and come back in their stored form.

A block has four inputs that linear layers share: of q, k and v; of o; of gate and up; of down. Linear is merged along these
already, so a method works on four matrices, and rows are given back to their names when they are written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from engine.layers.linear import Linear
from engine.layers.norm import RMSNorm
from engine.models.decoder import Block
from engine.models.spec import ModelError, ModelSpec
from engine.quantize.awq import search_clip, search_scale
from engine.quantize.calibrate import Gathers
from engine.quantize.fp8 import Fp8Weight, to_fp8
from engine.quantize.gptq import gptq
from engine.quantize.integers import IntegerGrid, IntegerWeight, round_to_nearest
from engine.quantize.packing import pack_awq, pack_fp8, pack_gptq
from engine.quantize.stats import InputPeak, InputStats, output_error

Weight = IntegerWeight | Fp8Weight
G = TypeVar("G", bound=Gathers)


class Gather(Protocol):
    """Shows the calibration's inputs of some linear layers to what `make` makes for each; see Calibration.gather."""

    def __call__(self, linears: Sequence[Linear], make: Callable[[int, torch.device], G]) -> list[G]: ...


@dataclass(slots=True)
class Rounded:
    """A linear layer's stored form. `error`: |X dW|^2 / |X W|^2 over the calibration tokens, where the method has looked."""

    linear: Linear
    weight: Weight
    error: float | None = None


class Method(Protocol):
    @property
    def dtype(self) -> str | None:
        """What the other tensors are stored in; None: the model's own."""

    @property
    def needs_data(self) -> bool: ...

    def round_block(self, block: Block, gather: Gather) -> list[Rounded]:
        """Leave rounded weights in the block, and return their stored form."""

    def pack(self, weight: Any) -> dict[str, Tensor]:
        """The tensors of one named linear layer, by the last part of their names."""

    def config(self) -> dict[str, Any]:
        """quantization_config of config.json."""


def linears(block: Block) -> list[Linear]:
    """By input, in the order in which they are run: qkv, out, gate_up, down. Plain weights are always merged."""
    layers = [block.attention.qkv, block.attention.out, block.mlp.gate_up, block.mlp.down]
    return [layer for layer in layers if isinstance(layer, Linear)]


@dataclass(frozen=True, slots=True)
class RoundToNearest:
    """Every weight to the nearest code, four bits, stored as AWQ's are: the baseline."""

    group_size: int

    @property
    def dtype(self) -> str | None:
        return "float16"

    @property
    def needs_data(self) -> bool:
        return False

    def round_block(self, block: Block, gather: Gather) -> list[Rounded]:
        grid = IntegerGrid(4, self.group_size)
        return [_store(linear, round_to_nearest(_weight(linear), grid)) for linear in linears(block)]

    def pack(self, weight: IntegerWeight) -> dict[str, Tensor]:
        return pack_awq(weight)

    def config(self) -> dict[str, Any]:
        return {"quant_method": "awq", "bits": 4, "group_size": self.group_size, "zero_point": True, "version": "gemm",
                "modules_to_not_convert": ["lm_head"]}


@dataclass(frozen=True, slots=True)
class Awq(RoundToNearest):
    """Scales are folded into what makes the input: the norms before qkv and gate, up; v's rows before o; up's before down."""

    steps: int = 20
    clip: bool = True
    damping: float | None = None     # None: codes are the nearest; else GPTQ's, with this damping, on the scaled weights

    @property
    def needs_data(self) -> bool:
        return True

    def round_block(self, block: Block, gather: Gather) -> list[Rounded]:
        layers, grid = linears(block), IntegerGrid(4, self.group_size)
        qkv, out, gate_up, down = layers
        stats = dict(zip(layers, gather(layers, InputStats), strict=True))
        weights = {linear: _weight(linear) for linear in layers}
        dim, value_width = out.in_features // block.attention.num_heads, qkv.sources[-1][1]

        def one_for_a_group(scale: Tensor) -> Tensor:
            """Query heads that share a value head read the same v, so their channels need one scale."""
            each = scale.view(value_width // dim, -1, dim)
            return each.log().mean(1, keepdim=True).exp().expand_as(each).flatten()

        def rescale(linear: Linear, fold: Callable[[Tensor], Tensor], shared: Callable[[Tensor], Tensor] = lambda s: s) -> None:
            scale = fold(search_scale(weights[linear], stats[linear], grid, self.steps, shared))
            weights[linear] *= scale
            stats[linear].hessian.div_(scale).div_(scale[:, None])

        def fold_v(scale: Tensor) -> Tensor:
            _fold_rows(qkv, weights[qkv], scale.view(value_width // dim, -1, dim)[:, 0].flatten())
            return scale

        def fold_up(scale: Tensor) -> Tensor:
            _fold_rows(gate_up, weights[gate_up], scale)
            return scale

        rescale(qkv, lambda scale: _fold_norm(block.input_norm, scale))
        rescale(out, fold_v, one_for_a_group)
        rescale(gate_up, lambda scale: _fold_norm(block.mlp_norm, scale))
        rescale(down, fold_up)

        rounded = []
        for linear in layers:
            clipped, hessian = weights[linear], stats[linear].hessian
            if self.clip:
                # What counts of q and k is their product, which clipping either harms.
                first = linear.out_features - value_width if linear is qkv else 0
                clipped = torch.cat([clipped[:first], search_clip(clipped[first:], hessian, grid)])
            if self.damping is None:
                stored = round_to_nearest(clipped, grid)
            else:
                stored = gptq(weights[linear], hessian, grid, "static", self.damping, fit_to=clipped)
            rounded.append(_store(linear, stored, weights[linear], hessian))
        return rounded


@dataclass(frozen=True, slots=True)
class Gptq:
    """Input by input: what later ones are fitted to has passed through the earlier ones as rounded."""

    group_size: int
    bits: int
    symmetric: bool
    order: str
    damping: float

    @property
    def dtype(self) -> str | None:
        return "float16"

    @property
    def needs_data(self) -> bool:
        return True

    def round_block(self, block: Block, gather: Gather) -> list[Rounded]:
        grid = IntegerGrid(self.bits, self.group_size, self.symmetric, least_zero=1)
        rounded = []
        for linear in linears(block):
            weight, hessian = _weight(linear), gather([linear], InputStats)[0].hessian
            rounded.append(_store(linear, gptq(weight, hessian, grid, self.order, self.damping), weight, hessian))
        return rounded

    def pack(self, weight: IntegerWeight) -> dict[str, Tensor]:
        return pack_gptq(weight)

    def config(self) -> dict[str, Any]:
        return {"quant_method": "gptq", "bits": self.bits, "group_size": self.group_size, "desc_act": self.order == "full",
                "static_groups": self.order == "static", "sym": self.symmetric, "damp_percent": self.damping, "lm_head": False,
                "true_sequential": True, "checkpoint_format": "gptq"}


@dataclass(frozen=True, slots=True)
class Fp8:
    """Weights by row. `static`: inputs by one scale a layer, from calibration; else by one a token, found when the model runs.

    Stored by compressed-tensors' rules: config.json's own `fp8` has no scales by row, neither in vLLM nor in transformers.
    """

    static: bool

    @property
    def dtype(self) -> str | None:
        return None

    @property
    def needs_data(self) -> bool:
        return self.static

    def round_block(self, block: Block, gather: Gather) -> list[Rounded]:
        layers = linears(block)
        peaks = [found.peak for found in gather(layers, InputPeak)] if self.static else [None] * len(layers)
        return [_store(linear, to_fp8(_weight(linear), peak)) for linear, peak in zip(layers, peaks, strict=True)]

    def pack(self, weight: Fp8Weight) -> dict[str, Tensor]:
        return pack_fp8(weight)

    def config(self) -> dict[str, Any]:
        def scheme(strategy: str, dynamic: bool) -> dict[str, Any]:
            return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": dynamic}

        inputs = scheme("tensor", False) if self.static else scheme("token", True)
        group = {"targets": ["Linear"], "weights": scheme("channel", False), "input_activations": inputs,
                 "output_activations": None}
        return {"quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
                "config_groups": {"group_0": group}, "ignore": ["lm_head"], "kv_cache_scheme": None}


def group_size_for(spec: ModelSpec, asked: int | None) -> int:
    """`asked` if it divides the inputs of every layer; None: the largest usual size that does. Raises ModelError."""
    widths = {inputs: name for name, inputs, _ in spec.linears()}
    fitting = [size for size in (128, 64, 32) if not any(width % size for width in widths)]
    if asked is None and not fitting:
        raise ModelError(f"groups of 128, 64 or 32 do not divide all numbers of inputs ({', '.join(map(str, widths))}): "
                         "set method=fp8")
    size = asked or fitting[0]
    for width, name in widths.items():
        if size > 0 and width % size:
            instead = f"group_size={fitting[0]}" if fitting else "method=fp8"
            raise ModelError(f"group_size={size} does not divide the {width} inputs of {name}: set {instead}")
    return size


def _weight(linear: Linear) -> Tensor:
    """A copy, float32 [N, K]."""
    return linear.weight.to(torch.float32, copy=True)


def _store(linear: Linear, stored: Weight, weight: Tensor | None = None, hessian: Tensor | None = None) -> Rounded:
    """Put the rounded weights where the layer's were; `weight`: what they stand for, `hessian`: of the inputs that they get."""
    values = stored.dequantize()
    linear.weight.copy_(values)
    if weight is None or hessian is None:
        return Rounded(linear, stored)
    return Rounded(linear, stored, output_error(values - weight, hessian) / max(output_error(weight, hessian), 1e-30))


def _fold_norm(norm: RMSNorm, scale: Tensor) -> Tensor:
    """Divide a norm's output by `scale`; returns by what it is divided once its weight is rounded to its dtype."""
    one = 1.0 if norm.plus_one else 0.0
    before = norm.weight.float() + one
    norm.weight.copy_(before / scale - one)
    after = norm.weight.float() + one
    return torch.where(after == 0, scale, before / after)


def _fold_rows(linear: Linear, weight: Tensor, scale: Tensor) -> None:
    """Divide the last rows of a layer's `weight` (its float32 copy) and bias by `scale`, in place."""
    rows = slice(linear.out_features - scale.numel(), None)
    weight[rows] /= scale[:, None]
    if linear.bias is not None:
        linear.bias[rows] /= scale
