"""Sampling end to end on a tiny model whose logits transformers computes too: penalties, min_tokens, noise,
log-probabilities and stop strings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_cases import finish, make_requests, mixed_requests, random_prompts, running
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import chi_square_holds, kept64
from models import TURN_END, VOCAB, load_reference, tiny_checkpoint, tiny_tokenizer
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import MinNewTokensLengthLogitsProcessor, PreTrainedTokenizerFast, RepetitionPenaltyLogitsProcessor

from engine.engine import Engine
from engine.guided.llg import LLGuidanceBackend
from engine.request import Completion, FinishReason, Request, SamplingParams
from engine.stop_strings import StopStrings

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    with running(model, tokenizer=TOKENIZER, max_rows=128, max_step_tokens=512) as engine:
        yield engine


def generate(engine: Engine, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]) -> list[Completion]:
    done = finish(engine, make_requests(prompts, params))
    return [done[i] for i in range(len(prompts))]


def reference(model: Path, prompt: list[int], output: list[int]) -> torch.Tensor:
    """transformers' logits for each token of `output`, float64 [len(output), V]."""
    with torch.inference_mode():
        return load_reference(model)(torch.tensor([prompt + output[:-1]])).logits[0, len(prompt) - 1 :].double()


# --- what changes the logits ---


def test_repetition_penalty(model: Path, engine: Engine) -> None:
    prompts = random_prompts(6, seed=1, shortest=20, longest=90)
    done = generate(engine, prompts, SamplingParams(max_tokens=40, ignore_eos=True, repetition_penalty=1.8))
    process, changed = RepetitionPenaltyLogitsProcessor(1.8), 0
    for prompt, completion in zip(prompts, done, strict=True):
        output = completion.tokens.tolist()
        logits = reference(model, prompt, output)
        for i, token in enumerate(output):
            assert token == int(process(torch.tensor([prompt + output[:i]]), logits[i : i + 1]).argmax())
            changed += token != int(logits[i].argmax())
    assert changed > 20, "the penalty must matter for the test to mean something"


@pytest.mark.parametrize("penalties", [(1.0, 2.0, 0.0), (1.0, 0.0, 1.5), (1.0, -2.0, -1.0), (1.3, 0.7, 0.4)])
def test_presence_and_frequency_penalties(model: Path, engine: Engine, penalties: tuple[float, float, float]) -> None:
    """Over the output alone, once for each token that occurs and once for each time it does; after the repetition penalty."""
    repetition, presence, frequency = penalties
    prompts = random_prompts(4, seed=2, shortest=20, longest=60)
    params = SamplingParams(max_tokens=40, ignore_eos=True, repetition_penalty=repetition, presence_penalty=presence,
                            frequency_penalty=frequency)
    changed = 0
    for prompt, completion in zip(prompts, generate(engine, prompts, params), strict=True):
        output = completion.tokens.tolist()
        for i, logits in enumerate(reference(model, prompt, output)):
            want = logits.clone()
            seen = torch.tensor(sorted({*prompt, *output[:i]}))
            want[seen] = torch.where(want[seen] > 0, want[seen] / repetition, want[seen] * repetition)
            counts = torch.bincount(torch.tensor(output[:i], dtype=torch.long), minlength=VOCAB)
            want -= presence * (counts > 0) + frequency * counts
            assert output[i] == int(want.argmax())
            changed += output[i] != int(logits.argmax())
    assert changed > 3


def test_min_tokens(model: Path, engine: Engine) -> None:
    """No end token before its time; in its place the next likeliest."""
    prompts = random_prompts(5, seed=3, shortest=20, longest=60)
    free = generate(engine, prompts, SamplingParams(max_tokens=30, ignore_eos=True))
    for prompt, completion in zip(prompts, free, strict=True):
        ends = sorted(set(completion.tokens[:8].tolist()))        # they would come at once
        params = SamplingParams(max_tokens=30, min_tokens=12, stop_token_ids=tuple(ends), ignore_eos=True)
        done = generate(engine, [prompt], params)[0]
        output = done.tokens.tolist()
        assert len(output) >= 12
        process = MinNewTokensLengthLogitsProcessor(len(prompt), 12, ends, device="cpu")
        whole = output if done.finish_reason is FinishReason.LENGTH else [*output, ends[0]]
        for i, logits in enumerate(reference(model, prompt, whole)):
            best = int(process(torch.tensor([prompt + output[:i]]), logits[None]).argmax())
            assert best == output[i] if i < len(output) else best in ends


