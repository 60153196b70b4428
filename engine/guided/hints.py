"""Strings that bring the closing search to its end soon: required keys, and examples of patterns and formats."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from re import error as RegexError
from typing import Any

FORMATS = {
    "date": "2000-01-01", "time": "00:00:00Z", "date-time": "2000-01-01T00:00:00Z", "duration": "P0D", "email": "a@a.aa",
    "hostname": "a", "ipv4": "0.0.0.0", "ipv6": "::", "uuid": "00000000-0000-0000-0000-000000000000", "uri": "a:a",
}
_PREFERRED = [ord(c) for c in "a0A-_. /:@"] + list(range(0x21, 0x7F))
_LONGEST = 10_000        # characters of an example


def schema_hints(schema: Any) -> list[bytes]:
    """Required keys, then examples for every pattern and format in `schema`, as they stand inside JSON quotes."""
    required: dict[str, None] = {}
    found: dict[str, None] = {}
    stack = [schema]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            keys = node.get("patternProperties")
            for pattern in (node.get("pattern"), *(keys if isinstance(keys, dict) else ())):
                if isinstance(pattern, str) and (text := example(pattern)):
                    found[text] = None
            if isinstance(names := node.get("required"), list):
                required.update(dict.fromkeys(name for name in names if isinstance(name, str)))
            if isinstance(name := node.get("format"), str) and name in FORMATS:
                found[FORMATS[name]] = None
        stack.extend(node.values() if isinstance(node, dict) else node if isinstance(node, list) else ())
    return [json.dumps(text, ensure_ascii=False)[1:-1].encode() for text in required | found]


def example(pattern: str) -> str | None:
    """A shortest string that matches `pattern`, or None for what Python's regex parser or this walk does not know."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _shortest(_parser.parse(pattern))
    except (RegexError, RecursionError, OverflowError, ValueError):
        return None


def _shortest(parsed: Any) -> str:
    text = ""
    for piece in _pieces(parsed):
        text += piece
        if len(text) > _LONGEST:
            raise ValueError("too long to be a hint")
    return text


def _pieces(parsed: Any) -> Iterator[str]:
    for code, value in parsed:
        if code is op.LITERAL:
            yield chr(value)
        elif code is op.NOT_LITERAL:
            yield chr(next(c for c in _PREFERRED if c != value))
        elif code is op.ANY:
            yield "a"
        elif code is op.IN:
            yield _member(value)
        elif code is op.BRANCH:
            yield min((_shortest(branch) for branch in value[1]), key=len)
        elif code is op.SUBPATTERN:
            yield _shortest(value[-1])
        elif code in (op.MAX_REPEAT, op.MIN_REPEAT):
            once = _shortest(value[2]) if value[0] else ""
            if len(once) * value[0] > _LONGEST:
                raise ValueError("too long to be a hint")
            yield once * value[0]
        elif code is not op.AT:
            raise ValueError(f"no example for {code}")


def _member(items: list[tuple[Any, Any]]) -> str:
    negated = bool(items) and items[0][0] is op.NEGATE
    tests = items[1:] if negated else items
    candidates = [*_PREFERRED, *(v if c is op.LITERAL else v[0] for c, v in tests if c in (op.LITERAL, op.RANGE)), 0x20, 0xE9]
    for char in candidates:
        if any(_matches(char, code, value) for code, value in tests) is not negated:
            return chr(char)
    raise ValueError("no example for this class")


def _matches(char: int, code: Any, value: Any) -> bool:
    if code is op.LITERAL:
        return char == value
    if code is op.RANGE:
        return value[0] <= char <= value[1]
    if code is not op.CATEGORY:
        raise ValueError(f"no example for {code}")
    c = chr(char)
    kinds = {op.CATEGORY_DIGIT: c.isdigit(), op.CATEGORY_SPACE: c.isspace(), op.CATEGORY_WORD: c.isalnum() or c == "_"}
    negatives = {op.CATEGORY_NOT_DIGIT: op.CATEGORY_DIGIT, op.CATEGORY_NOT_SPACE: op.CATEGORY_SPACE,
                 op.CATEGORY_NOT_WORD: op.CATEGORY_WORD}
    return not kinds[negatives[value]] if value in negatives else kinds[value]
