"""The engine end to end on tiny random models: the same rows give the same tokens however they run; every way to end a row."""

from __future__ import annotations

import random
import weakref
from collections.abc import Hashable, Iterator
from pathlib import Path

import numpy as np
import pytest
from engine_cases import finish, make_requests, mixed_requests, random_prompts, running, tokens_of
from models import TURN_END, VOCAB, tiny_checkpoint, tiny_tokenizer

from engine import engine as engine_module
from engine.guided.grammar import Grammar
from engine.guided.llg import LLGuidanceBackend
from engine.request import Completion, FinishReason, Request, SamplingParams
from engine.rows import MAX_STOP_IDS

SCHEMA = {"type": "object", "properties": {"label": {"enum": ["billing", "delivery", "praise"]}, "urgent": {"type": "boolean"},
                                           "note": {"type": "string"}},
          "required": ["label", "urgent", "note"], "additionalProperties": False}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def backend() -> LLGuidanceBackend:
    return LLGuidanceBackend(tiny_tokenizer(), VOCAB, [TURN_END])


@pytest.fixture(scope="module", params=["automaton", "guide"])
def grammar(request: pytest.FixtureRequest, backend: LLGuidanceBackend) -> Grammar:
    """Stepped by the device, and by the host."""
    grammar = backend.compile_schema(SCHEMA)
    assert grammar.automaton is not None
    if request.param == "guide":
        grammar.automaton = None
    return grammar


# --- the same rows, however they are run ---


@pytest.fixture(scope="module", params=["llama", "mistral"])
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Hashable, list[int]]]:
    """A model, and what each of the requests gives when it runs by itself, one step at a time and nothing shared."""
    model = tiny_checkpoint(request.param, tmp_path_factory.mktemp(request.param))
    tokens: dict[Hashable, list[int]] = {}
    with running(model, depth=1, prefix_sharing=False) as engine:
        for one in mixed_requests():
            tokens |= tokens_of(finish(engine, [one]))
    assert len({tuple(row) for row in tokens.values()}) == len(tokens)
    return model, tokens


@pytest.mark.parametrize("config", [
    {"depth": 1}, {"depth": 2}, {"prefix_sharing": False}, {"max_rows": 3}, {"page_size": 32}, {"window": 3},
    {"max_step_tokens": 8}, {"max_step_tokens": 9, "depth": 1}, {"max_step_tokens": 1024, "max_rows": 16},
], ids=lambda config: "-".join(f"{key}={value}" for key, value in config.items()))
def test_batched_rows_give_the_same_tokens(alone: tuple[Path, dict], config: dict) -> None:
    model, want = alone
    with running(model, **config) as engine:
        assert tokens_of(finish(engine, mixed_requests())) == want
        assert engine.stats().preemptions == 0


@pytest.mark.parametrize("depth", [1, 2])
def test_preempted_rows_give_the_same_tokens(alone: tuple[Path, dict], depth: int) -> None:
    model, want = alone
    with running(model, max_model_len=160, kv_pages=11, depth=depth) as engine:
        # Enough short rows first, so that the forecast lets in more than the pool can hold when the long ones come.
        finish(engine, make_requests([[1, 2, 3]] * 80, SamplingParams(max_tokens=1)))
        assert tokens_of(finish(engine, mixed_requests())) == want
        assert engine.stats().preemptions > 0


def test_a_prefix_found_gives_the_same_tokens(alone: tuple[Path, dict]) -> None:
    model, want = alone
    with running(model) as engine:
        first = finish(engine, mixed_requests())
        again = finish(engine, mixed_requests())
        assert tokens_of(first) == tokens_of(again) == want
        assert sum(c.cached_tokens for c in first.values()) >= 6 * 48
        assert sum(c.cached_tokens for c in again.values()) >= 7 * 48, "a prefix outlives the rows that had it"


