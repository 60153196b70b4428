"""What a reader of a file is, and those of Parquet and of Hugging Face datasets; see jsonl.py and csv.py for the others."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.exits import ConfigError

CHUNK_ROWS = 1024
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
        check_names(name, self._file.schema_arrow.names)
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
            yield repair(cast(pa.Table.from_batches([batch]).select(schema.names), schema, self._name))


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
            yield repair(cast(table.select(schema.names), schema, self._name))


def check_names(name: str, columns: Sequence[str]) -> None:
    """Raises ConfigError where two columns of the file `name` have one name."""
    for column, count in Counter(columns).items():
        if count > 1:
            raise ConfigError(f"{name}: has {count} columns named {column or repr(column)}; give each a name of its own")


def select(schema: pa.Schema, columns: Sequence[str]) -> pa.Schema:
    return pa.schema([schema.field(name) for name in columns])


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """Without dictionaries (files have different ones) and views, which change how values are stored and not what they are, and
    without the types that Parquet has not: they would come back from a part as others."""
    kinds = [(field.type, plain(field.type)) for field in schema]
    # Of equal types the file's own: they may differ in names that do not count, and the fingerprint of an output holds those too.
    kept = [own if own == kind else kind for own, kind in kinds]
    return pa.schema([pa.field(field.name, kind, field.nullable) for field, kind in zip(schema, kept, strict=True)])


def plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return plain(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_timestamp(kind) and kind.unit == "s":
        return pa.timestamp("ms", kind.tz)
    if pa.types.is_time32(kind):
        return pa.time32("ms")
    if pa.types.is_date64(kind):  # whole days, counted in milliseconds
        return pa.date32()
    if pa.types.is_list(kind):
        return pa.list_(_plain_field(kind.value_field))
    if pa.types.is_large_list(kind):
        return pa.large_list(_plain_field(kind.value_field))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_plain_field(kind.value_field), kind.list_size)
    if pa.types.is_struct(kind):
        return pa.struct([_plain_field(field) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(_plain_field(kind.key_field), _plain_field(kind.item_field), kind.keys_sorted)
    return kind


def _plain_field(field: pa.Field) -> pa.Field:
    return field.with_type(plain(field.type))


def cast(table: pa.Table, schema: pa.Schema, name: str) -> pa.Table:
    """`table`, a part of the file `name`, with the types of `schema`. Raises ConfigError naming the column that loses values."""
    try:
        return table.cast(schema)
    except pa.ArrowInvalid as error:
        for field in schema:
            try:
                table.column(field.name).cast(field.type)
            except pa.ArrowInvalid as lost:
                raise ConfigError(f"{name}: column {field.name} holds what does not fit {field.type} ({first_line(lost)}); "
                                  "write it as one type, or as text") from None
        raise ConfigError(f"{name}: {first_line(error)}") from None


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


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
