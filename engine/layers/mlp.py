"""The gated MLP behind its norm: down(act(gate) * up), gate and up in one product."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.layers.linear import Linear, LinearMethod
from engine.layers.norm import RMSNorm
from engine.models.spec import ModelSpec


class MLP(nn.Module):
    def __init__(self, spec: ModelSpec, prefix: str, method: LinearMethod, dtype: torch.dtype) -> None:
        super().__init__()
        width = spec.intermediate_size
        self.activation = spec.activation
        self.gate_up = Linear(spec.hidden_size, [(f"{prefix}.gate_proj", width), (f"{prefix}.up_proj", width)],
                              bias=spec.mlp_bias, dtype=dtype, method=method)
        self.down = Linear(width, [(f"{prefix}.down_proj", spec.hidden_size)], bias=spec.mlp_bias, dtype=dtype, method=method)

    def forward(self, x: Tensor, residual: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """Of the norm of x + residual -> (output, x + residual); the given residual is not to be used again."""
        h, residual = self.gate_up.gated_after_norm(x, residual, norm, self.activation)
        return self.down(h), residual
