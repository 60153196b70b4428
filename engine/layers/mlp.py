"""The gated MLP: down(act(gate) * up), gate and up in one product."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.layers.linear import MethodOf, make_linear
from engine.models.spec import ModelSpec


class MLP(nn.Module):
    def __init__(self, spec: ModelSpec, prefix: str, method_of: MethodOf, dtype: torch.dtype) -> None:
        super().__init__()
        width = spec.intermediate_size
        self.activation = spec.activation
        self.gate_up = make_linear(spec.hidden_size, [(f"{prefix}.gate_proj", width), (f"{prefix}.up_proj", width)],
                                   bias=spec.mlp_bias, dtype=dtype, method_of=method_of)
        self.down = make_linear(width, [(f"{prefix}.down_proj", spec.hidden_size)], bias=spec.mlp_bias, dtype=dtype,
                                method_of=method_of)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate_up.gated(x, self.activation))
