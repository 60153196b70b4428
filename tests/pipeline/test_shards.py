"""Shards: the columns of a part, what a second attempt finds, and what makes two parts equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from output_cases import LAYOUT, SCHEMA, contents, fill, make_results, open_folder, parts, tables, write_input

from pipeline.exits import ConfigError, StorageError
from pipeline.input.plan import InputFile, Shard, make_plan
from pipeline.output import part
from pipeline.output.layout import RESULTS, OutputLayout
from pipeline.output.part import PartInfo
from pipeline.output.rows import MOST_ERROR, RowResult, Status
from pipeline.output.run_folder import RunFolder

SCALARS = pa.schema([("prompt", pa.string())])


def one_shard(out: Path, layout: OutputLayout, rows: int) -> tuple[RunFolder, Shard]:
    folder = RunFolder.open(str(out), {}, make_plan([InputFile("a", "a", rows, 1, "1", (rows,))], max(rows, 1)), layout)
    return folder, folder.plan.shards[0]


def test_a_part_holds_input_columns_results_and_properties(tmp_path: Path) -> None:
    schema = pa.schema(
        [("status", pa.int64()), ("text", pa.large_string()), ("label", pa.string()), ("input_status", pa.bool_())])
    layout = OutputLayout.make(schema, {"properties": {
        "label": {"type": "string"}, "score": {"type": "number"}, "count": {"type": ["integer", "null"]},
        "sure": {"type": "boolean"}, "tags": {"type": "array"}, "kind": {"enum": ["a", "b"]}, "either": {"anyOf": []},
        "one": {"const": 1}, "any": True,
    }})
    assert layout.schema.names == ["input_input_status", "input_text", "label", "input_status", *RESULTS.names,
                                   "json_label", "score", "count", "sure", "tags", "kind", "either", "one", "any"]
    assert [layout.schema.field(name).type for name in ("input_text", "score", "count", "sure", "tags", "kind", "one")] == [
        pa.large_string(), pa.float64(), pa.int64(), pa.bool_(), pa.string(), pa.string(), pa.int64()]
    assert layout.renamed == {"status": "input_input_status", "text": "input_text", "json:label": "json_label"}
    folder, shard = one_shard(tmp_path, layout, 4)
    writer = folder.open_shard(shard)
    good = '{"label":"x","score":2,"count":3.0,"sure":true,"tags":["a",1],"kind":"b","either":null,"one":1,"any":{"b":1}}'
    odd = '{"label":null,"score":1.5,"count":99999999999999999999,"sure":"yes","kind":7}'
    writer.append(RowResult(2, json="[1]", text="[1]"), RowResult(0, json=good, text=good, finish_reason="stop", prompt_tokens=3))
    writer.append(RowResult(1, json=odd), RowResult(3, status=Status.ENGINE_ERROR, error="it broke"))
    rows = pa.table([[1, 2, 3, 4], ["p", "q", None, ""], ["g"] * 4, [True, None, False, True]], schema=schema)
    assert writer.commit([rows])
    table = pq.read_table(parts(tmp_path)[0])
    assert table.schema.equals(layout.schema)
    assert table.select(["input_input_status", "input_text", "label", "input_status"]).columns == rows.columns
    flat = table.select(layout.schema.names[-9:]).to_pylist()
    assert flat[0] == {"json_label": "x", "score": 2.0, "count": 3, "sure": True, "tags": '["a",1]', "kind": "b", "either": None,
                       "one": 1, "any": '{"b":1}'}
    assert flat[1] == {**dict.fromkeys(flat[0]), "score": 1.5}
    assert flat[2] == flat[3] == dict.fromkeys(flat[0])
    assert table.column("status").to_pylist() == ["ok", "ok", "ok", "engine_error"]
    assert table.column("row_id").to_pylist() == list(shard.row_ids())


@pytest.mark.parametrize("subschema, type", [
    ({"anyOf": [{"type": "string", "maxLength": 5}, {"type": "null"}]}, pa.string()),          # Pydantic's Optional
    ({"$ref": "#/$defs/colour"}, pa.string()), ({"allOf": [{"$ref": "#/$defs/colour"}], "default": "red"}, pa.string()),
    ({"anyOf": [{"$ref": "#/$defs/colour"}, {"type": "null"}]}, pa.string()),
    ({"enum": [1, 2, None]}, pa.int64()), ({"enum": [1, 2.5]}, pa.float64()), ({"enum": ["a", 1]}, "text"),
    ({"const": None}, "text"),
    ({"type": "number", "enum": [1, 2]}, pa.float64()), ({"type": ["integer", "number", "null"]}, pa.float64()),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, pa.float64()), ({"anyOf": [{"type": "integer"}, {}]}, "text"),
    ({"type": "array", "items": {"type": "string"}}, pa.list_(pa.string())),
    ({"type": ["array", "null"], "items": {"$ref": "#/$defs/colour"}}, pa.list_(pa.string())),
    ({"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}, pa.list_(pa.list_(pa.int64()))),
    ({"type": "array", "items": {"type": "object"}}, "text"), ({"type": "array"}, "text"),
    ({"type": "array", "prefixItems": [{"type": "boolean"}], "items": {"type": "string"}}, "text"),
    ({"type": "object", "properties": {"x": {"type": "integer"}}}, "text"), ({"$ref": "#/$defs/node"}, "text"),
    ({"$ref": "#/$defs/loop"}, "text"), ({"$ref": "http://example.com/x"}, "text"), ({"$ref": "#/nowhere/x"}, "text"),
    ({"type": ["string", "object"]}, "text"), (False, "text"), ({"description": "anything"}, "text"),
])  # fmt: skip
def test_types_of_properties(subschema: Any, type: Any) -> None:
    root = {"properties": {"p": subschema}, "$defs": {"colour": {"enum": ["red", "green"]}, "loop": {"$ref": "#/$defs/loop"},
                                                      "node": {"type": "object", "properties": {"n": {"$ref": "#/$defs/node"}}}}}
    flat = OutputLayout.make(SCALARS, root).flat["p"]
    assert flat.type == (pa.string() if type == "text" else type)
    assert flat.convert(None) is None
    if type == "text":
        assert flat.convert({"x": [1, "é"]}) == '{"x":[1,"é"]}'


def test_values_of_lists() -> None:
    flat = OutputLayout.make(SCALARS, {"properties": {"p": {"type": "array", "items": {"type": ["integer", "null"]}}}}).flat["p"]
    values = [flat.convert(value) for value in ([1, None, 3.0, 2**70, "x"], [], None, "x")]
    assert values == [[1, None, 3, None, None], [], None, None]
    pa.array(values, flat.type).validate(full=True)


def test_tool_calls_have_a_column_where_asked_for(tmp_path: Path) -> None:
    folder, shard = one_shard(tmp_path, OutputLayout.make(SCALARS, tool_calls=True), 1)
    writer = folder.open_shard(shard)
    writer.append(RowResult(0, tool_calls='[{"name": "f"}]'))
    writer.commit([pa.table({"prompt": ["a"]})])
    assert pq.read_table(parts(tmp_path)[0]).column("tool_calls").to_pylist() == ['[{"name": "f"}]']
    assert "tool_calls" not in OutputLayout.make(SCALARS).schema.names


def test_an_input_that_cannot_be_kept_is_refused() -> None:
    with pytest.raises(ConfigError, match="two columns named a"):
        OutputLayout.make(pa.schema([("a", pa.int8()), ("a", pa.int8())]))
    with pytest.raises(ConfigError, match=r"input column odd .*cannot be written"):
        OutputLayout.make(pa.schema([("odd", pa.month_day_nano_interval())]))
    with pytest.raises(ConfigError, match=r"input column odd .*it comes back as .*timestamp\[ms\]>; give the input without it"):
        OutputLayout.make(pa.schema([("odd", pa.list_view(pa.timestamp("s")))]))


def test_nested_dictionary_and_large_columns_come_through(tmp_path: Path) -> None:
    schema = pa.schema([
        ("prompt", pa.large_string()), ("kind", pa.dictionary(pa.int32(), pa.string())), ("at", pa.timestamp("us", "UTC")),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))), ("blob", pa.large_binary()),
        ("vector", pa.list_(pa.float32(), 2)), ("nothing", pa.null()),
    ])
    columns = [["a", None, "c"], pa.array(["x", "y", "x"]).dictionary_encode(), [1, 2, None],
               [[{"role": "u", "content": "v"}], [], None], [b"\0", b"", None], [[1.0, 2.0], [3.0, 4.0], None], [None] * 3]
    arrays = [c if isinstance(c, pa.DictionaryArray) else pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)]
    rows = pa.table(arrays, schema=schema)
    folder, shard = one_shard(tmp_path, OutputLayout.make(schema), 3)
    writer = folder.open_shard(shard)
    writer.append(*(RowResult(row, sample, 2) for row in range(3) for sample in range(2)))
    chunk = pa.array(["z", "x"]).dictionary_encode()      # another chunk, another dictionary
    assert writer.commit([rows.slice(0, 2), rows.slice(2).set_column(1, schema.field(1), chunk.slice(1))])
    table = pq.read_table(parts(tmp_path)[0]).select(schema.names)
    assert table.to_pylist() == rows.take([0, 0, 1, 1, 2, 2]).to_pylist()
    assert table.schema.equals(schema)


def test_the_same_rows_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the input is chunked and in whatever order rows finish."""
    monkeypatch.setattr(part, "ROW_GROUP_ROWS", 40)
    monkeypatch.setattr(part, "BLOCK_ROWS", 16)
    files = write_input(tmp_path / "in", 200, files=1, row_group=50)
    outs = []
    for number, chunk in enumerate((200, 7)):
        folder = open_folder(tmp_path / f"out{number}", files, rows_per_shard=200)
        shard = folder.plan.shards[0]
        results = list(make_results(shard))
        writer = folder.open_shard(shard)
        writer.append(*(reversed(results) if number else results))
        table = pa.concat_tables(tables(folder.plan, shard))
        writer.commit(table.slice(start, chunk) for start in range(0, 200, chunk))
        outs += parts(tmp_path / f"out{number}")
    assert contents(outs[0]) == contents(outs[1])
    assert outs[0].read_bytes() != outs[1].read_bytes()
    assert pq.read_metadata(outs[0]).num_row_groups == 5