def test_order_and_shards_do_not_matter(alone: tuple[Path, dict]) -> None:
    model, want = alone
    requests = mixed_requests()
    random.Random(5).shuffle(requests)
    with running(model) as engine:
        assert tokens_of(finish(engine, requests)) == want
    done: dict[Hashable, list[int]] = {}
    for shard in (requests[:5], requests[5:]):
        with running(model) as engine:
            done |= tokens_of(finish(engine, shard))
    assert done == want


def test_late_arrivals_do_not_disturb_running_rows(alone: tuple[Path, dict]) -> None:
    model, want = alone
    coming, done = mixed_requests(), {}
    with running(model) as engine:
        while coming or engine.pending:
            if coming:
                engine.submit(coming.pop())
            for _ in range(2):
                done |= {c.id: c for c in engine.step()}
            engine.check_integrity()
    assert tokens_of(done) == want


# --- prefixes ---


@pytest.mark.parametrize("same", [32, 33])
def test_rows_with_one_token_left_to_compute_fill_a_step(llama: Path, same: int) -> None:
    """As many as there are rows, which share full pages and begin with their last token, and no more tokens to a step."""
    stem = random_prompts(1, seed=7, shortest=same, longest=same)[0]
    prompts = [[*stem, *range(i, i + 33 - same)] for i in range(48)]
    params = [SamplingParams(max_tokens=4 + i % 9, temperature=1.0, seed=i, ignore_eos=True) for i in range(48)]
    requests = make_requests(prompts, params)
    with running(llama, prefix_sharing=False, max_step_tokens=256) as engine:
        want = tokens_of(finish(engine, requests))
    with running(llama, max_rows=16, max_step_tokens=16) as engine:
        done = finish(engine, requests)
        assert engine.stats().preemptions == 0
    assert tokens_of(done) == want


@pytest.mark.parametrize("length, expected", [(16, [0] * 5), (17, [0] + [16] * 4), (48, [0, 32, 47, 47, 47]),
                                              (50, [0] + [48] * 4)])
def test_equal_prompts_share_all_but_the_last_token(llama: Path, length: int, expected: list[int]) -> None:
    """It is computed, for its logits. Rows of the step that computes the prefix share its full pages, later ones the rest too
    (48: a step of 64 tokens has no room for a third)."""
    prompt = random_prompts(1, seed=7, shortest=length, longest=length)[0]
    params = [SamplingParams(max_tokens=8, temperature=1.0, seed=i) for i in range(5)]
    with running(llama) as engine:
        done = finish(engine, make_requests([prompt] * 5, params))
        cached = sorted(c.cached_tokens for c in done.values())
        assert cached == expected
        assert engine.stats().cached_tokens == sum(cached)
        assert engine.stats().prompt_tokens == 5 * length
    assert len({tuple(c.tokens) for c in done.values()}) > 1, "seeds make samples differ"


# --- ends ---


def test_end_tokens_stop_and_are_not_output(tmp_path: Path, llama: Path) -> None:
    prompts = random_prompts(6, seed=11)
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    with running(llama) as engine:
        free = tokens_of(finish(engine, make_requests(prompts, params)))
    end = free[0][10]
    model = tiny_checkpoint("llama", tmp_path, eos_token_id=[TURN_END, end])
    with running(model) as engine:
        assert tokens_of(finish(engine, make_requests(prompts, params))) == free
        done = finish(engine, make_requests(prompts, SamplingParams(max_tokens=30)))
    for i, tokens in free.items():
        first = next((at for at, token in enumerate(tokens) if token in (TURN_END, end)), None)
        assert done[i].tokens.tolist() == tokens[:first]
        assert done[i].finish_reason is (FinishReason.LENGTH if first is None else FinishReason.STOP)


def test_stop_ids(llama: Path) -> None:
    prompt = random_prompts(1, seed=12)
    with running(llama) as engine:
        free = finish(engine, make_requests(prompt, SamplingParams(max_tokens=30)))[0].tokens.tolist()
        ids = (free[7], free[20])
        done = finish(engine, make_requests(prompt, SamplingParams(max_tokens=30, stop_token_ids=ids, ignore_eos=True)))[0]
    first = min(free.index(token) for token in ids)
    assert (done.tokens.tolist(), done.finish_reason, done.text) == (free[:first], FinishReason.STOP, None)


