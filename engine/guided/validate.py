"""The final check of a guided output: strict JSON, then the original schema. It shares no code with the grammar."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import orjson

from engine.guided.dialect import Dialect, pattern_options
from engine.guided.grammar import SchemaError


def parse_strict(text: str | bytes) -> Any:
    """Parse JSON as RFC 8259 has it, and refuse what readers disagree about.

    Raises ValueError on NaN, lone surrogates, control characters, duplicate keys, numbers beyond a double, extreme nesting.
    """
    try:
        value = orjson.loads(text)
        if isinstance(value, (dict, list)):
            # orjson keeps the last of two equal keys, which would hide a value from the schema: a second parse sees the pairs.
            json.loads(text, object_pairs_hook=_unique)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    except RecursionError:
        raise ValueError("not JSON that can be read: nested too deep") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> None:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise ValueError(f"not JSON that can be relied on: the key {key!r} stands twice in one object")
        seen.add(key)


def _offline(uri: str) -> None:
    raise ValueError(f"{uri} would have to be fetched: put it into the schema's $defs")


class Validator:
    """Checks outputs against one JSON Schema in its own draft (see Dialect). Formats are annotations.

    Immutable and safe to share between threads. Never touches the network. Raises ValueError when the schema itself is not one.
    """

    def __init__(self, schema: dict[str, Any] | bool) -> None:
        whole = Dialect.of(schema).schema
        try:
            self._validator = jsonschema_rs.validator_for(whole, validate_formats=False, retriever=_offline,
                                                          pattern_options=pattern_options(whole))
        except jsonschema_rs.ValidationError as error:   # the schema is one: Dialect has looked
            raise SchemaError("", f"{error.message}: the patterns are too large, let them repeat less") from None

    def check(self, text: str | bytes) -> Any:
        """The parsed value. Raises ValueError with one line that says where and why it does not fit."""
        value = parse_strict(text)
        error = next(self._validator.iter_errors(value), None)
        if error is not None:
            where = "".join(f"/{part}" for part in error.instance_path)
            raise ValueError(f"{where or '/'}: {error.message}")
        return value
