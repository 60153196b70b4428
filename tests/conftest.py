"""What all tests share: which folders this machine can run, and how many examples the property tests draw."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

# Triton decides at import whether it compiles or interprets, so one process cannot do both: with a GPU the kernels are tested
# compiled (tests/gpu), without one interpreted (tests/kernels).
CUDA = torch.cuda.is_available()
collect_ignore = ["kernels"] if CUDA else ["gpu"]
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"      # here, since tests collected before the kernels' import Triton by transformers

if importlib.util.find_spec("hypothesis"):    # GPU machines need not have it: no test under tests/gpu uses it
    from hypothesis import settings

    # No deadline: two cores shared with other jobs pause for long. Fixed examples: a run can be repeated. Soak draws new ones.
    soak = os.environ.get("GRISTMILL_EXAMPLES")
    settings.register_profile("fixed", deadline=None, derandomize=True, database=None)
    settings.register_profile("soak", deadline=None, max_examples=int(soak or 1), print_blob=True)
    settings.load_profile("soak" if soak else "fixed")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN: an output that no program wrote shows. Warnings only, since cuBLAS's products, to compare with, are
    not among the deterministic ones. Random inputs are the same each time."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_report_header() -> str:
    if CUDA:
        return f"{torch.cuda.get_device_name()}: tests/kernels left out (make test runs them without the GPU)"
    return "no CUDA: tests/gpu left out"