# --- noise ---


@pytest.mark.parametrize("setting", [
    SamplingParams(temperature=1.0), SamplingParams(temperature=0.6), SamplingParams(temperature=1.5, top_k=9),
    SamplingParams(temperature=1.5, top_p=0.7), SamplingParams(temperature=2.0, min_p=0.05),
], ids=["plain", "cold", "top_k", "top_p", "min_p"])
def test_frequencies_are_those_of_the_filtered_softmax(model: Path, engine: Engine, setting: SamplingParams) -> None:
    """One token of a thousand rows that differ only by their seeds."""
    prompt, n = random_prompts(1, seed=4, shortest=40, longest=40)[0], 1000
    params = [replace(setting, max_tokens=1, seed=2**33 * i + 7, ignore_eos=True) for i in range(n)]
    done = generate(engine, [prompt] * n, params)
    counts = torch.bincount(torch.tensor([int(c.tokens[0]) for c in done]), minlength=VOCAB)
    x = reference(model, prompt, [0])[0] / setting.temperature
    kept = kept64(x, setting.top_k, setting.top_p, setting.min_p)
    assert not bool(counts[~kept].any()), "a token came that the filters leave out"
    assert chi_square_holds(counts, torch.softmax(x.masked_fill(~kept, -torch.inf), 0))


def test_noise_depends_on_seed_and_position(engine: Engine) -> None:
    prompt = random_prompts(1, seed=5, shortest=30, longest=30)[0]
    hot = [SamplingParams(max_tokens=30, temperature=1.2, seed=seed, ignore_eos=True) for seed in (1, 1, 2, 2**40 + 1)]
    one, same, low, high = (c.tokens.tolist() for c in generate(engine, [prompt] * 4, hot))
    assert one == same
    assert len({tuple(row) for row in (one, low, high)}) == 3
    # A row goes on from its own output as it would have gone on.
    rest = generate(engine, [prompt + one[:12]], SamplingParams(max_tokens=18, temperature=1.2, seed=1, ignore_eos=True))[0]
    assert rest.tokens.tolist() == one[12:]


# --- no token at all ---


@pytest.mark.parametrize("depth", [1, 2])
def test_rows_whose_logits_are_not_numbers_end_as_errors(model: Path, depth: int) -> None:
    """Alone, and with what they had: greedy and sampled, with penalties and log-probabilities, by an automaton and by a guide."""
    backend = LLGuidanceBackend(TOKENIZER, VOCAB, [TURN_END])
    requests = [*mixed_requests(6), *(Request(6 + i, np.array([i]), SamplingParams(max_tokens=30)) for i in range(4))]
    for request in requests[-2:]:
        request.grammar = backend.compile_schema({"enum": ["billing", "delivery"]})
    requests[-1].grammar.automaton = None
    with running(model, guided=backend, depth=depth) as engine:
        want = finish(engine, requests)
        project, broken = engine._runner.model.logits, []

        def logits(hidden: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
            logits = project(hidden, out)
            rows = engine._table.sampled_rows[: len(logits)].tolist()
            for i, row in enumerate(rows):
                if row in engine._scheduler.live:
                    name = engine._scheduler.live[row].waiting.request.id
                    if name % 2 and engine._scheduler.rows.seen[row] > engine._scheduler.rows.prompt_len[row]:
                        logits[i] = float("nan")
                        broken.append(name)
            return logits

        engine._runner.model.logits = logits
        done = finish(engine, requests)
    assert set(broken) == {1, 3, 5, 7, 9}
    for name, completion in done.items():
        if name in broken:
            assert completion.finish_reason is FinishReason.ERROR
            assert "the model's logits are not numbers" in completion.error
            assert "engine.dtype=bfloat16" in completion.error
            assert 1 <= completion.tokens.size < want[name].tokens.size
        else:
            assert completion.error is None
            assert completion.tokens.size == want[name].tokens.size
        assert completion.tokens.tolist() == want[name].tokens.tolist()[: completion.tokens.size]


# --- log-probabilities ---


@pytest.mark.parametrize("params", [
    SamplingParams(max_tokens=20, logprobs=5), SamplingParams(max_tokens=20, logprobs=0),
    SamplingParams(max_tokens=20, logprobs=20),
    SamplingParams(max_tokens=20, logprobs=3, temperature=1.5, top_p=0.8, repetition_penalty=1.5, seed=9),
], ids=["top", "chosen", "most", "before filters"])
def test_logprobs(model: Path, engine: Engine, params: SamplingParams) -> None:
    """Of the model's own distribution, before penalties, temperature and filters."""
    prompts = random_prompts(5, seed=6, shortest=10, longest=60)
    for prompt, done in zip(prompts, generate(engine, prompts, params), strict=True):
        output = done.tokens.tolist()
        want = torch.log_softmax(reference(model, prompt, output), -1)
        assert [entry.token for entry in done.logprobs] == output
        for entry, row in zip(done.logprobs, want, strict=True):
            assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-4)
            values, ids = row.topk(params.logprobs)
            assert [token for token, _ in entry.top] == ids.tolist()
            assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_logprobs_of_some_rows_only(engine: Engine) -> None:
    prompts = random_prompts(6, seed=7)
    params = [SamplingParams(max_tokens=10, ignore_eos=True, logprobs=None if i % 2 else i) for i in range(6)]
    for i, done in enumerate(generate(engine, prompts, params)):
        if i % 2:
            assert done.logprobs is None
        else:
            assert [len(entry.top) for entry in done.logprobs] == [i] * 10


