"""What a person sees of a run: progress, metrics, report."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from engine.request import EngineStats
from pipeline.observe import metrics as metrics_module
from pipeline.observe import progress as progress_module
from pipeline.observe.metrics import SCHEMA, Metrics, find_gpu, merge_metrics, peak_memory, read_metrics
from pipeline.observe.progress import Progress, duration
from pipeline.observe.report import render, speed
from pipeline.output.store import open_store


def stats(generated: int = 0, prompt: int = 0, running: int = 3) -> EngineStats:
    return EngineStats(running, 5, 10, 40, prompt, 0, generated, 0, 7, 0, 0, 0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that all modules under test see."""
    now = [1000.0]
    for module in (progress_module, metrics_module):
        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_name_the_phase_and_come_seldom(clock: list[float]) -> None:
    stream = io.StringIO()
    progress = Progress(stream)
    progress.phase("loading weights")
    clock[0] += 10
    progress.begin(1000)
    for second in range(1, 61):
        clock[0] += 1
        progress.update(100 + 10 * second, 100, 50 * second, 20 * second, 4, 2)
    progress.end(700)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "[   0.0 s] loading weights"
    assert lines[1:] == [
        "[  30.0 s] 300 of 1,000 rows, 10.0 rows/s, prefill 50 tok/s, decode 20 tok/s, 4 running, 2 waiting, 1 min 10 s left",
        "[  50.0 s] 500 of 1,000 rows, 10.0 rows/s, prefill 50 tok/s, decode 20 tok/s, 4 running, 2 waiting, 50 s left",
        "[  70.0 s] 700 of 1,000 rows, 10.0 rows/s, prefill 50 tok/s, decode 20 tok/s, 4 running, 2 waiting, 30 s left",
    ]


def test_a_terminal_gets_a_bar(clock: list[float]) -> None:
    stream = Terminal()
    progress = Progress(stream)
    progress.begin(100)
    clock[0] += 1
    progress.update(40, 0, 500, 200, 4, 2)
    progress.end(100)
    assert "100/100" in stream.getvalue()
    assert "decode 200 tok/s" in stream.getvalue()


def test_a_logged_error_is_shown_with_where_it_happened(clock: list[float]) -> None:
    stream = io.StringIO()
    with Progress(stream).shown_logs("engine"):
        try:
            raise KeyError("inside the compiler")
        except KeyError:
            logging.getLogger("engine.guided.pool").exception("a schema tripped the compiler")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "[   0.0 s] a schema tripped the compiler"
    assert lines[1].startswith("Traceback")
    assert lines[-1] == "KeyError: 'inside the compiler'"


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59.4, 61, 3600, 3700.2)] == ["0 s", "59 s", "1 min 01 s", "1 h 00 min", "1 h 01 min"]


def test_metrics_of_all_attempts_come_together(tmp_path: Path, clock: list[float]) -> None:
    store = open_store(str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    for attempt in range(2):
        metrics = Metrics(store, None)
        for second in range(11):
            metrics.tick(rows=second * 10, stats=stats(generated=second * 100, prompt=second * 7))
            clock[0] += 1
        metrics.tick(110, stats(1100, 77), force=True)
        assert len(merge_metrics(store)) == 4 * (attempt + 1)    # at 0, 5 and 10 s, and the last
    table = pq.read_table(tmp_path / "out/metrics.parquet")
    assert table.schema.equals(SCHEMA)
    assert [path.name for path in (tmp_path / "out").glob("*.parquet")] == ["metrics.parquet"]
    assert read_metrics(store).equals(table)
    assert table.column("generated_tokens_per_second").to_pylist()[1] == pytest.approx(100)
    assert table.column("kv_use").to_pylist()[0] == pytest.approx(0.25)
    total = speed(table)
    assert total is not None
    assert (total["rows"], total["seconds"]) == (220, 22)
    assert total["generated_tokens_per_second"] == pytest.approx(100)


def test_a_killed_attempt_leaves_its_metrics_of_a_minute_ago(tmp_path: Path, clock: list[float]) -> None:
    (tmp_path / "out").mkdir()
    store = open_store(str(tmp_path / "out"))
    metrics = Metrics(store, None)
    for second in range(100):
        metrics.tick(second, stats())
        clock[0] += 1
    assert max(read_metrics(store).column("seconds").to_pylist()) >= 60


class NVMLError(Exception):
    pass


def nvml(*there: str) -> SimpleNamespace:
    """A driver that knows these devices. It tells nothing of use, and of power at the first look alone."""
    watts = iter([250_000])

    def handle(name: str) -> str:
        if name not in there:
            raise NVMLError("Not Found")
        return name

    def power(handle: str) -> int:
        if (milliwatts := next(watts, None)) is None:
            raise NVMLError("Unknown Error")
        return milliwatts

    def use(handle: str) -> SimpleNamespace:
        raise NVMLError("Not Supported")

    return SimpleNamespace(NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=handle,
                           nvmlDeviceGetUtilizationRates=use, nvmlDeviceGetPowerUsage=power,
                           nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=3 * 2**30))


@pytest.mark.parametrize("name", ["GPU-ab", "MIG-ab"])
def test_figures_of_the_gpu_that_cannot_be_read_are_null(
    name: str, tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(name, "GPU-other"))
    (tmp_path / "out").mkdir()
    store = open_store(str(tmp_path / "out"))
    metrics = Metrics(store, find_gpu("ab"))
    for second in range(3):
        metrics.tick(second, stats(), force=True)
        clock[0] += 1
    rows = read_metrics(store).select(["gpu_use", "gpu_memory_gib", "gpu_watts"]).to_pylist()
    assert [tuple(row.values()) for row in rows] == [(None, 3, 250), (None, 3, None), (None, 3, None)]
    assert [record.getMessage() for record in caplog.records] == [
        "metrics.parquet has no gpu_use while that cannot be read: Not Supported",
        "metrics.parquet has no gpu_watts while that cannot be read: Unknown Error"]


def test_without_a_driver_there_are_no_figures(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    assert find_gpu(None) is None
    assert not caplog.records
    assert find_gpu("ab") is None
    assert [record.getMessage() for record in caplog.records] == ["metrics.parquet has no figures of the GPU: Not Found"]


@pytest.mark.parametrize("status", ["Name:\tpython\n", None])
def test_memory_is_told_where_the_system_does_not_write_it_down(
    status: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if status is not None:
        (tmp_path / "status").write_text(status)
    monkeypatch.setattr(metrics_module, "Path", lambda path: tmp_path / "status")
    assert peak_memory() > 2**20


def test_the_report_stands_alone_and_escapes_what_it_shows(tmp_path: Path, clock: list[float]) -> None:
    (tmp_path / "out").mkdir()
    store = open_store(str(tmp_path / "out"))
    metrics = Metrics(store, None)
    for second in range(30):
        metrics.tick(second, stats(generated=second))
        clock[0] += 1
    manifest = {
        "rows": 3, "shards": 1, "statuses": {"ok": 2, "prompt_null": 1},
        "prompt_tokens": 5, "cached_tokens": 0, "completion_tokens": 9,
        "labels": {"<b>topic": {"<script>alert(1)</script>": 2}}, "speed": speed(read_metrics(store)),
    }    # fmt: skip
    metrics.tick(30, stats(), force=True)
    html = render(manifest, read_metrics(store), {"host": "h", "command": ["a", "<b>"], "config": {"task": "</pre><script>"}})
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "polyline points=" in html
    assert "http" not in html.replace("http-equiv", "")
