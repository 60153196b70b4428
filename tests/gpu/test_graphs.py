"""Decode steps replayed from CUDA graphs against the same steps launched one kernel at a time, float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import finish, make_requests, mixed_requests, random_prompts, running, tokens_of
from models import tiny_checkpoint

from engine import prefix_groups
from engine.prefix_groups import PrefixGroups
from engine.request import Request, SamplingParams

if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"), head_dim=64)


def compare(model: Path, make: Callable[[], list[Request]], **config: int) -> int:
    """Run the requests with graphs and without; returns how many steps were replayed."""
    results = []
    for graphs in (False, True):
        with running(model, device="cuda", kv_pages=2000, cuda_graphs=graphs, **config) as engine:
            results.append(finish(engine, make()))
            replayed = engine.stats().graph_steps
            assert graphs or replayed == 0
    assert tokens_of(results[0]) == tokens_of(results[1])
    for i, completion in results[0].items():
        launched, replays = ([entry.logprob for entry in c.logprobs or ()] for c in (completion, results[1][i]))
        assert launched == pytest.approx(replays, abs=1e-4)
    return replayed


def staggered(count: int) -> list[Request]:
    """Rows that end one after another, so that the batch shrinks through every size."""
    params = [SamplingParams(max_tokens=2 + i % 37, ignore_eos=True, temperature=0.5 * (i % 3), seed=i) for i in range(count)]
    return make_requests(random_prompts(count, seed=1, longest=30), params)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("count", [1, 9, 70, 150])
def test_batches_of_every_size(llama: Path, count: int, depth: int) -> None:
    assert compare(llama, lambda: staggered(count), max_rows=count, max_step_tokens=512, depth=depth) > 0


def test_penalties_logprobs_and_prefixes(llama: Path) -> None:
    """The extras change a graph's logits in place: the next replay must not see that."""
    assert compare(llama, lambda: mixed_requests(48), max_rows=48, max_step_tokens=512) > 20


def test_windows_and_soft_caps(tmp_path: Path) -> None:
    model = tiny_checkpoint("gemma3", tmp_path, head_dim=64, attn_logit_softcapping=8.0, final_logit_softcapping=5.0)
    assert compare(model, lambda: mixed_requests(12), max_rows=16) > 10


def test_prompts_that_arrive_between_replays(llama: Path) -> None:
    """Steps with a prompt in them and without, in turn: all but the first of each shape are replayed."""
    results = []
    for graphs in (False, True):
        coming, done = mixed_requests(24), {}
        with running(llama, device="cuda", kv_pages=600, cuda_graphs=graphs, max_rows=24) as engine:
            while coming or engine.pending:
                if coming:
                    engine.submit(coming.pop())
                for _ in range(3):
                    done |= {c.id: c for c in engine.step()}
                engine.check_integrity()
            stats = engine.stats()
        results.append(tokens_of(done))
    assert results[0] == results[1]
    assert 0.6 * stats.steps < stats.graph_steps <= stats.steps


def test_long_contexts_in_graphs_of_short_ones(llama: Path) -> None:
    """A graph is captured before any row is long: nothing of a context's length may be baked into it."""
    prompts = random_prompts(6, seed=2, shortest=350, longest=400)
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    assert compare(llama, lambda: make_requests(prompts, params), max_model_len=512, max_step_tokens=600) > 90


def test_rows_that_read_their_prefix_together(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty-eight rows of one prefix in groups, launched and replayed, against rows that share nothing."""
    monkeypatch.setattr(prefix_groups, "EVERY", 1)
    monkeypatch.setattr(prefix_groups, "MIN_BYTES", 0)
    arrange, grouped = PrefixGroups.arrange, []

    def watched(self: PrefixGroups, *args: Any) -> Any:
        result = arrange(self, *args)
        grouped.append(result[1] is not None)
        return result

    monkeypatch.setattr(PrefixGroups, "arrange", watched)
    results, large = [], {"kv_pages": 3000, "max_rows": 96, "max_step_tokens": 1024, "max_model_len": 512}
    for config in ({"prefix_sharing": False, "cuda_graphs": False}, {"cuda_graphs": False}, {"cuda_graphs": True}):
        grouped.clear()
        with running(llama, device="cuda", **large | config) as engine:
            results.append(tokens_of(finish(engine, mixed_requests(96, shared=150))))
        assert sum(grouped) > 10 or not config.get("prefix_sharing", True)
    assert results[0] == results[1] == results[2]
