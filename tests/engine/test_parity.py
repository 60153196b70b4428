"""Greedy tokens against transformers, float32 on the CPU: 64 tokens on 20 prompts of every tiny family, and small real models.

A row of the engine is greedy where every token is the likeliest under transformers' logits for the same prompt and the tokens
before it, so one forward pass of transformers a row decides it. The tiny models are compared with its generate() as well;
GRISTMILL_FULL=1 does so for the real ones, and takes more and longer rows of them, which needs some ten minutes.

Two float32 programs that add in another order differ in the last bits of a logit. A token that is not the likeliest counts only
where transformers gives it less than TIE below the likeliest one; such tokens are reported as warnings.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from engine_cases import add_at_once, finish, full_logits, load_decoder, make_requests, random_prompts, running, tokens_of
from models import TINY_FAMILIES, load_reference, real_model, reference_greedy, tiny_checkpoint

from engine.request import SamplingParams
from pipeline.model_source import ModelSourceError
from pipeline.tokenizer import load_tokenizer

FULL = bool(os.environ.get("GRISTMILL_FULL"))
MESSAGES = Path(__file__).parents[2] / "jobs/examples/customer_messages.parquet"
TIE = 1e-4


def reference_logits(model: Path, prompt: Sequence[int], output: Sequence[int]) -> torch.Tensor:
    """transformers' logits for each token of `output`, float32 [len(output), V]."""
    ids = torch.tensor([[*prompt, *output[:-1]]])
    with torch.inference_mode():
        return load_reference(model)(ids, logits_to_keep=len(output)).logits[0]


def check_greedy(model: Path, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> None:
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        logits = reference_logits(model, prompt, output)
        best, token = logits.max(-1), torch.tensor(output)
        for i in (best.indices != token).nonzero().flatten().tolist():
            note_tie(f"{model.name} row {row} token {i}", logits[i], output[i], int(best.indices[i]))


def check_generate(model: Path, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]) -> None:
    for row, want in enumerate(reference_greedy(model, prompts, len(outputs[0]))):
        got = outputs[row]
        i = next((i for i in range(len(want)) if got[i] != want[i]), None)
        if i is not None:           # rows differ after a tie: no more of this one
            note_tie(f"{model.name} row {row} token {i}", reference_logits(model, prompts[row], want)[i], got[i], want[i])


def note_tie(where: str, logits: torch.Tensor, got: int, want: int) -> None:
    gap = float(logits[want] - logits[got])
    assert abs(gap) < TIE, f"{where}: {got} for {want}, whose logit is larger by {gap:.3g}"
    warnings.warn(f"{where}: {got} for {want}, a tie to {gap:.1g}", stacklevel=1)


def generate(model: Path, prompts: Sequence[Sequence[int]], n: int, **config: int) -> list[list[int]]:
    with running(model, max_model_len=384, **config) as engine:
        tokens = tokens_of(finish(engine, make_requests(prompts, SamplingParams(max_tokens=n, ignore_eos=True))))
    assert all(len(row) == n for row in tokens.values())
    return [tokens[i] for i in range(len(prompts))]


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_tiny_models(family: str, tmp_path: Path) -> None:
    """Prompts longer than the windows, some with a prefix in common, in chunks and batches."""
    model = tiny_checkpoint(family, tmp_path)
    prompts = random_prompts(20, seed=1, shortest=20, longest=60, shared=40)
    outputs = generate(model, prompts, 64, max_step_tokens=48)
    assert len({tuple(output[-16:]) for output in outputs}) == len(prompts), "rows that end alike prove little"
    check_greedy(model, prompts, outputs)
    check_generate(model, prompts, outputs)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_logits_of_tiny_models(family: str, tmp_path: Path) -> None:
    """Not only the likeliest token: every logit of every position, by prefill and by decode."""
    model = tiny_checkpoint(family, tmp_path, seed=1)
    prompt = random_prompts(1, seed=2, shortest=150, longest=150)[0]
    want = reference_logits(model, prompt[:1], prompt[1:])
    decoder = load_decoder(model, torch.float32)
    for decode in (0, 120):
        got = full_logits(decoder, prompt, decode)[: len(prompt) - 1]
        assert (got - want).abs().max() < 1e-4 * want.std()


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_products_that_are_added_at_once(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU those of many rows are, where no norm comes between them and the residual."""
    decoder, prompt = load_decoder(tiny_checkpoint(family, tmp_path), torch.float32), random_prompts(1, seed=2, shortest=40)[0]
    want, added = full_logits(decoder, prompt, 5), add_at_once(monkeypatch)
    assert torch.equal(full_logits(decoder, prompt, 5), want)
    assert bool(added) != decoder.spec.sandwich_norms


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_one_block_of_each_kind(family: str, tmp_path: Path) -> None:
    """What is compiled ahead runs them alone: each that attends in another way is there, and so is the last, which ends steps."""
    decoder, prompt = load_decoder(tiny_checkpoint(family, tmp_path), torch.float32), random_prompts(1, seed=2, shortest=40)[0]
    ran: list[int] = []
    for i, block in enumerate(decoder.blocks):
        block.register_forward_pre_hook(lambda module, args, i=i: ran.append(i))
    want = full_logits(decoder, prompt)
    every, ran[:] = list(ran), []
    with decoder.one_block_of_each_kind():
        full_logits(decoder, prompt)
    layers = decoder.spec.layers
    assert len(ran) == len(set(ran)) <= len(set(layers)) + 1
    assert {layers[i] for i in ran} == set(layers) and ran[-1] == len(layers) - 1
    assert torch.equal(full_logits(decoder, prompt), want) and every == list(range(len(layers)))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["smollm2", "qwen2.5-0.5b", "gemma3-270m"])
def test_real_models(name: str) -> None:
    """The first words of customer messages; 64 tokens of 20 rows in the full form."""
    try:
        model = real_model(name)
    except ModelSourceError as error:
        pytest.skip(str(error))
    tokenizer = load_tokenizer(model)
    texts = pq.read_table(MESSAGES)["message"].to_pylist()[:: 10 if FULL else 50]
    prompts = [tokenizer(text).input_ids[: 64 if FULL else 24] for text in texts]
    assert len(prompts) == (20 if FULL else 4)
    outputs = generate(model, prompts, 64 if FULL else 24, max_step_tokens=256)
    check_greedy(model, prompts, outputs)
    if FULL:
        check_generate(model, prompts, outputs)
