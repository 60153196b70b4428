"""Input files: found, checked before anything is loaded, and read by range."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import InputKeys
from pipeline.exits import ConfigError
from pipeline.input import csv, formats, jsonl
from pipeline.input.plan import make_plan
from pipeline.input.sources import Input, open_input
from pipeline.output.layout import OutputLayout


def opened(data: Any, **keys: Any) -> Input:
    return open_input(str(data) if isinstance(data, Path) else data, InputKeys(**keys))


def everything(
    source: Input, rows_per_shard: int = 7, columns: list[str] | None = None, backwards: bool = False
) -> list[dict[str, Any]]:
    """All rows, read shard by shard."""
    cursor = source.cursor(columns)
    shards = make_plan(source.files, rows_per_shard).shards
    read = {shard.index: [row for chunk in cursor.read(shard) for row in chunk.table.to_pylist()]
            for shard in (reversed(shards) if backwards else shards)}  # fmt: skip
    return [row for index in sorted(read) for row in read[index]]


def parquet(path: Path, table: dict[str, Any] | pa.Table, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), path, **options)
    return path


# --- what is found ---


def test_files_folders_globs_and_lists_name_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        parquet(tmp_path / f"in/day={i}/x.parquet", {"a": [i, i + 10]})
    for name in ("_SUCCESS", ".hidden.parquet", "_work/half.parquet", "day=0/_tmp.parquet", "notes.txt"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"not data")
    expected = [{"a": a} for a in (0, 10, 1, 11, 2, 12)]
    monkeypatch.chdir(tmp_path)
    for data in ("in", tmp_path / "in", "in/", "in/*/*.parquet", "in/**/*.parquet", f"file://{tmp_path}/in",
                 [f"in/day={i}/x.parquet" for i in range(3)], ["in/day=2", "in/day=[01]/*.parquet"]):  # fmt: skip
        assert everything(opened(data)) == expected, data


def test_keys_are_relative_to_what_was_given(tmp_path: Path) -> None:
    parquet(tmp_path / "one/in/a/x.parquet", {"a": [1]})
    parquet(tmp_path / "two/in/a/x.parquet", {"a": [1]})
    for data in ("in", "in/*/*.parquet"):
        keys = [[file.key for file in opened(f"{tmp_path}/{root}/{data}").files] for root in ("one", "two")]
        assert keys == [["a/x.parquet"], ["a/x.parquet"]]
    both = opened([f"{tmp_path}/one/in/a/x.parquet", f"{tmp_path}/two/in/a/x.parquet"])
    assert len({file.key for file in both.files}) == 2


def test_remote_urls(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    for name in ("a.parquet", "b.parquet"):
        with fs.open(f"/box/{name}", "wb") as file:
            pq.write_table(pa.table({"a": [name]}), file)
    assert everything(opened("memory://box/*.parquet")) == [{"a": "a.parquet"}, {"a": "b.parquet"}]
    assert everything(opened("memory://box/b.parquet")) == [{"a": "b.parquet"}]
    with fs.open("/box/c.jsonl", "wb") as file:
        file.write(b'{"a": "c"}\n')
    assert everything(opened("memory://box/c.jsonl")) == [{"a": "c"}]


def test_what_a_job_writes_itself_is_not_its_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    part, metrics = "part-00000-of-00001.parquet", "metrics.parquet"
    theirs = ["a.parquet", metrics, f"other/{part}", "out/b.parquet", f"out/deep/{part}"]
    for name in (*theirs, f"out/{part}", f"out/{metrics}", "out/report.html"):
        parquet(Path(name), {"a": [name]})
    for data in (".", "**/*.parquet", str(tmp_path), f"file://{tmp_path}"):
        for output in ("out", "./out/", f"{tmp_path}/out", f"file://{tmp_path}/out"):
            source = open_input(data, InputKeys(format="parquet"), output)  # of any name, then
            assert sorted(row["a"] for row in everything(source)) == sorted(theirs)
    assert len(open_input(".", InputKeys(), "memory://out").files) == len(theirs) + 2
    assert everything(open_input(f"out/{part}", InputKeys(), "out")) == [{"a": f"out/{part}"}]  # asked for by its name


@pytest.mark.parametrize("data, line", [
    ("nowhere.parquet", "data=nowhere.parquet: no such file or folder"),
    ("promts.parquet", "data=promts.parquet: no such file or folder; did you mean prompts.parquet?"),
    ("a.csv,b.csv", "data=a.csv,b.csv: no such file or folder; a list is written 'data=[a.csv,b.csv]'"),
    ("no/*.parquet", "data=no/*.parquet: no file matches"),
    ("empty", "data=empty: the folder holds no .parquet, .jsonl, .csv or .tsv file"),
    ("zero.parquet", "zero.parquet: empty (0 bytes)"),
    ("cut.parquet", "cut.parquet: not a whole Parquet file ("),
    ("text.parquet", "text.parquet: not a whole Parquet file ("),
    ("norows.parquet", "data: norows.parquet holds no rows"),
    (["norows.parquet", "norows2.parquet"], "data: norows.parquet and the others hold no rows"),
    ("what.xyz", "data: what.xyz is not .parquet, .jsonl, .csv or .tsv; say which it is with input.format=..."),
    ("bad.jsonl", "bad.jsonl, line 3: not JSON ("),
    ("array.jsonl", "array.jsonl, line 1: not a JSON object"),
    ("drift.jsonl", "drift.jsonl, line 3: column a holds text here and a number before; make it one type"),
    ("latin.csv", "latin.csv: not CSV in UTF-8 ("),
    ("ragged.csv", "ragged.csv: not CSV in UTF-8 (CSV parse error: Row #3: Expected 2 columns, got 3: 1,2,3); is input.delimi"),
    (["prompts.parquet", "other.parquet"], "prompts.parquet: has no column b, which other.parquet has; it has a"),
    (["prompts.parquet", "text_a.parquet"], "text_a.parquet: column a is string, but int64 in prompts.parquet"),
    (["prompts.parquet", "prompts.parquet"], "two input files have the same name"),
    (["twice.parquet"], "twice.parquet: has 2 columns named a; give each a name of its own"),
    ("twice.csv", "twice.csv: has 2 columns named a; give each a name of its own"),
    ("unnamed.csv", "unnamed.csv: has 2 columns named ''; give each a name of its own"),
    (["large.parquet", "fraction.parquet"], "large.parquet: column a holds what does not fit double ("),
    (["large.jsonl", "fraction.jsonl"], "large.jsonl: column a holds what does not fit double ("),
    ("nosuch://x/y", "data=nosuch://x/y: "),
    ([], "data: give a path"),
    ("dangling", "data=dangling: cannot be read (No such file or directory"),
])  # fmt: skip
def test_a_bad_input_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Any, line: str) -> None:
    monkeypatch.chdir(tmp_path)
    whole = parquet(tmp_path / "prompts.parquet", {"a": [1, 2]}).read_bytes()
    Path("cut.parquet").write_bytes(whole[: len(whole) // 2])
    Path("text.parquet").write_text("hello, this is not Parquet at all")
    Path("zero.parquet").touch()
    Path("empty").mkdir()
    for name in ("norows", "norows2"):
        parquet(Path(f"{name}.parquet"), {"a": pa.array([], pa.int64())})
    parquet(Path("other.parquet"), {"a": [1], "b": [1]})
    parquet(Path("text_a.parquet"), {"a": ["x"]})
    Path("what.xyz").write_text("x")
    Path("bad.jsonl").write_text('{"a": 1}\n\n{"a": \n')
    Path("array.jsonl").write_text("[1]\n")
    Path("drift.jsonl").write_text('{"a": 1}\n{"a": 2.5}\n{"a": "x"}\n')
    Path("latin.csv").write_bytes("a,b\n1,é\n".encode("latin-1"))
    Path("ragged.csv").write_text("a,b\n1,2\n1,2,3\n")
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), "twice.parquet")
    Path("twice.csv").write_text("a,a\n1,2\n")
    Path("unnamed.csv").write_text("a,,\n1,2,3\n")
    parquet(Path("large.parquet"), {"a": [1, 2**60 + 1]})
    parquet(Path("fraction.parquet"), {"a": [1.5]})
    Path("large.jsonl").write_text(f'{{"a": {2**53 + 1}}}\n')
    Path("fraction.jsonl").write_text('{"a": 1.5}\n')
    Path("dangling").mkdir()
    Path("dangling/x.parquet").symlink_to("gone.parquet")
    with pytest.raises(ConfigError) as caught:
        make_plan(opened(data).files, 10)
    assert str(caught.value).replace(f"{tmp_path}/", "").startswith(line), str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_of_an_object_stores_own_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoCredentials(Exception): ...

    def isdir(self: Any, path: str) -> bool:
        raise NoCredentials("there are none\nanywhere")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "isdir", isdir)
    with pytest.raises(ConfigError) as caught:
        opened("memory://box/x.csv")
    assert str(caught.value) == "data=memory://box/x.csv: cannot be read (NoCredentials: there are none)"


# --- what is read ---


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "saved"])
def test_rows_come_back_whatever_the_shards(tmp_path: Path, kind: str, backwards: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "CHUNK_ROWS", 5)
    monkeypatch.setattr(jsonl, "BLOCK", 100)
    monkeypatch.setattr(jsonl, "CHUNK_ROWS", 5)
    monkeypatch.setattr(formats, "HF_GROUP", 11)
    rows = [{"id": str(i), "text": f'line {i}, "quoted"\nand more'} for i in range(50)]
    if kind == "parquet":
        data = parquet(tmp_path / "x.parquet", pa.Table.from_pylist(rows), row_group_size=13)
    elif kind == "jsonl":
        data = tmp_path / "x.jsonl"
        data.write_text("\n\n".join(json.dumps(row) for row in rows))
    elif kind == "csv":
        data = tmp_path / "x.csv"
        data.write_text("id,text\n" + "".join('{},"{}"\n'.format(row["id"], row["text"].replace('"', '""')) for row in rows))
    else:
        data = tmp_path / "saved"
        datasets.Dataset.from_list(rows).save_to_disk(data)
    source = opened(data)
    for rows_per_shard in (1, 7, 12, 50, 100):
        assert everything(source, rows_per_shard, backwards=backwards) == rows
    assert everything(source, 9, ["text"]) == [{"text": row["text"]} for row in rows]


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=30), min_size=1, max_size=40), st.integers(1, 60))
def test_jsonl_rows_come_back_whatever_the_blocks(tmp_path_factory: pytest.TempPathFactory, texts: list[str], block: int) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "x.jsonl"
    path.write_text("".join(json.dumps({"t": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8", newline="\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "BLOCK", block)
        source = opened(path)
        assert [row["t"] for row in everything(source)] == texts
        assert source.files[0].num_rows == len(texts)


def test_jsonl_types(tmp_path: Path) -> None:
    lines = [
        {"i": 1, "f": 1, "s": "2026-01-01", "b": True, "o": {"x": 1}, "l": [1, "a"], "n": None},
        {"f": 2.5, "o": {"y": None}, "l": None},
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = everything(opened(tmp_path / "x.jsonl"))
    assert rows[0] == {"i": 1, "f": 1.0, "s": "2026-01-01", "b": True, "o": '{"x":1}', "l": '[1,"a"]', "n": None}
    assert rows[1] == {"i": None, "f": 2.5, "s": None, "b": None, "o": '{"y":null}', "l": None, "n": None}


@pytest.mark.parametrize("values, line", [
    (["1", str(2**63)], f"line 3: column a holds {2**63}, which int64 cannot hold; write the column as text"),
    (["1", str(-(2**63) - 1)], f"line 3: column a holds {-(2**63) - 1}, which int64 cannot hold; write the column as text"),
    (["1", "1" * 30], f"line 3: column a holds {'1' * 30}, which int64 cannot hold; write the column as text"),
    (["1.5", str(2**53 + 1)], f"line 3: column a holds {2**53 + 1}, which loses digits beside the fractions of other rows"),
    ([str(2**60 + 1), "1.5"], f"line 1: column a holds {2**60 + 1}, which loses digits beside the fractions of other rows"),
    (["1.5", "1" * 30], f"line 3: column a holds {'1' * 30}, which loses digits beside the fractions of other rows"),
    (["1", "1" * 400], "line 3: not JSON (a number of 400 digits)"),
    (["1", "[" * 9999 + "]" * 9999], "line 3: not JSON (maximum recursion depth exceeded"),
    (["[]", "[" * 200 + "]" * 200], "line 3: lists and objects are nested more than 200 deep; write the column as text"),
    (["[]", '{"b":[' * 490 + '"\\ud800"' + "]}" * 490], "line 3: lists and objects are nested more than 200 deep"),
])  # fmt: skip
@pytest.mark.parametrize("block", [8 << 20, 10])
def test_jsonl_numbers_that_no_column_holds_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[str], line: str, block: int
) -> None:
    monkeypatch.setattr(jsonl, "BLOCK", block)
    (tmp_path / "x.jsonl").write_text("\n\n".join(f'{{"a": {value}}}' for value in values))
    with pytest.raises(ConfigError) as caught:
        opened(tmp_path / "x.jsonl")
    assert str(caught.value).startswith(f"{tmp_path}/x.jsonl, {line}")


def test_jsonl_may_be_nested_and_wide(tmp_path: Path) -> None:
    values = ["[" * 199 + '"\\ud800"' + "]" * 199, json.dumps([[]] * 1000), "[" * 199 + "1" * 30 + "]" * 199,
              '"' + "[" * 1000 + '"']
    lines = [f'{{"{key}": {value}}}' for key, value in zip("abcd", values, strict=True)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    rows = everything(opened(tmp_path / "x.jsonl"))
    assert rows[0]["a"] == values[0].replace("\\ud800", "�")
    assert rows[1]["b"] == values[1].replace(" ", "")
    assert (rows[2]["c"], rows[3]["d"]) == (values[2], "[" * 1000)


def test_jsonl_numbers_keep_every_digit(tmp_path: Path) -> None:
    lines = [f'{{"i": {-(2**63)}, "f": 0.5, "o": {{"x": {2**64}}}, "t": "{2**70}"}}',
             f'{{"i": {2**63 - 1}, "f": {2**70}, "o": [{-(2**63) - 1}, "\\ud800"], "t": ""}}', '{"f": 1e300}']  # fmt: skip
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    rows = everything(opened(tmp_path / "x.jsonl"))
    assert rows[0] == {"i": -(2**63), "f": 0.5, "o": f'{{"x":{2**64}}}', "t": str(2**70)}
    assert rows[1] == {"i": 2**63 - 1, "f": float(2**70), "o": f'[{-(2**63) - 1},"�"]', "t": ""}
    assert rows[2]["f"] == 1e300


def test_jsonl_files_agree_on_types_that_json_leaves_open(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": 1, "y": null}\n')
    (tmp_path / "b.jsonl").write_text('{"x": 1.5, "y": "t"}\n')
    assert everything(opened(tmp_path)) == [{"x": 1.0, "y": None}, {"x": 1.5, "y": "t"}]


def test_a_column_may_be_null_in_some_files_and_never_in_others(tmp_path: Path) -> None:
    for name, values, nullable in (("a", [1], False), ("b", [None], True), ("c", [0.5], False)):
        kind = pa.float64() if name == "c" else pa.int64()
        parquet(tmp_path / f"{name}.parquet", pa.table([values], schema=pa.schema([pa.field("x", kind, nullable)])))
    source = opened(tmp_path)
    assert everything(source) == [{"x": 1.0}, {"x": None}, {"x": 0.5}]
    assert source.schema.field("x").nullable


def test_csv_is_taken_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('id,text\n007,""\n1e5,\n')
    assert everything(opened(tmp_path / "x.csv")) == [{"id": "007", "text": ""}, {"id": "1e5", "text": None}]


@pytest.mark.parametrize("name, text, keys", [
    ("x.tsv", 'id\ttext\n1\t"a\tb, ""c"""\n', {}),
    ("x.TSV", 'id\ttext\n1\t"a\tb, ""c"""\n', {}),
    ("x.csv", 'id;text\n1;"a\tb, ""c"""\n', {"delimiter": ";"}),
    ("x.csv", 'id\ttext\n1\t"a\tb, ""c"""\n', {"delimiter": "tab"}),
    ("x.tsv", 'id|text\n1|"a\tb, ""c"""\n', {"delimiter": "|"}),
    ("x.txt", 'id;text\n1;"a\tb, ""c"""\n', {"delimiter": ";", "format": "csv"}),
    ("x.csv", "id,text\n1,'a\tb, \"c\"'\n", {"quote": "'"}),
    ("x.csv", 'id|text\n1|a\tb, "c"\n', {"delimiter": "|", "quote": "none"}),
])  # fmt: skip
def test_what_stands_between_the_fields_of_csv(tmp_path: Path, name: str, text: str, keys: dict[str, str]) -> None:
    (tmp_path / name).write_text(text)
    source = opened(tmp_path / name, **keys)
    assert everything(source) == [{"id": "1", "text": 'a\tb, "c"'}]
    assert source.files[0].num_rows == 1


