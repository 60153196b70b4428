"""AWQ: input channels with large activations are scaled up before rounding, and groups clipped (Lin et al., arXiv 2306.00978).

The paper runs the layers again for each candidate. Here the error comes from H = sum of x x^T over all calibration tokens:
|X (W - Q)^T|^2 = tr((W - Q) H (W - Q)^T), for the linear layers alone the same quantity, without another pass over the data.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.quantize.integers import IntegerGrid
from engine.quantize.stats import InputStats, output_error

_ROWS = 512              # of a weight, up to twice as many, on which scales are compared: its rows are alike and share the scale
_SHRINKS = tuple(1 - step / 20 for step in range(10))      # of a group's largest weight; the released code tries the same


def search_scale(weight: Tensor, stats: InputStats, grid: IntegerGrid, steps: int,
                 shared: Callable[[Tensor], Tensor] = lambda scale: scale) -> Tensor:
    """The scale of each input channel, float32 [K], of weight float32 [N, K]: W * s is rounded, and x / s multiplied with it.

    Candidates are mean|x|^a (the paper's) and mean|x|^a / mean|w|^(1 - a) (the released code's), a = 0, 1/steps ... The result is
    never worse than rounding as it is. `shared`: makes a candidate equal for channels that need one scale.
    """
    width = grid.width(weight.shape[1])
    x = stats.mean_abs.clamp(min=1e-4)
    groups = weight.abs().unflatten(1, (-1, width))
    w = (groups / groups.amax(-1, keepdim=True).clamp(min=1e-12)).flatten(1).mean(0).clamp(min=1e-4)
    ratios = [step / steps for step in range(steps)]
    sample = weight[:: max(weight.shape[0] // _ROWS, 1)]

    def error(weight: Tensor, scale: Tensor) -> float:
        return output_error(grid.rounded(weight * scale) / scale - weight, stats.hessian)

    one = torch.ones_like(x)
    best, least = one, error(sample, one)
    for candidate in [x**a for a in ratios] + [x**a / w ** (1 - a) for a in ratios]:
        scale = shared(candidate)
        scale = scale / (scale.max() * scale.min()).sqrt()
        if (found := error(sample, scale)) < least:
            best, least = scale, found
    return one if best is one or error(weight, best) >= error(weight, one) else best


def search_clip(weight: Tensor, hessian: Tensor, grid: IntegerGrid) -> Tensor:
    """float32 [N, K] -> the same with each group of each row clipped where that makes the group's share of the output better."""
    width = grid.width(weight.shape[1])
    groups = weight.unflatten(1, (-1, width)).transpose(0, 1)                       # [groups, N, width]
    count = groups.shape[0]
    within = torch.stack([hessian[i * width:(i + 1) * width, i * width:(i + 1) * width] for i in range(count)])
    top = groups.abs().amax(-1, keepdim=True)
    best, least = groups, torch.full_like(top, float("inf"))
    for shrink in _SHRINKS:
        clipped = groups.clamp(-shrink * top, shrink * top)
        scale, zero = grid.fit(clipped)
        change = (grid.codes(clipped, scale, zero) - zero) * scale - groups
        error = ((change @ within) * change).sum(-1, keepdim=True)
        best = torch.where(error < least, clipped, best)
        least = torch.minimum(error, least)
    return best.transpose(0, 1).flatten(1)
