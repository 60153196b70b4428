"""One reader a file format: the file's schema and row groups, and the rows of a group in small chunks, with bounded memory."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, Protocol

import orjson
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from pipeline.exits import ConfigError

CHUNK_ROWS = 1024
JSONL_BLOCK = 8 << 20  # bytes; the lines that start in one block are a row group, so that any is reached by a seek
HF_GROUP = 8192  # rows
JSON_TEXT = {b"gristmill": b"json"}  # metadata of a column whose values are JSON as text


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive rows. `repaired`: rows of `table` in which text that was not Unicode stands as U+FFFD now."""

    table: pa.Table
    repaired: frozenset[int] = frozenset()


class Scan(NamedTuple):
    """What reading a whole file found out, for those who open it again."""

    schema: pa.Schema
    row_groups: tuple[int, ...]


class Reader(Protocol):
    """One file, opened for reading; not shared between threads. `version`: what changes when the file is replaced."""

    schema: pa.Schema
    row_groups: tuple[int, ...]
    version: str

    def rows(self, row_group: int, columns: Sequence[str]) -> Iterator[Chunk]:
        """The rows of a row group, from its start. Raises ConfigError where the file is damaged."""


class ParquetReader:
    """Its footer says all there is to know: `scan` and `stamp` are for formats without one."""

    def __init__(self, handle: BinaryIO, name: str, stamp: str, scan: Scan | None = None) -> None:
        self._name = name
        try:
            self._file = pq.ParquetFile(handle, pre_buffer=False)
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(f"{name}: not a whole Parquet file ({first_line(error)}); write it again or leave it out") from None
        meta = self._file.metadata
        self.schema = plain_schema(self._file.schema_arrow)
        self.row_groups = tuple(meta.row_group(index).num_rows for index in range(meta.num_row_groups))
        handle.seek(-8, io.SEEK_END)
        footer = int.from_bytes(handle.read(4), "little")
        handle.seek(-8 - footer, io.SEEK_END)
        self.version = hashlib.blake2b(handle.read(footer), digest_size=16).hexdigest()  # says more than a time: a copy keeps it

    def rows(self, row_group: int, columns: Sequence[str]) -> Iterator[Chunk]:
        schema = select(self.schema, columns)
        batches = self._file.iter_batches(CHUNK_ROWS, row_groups=[row_group], columns=list(columns), use_threads=False)
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError) as error:
                raise ConfigError(
                    f"{self._name}: row group {row_group} is damaged ({first_line(error)}); write the file again"
                ) from None
            if batch is None:
                return
            yield repair(pa.Table.from_batches([batch]).select(schema.names).cast(schema))


