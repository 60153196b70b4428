"""The row table's kernels, compiled, against plain loops, and in a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import check_apply_writes, check_commit, check_expand

if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)

from kernels import ref, step


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("lengths", [[1], [1] * 3000, [16384, 1, 1023, 1024, 1025, 8] * 5, []])
def test_apply_writes(lengths):
    check_apply_writes(step, "cuda", lengths)


@pytest.mark.parametrize("n", [1, 128, 2048])
def test_expand_decode(n):
    check_expand(step, "cuda", [1] * n, 1)


@pytest.mark.parametrize("counts", [[7], [1, 300, 17, 1], [1, 9000, 1024, 2], [3] * 1000])
def test_expand(counts):
    check_expand(step, "cuda", counts, max(counts), page=32)


@pytest.mark.parametrize("n", [1, 130, 2048])
def test_commit(n):
    check_commit(step, "cuda", n)


def test_a_graph_replays_with_what_the_table_holds_then():
    n = 64
    state = torch.zeros(4, n, dtype=torch.int32, device="cuda")
    rows, starts, sampled, out = state.unbind()
    rows.copy_(torch.arange(n))
    cu_q = torch.arange(n + 1, dtype=torch.int32, device="cuda")
    tokens = torch.randint(0, 1000, (n, 200), dtype=torch.int32, device="cuda")
    table = torch.randint(0, 1000, (n, 7), dtype=torch.int32, device="cuda")
    outputs = torch.empty(3, n, dtype=torch.int32, device="cuda")

    def launch() -> None:
        step.expand(tokens, table, rows, starts, cu_q, 1, 32, *outputs.unbind())
        step.commit(tokens, rows, starts, sampled, out)

    launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    starts.copy_(torch.randint(0, 190, (n,)))
    sampled.copy_(torch.randint(0, 1000, (n,)))
    want_tokens, want_outputs = tokens.clone(), torch.empty_like(outputs)
    ref.expand(want_tokens, table, rows, starts, cu_q, 1, 32, *want_outputs.unbind())
    ref.commit(want_tokens, rows, starts, sampled, torch.empty_like(out))
    graph.replay()
    assert torch.equal(outputs, want_outputs)
    assert torch.equal(tokens, want_tokens)
    assert torch.equal(out, sampled)
