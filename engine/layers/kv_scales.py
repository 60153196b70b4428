"""What FP8 keys and values are divided by before they are stored."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engine.models.errors import ModelError
from engine.models.spec import ModelSpec
from kernels import ops

if TYPE_CHECKING:
    from engine.weights import Checkpoint

_NAMES = {"k": ("k_scale", "k_proj.k_scale"), "v": ("v_scale", "v_proj.v_scale")}     # compressed-tensors', ModelOpt's


class KVScales(nn.Module):
    """Of one layer, float32 [2, kv heads]: the checkpoint's, from calibration, or 1.

    e4m3 keeps four bits of any number between 0.016 and 448, so a scale only matters to keys that leave that range. What makes
    them do so is the bias of their projection (Qwen2's has outliers in the hundreds), which is known: without a scale in the
    checkpoint, keys get one that leaves twice the largest bias, in whatever direction the rotary embedding turns it, in range.
    """

    scales: Tensor

    def __init__(self, spec: ModelSpec, prefix: str) -> None:
        super().__init__()
        self.prefix, self.heads, self.dim = prefix, spec.num_kv_heads, spec.head_dim
        self.register_buffer("scales", torch.ones(2, self.heads), persistent=False)

    def load(self, checkpoint: Checkpoint) -> None:
        bias = f"{self.prefix}.k_proj.bias"
        if checkpoint.has(bias):
            halves = checkpoint.tensor(bias).float().view(self.heads, 2, self.dim // 2)
            largest = halves.square().sum(1).sqrt().amax(-1)
            self.scales[0] = (2 * largest / ops.E4M3_MAX).clamp_min(1.0)
        for part, names in enumerate(_NAMES.values()):
            for name in (f"{self.prefix}.{name}" for name in names):
                if checkpoint.has(name):
                    self.scales[part] = self._checked(name, checkpoint.tensor(name))

    def _checked(self, name: str, stored: Tensor) -> Tensor:
        """One scale, or one a head."""
        if stored.numel() not in (1, self.heads) or not bool((stored.float() > 0).all()):
            raise ModelError(f"tensor {name} has shape {list(stored.shape)}, but must be one positive number, or {self.heads}")
        return stored.flatten().to(self.scales)