def test_max_tokens_is_cut_by_the_context(llama: Path) -> None:
    prompts = random_prompts(3, seed=13, shortest=50, longest=63)
    params = SamplingParams(max_tokens=1000, ignore_eos=True)
    with running(llama, max_model_len=64, max_step_tokens=16) as engine:
        short = finish(engine, make_requests(prompts, params))
    with running(llama) as engine:
        long = finish(engine, make_requests(prompts, SamplingParams(max_tokens=14, ignore_eos=True)))
    for i, prompt in enumerate(prompts):
        assert short[i].finish_reason is FinishReason.LENGTH
        assert short[i].tokens.tolist() == long[i].tokens.tolist()[: 64 - len(prompt)]


def test_one_token_of_one_token(llama: Path) -> None:
    with running(llama) as engine:
        done = finish(engine, make_requests([[5], [6]], SamplingParams(max_tokens=1)))
    assert [c.tokens.size for c in done.values()] == [1, 1]
    assert {c.finish_reason for c in done.values()} == {FinishReason.LENGTH}


def test_a_row_alone_that_copies_a_page_has_pages_to_run(llama: Path) -> None:
    """Two long questions about one document, in a pool for one row: there is no room for the page that it would copy."""
    prompts = random_prompts(2, seed=21, shortest=40, longest=40)
    prompts = [[*range(205), *prompt] for prompt in prompts]
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    with running(llama, prefix_sharing=False) as engine:
        want = tokens_of(finish(engine, make_requests(prompts, params)))
    with running(llama, max_rows=1) as engine:
        done = finish(engine, make_requests(prompts, params))
    assert tokens_of(done) == want
    assert sorted(c.cached_tokens for c in done.values()) == [0, 192]


# --- aborts ---


@pytest.mark.parametrize("depth", [1, 2])
def test_aborts(llama: Path, depth: int) -> None:
    prompts = random_prompts(12, seed=14)
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    with running(llama, max_rows=4, depth=depth) as engine:
        want = tokens_of(finish(engine, make_requests(prompts, params)))
        for request in make_requests(prompts, params):
            engine.submit(request)
        done: dict[Hashable, Completion] = {}
        for _ in range(10):
            done |= {c.id: c for c in engine.step()}
        engine.abort([0, 5, 11, "stranger"])
        assert engine.pending == 12 - len(done)
        while engine.pending:
            done |= {c.id: c for c in engine.step()}
            engine.check_integrity()
        assert sorted(done) == list(range(12))
        for i, completion in done.items():
            if i in (0, 5, 11):
                assert completion.finish_reason is FinishReason.ABORTED
                assert completion.tokens.size < 30
            else:
                assert completion.tokens.size == 30
            assert completion.tokens.tolist() == want[i][: completion.tokens.size]
        for request in make_requests(prompts, params):
            engine.submit(request)
        engine.step()
        engine.abort()
        assert {c.finish_reason for c in engine.step()} == {FinishReason.ABORTED}
        assert engine.pending == 0
        assert engine.stats().kv_pages_used == 0
        assert tokens_of(finish(engine, make_requests(prompts, params))) == want, "what was in flight leaves no trace"


def test_rows_that_run_long_are_told_from_those_that_wait(llama: Path) -> None:
    with running(llama, max_rows=2) as engine:
        for request in make_requests(random_prompts(4, seed=16), SamplingParams(max_tokens=30, ignore_eos=True)):
            engine.submit(request)
        engine.step()
        ids = engine.overdue(0.0)
        assert len(ids) == 2
        assert engine.overdue(1000.0) == []
        engine.abort(ids)
        done = {c.id: c.finish_reason for c in engine.step()}
        assert done == dict.fromkeys(ids, FinishReason.ABORTED)
        while engine.pending:
            engine.step()


# --- refusals ---


