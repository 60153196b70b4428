"""The doctor says what is wrong with a machine and what to do about it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline import doctor


def test_a_machine_that_runs_tests_can_run_a_job(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["doctor"])
    assert doctor.main() == 0
    out = capsys.readouterr().out
    assert "FAIL" not in out
    assert out.splitlines()[-1] == "this machine can run a job: python -m pipeline.run"


def test_what_is_missing_is_named_with_its_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.argv", ["doctor"])
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "pyarrow" else "1.0")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setenv("GRISTMILL_CACHE", str(tmp_path / "cache"))
    assert doctor.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("FAIL  pyarrow") and line.endswith("pip install pyarrow") for line in lines)
    assert any(line.startswith("FAIL  model cache") and "GRISTMILL_CACHE" in line for line in lines)
    assert lines[-1] == "this machine cannot run a job yet"
