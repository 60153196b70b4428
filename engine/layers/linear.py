"""Linear layers whose format owns loading and compute: Linear asks its LinearMethod for parameters, repacking and the product."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from engine.models.errors import ModelError
from kernels import ops

if TYPE_CHECKING:
    from engine.layers.norm import RMSNorm
    from engine.weights import Checkpoint


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One tensor of a linear layer in the checkpoint's layout.

    `out_dim`: the dimension along which merged parts are joined; None: each part has the whole of it, and they are stacked in
    front, [parts, *shape].
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    out_dim: int | None
    out_pack: int = 1           # output features in one stored element along out_dim
    optional: bool = False      # a layer may have none


class LinearMethod(Protocol):
    """How a weight format is stored, prepared and multiplied. Layers whose methods are equal may be merged.

    `packs`: products of many rows have to unpack the weight first.
    """

    packs: ClassVar[bool] = False

    def specs(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> dict[str, ParamSpec]:
        """The parameters by their name in the checkpoint (`weight`, `qweight` ...)."""

    def finalize(self, layer: Linear, stored: dict[str, Tensor]) -> dict[str, Tensor | None]:
        """Once, after loading: what is stored, repacked, by the names that `apply` finds it under in the layer."""

    def kept_bytes(self, in_features: int, out_features: int, dtype: torch.dtype) -> int:
        """About what a layer takes on the device, told without its weights: as much as it is stored in."""
        specs = self.specs(in_features, out_features, False, dtype)
        return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs.values())

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        """x [T, in_features] -> [T, out_features]."""

    def plain(self, layer: Linear) -> Tensor | None:
        """The weight [out_features, in_features] of a layer that is x W^T and no more."""
        return None

    def unpack(self, layer: Linear) -> Tensor:
        """The weight [out_features, in_features] in the model's dtype; of methods that pack it."""
        raise TypeError(f"{layer.sources[0][0]} is not packed")

    def apply_onto(self, layer: Linear, x: Tensor, residual: Tensor) -> Tensor | None:
        """The product, which is left to be added to the residual; None: it has been."""
        return self.apply(layer, x)

    def apply_after_norm(self, layer: Linear, x: Tensor | None, residual: Tensor, norm: RMSNorm) -> Tensor:
        """residual += x in place, if any; the product with its norm."""
        return self.apply(layer, norm.add(x, residual))

    def apply_gated(self, layer: Linear, x: Tensor, activation: str) -> Tensor:
        """ops.gated_act of the product of a layer [gate | up]: x [T, in_features] -> [T, out_features / 2]."""
        return ops.gated_act(self.apply(layer, x), activation)

    def apply_gated_fp8(self, layer: Linear, x: Tensor | None, residual: Tensor, norm: RMSNorm, activation: str,
                        scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """residual += x in place, if any; ops.gated_act_fp8 of what a layer [gate | up] makes of its norm."""
        return ops.gated_act_fp8(self.apply_after_norm(layer, x, residual, norm), activation, scale)

    def apply_after_gate(self, layer: Linear, gate_up: Linear | Joined, x: Tensor | None, residual: Tensor, norm: RMSNorm,
                         activation: str) -> Tensor:
        """residual += x in place, if any; the product with the gated activation of what [gate | up] makes of its norm."""
        return self.apply(layer, gate_up.gated(norm.add(x, residual), activation))

    def apply_after_gate_onto(self, layer: Linear, gate_up: Linear | Joined, x: Tensor | None, residual: Tensor, norm: RMSNorm,
                              activation: str) -> Tensor | None:
        """apply_after_gate, as apply_onto has it."""
        return self.apply_onto(layer, gate_up.gated(norm.add(x, residual), activation), residual)


# Tensors of any format that change what a layer computes, where they are not zero. Scales of inputs that are not rounded do not.
_COUNTING = ("bias", "qzeros", "g_idx", "weight_scale", "weight_scale_inv", "weight_zero_point", "weight_g_idx",
             "pre_quant_scale")

MethodOf = Callable[[str], LinearMethod]    # of a layer by its name in the checkpoint


@dataclass(frozen=True, slots=True)
class DenseMethod(LinearMethod):
    """Plain weights in the model's dtype."""

    def specs(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> dict[str, ParamSpec]:
        return {"weight": ParamSpec((out_features, in_features), dtype, out_dim=0), **bias_spec(out_features, bias, dtype)}

    def finalize(self, layer: Linear, stored: dict[str, Tensor]) -> dict[str, Tensor | None]:
        return {"weight": stored["weight"], "bias": stored.get("bias")}

    def plain(self, layer: Linear) -> Tensor | None:
        weight: Tensor = layer.weight
        return weight if layer.bias is None else None

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        return ops.linear(x, layer.weight, layer.bias)

    def apply_onto(self, layer: Linear, x: Tensor, residual: Tensor) -> Tensor | None:
        return ops.linear_onto(x, layer.weight, layer.bias, residual)

    def apply_gated(self, layer: Linear, x: Tensor, activation: str) -> Tensor:
        return ops.gated_linear(x, layer.weight, layer.bias, activation)


def bias_spec(out_features: int, bias: bool, dtype: torch.dtype) -> dict[str, ParamSpec]:
    return {"bias": ParamSpec((out_features,), dtype, out_dim=0)} if bias else {}


class Linear(nn.Module):
    """y = x W^T + b over merged parts: `sources` are the checkpoint's prefixes, joined along the output in that order.

    Its tensors are made by load(), one layer after the other, so that no more than one stands in memory as it was stored.
    """

    if TYPE_CHECKING:
        def __getattr__(self, name: str) -> Any: ...        # the format's own tensors

    def __init__(self, in_features: int, sources: Sequence[tuple[str, int]], *, bias: bool, dtype: torch.dtype,
                 method: LinearMethod) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, sum(width for _, width in sources)
        self.sources, self.method, self.dtype, self.device = tuple(sources), method, dtype, torch.empty(0).device
        self.specs = method.specs(in_features, self.out_features, bias, dtype)
        self.unpacked: Tensor | None = None

    def load(self, checkpoint: Checkpoint) -> None:
        stored = {name: self._read(checkpoint, name, spec) for name, spec in self.specs.items()
                  if not spec.optional or any(checkpoint.has(f"{source}.{name}") for source, _ in self.sources)}
        # Of plain weights, what another format left beside them changes nothing.
        counting = ("bias",) if self.specs.keys() <= {"weight", "bias"} else _COUNTING
        for name in (f"{source}.{kind}" for source, _ in self.sources for kind in counting if kind not in self.specs):
            if checkpoint.has(name) and checkpoint.tensor(name).float().any():
                raise ModelError(f"tensor {name} is not zero, but the model's config says that there is none")
        for name, tensor in self.method.finalize(self, stored).items():
            self.register_buffer(name, tensor, persistent=False)

    def keep_unpacked(self) -> None:
        """Keep the weight of a method that packs it unpacked too, for products of many rows."""
        self.unpacked = self.method.unpack(self)

    def _read(self, checkpoint: Checkpoint, name: str, spec: ParamSpec) -> Tensor:
        """One tensor of all parts, on the layer's device."""
        shape = spec.shape if spec.out_dim is not None else (len(self.sources), *spec.shape)
        target, start = torch.empty(shape, dtype=spec.dtype, device=self.device), 0
        for i, (source, width) in enumerate(self.sources):
            size = width // spec.out_pack
            part = target[i] if spec.out_dim is None else target.narrow(spec.out_dim, start, size)
            copy_checked(part, checkpoint.tensor(f"{source}.{name}"), f"{source}.{name}")
            start += size
        return target

    def forward(self, x: Tensor) -> Tensor:
        return self.method.apply(self, x)

    @property
    def plain(self) -> Tensor | None:
        """See LinearMethod.plain."""
        return self.method.plain(self)

    def onto(self, x: Tensor, residual: Tensor) -> Tensor | None:
        """See LinearMethod.apply_onto."""
        return self.method.apply_onto(self, x, residual)

    def gated(self, x: Tensor, activation: str) -> Tensor:
        """See LinearMethod.apply_gated."""
        return self.method.apply_gated(self, x, activation)

    def after_norm(self, x: Tensor | None, residual: Tensor, norm: RMSNorm) -> Tensor:
        """See LinearMethod.apply_after_norm."""
        return self.method.apply_after_norm(self, x, residual, norm)

    def gated_fp8(self, x: Tensor | None, residual: Tensor, norm: RMSNorm, activation: str,
                  scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """See LinearMethod.apply_gated_fp8."""
        return self.method.apply_gated_fp8(self, x, residual, norm, activation, scale)

    def after_gate(self, gate_up: Linear | Joined, x: Tensor | None, residual: Tensor, norm: RMSNorm, activation: str) -> Tensor:
        """See LinearMethod.apply_after_gate."""
        return self.method.apply_after_gate(self, gate_up, x, residual, norm, activation)

    def after_gate_onto(self, gate_up: Linear | Joined, x: Tensor | None, residual: Tensor, norm: RMSNorm,
                        activation: str) -> Tensor | None:
        """See LinearMethod.apply_after_gate_onto."""
        return self.method.apply_after_gate_onto(self, gate_up, x, residual, norm, activation)


class Joined(nn.Module):
    """Linear layers side by side: the parts of a merged layer that are stored in different formats."""

    plain = None

    def __init__(self, parts: Sequence[Linear]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)

    def gated(self, x: Tensor, activation: str) -> Tensor:
        """See LinearMethod.apply_gated."""
        return ops.gated_act(self(x), activation)

    def after_norm(self, x: Tensor | None, residual: Tensor, norm: RMSNorm) -> Tensor:
        """See LinearMethod.apply_after_norm."""
        return self(norm.add(x, residual))

    def gated_fp8(self, x: Tensor | None, residual: Tensor, norm: RMSNorm, activation: str,
                  scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """See LinearMethod.apply_gated_fp8."""
        return ops.gated_act_fp8(self.after_norm(x, residual, norm), activation, scale)


def make_linear(in_features: int, sources: Sequence[tuple[str, int]], *, bias: bool, dtype: torch.dtype,
                method_of: MethodOf) -> Linear | Joined:
    """One layer of all sources where they are stored alike, else as few as can be, side by side."""
    runs = [(method, list(run)) for method, run in groupby(sources, lambda source: method_of(source[0]))]
    parts = [Linear(in_features, run, bias=bias, dtype=dtype, method=method) for method, run in runs]
    return parts[0] if len(parts) == 1 else Joined(parts)


def copy_checked(target: Tensor, source: Tensor, name: str) -> None:
    """target <- source, converted between plain float types; another shape or kind of type is an error that names the tensor."""
    if target.numel() == source.numel() == 1:
        source = source.view(target.shape)          # scales of one element are stored with and without a dimension
    if target.shape != source.shape:
        raise ValueError(f"tensor {name} has shape {list(source.shape)}, but the model's config asks for {list(target.shape)}")
    if target.dtype != source.dtype and not (_plain(target) and _plain(source)):
        raise ValueError(f"tensor {name} is stored as {source.dtype}, but the model's config asks for {target.dtype}")
    target.copy_(source)


def _plain(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1
