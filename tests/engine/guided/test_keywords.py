"""Every keyword of JSON Schema 2020-12: no invalid value gets through, and valid ones do where the lowering says so.

The cases are written from the specification. `narrow` holds valid values that the grammar may leave out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jsonschema
import pytest
from guided_cases import accepts, dumps, walk

from engine.guided.llg import LLGuidanceBackend


@dataclass
class Case:
    name: str
    schema: Any
    valid: list[Any]
    invalid: list[Any]
    narrow: list[Any] = field(default_factory=list)

    def __str__(self) -> str:
        return self.name


def obj(properties: dict[str, Any], *required: str, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), **more}


INTEGER, STRING, NULL, NUMBER = {"type": "integer"}, {"type": "string"}, {"type": "null"}, {"type": "number"}
ABC = {"enum": ["a", "b", "c"]}
NODE = {
    "$defs": {
        "node": {"type": "object", "properties": {"value": INTEGER, "next": {"$ref": "#/$defs/node"}}, "required": ["value"]}
    },
    "$ref": "#/$defs/node",
}

CASES = [
    Case("true", True, [1, "a", None, [], {"a": [1]}], []),
    Case("empty", {}, [1, "a", None, [], {"a": [1]}], []),
    Case("type", {"type": "string"}, ["", "é", "😀", "\n", '"', "\\"], [1, None, [], {}]),
    Case("type list", {"type": ["integer", "null"]}, [1, -3, None], ["1", True, 1.5, []]),
    Case("boolean", {"type": "boolean"}, [True, False], [0, 1, "true", None]),
    Case("integer", INTEGER, [0, -1, 10**15], [1.5, "1", True]),
    Case("number", NUMBER, [0, -1.5, 1e-7, 12345678901], ["1", None, True]),
    Case(
        "enum", {"enum": ["a", 1, None, True, [1, 2], {"x": 1}]}, ["a", 1, None, True, [1, 2], {"x": 1}], ["b", 2, False, [1], {}]
    ),
    Case(
        "enum of other alphabets", {"enum": ["积极", "negativ😀", 'ч"х\\']}, ["积极", "negativ😀", 'ч"х\\'], ["积", "negativ", ""]
    ),
    Case("enum beside type", {"type": "string", "enum": ["a", 1, None]}, ["a"], [1, None, "b"]),
    Case("enum beside bounds", {"enum": [1, 5, 9, "x"], "minimum": 3, "maximum": 8}, [5, "x"], [1, 9]),
    Case("enum beside pattern", {"enum": ["ab", "b", 3], "pattern": "^a"}, ["ab", 3], ["b"]),
    Case(
        "enum beside properties", {"enum": [{"a": 1}, {"a": "x"}, 2], "properties": {"a": INTEGER}}, [{"a": 1}, 2], [{"a": "x"}]
    ),
    Case("const", {"const": {"a": [1, None]}}, [{"a": [1, None]}], [{"a": [1]}, {}, 1]),
    Case("const false", {"const": False}, [False], [0, True, None]),
    Case("minimum and maximum", {"type": "number", "minimum": -1.5, "maximum": 2}, [-1.5, 0, 2, 1.99], [-1.6, 2.01, 3]),
    Case("exclusive bounds", {"type": "integer", "exclusiveMinimum": 1, "exclusiveMaximum": 4}, [2, 3], [1, 4, 0]),
    Case("above a whole bound", {"exclusiveMinimum": 0, "maximum": 0.5}, [0.5, 0.25, 0.001, "a"], [0, 0.0, -0.1, 0.51]),
    Case("below a whole bound", {"type": "number", "minimum": -2.5, "exclusiveMaximum": -2}, [-2.5, -2.1], [-2, -2.0, -3, -2.6]),
    Case("between bounds", {"type": "number", "exclusiveMinimum": 1, "exclusiveMaximum": 1.5}, [1.2, 1.001], [1, 1.0, 1.5, 2]),
    Case("above a large bound", {"type": "number", "exclusiveMinimum": 10**9, "maximum": 10**9 + 0.5}, [10**9 + 0.25], [10**9]),
    Case("bounds without type", {"minimum": 3}, [3, 4, "a", None, [], {}], [2, 2.9]),
    Case("multipleOf", {"type": "integer", "multipleOf": 7, "minimum": 1}, [7, 14, 70], [1, 8, 0]),
    Case("multipleOf fraction", {"type": "number", "multipleOf": 0.5, "minimum": 0}, [0.5, 1.5], [0.25, 0.75]),
    Case("multipleOf twice", {"type": "integer", "allOf": [{"multipleOf": 4}, {"multipleOf": 6}]}, [12, 24], [4, 6, 8]),
    Case("lengths", {"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "abc", "😀😀", "éé"], ["a", "abcd", "😀", ""]),
    Case(
        "pattern anchored", {"type": "string", "pattern": "^[a-z]{2}-\\d+$"}, ["ab-1", "zz-99"], ["ab-", "xab-1", "AB-1", "ab-1 "]
    ),
    Case("pattern unanchored", {"type": "string", "pattern": "[0-9]"}, ["a1b", "7"], ["ab", ""]),
    Case("pattern and length", {"type": "string", "pattern": "^a+$", "maxLength": 3}, ["a", "aaa"], ["aaaa", "b", ""]),
    Case("patterns", {"type": "string", "allOf": [{"pattern": "^a"}, {"pattern": "z$"}]}, ["az", "abz"], ["a", "z", "ab"]),
    Case(
        "pattern with look-ahead",
        {"type": "string", "pattern": "^(?=.*[0-9])[a-z0-9]{2,4}$"},
        ["a1", "12ab"],
        ["ab", "1", "abcd1"],
    ),
    Case("pattern alternation", {"type": "string", "pattern": "^a$|^b"}, ["a", "bcd"], ["ac", "ca"]),
    Case("format", {"type": "string", "format": "date"}, ["2024-02-29"], [1, None]),
    Case("unknown format", {"type": "string", "format": "topic"}, ["anything", ""], [1]),
    Case(
        "format that the pattern contradicts",
        {"type": "string", "format": "email", "pattern": "^[0-9]$"},
        ["7"],
        ["a@b.co", "77"],
    ),
    Case("items", {"type": "array", "items": INTEGER}, [[], [1], [1, 2, 3]], [["a"], [1, None], {}]),
    Case("items false", {"type": "array", "items": False}, [[]], [[1], [[]]]),
    Case(
        "minItems and maxItems", {"type": "array", "items": INTEGER, "minItems": 1, "maxItems": 2}, [[1], [1, 2]], [[], [1, 2, 3]]
    ),
    Case(
        "prefixItems closed",
        {"type": "array", "prefixItems": [INTEGER, STRING], "items": False},
        [[], [1], [1, "a"]],
        [["a"], [1, 2], [1, "a", 3]],
    ),
    Case(
        "prefixItems open",
        {"type": "array", "prefixItems": [INTEGER], "items": STRING, "minItems": 2},
        [[1, "a"], [1, "a", "b"]],
        [[1], ["a", "b"], [1, 2]],
    ),
    Case(
        "prefixItems and maxItems",
        {"type": "array", "prefixItems": [INTEGER, INTEGER, INTEGER], "maxItems": 2},
        [[1], [1, 2]],
        [[1, 2, 3]],
    ),
    Case(
        "prefixItems of two subschemas",
        {"type": "array", "prefixItems": [INTEGER], "items": NUMBER, "allOf": [{"items": {"minimum": 5}}]},
        [[5], [6, 7.5]],
        [[4], [5, 4], [5.5]],
    ),
    Case(
        "uniqueItems of an enum",
        {"type": "array", "items": ABC, "uniqueItems": True, "minItems": 1},
        [["a"], ["b", "a"], ["c", "a", "b"]],
        [[], ["a", "a"], ["a", "b", "a"], ["d"]],
    ),
    Case(
        "uniqueItems of a long enum",
        {"type": "array", "items": {"enum": list("abcdefghijklmnopqrst")}, "uniqueItems": True},
        [[], ["a", "t"], ["a", "c", "t"]],
        [["a", "a"], ["u"]],
        [["t", "a"]],
    ),
    Case(
        "uniqueItems of booleans",
        {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True},
        [[], [True, False]],
        [[True, True]],
    ),
    Case(
        "uniqueItems of small integers",
        {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 3}, "uniqueItems": True},
        [[3, 1], [2]],
        [[1, 1], [4]],
    ),
    Case(
        "uniqueItems of strings",
        {"type": "array", "items": STRING, "uniqueItems": True},
        [[], ["a"]],
        [["a", "a"], ["a", "b", "a"]],
        [["a", "b"]],
    ),
    Case(
        "uniqueItems of objects",
        {"type": "array", "items": obj({"a": INTEGER}, "a"), "uniqueItems": True},
        [[], [{"a": 1}]],
        [[{"a": 1}, {"a": 1}]],
        [[{"a": 1}, {"a": 2}]],
    ),
    Case("uniqueItems false", {"type": "array", "items": INTEGER, "uniqueItems": False}, [[1, 1]], [["a"]]),
    Case(
        "contains",
        {"type": "array", "items": {"type": ["integer", "string"]}, "contains": STRING},
        [["a"], ["a", 1]],
        [[], [1], [1, 2]],
        [[1, "a"]],
    ),
    Case(
        "minContains and maxContains",
        {"type": "array", "items": {"type": ["integer", "string"]}, "contains": STRING, "minContains": 1, "maxContains": 2},
        [["a", 1], ["a", "b", 1]],
        [[], [1], ["a", "b", "c"]],
        [[1, "a"], [1, "a", "b"]],
    ),
    Case("minContains 0", {"type": "array", "items": INTEGER, "contains": STRING, "minContains": 0}, [[], [1]], [["a"]]),
    Case("contains impossible", {"type": ["array", "null"], "items": INTEGER, "contains": STRING}, [None], [[], [1], ["a"]]),
    Case(
        "properties",
        obj({"a": INTEGER, "b": STRING}),
        [{}, {"a": 1}, {"b": "x"}, {"a": 1, "b": "x"}],
        [{"a": "x"}, {"b": 1}, []],
        [{"b": "x", "a": 1}, {"c": 1}],
    ),
    Case("properties without type", {"properties": {"a": INTEGER}}, [{}, {"a": 1}, 5, "x", [], None], [{"a": "x"}]),
    Case(
        "property false",
        {"type": "object", "properties": {"a": False, "b": True}, "additionalProperties": True},
        [{}, {"b": 1}, {"c": 1}],
        [{"a": 1}, {"b": 1, "a": None}],
    ),
    Case("required", obj({"a": INTEGER, "b": STRING}, "b"), [{"b": ""}, {"a": 1, "b": ""}], [{}, {"a": 1}]),
    Case(
        "required without properties",
        {"type": "object", "required": ["x y", "é"]},
        [{"x y": 1, "é": 2}],
        [{}, {"x y": 1}],
        [{"é": 1, "x y": 2}],
    ),
    Case(
        "additionalProperties false",
        obj({"a": INTEGER}, additionalProperties=False),
        [{}, {"a": 1}],
        [{"b": 1}, {"a": 1, "b": 1}],
    ),
    Case(
        "additionalProperties schema",
        obj({"a": INTEGER}, additionalProperties=STRING),
        [{"a": 1, "b": "x"}, {"b": "x", "c": "y"}],
        [{"a": "x"}, {"b": 1}],
    ),
    Case(
        "additionalProperties true", obj({"a": INTEGER}, additionalProperties=True), [{"a": 1, "b": 1}, {"z": None}], [{"a": "x"}]
    ),
    Case(
        "patternProperties",
        {"type": "object", "patternProperties": {"^n_": INTEGER}, "additionalProperties": False},
        [{}, {"n_a": 1}],
        [{"n_a": "x"}, {"b": 1}],
    ),
    Case(
        "patternProperties and properties",
        {"type": "object", "properties": {"n_a": {"minimum": 5}}, "patternProperties": {"^n_": INTEGER}},
        [{"n_a": 5}, {"n_a": 6, "n_b": 1}],
        [{"n_a": 4}, {"n_a": "x"}, {"n_b": "x"}],
    ),
    Case(
        "patternProperties overlapping",
        {"type": "object", "patternProperties": {"^a": {"type": "integer"}, "z$": {"minimum": 3}}, "additionalProperties": False},
        [{}, {"az": 3}, {"a": 4}],
        [{"az": 2}, {"az": "x"}, {"a": "x"}, {"b": 1}],
        [{"a": 1}, {"z": "x"}],
    ),
    Case(
        "patternProperties of word characters",
        {"type": "object", "patternProperties": {"^\\w+$": INTEGER}},
        [{"abc": 1}],
        [{"abc": "x"}],
        [{"ключ": 1}],
    ),
    Case(
        "propertyNames pattern",
        {"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}, "additionalProperties": INTEGER},
        [{}, {"ab": 1}],
        [{"A": 1}, {"ab": "x"}, {"": 1}],
    ),
    Case(
        "propertyNames enum",
        {"type": "object", "propertyNames": {"enum": ["x", "y"]}},
        [{}, {"x": 1}, {"x": 1, "y": 2}],
        [{"z": 1}],
    ),
    Case("propertyNames length", {"type": "object", "propertyNames": {"maxLength": 2}}, [{}, {"ab": 1}, {"": 0}], [{"abc": 1}]),
    Case(
        "propertyNames and properties",
        obj({"ab": INTEGER, "A": INTEGER}, propertyNames={"pattern": "^[a-z]"}),
        [{"ab": 1}],
        [{"A": 1}],
    ),
    Case(
        "propertyNames and patternProperties",
        {"type": "object", "propertyNames": {"pattern": "^a"}, "patternProperties": {"z$": INTEGER}},
        [{}],
        [{"z": 1}, {"az": "x"}, {"b": 1}],
        [{"az": 1}, {"a": "x"}],
    ),
    Case("propertyNames false", {"type": "object", "propertyNames": False}, [{}], [{"a": 1}]),
    Case(
        "minProperties",
        obj({"a": INTEGER, "b": INTEGER, "c": INTEGER}, minProperties=2, additionalProperties=False),
        [{"a": 1, "b": 2}, {"b": 1, "c": 2}, {"a": 1, "b": 2, "c": 3}],
        [{}, {"a": 1}],
    ),
    Case(
        "maxProperties",
        obj({"a": INTEGER, "b": INTEGER, "c": INTEGER}, maxProperties=1),
        [{}, {"a": 1}, {"c": 1}],
        [{"a": 1, "b": 2}],
        [{"x": 1}],
    ),
    Case(
        "minProperties and maxProperties",
        obj({"a": INTEGER, "b": INTEGER, "c": INTEGER}, minProperties=1, maxProperties=2),
        [{"a": 1}, {"b": 1, "c": 1}],
        [{}, {"a": 1, "b": 2, "c": 3}],
    ),
    Case(
        "minProperties of free keys",
        {"type": "object", "minProperties": 1, "additionalProperties": INTEGER},
        [{"a": 1}, {"a": 1, "b": 2}],
        [{}, {"a": "x"}],
    ),
    Case(
        "minProperties above what is listed",
        obj({"a": INTEGER}, minProperties=2, additionalProperties=STRING),
        [{"a": 1, "b": "x"}, {"a": 1, "b": "x", "c": "y"}],
        [{"a": 1}, {"b": "x"}, {"a": 1, "b": 2}],
        [{"b": "x", "c": "y"}],
    ),
    Case("maxProperties 0", {"type": "object", "maxProperties": 0}, [{}], [{"a": 1}]),
    Case("minProperties beside required", obj({"a": INTEGER, "b": INTEGER}, "a", minProperties=1), [{"a": 1}], [{"b": 1}]),
    Case(
        "dependentRequired",
        obj({"a": INTEGER, "b": INTEGER, "c": INTEGER}, dependentRequired={"a": ["b"], "b": ["c"]}),
        [{}, {"c": 1}, {"b": 1, "c": 1}, {"a": 1, "b": 1, "c": 1}],
        [{"a": 1}, {"b": 1}, {"a": 1, "b": 1}],
    ),
    Case(
        "dependentRequired without type",
        {"dependentRequired": {"a": ["b"]}},
        [1, "x", {}, {"b": 1}],
        [{"a": 1}],
        [{"a": 1, "b": 2}],
    ),
    Case(
        "dependentSchemas",
        obj({"a": INTEGER, "b": {"type": ["integer", "string"]}}, dependentSchemas={"a": {"properties": {"b": STRING}}}),
        [{"b": 1}, {"a": 1, "b": "x"}, {"a": 1}],
        [{"a": 1, "b": 2}],
    ),
    Case(
        "dependencies of older drafts",
        obj({"a": INTEGER, "b": INTEGER}, dependencies={"a": ["b"]}, **{"$schema": "http://json-schema.org/draft-07/schema#"}),
        [{}, {"b": 1}, {"a": 1, "b": 1}],
        [{"a": 1}],
    ),
    Case(
        "allOf",
        {"allOf": [obj({"a": INTEGER}, "a"), obj({"b": STRING}, "b")]},
        [{"a": 1, "b": "x"}],
        [{"a": 1}, {"b": "x"}, {"a": 1, "b": 2}],
    ),
    Case(
        "allOf narrows a property",
        {"allOf": [obj({"a": INTEGER}, "a"), {"properties": {"a": {"minimum": 3}}}]},
        [{"a": 3}],
        [{"a": 2}, {}],
    ),
    Case(
        "allOf closed against open",
        {"allOf": [obj({"a": INTEGER}, additionalProperties=False), obj({"b": STRING})]},
        [{}, {"a": 1}],
        [{"b": "x"}, {"a": 1, "b": "x"}],
    ),
    Case("anyOf", {"anyOf": [INTEGER, {"type": "string", "maxLength": 1}]}, [1, "a"], ["ab", None]),
    Case(
        "anyOf beside properties",
        obj({"a": INTEGER, "b": INTEGER}, anyOf=[{"required": ["a"]}, {"required": ["b"]}]),
        [{"a": 1}, {"b": 1}, {"a": 1, "b": 2}],
        [{}],
    ),
    Case("oneOf disjoint types", {"oneOf": [INTEGER, STRING, NULL]}, [1, "a", None], [1.5, True, []]),
    Case(
        "oneOf discriminated",
        {
            "oneOf": [
                obj({"kind": {"const": "a"}, "x": INTEGER}, "kind", "x"),
                obj({"kind": {"const": "b"}, "y": STRING}, "kind", "y"),
            ]
        },
        [{"kind": "a", "x": 1}, {"kind": "b", "y": ""}],
        [{"kind": "a", "y": ""}, {"kind": "b", "x": 1}, {"x": 1}],
    ),
    Case("oneOf overlapping bounds", {"type": "integer", "oneOf": [{"minimum": 5}, {"maximum": 8}]}, [4, 9, -1], [5, 8, 6]),
    Case(
        "oneOf required",
        obj({"a": INTEGER, "b": INTEGER}, oneOf=[{"required": ["a"]}, {"required": ["b"]}]),
        [{"a": 1}, {"b": 1}],
        [{}, {"a": 1, "b": 1}],
    ),
    Case(
        "oneOf of three",
        obj({"a": INTEGER, "b": INTEGER, "c": INTEGER}, oneOf=[{"required": [n]} for n in "abc"]),
        [{"a": 1}, {"b": 1}, {"c": 1}],
        [{}, {"a": 1, "b": 1}, {"b": 1, "c": 1}, {"a": 1, "b": 1, "c": 1}],
    ),
    Case("oneOf patterns", {"type": "string", "oneOf": [{"pattern": "^a"}, {"enum": ["ab", "x"]}]}, ["x"], ["ab", "y"], ["ac"]),
    Case("oneOf enums", {"oneOf": [{"enum": ["a", "b"]}, {"enum": ["b", "c"]}]}, ["a", "c"], ["b", "d"]),
    Case("oneOf integer in number", {"oneOf": [{"type": "number", "minimum": 2}, {"type": "integer"}]}, [1, -1], [2, 3], [2.5]),
    Case("not type", {"not": {"type": "string"}}, [1, None, [], {}], ["a", ""]),
    Case("not enum", {"type": "string", "not": {"enum": ["ab", "c", ""]}}, ["a", "abc", "d"], ["ab", "c", ""]),
    Case("not const number", {"type": "integer", "not": {"const": 5}}, [4, 6], [5]),
    Case(
        "not required",
        obj({"a": INTEGER, "b": INTEGER}, **{"not": {"required": ["a", "b"]}}),
        [{}, {"a": 1}, {"b": 1}],
        [{"a": 1, "b": 2}],
    ),
    Case("not bounds", {"type": "number", "not": {"minimum": 3}}, [2, 2.9], [3, 4]),
    Case("not anyOf", {"not": {"anyOf": [STRING, NULL]}}, [1, [], {}], ["a", None]),
    Case("not allOf", {"type": "string", "not": {"allOf": [{"minLength": 2}, {"maxLength": 4}]}}, ["a", "abcde"], ["ab", "abcd"]),
    Case("not not", {"not": {"not": INTEGER}}, [1], ["a", 1.5]),
    Case(
        "not property",
        obj({"a": {"type": ["integer", "string"]}}, "a", **{"not": {"properties": {"a": INTEGER}}}),
        [{"a": "x"}],
        [{"a": 1}, {}],
    ),
    Case("not of a reference", {"$defs": {"s": STRING}, "not": {"$ref": "#/$defs/s"}}, [1, None], ["a"]),
    Case(
        "not items",
        {"type": "array", "items": {"type": ["integer", "null"]}, "not": {"items": INTEGER}},
        [[None], [None, 1]],
        [[], [1]],
        [[1, None]],
    ),
    Case(
        "if then else",
        obj(
            {"kind": {"enum": ["a", "b"]}, "x": {"type": ["integer", "string"]}},
            "kind",
            "x",
            **{
                "if": {"properties": {"kind": {"const": "a"}}},
                "then": {"properties": {"x": INTEGER}},
                "else": {"properties": {"x": STRING}},
            },
        ),
        [{"kind": "a", "x": 1}, {"kind": "b", "x": "s"}],
        [{"kind": "a", "x": "s"}, {"kind": "b", "x": 1}],
    ),
    Case("if then", {"type": "integer", "if": {"minimum": 10}, "then": {"multipleOf": 10}}, [3, 9, 10, 20], [11, 25]),
    Case("then without if", {"type": "integer", "then": {"minimum": 10}}, [1, 11], ["a"]),
    Case("$ref", {"$defs": {"a": INTEGER}, "type": "array", "items": {"$ref": "#/$defs/a"}}, [[1, 2]], [["a"]]),
    Case("$ref with siblings", {"$defs": {"a": {"minimum": 3}}, "$ref": "#/$defs/a", "type": "integer"}, [3], [2, "a"]),
    Case("$ref escaped", {"$defs": {"a/b~c d": INTEGER}, "$ref": "#/$defs/a~1b~0c%20d"}, [1], ["a"]),
    Case("$ref to a property", obj({"a": INTEGER, "b": {"$ref": "#/properties/a"}}, "b"), [{"b": 1}], [{"b": "x"}]),
    Case(
        "$ref recursive",
        NODE,
        [{"value": 1}, {"value": 1, "next": {"value": 2, "next": {"value": 3}}}],
        [{"value": 1, "next": {}}, {}],
    ),
    Case(
        "$ref recursive with siblings",
        {
            "$defs": {
                "node": {
                    "type": "object",
                    "properties": {"v": INTEGER, "kids": {"type": "array", "items": {"$ref": "#/$defs/node", "required": ["v"]}}},
                }
            },
            "$ref": "#/$defs/node",
        },
        [{}, {"kids": [{"v": 1, "kids": [{"v": 2}]}]}],
        [{"kids": [{}]}, {"kids": [{"v": 1, "kids": [{}]}]}],
    ),
    Case("$ref to the root", obj({"a": {"$ref": "#"}, "b": INTEGER}), [{"a": {"a": {"b": 1}}}], [{"a": 1}, {"a": {"b": "x"}}]),
    Case("$anchor", {"$defs": {"x": {"$anchor": "here", "type": "integer"}}, "$ref": "#here"}, [1], ["a"]),
    Case(
        "$id",
        {"$id": "https://example.com/root", "$defs": {"x": {"$id": "inner", "type": "integer"}}, "$ref": "inner"},
        [1],
        ["a"],
    ),
    Case(
        "$dynamicRef with one meaning",
        {"$defs": {"x": {"$dynamicAnchor": "n", "type": "integer"}}, "$dynamicRef": "#n"},
        [1],
        ["a"],
    ),
    Case(
        "unevaluatedProperties",
        {"allOf": [obj({"a": INTEGER})], "properties": {"b": INTEGER}, "type": "object", "unevaluatedProperties": False},
        [{}, {"b": 1}],
        [{"c": 1}, {"a": 1, "c": 1}],
        [{"a": 1}, {"a": 1, "b": 1}],
    ),
    Case(
        "unevaluatedProperties beside anyOf",
        obj(
            {"k": INTEGER},
            anyOf=[{"properties": {"a": STRING}, "required": ["a"]}, {"properties": {"b": STRING}, "required": ["b"]}],
            unevaluatedProperties=False,
        ),
        [{"a": "x"}, {"k": 1, "b": "x"}],
        [{"k": 1}, {"c": 1, "a": "x"}],
        [{"a": "x", "b": "y"}],
    ),
    Case("unevaluatedProperties schema", obj({"a": INTEGER}, unevaluatedProperties=STRING), [{"a": 1, "z": "x"}], [{"z": 1}]),
    Case(
        "unevaluatedItems",
        {"type": "array", "prefixItems": [INTEGER], "allOf": [{"prefixItems": [True, STRING]}], "unevaluatedItems": False},
        [[1, "a"], [1]],
        [["a"], [1, 2], [1, "a", 3]],
    ),
    Case(
        "annotations",
        {
            "type": "integer",
            "title": "t",
            "description": "d",
            "default": "x",
            "examples": [1],
            "deprecated": True,
            "readOnly": True,
            "$comment": "c",
            "contentMediaType": "text/html",
            "x-unknown": {"$ref": "#/nowhere"},
        },
        [1],
        ["x"],
    ),
    Case(
        "options of the engine in a schema",
        {"type": "array", "items": INTEGER, "x-guidance": {"lenient": True, "item_separator": ";"}},
        [[1, 2]],
        [["a"]],
    ),
    Case(
        "keyword names as property names",
        obj({"$ref": STRING, "type": INTEGER, "enum": {"enum": [1]}}, "$ref"),
        [{"$ref": "x"}, {"$ref": "x", "type": 1, "enum": 1}],
        [{"$ref": 1}, {}],
    ),
    Case(
        "draft 4 bounds",
        {"$schema": "http://json-schema.org/draft-04/schema#", "type": "integer", "minimum": 1, "exclusiveMinimum": True},
        [2],
        [1, 0],
    ),
    Case("draft 4 bounds without $schema", {"type": "integer", "maximum": 5, "exclusiveMaximum": True}, [4], [5]),
    Case(
        "draft 4 id",
        {
            "$schema": "http://json-schema.org/draft-04/schema",
            "id": "http://x/y",
            "definitions": {"a": {"id": "#a", "type": "integer"}},
            "items": {"$ref": "#a"},
            "type": "array",
        },
        [[1]],
        [["a"]],
    ),
    Case(
        "draft 7 items and definitions",
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "definitions": {"s": STRING},
            "type": "array",
            "items": [INTEGER, {"$ref": "#/definitions/s"}],
            "additionalItems": False,
        },
        [[1, "a"], [1]],
        [["a"], [1, 2], [1, "a", 1]],
    ),
    Case(
        "draft 7 $ref ignores siblings",
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "definitions": {"s": STRING},
            "properties": {"a": {"$ref": "#/definitions/s", "maxLength": 1}},
            "type": "object",
        },
        [{"a": "long"}],
        [{"a": 1}],
    ),
    Case(
        "draft 7 with newer words",
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "type": "object",
            "properties": {"a": INTEGER, "b": INTEGER},
            "dependentRequired": {"a": ["b"]},
        },
        [{"a": 1, "b": 2}, {"b": 1}],
        [{"a": "x"}],
        [{"a": 1}],
    ),
    Case(
        "minContains above maxContains",
        {"contains": {"const": 1}, "minContains": 3, "maxContains": 1},
        ["x", 1, {"a": 1}],
        [[], [1], [1, 1, 1], [2]],
    ),
    Case(
        "counts with a fraction of zero",
        obj({
            "s": {"type": "string", "minLength": 1.0, "maxLength": 2.0},
            "a": {"type": "array", "items": INTEGER, "minItems": 1.0, "maxItems": 2.0},
            "o": {"type": "object", "additionalProperties": INTEGER, "minProperties": 1.0, "maxProperties": 1.0},
            "c": {"type": "array", "contains": {"const": 1}, "minContains": 1.0, "maxContains": 2.0, "maxItems": 3},
        }, "s", "a", "o", "c"),
        [{"s": "ab", "a": [1, 2], "o": {"k": 1}, "c": [1, 1]}],
        [{"s": "", "a": [1], "o": {"k": 1}, "c": [1]}, {"s": "abc", "a": [1], "o": {"k": 1}, "c": [1]},
         {"s": "a", "a": [], "o": {"k": 1}, "c": [1]}, {"s": "a", "a": [1, 2, 3], "o": {"k": 1}, "c": [1]},
         {"s": "a", "a": [1], "o": {}, "c": [1]}, {"s": "a", "a": [1], "o": {"k": 1, "l": 2}, "c": [1]},
         {"s": "a", "a": [1], "o": {"k": 1}, "c": [2]}, {"s": "a", "a": [1], "o": {"k": 1}, "c": [1, 1, 1]}],
    ),
    Case(
        "draft 2019 $recursiveRef",
        {
            "$schema": "https://json-schema.org/draft/2019-09/schema",
            "type": "object",
            "properties": {"a": {"$recursiveRef": "#"}},
            "additionalProperties": False,
        },
        [{"a": {"a": {}}}],
        [{"a": 1}, {"b": 1}],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_keyword(case: Case, backend: LLGuidanceBackend) -> None:
    grammar = backend.compile_schema(case.schema)
    reference = jsonschema.validators.validator_for(case.schema, default=jsonschema.Draft202012Validator)
    if isinstance(case.schema, bool) or not (
        {"exclusiveMaximum"} & case.schema.keys() and case.schema["exclusiveMaximum"] is True
    ):
        for value in [*case.valid, *case.narrow]:
            assert reference(case.schema).is_valid(value), f"the case is wrong: {value} is not valid"
        for value in case.invalid:
            assert not reference(case.schema).is_valid(value), f"the case is wrong: {value} is valid"
    for value in [*case.valid, *case.narrow]:
        grammar.check(dumps(value))
    for value in case.invalid:
        with pytest.raises(ValueError):
            grammar.check(dumps(value))
        assert not accepts(backend, grammar, dumps(value)), f"lets through {value}"
    missing = [value for value in case.valid if not accepts(backend, grammar, dumps(value))]
    assert not missing, f"leaves out {missing}"
    for seed in range(6):
        tokens, ended = walk(backend, grammar, seed, budget=80)
        if ended:
            text = backend.vocabulary.text(tokens).decode()
            try:
                grammar.check(text)
            except ValueError as error:
                assert "infinity" in str(error) or "too deep" in str(error)  # trimmed and closed
        if grammar.min_tokens <= 40:
            closed = grammar.close(tokens[:40], 40).tolist()
            assert len(closed) <= 40
            grammar.check(backend.vocabulary.text(closed).decode())
