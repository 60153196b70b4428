"""The negation of a schema: the ways in which it may fail, each a schema. Ways that no schema can say are missing."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, pairwise
from typing import Any

from engine.guided.dialect import Document, Node
from engine.guided.regexes import matches, none_of
from engine.guided.values import TYPES, type_of

_MAX_DEPTH = 16
_MAX_NUMBERS = 16        # numbers of an enum around which intervals are cut


_MAX_BRANCHES = 8        # of oneOf, of which two may hold
# Keywords that may fail in ways which are left out.
_PARTLY = {"pattern", "multipleOf", "uniqueItems", "contains", "items", "propertyNames", "patternProperties",
           "additionalProperties", "unevaluatedProperties", "unevaluatedItems"}


def negate(document: Document, node: Node, names: Iterable[str] = (), depth: int = 0) -> list[Node]:
    """Schemas that exclude `node`; their union may be smaller than its complement, never larger. Empty: no way is known.

    names: property names known where the negation will stand; they are ways to break `additionalProperties`.
    """
    if isinstance(node, bool):
        return [] if node else [True]
    if depth > _MAX_DEPTH:
        return []
    words = document.keywords(node)
    names = list(names)
    out: list[Node] = []
    if "$ref" in words:
        out += negate(document, document.resolve(node, words["$ref"]), names, depth + 1)
    out += _values(words) + _bounds(words) + _objects(words, names) + _arrays(words)
    for branch in words.get("allOf", ()):
        out += negate(document, branch, names, depth + 1)
    if "anyOf" in words:
        out.append({"allOf": [{"not": branch} for branch in words["anyOf"]]})
    if "oneOf" in words:
        branches = words["oneOf"]
        out.append({"allOf": [{"not": branch} for branch in branches]})
        out += [{"allOf": list(pair)} for pair in combinations(branches[:_MAX_BRANCHES], 2)]
    if "not" in words:
        out.append(words["not"])
    if "if" in words:
        condition = words["if"]
        if "then" in words:
            out.append({"allOf": [condition, {"not": words["then"]}]})
        if "else" in words:
            out.append({"allOf": [{"not": condition}, {"not": words["else"]}]})
    return out


def all_ways(document: Document, node: Node, depth: int = 0) -> bool:
    """Whether negate(node) leaves out no way to fail. False also where that is not known."""
    if isinstance(node, bool):
        return True
    words = document.keywords(node)
    kinds = words.get("type", ())
    values = [*words.get("enum", ()), *([words["const"]] if "const" in words else ())]
    if (words.keys() & _PARTLY or "integer" in (kinds if isinstance(kinds, list) else [kinds]) or depth > _MAX_DEPTH
            or len(words.get("oneOf", ())) > _MAX_BRANCHES or any(isinstance(v, (list, dict)) for v in values)
            or sum(type_of(v) == "number" for v in values) > _MAX_NUMBERS):
        return False
    inner = [document.resolve(node, words["$ref"])] if "$ref" in words else []
    return all(all_ways(document, branch, depth + 1) for branch in [*inner, *words.get("allOf", ())])


def _values(words: dict[str, Any]) -> list[Node]:
    out: list[Node] = []
    if "type" in words:
        given = words["type"] if isinstance(words["type"], list) else [words["type"]]
        others = [t for t in TYPES if t not in given and not (t == "number" and "integer" in given)]
        if others:
            out.append({"type": others})
    for values in (words.get("enum"), [words["const"]] if "const" in words else None):
        if values is None:
            continue
        present = {type_of(v) for v in values}
        if others := [t for t in TYPES if t not in present]:
            out.append({"type": others})
        if strings := [v for v in values if isinstance(v, str)]:
            out.append({"type": "string", "pattern": none_of(strings)})
        flags = [v for v in values if isinstance(v, bool)]
        if len(flags) == 1:
            out.append({"enum": [not flags[0]]})
        numbers = sorted({v for v in values if type_of(v) == "number"})
        if numbers and len(numbers) <= _MAX_NUMBERS:
            out.append({"type": "number", "exclusiveMaximum": numbers[0]})
            out += [{"type": "number", "exclusiveMinimum": a, "exclusiveMaximum": b}
                    for a, b in pairwise(numbers)]
            out.append({"type": "number", "exclusiveMinimum": numbers[-1]})
        if arrays := [v for v in values if isinstance(v, list)]:
            out.append({"type": "array", "minItems": 1 + max(map(len, arrays))})
        if objects := [v for v in values if isinstance(v, dict)]:
            out.append({"type": "object", "minProperties": 1 + max(map(len, objects))})
    return out


def _bounds(words: dict[str, Any]) -> list[Node]:
    out: list[Node] = []
    for key, opposite in (("minimum", "exclusiveMaximum"), ("exclusiveMinimum", "maximum"), ("maximum", "exclusiveMinimum"),
                          ("exclusiveMaximum", "minimum")):
        if key in words:
            out.append({"type": "number", opposite: words[key]})
    for kind, least, most in (("string", "minLength", "maxLength"), ("array", "minItems", "maxItems"),
                              ("object", "minProperties", "maxProperties")):
        if words.get(least, 0) > 0:
            out.append({"type": kind, most: words[least] - 1})
        if most in words:
            out.append({"type": kind, least: words[most] + 1})
    return out


def _objects(words: dict[str, Any], names: list[str]) -> list[Node]:
    out: list[Node] = [{"type": "object", "properties": {name: False}} for name in words.get("required", ())]
    properties, patterns = words.get("properties", {}), words.get("patternProperties", {})

    def broken(name: str, schema: Node) -> Node:
        return {"type": "object", "required": [name], "properties": {name: {"not": schema}}}

    out += [broken(name, schema) for name, schema in properties.items()]
    for pattern, schema in patterns.items():
        out += [broken(name, schema) for name in dict.fromkeys([*properties, *names]) if matches(pattern, name)]
    if "additionalProperties" in words:
        out += [broken(name, words["additionalProperties"]) for name in names
                if name not in properties and not any(matches(pattern, name) for pattern in patterns)]
    for name, needs in words.get("dependentRequired", {}).items():
        out += [{"type": "object", "required": [name], "properties": {need: False}} for need in needs]
    for name, schema in words.get("dependentSchemas", {}).items():
        out.append({"allOf": [{"type": "object", "required": [name]}, {"not": schema}]})
    return out


def _arrays(words: dict[str, Any]) -> list[Node]:
    prefix = words.get("prefixItems", [])
    elements = [*prefix, words["items"]] if "items" in words else prefix
    out: list[Node] = [{"type": "array", "minItems": i + 1, "prefixItems": [True] * i + [{"not": element}]}
                       for i, element in enumerate(elements)]
    if "contains" in words and words.get("minContains", 1) > 0:
        out.append({"type": "array", "items": {"not": words["contains"]}})
    return out
