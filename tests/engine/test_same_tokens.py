"""jobs/bench/same_tokens.py: the tokens are the model's greedy ones, and the comparison says where and how two files part."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from models import reference_greedy, tiny_checkpoint

from jobs.bench.same_tokens import TOKENS, main


def write(out: Path, model: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> list[dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", ["same_tokens.py", "--model", str(model), "--out", str(out), *more])
    main()
    return json.loads(out.read_text())


def test_greedy_tokens_and_where_two_files_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    model, ours, other = tiny_checkpoint("llama", tmp_path), tmp_path / "ours.json", tmp_path / "other.json"
    rows = write(ours, model, monkeypatch, "--engine", '{"device": "cpu"}')
    assert len(rows) == 20
    assert [row["tokens"] for row in rows[:3]] == reference_greedy(model, [row["prompt"] for row in rows[:3]], TOKENS)

    changed = copy.deepcopy(rows)
    taken = rows[3]["tokens"][5]
    changed[3]["tokens"][5] = 303 - taken
    other.write_text(json.dumps(changed))
    monkeypatch.setattr(sys, "argv", ["same_tokens.py", "--compare", str(ours), str(other)])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[3] == f"prompt  3:  5 of {TOKENS}"
    assert lines[4].startswith(f"    {ours}: took {taken}; {taken}: {dict(rows[3]['logprobs'][5])[taken]:.4f}, {303 - taken}: ")
    assert json.loads(lines[-1]) == {"prompts": 20, "least": 5, "agree_16": 19}


def test_the_peer_is_given_the_same_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_checkpoint("llama", tmp_path)
    given: dict[str, Any] = {}

    class Peer:
        def __init__(self, **settings: Any) -> None:
            given.update(settings)

        def generate(self, prompts: list[dict[str, list[int]]], params: dict[str, Any], use_tqdm: bool) -> list[Any]:
            given["prompts"] = [prompt["prompt_token_ids"] for prompt in prompts]
            given.update(params)
            likely = [{7: SimpleNamespace(logprob=-0.5)}, {8: SimpleNamespace(logprob=-1.0)}]
            answer = SimpleNamespace(token_ids=[7, 8], logprobs=likely)
            return [SimpleNamespace(outputs=[answer]) for _ in prompts]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Peer, SamplingParams=dict))
    rows = write(tmp_path / "peer.json", model, monkeypatch, "--peer", "vllm", "--kw", '{"dtype": "float32"}')
    assert (given["model"], given["dtype"], given["temperature"], given["max_tokens"]) == (str(model), "float32", 0.0, TOKENS)
    assert given["prompts"] == [row["prompt"] for row in rows]
    assert (rows[0]["tokens"], rows[0]["logprobs"]) == ([7, 8], [[[7, -0.5]], [[8, -1.0]]])
