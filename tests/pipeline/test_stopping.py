"""Whole runs on a scripted engine that end before all is done: budgets, signals, limits, hangs, damage."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.conftest import Run, scripted


def test_a_budget_of_tokens_drains_and_the_same_command_goes_on(run: Run, table: Any) -> None:
    data = table(prompt=[f"q{i}" for i in range(500)], row_group_size=50)
    words = (f"data={data}", "plan.rows_per_shard=50", "limits.max_tokens=1500", "input.threads=1")
    whole = run(f"data={data}", out="whole").rows()
    ran = run(*words, delay=0.02)
    assert ran.code == 75
    assert "limits.max_tokens=1500" in ran.err
    assert not (ran.folder / "_SUCCESS").exists()
    submitted = len(ran.engines[0].submitted)
    for _ in range(20):
        ran = run(*words, delay=0.02)
        submitted += sum(len(engine.submitted) for engine in ran.engines)       # none: all that was left was to say so
        if ran.code == 0:
            break
    assert ran.code == 0
    rows = ran.rows()
    assert [(row["prompt"], row["text"]) for row in rows] == [(row["prompt"], row["text"]) for row in whole]
    assert submitted < 1000  # rows in flight at a stop may be computed again, journalled ones are not


@pytest.mark.parametrize("limit", ["limits.max_tokens=26", "limits.max_seconds=0.2"])
def test_a_budget_that_the_last_rows_use_up_leaves_nothing_to_resume(run: Run, table: Any, limit: str) -> None:
    """Tokens are counted as the rows end; the time is over while they run, and they end within the grace."""
    ran = run(f"data={table(prompt=['a', 'b', None])}", limit, delay=0.3)
    assert (ran.code, (ran.folder / "_SUCCESS").exists()) == (0, True)
    assert "stopped by" not in ran.err
    assert Counter(row["status"] for row in ran.rows()) == {"ok": 2, "prompt_null": 1}


def test_a_row_that_the_grace_cuts_off_is_left_to_resume(run: Run, table: Any) -> None:
    data = table(prompt=["a", "SLOW"])
    ran = run(f"data={data}", "limits.max_seconds=0.2", "limits.grace_seconds=0.1", delay=0.1)
    assert (ran.code, (ran.folder / "_SUCCESS").exists()) == (75, False)
    assert run(f"data={data}").code == 0


def test_a_budget_of_gpu_hours_counts_the_gpu_that_the_engine_uses(run: Run, table: Any) -> None:
    """Whatever the driver tells of it, or of others."""
    data = table(prompt=["a", "b"])
    assert run(f"data={data}", "limits.max_gpu_hours=1e-9", out="cpu").code == 0
    ran = run(f"data={data}", "limits.max_gpu_hours=1e-9", out="gpu", gpu="ab")
    assert (ran.code, "limits.max_gpu_hours=1e-09" in ran.err) == (75, True)


def test_a_signal_drains(tmp_path: Path, table: Any) -> None:
    """As the command line does it; tests/faults/test_drain.py has each signal."""
    data = table(prompt=[f"q{i}" for i in range(2000)])
    words = (f"data={data}", f"output.dir={tmp_path / 'out'}", "limits.grace_seconds=5")
    job = scripted(*words, SCRIPTED_DELAY="0.02")
    _wait_for(lambda: list((tmp_path / "out" / "_work").glob("*.journal")), job)
    job.send_signal(signal.SIGTERM)
    out, err = job.communicate(timeout=30)
    assert job.returncode == 75, err
    assert "stopped by signal SIGTERM" in err
    assert "Traceback" not in err
    again = scripted(*words)
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert out.splitlines()[-1].split()[:2] == ["ok", "2,000"]


def test_rows_that_outlast_the_grace_are_aborted_and_computed_again(tmp_path: Path, table: Any) -> None:
    data = table(prompt=["SLOW"] + [f"q{i}" for i in range(100)])
    words = (f"data={data}", f"output.dir={tmp_path / 'out'}", "limits.grace_seconds=0.2")
    job = scripted(*words, SCRIPTED_DELAY="0.2")
    _wait_for(lambda: list((tmp_path / "out" / "_work").glob("*.journal")), job)
    began = time.monotonic()
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=30)
    assert job.returncode == 75, err
    assert time.monotonic() - began < 30
    again = scripted(*words)
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert out.splitlines()[-1].split()[:2] == ["ok", "101"]


def test_a_signal_while_the_model_loads_ends_the_run(run: Run, table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.pipeline.scripted_engine import ScriptedModel

    def load(self: Any, progress: Any) -> Any:
        progress("loading weights")
        os.kill(os.getpid(), signal.SIGTERM)
        progress("sizing the KV pool")
        raise AssertionError("it goes on loading")

    data = table(prompt=["a"])
    with monkeypatch.context() as patch:
        patch.setattr(ScriptedModel, "load", load)
        ran = run(f"data={data}")
    assert ran.code == 75
    assert "stopped by signal SIGTERM" in ran.err
    assert run(f"data={data}", "task.prompt=Mended {{ prompt }}").code == 0      # nothing was written under the other


def test_a_worker_that_takes_what_is_free_leaves_the_folder_to_the_others(run: Run, table: Any, monkeypatch: pytest.MonkeyPatch
                                                                          ) -> None:
    """Of workers with leases each may have the number 0 of 1."""
    from tests.pipeline.scripted_engine import ScriptedModel

    def load(self: Any, progress: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        progress("loading weights")

    monkeypatch.setattr(ScriptedModel, "load", load)
    ran = run(f"data={table(prompt=['a'])}", "cluster.lease=true")
    assert ran.code == 75
    assert (ran.folder / "_run.json").exists()


def test_a_folder_that_an_earlier_attempt_leaves_late_is_taken_anew(run: Run, table: Any, tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stopped before its first row, when the next one has found the run there and loads its model."""
    from tests.pipeline.scripted_engine import ScriptedModel

    loaded = ScriptedModel.load

    def load(self: Any, progress: Any) -> Any:
        for path in (tmp_path / "out").glob("_*.*"):
            kept[path] = path.read_bytes()
            path.unlink()
        return loaded(self, progress)

    kept: dict[Path, bytes] = {}
    monkeypatch.setattr(ScriptedModel, "load", load)
    assert run(f"data={table(prompt=['a'])}").code == 0
    assert {path.name for path in kept} == {"_run.json", "_plan.parquet"}
    assert {path: path.read_bytes() for path in kept} == kept


