"""JSONL: one JSON object a line."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import orjson
import pyarrow as pa

from pipeline.exits import ConfigError
from pipeline.input.formats import CHUNK_ROWS, JSON_TEXT, Chunk, Scan, first_line, select

BLOCK = 8 << 20    # bytes; the lines that start in one block are a row group, so that any is reached by a seek


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
        for index in range(-(-self._size // BLOCK)):
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
        """The lines that start in bytes [index, index + 1) * BLOCK."""
        start, end = index * BLOCK, (index + 1) * BLOCK
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


def scrub(value: Any) -> Any:
    """Lone surrogates, which Python's strings may hold and UTF-8 may not, as U+FFFD."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {scrub(key): scrub(item) for key, item in value.items()}
    return [scrub(item) for item in value] if isinstance(value, list) else value


def _no_columns(rows: int) -> pa.Table:
    return pa.table({"": pa.nulls(rows)}).select([])