# --- stop strings ---


def test_stop_strings_cut_the_text(engine: Engine) -> None:
    """Of three characters and as many tokens, taken from what the model says without them."""
    prompts = random_prompts(20, seed=8, shortest=10, longest=30)
    free = generate(engine, prompts, SamplingParams(max_tokens=60, ignore_eos=True))
    cases = []
    for prompt, completion in zip(prompts, free, strict=True):
        text = TOKENIZER.decode(completion.tokens.tolist(), skip_special_tokens=True)
        at = next((i for i in range(5, len(text) - 3) if text[i : i + 3].isascii()), None)
        if at is not None:
            cases.append((prompt, completion.tokens.tolist(), text, text[at : at + 3]))
    assert len(cases) >= 3
    params = [SamplingParams(max_tokens=60, ignore_eos=True, stop=("never", stop)) for _, _, _, stop in cases]
    for (_, tokens, text, stop), done in zip(cases, generate(engine, [case[0] for case in cases], params), strict=True):
        assert done.finish_reason is FinishReason.STOP
        assert done.text == text[: text.index(stop)]
        assert done.tokens.tolist() == tokens[: done.tokens.size]
        assert TOKENIZER.decode(done.tokens.tolist(), skip_special_tokens=True) == done.text + stop


def test_stop_strings_wait_for_min_tokens(engine: Engine) -> None:
    prompts = random_prompts(6, seed=9, shortest=10, longest=30)
    everything = tuple(map(chr, range(32, 127)))
    soon = generate(engine, prompts, SamplingParams(max_tokens=40, ignore_eos=True, stop=everything))
    late = generate(engine, prompts, SamplingParams(max_tokens=40, ignore_eos=True, stop=everything, min_tokens=15))
    assert min(c.tokens.size for c in soon) < 10
    assert min(c.tokens.size for c in late) >= 15


def test_text_is_given_only_where_it_was_cut(engine: Engine) -> None:
    done = generate(engine, [[1, 2]], SamplingParams(max_tokens=5, ignore_eos=True, stop=("never",)))[0]
    assert (done.text, done.finish_reason) == (None, FinishReason.LENGTH)


