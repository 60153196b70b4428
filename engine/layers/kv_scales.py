"""What is taken off FP8 keys, and what keys and values are divided by, before they are stored."""

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
    """Of one layer: `scales`, float32 [2, kv heads], the checkpoint's, from calibration, or 1; and `k_shift`.

    e4m3 keeps four bits of any number between 0.016 and 448. That is too little for keys whose projection has a bias of hundreds,
    as Qwen2's have: what tells one key from another is lost in its last bits. But the bias is the same for all, and where the
    rotary embedding turns it slowly it stays nearly so: `k_shift`, float32 [kv heads, head dim], its mean over the positions of
    cos_sin [positions, rotary], is taken off all keys, which leaves softmax as it is. (A soft cap would see it, and norms of
    heads hide the bias: none there.) Keys' scales leave twice the largest remainder of the bias in range, whatever the
    checkpoint says.
    """

    scales: Tensor
    k_shift: Tensor | None

    def __init__(self, spec: ModelSpec, prefix: str, cos_sin: Tensor) -> None:
        super().__init__()
        self.prefix, self.heads, self.dim, self.cos_sin = prefix, spec.num_kv_heads, spec.head_dim, cos_sin
        self.shifts = not spec.qk_norm and not spec.attn_softcap
        self.register_buffer("scales", torch.ones(2, self.heads), persistent=False)
        self.register_buffer("k_shift", None, persistent=False)

    def load(self, checkpoint: Checkpoint) -> None:
        for part, names in enumerate(_NAMES.values()):
            for name in (f"{self.prefix}.{name}" for name in names):
                if checkpoint.has(name):
                    self.scales[part] = self._checked(name, checkpoint.tensor(name))
        name = f"{self.prefix}.k_proj.bias"
        if self.shifts and checkpoint.has(name):
            self._shift(checkpoint.tensor(name).to(self.scales).view(self.heads, self.dim))

    def _shift(self, bias: Tensor) -> None:
        cos, sin = self.cos_sin.chunk(2, dim=-1)
        half = cos.shape[1]
        a, b = bias[:, :half], bias[:, half : 2 * half]
        mean_cos, mean_sin = cos.mean(0), sin.mean(0)
        self.k_shift = torch.cat([a * mean_cos - b * mean_sin, b * mean_cos + a * mean_sin, bias[:, 2 * half :]], dim=1)
        off = ((cos - mean_cos).square() + (sin - mean_sin).square()).amax(0).sqrt()        # of a unit bias from its mean
        largest = ((a.square() + b.square()).sqrt() * off).amax(1)
        self.scales[0] = torch.maximum(self.scales[0], 2 * largest / ops.E4M3_MAX)

    def _checked(self, name: str, stored: Tensor) -> Tensor:
        """One scale, or one a head."""
        if stored.numel() not in (1, self.heads) or not bool((stored.float() > 0).all()):
            raise ModelError(f"tensor {name} has shape {list(stored.shape)}, but must be one positive number, or {self.heads}")
        return stored.flatten().to(self.scales)
