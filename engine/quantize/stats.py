"""What the methods need to know about the inputs of a linear layer, gathered over the calibration tokens."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 2.0        # times the median token's size: more does no token count


class InputStats:
    """`hessian`: sum of x x^T, float32 [K, K] (half the Hessian of the squared output error); `mean_abs`: float32 [K].

    Before some layers a few tokens, mostly the first of a text, are tens of times as large as others (massive
    activations, Sun et al., arXiv 2402.17762). The norm after the sum takes that out again, so they are scaled down: the error of
    all others would not count beside theirs.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.hessian = torch.zeros(in_features, in_features, device=device)
        self._sum_abs = torch.zeros(in_features, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """x [T, K]"""
        x = x.float()
        size = x.square().mean(1, keepdim=True).sqrt()
        most = LARGEST * size.median()
        if most > 0:
            x = x * (most / size.clamp(min=1e-30)).clamp(max=1.0)
        self.hessian.addmm_(x.T, x)
        self._sum_abs += x.abs().sum(0)
        self.tokens += x.shape[0]

    @property
    def mean_abs(self) -> Tensor:
        return self._sum_abs / max(self.tokens, 1)


class InputPeak:
    """`peak`: the largest absolute input, float32 []."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.peak = torch.zeros((), device=device)

    def add(self, x: Tensor) -> None:
        """x [T, K]"""
        self.peak = torch.maximum(self.peak, x.abs().max().float())


def output_error(change: Tensor, hessian: Tensor) -> float:
    """|X change^T|^2 of a change of the weights [N, K] over all tokens."""
    return ((change @ hessian) * change).sum(dtype=torch.float64).item()