@given(text=st.text("ab é€\n", max_size=30), stop=st.lists(st.text("ab é€\n", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_strings_are_found_as_soon_as_they_stand(text: str, stop: list[str]) -> None:
    """Tokens are bytes, so that characters as well as stop strings are split over several."""
    find, found = StopStrings(TOKENIZER, tuple(stop)).find, None
    for length in range(1, len(text) + 1):
        for byte in text[length - 1].encode():
            assert found is None
            found = find(byte)
        cut = [at for s in stop if (at := text[:length].find(s)) >= 0]
        assert found == (text[: min(cut)] if cut else None)
        if cut:
            return


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As those of Mistral and Llama 2: a byte that makes no character spoils the others of its run."""
    pieces = ["<s>", "<0x0A>", "<0xC3>", "<0xA9>", "\u2581", "\u2581a", "a", "b"]
    tokenizer = Tokenizer(BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@given(tokens=st.lists(st.integers(0, 7), max_size=20), stop=st.lists(st.text(" ab\né", min_size=1, max_size=3), min_size=1))
def test_stop_strings_are_those_of_the_decoded_output(tokens: list[int], stop: list[str]) -> None:
    tokenizer = byte_fallback_tokenizer()
    find = StopStrings(tokenizer, tuple(stop)).find
    for length in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:length], skip_special_tokens=True)
        cut = [] if text.endswith("\ufffd") else [at for s in stop if (at := text.find(s)) >= 0]
        assert find(tokens[length - 1]) == (text[: min(cut)] if cut else None)
        if cut:
            return


def test_special_tokens_are_no_text() -> None:
    stop = StopStrings(TOKENIZER, ("<|im_end|>", "ab"))
    tokens = [ord("a"), TOKENIZER.eos_token_id, ord("b")]
    assert [stop.find(token) for token in tokens] == [None, None, ""]


# --- parameters ---


@pytest.mark.parametrize("bad, message", [
    ({"max_tokens": 0}, "max_tokens must be at least 1"), ({"min_tokens": 300}, "min_tokens must lie between 0 and max_tokens"),
    ({"temperature": -0.1}, "temperature"), ({"temperature": float("nan")}, "temperature"), ({"top_p": 0.0}, "top_p"),
    ({"top_k": -1}, "top_k"), ({"min_p": 1.5}, "min_p"), ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ({"presence_penalty": 2.5}, "presence_penalty"), ({"frequency_penalty": -3.0}, "frequency_penalty"),
    ({"stop": ("",)}, "stop strings must not be empty"), ({"stop": ("a",) * 129}, "stop must have at most 128 strings"),
    ({"stop": ("a" * 1001,)}, "stop strings must have at most 1000 characters"),
    ({"logprobs": 21}, "logprobs must lie between 0 and 20"),
    ({"top_k": 2**32}, "top_k"), ({"stop_token_ids": (2**40,)}, "stop_token_ids"), ({"stop_token_ids": (-1,)}, "stop_token_ids"),
    ({"min_tokens": 2**33, "max_tokens": 2**34}, "min_tokens"), ({"temperature": 1e308}, "temperature"),
    ({"repetition_penalty": 1e-320}, "repetition_penalty"), ({"repetition_penalty": 1e308}, "repetition_penalty"),
])
def test_bad_parameters_are_named(bad: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**bad)


def test_the_largest_parameters_run(engine: Engine) -> None:
    """As the numbers that the device holds: int32 and float32."""
    largest = [SamplingParams(max_tokens=2**62, min_tokens=2**30, top_k=2**30, temperature=1e6, stop_token_ids=(2**30,),
                              seed=2**63),
               SamplingParams(max_tokens=9, top_p=1e-300, min_p=1e-300, temperature=1e-300, repetition_penalty=100.0)]
    filled, short = generate(engine, random_prompts(2, seed=11), largest)
    assert (filled.prompt_tokens + filled.tokens.size, filled.finish_reason) == (engine.max_model_len, FinishReason.LENGTH)
    assert short.finish_reason is not FinishReason.ERROR


def test_greedy_takes_the_likeliest(model: Path, engine: Engine) -> None:
    prompts = random_prompts(3, seed=10)
    done = generate(engine, prompts, SamplingParams(max_tokens=10, ignore_eos=True, top_k=1, top_p=0.1, min_p=0.9, seed=3))
    for prompt, completion in zip(prompts, done, strict=True):
        logits = reference(model, prompt, completion.tokens.tolist())
        np.testing.assert_array_equal(completion.tokens, logits.argmax(-1))
