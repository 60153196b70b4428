"""What goes into the engine and what comes out of it: Request, SamplingParams, Completion."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from engine.guided.grammar import Grammar

MOST = 2**30    # numbers of tokens and their ids are int32 in the engine, sums of two as well
MOST_STOPS, LONGEST_STOP = 128, 1000    # each token of a row is looked at for all of them


class EngineError(RuntimeError):
    """The engine cannot go on; one line says why. What was returned before stands."""


class FinishReason(StrEnum):
    STOP = "stop"                    # an end token, a stop string or the end of the grammar
    LENGTH = "length"                # max_tokens or the context was reached
    LENGTH_CLOSED = "length_closed"  # a guided row ran out of budget, or was not valid as it stood: trimmed and closed
    ABORTED = "aborted"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one row is sampled. Greedy by default, since most jobs label.

    Order of the filters: penalties, grammar mask, temperature, min_p, top_k, top_p. Noise is keyed by (seed, position).
    A row under a grammar ends where that says so: `stop`, `stop_token_ids` and `ignore_eos` do not apply to it.
    """

    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0                   # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0
    logprobs: int | None = None      # None: off; k: the chosen token's and the k likeliest ones'

    def __post_init__(self) -> None:
        checks = (
            (self.max_tokens >= 1, "max_tokens must be at least 1"),
            (0 <= self.min_tokens <= self.max_tokens, "min_tokens must lie between 0 and max_tokens"),
            (self.min_tokens <= MOST, f"min_tokens must be at most {MOST}"),
            # The hotter, the nearer its inverse comes to 0, where masked logits would be NaN.
            (0.0 <= self.temperature <= 1e6, "temperature must be 0 or more, and at most 1000000"),
            (0.0 < self.top_p <= 1.0, "top_p must lie in (0, 1]"),
            (0 <= self.top_k <= MOST, f"top_k must be 0 (all) or more, and at most {MOST}"),
            (0.0 <= self.min_p <= 1.0, "min_p must lie in [0, 1]"),
            (0.01 <= self.repetition_penalty <= 100.0, "repetition_penalty must lie in [0.01, 100]"),
            (-2.0 <= self.presence_penalty <= 2.0, "presence_penalty must lie in [-2, 2]"),
            (-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty must lie in [-2, 2]"),
            (all(self.stop), "stop strings must not be empty"),
            (len(self.stop) <= MOST_STOPS, f"stop must have at most {MOST_STOPS} strings"),
            (all(len(text) <= LONGEST_STOP for text in self.stop), f"stop strings must have at most {LONGEST_STOP} characters"),
            (all(0 <= token <= MOST for token in self.stop_token_ids), f"stop_token_ids must lie between 0 and {MOST}"),
            (self.logprobs is None or 0 <= self.logprobs <= 20, "logprobs must lie between 0 and 20"),
        )
        for ok, message in checks:
            if not ok:
                raise ValueError(message)

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(slots=True)
class Request:
    """One row to generate. `prompt`: int32 token ids; `grammar`: what the output must match, compiled beforehand."""

    id: Hashable
    prompt: np.ndarray
    params: SamplingParams = field(default_factory=SamplingParams)
    grammar: Grammar | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        self.prompt = np.ascontiguousarray(self.prompt, dtype=np.int32)


@dataclass(slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, of the distribution before temperature and filters."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]    # (token, logprob), likeliest first


@dataclass(slots=True)
class Completion:
    """One finished row. `tokens` holds no end token. `text` is set only where a stop string cut it. `logprobs`: one for each of
    `tokens`, None where a grammar appended it and it was not sampled."""

    id: Hashable
    tokens: np.ndarray
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int = 0           # prompt tokens whose keys and values were already there
    forced_tokens: int = 0           # tokens the grammar left no choice for
    text: str | None = None
    error: str | None = None
    logprobs: list[TokenLogprobs | None] | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot; the counters only grow."""

    running: int
    waiting: int
    kv_pages_used: int
    kv_pages_total: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    forced_tokens: int
    steps: int
    graph_steps: int
    preemptions: int
    finished: int