def test_wide_rows_make_small_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part, "ROW_GROUP_BYTES", 100_000)
    monkeypatch.setattr(part, "BLOCK_ROWS", 8)
    folder, shard = one_shard(tmp_path, OutputLayout.make(SCALARS), 64)
    writer = folder.open_shard(shard)
    writer.append(*map(RowResult, range(64)))
    writer.commit([pa.table({"prompt": ["x" * 10_000] * 64})])
    assert pq.read_metadata(parts(tmp_path)[0]).num_row_groups == 4


def test_a_wide_row_with_many_samples_is_repeated_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, shard = one_shard(tmp_path, OutputLayout.make(SCALARS), 3)
    writer = folder.open_shard(shard)
    samples = (1, 70, 3)
    writer.append(*(RowResult(row, sample, n, text=f"{row}.{sample}") for row, n in enumerate(samples) for sample in range(n)))
    monkeypatch.setattr(part, "BLOCK_BYTES", 100_000)
    taken: list[int] = []
    table = OutputLayout.table
    monkeypatch.setattr(OutputLayout, "table", lambda *args: (taken.append(args[1].nbytes), table(*args))[1])
    prompts = ["a", "b" * 10_000, "c"]
    assert writer.commit([pa.table({"prompt": prompts})])
    assert len(taken) == 8 and max(taken) <= 100_000
    rows = pq.read_table(parts(tmp_path)[0]).select(["prompt", "sample", "text"]).to_pylist()
    assert rows == [{"prompt": prompts[row], "sample": sample, "text": f"{row}.{sample}"}
                    for row, n in enumerate(samples) for sample in range(n)]


