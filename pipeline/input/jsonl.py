"""JSONL: one JSON object a line."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import orjson
import pyarrow as pa

from pipeline.exits import ConfigError
from pipeline.input.formats import CHUNK_ROWS, JSON_TEXT, Chunk, Scan, first_line, select

BLOCK = 8 << 20    # bytes; the lines that start in one block are a row group, so that any is reached by a seek
_MOST_NESTED = 200  # objects and lists within each other; Python's own stack ends at some hundreds
_DIGITS = bytes.maketrans(b"123456789", b"0" * 9)
_LONG, _LOW = b"0" * 20, b"-" + b"0" * 19  # with every digit a zero, the least that a whole number beyond 64 bits has
_MOST_DIGITS = 308  # of whole numbers that a double holds, if not to the last digit


class JsonlReader:
    """One JSON object a line; blank lines are skipped. A column is text, whole numbers, numbers or truth values, as its values
    are in the whole file; numbers that would lose digits are refused. Objects and lists are carried as JSON text: structs would
    give each row the keys of all others."""

    def __init__(self, handle: BinaryIO, name: str, stamp: str, scan: Scan | None = None) -> None:
        self._handle, self._name, self.version = handle, name, stamp
        self._size = handle.seek(0, io.SEEK_END)
        self.schema, self.row_groups = scan or self._scan()

    def _scan(self) -> Scan:
        kinds: dict[str, type] = {}
        misfits: dict[tuple[str, type], tuple[int, int]] = {}
        groups: list[int] = []
        line = 0
        for index in range(-(-self._size // BLOCK)):
            lines = self._block(index)
            rows, _ = self._parse(lines, line)
            self._widen(kinds, misfits, rows, [place for place in enumerate(lines, line + 1) if place[1].strip()])
            groups.append(len(rows))
            line += len(lines)
        for key, kind in kinds.items():
            if (key, kind) in misfits:
                number, value = misfits[key, kind]
                why = "which int64 cannot hold" if kind is int else "which loses digits beside the fractions of other rows"
                raise ConfigError(f"{self._name}, line {number}: column {key} holds {value}, {why}; write the column as text")
        return Scan(pa.schema([_jsonl_field(key, kind) for key, kind in kinds.items()]), tuple(groups))

    def rows(self, row_group: int, columns: Sequence[str]) -> Iterator[Chunk]:
        schema = select(self.schema, columns)
        exact = any(field.metadata == JSON_TEXT for field in schema)
        lines = [line for line in self._block(row_group) if line.strip()]
        for start in range(0, len(lines), CHUNK_ROWS):
            rows, repaired = self._parse(lines[start : start + CHUNK_ROWS], 0, exact)
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

    def _parse(self, lines: Sequence[bytes], before: int, exact: bool = False) -> tuple[list[dict[str, Any]], frozenset[int]]:
        """The rows, and which of them were repaired. `exact`: whole numbers beyond 64 bits, which orjson rounds, are kept."""
        rows: list[dict[str, Any]] = []
        repaired: list[int] = []
        for number, line in enumerate(lines, before + 1):
            try:
                row = orjson.loads(line)
                if exact and (_LONG in (digits := line.translate(_DIGITS)) or _LOW in digits):
                    row = self._exact(number, line)
            except orjson.JSONDecodeError:
                if not line.strip():
                    continue
                row = self._exact(number, line)
                repaired.append(len(rows))
            if not isinstance(row, dict):
                raise ConfigError(f"{self._name}, line {number}: not a JSON object")
            if len(line) > 2 * _MOST_NESTED and line.count(b"[") + line.count(b"{") > _MOST_NESTED and _is_deep(row):
                raise ConfigError(f"{self._name}, line {number}: lists and objects are nested more than {_MOST_NESTED} deep; "
                                  "write the column as text")
            rows.append(scrub(row) if repaired and repaired[-1] == len(rows) else row)
        return rows, frozenset(repaired)

    def _exact(self, number: int, line: bytes) -> Any:
        """A line with whole numbers of any size, lone surrogates, or bytes that are not UTF-8, which become U+FFFD. NaN and
        Infinity are let through as null."""
        try:
            return json.loads(line.decode("utf-8", "replace"), parse_constant=lambda _: None, parse_int=_whole)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{self._name}, line {number}: not JSON ({first_line(error)})") from None

    def _widen(self, kinds: dict[str, type], misfits: dict[tuple[str, type], tuple[int, int]], rows: list[dict[str, Any]],
               places: list[tuple[int, bytes]]) -> None:
        """Take the types of these rows, which stand in the lines `places`, into `kinds`: column -> str, int, float, bool, list
        (JSON text) or NoneType; and into `misfits`, by column and type, the line and value of the first whole number that a
        column of this type cannot hold."""
        for key in dict.fromkeys(key for row in rows for key in row):
            values = [row.get(key) for row in rows]
            if float in map(type, values):
                for index, value in enumerate(values):
                    if type(value) is float and not -(2**63) < value < 2**64:  # it may be a whole number that orjson has rounded
                        values[index] = self._exact(*places[index]).get(key, value)
            types = set(map(type, values))
            if int in types and max(abs(value) for value in values if type(value) is int) > 2**53:
                for kind, fits in _FITS.items():
                    for (number, _), value in zip(places, values, strict=True):
                        if (key, kind) not in misfits and type(value) is int and not fits(value):
                            misfits[key, kind] = number, value
            found = {list if kind is dict else kind for kind in types} | {kinds.get(key, type(None))}
            found.discard(type(None))
            if found == {int, float}:
                found = {float}
            if len(found) > 1:
                first = kinds.get(key) or type(next(value for value in values if value is not None))
                number, other = next(
                    (number, value)
                    for (number, _), value in zip(places, values, strict=True)
                    if value is not None
                    and type(value) is not first
                    and {type(value), first} != {int, float}
                    and not {type(value), first} <= {list, dict}
                )
                raise ConfigError(
                    f"{self._name}, line {number}: column {key} holds {_WORDS[type(other)]} here and "
                    f"{_WORDS[first]} before; make it one type"
                )
            kinds[key] = found.pop() if found else type(None)


_FITS: dict[type, Callable[[int], bool]] = {
    int: lambda value: -(2**63) <= value < 2**63,
    float: lambda value: float(value) == value,
}
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
        values = [None if value is None else _text(value) for value in values]
    elif pa.types.is_floating(field.type):
        values = [None if value is None else float(value) for value in values]
    return pa.array(values, field.type)


def _text(value: Any) -> str:
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # whole numbers beyond 64 bits, or very deep
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _is_deep(value: Any) -> bool:
    """Whether more than _MOST_NESTED lists and objects stand within each other; without recursion."""
    level = [value]
    for _ in range(_MOST_NESTED):
        inner = (item for node in level for item in (node.values() if isinstance(node, dict) else node))
        level = [item for item in inner if isinstance(item, (dict, list))]
        if not level:
            return False
    return True


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def scrub(value: Any) -> Any:
    """Lone surrogates, which Python's strings may hold and UTF-8 may not, as U+FFFD."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {scrub(key): scrub(item) for key, item in value.items()}
    return [scrub(item) for item in value] if isinstance(value, list) else value


def _no_columns(rows: int) -> pa.Table:
    return pa.table({"": pa.nulls(rows)}).select([])
