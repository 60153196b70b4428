"""A small run for tests of the output: Parquet input, the plan of it, made-up results, and what a reader must find afterwards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.input.plan import InputFile, Plan, Shard, make_plan, row_id
from pipeline.output.layout import OutputLayout
from pipeline.output.rows import RowResult, Status
from pipeline.output.run_folder import RunFolder

SCHEMA = pa.schema([("prompt", pa.large_string()), ("gold", pa.int64())])
LAYOUT = OutputLayout.make(SCHEMA, {"properties": {"label": {"enum": ["even", "odd"]}, "length": {"type": "integer"}}})
FINGERPRINT = {"model": "made-up", "sampling.temperature": "0.0"}


def write_input(folder: Path, rows: int = 100, files: int = 2, row_group: int = 20) -> list[InputFile]:
    """`rows` rows over `files` Parquet files."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        mine = range(rows * number // files, rows * (number + 1) // files)
        table = pa.table({"prompt": [f"prompt {row}" for row in mine], "gold": list(mine)}, SCHEMA)
        pq.write_table(table, folder / f"in-{number}.parquet", row_group_size=row_group)
    return found(folder)


def found(folder: Path) -> list[InputFile]:
    """What the folder holds now."""
    files = []
    for path in sorted(folder.glob("*.parquet")):
        meta = pq.read_metadata(path)
        groups = tuple(meta.row_group(i).num_rows for i in range(meta.num_row_groups))
        version = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        files.append(InputFile(path.name, str(path), meta.num_rows, path.stat().st_size, version, groups))
    return files


def tables(plan: Plan, shard: Shard) -> Iterator[pa.Table]:
    for piece in shard.pieces:
        with pq.ParquetFile(plan.file[piece.file].uri) as file:
            yield file.read_row_group(piece.row_group).slice(piece.offset, piece.num_rows)


def make_result(row: int, id: str) -> RowResult:
    """Depends on the row id alone, like a real row's: some rows fail, some have three samples."""
    number = int(id[:8], 16)
    if number % 10 == 0:
        return RowResult(row, status=Status.PROMPT_NULL, error="the prompt is null")
    json = f'{{"label": "{("even", "odd")[number % 2]}", "length": {number % 7}}}'
    return RowResult(row, text=json, json=json, finish_reason="stop", prompt_tokens=number % 50, completion_tokens=8)


def make_results(shard: Shard) -> Iterator[RowResult]:
    """All results of a shard, in an order that is not the rows'."""
    ids = list(shard.row_ids())
    for row in sorted(range(len(ids)), key=lambda row: ids[row]):
        samples = 3 if ids[row].endswith("0") else 1
        for sample in range(samples):
            result = make_result(row, ids[row])
            result.sample, result.samples = sample, samples
            yield result


def open_folder(out: Path | str, files: list[InputFile], rows_per_shard: int = 30, **kwargs) -> RunFolder:
    return RunFolder.open(str(out), FINGERPRINT, make_plan(files, rows_per_shard), LAYOUT, **kwargs)


def fill(folder: RunFolder, shard: Shard) -> bool:
    """Compute what is not recovered, and commit."""
    writer = folder.open_shard(shard)
    for result in make_results(shard):
        if (result.row, result.sample) not in writer.recovered():
            writer.append(result)
    return writer.commit(tables(folder.plan, shard))


def parts(out: Path) -> list[Path]:
    """What a Parquet reader takes for data."""
    return sorted(path for path in out.glob("*.parquet") if not path.name.startswith(("_", ".")))


def assert_whole(out: Path, files: list[InputFile]) -> None:
    """Every planned (row, sample) exactly once, in order, beside its own input, with the result that belongs to it."""
    table = pa.concat_tables([pq.read_table(path) for path in parts(out)])
    expected = []
    for file in sorted(files, key=lambda file: file.key):
        gold = pq.read_table(file.uri).column("gold").to_pylist()
        for row in range(file.num_rows):
            id = row_id(file.key, row)
            for sample in range(3 if id.endswith("0") else 1):
                result = make_result(0, id)
                expected.append((gold[row], id, sample, str(result.status), result.json))
    columns = ["gold", "row_id", "sample", "status", "json"]
    assert list(zip(*(table.column(name).to_pylist() for name in columns), strict=True)) == expected


def contents(path: Path) -> tuple[bytes, dict[bytes, bytes]]:
    """A part but for what two attempts do not share: its data pages byte for byte, and its footer without the attempt."""
    data = path.read_bytes()
    footer = int.from_bytes(data[-8:-4], "little")
    values = dict(pq.read_metadata(path).metadata)
    del values[b"gristmill.attempt"]
    return data[: -8 - footer], values
