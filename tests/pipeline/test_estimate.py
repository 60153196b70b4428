"""The estimate of a job's time against what was measured (jobs/bench/RESULTS.md), and what it makes of shared prefixes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.estimate import Device, ModelSize, Workload, fresh_tokens, seconds, this_device
from pipeline.exits import ConfigError

H200 = Device("H200", 690e12, 4.41e12, 130e9, 0.0012, 2, 2048)
MISTRAL = ModelSize(7_110_000_000, 14_500_000_000, 2 * 32 * 8 * 128)
SMOLLM2 = ModelSize(134_000_000, 269_000_000, 2 * 30 * 3 * 64)


@pytest.mark.parametrize("size, work, measured", [
    (MISTRAL, Workload(1024, 562, 562, 562), 1024 * 562 / 10_760),      # W1
    (MISTRAL, Workload(50, 128, 128, 256), 50 * 256 / 8_450),           # W2
    (MISTRAL, Workload(2048, 950, 150, 60), 2048 * 60 / 9_085),         # W3
    (MISTRAL, Workload(1, 128, 128, 512), 512 / 224),                   # W5
    (SMOLLM2, Workload(1024, 562, 562, 562), 1024 * 562 / 117_412),     # W1
    (SMOLLM2, Workload(2048, 950, 150, 60), 2048 * 60 / 153_000),       # W3
    (SMOLLM2, Workload(512, 2048, 2048, 128), 512 * 128 / 31_660),      # W4
    (SMOLLM2, Workload(1, 128, 128, 512), 512 / 1_007),                 # W5
])
def test_the_estimate_is_near_what_was_measured(size: ModelSize, work: Workload, measured: float) -> None:
    guess = seconds(size, H200, work)
    print(f"{guess:.2f} s, measured {measured:.2f} s")
    assert 0.6 < guess / measured < 1.7


def test_a_prefix_is_counted_once() -> None:
    stem = list(range(100))
    prompts = [np.array([*stem, *own], dtype=np.int32) for own in ([1, 2, 3], [1, 2, 4, 5], [9])]
    assert fresh_tokens(prompts) == 103 + 2 + 1
    assert fresh_tokens(prompts[:1] * 5) == 103 + 4


def test_a_device_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"^engine\.device=cuda: torch sees no such device here; .* set engine\.device=cpu$"):
        this_device("cuda", None)
