"""The final check: strict JSON, then the schema, in the schema's own draft."""

from __future__ import annotations

import pytest

from engine.guided.grammar import SchemaError
from engine.guided.validate import Validator, parse_strict


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "NaN",
        "Infinity",
        "01",
        "1.",
        "[1,]",
        "{'a': 1}",
        '"\x01"',
        '"\\ud800"',
        '"\\x41"',
        '{"a": 1} x',
        "1e999",
        "-1e999",
        '{"a": 1, "a": 2}',
        '{"b": {"a": 1, "\\u0061": 1}}',
        "[" * 5000 + "]" * 5000,
    ],
)
def test_what_is_not_strict_json(text: str) -> None:
    with pytest.raises(ValueError):
        parse_strict(text)


@pytest.mark.parametrize(
    "text, value",
    [
        ('{"a": {"a": 1}}', {"a": {"a": 1}}),
        ('[{"a": 1}, {"a": 2}]', [{"a": 1}, {"a": 2}]),
        ('"\\ud83d\\ude00"', "😀"),
        ("1.0", 1.0),
    ],
)
def test_what_is(text: str, value: object) -> None:
    assert parse_strict(text) == value


def test_check_names_the_place() -> None:
    validator = Validator({"type": "object", "properties": {"a": {"items": {"type": "integer"}}}})
    assert validator.check('{"a": [1]}') == {"a": [1]}
    with pytest.raises(ValueError, match=r"^/a/1: "):
        validator.check('{"a": [1, "x"]}')


def test_formats_are_annotations() -> None:
    Validator({"type": "string", "format": "date-time"}).check('"whenever"')


def test_the_draft_counts() -> None:
    old = {"$schema": "http://json-schema.org/draft-04/schema", "maximum": 5, "exclusiveMaximum": True}
    Validator(old).check("4")
    with pytest.raises(ValueError):
        Validator(old).check("5")
    # Without $schema: the newest draft whose meta-schema takes it.
    with pytest.raises(ValueError):
        Validator({"maximum": 5, "exclusiveMaximum": True}).check("5")
    with pytest.raises(ValueError):
        Validator({"items": [{"type": "integer"}]}).check('["x"]')


@pytest.mark.parametrize(
    "schema", [{"type": "text"}, {"$schema": "https://example.com/mine"}, {"properties": []}, {"pattern": "("}]
)
def test_what_is_no_schema(schema: dict) -> None:
    with pytest.raises(ValueError):
        Validator(schema)


def test_patterns_are_bounded_together() -> None:
    Validator({"pattern": r"^[\p{L}\p{N} .,'-]{1,64}$"})
    with pytest.raises(SchemaError, match="repeat less"):
        Validator({"properties": {f"k{i}": {"pattern": rf"\pL{{50}}{i}"} for i in range(100)}})


def test_nothing_is_fetched() -> None:
    with pytest.raises(ValueError, match="defs"):
        Validator({"$ref": "http://127.0.0.1:9/schema.json"})


def test_schema_errors_are_value_errors_that_travel() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(SchemaError("/a", "why")))
    assert isinstance(error, ValueError) and (error.pointer, error.reason) == ("/a", "why")
