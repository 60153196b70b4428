"""The row table's kernels, interpreted and in torch, against plain loops."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from kernel_cases import check_apply_writes, check_commit, check_expand

from kernels import ref, step

pytestmark = pytest.mark.parametrize("kernels", [step, ref])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1, 2, 3], [16384, 1, 1023, 1024, 1025, 8], [5000] * 3, []])
def test_apply_writes(kernels, lengths):
    check_apply_writes(kernels, "cpu", lengths)


@pytest.mark.parametrize("n", [1, 3, 128, 200])
def test_expand_decode(kernels, n):
    check_expand(kernels, "cpu", [1] * n, 1)


@pytest.mark.parametrize("counts", [[7], [1, 300, 17, 1], [1, 5000, 1024, 2], [16, 32, 48]])
def test_expand(kernels, counts):
    check_expand(kernels, "cpu", counts, max(counts))


@pytest.mark.parametrize("n", [1, 5, 200])
def test_commit(kernels, n):
    check_commit(kernels, "cpu", n)
