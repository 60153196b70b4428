"""Patterns of schemas in the engine's dialect: what the engine lets through is what the final check takes."""

from __future__ import annotations

import json

import pytest
from guided_cases import accepts
from hypothesis import given
from hypothesis import strategies as st

from engine.guided.hints import FORMATS, example, schema_hints
from engine.guided.llg import LLGuidanceBackend
from engine.guided.regexes import can_meet, literal, matches, none_of, split_lookaheads

# Where dialects differ: white space, classes in classes, set operations, and classes that leave out the quote or the backslash.
PATTERNS = [
    r"^\s$", r"^\S$", r"^[\s\d]$", r"^[^\s]$", r"^[^\S]$", r"^[\S]$", r"^\w$", r"^\W$", r"^\d$", r"^\D$", r"^.$", r"^[^a]$",
    r"^[^\\]$", r'^[^"]$', r'^[^"\\]$', r"^[^\\]+$", r'^[^\\/:*?"<>|]{1,3}$', r"^[\x00-\x21]$", r"^\P{P}$", r"^[^\p{P}]$",
    r"^\p{L}$", r"^[[:alpha:]]$", r"^[a-z&&[^b]]$", r"^[a~~b]$", r"^[+--]$", r"^[--a]$", r"^[^--a]$", r"^[\]a]$", r"^[^-a]$",
    r"^\cA$", r"^\/$", r"^(?:[^\\\x00-\x1f]|[\n\t])$", r"^\u00e9$", r"^a|b$", r"^$", r"[^\\]$",
]  # fmt: skip
CHARACTERS = [
    *map(chr, range(0x20, 0x100)), *"\t\n\r\b\f\u0416\u4e2d\u2028\u2029\ufeff\u1680\u200b\u0661\u017f\u212a😀",
    "ab", "a\\", '\\"', "", "a]", "[a", "::",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_engine_agrees_with_the_check(backend: LLGuidanceBackend, pattern: str) -> None:
    grammar = backend.compile_schema({"anyOf": [{"type": "string", "pattern": pattern}, {"type": "null"}]})
    for text in CHARACTERS:
        written = json.dumps(text, ensure_ascii=False)
        if accepts(backend, grammar, written):
            assert matches(pattern, text), f"lets through {text!r}"
        elif "\x7f" not in text:
            assert not matches(pattern, text), f"leaves out {text!r}"


@pytest.mark.parametrize("name", ['a"b', "c\\d", "e\nf", "g/h", "é", '"', "\\", "plain"])
def test_no_other_spelling_of_a_listed_key(backend: LLGuidanceBackend, name: str) -> None:
    grammar = backend.compile_schema(
        {"type": "object", "properties": {name: {"type": "integer"}}, "additionalProperties": {"type": "string"}}
    )
    escaped = '"' + "".join(f"\\u{ord(c):04x}" for c in name) + '"'
    for key in (json.dumps(name), json.dumps(name, ensure_ascii=False), escaped, escaped.upper().replace("\\U", "\\u")):
        assert not accepts(backend, grammar, f'{{{key}: "x"}}')
    assert accepts(backend, grammar, json.dumps({name: 1, name + "2": "x"}, ensure_ascii=False))


@given(
    st.lists(st.text(st.sampled_from('ab"\\é\n😀-]^['), max_size=4), min_size=1, max_size=5),
    st.text(st.sampled_from('ab"\\é\n😀-]^['), max_size=5),
)
def test_the_complement_of_some_strings(strings: list[str], text: str) -> None:
    assert matches(none_of(strings), text) == (text not in strings)
    assert matches(literal(strings), text) == (text in strings)
    assert all(matches(literal(strings), s) and not matches(none_of(strings), s) for s in strings)


def test_patterns_that_can_meet() -> None:
    assert not can_meet("^x-", r"^\$") and not can_meet("^a$", "^b") and not can_meet("^[0-9]+$", "^[a-z]+$")
    assert can_meet("^a", "z$") and can_meet("", "^q")


def test_leading_look_ahead() -> None:
    pattern = r"^(?=.*[0-9)])(?=.{3,}$)[a-z0-9)]+$"
    parts = split_lookaheads(pattern)
    assert len(parts) == 3
    for text in ("abc1", "1bc", "ab1c)", "abc", "a1", "AB1", "", "ab)"):
        assert all(matches(part, text) for part in parts) == matches(pattern, text)
    for other in ("^a(?=b)", "^(?=a)b|c", "^(?!a)b", "a"):
        assert split_lookaheads(other) == [other]


EXAMPLES = [
    r"^[a-z]+@[a-z]+\.com$", r"^(foo|ba)\d{3}$", r"[^a-z]", r"^\S+\s\w$", r"^.{3}-[A-F]{2}$", "^[\u4e00-\u9fff]$",
    r"(a|bc)*d", r"^\.\*$", r"^[^\s/]+/$",
]  # fmt: skip


@pytest.mark.parametrize("pattern", EXAMPLES)
def test_examples_match(pattern: str) -> None:
    text = example(pattern)
    assert text is not None and matches(pattern, text)


def test_hints() -> None:
    assert example("^(?!a)b") is None and example("(") is None and example("a{100000}") is None
    assert example("((a{999}){999}){999}") is None and example("a{6000}b{6000}") is None
    hints = schema_hints(
        {"properties": {"a": {"pattern": '^"x"$'}, "b": {"format": "uuid"}}, "required": ["é"], "patternProperties": {"^k$": {}}}
    )
    assert hints[0] == "é".encode() and set(hints) == {"é".encode(), b"k", FORMATS["uuid"].encode(), b'\\"x\\"'}
