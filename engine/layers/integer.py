"""4- and 8-bit integer weights as AWQ, GPTQ and compressed-tensors pack them, brought to one form for the kernels.

Each format unpacks to codes [outputs, inputs] with a scale and a zero point for every group of inputs: see kernels.ref.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from engine.layers.linear import Linear, LinearMethod, ParamSpec, bias_spec
from engine.models.errors import ModelError
from engine.models.quantization import Awq, Gptq, Packed
from kernels import ops

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)       # column of the i-th nibble of a word


@dataclass(frozen=True, slots=True)
class IntegerMethod(LinearMethod):
    """What the formats share: the kept form and the product."""

    packs: ClassVar[bool] = True
    bits: int

    def keep(self, layer: Linear, codes: Tensor, scales: Tensor, zeros: Tensor | None, stored: dict[str, Tensor],
             g_idx: Tensor | None = None) -> dict[str, Tensor | None]:
        """codes uint8 [N, K], scales [N, K / group], zeros of that shape, uint8 or as scales, or None: the middle code."""
        if zeros is not None:
            zeros = None if bool((zeros == 1 << (self.bits - 1)).all()) else _by_groups(zeros)
        perm = None if g_idx is None else _column_order(layer, g_idx, scales.shape[1])
        if perm is not None:
            codes = codes.index_select(1, perm)
        return {"codes": self.pack(codes), "scales": _by_groups(scales), "zeros": zeros, "perm": perm, "bias": stored.get("bias")}

    def pack(self, codes: Tensor) -> Tensor:
        return ops.w4_pack(codes) if self.bits == 4 else ops.w8_pack(codes)

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        matmul = ops.w4_matmul if self.bits == 4 else ops.w8_matmul
        return matmul(x, layer.codes, layer.scales, layer.zeros, group_of(layer), layer.bias, layer.perm, layer.unpacked)

    def apply_onto(self, layer: Linear, x: Tensor, residual: Tensor) -> Tensor | None:
        if self.bits == 8:
            return LinearMethod.apply_onto(self, layer, x, residual)
        return ops.w4_matmul_onto(x, layer.codes, layer.scales, layer.zeros, group_of(layer), residual, layer.bias, layer.perm,
                                  layer.unpacked)

    def apply_gated(self, layer: Linear, x: Tensor, activation: str) -> Tensor:
        if self.bits == 8:
            return LinearMethod.apply_gated(self, layer, x, activation)
        return ops.w4_gated_matmul(x, layer.codes, layer.scales, layer.zeros, group_of(layer), activation, layer.bias, layer.perm,
                                   layer.unpacked)

    def unpack(self, layer: Linear) -> Tensor:
        weight = ops.w4_weight if self.bits == 4 else ops.w8_weight
        return weight(layer.codes, layer.scales, layer.zeros, group_of(layer), layer.perm, layer.in_features)


@dataclass(frozen=True, slots=True)
class AwqMethod(IntegerMethod):
    """autoawq's WQLinear_GEMM: words hold eight outputs."""

    scheme: Awq

    def specs(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> dict[str, ParamSpec]:
        groups = _groups(in_features, self.scheme.group)
        return {
            "qweight": ParamSpec((in_features, out_features // 8), torch.int32, out_dim=1, out_pack=8),
            "qzeros": ParamSpec((groups, out_features // 8), torch.int32, out_dim=1, out_pack=8),
            "scales": ParamSpec((groups, out_features), dtype, out_dim=1),
            **bias_spec(out_features, bias, dtype),
        }

    def finalize(self, layer: Linear, stored: dict[str, Tensor]) -> dict[str, Tensor | None]:
        codes, zeros = (unpack(stored[name], 4, _AWQ_ORDER).t() for name in ("qweight", "qzeros"))
        return self.keep(layer, codes.contiguous(), stored["scales"].t(), zeros, stored)


@dataclass(frozen=True, slots=True)
class GptqMethod(IntegerMethod):
    """AutoGPTQ's and gptqmodel's QuantLinear: words hold 32 / bits inputs.

    Zero points are packed along the outputs; v1 stores them less one.
    """

    scheme: Gptq

    def specs(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> dict[str, ParamSpec]:
        groups, pack = _groups(in_features, self.scheme.group), 32 // self.bits
        return {
            "qweight": ParamSpec((in_features // pack, out_features), torch.int32, out_dim=1),
            "qzeros": ParamSpec((groups, out_features // pack), torch.int32, out_dim=1, out_pack=pack),
            "scales": ParamSpec((groups, out_features), dtype, out_dim=1),
            "g_idx": ParamSpec((in_features,), torch.int32, out_dim=None, optional=not self.scheme.ordered),
            **bias_spec(out_features, bias, dtype),
        }

    def finalize(self, layer: Linear, stored: dict[str, Tensor]) -> dict[str, Tensor | None]:
        qzeros = stored["qzeros"]
        if not self.scheme.v2:
            # One to every field as one addition to the word: the writers subtract like that, and a zero point of 0 borrows.
            qzeros = qzeros + (0x11111111 if self.bits == 4 else 0x01010101)
        codes, zeros = unpack(stored["qweight"].t(), self.bits), unpack(qzeros, self.bits).t()
        return self.keep(layer, codes, stored["scales"].t(), zeros, stored, stored.get("g_idx"))


@dataclass(frozen=True, slots=True)
class PackedMethod(IntegerMethod):
    """compressed-tensors' pack-quantized: words hold 32 / bits inputs.

    Codes and zero points are signed numbers plus the middle.
    """

    scheme: Packed

    def specs(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> dict[str, ParamSpec]:
        groups, pack = _groups(in_features, self.scheme.group), 32 // self.bits
        specs = {
            "weight_packed": ParamSpec((out_features, in_features // pack), torch.int32, out_dim=0),
            "weight_scale": ParamSpec((out_features, groups), dtype, out_dim=0),
            **bias_spec(out_features, bias, dtype),
        }
        if not self.scheme.symmetric:
            specs["weight_zero_point"] = ParamSpec((out_features // pack, groups), torch.int32, out_dim=0, out_pack=pack)
        specs["weight_g_idx"] = ParamSpec((in_features,), torch.int32, out_dim=None, optional=not self.scheme.ordered)
        return specs

    def finalize(self, layer: Linear, stored: dict[str, Tensor]) -> dict[str, Tensor | None]:
        packed_zeros = stored.get("weight_zero_point")
        zeros = None if packed_zeros is None else unpack(packed_zeros.t(), self.bits).t()
        codes = unpack(stored["weight_packed"], self.bits)
        return self.keep(layer, codes, stored["weight_scale"], zeros, stored, stored.get("weight_g_idx"))


def unpack(words: Tensor, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """The fields of int32 words [R, C], lowest bits first, as uint8 [R, C * 32 / bits]; order[i]: where the i-th goes."""
    fields = 32 // bits
    out = torch.empty(*words.shape, fields, dtype=torch.uint8, device=words.device)
    for i, at in enumerate(order or range(fields)):
        out[..., at] = words >> (bits * i) & ((1 << bits) - 1)
    return out.flatten(1)


def _by_groups(table: Tensor) -> Tensor:
    """Scales or zero points [N, groups], a group's side by side in memory: a kernel reads those of many outputs at once."""
    return table.t().contiguous().t()


def group_of(layer: Linear) -> int:
    """Inputs that share a scale."""
    return layer.in_features // int(layer.scales.shape[1])


def _groups(in_features: int, group: int) -> int:
    return 1 if group == -1 else in_features // group


def _column_order(layer: Linear, g_idx: Tensor, groups: int) -> Tensor | None:
    """int32 [K]: the inputs, those of a group side by side; None where they stand so already. g_idx [parts, K]: their groups."""
    name, size = layer.sources[0][0], layer.in_features // groups
    if not bool((g_idx == g_idx[0]).all()):
        raise ModelError(f"{', '.join(source for source, _ in layer.sources)} are merged into one layer, but their g_idx differ, "
                         "which is not supported")
    perm = torch.argsort(g_idx[0], stable=True)
    in_order = torch.arange(layer.in_features, device=perm.device)
    if not torch.equal(g_idx[0][perm].long(), in_order // size):
        raise ModelError(f"{name}.g_idx does not put {size} inputs into each of {groups} groups")
    return None if torch.equal(perm, in_order) else perm.int()
