"""GGUF blocks kept as integers: the same codes with their scales, in the form that the integer kernels take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.gguf_quants import BLOCK_TYPES, BlockType
from engine.layers.integer import IntegerMethod, group_of
from engine.layers.linear import Linear, ParamSpec, bias_spec
from kernels import ops

_FLAT = 1 << 14      # steps from the zero point beyond which codes no longer show in 16 bits


@dataclass(frozen=True, slots=True)
class GgufMethod(IntegerMethod):
    """Q4_0 and Q4_K as 4-bit codes, Q8_0 as 8-bit ones; scales and zero points in the model's dtype."""

    kind: BlockType

    @classmethod
    def of(cls, name: str) -> GgufMethod:
        kind = next(kind for kind in BLOCK_TYPES.values() if kind.name == name)
        return (GgufFineMethod if name == "Q6_K" else cls)(kind.bits, kind)

    def specs(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> dict[str, ParamSpec]:
        row = in_features // self.kind.weights * self.kind.bytes
        return {"blocks": ParamSpec((out_features, row), torch.uint8, out_dim=0), **bias_spec(out_features, bias, dtype)}

    def kept_bytes(self, in_features: int, out_features: int, dtype: torch.dtype) -> int:
        assert self.kind.integers is not None
        codes, *tables = self.kind.integers(torch.zeros(1, self.kind.bytes, dtype=torch.uint8))
        block = codes.numel() * self.bits // 8 + sum(table.numel() * dtype.itemsize for table in tables if table is not None)
        return out_features * in_features // self.kind.weights * block

    def finalize(self, layer: Linear, stored: dict[str, Tensor]) -> dict[str, Tensor | None]:
        assert self.kind.integers is not None
        codes, scales, minimums = self.kind.integers(stored["blocks"].view(-1, self.kind.bytes))
        zeros, scales = None, scales.to(layer.dtype).float()
        if minimums is not None:
            # code * scale - minimum = (code - minimum / scale) * scale; by the rounded scale, so that the minimum is not rounded
            # with it. Where the quotient is out of range, all weights are minus the minimum.
            zeros = minimums / scales
            flat = ~(zeros.abs() <= _FLAT)
            codes = codes.masked_fill(flat, 0)
            scales, zeros = torch.where(flat, minimums, scales), zeros.masked_fill(flat, 1)
            zeros = zeros.view(layer.out_features, -1).to(layer.dtype)
        shape = (layer.out_features, -1)
        return self.keep(layer, codes.reshape(shape), scales.reshape(shape).to(layer.dtype), zeros, stored)


@dataclass(frozen=True, slots=True)
class GgufFineMethod(GgufMethod):
    """Q6_K as 8-bit codes. Its groups of 16 are too fine for the fused products: weights are unpacked to scratch memory first."""

    def pack(self, codes: Tensor) -> Tensor:
        return codes.contiguous()

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        return F.linear(x, self.unpack(layer) if layer.unpacked is None else layer.unpacked, layer.bias)

    def unpack(self, layer: Linear) -> Tensor:
        return ops.dequantize_symmetric(layer.codes, layer.scales, group_of(layer))