def test_quotes_that_are_text_need_not_be_closed(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text('id\ttext\n1\t"Who is it?\n2\tMe\n')
    assert everything(opened(tmp_path / "x.tsv", quote="none")) == [{"id": "1", "text": '"Who is it?'}, {"id": "2", "text": "Me"}]
    with pytest.raises(ConfigError, match=r"x\.tsv: a quote that opens in row 1, .* never closed; .* input\.quote=none"):
        opened(tmp_path / "x.tsv")


def test_csv_fields_may_be_long_but_a_quote_must_be_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"id": str(i), "text": "line\n" * (60_000 if i in (0, 300, 301) else 1)} for i in range(600)]
    path = tmp_path / "x.csv"
    path.write_text("id,text\n" + "".join(f'{row["id"]},"{row["text"]}"\n' for row in rows))
    monkeypatch.setattr(csv, "BLOCK", 1 << 10)
    assert everything(opened(path), 250, backwards=True) == rows
    monkeypatch.setattr(csv, "LARGEST_BLOCK", 1 << 16)
    with pytest.raises(ConfigError, match=r"x.csv: a row is longer than 0 MiB, which a quote that is never closed also looks"):
        opened(path)


@pytest.mark.parametrize("text, closed", [
    ('id,text\n1,"open\n2,b\n', False), ('id,text\r\n1,"open\r\n2,b', False), ('id,text\n1,"an ""open""\nb', False),
    ('id,text\n1,"two\nlines"\n', True), ('id,text\n1,"two\nlines\n"\n\n', True), ('id,text\n1,"two\nlines"', True),
    ('id,text\n1,"two\nlines" \n', True), ('id,text\n1,a 5" pipe\n2,b\n', True), ('text\n"two\nlines"\nlines\n', True),
])  # fmt: skip
def test_a_csv_file_that_ends_within_a_quote_is_refused(tmp_path: Path, text: str, closed: bool) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(text.encode())
    if closed:
        opened(path)
    else:
        with pytest.raises(ConfigError, match=r"x.csv: a quote that opens in row 1, the last, is never closed; mend it"):
            opened(path)


