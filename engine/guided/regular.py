"""Which lowered schemas are regular languages, and their automata over bytes: the same texts that llguidance would let through.

Objects with listed properties, arrays, enums, numbers, strings by their length: all that has no recursion and no free keys. What
is not covered (patterns, formats, multiples, bounds that are no whole numbers) raises NotRegular, and stays with llguidance.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from engine.guided.byte_dfa import ByteDfa, Nfa
from engine.guided.regular_numbers import BOUNDS, NotRegular, NumberWriter

ESCAPES = b'"\\bfnrt'
_ASCII = ((0x20, 0x21), (0x23, 0x5B), (0x5D, 0x7E))      # what a string may hold as it is: no quote, backslash or control
_WORDS: dict[str, set[str]] = {
    "null": set(), "boolean": set(), "integer": BOUNDS, "number": BOUNDS - {"exclusiveMinimum"},
    "string": {"minLength", "maxLength"}, "array": {"prefixItems", "items", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties"},
}


def schema_dfa(schema: Any, item_separator: str, key_separator: str, max_states: int) -> ByteDfa:
    """schema: lowered. Raises NotRegular, or TooLarge for one that would need more than `max_states`."""
    writer = _Writer(schema, item_separator, key_separator, max_states)
    start = writer.nfa.state()
    end = writer.value(schema, start)
    return writer.nfa.dfa(end, writer.numbers.bounded)


def choice_dfa(choices: Sequence[str], max_states: int) -> ByteDfa:
    nfa = Nfa(max_states)
    start, end = nfa.state(), nfa.state()
    for choice in choices:
        nfa.join(nfa.text(start, choice.encode()), end)
    return nfa.dfa(end)


class _Writer:
    """Methods add a value to the automaton from a state on, and return the state behind it."""

    def __init__(self, root: Any, item_separator: str, key_separator: str, max_states: int) -> None:
        self.nfa = Nfa(max_states)
        self.numbers = NumberWriter(self.nfa)
        self._separators = item_separator, key_separator
        self._comma, self._colon = item_separator.encode(), key_separator.encode()
        self._definitions = root.get("$defs", {}) if isinstance(root, dict) else {}
        self._open: list[str] = []
        self._kinds: dict[str, Callable[[dict[str, Any], int], int]] = {
            "null": self._null, "boolean": self._boolean, "integer": self.numbers.integer,
            "number": self.numbers.number, "string": self._string, "array": self._array, "object": self._object}

    def value(self, schema: Any, start: int) -> int:
        if not isinstance(schema, dict):
            raise NotRegular
        words = set(schema) - {"$defs"}
        if words == {"$ref"}:
            return self._reference(schema["$ref"], start)
        if words == {"anyOf"}:
            return self._either([partial(self.value, one) for one in schema["anyOf"]], start)
        if words == {"enum"}:
            return self._either([partial(self._text, self._literal(value)) for value in schema["enum"]], start)
        kinds = schema.get("type")
        kinds = [kinds] if isinstance(kinds, str) else kinds or []
        if not kinds or not all(kind in _WORDS for kind in kinds) or words - {"type"} - set().union(*(_WORDS[k] for k in kinds)):
            raise NotRegular
        return self._either([partial(self._kinds[kind], schema) for kind in kinds], start)

    def _either(self, options: Sequence[Callable[[int], int]], start: int) -> int:
        if len(options) == 1:
            return options[0](start)
        end = self.nfa.state()
        for option in options:
            # A state of its own for each: loops at the beginning of one option must not lead into another.
            begin = self.nfa.state()
            self.nfa.join(start, begin)
            self.nfa.join(option(begin), end)
        return end

    def _reference(self, reference: str, start: int) -> int:
        name = reference.removeprefix("#/$defs/")
        if name in self._open or name not in self._definitions:
            raise NotRegular                                     # recursive
        self._open.append(name)
        end = self.value(self._definitions[name], start)
        self._open.pop()
        return end

    def _text(self, text: bytes, start: int) -> int:
        return self.nfa.text(start, text)

    def _literal(self, value: Any) -> bytes:
        if any(not 0 < number % 1 < 1 or "e" in repr(number) for number in _floats(value)):
            raise NotRegular                                     # there are several ways to write it
        return json.dumps(value, ensure_ascii=False, separators=self._separators).encode()

    def _null(self, schema: dict[str, Any], start: int) -> int:
        return self.nfa.text(start, b"null")

    def _boolean(self, schema: dict[str, Any], start: int) -> int:
        return self._either([partial(self._text, b"true"), partial(self._text, b"false")], start)

    # --- strings ---

    def _string(self, schema: dict[str, Any], start: int) -> int:
        least, most = schema.get("minLength", 0), schema.get("maxLength")
        nfa, end = self.nfa, self.nfa.state()
        here = nfa.text(start, b'"')
        for _ in range(least):
            here = self._character(here, nfa.state())
        nfa.byte(here, 0x22, 0x22, end)
        if most is None:
            self._character(here, here)
        for _ in range(least, most or 0):
            here = self._character(here, nfa.state())
            nfa.byte(here, 0x22, 0x22, end)
        return end

    def _character(self, start: int, end: int) -> int:
        """One character (code point) of a string, escaped or not."""
        for first, last in _ASCII:
            self.nfa.byte(start, first, last, end)
        escape = self.nfa.byte(start, 0x5C, 0x5C)
        for letter in ESCAPES:
            self.nfa.byte(escape, letter, letter, end)
        self.nfa.non_ascii(start, end)
        return end

    # --- arrays and objects ---

    def _array(self, schema: dict[str, Any], start: int) -> int:
        prefix, rest = schema.get("prefixItems", []), schema.get("items", True)
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if rest is False:
            most = len(prefix) if most is None else min(most, len(prefix))
        nfa, end = self.nfa, self.nfa.state()
        here, count = nfa.text(start, b"["), 0
        while True:
            if count >= least:
                nfa.text_to(here, b"]", end)
            if most is not None and count >= most:
                return end
            endless = most is None and count >= max(least, len(prefix), 1)
            begin = nfa.text(here, self._comma) if count else here
            after = self.value(prefix[count] if count < len(prefix) else rest, begin)
            if endless:
                nfa.join(after, here)
                return end
            here, count = after, count + 1

    def _object(self, schema: dict[str, Any], start: int) -> int:
        if schema.get("additionalProperties", True) is not False:
            raise NotRegular
        nfa, required = self.nfa, set(schema.get("required", ()))
        empty: int | None = nfa.text(start, b"{")                # nothing written so far; None: something must have been
        some: int | None = None                                  # something has
        for name, child in schema.get("properties", {}).items():
            if child is False and name not in required:
                continue
            key = nfa.state()
            if empty is not None:
                nfa.join(empty, key)
            if some is not None:
                nfa.join(nfa.text(some, self._comma), key)
            after = self.value(child, nfa.text(key, json.dumps(name, ensure_ascii=False).encode() + self._colon))
            if name in required:
                empty = None
            elif some is not None:
                # Left out, or written: the next one follows either.
                both = nfa.state()
                nfa.join(some, both)
                nfa.join(after, both)
                after = both
            some = after
        end = nfa.state()
        for state in (empty, some):
            if state is not None:
                nfa.text_to(state, b"}", end)
        return end


def _floats(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, list | dict):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _floats(child)
