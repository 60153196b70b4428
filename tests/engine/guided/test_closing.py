"""Trim and close: within the budget, valid, and keeping what can be kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from guided_cases import dumps, walk

from engine.guided.llg import LLGrammar, LLGuidanceBackend

RECORD: dict[str, Any] = {
    "type": "object",
    "properties": {
        "label": {"enum": ["positive", "negative", "neutral"]},
        "reason": {"type": "string", "minLength": 3},
        "tags": {"type": "array", "items": {"type": "string"}, "uniqueItems": True, "minItems": 2},
        "when": {"type": "string", "format": "date-time"},
        "code": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
        "score": {"type": "number", "minimum": 10, "maximum": 99},
    },
    "required": ["label", "reason", "tags", "when", "code", "score"],
}
VALUE = {
    "label": "neutral",
    "reason": 'it says "fine", \\ and no more 😀😀 — naïve',
    "tags": ["ab", "cd", "e\nf"],
    "when": "2024-02-29T12:00:00Z",
    "code": "XYZ-0042",
    "score": 42.5,
}


def text_of(backend: LLGuidanceBackend, tokens: np.ndarray) -> str:
    return backend.vocabulary.text(tokens.tolist()).decode()


def test_every_cut_of_a_record(backend: LLGuidanceBackend) -> None:
    grammar = backend.compile_schema(RECORD)
    tokens = backend.vocabulary.tokenize(dumps(VALUE).encode())
    for cut in range(len(tokens)):
        for budget in {max(grammar.min_tokens, cut), max(grammar.min_tokens, cut + 12)}:
            closed = grammar.close(tokens[:cut], budget)
            assert closed.dtype == np.int32 and len(closed) <= budget
            grammar.check(text_of(backend, closed))
            guide = grammar.start()
            assert guide.accept(closed.tolist()) == len(closed) and guide.accepting
    roomy = grammar.close(tokens[:30], 500)
    assert roomy[:30].tolist() == tokens[:30]  # with room nothing is trimmed


def test_few_tokens_are_trimmed(backend: LLGuidanceBackend) -> None:
    grammar = backend.compile_schema({"type": "object", "properties": {"reason": {"type": "string"}}, "required": ["reason"]})
    tokens = backend.vocabulary.tokenize(dumps({"reason": "word " * 200}).encode())[:100]
    closed = grammar.close(tokens, 100)
    assert len(closed) >= 98 and closed[:97].tolist() == tokens[:97]


def test_a_valid_output_comes_back_unchanged(backend: LLGuidanceBackend) -> None:
    grammar = backend.compile_schema(RECORD)
    tokens = backend.vocabulary.tokenize(dumps(VALUE).encode())
    assert grammar.close(tokens, len(tokens)).tolist() == tokens


def test_what_the_grammar_cannot_see_is_mended(backend: LLGuidanceBackend) -> None:
    grammar = backend.compile_schema({"type": "object", "properties": {"n": {"type": "number"}}, "required": ["n"]})
    endless = backend.vocabulary.tokenize(b'{"n": ' + b"7" * 400 + b"}")
    guide = grammar.start()
    assert guide.accept(endless) == len(endless) and guide.finished
    value = grammar.check(text_of(backend, grammar.close(endless, len(endless))))
    assert 1e100 < value["n"] < 1e309
    with pytest.raises(ValueError):
        grammar.check(backend.vocabulary.text(endless).decode())


def test_tokens_that_break_the_grammar_are_dropped(backend: LLGuidanceBackend) -> None:
    grammar = backend.compile_schema(RECORD)
    good = backend.vocabulary.tokenize(b'{"label": "positive", "reason": "so')
    closed = grammar.close([*good, 0, 1, *backend.vocabulary.tokenize(b"}}}}")], 200)
    assert closed[: len(good)].tolist() == good
    grammar.check(text_of(backend, closed))


def test_the_shortest_output(backend: LLGuidanceBackend) -> None:
    cases: list[tuple[Any, str]] = [
        (
            {
                "type": "object",
                "properties": {"a": {"type": "string"}, "b": {"type": "integer"}, "c": {"type": "null"}},
                "required": ["b"],
            },
            '{"b": 0}',
        ),
        ({"type": "array", "items": {"enum": ["long name", "x"]}, "minItems": 2}, '["x", "x"]'),
        ({"anyOf": [{"type": "string", "pattern": "^[a-z]{20}$"}, {"type": "null"}]}, "null"),
        ({"type": "integer", "minimum": 5, "maximum": 1000}, "5"),
        ({}, "0"),
        ({"type": "string"}, '""'),
        ({"enum": ["积极", "b"]}, '"b"'),
    ]
    for schema, shortest in cases:
        grammar = backend.compile_schema(schema)
        assert len(text_of(backend, grammar.minimal)) <= len(shortest)
        assert grammar.min_tokens == len(grammar.minimal) == len(grammar.close([], grammar.min_tokens))


PAIRS = {"type": "array", "items": {"type": ["boolean", "null"]}, "minItems": 2, "uniqueItems": True}
FLAGS = {"type": "object", "properties": {"q": {"type": "boolean"}, "r": {"type": "boolean"}}, "required": ["q", "r"]}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": PAIRS, "minItems": 2},
        {"type": "array", "items": PAIRS, "minItems": 2, "uniqueItems": True},
        {"type": "array", "items": FLAGS, "minItems": 4, "uniqueItems": True},  # all that there are
        {
            "type": "array",
            "items": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2},
            "minItems": 3,
            "uniqueItems": True,
        },
    ],
)
def test_items_that_must_differ_are_closed(backend: LLGuidanceBackend, schema: dict[str, Any]) -> None:
    """Where bytes that are forced may end a repetition, and where all that is left to choose from repeats."""
    grammar = backend.compile_schema(schema)
    for seed in range(20):
        tokens, _ = walk(backend, grammar, seed, 24)
        for cut in range(0, len(tokens) + 1, 3):
            grammar.check(text_of(backend, grammar.close(tokens[:cut], max(grammar.min_tokens, cut))))


def test_too_small_a_budget(backend: LLGuidanceBackend) -> None:
    grammar = backend.compile_schema(RECORD)
    with pytest.raises(ValueError, match=rf"at least|needs {grammar.min_tokens}"):
        grammar.close([], grammar.min_tokens - 1)


@pytest.mark.parametrize(
    "pattern",
    [
        r"^.+@.+\.[a-z]{2,}$",
        r"^[a-z]+(-[a-z]+)*\.(png|jpe?g)$",
        r"^(https?|ftp)://[^/]+/.*\?q=\d{3}$",
        r"^\d{3}-\d{2}-\d{4}$",
        r"^[^a-zA-Z0-9]{4}$",
        r"^(?:[A-F0-9]{2}:){5}[A-F0-9]{2}$",
        "^[\u4e00-\u9fff]{2,}$",
    ],
)
def test_patterns_are_closed_from_anywhere(backend: LLGuidanceBackend, pattern: str) -> None:
    grammar = backend.compile_schema({"type": "array", "items": {"type": "string", "pattern": pattern}, "minItems": 1})
    for seed in range(5):
        tokens, _ = walk(backend, grammar, seed, 40)
        for cut in range(0, len(tokens), 5):
            budget = max(grammar.min_tokens, cut)
            grammar.check(text_of(backend, grammar.close(tokens[:cut], budget)))


def test_deep_nesting_is_closed(backend: LLGuidanceBackend) -> None:
    grammar: LLGrammar = backend.compile_schema(
        {"$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"}
    )
    tokens = backend.vocabulary.tokenize(b"[" * 300)
    closed = grammar.close(tokens, 300)
    assert len(closed) <= 300 and len(text_of(backend, closed)) > 150
    grammar.check(text_of(backend, closed))


def test_closing_does_not_depend_on_the_time_of_day(backend: LLGuidanceBackend) -> None:
    first, second = backend.compile_schema(RECORD), backend.compile_schema(RECORD)
    assert first.minimal.tolist() == second.minimal.tolist()
    tokens = backend.vocabulary.tokenize(dumps(VALUE).encode())[:40]
    assert first.close(tokens, 120).tolist() == second.close(tokens, 120).tolist()
