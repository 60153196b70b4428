"""RMSNorm, alone or fused with the residual addition before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engine.layers.linear import copy_checked
from kernels import ops

if TYPE_CHECKING:
    from engine.weights import Checkpoint


class RMSNorm(nn.Module):
    weight: Tensor

    def __init__(self, size: int, source: str, *, eps: float, plus_one: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.source, self.eps, self.plus_one = source, eps, plus_one
        self.register_buffer("weight", torch.empty(size, dtype=dtype), persistent=False)

    def load(self, checkpoint: Checkpoint) -> None:
        copy_checked(self.weight, checkpoint.tensor(f"{self.source}.weight"), f"{self.source}.weight")

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps, self.plus_one)

    def add(self, x: Tensor | None, residual: Tensor) -> Tensor:
        """residual += x in place, if there is any left to add; returns its norm."""
        return self(residual) if x is None else ops.add_rms_norm(x, residual, self.weight, self.eps, self.plus_one)

    def add_fp8(self, x: Tensor | None, residual: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """add, then ops.fp8_quantize."""
        if x is None:
            return ops.fp8_quantize(self(residual), scale)
        return ops.add_rms_norm_fp8(x, residual, self.weight, self.eps, self.plus_one, scale)
