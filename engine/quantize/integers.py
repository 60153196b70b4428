"""Weights as small integers: w = (code - zero) * scale, a scale and a zero point for each group of input columns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_LEAST_SCALE = 1e-5     # of an empty group; float16 still holds it to 0.3 %


@dataclass(frozen=True, slots=True)
class IntegerGrid:
    """What integers a group of weights is rounded to.

    `symmetric`: the zero point is the middle code. `least_zero`: the smallest zero point, where a format cannot hold 0.
    """

    bits: int
    group_size: int          # input columns that share a scale; -1: all of a row
    symmetric: bool = False
    least_zero: int = 0

    @property
    def largest(self) -> int:
        return 2**self.bits - 1

    def width(self, in_features: int) -> int:
        return in_features if self.group_size == -1 else self.group_size

    def fit(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [..., group] -> scale (as float16 holds it) and zero point, float32 [..., 1], which cover the group's range."""
        if self.symmetric:
            span = 2 * w.abs().amax(-1, keepdim=True)
        else:
            low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
            span = high - low
        scale = (span / self.largest).clamp(min=_LEAST_SCALE).half().float()
        zero = torch.full_like(scale, (self.largest + 1) // 2) if self.symmetric else (-low / scale).round()
        return scale, zero.clamp(self.least_zero, self.largest)

    def codes(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The nearest codes, as float32."""
        return ((w / scale).round() + zero).clamp(0, self.largest)

    def rounded(self, w: Tensor) -> Tensor:
        """float32 [N, K] -> what is left of it after rounding, float32 [N, K]."""
        groups = w.unflatten(1, (-1, self.width(w.shape[1])))
        scale, zero = self.fit(groups)
        return ((self.codes(groups, scale, zero) - zero) * scale).flatten(1)


@dataclass(frozen=True, slots=True)
class IntegerWeight:
    """codes uint8 [N, K]; scales float16 and zeros uint8 [N, groups]; groups int64 [K]: which one each input column is of."""

    bits: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    groups: Tensor

    def dequantize(self) -> Tensor:
        """float32 [N, K]"""
        zeros, scales = self.zeros[:, self.groups], self.scales[:, self.groups]
        return (self.codes.float() - zeros.float()) * scales.float()

    def rows(self, start: int, count: int) -> IntegerWeight:
        part = slice(start, start + count)
        return replace(self, codes=self.codes[part], scales=self.scales[part], zeros=self.zeros[part])


def round_to_nearest(w: Tensor, grid: IntegerGrid) -> IntegerWeight:
    """Each weight of float32 [N, K] to the nearest code of its group: what every better method is compared with."""
    width = grid.width(w.shape[1])
    groups = w.unflatten(1, (-1, width))
    scale, zero = grid.fit(groups)
    codes = grid.codes(groups, scale, zero).flatten(1)
    index = torch.arange(w.shape[1], device=w.device) // width
    return IntegerWeight(grid.bits, codes.byte(), scale.squeeze(-1).half(), zero.squeeze(-1).byte(), index)
