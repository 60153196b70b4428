"""From logits to tokens: the extras that few rows ask for, the grammar mask, then one kernel for all rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.automata import Automata
from engine.plan import Special
from engine.request import TokenLogprobs
from engine.row_table import RowTable
from kernels import ops


@dataclass(slots=True)
class LogprobsOut:
    """Log-probabilities of some sampled rows, on their way to the host. index: into the plan's sampled rows."""

    index: list[int]
    wanted: list[int]
    tokens: Tensor
    chosen: Tensor
    values: Tensor
    ids: Tensor

    def read(self) -> dict[int, TokenLogprobs]:
        tokens, chosen, values, ids = (t.tolist() for t in (self.tokens, self.chosen, self.values, self.ids))
        return {index: TokenLogprobs(tokens[i], chosen[i], tuple(zip(ids[i], values[i], strict=True))[: self.wanted[i]])
                for i, index in enumerate(self.index)}


def sample(logits: Tensor, table: RowTable, rows: Tensor, positions: Tensor, special: list[Special], mask: Tensor | None,
           masked: Tensor | None, automata: Automata | None) -> tuple[Tensor, LogprobsOut | None]:
    """logits [S, V] (changed in place), rows and positions int32 [S] -> tokens int32 [S], and log-probabilities where asked for.

    Tokens are -1 where nothing is above -inf. mask: int32 [n, ceil(V / 32)] of the rows masked [n] (index into S).
    automata: None where no row is under one.
    """
    with_logprobs = [s for s in special if s.params.logprobs is not None]
    raw = logits[[s.index for s in with_logprobs]] if with_logprobs else None
    _penalise(logits, table, [s for s in special if s.params.has_penalties])
    _forbid(logits, [s for s in special if s.forbidden.size])
    if mask is not None and masked is not None:
        ops.mask_logits(logits, mask, masked)
    if automata is not None:
        automata.mask(logits, table.grammar, rows)
    tokens = ops.sample(logits, table.params, rows, positions)
    if raw is None:
        return tokens, None
    index = [s.index for s in with_logprobs]
    wanted = [s.params.logprobs or 0 for s in with_logprobs]
    picked = tokens[index].clamp(min=0)      # -1 is none: see ref.sample
    return tokens, LogprobsOut(index, wanted, picked, *ops.logprobs(raw, picked, max(wanted)))


def _penalise(logits: Tensor, table: RowTable, special: list[Special]) -> None:
    if not special:
        return
    device = logits.device

    def ints(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    def floats(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    ops.apply_penalties(logits, ints([s.index for s in special]), table.tokens, ints([s.row for s in special]),
                        ints([s.prompt_len for s in special]), ints([s.length for s in special]),
                        floats([s.params.repetition_penalty for s in special]),
                        floats([s.params.presence_penalty for s in special]),
                        floats([s.params.frequency_penalty for s in special]))


def _forbid(logits: Tensor, special: list[Special]) -> None:
    if not special:
        return
    at = np.concatenate([np.full(s.forbidden.size, s.index) for s in special])
    ids = np.concatenate([s.forbidden for s in special])
    keep = ids < logits.shape[1]
    logits[torch.from_numpy(at[keep]).to(logits.device), torch.from_numpy(ids[keep]).long().to(logits.device)] = float("-inf")
