"""A clean stop: what runs may finish, what was journalled is not computed again, and the next run goes on."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest

from pipeline.output.run_folder import RunFolder
from pipeline.output.shards import journalled
from tests.faults.jobs import Job, Run, Zygote, assert_readable, assert_same, make_job

ROWS = 1200


@pytest.fixture(scope="module")
def many(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = make_job(zygote, tmp_path_factory.mktemp("many"), rows=ROWS, rows_per_shard=ROWS)
    assert job.run("engine.max_rows=500") == 0, job.said()
    return job


def start_many(zygote: Zygote, folder: Path, *keys: str, turns: int = 30) -> tuple[Job, Run]:
    """500 rows running at once, each for turns / 20 seconds at least."""
    job = make_job(zygote, folder, rows=ROWS, rows_per_shard=ROWS)
    env = {"SCRIPTED_DELAY": "0.05", "SCRIPTED_TURNS": str(turns)}
    run = job.start("engine.max_rows=500", *keys, env=env, rows=str(folder / "first"))
    while not (folder / "first").exists() or len((folder / "first").read_bytes().splitlines()) < 500:
        time.sleep(0.01)
    time.sleep(0.3)
    return job, run


def kept_rows(job: Job) -> set[int]:
    folder = RunFolder.load(str(job.out))
    return {ROWS // 2 * (file == "b.parquet") + row
            for shard in folder.plan.shards for places in [list(shard.places())]
            for result in journalled(folder.store, shard, folder.shard_id(shard)) for file, row in [places[result.row]]}


def asked_rows(path: Path) -> set[int]:
    return {int(row) for row in re.findall(r"prompt (\d+)", path.read_text())}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
@pytest.mark.parametrize("grace", [20, 0])
def test_a_signal_while_500_rows_run(zygote: Zygote, tmp_path: Path, many: Job, number: signal.Signals, grace: int) -> None:
    job, run = start_many(zygote, tmp_path, f"limits.grace_seconds={grace}")
    sent = time.monotonic()
    run.send(number)
    assert run.wait() == 75, job.said()
    seconds = time.monotonic() - sent
    kept = kept_rows(job)
    print(f"{number.name}, grace {grace} s: out after {seconds:.1f} s, {len(kept)} rows kept")
    assert seconds < 15
    assert number.name in job.said()
    assert_readable(job)
    if grace:
        assert len(kept & asked_rows(tmp_path / "first")) > 300      # those that ran were let finish
    assert job.run("engine.max_rows=500", rows=str(tmp_path / "second")) == 0, job.said()
    assert not asked_rows(tmp_path / "second") & kept
    assert_same(job, many)


def test_a_second_signal_ends_it_at_once(zygote: Zygote, tmp_path: Path, many: Job) -> None:
    job, run = start_many(zygote, tmp_path, "limits.grace_seconds=60", turns=400)
    run.send(signal.SIGTERM)
    time.sleep(0.3)
    run.send(signal.SIGTERM)
    assert run.wait() == 143
    assert job.run("engine.max_rows=500") == 0, job.said()
    assert_same(job, many)


def test_a_second_signal_ends_an_engine_that_hears_none(job: Job) -> None:
    """Its main thread is in a call that does not return, so that Python runs no handler."""
    run = job.start("task.prompt=HANG {{ text }}")
    deadline = time.monotonic() + 60
    while "the scripted engine hangs" not in job.said():
        assert time.monotonic() < deadline, job.said()
        time.sleep(0.01)
    run.send(signal.SIGINT)
    time.sleep(0.3)
    assert Path(f"/proc/{run.pid}/exe").exists()
    run.send(signal.SIGINT)
    assert run.wait() == 130


def test_a_signal_and_no_time_left(zygote: Zygote, tmp_path: Path, many: Job) -> None:
    """As a scheduler does: a warning, and SIGKILL before the job could end by itself."""
    job, run = start_many(zygote, tmp_path, "limits.grace_seconds=60", turns=400)
    run.send(signal.SIGUSR2)
    time.sleep(0.5)
    run.send(signal.SIGKILL)
    assert run.wait() == -9
    kept = kept_rows(job)
    assert job.run("engine.max_rows=500", rows=str(tmp_path / "second")) == 0, job.said()
    assert not asked_rows(tmp_path / "second") & kept
    assert_same(job, many)


def test_a_signal_while_it_publishes(job: Job, whole: Job) -> None:
    late = job.start(strike={"step": "link part-00001", "when": "before", "signal": "SIGSTOP"})
    late.wait_until_stopped()
    late.send(signal.SIGTERM)
    late.send(signal.SIGCONT)
    assert late.wait() in (0, 75), job.said()
    assert job.run() == 0, job.said()
    assert_same(job, whole)
