"""Jobs that tests start, strike and start again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from output_cases import contents

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = '{"type": "object", "properties": {"label": {"enum": ["a", "b", "c"]}, "sure": {"type": "boolean"}}}'


class Zygote:
    """See zygote.py."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)

    def ask(self, **order: Any) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


@dataclass
class Run:
    """One process of a job."""

    zygote: Zygote
    pid: int

    def wait(self) -> int:
        """The exit code, negative for a signal."""
        return self.zygote.ask(wait=self.pid)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait_until_stopped(self) -> None:
        """Until a strike of SIGSTOP has stopped it."""
        deadline = time.monotonic() + 60
        while Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline
            time.sleep(0.01)


@dataclass
class Job:
    """A small job: a folder for its input and the log of its runs, another (or `url`) for its output. `keys`: what it is told."""

    zygote: Zygote
    folder: Path
    out: Path
    keys: list[str] = field(default_factory=list)
    url: str = ""
    env: dict[str, str] = field(default_factory=dict)

    def start(self, *keys: str, **order: Any) -> Run:
        given = ["data={input}", "output.dir={output}", "task=generate", "task.prompt={{ text }}", f"task.schema={SCHEMA}"]
        places = {"input": str(self.folder / "in"), "output": self.url or str(self.out), "log": str(self.folder / "log")}
        order["env"] = {**self.env, **order.get("env", {})}
        return Run(self.zygote, self.zygote.ask(keys=[*given, *self.keys, *keys], **places, **order))

    def run(self, *keys: str, **order: Any) -> int:
        return self.start(*keys, **order).wait()

    def said(self) -> str:
        log = self.folder / "log"
        return log.read_text() if log.exists() else ""

    def parts(self) -> list[Path]:
        return sorted(self.out.glob("part-*.parquet"))


def make_job(zygote: Zygote, folder: Path, out: Path | None = None, rows: int = 100, rows_per_shard: int = 30) -> Job:
    """Two files, cut into shards of at most `rows_per_shard`."""
    write_rows(folder / "in" / "a.parquet", 0, rows // 2)
    write_rows(folder / "in" / "b.parquet", rows // 2, rows - rows // 2)
    return Job(zygote, folder, out or folder / "out", [f"plan.rows_per_shard={rows_per_shard}"])


def write_rows(path: Path, first: int, rows: int) -> None:
    """Prompts of all sorts: some are null, some fail, some are equal."""
    texts = [f"prompt {row}" if row % 10 else "a prompt that comes often" for row in range(first, first + rows)]
    texts = [None if row % 23 == 0 else f"FAIL {row}" if row % 31 == 0 else text for row, text in enumerate(texts, first)]
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"text": pa.array(texts, pa.large_string()), "row": range(first, first + rows)})
    pq.write_table(table, path, row_group_size=max(rows // 4, 1))


def assert_readable(job: Job) -> None:
    """What a Parquet reader takes for a part is whole at any time."""
    for path in job.parts():
        pq.read_table(path)


def assert_same(job: Job, whole: Job) -> None:
    """The parts are those of an undisturbed run, byte for byte but for the attempt, and nothing is left over."""
    assert sorted(path.name for path in job.out.iterdir()) == sorted(path.name for path in whole.out.iterdir())
    assert list((job.out / "_work").iterdir()) == []
    for path in whole.parts():
        assert contents(job.out / path.name) == contents(path)
