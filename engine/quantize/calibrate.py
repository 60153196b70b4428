"""The calibration set on its way through the model: hidden states before one block at a time, so that one block is in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from engine.layers.embedding import Embedding
from engine.layers.linear import Linear, LinearMethod, ParamSpec
from engine.layers.rope import cos_sin_table
from engine.models.decoder import Block
from engine.models.spec import ModelSpec
from engine.prefill import batches, prefill_cache, prefill_pages, prefill_step

_STEP_TOKENS = 8192      # of one pass


class Gathers(Protocol):
    def add(self, x: Tensor) -> None: ...


G = TypeVar("G", bound=Gathers)


class _Watched(LinearMethod):
    """A layer's own method, that shows its inputs to `into`."""

    def __init__(self, method: LinearMethod, into: Gathers) -> None:
        self._method, self._into = method, into

    def specs(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> dict[str, ParamSpec]:
        return self._method.specs(in_features, out_features, bias, dtype)

    def finalize(self, layer: Linear, stored: dict[str, Tensor]) -> dict[str, Tensor | None]:
        return self._method.finalize(layer, stored)

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        self._into.add(x)
        return self._method.apply(layer, x)


class Calibration:
    """Hidden states of all sequences (int32 [tokens] each) before the block that comes next; the first ones are `embedding`'s."""

    def __init__(self, spec: ModelSpec, sequences: Sequence[np.ndarray], embedding: Embedding) -> None:
        weight = embedding.weight
        self.tokens = sum(sequence.size for sequence in sequences)
        parts = list(batches(sequences, _STEP_TOKENS))
        self._steps = [prefill_step(part, weight.device) for part in parts]
        self._hidden = [embedding(step.ids) for step in self._steps]
        self._cache = prefill_cache(spec, max(map(prefill_pages, parts), default=0), weight.dtype, weight.device)
        longest = max((sequence.size for sequence in sequences), default=0)
        tables = {rope: cos_sin_table(rope, longest, weight.device) for rope in {layer.rope for layer in spec.layers}}
        self._cos_sin = [tables[layer.rope] for layer in spec.layers]

    def gather(self, block: Block, index: int, linears: Sequence[Linear], make: Callable[[int, torch.device], G]) -> list[G]:
        """Run block `index` as it is and show the inputs of `linears` to a fresh make(in_features, device) for each."""
        found = [make(linear.in_features, self._cache.k.device) for linear in linears]
        methods = [linear.method for linear in linears]
        for linear, into in zip(linears, found, strict=True):
            linear.method = _Watched(linear.method, into)
        try:
            for part in range(len(self._steps)):
                self._run(block, index, part)
        finally:
            for linear, method in zip(linears, methods, strict=True):
                linear.method = method
        return found

    def advance(self, block: Block, index: int) -> None:
        """The hidden states become what block `index` makes of them, as it is now."""
        for part in range(len(self._steps)):
            self._hidden[part] = self._run(block, index, part)

    def _run(self, block: Block, index: int, part: int) -> Tensor:
        residual = self._hidden[part].clone()
        qkv = block.attention.qkv.after_norm(None, residual, block.input_norm)
        left = block.onto(block.attention(qkv, self._steps[part], self._cache, self._cos_sin[index]), residual)
        return residual if left is None else residual.add_(left)
