"""Linear layers whose format owns loading and compute: Linear asks its LinearMethod for parameters, repacking and the product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from kernels import ops

if TYPE_CHECKING:
    from engine.layers.norm import RMSNorm
    from engine.weights import Checkpoint


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One tensor of a linear layer in the checkpoint's layout. `out_dim`: the dimension along which merged parts are joined."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    out_dim: int
    out_pack: int = 1        # output features in one stored element along out_dim


class LinearMethod(Protocol):
    """How a weight format is stored, prepared and multiplied."""

    def specs(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> dict[str, ParamSpec]:
        """The parameters by their name in the checkpoint (`weight`, `qweight` ...)."""

    def finalize(self, layer: Linear) -> None:
        """Once, after loading: transpose, repack, fold scales."""

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        """x [T, in_features] -> [T, out_features]."""

    def apply_after_norm(self, layer: Linear, x: Tensor, residual: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """-> (the product with the norm of x + residual, x + residual); the given residual is not to be used again."""
        return self.apply(layer, norm.add(x, residual)), residual

    def apply_gated_after_norm(self, layer: Linear, x: Tensor, residual: Tensor, norm: RMSNorm,
                               activation: str) -> tuple[Tensor, Tensor]:
        """As apply_after_norm, of a layer [gate | up], with ops.gated_act of the product."""
        y, residual = self.apply_after_norm(layer, x, residual, norm)
        return ops.gated_act(y, activation), residual


class DenseMethod(LinearMethod):
    """Plain weights in the model's dtype."""

    def specs(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> dict[str, ParamSpec]:
        specs = {"weight": ParamSpec((out_features, in_features), dtype, out_dim=0)}
        if bias:
            specs["bias"] = ParamSpec((out_features,), dtype, out_dim=0)
        return specs

    def finalize(self, layer: Linear) -> None:
        layer.bias = getattr(layer, "bias", None)

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        return ops.linear(x, layer.weight, layer.bias)

    def apply_after_norm(self, layer: Linear, x: Tensor, residual: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        return ops.norm_linear(x, residual, norm.weight, norm.eps, norm.plus_one, layer.weight, layer.bias)

    def apply_gated_after_norm(self, layer: Linear, x: Tensor, residual: Tensor, norm: RMSNorm,
                               activation: str) -> tuple[Tensor, Tensor]:
        return ops.norm_gated_linear(x, residual, norm.weight, norm.eps, norm.plus_one, layer.weight, layer.bias, activation)


class Linear(nn.Module):
    """y = x W^T + b over merged parts: `sources` are the checkpoint's prefixes, joined along the output in that order."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, sources: Sequence[tuple[str, int]], *, bias: bool, dtype: torch.dtype,
                 method: LinearMethod) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, sum(width for _, width in sources)
        self.sources, self.method = tuple(sources), method
        self.specs = method.specs(in_features, self.out_features, bias, dtype)
        for name, spec in self.specs.items():
            self.register_buffer(name, torch.empty(spec.shape, dtype=spec.dtype), persistent=False)

    def load(self, checkpoint: Checkpoint) -> None:
        for name, spec in self.specs.items():
            target, start = getattr(self, name), 0
            for source, width in self.sources:
                size = width // spec.out_pack
                copy_checked(target.narrow(spec.out_dim, start, size), checkpoint.tensor(f"{source}.{name}"), f"{source}.{name}")
                start += size
        self.method.finalize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.method.apply(self, x)

    def after_norm(self, x: Tensor, residual: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """See LinearMethod.apply_after_norm."""
        return self.method.apply_after_norm(self, x, residual, norm)

    def gated_after_norm(self, x: Tensor, residual: Tensor, norm: RMSNorm, activation: str) -> tuple[Tensor, Tensor]:
        """See LinearMethod.apply_gated_after_norm."""
        return self.method.apply_gated_after_norm(self, x, residual, norm, activation)


def copy_checked(target: Tensor, source: Tensor, name: str) -> None:
    """target <- source, converted to its dtype; a wrong shape is an error that names the tensor."""
    if target.shape != source.shape:
        raise ValueError(f"tensor {name} has shape {list(source.shape)}, but the model's config asks for {list(target.shape)}")
    target.copy_(source)
