"""GPTQ: columns are rounded one after another, each one's error made up for by those that follow (arXiv 2210.17323)."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.models.spec import ModelError
from engine.quantize.integers import IntegerGrid, IntegerWeight

_BLOCK = 128     # columns whose errors reach the columns after the block in one product


def gptq(weight: Tensor, hessian: Tensor, grid: IntegerGrid, order: str, damping: float,
         fit_to: Tensor | None = None) -> IntegerWeight:
    """Round float32 [N, K] given `hessian`, the sum of x x^T over its inputs, float32 [K, K].

    order: "none", columns as they stand; "static", by falling second moment of their input, since what comes first is rounded
    best, but each group is a run of columns with a scale fitted beforehand; "full", groups too are made along that order
    (desc_act: whoever multiplies has to gather). damping: share of the mean second moment that is added to all. fit_to: what the
    scales of "static" are fitted to, instead of the weight. Raises ModelError where the damping is too small.
    """
    rows, columns = weight.shape
    width = grid.width(columns)
    natural = torch.arange(columns, device=weight.device)
    turn = natural if order == "none" else hessian.diagonal().argsort(descending=True)     # the i-th column to be rounded
    group = (turn if order == "static" else natural) // width                              # and the group it is of
    scales, zeros = weight.new_empty(2, rows, columns // width).unbind()
    if order == "static":
        scale, zero = grid.fit((weight if fit_to is None else fit_to).unflatten(1, (-1, width)))
        scales, zeros = scale.squeeze(-1), zero.squeeze(-1)

    w, codes, inverse = weight[:, turn], torch.empty_like(weight), _inverse_factor(hessian[turn][:, turn], damping)
    which = group.tolist()
    for first in range(0, columns, _BLOCK):
        last = min(first + _BLOCK, columns)
        errors = w.new_empty(rows, last - first)
        for i in range(first, last):
            here = slice(which[i], which[i] + 1)
            if order != "static" and i % width == 0:
                scales[:, here], zeros[:, here] = grid.fit(w[:, i:i + width])
            column = w[:, i:i + 1]
            code = grid.codes(column, scales[:, here], zeros[:, here])
            error = (column - (code - zeros[:, here]) * scales[:, here]) / inverse[i, i]
            w[:, i:last] -= error * inverse[i, i:last]
            codes[:, i], errors[:, i - first] = code.squeeze(1), error.squeeze(1)
        w[:, last:] -= errors @ inverse[first:last, last:]
    back = turn.argsort()
    return IntegerWeight(grid.bits, codes[:, back].byte(), scales.half(), zeros.byte(), group[back])


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the damped inverse, float32 [K, K]; worked out in float64."""
    h = hessian.double()
    h.diagonal().add_(damping * h.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(h)
    if not failed:
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed:
        raise ModelError(f"gptq.damping={damping} is too small for this calibration data: raise it, or give more samples")
    return upper.float()