def test_a_run_that_is_killed_before_its_first_row_says_what_to_do(run: Run, table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.pipeline.scripted_engine import ScriptedModel

    def load(self: Any, progress: Any) -> Any:
        raise KeyboardInterrupt      # as a second signal, it leaves things as they are

    words = (f"data={table(prompt=['a'])}", "task.prompt=Mended {{ prompt }}")
    with monkeypatch.context() as patch:
        patch.setattr(ScriptedModel, "load", load)
        with pytest.raises(KeyboardInterrupt):
            run(words[0])
    refused = run(*words)
    assert refused.code == 2
    assert refused.line.endswith("set another output.dir, these back, or, unless a job is at it, remove it: it holds no rows yet")
    shutil.rmtree(refused.folder)
    assert run(*words).code == 0
    assert run(words[0]).line.endswith("set another output.dir, or these back")


def test_a_row_that_takes_too_long_is_cut(run: Run, table: Any) -> None:
    data = table(prompt=["a", "SLOW", "SLOW", "b"])
    ran = run(f"data={data}", "limits.row_seconds=2", "limits.max_error_rate=1", delay=0.05)
    assert ran.code == 0
    assert [row["status"] for row in ran.rows()] == ["ok", "timeout", "timeout", "ok"]
    assert ran.rows()[1]["error"] == "ran longer than limits.row_seconds=2"
    assert ran.rows()[1]["finish_reason"] == "aborted"
    again = run(f"data={data}", "retry_errors=[timeout]")
    assert again.code == 0
    assert [row["status"] for row in again.rows()] == ["ok"] * 4
    assert len(again.engines[0].submitted) == 1


def test_a_budget_may_end_the_run_with_what_there_is(run: Run, table: Any) -> None:
    data = table(prompt=["SLOW", None] + [f"q{i}" for i in range(500)], row_group_size=50)
    words = (f"data={data}", "plan.rows_per_shard=50", "limits.max_error_rate=1")
    ran = run(*words, "limits.max_tokens=1500", "limits.on_budget=finish", "limits.grace_seconds=0.1", delay=0.02)
    assert ran.code == 0
    statuses = Counter(row["status"] for row in ran.rows())
    assert set(statuses) == {"ok", "prompt_null", "aborted"}
    assert statuses["ok"] < 400
    assert ran.rows()[0]["status"] == "aborted"      # it ran, and longer than the grace
    assert {row["error"] for row in ran.rows() if row["status"] == "aborted"} == {"not done by limits.max_tokens=1500"}
    assert run(*words).out.startswith("All is done")
    again = run(*words, "retry_errors=[aborted]")
    assert Counter(row["status"] for row in again.rows()) == {"ok": 501, "prompt_null": 1}
    assert len(again.engines[0].submitted) == statuses["aborted"]
    refused = run(*words, "limits.on_budget=finish", "cluster.lease=true")
    assert refused.code == 2
    assert refused.line.startswith("limits.on_budget=finish: ")


def test_samples_that_a_budget_leaves_undone_are_counted(run: Run, table: Any) -> None:
    """Rows of earlier attempts that have some of their own number of samples get the rest of those."""
    data = table(prompt=[f"q{i} {'SLOW' * (i % 2)}" for i in range(400)], sampling=['{"n": 3}', None] * 200, row_group_size=100)
    words = (f"data={data}", "plan.rows_per_shard=200", "limits.max_error_rate=1", "engine.window=16", "input.threads=1",
             "limits.grace_seconds=0", "limits.max_tokens=500", "sampling.temperature=1", "sampling.n=2")
    assert run(*words, delay=0.002).code == 75
    ran = run(*words, "limits.on_budget=finish", delay=0.002)
    assert ran.code == 0
    counts = Counter(row["prompt"] for row in ran.rows())
    assert list(counts) == [f"q{i} {'SLOW' * (i % 2)}" for i in range(400)]
    assert set(counts.values()) == {2, 3}
    by_row: dict[str, list[int]] = {}
    for row in ran.rows():
        by_row.setdefault(row["prompt"], []).append(row["sample"])
    assert all(samples == list(range(len(samples))) for samples in by_row.values())
    again = run(*words[:3], *words[-2:], "retry_errors=[aborted]")
    assert again.code == 0
    assert Counter(row["status"] for row in again.rows()) == {"ok": 1000}


def test_an_engine_that_gives_up_is_one_line(run: Run, table: Any) -> None:
    ran = run(f"data={table(prompt=['a', 'BREAK'])}")
    assert ran.code == 1
    assert ran.line == "the scripted engine is broken; every finished row is kept, and the same command goes on from here"


def test_an_engine_that_hangs_is_stopped_with_its_stacks(tmp_path: Path, table: Any) -> None:
    data = table(prompt=["a"])
    job = scripted(f"data={data}", f"output.dir={tmp_path / 'out'}", "limits.hang_seconds=1", SCRIPTED_DELAY="300")
    _, err = job.communicate(timeout=120)
    assert job.returncode == 75
    assert "no step for limits.hang_seconds=1" in err
    assert "in step" in err


def test_a_process_that_was_suspended_has_not_hung() -> None:
    """As Slurm suspends a job to make room for another, for longer than limits.hang_seconds."""
    code = "from pipeline.signals import Watchdog\nwith Watchdog(2, 'no step for'):\n    print('ready', flush=True)\n    input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    time.sleep(0.7)      # the watchdog looks twice a second
    process.communicate("\n", timeout=30)
    assert process.returncode == 0


@pytest.mark.parametrize("when", ["true", "'ENDLESS' in messages[0].content"])
def test_a_chat_template_that_does_not_end_is_stopped(tmp_path: Path, table: Any, when: str) -> None:
    """Of every conversation, and so already as the job looks whether it takes system messages, or of one."""
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    data = table(prompt=["a", "ENDLESS"])
    job = scripted(f"data={data}", f"output.dir={tmp_path / 'out'}", "limits.hang_seconds=1",
                   f"model.chat_template={{% if {when} %}}{loops}{{% endif %}}{{{{ messages[0].content }}}}")
    _, err = job.communicate(timeout=60)
    assert job.returncode == 75, err
    assert "stopped: the chat template did not end within limits.hang_seconds=1" in err
    assert "<template>" in err      # among what the threads are doing


def test_an_error_of_a_thread_ends_the_run(run: Run, table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.input.prompts import PromptBuilder

    def build(*args: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(PromptBuilder, "build", build)
    with pytest.raises(RuntimeError, match="a bug"):
        run(f"data={table(prompt=['a'])}")
    assert not [thread for thread in threading.enumerate() if thread.name in ("feed", "collect")]


def test_damage_found_while_reading_is_one_line(run: Run, table: Any) -> None:
    data = Path(table(prompt=[f"some text that is long enough {i}" for i in range(3000)], row_group_size=1000))
    raw = bytearray(data.read_bytes())
    raw[4:200] = b"\xff" * 196
    data.write_bytes(raw)
    ran = run(f"data={data}")
    assert ran.code == 2
    assert "row group 0 is damaged" in ran.line


def _wait_for(there: Any, job: subprocess.Popen[str], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
