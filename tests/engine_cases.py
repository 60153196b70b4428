"""Engines and prompts for tests/engine and tests/gpu."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.engine import Engine
from engine.guided.grammar import GrammarBackend
from engine.layers.attention import StepInputs
from engine.memory import make_caches
from engine.models.decoder import Decoder
from engine.request import Completion, Request, SamplingParams
from engine.weights import open_checkpoint
from kernels import ops


@contextmanager
def running(path: Path, *, tokenizer: Any = None, guided: GrammarBackend | None = None, **config: Any) -> Iterator[Engine]:
    """A small float32 engine, on the CPU unless told otherwise, that is checked and closed afterwards."""
    small = {"device": "cpu", "dtype": "float32", "max_model_len": 256, "max_rows": 8, "max_step_tokens": 64, "page_size": 16}
    engine = Engine(open_checkpoint(path), EngineConfig(**small | config), tokenizer, guided)
    try:
        yield engine
        engine.check_integrity()
    finally:
        engine.close()


def finish(engine: Engine, requests: Iterable[Request]) -> dict[Hashable, Completion]:
    """Run all of them to their end, checking pages and rows after every step."""
    done: dict[Hashable, Completion] = {}
    for request in requests:
        engine.submit(request)
    while engine.pending:
        for completion in engine.step():
            assert completion.id not in done
            done[completion.id] = completion
        engine.check_integrity()
    return done


def make_requests(prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]) -> list[Request]:
    """Requests 0, 1, ... with these prompts; one SamplingParams for all, or one for each."""
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    return [Request(i, np.array(prompt, dtype=np.int32), p) for i, (prompt, p) in enumerate(zip(prompts, each, strict=True))]


def tokens_of(done: dict[Hashable, Completion]) -> dict[Hashable, list[int]]:
    return {name: completion.tokens.tolist() for name, completion in done.items()}


def random_prompts(count: int, seed: int, shortest: int = 1, longest: int = 100, shared: int = 0) -> list[list[int]]:
    """Prompts of random bytes; the first `shared` of every second one are the same, and come on top."""
    rng = np.random.default_rng(seed)
    stem = rng.integers(0, 256, size=shared).tolist()
    own = [rng.integers(0, 256, size=rng.integers(shortest, longest + 1)).tolist() for _ in range(count)]
    return [stem + tokens if i % 2 else tokens for i, tokens in enumerate(own)]


@torch.inference_mode()
def full_logits(path: Path, tokens: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Our decoder's logits after every token of one sequence, float32 [T, V] on the CPU: one prefill step, without an engine."""
    checkpoint, page, n = open_checkpoint(path), 16, len(tokens)
    model = Decoder(checkpoint.spec, dtype, n, device)
    model.load(checkpoint)
    pages = -(-n // page)
    caches = make_caches(model, pages + 1, page, device)

    def ints(values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    block_table = torch.arange(1, pages + 1, dtype=torch.int32, device=device)[None]
    positions = torch.arange(n, dtype=torch.int32, device=device)
    tiles = [(0, at) for at in range(0, n, ops.QUERY_TILE)]
    step = StepInputs(ints(tokens), positions, positions + page, block_table, ints([]), 0, 0,
                      rest_rows=ints([0]), rest_starts=ints([0]), rest_cu_q=ints([0, n]), tiles=ints(tiles))
    return model.logits(model(step, caches)).float().cpu()