@pytest.mark.parametrize("prompt, params, message", [
    ([], {}, "the prompt has no tokens"),
    ([1] * 256, {}, "the prompt has 256 tokens, which leaves no room in engine.max_model_len=256"),
    ([1, VOCAB], {}, f"outside the model's vocabulary of {VOCAB}"),
    ([-1], {}, f"outside the model's vocabulary of {VOCAB}"),
    ([1], {"stop": ("x",)}, "stop strings need a tokenizer"),
    ([1], {"stop_token_ids": tuple(range(MAX_STOP_IDS))}, f"at most {MAX_STOP_IDS - 1} stop_token_ids"),
])
def test_requests_that_cannot_run_are_refused(llama: Path, prompt: list[int], params: dict, message: str) -> None:
    with running(llama) as engine:
        with pytest.raises(ValueError) as error:
            engine.submit(Request(0, np.array(prompt), SamplingParams(**params)))
        assert message in str(error.value)
        assert engine.pending == 0
        assert finish(engine, make_requests([[1] * 255], SamplingParams()))[0].tokens.size <= 1


def test_grammars_and_adapters_need_their_part(llama: Path, backend: LLGuidanceBackend) -> None:
    with running(llama) as engine:
        with pytest.raises(ValueError, match="a grammar needs a grammar backend"):
            engine.submit(Request(0, np.array([1]), grammar=backend.compile_choice(["a"])))
        with pytest.raises(ValueError, match="no LoRA"):
            engine.submit(Request(0, np.array([1]), adapter="mine"))


def test_a_device_that_torch_does_not_know_is_refused(llama: Path) -> None:
    with pytest.raises(ValueError, match=r"^engine\.device=tpu: no such device"), running(llama, device="tpu"):
        pass


@pytest.mark.parametrize("config, limit", [
    ({"kv_pages": 16}, "engine.kv_pages=16 leaves 0.00 GiB"),
    ({"cpu_kv_gib": 0.0001}, "engine.cpu_kv_gib=0.0001 leaves 0.00 GiB"),
])
def test_a_pool_that_cannot_hold_one_row_is_refused(llama: Path, config: dict, limit: str) -> None:
    with pytest.raises(ValueError) as error, running(llama, **config):
        pass
    message = str(error.value)
    assert limit in message
    assert "engine.max_model_len=256" in message
    assert "Lower engine.max_model_len" in message
    assert "\n" not in message


def test_the_smallest_pool_holds_one_row(llama: Path) -> None:
    prompts = random_prompts(6, seed=15, shortest=200, longest=250)
    with running(llama, kv_pages=17) as engine:
        done = finish(engine, make_requests(prompts, SamplingParams(max_tokens=20, ignore_eos=True)))
    assert [done[i].tokens.size for i in range(6)] == [min(20, 256 - len(prompt)) for prompt in prompts]


# --- the loop ---


def test_run_pulls_requests_as_there_is_room(llama: Path) -> None:
    pulled = 0

    def source():
        nonlocal pulled
        for request in make_requests(random_prompts(40, seed=16, longest=20), SamplingParams(max_tokens=6)):
            pulled += 1
            yield request

    with running(llama, window=5, max_rows=4) as engine:
        done = []
        for completion in engine.run(source()):
            done.append(completion.id)
            assert pulled <= len(done) + 5 + 4 + 1, "requests are not read ahead of their admission by more than a window"
        assert sorted(done) == list(range(40))
        assert engine.room() == 5


