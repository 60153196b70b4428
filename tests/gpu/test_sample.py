"""The sampling kernels, compiled, against a float64 sampler that sorts; frequencies on many draws; in a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    check_automaton,
    check_batch_invariance,
    check_mask,
    check_noise,
    check_sample,
    chi_square_holds,
    kept64,
    sampling_table,
)

if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)

from kernels import automaton, ref, sample

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, width", [(1, 300), (45, 32000), (300, 5000), (150, 49152), (30, 151936), (4, 262144)])
def test_every_setting(dtype, n, width):
    check_sample(sample, torch.empty(0, dtype=dtype, device="cuda"), n, width)


@pytest.mark.parametrize("spread", [0.02, 100.0])
def test_flat_and_steep_logits(spread):
    check_sample(sample, torch.empty(0, device="cuda"), 150, 20000, spread)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("setting", [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (1.0, 3, 0.5, 0.1), (1e-5, 7, 0.9, 0.0)])
@pytest.mark.parametrize("value", ["-inf", "nan", "least", "inf", "0"])
def test_a_row_of_one_value_gives_a_valid_token_or_none(dtype, setting, value):
    number = torch.finfo(dtype).min if value == "least" else float(value)
    logits = torch.full((200, 700), number, dtype=dtype, device="cuda")
    table, rows = sampling_table([setting], [1]).cuda(), torch.zeros(200, dtype=torch.int32, device="cuda")
    tokens = sample.sample(logits, table, rows, torch.arange(200, dtype=torch.int32, device="cuda"))
    if value in ("-inf", "nan"):
        assert bool((tokens == -1).all())
    else:
        assert bool(((tokens >= 0) & (tokens < 700)).all())


def test_neighbours_do_not_matter():
    for n in (20, 2048):
        check_batch_invariance(sample, torch.empty(0, dtype=torch.bfloat16, device="cuda"), n, 50000)


def test_noise_is_the_twins():
    check_noise("cuda", 100000)


@pytest.mark.parametrize("setting", [(1.0, 0, 1.0, 0.0), (0.5, 0, 1.0, 0.0), (2.0, 50, 1.0, 0.0), (1.0, 0, 0.9, 0.0),
                                     (1.5, 200, 0.9, 0.001)])
def test_frequencies_follow_the_filtered_softmax(setting):
    temperature, top_k, top_p, min_p = setting
    n, width = 200000, 1000
    logits = torch.randn(width) * 2
    table = sampling_table([setting], [42]).cuda()
    rows = torch.zeros(n, dtype=torch.int32, device="cuda")
    tokens = sample.sample(logits.cuda().expand(n, -1), table, rows, torch.arange(n, dtype=torch.int32, device="cuda"))
    x = logits.double() / temperature
    probs = torch.softmax(x.masked_fill(~kept64(x, top_k, top_p, min_p), ref.NEG_INF), 0)
    assert chi_square_holds(torch.bincount(tokens.cpu().long(), minlength=width), probs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, width, words", [(1, 300, 10), (2048, 32000, 1000), (300, 151936, 4748), (4, 300, 7), (3, 100, 9)])
def test_mask(dtype, n, width, words):
    check_mask(sample, torch.empty(0, dtype=dtype, device="cuda"), n, width, words)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, width", [(1, 300), (2048, 32000), (300, 151936), (130, 5001)])
def test_automaton(dtype, n, width):
    check_automaton(automaton, torch.empty(0, dtype=dtype, device="cuda"), n, width)


def test_a_graph_replays_with_the_parameters_of_then():
    n, width = 40, 5000
    logits = torch.randn(n, width, device="cuda")
    table = sampling_table([(0.0, 0, 1.0, 0.0)] * n, list(range(n))).cuda()
    rows, positions = torch.arange(n, dtype=torch.int32, device="cuda"), torch.zeros(n, dtype=torch.int32, device="cuda")
    sample.sample(logits, table, rows, positions)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = sample.sample(logits, table, rows, positions)
    table.copy_(sampling_table([(1.0, 30, 0.9, 0.0)] * n, list(range(n))))
    positions.fill_(17)
    graph.replay()
    assert torch.equal(tokens, sample.sample(logits, table, rows, positions))
    assert tokens.tolist() != logits.argmax(-1).tolist()
