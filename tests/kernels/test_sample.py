"""The sampling kernels, interpreted, and their torch twins, against a float64 sampler that sorts."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from kernel_cases import check_automaton, check_batch_invariance, check_mask, check_noise, check_sample, sampling_table

from kernels import automaton, ref, sample

both = pytest.mark.parametrize("kernels", [sample, ref])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["few rows", "many rows"])
def size_of_programs(request, monkeypatch):
    if request.param == "many rows":
        monkeypatch.setattr(sample, "FEW_ROWS", 0)


@both
@pytest.mark.usefixtures("size_of_programs")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n, width", [(1, 300), (15, 1000), (15, 20000)])
def test_every_setting(kernels, dtype, n, width):
    check_sample(kernels, torch.empty(0, dtype=dtype), n, width)


@both
def test_flat_logits(kernels):
    check_sample(kernels, torch.empty(0), 15, 5000, spread=0.02)


@both
def test_steep_logits(kernels):
    check_sample(kernels, torch.empty(0), 15, 5000, spread=100.0)


@both
def test_first_of_equal_logits(kernels):
    logits = torch.zeros(2, 20000)
    logits[0, [17, 18, 19000]] = 3.0
    table = sampling_table([(0.0, 0, 1.0, 0.0)], [0])
    rows = torch.zeros(2, dtype=torch.int32)
    assert kernels.sample(logits, table, rows, rows).tolist() == [17, 0]


@both
@pytest.mark.parametrize("setting", [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (1.0, 3, 0.5, 0.1), (1e-5, 7, 0.9, 0.0)])
@pytest.mark.parametrize("value", [float("-inf"), float("nan"), torch.finfo(torch.float32).min, float("inf"), 0.0, -0.0])
def test_a_row_of_one_value_gives_a_valid_token_or_none(kernels, setting, value):
    logits = torch.full((3, 700), value)
    table, rows = sampling_table([setting], [1]), torch.zeros(3, dtype=torch.int32)
    tokens = kernels.sample(logits, table, rows, torch.arange(3, dtype=torch.int32))
    if value > float("-inf"):
        assert bool(((tokens >= 0) & (tokens < 700)).all())
    else:
        assert tokens.tolist() == [-1, -1, -1]


@both
@pytest.mark.parametrize("setting", [(1.0, 3, 0.5, 0.0), (1e-5, 0, 0.9, 0.0)])
def test_draws_end_whatever_the_logits(kernels, setting):
    least = torch.finfo(torch.float32).min
    logits = torch.linspace(least, least / 2, 500).expand(4, -1).clone()
    logits[1, 77] = float("inf")
    logits[2, 77] = 0.0
    table, rows = sampling_table([setting], [1]), torch.zeros(4, dtype=torch.int32)
    tokens = kernels.sample(logits, table, rows, torch.arange(4, dtype=torch.int32))
    assert tokens[1:3].tolist() == [77, 77]
    assert bool(((tokens >= 0) & (tokens < 500)).all())


@both
def test_neighbours_do_not_matter(kernels, monkeypatch):
    check_batch_invariance(kernels, torch.empty(0), 20, 300)
    monkeypatch.setattr(sample, "FEW_ROWS", 10)     # alone and in the batch: programs of different sizes
    check_batch_invariance(kernels, torch.empty(0), 20, 9000)


def test_noise_is_the_twins():
    check_noise("cpu", 3000)


@both
@pytest.mark.parametrize("n, width, words", [(1, 300, 10), (5, 320, 10), (6, 5000, 157), (4, 300, 7), (3, 100, 9)])
def test_mask(kernels, n, width, words):
    check_mask(kernels, torch.empty(0), n, width, words)


@pytest.mark.parametrize("kernels", [automaton, ref])
@pytest.mark.parametrize("n, width", [(1, 300), (5, 320), (7, 5001), (200, 40)])
def test_automaton(kernels, n, width):
    check_automaton(kernels, torch.empty(0), n, width)
