"""How quantised weights lie in files: AutoAWQ's `gemm`, AutoGPTQ's `gptq` (version 1), compressed-tensors' float-quantized."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.quantize.fp8 import Fp8Weight
from engine.quantize.integers import IntegerWeight

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)      # which of eight neighbours stands in each four bits of an int32, lowest first


def pack_awq(weight: IntegerWeight) -> dict[str, Tensor]:
    """qweight int32 [K, N / 8], qzeros int32 [groups, N / 8], scales float16 [groups, N]. Four bits, groups in natural order."""
    order = torch.tensor(_AWQ_ORDER, device=weight.codes.device)

    def packed(values: Tensor) -> Tensor:
        return _pack(values.T.unflatten(1, (-1, 8))[..., order].flatten(1), 4)

    return {"qweight": packed(weight.codes), "qzeros": packed(weight.zeros), "scales": weight.scales.T}


def pack_gptq(weight: IntegerWeight) -> dict[str, Tensor]:
    """qweight int32 [K bits / 32, N], qzeros int32 [groups, N bits / 32], scales float16 [groups, N], g_idx int32 [K].

    Zero points are stored less one, which readers add again (some without wrapping round, so that 0 cannot be stored).
    """
    return {"qweight": _pack(weight.codes, weight.bits).T, "qzeros": _pack(weight.zeros.T - 1, weight.bits),
            "scales": weight.scales.T, "g_idx": weight.groups.int()}


def pack_fp8(weight: Fp8Weight) -> dict[str, Tensor]:
    """weight float8_e4m3fn [N, K], weight_scale float32 [N, 1], and input_scale float32 [1] where it is fixed."""
    tensors = {"weight": weight.weight, "weight_scale": weight.scales}
    return tensors if weight.input_scale is None else {**tensors, "input_scale": weight.input_scale}


def _pack(values: Tensor, bits: int) -> Tensor:
    """uint8 [A, B] -> int32 [A, B bits / 32]: neighbours along B in one word, the first in the lowest bits."""
    shifts = torch.arange(0, 32, bits, device=values.device)
    words = (values.long().unflatten(1, (-1, shifts.numel())) << shifts).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()
