"""Do two engines, or two settings of one, write the same tokens? Greedy answers to twenty fixed prompts, and how long they agree.

    python jobs/bench/same_tokens.py --model models/smollm2 --out ours.json [--engine '{"kv_dtype": "fp8"}']
    python jobs/bench/same_tokens.py --model models/smollm2 --out peer.json --peer vllm [--kw '{"dtype": "bfloat16"}']
    python jobs/bench/same_tokens.py --compare ours.json peer.json

--engine: settings of engine.config.EngineConfig. --kw: keyword arguments of vllm.LLM. The prompts are tokenised here, by the
folder's own tokenizer and chat template, so both get the same token ids; end tokens are written like any other. A file holds the
prompts, the tokens, and at each position the log-probabilities of the likeliest tokens and of the one taken.

--compare prints for each prompt how many leading tokens agree, and where they part the log-probabilities that each side gives to
both tokens: near each other on both sides, it was a tie; far apart, one side is wrong. The last line is JSON: the least of these
counts, and how many prompts agree for at least 16 tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import Request, SamplingParams
from engine.weights import open_checkpoint
from pipeline.tokenizer import RowTokenizer, load_tokenizer

PROMPTS = (
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue.",
    "Write a haiku about rain.",
    "List three uses of a paper clip.",
    "Translate into German: The train leaves at noon.",
    "What is 17 times 23?",
    "Name the planets of the solar system, from the sun outwards.",
    "Write a Python function that reverses a string.",
    "Summarise in one sentence: The shop was closed, so we walked home in the snow and made soup.",
    "Is this review positive or negative? The battery died after a week.",
    "Who wrote Pride and Prejudice?",
    "Give a synonym of 'quick' and one of 'slow'.",
    "How do I boil an egg?",
    "Correct the grammar: He go to school every days.",
    "What is the difference between a list and a tuple in Python?",
    "Write the first line of a story about a lighthouse.",
    "Turn this into JSON with the keys name and age: Ada is 36.",
    "Why do leaves change colour in autumn?",
    "Name a country whose name starts with J, and its currency.",
    "Which is heavier, a kilogram of feathers or a kilogram of iron?",
)
TOKENS, ALTERNATIVES, ENOUGH = 32, 5, 16

Logprobs = dict[int, float]                          # by token
Answer = tuple[list[int], list[Logprobs]]            # tokens, and what was likely at each of them


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", type=Path)
    ap.add_argument("--out", type=Path)
    ap.add_argument("--engine", type=json.loads, default={})
    ap.add_argument("--peer", choices=["vllm"])
    ap.add_argument("--kw", type=json.loads, default={})
    ap.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"))
    a = ap.parse_args()
    if a.compare:
        compare(*a.compare)
        return
    if a.model is None or a.out is None:
        ap.error("give --model and --out, or --compare")
    prompts = tokenise(a.model)
    answers = vllm(a.model, a.kw, prompts) if a.peer else ours(a.model, a.engine, prompts)
    rows = [{"prompt": prompt.tolist(), "tokens": tokens, "logprobs": [list(found.items()) for found in logprobs]}
            for prompt, (tokens, logprobs) in zip(prompts, answers, strict=True)]
    a.out.write_text(json.dumps(rows))


def tokenise(model: Path) -> list[np.ndarray]:
    tokenizer = RowTokenizer(load_tokenizer(model))
    return tokenizer.encode_batch(tokenizer.render_chats([[{"role": "user", "content": prompt}] for prompt in PROMPTS]), False)


def ours(model: Path, settings: dict[str, Any], prompts: list[np.ndarray]) -> list[Answer]:
    engine = Engine(open_checkpoint(model), EngineConfig(**settings))
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True, logprobs=ALTERNATIVES)
    done = sorted(engine.run(Request(i, prompt, params) for i, prompt in enumerate(prompts)), key=lambda row: int(str(row.id)))
    engine.close()
    return [(row.tokens.tolist(), [{**dict(at.top), at.token: at.logprob} for at in row.logprobs or ()]) for row in done]


def vllm(model: Path, settings: dict[str, Any], prompts: list[np.ndarray]) -> list[Answer]:
    from vllm import LLM
    from vllm import SamplingParams as PeerParams

    engine = LLM(**{"model": str(model), "seed": 0, **settings})
    params = PeerParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=ALTERNATIVES)
    done = engine.generate([{"prompt_token_ids": prompt.tolist()} for prompt in prompts], params, use_tqdm=False)
    return [(list(row.outputs[0].token_ids),
             [{token: found.logprob for token, found in at.items()} for at in row.outputs[0].logprobs]) for row in done]


def compare(*files: Path) -> None:
    counts = []
    for i, (a, b) in enumerate(zip(*(json.loads(file.read_text()) for file in files), strict=True)):
        if a["prompt"] != b["prompt"]:
            raise SystemExit(f"prompt {i} has other tokens in {files[0]} than in {files[1]}: take both from one model")
        pairs = list(zip(a["tokens"], b["tokens"], strict=True))
        count = next((at for at, (one, other) in enumerate(pairs) if one != other), len(pairs))
        print(f"prompt {i:2}: {count:2} of {len(pairs)}")
        if count < len(pairs):
            for file, side in zip(files, (a, b), strict=True):
                print(f"    {file}: took {side['tokens'][count]}; " + ", ".join(
                    f"{token}: {logprob(side, count, token)}" for token in pairs[count]))
        counts.append(count)
    print(json.dumps({"prompts": len(counts), "least": min(counts), f"agree_{ENOUGH}": sum(n >= ENOUGH for n in counts)}))


def logprob(row: dict[str, Any], at: int, token: int) -> str:
    found = dict(row["logprobs"][at]).get(token)
    return f"below the {ALTERNATIVES} likeliest" if found is None else f"{found:.4f}"


if __name__ == "__main__":
    main()
