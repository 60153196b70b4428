"""Runs of the real pipeline on a scripted engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.run import HOME, main
from pipeline.signals import SIGNALS
from tests.pipeline.scripted_engine import ScriptedEngine, ScriptedModel


@dataclass
class Ran:
    """One run: exit code, what it printed, and the engines it loaded."""

    code: int
    out: str
    err: str
    folder: Path
    engines: list[ScriptedEngine] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """The output's rows, in the order of the parts."""
        return pa.concat_tables(pq.read_table(part) for part in sorted(self.folder.glob("part-*.parquet"))).to_pylist()

    @property
    def line(self) -> str:
        """The one line of a refused run."""
        lines = self.err.strip().splitlines()
        assert lines, "nothing was printed"
        assert lines[-1].startswith("error: "), self.err
        assert "Traceback" not in self.err
        return lines[-1].removeprefix("error: ")


Run = Callable[..., Ran]


def scripted(*words: str, **env: str) -> subprocess.Popen[str]:
    """The same as a process of its own."""
    command = [sys.executable, "-m", "tests.pipeline.scripted_run", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=HOME, text=True, stdout=pipe, stderr=pipe, env={**os.environ, **env})


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """`run("data=...", ..., out="name", turns=2)`: words of the command line, and the engine's script."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}

    def go(*words: str, out: str = "out", **script: Any) -> Ran:
        engines: list[ScriptedEngine] = []

        class Model(ScriptedModel):
            def load(self, progress: Callable[[str], None]) -> ScriptedEngine:
                engine = super().load(progress)
                engine.keep = True
                engines.append(engine)
                return engine

        capsys.readouterr()
        code = main([*words, f"output.dir={tmp_path / out}"], lambda config: Model(config, **script))
        printed = capsys.readouterr()
        return Ran(code, printed.out, printed.err, tmp_path / out, engines)

    yield go
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., str]:
    """`table(prompt=[...], id=[...])`: the path of a new Parquet file."""
    count = 0

    def write(_rows: int | None = None, row_group_size: int | None = None, **columns: Any) -> str:
        nonlocal count
        count += 1
        path = tmp_path / f"in{count}.parquet"
        pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
        return str(path)

    return write
