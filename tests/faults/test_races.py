"""Many workers on one output: at the same shards, late, with other configurations, in their own shares."""

from __future__ import annotations

import signal
from pathlib import Path

import orjson
import pytest

from tests.faults.jobs import Job, Zygote, assert_readable, assert_same, make_job, write_rows


@pytest.mark.parametrize("workers", [2, 16])
def test_workers_that_all_do_every_shard(job: Job, whole: Job, workers: int) -> None:
    """Nobody knows of anybody else. All end well and there is one of everything."""
    runs = [job.start() for _ in range(workers)]
    codes = []
    for run in runs:
        codes.append(run.wait())
        assert_readable(job)
    assert codes == [0] * workers, job.said()
    assert_same(job, whole)


def test_workers_that_share_the_shards(job: Job, whole: Job) -> None:
    runs = [job.start(f"cluster.worker={worker}", "cluster.workers=3") for worker in range(3)]
    codes = [run.wait() for run in runs]
    assert set(codes) <= {0, 3}, job.said()
    assert 0 in codes      # the last one finds all shards and finishes the run
    assert_same(job, whole)


def test_workers_that_share_the_shards_and_die(job: Job, whole: Job) -> None:
    share = ("cluster.workers=2",)
    assert job.run("cluster.worker=0", *share) == 3
    assert "shards" in job.said().splitlines()[-1]
    assert job.run("cluster.worker=1", *share, strike={"step": "close", "when": "after"}) == -9
    assert job.run("cluster.worker=0", *share) == 3
    assert job.run("cluster.worker=1", *share) == 0, job.said()
    assert_same(job, whole)


def test_workers_with_leases_inherit_from_the_dead(job: Job, whole: Job) -> None:
    share = ("cluster.lease=true", "cluster.workers=3")
    for step in (r"write .*\.journal", "link part-"):
        assert job.run("cluster.worker=1", *share, strike={"step": step, "when": "after"}) == -9
    runs = [job.start(f"cluster.worker={worker}", *share) for worker in (0, 2)]
    assert [run.wait() for run in runs] == [0, 0], job.said()
    assert_same(job, whole)


@pytest.mark.parametrize("step, when", [
    ("link _run.json", "before"), ("link _plan", "before"), ("write 00001", "half"), ("write_table 00001", "after"),
    ("fsync 00001.*inprogress", "after"), ("link part-00001", "before"), ("link part-00001", "after"), ("unlink 0000", "before"),
    ("replace report", "before"), ("write_bytes _manifest", "half"), ("replace _SUCCESS", "before"),
])
def test_a_worker_that_sleeps_through_the_run(job: Job, whole: Job, step: str, when: str) -> None:
    """It is stopped in the midst of a step, another does everything, and it wakes up an hour later."""
    late = job.start(clock=-3600, strike={"step": step, "when": when, "signal": "SIGSTOP"})
    late.wait_until_stopped()
    assert job.run() == 0, job.said()
    assert_same(job, whole)
    before = {path.name: path.stat().st_ino for path in job.parts()}
    late.send(signal.SIGCONT)
    assert late.wait() == 0, job.said()
    assert {path.name: path.stat().st_ino for path in job.parts()} == before
    assert_same(job, whole)


def test_two_configs_on_one_folder(job: Job, whole: Job) -> None:
    assert job.run(strike={"step": "link part-00000", "when": "after"}) == -9
    assert job.run("sampling.temperature=0.5") == 2
    last = job.said().splitlines()[-1]
    assert last.startswith("error: ")
    assert "sampling.temperature (was " in last
    assert "is 0.5" in last
    assert job.run() == 0
    assert job.run("seed=3") == 2
    assert_same(job, whole)


def test_two_configs_that_start_at_once(job: Job) -> None:
    temperatures = [0.0, 0.5] * 3
    codes = [run.wait() for run in [job.start(f"sampling.temperature={value}") for value in temperatures]]
    assert set(codes) == {0, 2}, job.said()
    winner = float(orjson.loads((job.out / "_run.json").read_bytes())["fingerprint"].get("sampling.temperature", 0))
    assert [code == 0 for code in codes] == [value == winner for value in temperatures]


def test_two_that_append_new_files_at_once(zygote: Zygote, job: Job, tmp_path: Path) -> None:
    assert job.run() == 0
    old = {path.name: path.stat().st_ino for path in job.parts()}
    write_rows(job.folder / "in" / "c.parquet", 100, 50)
    runs = [job.start("plan.on_change=append") for _ in range(4)]
    assert [run.wait() for run in runs] == [0] * 4, job.said()
    names = [path.name for path in job.parts()]
    assert len(names) == len(old) + 2
    assert {name: (job.out / name).stat().st_ino for name in old} == old
    other = make_job(zygote, tmp_path / "other")
    assert other.run() == 0
    write_rows(other.folder / "in" / "c.parquet", 100, 50)
    assert other.run("plan.on_change=append") == 0
    assert_same(job, other)
