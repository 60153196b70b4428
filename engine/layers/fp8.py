"""FP8: float8_e4m3fn weights and inputs, from a checkpoint or made from plain weights at load."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.layers.linear import DenseMethod, Joined, Linear, LinearMethod, ParamSpec, bias_spec
from engine.layers.norm import RMSNorm
from engine.models.quantization import Fp8
from kernels import ops
from kernels.formats import FP8_BLOCK


class _RowScaled(LinearMethod):
    """Products of weights with a scale for each output and inputs with one for each token, made where the inputs are."""

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        return ops.fp8_matmul(x, layer.weight, layer.weight_scale, layer.input_scale, layer.bias)

    def apply_after_norm(self, layer: Linear, x: Tensor | None, residual: Tensor, norm: RMSNorm) -> Tensor:
        inputs = norm.add_fp8(x, residual, layer.input_scale)
        return ops.fp8_product(*inputs, layer.weight, layer.weight_scale, layer.bias, residual.dtype)

    def apply_gated_fp8(self, layer: Linear, x: Tensor | None, residual: Tensor, norm: RMSNorm, activation: str,
                        scale: Tensor | None) -> tuple[Tensor, Tensor]:
        inputs = norm.add_fp8(x, residual, layer.input_scale)
        return ops.fp8_gated_product(*inputs, layer.weight, layer.weight_scale, layer.bias, residual.dtype, activation, scale)

    def apply_after_gate(self, layer: Linear, gate_up: Linear | Joined, x: Tensor | None, residual: Tensor, norm: RMSNorm,
                         activation: str) -> Tensor:
        inputs = gate_up.gated_fp8(x, residual, norm, activation, layer.input_scale)
        return ops.fp8_product(*inputs, layer.weight, layer.weight_scale, layer.bias, residual.dtype)

    def apply_after_gate_onto(self, layer: Linear, gate_up: Linear | Joined, x: Tensor | None, residual: Tensor, norm: RMSNorm,
                              activation: str) -> Tensor | None:
        return self.apply_after_gate(layer, gate_up, x, residual, norm, activation)


@dataclass(frozen=True, slots=True)
class Fp8Method(_RowScaled):
    """Weights with a scale for the tensor or for each output, inputs with one from calibration or for each token."""

    scheme: Fp8

    def specs(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> dict[str, ParamSpec]:
        if self.scheme.granularity == "tensor":
            scale = ParamSpec((1,), torch.float32, out_dim=None)
        else:
            scale = ParamSpec((out_features, 1), torch.float32, out_dim=0)
        specs = {
            "weight": ParamSpec((out_features, in_features), torch.float8_e4m3fn, out_dim=0),
            self.scheme.scale: scale,
            **bias_spec(out_features, bias, dtype),
        }
        if self.scheme.static:
            specs["input_scale"] = ParamSpec((1,), torch.float32, out_dim=None)
        return specs

    def finalize(self, layer: Linear, stored: dict[str, Tensor]) -> dict[str, Tensor | None]:
        scale, inputs = stored[self.scheme.scale], stored.get("input_scale")
        if self.scheme.granularity == "tensor":             # one a part: their outputs keep their own
            scale = torch.cat([scale[i].expand(width) for i, (_, width) in enumerate(layer.sources)])
        # Merged parts read the same inputs, which are quantised once: by the widest of their scales, so that nothing is cut off.
        return {"weight": stored["weight"], "weight_scale": scale.flatten(), "bias": stored.get("bias"),
                "input_scale": None if inputs is None else inputs.amax(0)}


@dataclass(frozen=True, slots=True)
class Fp8BlockMethod(LinearMethod):
    """Weights with a scale for every block of 128 x 128, inputs with one for every 128 of a token (DeepSeek-V3)."""

    scheme: Fp8

    def specs(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> dict[str, ParamSpec]:
        return {
            "weight": ParamSpec((out_features, in_features), torch.float8_e4m3fn, out_dim=0),
            self.scheme.scale: ParamSpec((out_features // FP8_BLOCK, in_features // FP8_BLOCK), torch.float32, out_dim=0,
                                         out_pack=FP8_BLOCK),
            **bias_spec(out_features, bias, dtype),
        }

    def finalize(self, layer: Linear, stored: dict[str, Tensor]) -> dict[str, Tensor | None]:
        return {"weight": stored["weight"], "weight_scale": stored[self.scheme.scale], "bias": stored.get("bias")}

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        return ops.fp8_block_matmul(x, layer.weight, layer.weight_scale, layer.bias)


@dataclass(frozen=True, slots=True)
class OnlineFp8Method(_RowScaled):
    """Plain weights, quantised when they are loaded, each output by its largest weight; each token's inputs likewise."""

    def specs(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> dict[str, ParamSpec]:
        return DenseMethod().specs(in_features, out_features, bias, dtype)

    def kept_bytes(self, in_features: int, out_features: int, dtype: torch.dtype) -> int:
        return out_features * (in_features * torch.float8_e4m3fn.itemsize + torch.float32.itemsize)

    def finalize(self, layer: Linear, stored: dict[str, Tensor]) -> dict[str, Tensor | None]:
        weight, scale = ops.fp8_quantize(stored["weight"])
        return {"weight": weight, "weight_scale": scale.flatten(), "bias": stored.get("bias"), "input_scale": None}
