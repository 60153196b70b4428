"""The columns of a part: every input column, in input order, then the results, then (flatten) the schema's top-level properties."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.exits import ConfigError

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
_TYPES = {"string": pa.string(), "integer": pa.int64(), "number": pa.float64(), "boolean": pa.bool_()}


@dataclass(frozen=True)
class OutputLayout:
    """`input`: the input's own schema. `renamed`: input column or property -> its name in the output, where that differs.
    `flat`: property -> column name. `schema`: the whole of an output part."""

    input: pa.Schema
    schema: pa.Schema
    renamed: Mapping[str, str]
    flat: Mapping[str, str]
    tool_calls: bool

    @classmethod
    def make(cls, input_schema: pa.Schema, flatten: Mapping | None = None, tool_calls: bool = False) -> OutputLayout:
        """`flatten`: the JSON schema whose top-level properties become columns (None: none); `tool_calls`: add that column.

        An input column named like a result is renamed `input_<name>`; a property named like a column before it, `json_<name>`.
        Raises ConfigError on an input that no Parquet file can hold.
        """
        twice = {name for name in input_schema.names if input_schema.names.count(name) > 1}
        if twice:
            raise ConfigError(f"the input has two columns named {sorted(twice)[0]}: rename one")
        results = [*RESULTS, TOOL_CALLS] if tool_calls else list(RESULTS)
        taken = {field.name for field in results}
        renamed: dict[str, str] = {}
        fields: list[pa.Field] = []
        own = set(input_schema.names)
        for field in input_schema:
            name = _free(field.name, "input_", taken if field.name not in taken else taken | own)
            if name != field.name:
                renamed[field.name] = name
            fields.append(pa.field(name, field.type, field.nullable))
        fields += results
        taken |= {field.name for field in fields}
        flat: dict[str, str] = {}
        for prop, subschema in (flatten or {}).get("properties", {}).items():
            flat[prop] = _free(prop, "json_", taken)
            taken.add(flat[prop])
            fields.append(pa.field(flat[prop], column_type(subschema)))
        bare = pa.schema([pa.field(f.name, f.type, f.nullable) for f in input_schema])
        layout = cls(bare, pa.schema(fields), renamed, flat, tool_calls)
        layout._check_writable()
        return layout

    def _check_writable(self) -> None:
        for field in self.schema:
            try:
                with pq.ParquetWriter(io.BytesIO(), pa.schema([field])) as writer:
                    writer.write_table(pa.schema([field]).empty_table())
            except pa.ArrowException as error:
                raise ConfigError(f"input column {field.name} ({field.type}) cannot be written to Parquet: {error}; "
                                  "leave it out with input.columns") from error

    def hash(self) -> str:
        """What the fingerprint says of the columns, 32 hex digits."""
        return hashlib.blake2b(self.schema.serialize().to_pybytes(), digest_size=16).hexdigest()


def column_type(subschema: object) -> pa.DataType:
    """The Arrow type of a property: string, int64, float64 or bool where the JSON schema leaves one of them, else JSON text."""
    if not isinstance(subschema, Mapping):
        return pa.string()
    kinds = subschema.get("type")
    if kinds is None and ("enum" in subschema or "const" in subschema):
        values = subschema.get("enum", [subschema.get("const")])
        kinds = [{bool: "boolean", int: "integer", float: "number", str: "string"}.get(type(v), "object") for v in values if v is not None]
    kinds = {kinds} if isinstance(kinds, str) else set(kinds or ())
    kinds.discard("null")
    if kinds == {"integer", "number"}:
        kinds = {"number"}
    return _TYPES.get(kinds.pop(), pa.string()) if len(kinds) == 1 else pa.string()


def _free(name: str, prefix: str, taken: set[str]) -> str:
    while name in taken:
        name = prefix + name
    return name
