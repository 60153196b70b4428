"""Whole sequences as one prefill step, for passes over fixed text outside the engine's loop: calibration, perplexity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from engine.layers.attention import LayerCache, StepInputs
from engine.models.spec import ModelSpec
from kernels import ops

PAGE = 32


def batches(sequences: Iterable[np.ndarray], max_tokens: int) -> Iterator[list[np.ndarray]]:
    """Consecutive sequences of at most `max_tokens` together; a longer one stands alone."""
    batch: list[np.ndarray] = []
    size = 0
    for sequence in sequences:
        if batch and size + sequence.size > max_tokens:
            yield batch
            batch, size = [], 0
        batch.append(sequence)
        size += sequence.size
    if batch:
        yield batch


def prefill_step(sequences: Sequence[np.ndarray], device: torch.device, page_size: int = PAGE, first_page: int = 0) -> StepInputs:
    """Each sequence (int [tokens], at least one token) from position 0, one after another, each on pages of its own.

    The caches need `prefill_pages(sequences, page_size)` pages from `first_page` on.
    """
    lengths = np.array([sequence.size for sequence in sequences])
    cu_q = np.concatenate([[0], np.cumsum(lengths)])
    pages = -(-lengths // page_size)
    first = first_page + np.cumsum(pages) - pages
    positions = np.concatenate([np.arange(n) for n in lengths])
    table = first[:, None] + np.minimum(np.arange(pages.max()), pages[:, None] - 1)
    tiles = [(row, at) for row, n in enumerate(lengths) for at in range(0, n, ops.QUERY_TILE)]

    def ints(values: object) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(np.asarray(values), dtype=np.int32)).to(device)

    rows = ints(np.arange(lengths.size))
    return StepInputs(ints(np.concatenate(sequences)), ints(positions), ints(np.repeat(first * page_size, lengths) + positions),
                      ints(table), rows[:0], 0, 0, rest_rows=rows, rest_starts=torch.zeros_like(rows), rest_cu_q=ints(cu_q),
                      tiles=ints(tiles))


def prefill_pages(sequences: Iterable[np.ndarray], page_size: int = PAGE) -> int:
    return sum(-(-sequence.size // page_size) for sequence in sequences)


def prefill_cache(spec: ModelSpec, pages: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
    """Keys and values of one layer. Layers that run one after another may share it: nothing is read again later."""
    shape = (pages, spec.num_kv_heads, PAGE, spec.head_dim)
    return LayerCache(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
