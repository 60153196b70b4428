"""Tokens a second as the number of rows grows: does a long job run as fast as a short one, in the same memory?

    python jobs/bench/scale.py --model models/smollm2 [--rows 1000 10000 100000] [--repeat 3]

Rows of 32 to 96 random prompt tokens and 16 to 48 output tokens, no end token, each made when the engine asks for it. --model,
--dummy, --engine and --temperature are those of throughput.py. Prints one JSON line for each number of rows, the least first, of
the run of the median speed: sec, out_tok, out_tok_s; rss_gib is the most memory that the process has had so far, growth_gib what
of it came after the first line.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from engine.engine import Engine
from engine.request import Request, SamplingParams
from jobs.bench.throughput import engine_options, load_engine
from pipeline.observe.metrics import peak_memory

WARM_ROWS = 256


def main() -> None:
    ap = engine_options(__doc__)
    ap.add_argument("--rows", nargs="+", type=int, default=[1_000, 10_000, 100_000])
    ap.add_argument("--repeat", type=int, default=1)
    a = ap.parse_args()
    engine, _, tokenizer = load_engine(a.model, a.dummy, a.engine)
    vocab = min(32000, len(tokenizer))
    run(engine, requests(WARM_ROWS, 0, vocab, a.temperature))
    first = None
    for rows in sorted(a.rows):
        # Each run has rows of its own: the same again would find its prompts in the cache.
        runs = [run(engine, requests(rows, 1 + i, vocab, a.temperature)) for i in range(a.repeat)]
        tokens, seconds = sorted(runs, key=lambda found: found[0] / found[1])[(len(runs) - 1) // 2]
        peak = peak_memory()
        first = peak if first is None else first
        print(json.dumps({"rows": rows, "sec": round(seconds, 3), "out_tok": tokens, "out_tok_s": round(tokens / seconds, 1),
                          "rss_gib": round(peak / 2**30, 3), "growth_gib": round((peak - first) / 2**30, 3)}), flush=True)


def requests(rows: int, seed: int, vocab: int, temperature: float) -> Iterator[Request]:
    draw = np.random.default_rng((rows, seed))
    for i in range(rows):
        prompt = draw.integers(vocab, size=draw.integers(32, 97), dtype=np.int32)
        yield Request(i, prompt, SamplingParams(max_tokens=int(draw.integers(16, 49)), ignore_eos=True, seed=i,
                                                temperature=temperature))


def run(engine: Engine, rows: Iterator[Request]) -> tuple[int, float]:
    """Output tokens and seconds."""
    started = time.perf_counter()
    tokens = sum(completion.tokens.size for completion in engine.run(rows))
    return tokens, time.perf_counter() - started


if __name__ == "__main__":
    main()