class JsonlReader:
    """One JSON object a line; blank lines are skipped. A column is text, whole numbers, numbers or truth values, as its values
    are in the whole file. Objects and lists are carried as JSON text: structs would give each row the keys of all others."""

    def __init__(self, handle: BinaryIO, name: str, stamp: str, scan: Scan | None = None) -> None:
        self._handle, self._name, self.version = handle, name, stamp
        self._size = handle.seek(0, io.SEEK_END)
        self.schema, self.row_groups = scan or self._scan()

    def _scan(self) -> Scan:
        kinds: dict[str, type] = {}
        groups: list[int] = []
        line = 0
        for index in range(-(-self._size // JSONL_BLOCK)):
            lines = self._block(index)
            rows, _ = self._parse(lines, line)
            self._widen(kinds, rows, line, lines)
            groups.append(len(rows))
            line += len(lines)
        return Scan(pa.schema([_jsonl_field(key, kind) for key, kind in kinds.items()]), tuple(groups))

    def rows(self, row_group: int, columns: Sequence[str]) -> Iterator[Chunk]:
        schema = select(self.schema, columns)
        lines = [line for line in self._block(row_group) if line.strip()]
        for start in range(0, len(lines), CHUNK_ROWS):
            rows, repaired = self._parse(lines[start : start + CHUNK_ROWS], 0)
            arrays = [_jsonl_array([row.get(field.name) for row in rows], field) for field in schema]
            yield Chunk(pa.Table.from_arrays(arrays, schema=schema) if arrays else _no_columns(len(rows)), repaired)

    def _block(self, index: int) -> list[bytes]:
        """The lines that start in bytes [index, index + 1) * JSONL_BLOCK."""
        start, end = index * JSONL_BLOCK, (index + 1) * JSONL_BLOCK
        self._handle.seek(max(start - 1, 0))
        if start:
            self._handle.readline()  # the rest of a line that started in an earlier block
            start = self._handle.tell()
        if start >= end:
            return []
        block = self._handle.read(end - start)
        if not block.endswith(b"\n"):
            block += self._handle.readline()
        if index == 0:
            block = block.removeprefix(b"\xef\xbb\xbf")
        return block.removesuffix(b"\n").split(b"\n") if block else []

    def _parse(self, lines: Sequence[bytes], before: int) -> tuple[list[dict[str, Any]], frozenset[int]]:
        rows: list[dict[str, Any]] = []
        repaired: list[int] = []
        for number, line in enumerate(lines, before + 1):
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError:
                if not line.strip():
                    continue
                row = self._lenient(line, number)
                repaired.append(len(rows))
            if not isinstance(row, dict):
                raise ConfigError(f"{self._name}, line {number}: not a JSON object")
            rows.append(row)
        return rows, frozenset(repaired)

    def _lenient(self, line: bytes, number: int) -> Any:
        """A line with lone surrogates or bytes that are not UTF-8, repaired. NaN and Infinity are let through as null."""
        try:
            return scrub(json.loads(line.decode("utf-8", "replace"), parse_constant=lambda _: None))
        except ValueError as error:
            raise ConfigError(f"{self._name}, line {number}: not JSON ({first_line(error)})") from None

    def _widen(self, kinds: dict[str, type], rows: list[dict[str, Any]], before: int, lines: Sequence[bytes]) -> None:
        """Take the types of these rows into `kinds`: column -> str, int, float, bool, list (JSON text) or NoneType."""
        for key in dict.fromkeys(key for row in rows for key in row):
            found = {list if kind is dict else kind for kind in {type(row.get(key)) for row in rows}} | {
                kinds.get(key, type(None))
            }
            found.discard(type(None))
            if found == {int, float}:
                found = {float}
            if len(found) > 1:
                numbers = [n for n, line in enumerate(lines, before + 1) if line.strip()]
                first = kinds.get(key) or type(next(row[key] for row in rows if row.get(key) is not None))
                number, other = next(
                    (n, row[key])
                    for n, row in zip(numbers, rows, strict=True)
                    if row.get(key) is not None
                    and type(row[key]) is not first
                    and {type(row[key]), first} != {int, float}
                    and not {type(row[key]), first} <= {list, dict}
                )
                raise ConfigError(
                    f"{self._name}, line {number}: column {key} holds {_WORDS[type(other)]} here and "
                    f"{_WORDS[first]} before; make it one type"
                )
            kinds[key] = found.pop() if found else type(None)


_WORDS = {
    str: "text",
    int: "a number",
    float: "a number",
    bool: "true or false",
    list: "a list or an object",
    dict: "a list or an object",
}


def _jsonl_field(name: str, kind: type) -> pa.Field:
    types = {int: pa.int64(), float: pa.float64(), bool: pa.bool_(), type(None): pa.null()}
    return pa.field(name, types.get(kind, pa.string()), metadata=JSON_TEXT if kind is list else None)


def _jsonl_array(values: list[Any], field: pa.Field) -> pa.Array:
    if field.metadata == JSON_TEXT:
        values = [None if value is None else orjson.dumps(value).decode() for value in values]
    return pa.array(values, field.type)


class CsvReader:
    """A header line, then rows. Every column is text as it stands: guessed types would lose leading zeros. An empty field is
    null, an empty pair of quotes is empty text."""

    def __init__(self, handle: BinaryIO, name: str, stamp: str, scan: Scan | None = None) -> None:
        self._handle, self._name, self.version = handle, name, stamp
        if scan is not None:
            self.schema, self.row_groups = scan
            return
        with self._open({}) as reader:
            self.schema = pa.schema([(column, pa.string()) for column in reader.schema.names])
        self.row_groups = (sum(chunk.table.num_rows for chunk in self.rows(0, self.schema.names)),)

    def rows(self, row_group: int, columns: Sequence[str]) -> Iterator[Chunk]:
        reader = self._open(dict.fromkeys(self.schema.names, pa.string()))
        schema = select(self.schema, columns)
        while True:
            try:
                batch = reader.read_next_batch()
            except StopIteration:
                return
            except pa.ArrowException as error:
                raise ConfigError(f"{self._name}: not CSV in UTF-8 ({first_line(error)})") from None
            yield Chunk(pa.Table.from_batches([batch]).select(schema.names))

    def _open(self, types: dict[str, pa.DataType]) -> pyarrow.csv.CSVStreamingReader:
        self._handle.seek(0)
        try:
            return pyarrow.csv.open_csv(
                # The reader closes what it is given, and the file is read more than once.
                pa.PythonFile(_Unclosed(self._handle), "rb"),
                pyarrow.csv.ReadOptions(use_threads=False, block_size=1 << 20),
                pyarrow.csv.ParseOptions(newlines_in_values=True),
                pyarrow.csv.ConvertOptions(
                    column_types=types, null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False
                ),
            )
        except pa.ArrowException as error:
            raise ConfigError(f"{self._name}: not CSV in UTF-8 ({first_line(error)})") from None


class HfReader:
    """A split of a Hugging Face dataset: memory-mapped Arrow, so any range is at hand."""

    def __init__(self, dataset: Any, name: str, version: str) -> None:
        self._data, self._name, self.version = dataset.with_format("arrow"), name, version
        self.schema = plain_schema(dataset.features.arrow_schema)
        self.row_groups = tuple(min(HF_GROUP, len(dataset) - start) for start in range(0, len(dataset), HF_GROUP))

    def rows(self, row_group: int, columns: Sequence[str]) -> Iterator[Chunk]:
        schema = select(self.schema, columns)
        first = row_group * HF_GROUP
        for start in range(first, first + self.row_groups[row_group], CHUNK_ROWS):
            table = self._data[start : min(start + CHUNK_ROWS, first + self.row_groups[row_group])]
            yield repair(table.select(schema.names).cast(schema))


class _Unclosed(io.RawIOBase):
    def __init__(self, handle: BinaryIO) -> None:
        self._handle = handle

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self._handle.read(size)


def select(schema: pa.Schema, columns: Sequence[str]) -> pa.Schema:
    return pa.schema([schema.field(name) for name in columns])


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """Without dictionaries (files have different ones) and views, which change how values are stored and not what they are."""
    return pa.schema([pa.field(field.name, plain(field.type), field.nullable) for field in schema])


def plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return plain(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.binary()
    return kind


def repair(table: pa.Table) -> Chunk:
    """Replace text that is not UTF-8, lone surrogates too, by U+FFFD: Parquet may hold it, and all that follows would fail."""
    try:
        table.validate(full=True)
        return Chunk(table)
    except pa.ArrowInvalid:
        pass
    hit: set[int] = set()
    columns = []
    for column in table.columns:
        array = column.combine_chunks()
        array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
        try:
            array.validate(full=True)
        except pa.ArrowInvalid:
            hit.update(row for row in range(len(array)) if not _is_valid(array.slice(row, 1)))
            array = _repaired(array)
        columns.append(array)
    return Chunk(pa.Table.from_arrays(columns, schema=table.schema), frozenset(hit))


def _is_valid(array: pa.Array) -> bool:
    try:
        pa.concat_arrays([array]).validate(full=True)
        return True
    except pa.ArrowInvalid:
        return False


def _repaired(array: pa.Array) -> pa.Array:
    kind = array.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        values = array.cast(pa.large_binary()).to_pylist()
        return pa.array([None if value is None else value.decode("utf-8", "replace") for value in values], kind)
    if pa.types.is_struct(kind):
        return pa.StructArray.from_arrays(
            [_repaired(array.field(i)) for i in range(kind.num_fields)], fields=list(kind), mask=array.is_null()
        )
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        array = pa.concat_arrays([array])
        return type(array).from_arrays(array.offsets, _repaired(array.values), type=kind, mask=array.is_null())
    return array


def scrub(value: Any) -> Any:
    """Lone surrogates, which Python's strings may hold and UTF-8 may not, as U+FFFD."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {scrub(key): scrub(item) for key, item in value.items()}
    return [scrub(item) for item in value] if isinstance(value, list) else value


def _no_columns(rows: int) -> pa.Table:
    return pa.table({"": pa.nulls(rows)}).select([])


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