def test_an_error_is_one_short_line() -> None:
    long, sharp = RowResult(0, error="a" * 10**6), RowResult(0, error="red: \x1b[31m\n\u202eé")
    assert long.error == "a" * (MOST_ERROR - 1) + "…"
    assert sharp.error == "red: \\x1b[31m\\n\\u202eé"
    assert RowResult(0, error=long.error).error == long.error    # as it comes back from a journal
    assert RowResult(0, error=sharp.error).error == sharp.error


def test_the_footer_names_run_plan_and_shard(tmp_path: Path) -> None:
    files = write_input(tmp_path / "in")
    folder = open_folder(tmp_path / "out", files)
    shard = folder.plan.shards[1]
    assert fill(folder, shard)
    info = PartInfo.from_footer(pq.read_metadata(tmp_path / "out" / shard.name))
    results = list(make_results(shard))
    assert info.id == folder.shard_id(shard)
    assert (info.rows, info.generation, len(info.attempt)) == (len(results), 0, 32)
    assert info.statuses == {status: n for status in ("ok", "prompt_null") if (n := sum(r.status == status for r in results))}
    assert info.prompt_tokens == sum(r.prompt_tokens or 0 for r in results)


def test_a_second_attempt_finds_what_was_journalled(tmp_path: Path) -> None:
    files = write_input(tmp_path / "in")
    folder = open_folder(tmp_path / "out", files)
    shard = folder.plan.shards[0]
    results = list(make_results(shard))
    first = folder.open_shard(shard)
    first.append(*results[:7])
    first.append(*results[7:9])            # no close: the process was killed
    second = folder.open_shard(shard)
    assert list(second.recovered().values()) == results[:9]
    assert all(isinstance(result.status, Status) for result in second.recovered().values())
    second.append(*results[9:12])
    third = folder.open_shard(shard)
    assert sorted(third.recovered()) == sorted((r.row, r.sample) for r in results[:12])
    assert third.missing() == shard.num_rows - sum(r.sample == r.samples - 1 for r in results[:12])
    third.append(*results[12:])
    assert third.missing() == 0
    assert third.commit(tables(folder.plan, shard))
    assert list((tmp_path / "out" / "_work").iterdir()) == []
    first.close()
    second.close()