def test_requests_are_pulled_while_the_device_computes(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there are rows before the first step, then as many as keep so many waiting, and all come back."""
    monkeypatch.setattr(engine_module, "TAKEN", 3)
    requests, pulled = make_requests(random_prompts(40, seed=5), SamplingParams(max_tokens=6, ignore_eos=True)), []
    with running(llama, max_rows=8) as engine:
        def source() -> Iterator[Request]:
            for request in requests:
                pulled.append(engine.stats().steps)
                yield request

        done = {completion.id: completion.tokens.tolist() for completion in engine.run(source())}
    with running(llama, max_rows=8) as engine:
        assert done == tokens_of(finish(engine, requests))
    assert pulled.count(0) == 8 and max(map(pulled.count, pulled)) == 8 and min(map(pulled.count, pulled)) <= 3


def test_stats(llama: Path) -> None:
    prompts = random_prompts(10, seed=17, longest=30)
    with running(llama, max_rows=4) as engine:
        for request in make_requests(prompts, SamplingParams(max_tokens=9, ignore_eos=True)):
            engine.submit(request)
        engine.step()
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.finished) == (4, 6, 0)
        assert 0 < stats.kv_pages_used <= stats.kv_pages_total
        while engine.pending:
            engine.step()
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.finished, stats.kv_pages_used) == (0, 0, 10, 0)
        assert (stats.prompt_tokens, stats.generated_tokens) == (sum(map(len, prompts)), 90)
        assert stats.steps >= 3 * 9


# --- guided rows ---


def guided_requests(grammar: Grammar, max_tokens: int, count: int = 10) -> list[Request]:
    """Every second row is guided; sampled rather hot, so that the model alone would never write JSON."""
    requests = make_requests(random_prompts(count, seed=18, longest=40), [
        SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=i) for i in range(count)])
    for request in requests[::2]:
        request.grammar = grammar
    return requests


def check_guided(done: dict[Hashable, Completion], requests: list[Request]) -> None:
    for request in requests:
        completion = done[request.id]
        if request.grammar is None:
            assert completion.forced_tokens == 0
            continue
        value = request.grammar.check(bytes(completion.tokens.tolist()).decode())
        assert list(value) == ["label", "urgent", "note"]
        assert completion.tokens.size <= request.params.max_tokens


def test_guided_rows_validate_and_leave_others_alone(llama: Path, backend: LLGuidanceBackend, grammar: Grammar) -> None:
    results = []
    for config in ({"depth": 1}, {"depth": 2}, {"depth": 2, "max_rows": 3, "max_step_tokens": 5}):
        requests = guided_requests(grammar, 120)
        with running(llama, guided=backend, **config) as engine:
            done = finish(engine, requests)
            stats = engine.stats()
        check_guided(done, requests)
        assert stats.forced_tokens == sum(c.forced_tokens for c in done.values())
        results.append({i: (c.tokens.tolist(), c.finish_reason, c.forced_tokens) for i, c in done.items()})
    assert results[0] == results[1] == results[2]
    closed = [c for i, c in done.items() if c.finish_reason is FinishReason.STOP and requests[i].grammar]
    # {"label": "?, ", "urgent": ? and , "note": " are forced, whatever the choices.
    assert all(c.forced_tokens >= len('{"label": "", "urgent": , "note": "') for c in closed)
    assert closed
    with running(llama) as engine:
        plain = finish(engine, [r for r in guided_requests(grammar, 120) if r.grammar is None])
    assert all(plain[i].tokens.tolist() == results[0][i][0] for i in plain)


def test_automata_and_guides_give_the_same_tokens(llama: Path, backend: LLGuidanceBackend) -> None:
    requests, results = guided_requests(backend.compile_schema(SCHEMA), 120), []
    for _ in range(2):
        with running(llama, guided=backend) as engine:
            done = finish(engine, requests)
            results.append({i: (c.tokens.tolist(), c.finish_reason) for i, c in done.items()})
        for request in requests[::2]:
            request.grammar.automaton = None
    assert results[0] == results[1]


@pytest.mark.parametrize("depth", [1, 2])
def test_several_automata_and_guides_in_one_batch(llama: Path, backend: LLGuidanceBackend, depth: int) -> None:
    """Some forced runs are long enough for a chunk, some are not; rows take the places of others with another grammar or none."""
    schemas = [SCHEMA, {"enum": ["a", "ab", "abcdefgh", "b"]}, {"type": "integer", "minimum": -300, "maximum": 12345},
               {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 5},
               {"type": "string", "pattern": "^x+$"}]
    grammars = [*map(backend.compile_schema, schemas), None]
    assert [g is not None and g.automaton is not None for g in grammars] == [True] * 4 + [False] * 2
    requests = make_requests(random_prompts(36, seed=19, longest=30), [
        SamplingParams(max_tokens=60, temperature=1.5, seed=i) for i in range(36)])
    for i, request in enumerate(requests):
        request.grammar = grammars[i % 6]
    with running(llama, guided=backend, depth=depth, max_rows=5) as engine:
        done = finish(engine, requests)
    for request in requests:
        if request.grammar is not None:
            request.grammar.check(bytes(done[request.id].tokens.tolist()).decode())
    assert len({tuple(done[i].tokens) for i in range(1, 36, 6)}) > 1


def test_guided_rows_out_of_budget_are_closed(llama: Path, backend: LLGuidanceBackend, grammar: Grammar) -> None:
    for budget in (grammar.min_tokens, grammar.min_tokens + 1, grammar.min_tokens + 7):
        requests = guided_requests(grammar, budget)
        with running(llama, guided=backend) as engine:
            done = finish(engine, requests)
        check_guided(done, requests)
        reasons = {done[r.id].finish_reason for r in requests if r.grammar}
        assert reasons <= {FinishReason.STOP, FinishReason.LENGTH_CLOSED}
        assert FinishReason.LENGTH_CLOSED in reasons


@pytest.mark.parametrize("prompt, max_tokens", [(10, 20), (236, 200)], ids=["max_tokens", "context"])
def test_a_budget_below_the_shortest_output(llama: Path, backend: LLGuidanceBackend, grammar: Grammar, prompt: int,
                                            max_tokens: int) -> None:
    request = Request(0, np.arange(prompt), SamplingParams(max_tokens=max_tokens), grammar)
    with running(llama, guided=backend) as engine:
        done = finish(engine, [request])[0]
    assert done.finish_reason is FinishReason.ERROR
    assert done.error == (f"the schema needs {grammar.min_tokens} tokens and there is room for 20: "
                          "raise max_tokens, or shorten the prompt")


def test_guided_rows_survive_preemption(llama: Path, backend: LLGuidanceBackend, grammar: Grammar) -> None:
    want = None
    for pages in (None, 13):
        requests = guided_requests(grammar, 100)
        with running(llama, guided=backend, max_model_len=192, kv_pages=pages) as engine:
            finish(engine, make_requests([[1, 2, 3]] * 80, SamplingParams(max_tokens=1)))
            done = finish(engine, requests)
            preemptions = engine.stats().preemptions
        check_guided(done, requests)
        got = {i: (c.tokens.tolist(), c.finish_reason, c.forced_tokens) for i, c in done.items()}
        want = want or got
        assert got == want
    assert preemptions > 0


def test_stop_ids_and_strings_do_not_cut_guided_rows(llama: Path, backend: LLGuidanceBackend, grammar: Grammar) -> None:
    requests = guided_requests(grammar, 60)[::2]
    for request in requests:
        request.params = SamplingParams(max_tokens=60, min_tokens=40, stop_token_ids=(ord("u"),), stop=("label",))
    with running(llama, guided=backend, tokenizer=tiny_tokenizer()) as engine:
        done = finish(engine, requests)
    check_guided(done, requests)


def test_an_output_without_a_choice_needs_no_step(llama: Path, backend: LLGuidanceBackend) -> None:
    request = Request(0, np.array([1, 2]), SamplingParams(), backend.compile_choice(["only"]))
    with running(llama, guided=backend) as engine:
        done = finish(engine, [request])[0]
        assert engine.stats().steps == 0
    assert (bytes(done.tokens.tolist()), done.finish_reason, done.forced_tokens) == (b"only", FinishReason.STOP, 4)


def test_closing_gives_the_memory_back(llama: Path) -> None:
    """Also with a step in flight, and while somebody still holds the engine."""
    with running(llama) as engine:
        model, cache = weakref.ref(engine._runner.model), weakref.ref(engine._runner.caches.storage)
        engine.submit(make_requests([[1, 2, 3]], SamplingParams(max_tokens=50))[0])
        engine.step()
    assert model() is cache() is None
