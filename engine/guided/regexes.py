"""Regular expressions of schemas: which strings they match, whether two can meet, and the complement of a finite set."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import jsonschema_rs
from llguidance import LLMatcher, LLParserLimits

from engine.guided.closing import byte_tokenizer
from engine.guided.dialect import pattern_options
from engine.guided.grammar import SchemaError

_ANY = r"[\s\S]"
_ATOM = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]|\\[pP]\{[^}]*\}|\\[pP]\w|\\c[A-Za-z]|\\.", re.DOTALL)
_MEMBER = re.compile(r"\\c[A-Za-z]|\\.|.", re.DOTALL)
# White space as ECMA-262 has it: unlike the engine's, with U+FEFF and without U+0085.
_SPACE = r"\t-\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
_NO_SPACE = (r"\x00-\x08\x0e-\x1f!-\u009f\u00a1-\u167f\u1681-\u1fff\u200b-\u2027\u202a-\u202e\u2030-\u205e\u2060-\u2fff"
             r"\u3001-\ufefe\uff00-\U0010ffff")

_LEAST, _NEAR = -(2**63), 1024           # as far as doubles round to it


@lru_cache(128)
def _validator(pattern: str) -> Any:
    try:
        schema = {"pattern": pattern}
        return jsonschema_rs.validator_for(schema, validate_formats=False, pattern_options=pattern_options(schema))
    except jsonschema_rs.ValidationError:
        raise SchemaError("", f"{pattern!r} is no regular expression, or too large a one") from None


def matches(pattern: str, text: str) -> bool:
    """Whether `pattern` is found in `text`, by the same rules as the final check."""
    return _validator(pattern).is_valid(text)


def overflow(schema: Any) -> str:
    """Why the numbers of `schema` may not reach the grammar engine: it dies where it takes one for the least 64-bit integer, as
    a value or as the end of a range. Empty: they may."""
    stack = [("", schema, False)]                        # keyword, what stands there, whether that is a value
    while stack:
        key, node, is_value = stack.pop()
        if isinstance(node, dict):
            stack.extend((key, child, is_value or key in ("enum", "const")) for key, child in node.items())
        elif isinstance(node, list):
            stack.extend((key, child, is_value) for child in node)
        elif isinstance(node, (int, float)) and node <= _LEAST + _NEAR and (
                key in ("maximum", "exclusiveMaximum") or (is_value and node >= _LEAST - _NEAR)):
            return f"the grammar engine cannot count as low as {node}: use a number further from -2^63"
    return ""


@lru_cache(4096)
def _refusal(leaf: str) -> str:
    source = LLMatcher.grammar_from_json_schema(leaf)
    limits = LLParserLimits(initial_lexer_fuel=2_000_000, verbose_errors=False)
    return " ".join(LLMatcher(byte_tokenizer(), source, log_level=0, limits=limits).get_error().split())


def refusal(leaf: dict[str, Any]) -> str:
    """Why the grammar engine does not take a schema without children; "Unsatisfiable ..." where nothing fits; empty: it does."""
    return overflow(leaf) or _refusal(json.dumps(leaf))


def can_meet(first: str, second: str) -> bool:
    """Whether some string may match both patterns; True also where that is not known."""
    both = [{"pattern": engine_pattern(pattern)} for pattern in (first, second)]
    return not refusal({"type": "string", "allOf": both}).startswith("Unsatisfiable")


def engine_pattern(pattern: str) -> str:
    """An ECMA-262 pattern in the engine's dialect, where the two differ in what they match."""
    out, i = [], 0
    while i < len(pattern):
        piece = _ATOM.match(pattern, i)
        text = piece.group() if piece else pattern[i]
        i += len(text)
        if text == ".":
            out.append(r"[^\n\r\u2028\u2029]")
        elif text == r"\s":
            out.append(f"[{_SPACE}]")
        elif text == r"\S":
            out.append(f"[{_NO_SPACE}]")
        elif text.startswith(r"\c"):
            out.append(_control(text))
        elif text.startswith("[") and len(text) > 1:
            out.append(_whole(_class(text), text))
        elif text[:2] in (r"\p", r"\P"):
            out.append(_whole(text, text))
        else:
            out.append(text)
    return "".join(out)