def test_dictionaries_differ_from_file_to_file(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", {"c": pa.array(["x", "y"]).dictionary_encode()})
    parquet(tmp_path / "b.parquet", {"c": pa.array(["z"])})
    assert everything(opened(tmp_path)) == [{"c": c} for c in "xyz"]


def test_types_that_parquet_has_not_are_read_as_those_it_has() -> None:
    at, zoned = pa.timestamp("s"), pa.timestamp("s", "Europe/Berlin")
    word = pa.dictionary(pa.int32(), pa.string())
    schema = pa.schema([
        ("at", at), ("zoned", zoned), ("time", pa.time32("s")), ("day", pa.date64()), ("list", pa.list_(at)),
        ("large", pa.large_list(pa.date64())), ("pair", pa.list_(zoned, 2)), ("struct", pa.struct([("at", at), ("word", word)])),
        ("map", pa.map_(at, pa.struct([("times", pa.list_(pa.time32("s")))]))),
    ])  # fmt: skip
    rows = [{"at": 1, "zoned": 2, "time": 3, "day": 86_400_000, "list": [4, None], "large": [0], "pair": [5, 6],
             "struct": {"at": 7, "word": "w"}, "map": [(8, {"times": [9]})]}, dict.fromkeys(schema.names)]  # fmt: skip
    table = pa.table({field.name: pa.array([row[field.name] for row in rows], field.type) for field in schema})
    kept = formats.plain_schema(schema)
    OutputLayout.make(kept)  # refuses what does not come back from a part as it was
    assert formats.cast(table, kept, "x").to_pylist() == table.to_pylist()
    assert [str(kept.field(name).type) for name in ("zoned", "time", "day")] == [
        "timestamp[ms, tz=Europe/Berlin]", "time32[ms]", "date32[day]"]  # fmt: skip


def test_times_of_a_dataset_come_through(tmp_path: Path) -> None:
    seconds, times = pa.timestamp("s"), [datetime.datetime(2024, 1, 2, 3, 4, 5), None]
    table = pa.table({"a": [1, 2], "at": pa.array(times, seconds), "all": pa.array([times, None], pa.list_(seconds))})
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    source = opened(tmp_path / "saved")
    OutputLayout.make(source.schema)
    assert everything(source) == table.to_pylist()


def test_a_value_that_no_longer_fits_names_its_column() -> None:
    table = pa.table({"a": [1], "at": pa.array([2**62], pa.timestamp("s"))})
    reader = formats.HfReader(datasets.Dataset(table), "saved", "1")
    with pytest.raises(ConfigError, match=r"^saved: column at holds what does not fit timestamp\[ms\] \("):
        list(reader.rows(0, ["a", "at"]))


def test_text_that_is_not_unicode_is_repaired_once(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"a": "fine"}\n{"a": "lone \\ud800 surrogate"}\n{"a": "bad \xff byte"}\n')
    source = opened(tmp_path / "x.jsonl")
    chunk = next(source.cursor().read(make_plan(source.files, 10).shards[0]))
    assert chunk.table.column("a").to_pylist() == ["fine", "lone � surrogate", "bad � byte"]
    assert chunk.repaired == {1, 2}

    raw = pa.array([b"fine", b"lone \xed\xa0\x80 surrogate", None], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    nested = pa.ListArray.from_arrays([0, 1, 2, 3], pa.StructArray.from_arrays([text, text], names=["role", "content"]))
    parquet(tmp_path / "x.parquet", pa.table({"a": text, "m": nested}))
    source = opened(tmp_path / "x.parquet")
    chunk = next(source.cursor().read(make_plan(source.files, 10).shards[0]))
    assert chunk.table.column("a").to_pylist() == ["fine", "lone ��� surrogate", None]
    assert chunk.table.column("m").to_pylist()[1][0]["content"] == "lone ��� surrogate"
    assert chunk.repaired == {1}


def test_a_saved_dataset_has_splits(tmp_path: Path) -> None:
    splits = {name: datasets.Dataset.from_dict({"a": [a]}) for name, a in (("train", 1), ("test", 2))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "d")
    assert everything(opened(tmp_path / "d", split="test")) == [{"a": 2}]
    with pytest.raises(ConfigError, match=r"input.split=dev: .* has train, test"):
        opened(tmp_path / "d", split="dev")


def test_a_hub_dataset_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("no route to the hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        ConfigError, match=r"data=hf://org/name: the dataset cannot be loaded \(ConnectionError: no route to the hub\)$"
    ):
        opened("hf://org/name")


def test_a_hub_dataset_is_read_by_split_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(path: str, **kwargs: Any) -> Any:
        asked.append((path, kwargs))
        return datasets.Dataset.from_dict({"a": list(range(20))}).filter(lambda row: row["a"] % 2)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert everything(opened("hf://org/name@v2", split="test", subset="en")) == [{"a": a} for a in range(1, 20, 2)]
    assert asked == [("org/name", {"name": "en", "split": "test", "revision": "v2"})]


# --- what changes under our feet ---


@pytest.mark.parametrize("change", ["replaced", "gone", "damaged"])
def test_a_file_that_changes_after_planning_is_noticed(tmp_path: Path, change: str) -> None:
    path = parquet(tmp_path / "x.parquet", {"a": list(range(1000))}, compression="none", use_dictionary=False)
    source = opened(path)
    shard = make_plan(source.files, 5000).shards[0]
    if change == "replaced":
        parquet(path, {"a": list(range(1, 1001))})
    elif change == "gone":
        path.unlink()
    else:
        raw = bytearray(path.read_bytes())
        raw[4:60] = b"\xff" * 56
        path.write_bytes(raw)
    with pytest.raises(
        ConfigError, match={"replaced": "has changed", "gone": "gone since", "damaged": "row group 0 is damaged"}[change]
    ):
        list(source.cursor().read(shard))


def test_chunks_are_small_whatever_the_row_group(tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", {"a": ["x" * 1000] * 20_000}, row_group_size=20_000)
    source = opened(path)
    chunks = source.cursor().read(make_plan(source.files, 20_000).shards[0])
    assert max(chunk.table.num_rows for chunk in chunks) <= formats.CHUNK_ROWS
