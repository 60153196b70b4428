"""Rotary tables, one for each distinct rope of a model (Gemma 3 has two)."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.models.spec import RopeSpec


def cos_sin_table(rope: RopeSpec, length: int, device: torch.device) -> Tensor:
    """float32 [length, rotary_dim]: the cosines, then the sines, of position x inverse frequency."""
    angles = torch.outer(torch.arange(length, dtype=torch.float32), rope.inv_freq())
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(device)