def test_two_attempts_that_both_did_a_row(tmp_path: Path) -> None:
    files = write_input(tmp_path / "in")
    folder = open_folder(tmp_path / "out", files)
    shard = folder.plan.shards[0]
    results = list(make_results(shard))
    attempts = [folder.open_shard(shard) for _ in range(2)]
    for writer in attempts:
        writer.append(*results)
    third = folder.open_shard(shard)
    assert (len(third.recovered()), third.missing()) == (len(results), 0)
    assert [writer.commit(tables(folder.plan, shard)) for writer in (*attempts, third)] == [True, False, False]
    assert pq.read_table(parts(tmp_path / "out")[0]).num_rows == len(results)


@pytest.mark.parametrize("bad", [RowResult(30), RowResult(-1), RowResult(0, 1), RowResult(0, -1, 2), RowResult(4)])
def test_a_result_that_belongs_nowhere_is_refused(tmp_path: Path, bad: RowResult) -> None:
    folder = open_folder(tmp_path / "out", write_input(tmp_path / "in"))
    writer = folder.open_shard(folder.plan.shards[0])
    writer.append(RowResult(4))
    with pytest.raises(ValueError, match="shard 0 has"):
        writer.append(bad)


def test_a_shard_that_lacks_rows_is_not_committed(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "out", write_input(tmp_path / "in"))
    shard = folder.plan.shards[0]
    writer = folder.open_shard(shard)
    for result in list(make_results(shard))[:-1]:
        writer.append(result)
    with pytest.raises(ValueError, match="lacks 1 rows"):
        writer.commit(tables(folder.plan, shard))
    assert parts(tmp_path / "out") == []


