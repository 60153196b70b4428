"""Engine throughput on the benchmark workloads: prints one JSON line per workload, in the peers' format.

    python jobs/bench/throughput.py --workloads workloads.py --model models/mistral-7b --dummy --w W2 W5 W1 W3 W3g W4

--workloads: a file that defines workload(name, vocab) -> rows with prompt, max_tokens, schema and ignore_eos.
--dummy: random weights of the shape of the folder's config.json. --engine: more engine settings, '{"max_rows": 2048}'.
The workload CB is the test of continuous batching: 100 prompts all at once, against the same one at a time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")      # as jobs have it, and before torch reads it

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[2]))

from engine.config import EngineConfig
from engine.engine import Engine
from engine.guided.llg import LLGuidanceBackend
from engine.guided.validate import Validator
from engine.request import Completion, Request, SamplingParams
from engine.weights import open_checkpoint
from jobs.bench.random_model import RandomCheckpoint


def main() -> None:
    ap = options(__doc__)
    ap.add_argument("--tag", default="")
    a = ap.parse_args()
    workloads = load_workloads(a.workloads)
    started = time.perf_counter()
    engine, guided, tokenizer = load_engine(a.model, a.dummy, a.engine)
    print(json.dumps({"tag": a.tag, "init_s": round(time.perf_counter() - started, 1),
                      "weights_gib": round(engine.weight_bytes / 2**30, 2), "free_gib": free_gib(),
                      "stats": str(engine.stats())}), flush=True)
    vocab = min(32000, len(tokenizer))
    for name in ["warm", *a.w]:
        if name == "CB":
            continuous_batching(engine, workloads.workload("W2", vocab), a)
            continue
        rows = workloads.workload(name, vocab=vocab)
        requests = requests_of(rows, guided, a.temperature)
        before, t = engine.stats(), time.perf_counter()
        done = list(engine.run(requests))
        sec = time.perf_counter() - t
        after = engine.stats()
        n_in, n_out = sum(len(r.prompt) for r in rows), sum(c.tokens.size for c in done)
        print(json.dumps({"engine": "gristmill", "tag": a.tag, "w": name, "rows": len(rows), "sec": round(sec, 2), "in_tok": n_in,
                          "out_tok": n_out, "out_tok_s": round(n_out / sec, 1), "rows_s": round(len(rows) / sec, 2),
                          "valid": valid(rows, done, tokenizer), "steps": after.steps - before.steps,
                          "graph_steps": after.graph_steps - before.graph_steps,
                          "cached": after.cached_tokens - before.cached_tokens,
                          "forced": after.forced_tokens - before.forced_tokens,
                          "preemptions": after.preemptions - before.preemptions}), flush=True)


def options(text: str | None) -> argparse.ArgumentParser:
    """What to run, and on what; `text` for --help."""
    ap = engine_options(text)
    ap.add_argument("--workloads", type=Path, required=True)
    ap.add_argument("--w", nargs="+", default=["W2", "W1"])
    return ap


def engine_options(text: str | None) -> argparse.ArgumentParser:
    """On what to run."""
    ap = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", type=Path, required=True)
    ap.add_argument("--engine", type=json.loads, default={})
    ap.add_argument("--dummy", action="store_true")
    ap.add_argument("--temperature", type=float, default=0.6)
    return ap


def free_gib() -> float | None:
    """Of the GPU's memory, with what the allocator holds unused."""
    if not torch.cuda.is_available():
        return None
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return round((torch.cuda.mem_get_info()[0] + unused) / 2**30, 2)


def load_workloads(path: Path) -> ModuleType:
    """The file's module, with its function workload(name, vocab)."""
    spec = importlib.util.spec_from_file_location("workloads", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["workloads"] = module
    spec.loader.exec_module(module)
    return module


def load_engine(model: Path, dummy: bool, settings: dict) -> tuple[Engine, LLGuidanceBackend, PreTrainedTokenizerFast]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    checkpoint = RandomCheckpoint(model, device) if dummy else open_checkpoint(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    guided = LLGuidanceBackend(tokenizer, checkpoint.spec.vocab_size, checkpoint.spec.eos_token_ids)
    return Engine(checkpoint, EngineConfig(**{"max_model_len": 4096, **settings}), tokenizer, guided), guided, tokenizer


def requests_of(rows: list, guided: LLGuidanceBackend, temperature: float) -> list[Request]:
    grammar = guided.compile_schema(rows[0].schema) if rows[0].schema else None
    return [Request(i, r.prompt, SamplingParams(max_tokens=r.max_tokens, ignore_eos=r.ignore_eos, seed=i,
                                                temperature=temperature), grammar) for i, r in enumerate(rows)]


def continuous_batching(engine: Engine, rows: list, a: argparse.Namespace) -> None:
    requests = [Request(i, r.prompt, SamplingParams(max_tokens=64, ignore_eos=True, temperature=a.temperature, seed=i))
                for i, r in enumerate(rows + rows)]
    seconds = []
    for batches in ([requests], [[r] for r in requests]):
        t = time.perf_counter()
        for batch in batches:
            list(engine.run(batch))
        seconds.append(time.perf_counter() - t)
    print(json.dumps({"engine": "gristmill", "tag": a.tag, "w": "CB", "rows": len(requests), "sec": round(seconds[0], 3),
                      "one_at_a_time_sec": round(seconds[1], 3), "ratio": round(seconds[1] / seconds[0], 1)}), flush=True)


def valid(rows: list, done: list[Completion], tokenizer) -> float | None:
    """Share of guided outputs that parse and validate."""
    if rows[0].schema is None:
        return None
    check, good = Validator(rows[0].schema), 0
    for completion in done:
        try:
            check.check(tokenizer.decode(completion.tokens))
            good += 1
        except ValueError:
            pass
    return round(good / len(done), 4)


if __name__ == "__main__":
    main()
