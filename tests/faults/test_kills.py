"""kill -9: at every step of the protocol, and at random until the job is done. `GRISTMILL_KILLS` sets how many of the latter."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from output_cases import contents

from pipeline.output.run_folder import RunFolder
from pipeline.output.shards import journalled
from tests.faults.jobs import Job, Zygote, assert_readable, assert_same, make_job

KILLS = int(os.environ.get("GRISTMILL_KILLS", "30"))
AT_ONCE = 4
SLOW = 900              # seconds: hundreds of processes, on a machine whose disk is busy


@pytest.mark.timeout(SLOW)
def test_killed_at_every_step_of_the_protocol(zygote: Zygote, tmp_path: Path) -> None:
    """Before each step that an undisturbed run takes, and in the middle of each write."""
    kill_at_every_step(tmp_path, lambda folder: make_job(zygote, folder, rows=40, rows_per_shard=20))


@pytest.mark.timeout(SLOW)
def test_killed_at_every_step_of_doing_failed_rows_again(zygote: Zygote, tmp_path: Path) -> None:
    """Two of three shards hold one. A `_SUCCESS` and a manifest of what was there before are not the end of it."""
    failed = make_job(zygote, tmp_path / "failed", rows=80, rows_per_shard=30)
    assert failed.run() == 0, failed.said()

    def make(folder: Path) -> Job:
        shutil.copytree(failed.folder, folder)
        return replace(failed, folder=folder, out=folder / "out", env={"SCRIPTED_HEALED": "1"})

    kill_at_every_step(tmp_path, make, "retry_errors=[engine_error]")


def statuses(job: Job) -> dict[str, int]:
    return json.loads((job.out / "_manifest.json").read_bytes())["statuses"]


def kill_at_every_step(folder: Path, make: Callable[[Path], Job], *keys: str) -> None:
    whole = make(folder / "whole")
    assert whole.run(*keys, steps=str(folder / "steps")) == 0, whole.said()
    steps = (folder / "steps").read_text().splitlines()
    strikes = [(step, when) for step in range(1, len(steps) + 1) for when in ("before", "half")
               if when == "before" or steps[step - 1].endswith("torn")]
    strikes.append((len(steps), "after"))
    killed: Counter[int] = Counter()
    for start in range(0, len(strikes), AT_ONCE):
        jobs = [make(folder / f"{step}-{when}") for step, when in strikes[start : start + AT_ONCE]]
        runs = [job.start(*keys, strike={"step": step, "when": when})
                for job, (step, when) in zip(jobs, strikes[start : start + AT_ONCE], strict=True)]
        killed.update(run.wait() for run in runs)
        for job in jobs:
            assert_readable(job)
        for job, run in zip(jobs, [job.start(*keys) for job in jobs], strict=True):
            assert run.wait() == 0, job.said()
            assert_same(job, whole)
            assert statuses(job) == statuses(whole)
    print(f"{killed[-9]} kills at {len(steps)} steps")
    assert killed[-9] + killed[0] == len(strikes)
    assert killed[-9] >= 0.95 * len(strikes)      # threads may make a run a step shorter


def test_killed_at_random_until_it_is_done(zygote: Zygote, tmp_path: Path) -> None:
    """By the clock and by the step, in turns. No unreadable part is ever seen, and the output is that of an undisturbed run."""
    draw = random.Random(7)
    whole = make_job(zygote, tmp_path / "whole", rows=300)
    delay = {"SCRIPTED_DELAY": "0.03"}
    start = time.monotonic()
    assert whole.run(env=delay, steps=str(tmp_path / "steps")) == 0, whole.said()
    seconds = min(time.monotonic() - start, 3.0)      # so that kills fall on all of a run, on most machines
    steps = len((tmp_path / "steps").read_text().splitlines())
    kills = attempts = jobs = 0
    while kills < KILLS:
        job = make_job(zygote, tmp_path / f"job{jobs}", rows=300)
        jobs += 1
        code = None
        while code != 0:
            strike = {"step": draw.randint(1, steps), "when": draw.choice(("before", "half", "after"))}
            by_step, by_clock = kills < KILLS and attempts % 2, kills < KILLS and not attempts % 2
            run = job.start(env=delay, strike=strike if by_step else None)
            attempts += 1
            deadline = time.monotonic() + (draw.uniform(0.0, 1.2 * seconds) if by_clock else 1e9)
            while time.monotonic() < deadline and Path(f"/proc/{run.pid}/exe").exists():
                assert_readable(job)
                time.sleep(0.02)
            run.send(signal.SIGKILL) if time.monotonic() >= deadline else None
            code = run.wait()
            assert code in (0, -9), job.said()
            kills += code == -9
        assert_same(job, whole)
    print(f"{kills} kills in {attempts} runs of {jobs} jobs")


def test_what_is_journalled_is_not_computed_again(zygote: Zygote, tmp_path: Path) -> None:
    job = make_job(zygote, tmp_path, rows=400, rows_per_shard=200)
    run = job.start(env={"SCRIPTED_DELAY": "0.05"})
    while sum(path.stat().st_size for path in job.out.glob("_work/*.journal")) < 8000:
        time.sleep(0.01)
    run.send(signal.SIGKILL)
    assert run.wait() == -9
    folder = RunFolder.load(str(job.out))
    kept = {200 * shard.index + result.row
            for shard in folder.plan.shards for result in journalled(folder.store, shard, folder.shard_id(shard))}
    asked = {row for row in range(400) if row % 10 and row % 23 and row % 31}      # the others are null, fail or are equal
    assert len(asked & kept) > 30
    assert job.run(rows=str(tmp_path / "second")) == 0, job.said()
    again = {int(row) for row in re.findall(r"prompt (\d+)", (tmp_path / "second").read_text())}
    assert again == asked - kept


def test_a_clock_that_is_wrong_changes_nothing(job: Job, whole: Job) -> None:
    for clock in (3600, -3600, 7200):
        assert job.run(clock=clock, strike={"step": "link part-", "when": "after"}) == -9
    assert job.run(clock=-86400) == 0, job.said()
    assert_same(job, whole)


def test_a_kill_while_failed_rows_are_done_again(job: Job, whole: Job) -> None:
    again = "retry_errors=[engine_error]"
    assert job.run() == 0
    for strike in ({"step": "write 0000", "when": "half"}, {"step": "replace part-", "when": "before"},
                   {"step": "replace part-", "when": "after"}, {"step": "replace _manifest", "when": "before"}):
        assert job.run(again, strike=strike) == -9
        assert_readable(job)
        assert len(job.parts()) == len(whole.parts())
    assert job.run(again) == 0, job.said()
    (job.out / "_superseded").rename(job.folder / "superseded")
    assert len(list((job.folder / "superseded").iterdir())) >= 3
    for path in whole.parts():      # the scripted engine fails on the same rows again
        assert contents(job.out / path.name)[0] == contents(path)[0]
