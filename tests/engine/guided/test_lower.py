"""Lowering: what is refused and where, what it does to a schema's shape, and that it never widens."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from guided_cases import accepts, dumps, walk
from hypothesis import given
from hypothesis import strategies as st

from engine.guided.grammar import SchemaError
from engine.guided.llg import LLGuidanceBackend
from engine.guided.lower import ExtraKeys, lower


@pytest.mark.parametrize(
    "schema, pointer, reason",
    [
        (False, "", "contradicts itself"),
        ({"type": "integer", "enum": ["a"]}, "", "contradicts itself"),
        ({"allOf": [{"type": "integer"}, {"type": "string"}]}, "", "contradicts itself"),
        ({"type": "object", "required": ["a"], "properties": {"a": False}}, "", "contradicts itself"),
        ({"properties": {"a": {"$ref": "https://example.com/x.json"}}}, "/properties/a/$ref", "not in this document"),
        ({"properties": {"a": {"$ref": "#/$defs/none"}}}, "/properties/a/$ref", "leads nowhere"),
        ({"$ref": "#"}, "", "refers to itself"),
        ({"properties": {"a": {"anyOf": [{"$ref": "#/properties/a"}, {"type": "null"}]}}}, "/properties/a", "refers to itself"),
        (
            {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(?!x)y"}}},
            "/properties/a/pattern",
            "look-around",
        ),
        ({"$schema": "https://example.com/dialect"}, "/$schema", "not a known draft"),
        ({"properties": {"a": {"type": "text"}}}, "/properties/a/type", "not a JSON Schema"),
        (
            {
                "$defs": {"a": {"$dynamicAnchor": "n"}, "b": {"$id": "other", "$dynamicAnchor": "n"}},
                "items": {"$dynamicRef": "#n"},
            },
            "/items/$dynamicRef",
            "more than one meaning",
        ),
        ({"oneOf": [{"type": "string"}, {"type": "string", "pattern": "^a+$"}]}, None, None),
        ({"type": "object", "properties": {f"p{i}": {} for i in range(5000)}}, "", "more than 4096 properties"),
    ],
)
def test_refused_with_a_place(schema: Any, pointer: str | None, reason: str | None) -> None:
    if pointer is None:
        with pytest.raises(SchemaError):
            lower(schema)
        return
    with pytest.raises(SchemaError, match=reason) as error:
        lower(schema)
    assert error.value.pointer == pointer


def test_objects_that_list_properties_are_closed() -> None:
    listed = {"type": "object", "properties": {"a": {"type": "object", "properties": {"b": {}}}}}
    assert lower(listed).schema["additionalProperties"] is False
    assert lower(listed).schema["properties"]["a"]["additionalProperties"] is False
    assert "additionalProperties" not in lower(listed, extra_keys=True).schema
    assert "additionalProperties" not in lower({**listed, "additionalProperties": True}).schema
    assert lower({"type": "object"}).schema == {"type": "object"}
    # Closed after merging, not before: each branch has the other's properties.
    both = lower({"allOf": [{"type": "object", "properties": {"a": {}}}, {"type": "object", "properties": {"b": {}}}]}).schema
    assert list(both["properties"]) == ["a", "b"]


def test_objects_that_require_nothing_stay_open_where_the_schema_declares_its_draft() -> None:
    def closed(schema: dict[str, Any], extra_keys: ExtraKeys = "auto") -> bool:
        return lower(schema, extra_keys).schema.get("additionalProperties") is False

    listed: dict[str, Any] = {"type": "object", "properties": {"a": {}}}
    cited = {"$schema": "https://json-schema.org/draft/2020-12/schema", **listed}
    assert closed(listed) and not closed(cited) and closed({**cited, "required": ["a"]})
    assert closed(cited, extra_keys=False) and not closed({**listed, "required": ["a"]}, extra_keys=True)
    assert closed({**cited, "additionalProperties": False}, extra_keys=True)
    inner = lower({**cited, "properties": {"a": listed, "b": {**listed, "required": ["a"]}}}).schema["properties"]
    assert "additionalProperties" not in inner["a"] and inner["b"]["additionalProperties"] is False
    # What an alternative requires counts as well.
    either = lower({**cited, "anyOf": [{"required": ["a"]}, {"minProperties": 1}]}).schema
    assert [part.get("additionalProperties") for part in either["anyOf"]] == [False, None]


def test_properties_keep_their_order() -> None:
    schema = {
        "$defs": {"base": {"properties": {"c": {}, "d": {}}}},
        "type": "object",
        "properties": {"b": {}, "a": {}},
        "allOf": [{"$ref": "#/$defs/base"}],
        "required": ["e", "a"],
    }
    assert list(lower(schema).schema["properties"]) == ["b", "a", "c", "d", "e"]


def test_what_the_scanner_must_see_to() -> None:
    assert lower({"type": "object", "properties": {"a": {"type": "integer"}}}).distinct is None
    assert lower({"type": "object"}).distinct == {}
    tags = {"type": "object", "properties": {"tags": {"type": "array", "items": {"enum": ["x", "é"]}, "uniqueItems": True}}}
    assert lower(tags).distinct == {"tags": (b'"x"', '"é"'.encode())}
    assert lower(tags).schema["properties"]["tags"]["maxItems"] == 2
    words = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}
    assert lower(words).distinct == {"": None}


def test_narrowing_is_noted() -> None:
    lowered = lower({"properties": {"a": {"type": "array", "contains": {"type": "string"}}}})
    assert lowered.notes == [("/properties/a", "contains: the first items are the ones that match")]
    rate = {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}
    assert lower({"properties": {"rate": rate}}).notes == [("/properties/rate", "numbers: only from 5e-10")]
    assert lower(rate | {"maximum": 1}).notes == lower(rate | {"minimum": 0.25}).notes == []
    assert lower({"type": "object", "properties": {"a": {"type": "integer"}}}).notes == []


def test_recursion_stays_finite() -> None:
    tree = {
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "left": {"$ref": "#/$defs/tree", "required": ["v"]},
                    "right": {"allOf": [{"$ref": "#/$defs/tree"}]},
                    "v": {"type": "integer"},
                },
            }
        },
        "$ref": "#/$defs/tree",
    }
    assert len(json.dumps(lower(tree).schema)) < 1500


def test_a_recursive_part_that_cannot_end_is_left_out() -> None:
    endless = {
        "$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}, "f": False}, "required": ["n", "f"]}},
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"$ref": "#/$defs/n"}},
    }
    assert list(lower(endless).schema["properties"]) == ["a"]


NAMES = st.sampled_from(["a", "b", "c"])
BOUNDS = st.sampled_from([-1.5, -1, -0.5, 0, 0.5, 1, 1.5])
LEAVES = st.one_of(
    st.sampled_from([True, {}, {"type": "integer"}, {"type": "string"}, {"type": ["null", "integer"]}, {"type": "boolean"}]),
    st.builds(
        lambda v: {"enum": v}, st.lists(st.sampled_from(["x", "y", 1, 2, None, True]), min_size=1, max_size=3, unique_by=repr)
    ),
    st.builds(lambda a, b: {"minimum": a, "exclusiveMaximum": b}, st.integers(-3, 3), st.integers(0, 6)),
    st.builds(
        lambda low, a, high, b: {"type": "number", low: a, high: b},
        st.sampled_from(["minimum", "exclusiveMinimum"]),
        BOUNDS,
        st.sampled_from(["maximum", "exclusiveMaximum"]),
        BOUNDS,
    ),
    st.builds(lambda n: {"type": "array", "items": {"type": "boolean"}, "minItems": n, "maxItems": n}, st.integers(1, 2)),
    st.builds(lambda a, b: {"type": "string", "minLength": a, "maxLength": b}, st.integers(0, 2), st.integers(1, 3)),
    st.builds(lambda n: {"required": [n]}, NAMES),
    st.sampled_from([{"type": "string", "pattern": p} for p in ("^x", "y$", "^[^xy]*$", "^(x|yz)?$")]),
    st.sampled_from([{"propertyNames": names} for names in ({"maxLength": 1}, {"enum": ["a", "d"]}, {"pattern": "^[ad]"})]),
)


def grow(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    two = st.lists(inner, min_size=1, max_size=2)
    return st.one_of(
        st.builds(
            lambda p, r, m: {"type": "object", "properties": p, "required": r, **m},
            st.dictionaries(NAMES, inner, max_size=3),
            st.lists(NAMES, max_size=2, unique=True),
            st.sampled_from(
                [
                    {},
                    {"additionalProperties": False},
                    {"maxProperties": 2},
                    {"minProperties": 1},
                    {"dependentRequired": {"a": ["b"]}},
                    {"unevaluatedProperties": False},
                ]
            ),
        ),
        st.builds(
            lambda i, m: {"type": "array", "items": i, **m},
            inner,
            st.sampled_from(
                [
                    {},
                    {"maxItems": 2},
                    {"uniqueItems": True},
                    {"minItems": 1, "maxItems": 2},
                    {"minItems": 3, "uniqueItems": True},
                ]
            ),
        ),
        st.builds(lambda i, c: {"type": "array", "items": i, "contains": c, "maxItems": 3}, inner, inner),
        st.builds(lambda b: {"allOf": b}, two),
        st.builds(lambda b: {"anyOf": b}, two),
        st.builds(lambda b: {"oneOf": b}, st.lists(inner, min_size=2, max_size=3)),
        st.builds(lambda b: {"not": b}, inner),
        st.builds(lambda i, t, e: {"if": i, "then": t, "else": e}, inner, inner, inner),
        st.builds(
            lambda p, b: {"type": "object", "properties": {"a": p}, "anyOf": b, "unevaluatedProperties": False}, inner, two
        ),
        st.builds(lambda p, s: {"type": "object", "patternProperties": {"^[ab]": p}, "additionalProperties": s}, inner, inner),
    )


SCHEMAS = st.recursive(LEAVES, grow, max_leaves=6)
VALUES = st.recursive(
    st.sampled_from([None, True, 0, 1, 2, -1, 0.25, 1.25, -1.25, 2.5, "", "x", "y", "xyz"]),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(NAMES | st.just("d"), v, max_size=3),
    max_leaves=5,
)


@given(SCHEMAS, st.lists(VALUES, min_size=4, max_size=8), st.integers(0, 1000))
def test_never_wider(backend: LLGuidanceBackend, schema: Any, values: list[Any], seed: int) -> None:
    """Schemas and values drawn at random, judged by another validator than the one that makes the final check."""
    reference = jsonschema.Draft202012Validator(schema)
    try:
        grammar = backend.compile_schema(schema)
    except SchemaError as error:
        if "no valid output was found" in error.reason:
            assert not any(map(reference.is_valid, values)), error
        return
    for value in values:
        if accepts(backend, grammar, dumps(value)):
            assert reference.is_valid(value), value
    tokens, ended = walk(backend, grammar, seed, budget=48)
    text = backend.vocabulary.text(tokens).decode(errors="replace")
    if ended and "e" not in text.lower() and len(text) < 300:  # without exponents, numbers stay finite
        assert reference.is_valid(grammar.check(text)), text
    if grammar.min_tokens <= 48:
        closed = backend.vocabulary.text(grammar.close(tokens, 48).tolist()).decode()
        assert reference.is_valid(grammar.check(closed)), closed
