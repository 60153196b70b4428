"""Steps with several queries a row, padded to the shapes of graphs; on the CPU, where a graph is launched like all else."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import finish, mixed_requests, running, tokens_of
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_checkpoint

from engine import mixed_steps, prefix_groups
from engine.cuda_graphs import CudaGraphs, graph_sizes
from engine.mixed_steps import Shape, Shapes, tiles_of
from engine.row_table import most_rest
from engine.runner import Graphs
from kernels import ops


def often(shapes: Shapes, exact: Shape, captured: Collection[Shape]) -> Shape | None:
    """What a step is run in by the time that a graph of its shape is worth it."""
    for _ in range(mixed_steps.WORTH):
        shape = shapes.of(exact, captured)
    return shape


@st.composite
def steps(draw: st.DrawFn) -> tuple[Shape, int, int, int]:
    """A step that a scheduler may plan, and its limits: rows, positions of a row, tokens."""
    max_rows, max_len = draw(st.integers(1, 300)), draw(st.integers(16, 400))
    max_step_tokens = max(max_rows, draw(st.integers(16, 2000)))
    decode = draw(st.integers(0, max_rows - 1))
    most = max_step_tokens - decode
    rows = max_rows - decode
    counts = draw(st.lists(st.integers(1, min(max_len, most)), min_size=1, max_size=rows)
                  | st.integers(1, rows).map(lambda n: [1] * n))
    kept = np.array(counts)[np.cumsum(counts) <= most]
    kept = kept if kept.size else np.array([most])
    return (Shape(decode, kept.size, int(kept.sum()), tiles_of(kept).shape[0], draw(st.booleans())), max_rows, max_len,
            max_step_tokens)


@given(case=steps(), flops=st.integers(1, 10**12), data=st.data())
def test_a_shape_holds_the_step(case: tuple[Shape, int, int, int], flops: int, data: st.DataObject) -> None:
    """With room for the dummy rows that fill it up, within the arrays of the row table."""
    exact, max_rows, max_len, max_step_tokens = case
    shapes = Shapes(flops, max_rows, max_len, max_step_tokens)
    captured: set[Shape] = set()
    for more in (0, *data.draw(st.lists(st.integers(0, 300), max_size=4))):
        larger = exact._replace(tokens=min(exact.tokens + more, max_step_tokens - exact.decode))
        shape = often(shapes, larger, captured)
        if shape is None:
            assert (larger.decode + larger.tokens) * flops > mixed_steps.HIDDEN_FLOPS * 0.99
            continue
        captured.add(shape)
        assert shape.decode >= exact.decode and shape.tokens >= larger.tokens and shape.tiles >= exact.tiles
        assert shape.decode <= max_rows and shape.tokens <= max_step_tokens and shape.sharing == exact.sharing
        assert shape.rest >= exact.rest + -(-(shape.tokens - larger.tokens) // max_len)
        most_rows, most_tiles = most_rest(max_step_tokens, max_rows, max_len)
        assert shape.rest <= most_rows and shape.tiles <= most_tiles


def test_a_captured_shape_serves_steps_that_are_not_much_smaller() -> None:
    shapes = Shapes(1, 2048, 4096, 16384)
    step = Shape(300, 20, 2000, 40, False)
    assert shapes.of(step, ()) is None          # not worth it yet
    shape = often(shapes, step, ())
    assert shape == Shape(512, 2048 + 1, 2048, 64, False)
    assert shapes.of(Shape(400, 40, 1700, 60, False), {shape}) == shape
    assert often(shapes, Shape(400, 40, 700, 60, False), {shape}) != shape
    assert often(shapes, step._replace(sharing=True), {shape}) == shape._replace(sharing=True)
    assert often(Shapes(10**12, 2048, 4096, 16384), step, {shape}) is None


@pytest.mark.parametrize("max_rows, most", [(2048, 16384), (1000, 16384), (48, 8192), (2048, 2600)])
def test_full_shapes_serve_every_step_of_the_most_tokens(max_rows: int, most: int) -> None:
    shapes = Shapes(1, max_rows, 4096, most)
    captured = shapes.full(False)
    assert all(s.decode + s.tokens <= mixed_steps.SPARE * most for s in captured), "those would serve no step"
    for decode in range(0, min(max_rows, most - mixed_steps.SHORT), 7):
        rows = min(max_rows - decode, (most - decode) // mixed_steps.SHORT)
        counts = np.full(rows, (most - decode) // rows)
        counts[0] += most - decode - counts.sum()
        step = Shape(decode, rows, most - decode, tiles_of(counts).shape[0], False)
        assert shapes.of(step, captured) in captured, step
    assert not Shapes(10**12, max_rows, 4096, most).full(False)      # steps of a model so large hide their launches


class LaunchedGraphs:
    """CudaGraphs without CUDA: what is captured is launched once more."""

    def __init__(self, launch: Callable[[Any], Any]) -> None:
        self._launch = launch
        self.captured: set[Any] = set()
        self.replays = 0

    def replay(self, key: Any) -> Any:
        self.replays += 1
        return self._launch(key)

    def launch_and_capture(self, key: Any) -> Any:
        self.captured.add(key)
        return self._launch(key)


@pytest.mark.parametrize("ends", [True, False])
def test_a_step_is_none_the_worse_for_a_graph_that_finds_no_memory(
    ends: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried: list[int] = []

    def capture(graphs: CudaGraphs[int], key: int) -> None:
        tried.append(key)
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            if not ends:
                raise RuntimeError("the capture cannot be ended")

    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(CudaGraphs, "_capture", capture)
    graphs = CudaGraphs(lambda n: torch.full((n,), n), None)
    assert [graphs.launch_and_capture(n).tolist() for n in (2, 1)] == [[2, 2], [1]]
    assert tried == [2] and not graphs.captured
    assert len(caplog.records) == 1 and "engine.gpu_memory" in caplog.text


def run_padded(model: Path, rows: int, requests: int, shared: int) -> tuple[dict[str, LaunchedGraphs], float]:
    """Steps padded to shapes give the tokens of steps as they are: (what was launched, the share of steps that had a graph)."""
    results = []
    for pad in (False, True):
        with running(model, max_rows=rows, max_step_tokens=64) as engine:
            runner = engine._runner
            if pad:
                launched = {name: LaunchedGraphs(call) for name, call in {
                    "plain": partial(runner._decode, sharing=False), "shared": partial(runner._decode, sharing=True),
                    "mixed": runner._forward_mixed, "sample": runner._sample_and_commit}.items()}
                runner._logits = runner.model.logits(runner._last)
                runner._graphs = Graphs(graph_sizes(rows), Shapes(1, rows, 256, 64), **launched)
            results.append(tokens_of(finish(engine, mixed_requests(requests, shared=shared))))
            share = engine.stats().graph_steps / engine.stats().steps
    assert results[0] == results[1]
    return launched, share


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("shared", [0, 40])
def test_padding_changes_no_token(tmp_path: Path, family: str, shared: int) -> None:
    """Penalties, log-probabilities, prefixes, windows, chunks of prompts: padded to shapes, and as they are."""
    launched, share = run_padded(tiny_checkpoint(family, tmp_path), 12, 24, shared)
    assert launched["mixed"].captured
    assert share > 0.8


def test_padding_changes_no_token_of_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows enough to share a prefix in decode steps."""
    monkeypatch.setattr(prefix_groups, "MIN_BYTES", 0)
    monkeypatch.setattr(prefix_groups, "MIN_TOKENS", 1)
    monkeypatch.setattr(prefix_groups, "EVERY", 1)
    launched, _ = run_padded(tiny_checkpoint("llama", tmp_path), 40, 46, 40)
    assert launched["mixed"].captured and launched["shared"].replays


def test_tiles_cover_every_query_once() -> None:
    counts = np.array([1, ops.QUERY_TILE, ops.QUERY_TILE + 1, 3 * ops.QUERY_TILE])
    assert tiles_of(counts).tolist() == [[0, 0], [1, 0], [2, 0], [2, ops.QUERY_TILE],
                                         *([3, at * ops.QUERY_TILE] for at in range(3))]
