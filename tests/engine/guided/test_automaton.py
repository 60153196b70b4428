"""Token automata against the guides of the same grammar: the same tokens are allowed everywhere, and what comes out is valid."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from guided_cases import PADDED, byte_level_tokenizer
from llguidance import LLMatcher

from engine.guided import llg
from engine.guided.automaton import TokenAutomaton, token_automaton
from engine.guided.byte_dfa import TooLarge
from engine.guided.closing import byte_tokenizer
from engine.guided.llg import WHITESPACE, LLGrammar, LLGuidanceBackend
from engine.guided.lower import lower
from engine.guided.regular import choice_dfa, schema_dfa
from engine.guided.token_trie import Vocabulary

STRING, INTEGER = {"type": "string"}, {"type": "integer"}


def integer(low: int | None = None, high: int | None = None) -> dict[str, Any]:
    return INTEGER | ({} if low is None else {"minimum": low}) | ({} if high is None else {"maximum": high})


def record(required: str = "", **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required.split(), "additionalProperties": False}


REGULAR: list[Any] = [
    record("sentiment topic confidence keywords rationale", sentiment={"enum": ["positive", "negative", "mixed"]},
           topic={"enum": ["billing", "shipping", "product quality", "other"]}, confidence=integer(0, 100),
           keywords={"type": "array", "items": STRING | {"minLength": 3, "maxLength": 6}, "minItems": 3, "maxItems": 3},
           rationale=STRING | {"minLength": 5, "maxLength": 12}),
    *(integer(*bounds) for bounds in [(), (0, 100), (-5, 1), (-100, -7), (13,), (None, -13), (None, 55), (-77,), (5, 12345), (0,),
                                      (1, 5), (None, 0), (-3, 0), (-1234, 999), (10, 10), (-2**53, 2**53)]),
    INTEGER | {"exclusiveMinimum": -10, "exclusiveMaximum": 1000},
    *({"type": "number", "minimum": low, "maximum": high} for low, high in [(0, 1), (0, 10.0), (1, 5), (7, 7), (99, 1234)]),
    {"type": "number"}, {"type": "number", "minimum": 0}, {"type": ["number", "null"], "minimum": 0, "exclusiveMaximum": 20},
    {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
    STRING, STRING | {"maxLength": 3}, STRING | {"minLength": 4}, {"type": "boolean"}, {"type": "null"},
    {"type": ["string", "null"], "minLength": 2, "maxLength": 4}, {"type": ["integer", "boolean"], "minimum": 3},
    {"enum": ["é", "\n\"", "😀a", "a/b", "\u2028", "a\\b", 1, -20, None, True]}, {"const": "only"},
    {"enum": [1.5, -0.25, [1, "a", []], {"b": 1, "a": {"c": None}}]},
    {"anyOf": [STRING | {"maxLength": 5}, {"type": "null"}, {"enum": ["longer than five", "abc"]}]},
    {"type": "array", "items": STRING}, {"type": "array", "items": INTEGER, "minItems": 1}, {"type": "array", "maxItems": 0},
    {"type": "array", "items": INTEGER, "minItems": 2, "maxItems": 4}, {"type": "array", "items": INTEGER, "maxItems": 1},
    {"type": "array", "prefixItems": [INTEGER, STRING], "items": False},
    {"type": "array", "prefixItems": [INTEGER, STRING], "items": {"type": "boolean"}},
    {"type": "array", "prefixItems": [INTEGER, {"type": "null"}], "items": {"type": "null"}, "minItems": 3, "maxItems": 5},
    record(), record("b", a=INTEGER, b=STRING, c=INTEGER), record("", a=INTEGER, b=STRING, c={"type": "null"}),
    record("a", a={"enum": ["x", "xy"]}, b=record("", x=STRING, y={"type": "boolean"})),
    record('é"/', **{'é"/': INTEGER}), record("", **{"\n": INTEGER}),
    record("", a=integer(0, 3), b=integer(0, 3)) | {"minProperties": 1},
    {"anyOf": [record("k v", k={"const": "a"}, v=INTEGER), record("k", k={"const": "b"}, v=STRING)]},
    {"$ref": "#/$defs/p", "$defs": {"p": record("a b", a={"$ref": "#/$defs/q"}, b={"$ref": "#/$defs/q"}), "q": integer(1, 20)}},
]
IRREGULAR: list[Any] = [
    {"type": "number", "maximum": 3}, {"type": "number", "minimum": 0.5, "maximum": 2},
    {"type": "number", "minimum": -1, "maximum": 1},
    STRING | {"pattern": "^a+$"}, STRING | {"format": "date"}, {"type": "object"}, True,
    INTEGER | {"multipleOf": 3}, {"enum": [1e100]}, {"enum": [[2.0]]},
    {"type": "array", "items": STRING, "uniqueItems": True}, STRING | {"maxLength": 5000},
    {"$ref": "#/$defs/t", "$defs": {"t": record("", child={"$ref": "#/$defs/t"})}},
]


@pytest.fixture(scope="module")
def backend() -> LLGuidanceBackend:
    return LLGuidanceBackend(byte_level_tokenizer(), PADDED, [0, 1])


@pytest.fixture(scope="module")
def compact() -> LLGuidanceBackend:
    return LLGuidanceBackend(byte_level_tokenizer(), PADDED, [0, 1], whitespace="compact")


def bits(mask: np.ndarray, width: int) -> list[int]:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:width]).tolist()


@pytest.mark.parametrize("schema", REGULAR, ids=lambda schema: json.dumps(schema)[:60])
def test_bytes_are_those_of_the_grammar_engine(schema: Any) -> None:
    """Walks through both byte by byte, mostly to the ends of strings and objects."""
    lowered, rng = lower(schema).schema, random.Random(0)
    matcher = LLMatcher(byte_tokenizer(), LLMatcher.grammar_from_json_schema(json.dumps(lowered), overrides=WHITESPACE["dumps"]))
    dfa = schema_dfa(lowered, ", ", ": ", 4096)
    for _ in range(25):
        walk, state, text = matcher.deep_copy(), 0, b""
        while len(text) < 200:
            allowed = bits(np.frombuffer(walk.compute_bitmask(), dtype=np.uint8), 256)
            assert allowed == np.flatnonzero(dfa.delta[state] >= 0).tolist(), text
            assert walk.is_accepting() == dfa.final[state], text
            if not allowed or (walk.is_accepting() and rng.random() < 0.3):
                break
            closing = [byte for byte in allowed if byte in b'"]}']
            byte = rng.choice(closing if closing and rng.random() < 0.4 else allowed)
            state, text = int(dfa.delta[state, byte]), text + bytes([byte])
            walk.consume_token(byte)


def walk(backend: LLGuidanceBackend, grammar: LLGrammar, rng: random.Random, longest: int = 120) -> list[int] | None:
    """Random tokens through both at once, to an end; None where that did not come."""
    automaton, guide, state, out = grammar.automaton, grammar.start(), 0, []
    assert automaton is not None
    mask = np.empty((1, -(-PADDED // 32)), dtype=np.int32)
    texts = backend.vocabulary.token_bytes
    while len(out) < longest:
        start, size, end = automaton.chain_start[state], automaton.chain_size[state], automaton.chain_end[state]
        chain, forced = automaton.chain[start : start + size].tolist(), guide.forced()
        assert chain[: len(forced)] == forced                    # it may see further than the grammar engine does
        if chain:
            assert bits(automaton.masks[automaton.mask_of[state]], PADDED) == chain[:1]
            for token in chain:
                state = automaton.step(state, token)
                assert state >= 0
            assert guide.accept(chain) == len(chain)
            assert state == end
            out += chain
            continue
        assert (guide.finished, guide.accepting) == (automaton.finished[state], automaton.final[state])
        if guide.finished:
            return out
        backend.fill([guide], mask)
        allowed = bits(mask[0], PADDED)
        assert allowed == bits(automaton.masks[automaton.mask_of[state]], PADDED)
        assert allowed == np.flatnonzero(automaton.next[state][automaton.classes] >= 0).tolist()
        closing = [t for t in allowed if texts[t].endswith((b'"', b"]", b"}"))]
        token = rng.choice(closing if closing and rng.random() < 0.4 else allowed)
        if token in (0, 1):
            assert automaton.step(state, token) == state
            return out
        out.append(token)
        state = automaton.step(state, token)
        assert guide.accept([token]) == 1
    return None


@pytest.mark.parametrize("schema", REGULAR, ids=lambda schema: json.dumps(schema)[:60])
def test_tokens_are_those_of_the_guides(backend: LLGuidanceBackend, compact: LLGuidanceBackend, schema: Any) -> None:
    for each in (backend, compact):
        grammar, rng, ended = each.compile_schema(schema), random.Random(1), 0
        for _ in range(12):
            if (out := walk(each, grammar, rng)) is not None:
                if not grammar.automaton.sound:              # numbers: what is beyond a double is closed
                    out = grammar.close(out, len(out) + grammar.min_tokens).tolist()
                grammar.check(each.vocabulary.text(out).decode())
                ended += 1
        assert ended


def test_an_automaton_says_where_the_check_may_still_fail(backend: LLGuidanceBackend) -> None:
    """Of numbers without bounds; every other walk here passes its check unseen."""
    unsound = [{"type": "number"}, INTEGER, integer(3), integer(None, 3), {"type": "number", "minimum": 0}, record("", a=INTEGER)]
    sound = [integer(0, 10**18), {"type": "number", "minimum": 0, "maximum": 5}, STRING, record("", a=integer(0, 1))]
    assert not any(backend.compile_schema(schema).automaton.sound for schema in unsound)
    assert all(backend.compile_schema(schema).automaton.sound for schema in sound)
    grammar = backend.compile_schema({"type": "number"})
    state, text = 0, "1e999"
    for token in backend.vocabulary.tokenize(text.encode()):
        state = grammar.automaton.step(state, token)
    assert grammar.automaton.final[state]
    with pytest.raises(ValueError, match="number"):
        grammar.check(text)


def test_choices(backend: LLGuidanceBackend) -> None:
    choices, rng = ["yes", "yes, but", "no", "né", '"', "<|end|>"], random.Random(2)
    grammar = backend.compile_choice(choices)
    walks = [walk(backend, grammar, rng) for _ in range(60)]
    said = {backend.vocabulary.text(out).decode() for out in walks if out is not None}
    assert said == set(choices)


@pytest.mark.parametrize("schema", IRREGULAR, ids=lambda schema: json.dumps(schema)[:60])
def test_what_is_not_regular_is_left_to_guides(backend: LLGuidanceBackend, schema: Any) -> None:
    assert backend.compile_schema(schema).automaton is None


def test_flexible_white_space_is_left_to_guides() -> None:
    backend = LLGuidanceBackend(byte_level_tokenizer(), PADDED, [0], whitespace="flexible")
    assert backend.compile_schema(record("a", a=INTEGER)).automaton is None


@pytest.mark.parametrize("limit, value, made", [("MAX_AUTOMATA", 2, 2), ("MAX_AUTOMATA_BYTES", 1, 1)])
def test_only_the_first_grammars_get_one(monkeypatch: pytest.MonkeyPatch, limit: str, value: int, made: int) -> None:
    """The others are spared the work as well: in a job of many schemas it is half of the time to compile."""
    monkeypatch.setattr(llg, limit, value)
    built = []
    monkeypatch.setattr(llg, "schema_dfa", lambda *args: built.append(args) or schema_dfa(*args))
    backend = LLGuidanceBackend(byte_level_tokenizer(), PADDED, [0, 1])
    grammars = [backend.compile_schema(schema) for schema in [*IRREGULAR[-1:], *REGULAR[:5]]]
    assert [g.automaton is not None for g in grammars] == [False] + [True] * made + [False] * (5 - made)
    assert len(built) == 1 + made


def test_the_number_of_states_is_limited() -> None:
    with pytest.raises(TooLarge):
        choice_dfa([str(10**50 + i) for i in range(100)], 200)


def small_automaton(choices: list[str], pieces: list[bytes]) -> TokenAutomaton | None:
    """Token 0 ends; the others are `pieces`."""
    def tokenize(text: bytes) -> list[int]:
        out = []
        while text:
            piece = max((p for p in pieces if text.startswith(p)), key=len)
            out.append(pieces.index(piece) + 1)
            text = text[len(piece) :]
        return out

    return token_automaton(choice_dfa(choices, 100), Vocabulary([b"", *pieces]), tokenize, [0], 40)


def test_tokens_that_lead_nowhere_are_left_out() -> None:
    """No token begins with d, so that after "abc" nothing can come."""
    automaton = small_automaton(["abcd", "abx"], [b"ab", b"abc", b"abx", b"x", b"a", b"b", b"c"])
    assert automaton is not None
    assert bits(automaton.masks[automaton.mask_of[0]], 40) == [1, 3, 5]
    assert small_automaton(["d"], [b"a", b"b"]) is None


def test_forced_text_is_written_as_the_model_would() -> None:
    """Also token by token: of several tokens that might follow only the first of those is allowed."""
    pieces = [b"1", b"2", b" ", b"l", b"lo", b"o", b"ng", b"n", b"g", b"e", b"r", b"ger"]
    automaton = small_automaton(["1 long", "2 longer"], pieces)
    assert automaton is not None
    for choice, want in ((1, [3, 5, 7]), (2, [3, 5, 7, 10, 11])):
        state, out = automaton.step(0, choice), []
        size = automaton.chain_size[state]
        chain = automaton.chain[automaton.chain_start[state] :][:size].tolist()
        end = automaton.chain_end[state]
        while not automaton.finished[state]:
            out += bits(automaton.masks[automaton.mask_of[state]], 40)
            assert automaton.chain_size[state] == size - len(out) + 1
            state = automaton.step(state, out[-1])
        assert (out, state) == (want, end) == (chain, end)
