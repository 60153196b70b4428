"""Token embedding and the LM head, which may be one matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.layers.linear import copy_checked
from kernels import ops

if TYPE_CHECKING:
    from engine.weights import Checkpoint


class Embedding(nn.Module):
    weight: Tensor

    def __init__(self, vocab_size: int, hidden_size: int, source: str, *, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.source = source
        self.scale = torch.tensor(scale, dtype=dtype).item()      # rounded to the model's dtype, as the checkpoints were trained
        self.register_buffer("weight", torch.empty(vocab_size, hidden_size, dtype=dtype), persistent=False)

    def load(self, checkpoint: Checkpoint) -> None:
        copy_checked(self.weight, checkpoint.tensor(f"{self.source}.weight"), f"{self.source}.weight")

    def forward(self, ids: Tensor) -> Tensor:
        h = F.embedding(ids, self.weight)
        return h if self.scale == 1.0 else h * self.scale

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden [N, hidden_size] -> [N, vocab_size], as the LM head of a tied model or of its own; into `out` if given."""
        return ops.linear(hidden, self.weight, out=out)
