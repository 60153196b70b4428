"""Keys and unique items: repetitions are left out of masks, and seen where a mask could not."""

from __future__ import annotations

import json

import numpy as np
import pytest
from guided_cases import PADDED, accepts, dumps, walk

from engine.guided.distinct import Scanner, TokensByPrefix
from engine.guided.llg import LLGuidanceBackend


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a"', '{"a": {"b": 1}, "\\u0061"', '[{"x": [], "x"', '{"a": "}", "b": 1, "a"', '{"": 0, ""']
)
def test_repeated_keys_are_seen(text: str) -> None:
    scanner = Scanner({})
    assert scanner.feed(text[:-1].encode())
    assert not scanner.feed(text[-1:].encode())


@pytest.mark.parametrize(
    "text", ['{"a": {"a": 1}, "b": {"a": 1}}', '["a", "a"]', '{"a": "a", "b": "a"}', '{"a,": 1, "a": 2, "a\\"": 3}']
)
def test_what_is_no_repetition(text: str) -> None:
    assert Scanner({}).feed(text.encode())


@pytest.mark.parametrize(
    "items",
    [
        '"a", "a"',
        "1, 1.0",
        '{"x": 1, "y": 2}, {"y": 2, "x": 1}',
        '[1, "a"], [1, "a"]',
        "true, true",
        '"\\n", "\\u000a"',
        "12, 1, 12",
    ],
)
def test_repeated_items_are_seen(items: str) -> None:
    for text, names in (
        (f"[{items}]", {"": None}),
        (f'{{"t": [{items}]}}', {"t": None}),
        (f'{{"t": [[{items}]]}}', {"t[]": None}),
        (f'{{"q": [{items}]}}', {"*": None}),
    ):
        assert not Scanner(names).feed(text.encode())
    assert Scanner({"other": None}).feed(f'{{"t": [{items}]}}'.encode())
    assert Scanner({"t": None}).feed(b'{"t": [1, true, "1", 10, [1], {"1": 1}, null]}')


def test_repeats_name_what_may_not_follow() -> None:
    scanner = Scanner({"t": (b'"abc"', b'"abd"', b'"x"')})
    scanner.feed(b'{"t": ["abc", "x", ')
    repeating, doomed = scanner.repeats()
    assert b'"abc"' in repeating and b'"x"' in repeating
    assert b'"abc' in doomed and b'"x' in doomed and b'"ab' not in doomed  # "abd" is still to be had
    scanner.feed(b'"ab')
    assert scanner.repeats() == ([b'c"'], [b"c"])
    numbers = Scanner({"": None})
    numbers.feed(b"[12, 1")
    assert b"2," in numbers.repeats()[0] and b"2" not in numbers.repeats()[0]  # 123 may follow


def test_tokens_by_prefix() -> None:
    pieces = [b"a", b"ab", b"abc", b"b", b"", b"ab", b'"']
    row = np.full(1, -1, dtype=np.int32)
    TokensByPrefix(pieces).clear(row, [b"ab"], [b"b"])
    left = [i for i in range(len(pieces)) if row[0] >> i & 1]
    assert left == [0, 4, 6]


def test_tags(backend: LLGuidanceBackend) -> None:
    labels = ["sport", "space", "politics", "art", "a"]
    grammar = backend.compile_schema(
        {
            "type": "object",
            "properties": {"tags": {"type": "array", "items": {"enum": labels}, "uniqueItems": True}},
            "required": ["tags"],
        }
    )
    assert accepts(backend, grammar, dumps({"tags": ["art", "a", "space", "sport", "politics"]}))
    assert not accepts(backend, grammar, dumps({"tags": ["art", "a", "art"]}))
    lengths = set()
    for seed in range(60):
        tokens, ended = walk(backend, grammar, seed, 60)
        assert ended  # no walk runs into a dead end
        lengths.add(len(grammar.check(backend.vocabulary.text(tokens).decode())["tags"]))
    assert {0, 1, 2, 3, 4} <= lengths


def test_free_keys(backend: LLGuidanceBackend) -> None:
    grammar = backend.compile_schema(
        {
            "type": "object",
            "additionalProperties": {"type": "integer", "minimum": 0, "maximum": 9},
            "propertyNames": {"pattern": "^[ab]{1,2}$"},
            "minProperties": 3,
        }
    )
    ended = 0
    for seed in range(40):
        tokens, done = walk(backend, grammar, seed, 60)
        text = backend.vocabulary.text(tokens).decode()
        if done:
            ended += 1
            assert len(json.loads(text)) == len(json.loads(text, object_pairs_hook=list)) >= 3
        grammar.check(backend.vocabulary.text(grammar.close(tokens, 60).tolist()).decode())
    assert ended > 10


def test_where_only_a_repetition_could_follow(backend: LLGuidanceBackend) -> None:
    grammar = backend.compile_schema({"type": "array", "items": {"type": "string", "pattern": "^a$"}, "uniqueItems": True})
    guide, mask = grammar.start(), np.zeros((1, PADDED // 32), np.int32)
    guide.accept(backend.vocabulary.tokenize(b'["a"'))
    guide.accept(backend.vocabulary.tokenize(b", "))
    while guide.error is None:
        backend.fill([guide], mask)
        bits = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        assert bits.size
        guide.accept([int(bits[-1])])
    assert not guide.accepting and not guide.finished
    assert grammar.check(
        backend.vocabulary.text(grammar.close(backend.vocabulary.tokenize(b'["a", "a'), 20).tolist()).decode()
    ) == ["a"]
