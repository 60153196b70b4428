"""JSON values: their types, and when two of them are equal."""

from __future__ import annotations

from typing import Any

TYPES = ("null", "boolean", "number", "string", "array", "object")
_BY_CLASS = {type(None): "null", bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object"}


def type_of(value: Any) -> str:
    return _BY_CLASS[type(value)]


def canonical(value: Any) -> Any:
    """A hashable that is equal for equal JSON values: 1 and 1.0 are one number, true is none, and keys have no order."""
    if isinstance(value, list):
        return ("array", *map(canonical, value))
    if isinstance(value, dict):
        return ("object", frozenset((key, canonical(item)) for key, item in value.items()))
    return (type_of(value), value)
