"""What the host costs a row, without a model and without a GPU.

    python jobs/bench/host.py engine [--rows 30000] [--prefix 512] [--repeat 4]
    python jobs/bench/host.py pipeline model=NAME data=FILE.parquet output.dir=OUT ...

engine: the step loop with nothing launched, for rows of 32 to 96 prompt tokens and 16 to 48 output tokens (--prefix: with so many
tokens before them that all share). Prints JSON: steps, and microseconds a row in all and in each phase, of the fastest of some
runs. At 5,000 rows a second 20 microseconds are a tenth of the time that the GPU may take.

pipeline: a job with all its keys, whose engine answers each row at once with the text ANSWER of the environment.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from engine.automata import Automata
from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.plan import StepPlan
from engine.prefix_groups import PrefixGroups
from engine.request import Completion, EngineStats, FinishReason, Request, SamplingParams
from engine.row_table import RowTable
from engine.scheduler import Scheduler
from engine.window import Waiting
from kernels import ops
from pipeline.model import RealModel
from pipeline.run import main as run_job

MAX_ROWS, PAGES, PAGE, MAX_LEN, STEP_TOKENS, VOCAB, DEPTH = 2048, 40_000, 32, 2048, 16_384, 32_000, 2
ANSWER = '{"label": "other", "reason": "Nothing else fits."}'
ENGINE_HOLDS, ENGINE_ENDS = 8192, 256      # rows that the engine without a model takes ahead, and ends in a turn


def main() -> None:
    if sys.argv[1:2] == ["pipeline"]:
        sys.exit(run_job(sys.argv[2:], engine_factory=Instant))
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("part", choices=["engine"])
    ap.add_argument("--rows", type=int, default=30_000)
    ap.add_argument("--prefix", type=int, default=0)
    ap.add_argument("--repeat", type=int, default=4)
    a = ap.parse_args()
    lines = [engine(requests(a.rows, a.prefix, seed)) for seed in range(a.repeat)]
    print(json.dumps(min(lines, key=lambda line: line["us"])))


def requests(rows: int, prefix: int, seed: int) -> list[Request]:
    draw = np.random.default_rng(seed)
    stem = draw.integers(VOCAB, size=prefix, dtype=np.int32)
    prompts = [np.concatenate([stem, draw.integers(VOCAB, size=draw.integers(32, 97), dtype=np.int32)]) for _ in range(rows)]
    return [Request(i, prompt, SamplingParams(max_tokens=int(draw.integers(16, 49)), ignore_eos=True, seed=i))
            for i, prompt in enumerate(prompts)]


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, phase: str, call: Callable, *args: object) -> object:
        started = time.perf_counter()
        result = call(*args)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started
        return result


def engine(rows: list[Request]) -> dict:
    """Engine.run's turns, with the writes to the device packed and dropped."""
    ops.apply_writes = lambda state, packed, segments: None
    device = torch.device("cpu")
    table, pool = RowTable(MAX_ROWS, MAX_LEN, PAGE, device, STEP_TOKENS), BlockPool(PAGES, PAGE)
    scheduler = Scheduler(EngineConfig(page_size=PAGE), table, pool, STEP_TOKENS, (VOCAB,), Automata(VOCAB + 1, device),
                          groups=PrefixGroups(MAX_ROWS, PAGE, token_bytes=1024))
    tokens, clock, inflight, coming = np.full(MAX_ROWS, 7, dtype=np.int32), Clock(), deque[StepPlan](), deque(rows)
    steps = 0

    def submit() -> None:
        for _ in range(min(scheduler.room(), len(coming))):
            request = coming.popleft()
            scheduler.submit(Waiting(request, request.prompt))

    def retire() -> None:
        plan = inflight.popleft()
        scheduler.retire(plan, tokens[: plan.sampled.size], {})

    while coming or scheduler.pending:
        clock("submit", submit)
        if len(inflight) >= DEPTH:
            clock("retire", retire)
        clock("refill", scheduler.refill)
        plan = clock("schedule", scheduler.schedule)
        if isinstance(plan, StepPlan):
            inflight.append(plan)
            steps += 1
            table.stage_step(plan.rows, plan.starts)
            clock("pack", table.flush, np.empty(0, dtype=np.int32))
        elif inflight:
            clock("retire", retire)
        clock("finish", scheduler.finished)
    scheduler.check_integrity()
    each = {phase: round(1e6 * seconds / len(rows), 1) for phase, seconds in clock.seconds.items()}
    return {"rows": len(rows), "steps": steps, "us": round(1e6 * sum(clock.seconds.values()) / len(rows), 1), **each}


class Instant(RealModel):
    """A model's tokenizer and grammars, and an engine without the model."""

    def load(self, progress: Callable[[str], None]) -> InstantEngine:
        answer = self.tokenizer().encode_batch([os.environ.get("ANSWER", ANSWER)], False)[0]
        return InstantEngine(np.asarray(answer, dtype=np.int32), self.max_model_len())


class InstantEngine:
    """Answers what it is given with the same tokens, in order."""

    gpu = None

    def __init__(self, answer: np.ndarray, max_model_len: int) -> None:
        self.max_model_len, self._answer = max_model_len, answer
        self._waiting: deque[Request] = deque()
        self._prompt = self._done = 0

    def submit(self, request: Request) -> None:
        self._waiting.append(request)
        self._prompt += request.prompt.size

    def room(self) -> int:
        return ENGINE_HOLDS - len(self._waiting)

    def step(self) -> list[Completion]:
        ending = [self._waiting.popleft() for _ in range(min(ENGINE_ENDS, len(self._waiting)))]
        self._done += len(ending)
        return [Completion(request.id, self._answer, FinishReason.STOP, request.prompt.size) for request in ending]

    def overdue(self, seconds: float) -> list[Hashable]:
        return []

    def abort(self, ids: Iterable[Hashable] | None = None) -> None:
        """Rows end as soon as they are asked for."""

    @property
    def pending(self) -> int:
        return len(self._waiting)

    def stats(self) -> EngineStats:
        generated = self._done * self._answer.size
        return EngineStats(0, len(self._waiting), 0, 1, self._prompt, 0, generated, 0, self._done, 0, 0, self._done)

    def close(self) -> None:
        """It holds nothing."""


if __name__ == "__main__":
    main()
