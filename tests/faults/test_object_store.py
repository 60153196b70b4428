"""The same promises on S3: a server on localhost, jobs killed around each PUT, and bad weather."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from output_cases import contents
from s3_server import S3Server, serve_s3

from pipeline.output.store import open_store
from tests.faults.jobs import Job, Zygote, make_job


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    yield from serve_s3()


@pytest.fixture
def job(zygote: Zygote, tmp_path: Path, s3: S3Server) -> Job:
    to_server = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    to_server["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    return replace(make_job(zygote, tmp_path), url=f"s3://bucket/{tmp_path.name}", env=to_server)


def assert_same(job: Job, whole: Job) -> None:
    store = open_store(job.url)
    assert store.names() == {path.name for path in whole.out.iterdir() if path.is_file()}
    for path in whole.parts():
        (job.folder / "copy.parquet").write_bytes(store.read(path.name) or b"")
        assert contents(job.folder / "copy.parquet") == contents(path)


def test_killed_around_every_put(job: Job, whole: Job) -> None:
    for strike in ("before _run", "after _plan", "before part-", "after part-", "before _manifest", "before _SUCCESS"):
        when, name = strike.split()
        assert job.run(strike={"step": f"_put {name}", "when": when}) == -9, (strike, job.said())
    assert job.run() == 0, job.said()
    assert_same(job, whole)


def test_workers_that_all_do_every_shard(job: Job, whole: Job) -> None:
    runs = [job.start() for _ in range(4)]
    assert [run.wait() for run in runs] == [0] * 4, job.said()
    assert_same(job, whole)


def test_another_config_is_refused(job: Job) -> None:
    assert job.run(strike={"step": "_put part-", "when": "after"}) == -9
    assert job.run("seed=8") == 2
    assert "seed" in job.said().splitlines()[-1]
