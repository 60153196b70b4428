"""Properties of a JSON schema as typed columns: which Arrow type a property has, and how its values become one of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson
import pyarrow as pa

_SCALARS = {"string": pa.string(), "integer": pa.int64(), "number": pa.float64(), "boolean": pa.bool_()}


@dataclass(frozen=True)
class Flat:
    """A top-level property as a column: its name there, its Arrow type, and how a JSON value becomes one of it (or null)."""

    column: str
    type: pa.DataType
    convert: Callable[[Any], Any]

    @classmethod
    def make(cls, column: str, subschema: object, root: Mapping[str, Any]) -> Flat:
        """string, int64, float64, bool, or a list of them, where the subschema leaves one of these (or null). Anything else,
        objects too, is JSON text: it loses nothing. `root`: the whole schema, which references point into."""
        type = _only(_types(subschema, root, frozenset()))
        return cls(column, pa.string(), _text) if type is None else cls(column, type, _converter(type))


def _types(schema: object, root: Mapping[str, Any], seen: frozenset[str]) -> set[pa.DataType | None]:
    """The types that values may have, nulls left out; None: any."""
    if not isinstance(schema, Mapping):
        return {None}
    if (kinds := schema.get("type")) is not None:
        return {_of_kind(kind, schema, root, seen) for kind in ([kinds] if isinstance(kinds, str) else kinds) if kind != "null"}
    if "enum" in schema or "const" in schema:
        return {_of_value(value) for value in schema.get("enum", [schema.get("const")]) if value is not None}
    if isinstance(reference := schema.get("$ref"), str):
        return {None} if reference in seen else _types(_target(reference, root), root, seen | {reference})
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema:
            return {type for branch in schema[keyword] for type in _types(branch, root, seen)}
    for branch in schema.get("allOf", ()):
        if (type := _only(_types(branch, root, seen))) is not None:
            return {type}
    return {None}


def _of_kind(kind: str, schema: Mapping[str, Any], root: Mapping[str, Any], seen: frozenset[str]) -> pa.DataType | None:
    if kind == "array" and "items" in schema and "prefixItems" not in schema:
        item = _only(_types(schema["items"], root, seen))
        return None if item is None else pa.list_(item)
    return _SCALARS.get(kind)


def _of_value(value: object) -> pa.DataType | None:
    for kind, name in ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string")):
        if isinstance(value, kind):
            return _SCALARS[name]
    return None


def _only(types: Iterable[pa.DataType | None]) -> pa.DataType | None:
    """The one type that holds them all; None: there is none."""
    found = set(types)
    if found == {pa.int64(), pa.float64()}:
        return pa.float64()
    return found.pop() if len(found) == 1 else None


def _target(reference: str, root: Mapping[str, Any]) -> object:
    """What a pointer into the document itself points at; None for others."""
    if not reference.startswith("#"):
        return None
    node: object = root
    for part in reference[1:].split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


def _converter(type: pa.DataType) -> Callable[[Any], Any]:
    if pa.types.is_list(type):
        item = _converter(type.value_type)
        return lambda value: [item(element) for element in value] if isinstance(value, list) else None
    return {pa.string(): _string, pa.int64(): _integer, pa.float64(): _number, pa.bool_(): _boolean}[type]


def _string(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _boolean(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _integer(value: Any) -> int | None:
    """JSON Schema calls 1.0 an integer too. Beyond int64 there is no value for the column: the json column has it."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and -(2**63) <= value < 2**63 else None


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) else None


def _text(value: Any) -> str | None:
    return None if value is None else orjson.dumps(value).decode()
