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

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual += x in place; returns its norm."""
        return ops.add_rms_norm(x, residual, self.weight, self.eps, self.plus_one)
