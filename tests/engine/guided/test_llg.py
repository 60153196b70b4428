"""Guides and masks: what is allowed is what is accepted, padding never is, errors are seen."""

from __future__ import annotations

import numpy as np
import pytest
from guided_cases import PADDED, accepts, dumps, walk
from transformers import PreTrainedTokenizerFast

from engine.guided.grammar import SchemaError
from engine.guided.llg import LLGuidanceBackend, default_limits

LABEL = {
    "type": "object",
    "properties": {"label": {"enum": ["positive", "negative"]}, "score": {"type": "integer"}},
    "required": ["label", "score"],
}


def allowed(mask: np.ndarray) -> np.ndarray:
    """bool [rows, 32 * words]"""
    return np.unpackbits(np.ascontiguousarray(mask).view(np.uint8), axis=1, bitorder="little").astype(bool)


def test_mask_is_what_is_accepted(backend: LLGuidanceBackend) -> None:
    grammar = backend.compile_schema(LABEL)
    text = b'{"label": "negative", "score": 12}'
    for cut in (0, 5, 11, 14, 30, 33, len(text)):
        begun = backend.vocabulary.tokenize(text[:cut])
        guide, mask = grammar.start(), np.full((1, PADDED // 32), -1, dtype=np.int32)
        assert guide.accept(begun) == len(begun)
        backend.fill([guide], mask)
        bits = allowed(mask)[0]
        for token in range(len(backend.vocabulary.token_bytes)):
            if token in (0, 1):
                assert bits[token] == guide.accepting
                continue
            other = grammar.start()
            other.accept(begun)
            # A forced token narrows the mask to it, although other spellings of the same text are accepted.
            assert not bits[token] or other.accept([token]) == 1


@pytest.mark.parametrize("vocab_size", [PADDED, PADDED - 7, 700, 40 * 32])
def test_padded_columns_are_never_allowed(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
    backend = LLGuidanceBackend(tokenizer, vocab_size, [0], threads=1)
    guide = backend.compile_schema({"type": "string"}).start()
    guide.accept(backend.vocabulary.tokenize(b'"a'))
    mask = np.full((3, (vocab_size + 31) // 32), -1, dtype=np.int32)
    backend.fill([guide, guide.__class__(guide.matcher.deep_copy())], mask)
    assert not allowed(mask)[:2, len(tokenizer) :].any()
    assert allowed(mask)[:2, : len(tokenizer)].sum() > 2 * 200
    assert (mask[2] == -1).all()  # rows without a guide are left alone


def test_fewer_columns_than_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    few = len(tokenizer) - 9
    backend = LLGuidanceBackend(tokenizer, few, [0], threads=1)
    guide, mask = backend.compile_schema({"type": "string"}).start(), np.full((1, (few + 31) // 32), -1, dtype=np.int32)
    guide.accept(backend.vocabulary.tokenize(b'"'))
    backend.fill([guide], mask)
    assert allowed(mask)[0, :few].sum() > 200 and not allowed(mask)[0, few:].any()


def test_mask_must_have_the_right_shape(backend: LLGuidanceBackend) -> None:
    guide = backend.compile_schema(LABEL).start()
    for mask in (
        np.zeros((1, PADDED // 32 + 1), np.int32),
        np.zeros((1, PADDED // 32), np.int64),
        np.zeros((0, PADDED // 32), np.int32),
    ):
        with pytest.raises(ValueError, match="mask must be"):
            backend.fill([guide], mask)


def test_forced_tokens_are_the_models_own(backend: LLGuidanceBackend) -> None:
    guide = backend.compile_schema(LABEL).start()
    forced = guide.forced()
    assert backend.vocabulary.text(forced).startswith(b'{"label"')
    assert forced == backend.vocabulary.tokenize(b'{"label": "positive", "score": 1}')[: len(forced)]
    assert guide.forced() == forced  # asking does not advance
    assert guide.accept(forced) == len(forced)
    guide.accept(backend.vocabulary.tokenize(b"pos"))
    assert b'itive", "score": '.startswith(backend.vocabulary.text(guide.forced()).rstrip() or b"?")


def test_the_end(backend: LLGuidanceBackend) -> None:
    closed = backend.compile_schema(LABEL)
    guide = closed.start()
    guide.accept(backend.vocabulary.tokenize(b'{"label": "positive", "score": 1'))
    assert not guide.finished and not guide.accepting
    guide.accept(backend.vocabulary.tokenize(b"}"))
    assert guide.finished and guide.accepting and guide.error is None and guide.forced() == []
    number = backend.compile_schema({"type": "integer"}).start()
    number.accept(backend.vocabulary.tokenize(b"12"))
    assert number.accepting and not number.finished  # another digit may follow
    mask = np.zeros((1, PADDED // 32), np.int32)
    backend.fill([number], mask)
    assert allowed(mask)[0, [0, 1]].all()  # both end tokens


def test_wrong_tokens_are_not_taken(backend: LLGuidanceBackend) -> None:
    grammar = backend.compile_schema(LABEL)
    guide = grammar.start()
    good, bad = backend.vocabulary.tokenize(b'{"label": "'), backend.vocabulary.tokenize(b"zzz")
    assert guide.accept(good + bad) == len(good)
    assert guide.error is None
    assert guide.accept(backend.vocabulary.tokenize(b'positive", "score": 3}')) > 0 and guide.finished
    assert grammar.start().accept([0]) == 0  # the end token, where the output may not end


def test_guides_are_independent(backend: LLGuidanceBackend) -> None:
    grammar = backend.compile_schema(LABEL)
    first, second = grammar.start(), grammar.start()
    first.accept(backend.vocabulary.tokenize(b'{"label": "positive"'))
    assert (
        second.accept(backend.vocabulary.tokenize(b'{"label": "negative", "score": 0}'))
        and second.finished
        and not first.finished
    )


def test_a_resource_limit_is_an_error_not_an_end(tokenizer: PreTrainedTokenizerFast) -> None:
    limits = default_limits()
    small = type(limits)(initial_lexer_fuel=limits.initial_lexer_fuel, step_lexer_fuel=20, verbose_errors=False)
    backend = LLGuidanceBackend(tokenizer, PADDED, [0], limits=small, threads=1)
    schema = {"type": "string", "pattern": "^(a.*b.*c.*d|x.*y.*z){1,3}$", "maxLength": 400}
    try:
        grammar = backend.compile_schema(schema)
    except SchemaError:
        return
    guide, mask = grammar.start(), np.zeros((1, PADDED // 32), np.int32)
    for token in backend.vocabulary.tokenize(b'"aabcabcxyzxyz'):
        backend.fill([guide], mask)
        guide.accept([token])
    assert guide.error is not None
    assert not guide.finished and not guide.accepting


@pytest.mark.parametrize(
    "whitespace, text",
    [("dumps", '{"a": [1, 2], "b": {}}'), ("compact", '{"a":[1,2],"b":{}}'), ("flexible", '{ "a" :\n[1,2] , "b": { } }')],
)
def test_whitespace(tokenizer: PreTrainedTokenizerFast, whitespace: str, text: str) -> None:
    backend = LLGuidanceBackend(tokenizer, PADDED, [0], whitespace=whitespace, threads=1)
    grammar = backend.compile_schema({"type": "object", "properties": {"a": {"type": "array"}, "b": {"type": "object"}}})
    assert accepts(backend, grammar, text)
    if whitespace != "flexible":
        assert not accepts(backend, grammar, '{ "a" :\n[1,2] , "b": { } }')
    for seed in range(8):
        tokens, _ = walk(backend, grammar, seed, 30)
        grammar.check(backend.vocabulary.text(grammar.close(tokens, 30).tolist()).decode())
    with pytest.raises(ValueError, match="dumps, compact, flexible"):
        LLGuidanceBackend(tokenizer, PADDED, [0], whitespace="pretty")


def test_choice(backend: LLGuidanceBackend) -> None:
    options = ["yes", "no", 'may"be', "是的", "nope", "a\nb", "<|end|>"]
    grammar = backend.compile_choice(options)
    for option in options:
        assert accepts(backend, grammar, option) and grammar.check(option) == option
    for text in ("", "ye", "yes ", "nop", "maybe"):
        assert not accepts(backend, grammar, text)
        with pytest.raises(ValueError):
            grammar.check(text)
    assert grammar.check(backend.vocabulary.text(grammar.minimal.tolist()).decode())
    for bad in ([], ["a", ""], ["a", 1]):
        with pytest.raises(SchemaError):
            backend.compile_choice(bad)  # type: ignore[arg-type]


def test_regex(backend: LLGuidanceBackend) -> None:
    grammar = backend.compile_regex(r"[A-Z]{2}-\d{4}(é|ü)?")
    assert accepts(backend, grammar, "AB-1234") and accepts(backend, grammar, "AB-1234é")
    assert not accepts(backend, grammar, "AB-123") and not accepts(backend, grammar, "xAB-1234")
    with pytest.raises(ValueError, match="does not match"):
        grammar.check("AB-12")
    closed = grammar.close(backend.vocabulary.tokenize(b"XY-1"), 12).tolist()
    assert backend.vocabulary.text(closed).startswith(b"XY-1") and grammar.check(backend.vocabulary.text(closed).decode())
    for bad in ("(", "(?=a)b", r"(a)\1"):
        with pytest.raises(SchemaError):
            backend.compile_regex(bad)


def test_other_alphabets(backend: LLGuidanceBackend) -> None:
    labels = ["积极的", "消极的", "😀😃", "👩‍👩‍👧", "Ελληνικά", 'ч"х', "naïve", "\u2028"]
    grammar = backend.compile_schema({"type": "object", "properties": {"ключ": {"enum": labels}}, "required": ["ключ"]})
    for label in labels:
        assert accepts(backend, grammar, dumps({"ключ": label}))
    seen = set()
    for seed in range(60):
        tokens, ended = walk(backend, grammar, seed, 80)
        if ended:
            seen.add(grammar.check(backend.vocabulary.text(tokens).decode())["ключ"])
    assert len(seen) >= 6  # all can be reached, not only accepted
