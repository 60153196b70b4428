"""Engines and prompts for tests/engine and tests/gpu."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.engine import Engine
from engine.guided.grammar import GrammarBackend
from engine.layers.attention import StepInputs
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


def mixed_requests(count: int = 16, shared: int = 50) -> list[Request]:
    """Greedy and sampled rows, plain and with extras; every second one begins with the same `shared` tokens."""
    kinds = [SamplingParams(max_tokens=40, ignore_eos=True), SamplingParams(max_tokens=25, temperature=0.8, top_p=0.9),
             SamplingParams(max_tokens=40, temperature=0.8, top_p=0.9), SamplingParams(max_tokens=12, logprobs=2),
             SamplingParams(max_tokens=30, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.3),
             SamplingParams(max_tokens=20, temperature=1.0, top_k=20, min_p=0.02, min_tokens=5)]
    params = [replace(kinds[i % len(kinds)], seed=2**40 + i) for i in range(count)]
    return make_requests(random_prompts(count, seed=3, longest=60, shared=shared), params)


def load_decoder(path: Path, dtype: torch.dtype, device: str = "cpu", quantization: str = "stored",
                 fp8_kv: bool = False) -> Decoder:
    """The bare model, for at most 512 positions."""
    checkpoint = open_checkpoint(path)
    model = Decoder(checkpoint.spec, dtype, 512, torch.device(device), quantization, fp8_kv)
    model.load(checkpoint)
    return model


def add_at_once(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """From here on plain products are made one by one, and those that may be are added to the residual where they are made; their
    shapes, as they come."""
    added: list[torch.Size] = []

    def linear_onto(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> None:
        residual += ops.linear(x, weight, bias)
        added.append(residual.shape)

    monkeypatch.setattr(ops, "between", lambda *args: None)
    monkeypatch.setattr(ops, "linear_onto", linear_onto)
    return added


@torch.inference_mode()
def full_logits(model: Decoder, tokens: Sequence[int], decode: int = 0) -> Tensor:
    """The logits after every token of one sequence, float32 [T, V] on the CPU.

    One prefill step, but for the last `decode` tokens, which are decode steps.
    """
    device, page, total = model.embedding.weight.device, 16, len(tokens)
    pages = -(-total // page)
    caches = model.make_cache(pages + 1, page).layers

    def ints(values: Sequence[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    ids, positions = ints(tokens), torch.arange(total, dtype=torch.int32, device=device)
    table, row, none = torch.arange(1, pages + 1, dtype=torch.int32, device=device)[None], ints([0]), ints([])
    n = total - decode
    tiles = ints([(0, at) for at in range(0, n, ops.QUERY_TILE)])
    steps = [StepInputs(ids[:n], positions[:n], positions[:n] + page, table, none, 0, 0,
                        rest_rows=row, rest_starts=row, rest_cu_q=ints([0, n]), tiles=tiles)]
    steps += [StepInputs(ids[i : i + 1], positions[i : i + 1], positions[i : i + 1] + page, table, row, 1, i + 1)
              for i in range(n, total)]
    return torch.cat([model.logits(model(step, caches)).float().cpu() for step in steps])
