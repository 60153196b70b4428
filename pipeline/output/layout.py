"""The columns of a part: every input column, in input order, the results, then (flatten) the schema's top-level properties."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.exits import ConfigError
from pipeline.input.formats import first_line
from pipeline.output.flat import Flat
from pipeline.output.rows import RowResult

RESULTS = pa.schema(
    [
        ("row_id", pa.string()),
        ("sample", pa.int32()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("text", pa.string()),
        ("json", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("cached_tokens", pa.int32()),
        ("completion_tokens", pa.int32()),
    ]
)
TOOL_CALLS = pa.field("tool_calls", pa.string())


@dataclass(frozen=True)
class OutputLayout:
    """`input`: the input's own schema. `schema`: the whole of a part. `renamed`: input column or property -> its column, where
    that has another name. `flat`: property -> column."""

    input: pa.Schema
    schema: pa.Schema
    renamed: Mapping[str, str]
    flat: Mapping[str, Flat]
    tool_calls: bool

    @classmethod
    def make(cls, input_schema: pa.Schema, flatten: Mapping[str, Any] | None = None, tool_calls: bool = False) -> OutputLayout:
        """`flatten`: the JSON schema whose top-level properties become columns (None: none); `tool_calls`: add that column.

        An input column named like a result is renamed `input_<name>`; a property named like a column before it, `json_<name>`.
        Raises ConfigError on an input that no Parquet file can hold.
        """
        twice = {name for name in input_schema.names if input_schema.names.count(name) > 1}
        if twice:
            raise ConfigError(f"the input has two columns named {min(twice)}: rename one")
        results = [*RESULTS, TOOL_CALLS] if tool_calls else list(RESULTS)
        taken = {field.name for field in results} | set(input_schema.names)
        renamed: dict[str, str] = {}
        for name in input_schema.names:
            if name in RESULTS.names or (tool_calls and name == TOOL_CALLS.name):
                renamed[name] = _free(name, "input_", taken)
        fields = [pa.field(renamed.get(field.name, field.name), field.type, field.nullable) for field in input_schema] + results
        flat: dict[str, Flat] = {}
        for name, subschema in (flatten or {}).get("properties", {}).items():
            column = _free(name, "json_", taken) if name in taken else name
            taken.add(column)
            flat[name] = Flat.make(column, subschema, flatten or {})
            fields.append(pa.field(column, flat[name].type))
            if column != name:
                renamed.setdefault(f"json:{name}", column)
        bare = pa.schema([pa.field(field.name, field.type, field.nullable) for field in input_schema])
        layout = cls(bare, pa.schema(fields), renamed, flat, tool_calls)
        layout._check_writable()
        return layout

    def hash(self) -> str:
        """What the fingerprint says of the columns, 32 hex digits."""
        return hashlib.blake2b(self.schema.serialize().to_pybytes(), digest_size=16).hexdigest()

    def table(self, rows: pa.Table, row_ids: Sequence[str], results: Sequence[RowResult]) -> pa.Table:
        """Input rows, already repeated for each sample, beside their results, whose strings must be valid Unicode."""
        fields = [*RESULTS, TOOL_CALLS][1:] if self.tool_calls else [*RESULTS][1:]
        values = zip(*map(attrgetter(*[field.name for field in fields]), results), strict=True)
        columns = [rows.column(name) for name in self.input.names]
        columns.append(pa.array(row_ids, pa.string()))
        columns += [pa.array(column, field.type) for column, field in zip(values, fields, strict=True)]
        if self.flat:
            documents = [_document(result.json) for result in results]
            for name, flat in self.flat.items():
                columns.append(pa.array([flat.convert(document.get(name)) for document in documents], flat.type))
        return pa.Table.from_arrays(columns, schema=self.schema)

    def _check_writable(self) -> None:
        for field in self.schema:
            file = io.BytesIO()
            try:
                pq.write_table(pa.schema([field]).empty_table(), file)
                kept = pq.read_schema(file).field(0)
                reason = None if kept.equals(field) else f"it comes back as {kept.type}"
            except pa.ArrowException as error:
                reason = first_line(error)
            if reason is not None:
                raise ConfigError(f"input column {field.name} ({field.type}) cannot be written to Parquet: {reason}; "
                                  "give the input without it, or with it as another type")


def _document(text: str | None) -> dict[str, Any]:
    """The object in a row's json column. A row without one (it failed, or its own schema is of another kind) has none."""
    if text is None:
        return {}
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:      # legal JSON that orjson will not take, such as a number beyond its range
        return {}
    return value if isinstance(value, dict) else {}


def _free(name: str, prefix: str, taken: set[str]) -> str:
    """`name` behind as many prefixes as make it new; it is taken from then on."""
    while name in taken:
        name = prefix + name
    taken.add(name)
    return name
