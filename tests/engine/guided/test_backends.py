"""The backends that are there for comparisons: same interface, and nothing invalid leaves a grammar once it is closed."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from guided_cases import PADDED, byte_level_tokenizer

from engine.guided.grammar import SchemaError
from engine.guided.tools import read_tools

# Two that these backends keep, then keywords that they drop.
SCHEMAS: list[Any] = [
    {"type": "object", "properties": {"label": {"enum": ["good", "bad 😀", "中文"]}, "sure": {"type": "boolean"}},
     "required": ["label", "sure"], "additionalProperties": False},
    {"type": "object", "required": ["name", "tags"], "additionalProperties": False, "properties": {
        "name": {"type": "string", "maxLength": 8}, "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3}}},
    {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 12}}, "required": ["n"]},
    {"type": "object", "required": ["t"], "properties": {
        "t": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "uniqueItems": True, "minItems": 1, "maxItems": 3}}},
]  # fmt: skip


@pytest.fixture(scope="module", params=["outlines_core", "xgrammar"])
def backend(request: pytest.FixtureRequest) -> Any:
    if request.param == "outlines_core":
        from engine.guided.outlines_core import OutlinesCoreBackend

        return OutlinesCoreBackend(byte_level_tokenizer(), PADDED, [0, 1])
    pytest.importorskip("xgrammar")
    from engine.guided.xgrammar import XGrammarBackend

    return XGrammarBackend(byte_level_tokenizer(), PADDED, [0, 1])


def sample(backend: Any, grammar: Any, seed: int, budget: int) -> list[int]:
    random, mask = np.random.default_rng(seed), np.zeros((1, PADDED // 32), dtype=np.int32)
    guide, tokens = grammar.start(), []
    while len(tokens) < budget and not guide.finished:
        backend.fill([guide], mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        assert allowed.size and allowed.max() < len(backend.vocabulary.token_bytes)
        assert all(backend.vocabulary.token_bytes[t] or (t < 2 and guide.accepting) for t in allowed)
        token = int(random.choice(allowed))
        if token < 2:
            break
        assert guide.accept([token]) == 1
        tokens.append(token)
    return tokens


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_outputs_are_valid_once_closed(backend: Any, schema: Any) -> None:
    grammar = backend.compile_schema(schema)
    grammar.check(backend.vocabulary.text(grammar.minimal.tolist()).decode())
    for seed in range(12):
        budget = grammar.min_tokens + 3 * seed
        closed = grammar.close(sample(backend, grammar, seed, budget), budget).tolist()
        assert len(closed) <= budget
        grammar.check(backend.vocabulary.text(closed).decode())


def test_what_they_are_given_comes_out(backend: Any) -> None:
    value = {"label": "bad 😀", "sure": True}
    grammar, text = backend.compile_schema(SCHEMAS[0]), json.dumps(value, ensure_ascii=False)
    guide, tokens = grammar.start(), backend.vocabulary.tokenize(text.encode())
    assert guide.accept(tokens) == len(tokens) and guide.accepting and guide.error is None
    assert guide.accept([0]) == 0
    assert grammar.close(tokens, 99).tolist() == tokens
    assert grammar.check(text) == value
    assert grammar.start().accept(backend.vocabulary.tokenize(b"[")) == 0


def test_choices_and_regexes(backend: Any) -> None:
    words = ["yes", "no (maybe)", "żółć", 'a"b']
    for grammar, good in ((backend.compile_choice(words), words), (backend.compile_regex("[a-c]{2}x+"), ["abx", "ccxx"])):
        for text in good:
            tokens = backend.vocabulary.tokenize(text.encode())
            assert grammar.start().accept(tokens) == len(tokens) and grammar.check(text) == text
        with pytest.raises(ValueError, match=r"choices|does not match"):
            grammar.check("perhaps")
        for seed in range(6):
            closed = grammar.close(sample(backend, grammar, seed, 5), grammar.min_tokens + seed).tolist()
            grammar.check(backend.vocabulary.text(closed).decode())


def test_refusals(backend: Any) -> None:
    for schema in ({"type": "objekt"}, {"$ref": "http://example.com/x"}, {"type": "string", "pattern": "(["}):
        with pytest.raises(SchemaError):
            backend.compile_schema(schema)
    with pytest.raises(SchemaError, match="regular expression"):
        backend.compile_regex("([")
    with pytest.raises(SchemaError, match=r"tools need guided\.backend=llguidance"):
        backend.compile_tools("hermes", read_tools([{"name": "f"}]), "auto")
    with pytest.raises(SchemaError, match="best_effort needs"):
        backend.compile_loose({})
