"""The gated MLP: down(act(gate) * up), gate and up in one product."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.layers.linear import Linear, MethodOf, make_linear
from engine.layers.norm import RMSNorm
from engine.models.spec import ModelSpec


class MLP(nn.Module):
    def __init__(self, spec: ModelSpec, prefix: str, method_of: MethodOf, dtype: torch.dtype) -> None:
        super().__init__()
        width = spec.intermediate_size
        self.activation = spec.activation
        self.gate_up = make_linear(spec.hidden_size, [(f"{prefix}.gate_proj", width), (f"{prefix}.up_proj", width)],
                                   bias=spec.mlp_bias, dtype=dtype, method_of=method_of)
        down = f"{prefix}.down_proj"
        self.down = Linear(width, [(down, spec.hidden_size)], bias=spec.mlp_bias, dtype=dtype, method=method_of(down))

    def forward(self, x: Tensor | None, residual: Tensor, norm: RMSNorm) -> Tensor:
        """residual += x in place, if any; the MLP of its norm."""
        return self.down.after_gate(self.gate_up, x, residual, norm, self.activation)

    def onto(self, x: Tensor | None, residual: Tensor, norm: RMSNorm) -> Tensor | None:
        """The same, left to be added to the residual; None: it has been."""
        return self.down.after_gate_onto(self.gate_up, x, residual, norm, self.activation)
