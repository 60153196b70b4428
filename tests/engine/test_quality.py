"""The quality benchmark: its perplexity is transformers', and it finds the number in an answer."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from engine_cases import running
from models import load_reference, tiny_checkpoint, tiny_tokenizer

from jobs.bench.quality import accuracy, last_number, memory, perplexity
from pipeline.tokenizer import RowTokenizer


def test_perplexity_is_that_of_transformers(tmp_path: Path) -> None:
    path, tokenizer = tiny_checkpoint("qwen3", tmp_path), RowTokenizer(tiny_tokenizer())
    rows = [{"question": "How many " + "so " * i + "many?", "answer": "x" * (i + 1) + " #### 7", "final": "7"} for i in range(5)]
    loss, count = 0.0, 0
    for row in rows:
        prompt = tokenizer.encode_batch(tokenizer.render_chats([[{"role": "user", "content": row["question"]}]]), False)[0]
        answer = tokenizer.encode_batch([row["answer"]], False)[0]
        with torch.inference_mode():
            logits = load_reference(path)(torch.tensor([[*prompt, *answer]])).logits[0, prompt.size - 1:-1]
        loss += float(F.cross_entropy(logits, torch.tensor(answer).long(), reduction="sum"))
        count += answer.size
    with running(path) as engine:
        found = perplexity(engine, tokenizer, rows)
        asked = accuracy(engine, tokenizer, rows, max_tokens=8)     # and the pages it wrote to are free again
        assert memory(engine)["weights_gib"] >= 0
    assert found["answer_tok"] == count
    assert math.isclose(found["ppl"], math.exp(loss / count), rel_tol=1e-3)
    assert (asked["questions"], asked["accuracy"]) == (5, 0.0)
    assert 0 < asked["out_tok"] <= 40


def test_the_last_number_of_an_answer() -> None:
    assert last_number("so 3 + 4 = 7.\n#### 1,070,") == 1070
    assert last_number("The answer is $-2.50.") == -2.5
    assert last_number("none") is None