def _class(text: str) -> str:
    """A class in brackets. The engine also knows classes in classes, &&, -- and ~~, which have no meaning in ECMA-262."""
    out = ["[^" if text.startswith("[^") else "["]
    for piece in _MEMBER.findall(text[len(out[0]) : -1]):
        if piece in (r"\s", r"\S"):
            out.append(_SPACE if piece == r"\s" else _NO_SPACE)
        elif piece.startswith(r"\c"):
            out.append(_control(piece))
        elif piece in "[&~" or (piece == "-" and out[-1] in ("[", "[^", "-")):
            out.append("\\" + piece)
        else:
            out.append(piece)
    return "".join(out) + "]"


def _whole(text: str, original: str) -> str:
    """A class as the engine may have it: where it holds all control characters, the engine adds the quote and the backslash.

    So one that holds neither must go without a control character, which no output can hold anyway.
    """
    if matches(original, "\x01") and not (matches(original, '"') and matches(original, "\\")):
        return rf"[{text}--\x01]"
    return text


def _control(text: str) -> str:
    return f"\\x{ord(text[2]) % 32:02x}"


def none_of(strings: Iterable[str]) -> str:
    """An anchored pattern for every string but these: the complement of their trie."""
    trie: dict[str, Any] = {}
    for text in strings:
        node = trie
        for char in text:
            node = node.setdefault(char, {})
        node[""] = {}

    def complement(node: dict[str, Any]) -> str:
        children = sorted(c for c in node if c)
        if not children:
            return f"{_ANY}+"
        other = f"[^{''.join(_escape(c) for c in children)}]{_ANY}*"
        tails = [_escape(c) + complement(node[c]) for c in children]
        return f"(?:{'|'.join([other, *tails])})" + ("" if "" in node else "?")

    return f"^{complement(trie)}$"


def literal(strings: Iterable[str]) -> str:
    """An anchored pattern for exactly these strings."""
    return f"^(?:{'|'.join(''.join(map(_escape, text)) for text in strings)})$"


def split_lookaheads(pattern: str) -> list[str]:
    """`^(?=A)(?=B)C` as the patterns `^A`, `^B`, `^C`, all of which must match: the engine has intersections, not look-ahead."""
    if not pattern.startswith("^(?="):
        return [pattern]
    parts, rest = [], pattern[1:]
    while rest.startswith("(?="):
        end = _group_end(rest)
        parts.append(f"^(?:{rest[3:end]})")
        rest = rest[end + 1 :]
    return [*parts, f"^{rest}"] if rest and "|" not in _outside_groups(rest) else [pattern]


def _group_end(text: str) -> int:
    """Index of the parenthesis that closes the group `text` begins with."""
    depth, i, in_class = 0, 0, False
    while i < len(text):
        char = text[i]
        if char == "\\":
            i += 1
        elif in_class:
            in_class = char != "]"
        elif char == "[":
            in_class = True
        elif char == "(":
            depth += 1
        elif char == ")":
            depth -= 1
            if depth == 0:
                return i
        i += 1
    return len(text)


def _outside_groups(text: str) -> str:
    out, i = [], 0
    while i < len(text):
        if text[i] == "\\":
            i += 2
        elif text[i] == "(":
            i += _group_end(text[i:]) + 1
        else:
            out.append(text[i])
            i += 1
    return "".join(out)


def _escape(char: str) -> str:
    return "\\" + char if char in r"\.+*?()|[]{}^$/-#&~" else f"\\u{ord(char):04x}" if ord(char) < 0x20 else char
