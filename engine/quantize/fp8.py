"""FP8 e4m3: each output row of the weights has a scale; inputs are scaled as they come, or by a fixed scale from calibration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float8_e4m3fn).max      # 448


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """weight float8_e4m3fn [N, K]; scales float32 [N, 1]; input_scale float32 [1], None where each token gets its own."""

    weight: Tensor
    scales: Tensor
    input_scale: Tensor | None = None

    def dequantize(self) -> Tensor:
        """float32 [N, K]"""
        return self.weight.float() * self.scales

    def rows(self, start: int, count: int) -> Fp8Weight:
        return Fp8Weight(self.weight[start:start + count], self.scales[start:start + count], self.input_scale)


def to_fp8(weight: Tensor, input_peak: Tensor | None = None) -> Fp8Weight:
    """Scale each row of float32 [N, K] to the format's range and round. `input_peak`: the largest absolute input, float32 []."""
    scales = (weight.abs().amax(1, keepdim=True) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    rounded = (weight / scales).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    input_scale = None if input_peak is None else (input_peak / LARGEST).clamp(min=torch.finfo(torch.float32).tiny).reshape(1)
    return Fp8Weight(rounded, scales, input_scale)
