"""Steps that fail: out of memory, on one row, and whichever row runs. All other rows give the tokens they would have given."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_cases import finish, make_requests, mixed_requests, random_prompts, running, tokens_of
from models import TURN_END, VOCAB, tiny_checkpoint, tiny_tokenizer

from engine import recovery
from engine.engine import Engine
from engine.guided.llg import LLGrammar, LLGuidanceBackend, LLGuide
from engine.plan import StepPlan
from engine.request import EngineError, FinishReason, Request, SamplingParams
from engine.runner import Runner
from engine.stop_strings import StopStrings


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@dataclass
class Work:
    """Free rows and guided ones, by an automaton and by a guide, and what they give undisturbed."""

    model: Path
    backend: LLGuidanceBackend
    requests: list[Request]
    want: dict[Hashable, list[int]]

    def running(self, **config: int) -> AbstractContextManager[Engine]:
        return running(self.model, guided=self.backend, **config)


@pytest.fixture(scope="module")
def work(llama: Path) -> Work:
    backend = LLGuidanceBackend(tiny_tokenizer(), VOCAB, [TURN_END])
    schemas = ({"enum": ["billing", "delivery"]}, {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]})
    grammars = [backend.compile_schema(schema) for schema in schemas]
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=7)
    guided = [Request(20 + i, np.array(prompt), params, grammars[i % 2])
              for i, prompt in enumerate(random_prompts(6, seed=4, longest=60, shared=50))]
    work = Work(llama, backend, [*mixed_requests(), *guided], {})
    with work.running() as engine:
        work.want = tokens_of(finish(engine, work.requests))
    return work


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """`fail(part, when, error)`: launch_forward or launch_sample raises where `when(plan)` says so, half of its work done."""

    def install(part: str, when: Callable[[StepPlan], bool], error: Callable[[], Exception]) -> list[int]:
        launch, sizes = getattr(Runner, part), []

        def failing(runner: Runner, first: object, *rest: object) -> object:
            plan = first if isinstance(first, StepPlan) else first.plan
            if when(plan):
                sizes.append(plan.rows.size)
                if part == "launch_forward":     # garbage where the step would have written
                    for cache in runner.caches.layers:
                        for row in plan.rows.tolist():
                            for stored in (cache.k, cache.v):
                                stored[runner.table.block_table[row].long()] = float("nan")
                raise error()
            return launch(runner, first, *rest)

        monkeypatch.setattr(Runner, part, failing)
        return sizes

    return install


def out_of_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of ...")


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("part", ["launch_forward", "launch_sample"])
def test_out_of_memory_lowers_the_rows_and_goes_on(work: Work, fail: Callable, part: str, depth: int) -> None:
    sizes = fail(part, lambda plan: plan.rows.size > 3, out_of_memory)
    with work.running(depth=depth) as engine:
        done = finish(engine, work.requests)
        assert tokens_of(done) == work.want
        assert {c.error for c in done.values()} == {None}
        assert engine.stats().running == 0
    assert 1 <= len(sizes) <= 2, "it does not try again and again what did not fit"


def test_out_of_memory_lowers_the_tokens_of_a_step(llama: Path, monkeypatch: pytest.MonkeyPatch, fail: Callable) -> None:
    monkeypatch.setattr(recovery, "MIN_STEP_TOKENS", 16)
    requests = make_requests(random_prompts(3, seed=2, shortest=90, longest=99), SamplingParams(max_tokens=5, ignore_eos=True))
    with running(llama) as engine:
        want = tokens_of(finish(engine, requests))
    sizes = fail("launch_forward", lambda plan: plan.num_tokens > 20, out_of_memory)
    with running(llama) as engine:
        assert tokens_of(finish(engine, requests)) == want
    assert len(sizes) == 2      # 64 tokens, 32, 16


def test_out_of_memory_while_a_row_at_fault_is_searched_costs_no_rows_for_good(
        work: Work, monkeypatch: pytest.MonkeyPatch, fail: Callable) -> None:
    monkeypatch.setattr(recovery, "MIN_STEP_TOKENS", 16)
    errors = [out_of_memory(), RuntimeError("once")]            # of a step of all rows, and of the next one
    fail("launch_sample", lambda plan: len(errors) == 1 or (len(errors) == 2 and plan.rows.size == 8), errors.pop)
    with work.running() as engine:
        assert tokens_of(finish(engine, work.requests)) == work.want
        assert engine._scheduler.row_limit == 8
    assert not errors


def test_out_of_memory_with_nothing_left_to_lower_ends_the_engine(llama: Path, fail: Callable) -> None:
    fail("launch_forward", lambda plan: True, out_of_memory)
    with running(llama) as engine:
        for request in mixed_requests():
            engine.submit(request)
        with pytest.raises(EngineError, match=r"out of memory in a step of 1 row .* lower engine.gpu_memory") as error:
            step_until_done(engine)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("part", ["launch_forward", "launch_sample"])
def test_a_row_that_fails_the_step_ends_alone(work: Work, fail: Callable, part: str, depth: int) -> None:
    """Row 5 does it each time it is in a step, however many others are."""
    with work.running(depth=depth) as engine:
        live = engine._scheduler.live
        sizes = fail(part, lambda plan: any(live[row].waiting.request.id == 5 for row in plan.rows.tolist() if row in live),
                     lambda: RuntimeError("grammar\npanic"))
        done = finish(engine, work.requests)
        assert engine._scheduler.row_limit == 8
    assert done[5].finish_reason is FinishReason.ERROR
    assert done[5].error == "the engine failed on this row alone (RuntimeError: grammar panic)"
    assert {i: row for i, row in tokens_of(done).items() if i != 5} == {i: row for i, row in work.want.items() if i != 5}
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 1


def test_a_failure_that_does_not_come_again_costs_no_row(work: Work, fail: Callable) -> None:
    once = iter([True])
    fail("launch_sample", lambda plan: plan.rows.size == 8 and next(once, False), lambda: RuntimeError("once"))
    with work.running() as engine:
        done = finish(engine, work.requests)
        assert tokens_of(done) == work.want
        assert engine._scheduler.row_limit == 8
    assert {c.error for c in done.values()} == {None}


def test_steps_that_always_fail_end_the_engine(llama: Path, monkeypatch: pytest.MonkeyPatch, fail: Callable) -> None:
    monkeypatch.setattr(recovery, "MOST_BLAMED", 4)
    fail("launch_forward", lambda plan: True, lambda: RuntimeError("a bug"))
    with running(llama) as engine:
        for request in mixed_requests():
            engine.submit(request)
        with pytest.raises(EngineError, match=r"steps fail whichever row runs \(RuntimeError: a bug\)"):
            step_until_done(engine)


@pytest.mark.parametrize("owner, part, failing", [
    (LLGrammar, "start", "guided"), (LLGuide, "accept", "guided"), (LLGuide, "forced", "guided"), (LLGrammar, "close", "guided"),
    (StopStrings, "find", "stop"),
])
def test_a_grammar_or_stop_string_that_fails_ends_its_row_alone(work: Work, monkeypatch: pytest.MonkeyPatch, owner: type,
                                                                part: str, failing: str) -> None:
    grammar = work.backend.compile_schema({"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]})
    grammar.automaton = None
    requests = mixed_requests(6)
    requests += [Request(f"guided {i}", np.array([5] * 40 + [i]), SamplingParams(max_tokens=12, temperature=1.0, seed=i), grammar)
                 for i in range(2)]
    requests += [Request(f"stop {i}", np.array([5] * 40 + [i]), SamplingParams(max_tokens=12, ignore_eos=True, stop=("never",)))
                 for i in range(2)]
    with running(work.model, guided=work.backend, tokenizer=tiny_tokenizer()) as engine:
        want = tokens_of(finish(engine, requests))

    def fail(*_: object) -> None:
        raise RuntimeError("no\nidea")

    monkeypatch.setattr(owner, part, fail)
    with running(work.model, guided=work.backend, tokenizer=tiny_tokenizer()) as engine:
        done = finish(engine, requests)
    failed = {name for name, completion in done.items() if completion.finish_reason is FinishReason.ERROR}
    assert failed == {f"{failing} 0", f"{failing} 1"}
    assert {done[name].error for name in failed} == {"the engine failed on this row alone (RuntimeError: no idea)"}
    assert {name: row for name, row in tokens_of(done).items() if name not in failed} == {
        name: row for name, row in want.items() if name not in failed}


def step_until_done(engine: Engine) -> None:
    while engine.pending:
        engine.step()
