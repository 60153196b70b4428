"""Schemas meant to hurt: each is compiled or refused with a reason, in bounded time and memory."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from guided_cases import accepts, dumps, walk

from engine.guided.grammar import SchemaError
from engine.guided.llg import LLGuidanceBackend


def doubling(keyword: str, levels: int, **beside: Any) -> dict[str, Any]:
    defs: dict[str, Any] = {
        f"d{i}": {keyword: [{"$ref": f"#/$defs/d{i + 1}"}, {"$ref": f"#/$defs/d{i + 1}", **beside}]} for i in range(levels)
    }
    return {"$defs": {**defs, f"d{levels}": {"type": "string"}}, "$ref": "#/$defs/d0"}


REFUSED: dict[str, Any] = {
    "anyOf 2^40": doubling("anyOf", 40),
    "allOf 2^40": doubling("allOf", 40),
    "oneOf 2^40": doubling("oneOf", 40, maxLength=3),
    "anyOf product": {"allOf": [{"anyOf": [{"required": [f"p{i}{j}"]} for j in range(6)]} for i in range(8)]},
    "no finite value": {
        "$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"]}},
        "$ref": "#/$defs/n",
    },
    "a billion items": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
    "a billion characters": {"type": "string", "minLength": 10**9},
    "a million repetitions": {"type": "string", "pattern": "^a{1000000}$"},
    "nested repetitions": {"type": "string", "pattern": "^((a{1,100}){1,100}){1,100}$"},
    "long forced text": {"type": "string", "pattern": "^([ -~]|é(a{10001}){10001})$"},
    "hundreds of key patterns": {"type": "object", "patternProperties": {f"^k{i}_": {} for i in range(300)}},
    "too many slots": {"type": "array", "contains": {"type": "string"}, "minContains": 1000},
    "endless slots": {"contains": {}, "minContains": 10**10},
    "the least integer": {"enum": [{"a": [-(2**63) + 1]}]},
    "a range at the least integer": {"type": "integer", "minimum": -(2**63), "maximum": -(2**63) + 1},
    "a range below the least integer": {"type": "integer", "minimum": -1e20, "maximum": -1e19},
    "deep": json.loads('{"items":' * 500 + "{}" + "}" * 500),
    "back-reference": {"type": "string", "pattern": r"^(a+)b\1$"},
    "unique without enough values": {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True, "minItems": 3},
}
TAKEN: dict[str, Any] = {
    "many items allowed": {"type": "array", "items": {"type": "integer"}, "maxItems": 10**9},
    "catastrophic regex": {"type": "string", "pattern": "^(a+)+$"},
    "catastrophic alternation": {"type": "string", "pattern": "^(a|aa|a*)*b?$", "maxLength": 500},
    "distance": {"type": "string", "pattern": "[ab]*a[ab]{18}$", "maxLength": 5000},
    "large enum": {"enum": [f"value number {i}" for i in range(20_000)]},
    "many optional properties": {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(600)}},
    "subsets": {"type": "object", "properties": {f"k{i}": {} for i in range(30)}, "minProperties": 10, "maxProperties": 15},
    "dependencies": {
        "type": "object",
        "properties": {f"k{i}": {} for i in range(41)},
        "dependentRequired": {f"k{i}": [f"k{i + 1}"] for i in range(40)},
    },
    "overlapping key patterns": {"type": "object", "patternProperties": {f"k{i}": {"minimum": i} for i in range(20)}},
    "tiny steps": {"type": "number", "multipleOf": 1e-9},
    "huge bounds": {"type": "number", "minimum": -1e308, "maximum": 1e308},
    "permutations": {"type": "array", "items": {"enum": [f"v{i}" for i in range(100)]}, "uniqueItems": True, "minItems": 30},
    "negations": {"not": {"not": {"not": {"not": {"not": {"type": "string"}}}}}},
    "unique in a recursion": {
        "$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}, "uniqueItems": True}},
        "$ref": "#/$defs/n",
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(backend: LLGuidanceBackend, name: str) -> None:
    begin = time.monotonic()
    with pytest.raises(SchemaError) as error:
        backend.compile_schema(REFUSED[name])
    assert len(error.value.reason) > 10
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("name", TAKEN)
def test_taken(backend: LLGuidanceBackend, name: str) -> None:
    begin = time.monotonic()
    grammar = backend.compile_schema(TAKEN[name])
    assert time.monotonic() - begin < 20
    budget = max(64, grammar.min_tokens)
    for seed in range(3):
        tokens, _ = walk(backend, grammar, seed, budget)
        grammar.check(backend.vocabulary.text(grammar.close(tokens, budget).tolist()).decode())


def test_loose_without_the_least_integer(backend: LLGuidanceBackend) -> None:
    assert accepts(backend, backend.compile_loose({"const": -(2**63)}), "[1]")


def test_loose_with_many_references(backend: LLGuidanceBackend) -> None:
    below = {f"d{i}": {"properties": {"x": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(5000)}
    chain = {"$defs": {**below, "d5000": {"type": "string"}}, "$ref": "#/$defs/d0"}
    assert accepts(backend, backend.compile_loose(chain), "[1]")
    with pytest.raises(SchemaError, match="more than 10000 subschemas"):
        backend.compile_loose(REFUSED["allOf 2^40"])


def test_what_a_regex_forces_is_bounded(backend: LLGuidanceBackend) -> None:
    guide = backend.compile_regex("[ -~]|é(a{1001}){2000}").start()
    guide.accept(backend.vocabulary.tokenize("é".encode()))
    assert len(guide.forced()) < 1_000_000


def test_the_text_of_special_tokens(backend: LLGuidanceBackend) -> None:
    label = "<|end|>x<|stop|>"
    for grammar, text in ((backend.compile_schema({"enum": [label]}), dumps(label)), (backend.compile_choice([label]), label)):
        guide, tokens = grammar.start(), []
        while not guide.finished:
            step = guide.forced()
            assert step and not {0, 1} & set(step)
            assert guide.accept(step) == len(step)
            tokens += step
        assert backend.vocabulary.text(tokens).decode() == text == backend.vocabulary.text(grammar.minimal.tolist()).decode()


def test_strings_are_text(backend: LLGuidanceBackend) -> None:
    grammar = backend.compile_schema({"type": "string", "maxLength": 3})
    for bad in ('"\\ud800"', '"\x01"', '"\t"', '"a\nb"', '"\x00"'):
        assert not accepts(backend, grammar, bad)
    raw = [i for i, piece in enumerate(backend.vocabulary.token_bytes) if piece == b"\x9f"]
    guide = grammar.start()
    guide.accept(backend.vocabulary.tokenize(b'"'))
    assert raw and guide.accept(raw) == 0  # bytes that are no UTF-8
    for good in ('"😀é\\n"', '"\\\\\\"x"'):
        assert accepts(backend, grammar, good)


def test_not_even_json(backend: LLGuidanceBackend) -> None:
    for bad in ("{", '"', "[1]", "7"):
        with pytest.raises(SchemaError):
            backend.compile_schema(bad)
