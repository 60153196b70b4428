"""Weights that are stored quantised must be refused, never run as if they were plain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from models import tiny_checkpoint

from engine.config import EngineConfig
from engine.engine import Engine
from engine.weights import open_checkpoint


@pytest.mark.parametrize("method", ["awq", "gptq", "fp8"])
def test_quantised_weights_are_refused(tmp_path: Path, method: str) -> None:
    folder = tiny_checkpoint("llama", tmp_path, seed=0)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(ValueError, match=rf"quantised \({method}\), which is not supported"):
        Engine(open_checkpoint(folder), EngineConfig(device="cpu"))