@pytest.mark.parametrize("rows", [19, 21, 0])
def test_an_input_of_another_length_is_refused(tmp_path: Path, rows: int) -> None:
    folder = open_folder(tmp_path / "out", write_input(tmp_path / "in"))
    shard = folder.plan.shards[0]
    writer = folder.open_shard(shard)
    writer.append(*make_results(shard))
    with pytest.raises(ConfigError, match="no longer holds the 20 rows"):
        writer.commit([pa.table({"prompt": ["x"] * rows, "gold": [1] * rows}, SCHEMA)])
    assert parts(tmp_path / "out") == []
    assert writer.commit(tables(folder.plan, shard))      # and the rows are still there


def test_a_commit_that_failed_may_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part, "ROW_GROUP_ROWS", 8)
    monkeypatch.setattr(part, "BLOCK_ROWS", 8)
    folder, shard = one_shard(tmp_path, OutputLayout.make(SCALARS), 40)
    writer = folder.open_shard(shard)
    writer.append(*map(RowResult, range(40)))
    with pytest.raises(ConfigError):
        writer.commit([pa.table({"prompt": ["x"] * 30})])
    assert writer.commit([pa.table({"prompt": ["x"] * 40})])
    assert folder.committed()[0].statuses == {"ok": 40}


def test_text_that_no_file_can_hold_is_scrubbed(tmp_path: Path) -> None:
    folder, shard = one_shard(tmp_path, OutputLayout.make(SCALARS), 3)
    writer = folder.open_shard(shard)
    writer.append(RowResult(0, text="a\ud800b"), RowResult(2, text="\0é\U0001f600"))
    writer.append(RowResult(1, status=Status.TEMPLATE_ERROR, error="\udfff"))
    writer.flush()
    writer = folder.open_shard(shard)
    writer.commit([pa.table({"prompt": ["a", "b", "c"]})])
    table = pq.read_table(parts(tmp_path)[0])
    assert table.column("text").to_pylist() == ["a?b", None, "\0é\U0001f600"]
    assert table.column("error").to_pylist() == [None, "?", None]


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    folder, shard = one_shard(tmp_path, OutputLayout.make(SCALARS), 1)
    folder.open_shard(shard).append(RowResult(0, prompt_tokens=np.int32(5), completion_tokens=np.int64(6)))
    writer = folder.open_shard(shard)
    writer.commit([pa.table({"prompt": ["a"]})])
    assert pq.read_table(parts(tmp_path)[0]).select(["prompt_tokens", "completion_tokens"]).to_pylist() == [
        {"prompt_tokens": 5, "completion_tokens": 6}]


def test_a_part_that_does_not_read_back_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = open_folder(tmp_path / "out", write_input(tmp_path / "in"))
    shard = folder.plan.shards[0]
    writer = folder.open_shard(shard)
    writer.append(*make_results(shard))
    close = pq.ParquetWriter.close

    def damage(self: pq.ParquetWriter) -> None:
        close(self)
        path = next((tmp_path / "out" / "_work").glob("*.inprogress"))
        column = pq.read_metadata(path).row_group(0).column(LAYOUT.schema.get_field_index("row_id"))
        data = bytearray(path.read_bytes())
        data[(column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size // 2] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(pq.ParquetWriter, "close", damage)
    with pytest.raises(StorageError, match="does not read back"):
        writer.commit(tables(folder.plan, shard))
    assert parts(tmp_path / "out") == []
    assert list((tmp_path / "out" / "_work").glob("*.inprogress")) == []
