"""What quantising costs: perplexity and accuracy on maths word problems. Prints one JSON line for each model.

    python jobs/bench/quality.py --data gsm8k.parquet --models qwen2.5-1.5b.gguf out/qwen-awq out/qwen-fp8
    python jobs/bench/quality.py --data gsm8k.parquet --models qwen2.5-1.5b.gguf --engine '{"quantization": "fp8"}'

--data: Parquet with the columns question, answer (worked out), final (the number). The last rows are asked, so that the first can
be calibrated with. --models: as model.source of a job. --engine: more engine settings.

ppl: of the given answers after their questions, under the chat template; all tokens of a sequence in one prefill step of the
loaded engine, through its own cache. accuracy: share of greedy answers whose last number is `final`. tok_s: tokens of these, over
the time from the first request to the last answer. weights_gib: what the weights take; load_gib: the GPU memory in use after
loading, less the KV pool.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from engine.config import EngineConfig
from engine.engine import Engine
from engine.prefill import batches, prefill_step
from engine.request import Request, SamplingParams
from engine.weights import open_checkpoint
from pipeline.model_source import resolve_model
from pipeline.tokenizer import RowTokenizer, load_tokenizer

ASK = "{}\nReason step by step, and end with a line 'The answer is' and the number."
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
STEP_TOKENS, LOGIT_ROWS = 8192, 1024


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--data", type=Path, required=True)
    ap.add_argument("--models", nargs="+", required=True)
    ap.add_argument("--answers", type=int, default=200)
    ap.add_argument("--questions", type=int, default=500)
    ap.add_argument("--max-tokens", type=int, default=512)
    ap.add_argument("--engine", type=json.loads, default={})
    a = ap.parse_args()
    rows = pq.read_table(a.data).to_pylist()
    for source in a.models:
        started = time.perf_counter()
        path = resolve_model(source)
        tokenizer = RowTokenizer(load_tokenizer(path))
        engine = Engine(open_checkpoint(path), EngineConfig(**{"max_model_len": 2048, **a.engine}), tokenizer.tokenizer)
        line = {"model": source, "engine": a.engine, "init_s": round(time.perf_counter() - started, 1), **memory(engine)}
        if a.answers:      # first: it writes to pages that a finished row may leave for others to share
            line |= perplexity(engine, tokenizer, rows[-a.answers:])
        if a.questions:
            line |= accuracy(engine, tokenizer, rows[-a.questions:], a.max_tokens)
        print(json.dumps(line), flush=True)
        engine.close()
        del engine


def memory(engine: Engine) -> dict:
    found = {"weights_gib": round(engine.weight_bytes / 2**30, 3)}
    if engine.device.type == "cuda":
        found["load_gib"] = round((torch.cuda.memory_allocated() - engine._runner.caches.storage.nbytes) / 2**30, 3)
    return found


def render(tokenizer: RowTokenizer, texts: list[str]) -> list[np.ndarray]:
    if not tokenizer.chat_template:
        return tokenizer.encode_batch([text + "\n" for text in texts], True)
    return tokenizer.encode_batch(tokenizer.render_chats([[{"role": "user", "content": text}] for text in texts]), False)


@torch.inference_mode()
def perplexity(engine: Engine, tokenizer: RowTokenizer, rows: list[dict]) -> dict:
    """exp of the mean negative log-likelihood of the answers' tokens, each given all before it."""
    runner, page = engine._runner, engine.config.page_size
    prompts = render(tokenizer, [row["question"] for row in rows])
    answers = tokenizer.encode_batch([row["answer"] for row in rows], False)
    total, count = 0.0, 0
    texts = [np.concatenate(pair) for pair in zip(prompts, answers, strict=True)]
    done = 0
    for batch in batches(texts, STEP_TOKENS):
        hidden = runner.model(prefill_step(batch, engine.device, page, first_page=1), runner.caches.layers)
        ends = np.cumsum([text.size for text in batch])
        own = answers[done:done + len(batch)]
        at = np.concatenate([np.arange(end - 1 - answer.size, end - 1) for end, answer in zip(ends, own, strict=True)])
        want = torch.from_numpy(np.concatenate(own)).long().to(engine.device)
        for part in torch.from_numpy(at).to(engine.device).split(LOGIT_ROWS):
            logits = runner.model.logits(hidden[part]).float()
            found, want = want[:part.numel()], want[part.numel():]
            total -= torch.log_softmax(logits, -1).gather(1, found[:, None]).sum(dtype=torch.float64).item()
        done, count = done + len(batch), count + at.size
    return {"answers": len(rows), "answer_tok": count, "ppl": round(math.exp(total / count), 4)}


def accuracy(engine: Engine, tokenizer: RowTokenizer, rows: list[dict], max_tokens: int) -> dict:
    prompts = render(tokenizer, [ASK.format(row["question"]) for row in rows])
    requests = [Request(i, prompt, SamplingParams(max_tokens=max_tokens)) for i, prompt in enumerate(prompts)]
    started = time.perf_counter()
    done = sorted(engine.run(requests), key=lambda completion: completion.id)
    seconds = time.perf_counter() - started
    right = [last_number(text) == last_number(row["final"])
             for text, row in zip(tokenizer.decode_batch([completion.tokens for completion in done]), rows, strict=True)]
    tokens = sum(completion.tokens.size for completion in done)
    return {"questions": len(rows), "accuracy": round(sum(right) / len(rows), 4), "out_tok": tokens, "sec": round(seconds, 2),
            "tok_s": round(tokens / seconds, 1)}


def last_number(text: str) -> float | None:
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


if __name__ == "__main__":
    main()
