"""Integers and numbers of a schema as automata over bytes, by their bounds: as llguidance writes them."""

from __future__ import annotations

from typing import Any

from engine.guided.byte_dfa import Nfa

BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}


class NotRegular(Exception):
    """Not covered: left to llguidance."""


class NumberWriter:
    """Methods add a number to the automaton from a state on, and return the state behind it.

    bounded: no number written may be beyond a double.
    """

    def __init__(self, nfa: Nfa) -> None:
        self._nfa, self.bounded = nfa, True

    def integer(self, schema: dict[str, Any], start: int) -> int:
        low, high = _bound(schema, "minimum", "exclusiveMinimum", 1), _bound(schema, "maximum", "exclusiveMaximum", -1)
        end = self._nfa.state()
        if low is None or low < 0:
            minus = self._nfa.text(start, b"-")
            # Minus zero is a way to write 0. llguidance takes it where 0 is in range, but not beside a single bound.
            zero = (low is None) == (high is None)
            least = -high if high is not None and high < 0 else 0 if zero else 1
            self._naturals(minus, least, None if low is None else -low, end)
        if high is None or high >= 0:
            self._naturals(start, max(0, low or 0), high, end)
        return end

    def _naturals(self, start: int, low: int, high: int | None, end: int) -> None:
        """Whole numbers from `low` to `high`, without leading zeros."""
        self.bounded &= high is not None and high < 10**300
        if high is None:
            digits = len(str(low))
            self._naturals(start, low, 10**digits - 1, end)
            more = self._nfa.byte(start, 0x31, 0x39)
            for _ in range(digits):
                more = self._nfa.byte(more, 0x30, 0x39)
            self._nfa.byte(more, 0x30, 0x39, more)
            self._nfa.join(more, end)
            return
        for digits in range(len(str(low)), len(str(high)) + 1):
            first, last = max(low, 10 ** (digits - 1) if digits > 1 else 0), min(high, 10**digits - 1)
            if first <= last:
                self._same_length(start, str(first), str(last), end)

    def _same_length(self, start: int, low: str, high: str, end: int) -> None:
        """Strings of digits between `low` and `high`, all three of one length."""
        if not low:
            self._nfa.join(start, end)
            return
        zero = ord("0")
        if set(low) == {"0"} and set(high) == {"9"}:
            for _ in low:
                start = self._nfa.byte(start, zero, zero + 9)
            self._nfa.join(start, end)
            return
        a, b = int(low[0]), int(high[0])
        if a == b:
            self._same_length(self._nfa.byte(start, zero + a, zero + a), low[1:], high[1:], end)
            return
        nines, zeros = "9" * (len(low) - 1), "0" * (len(low) - 1)
        if low[1:] != zeros:
            self._same_length(self._nfa.byte(start, zero + a, zero + a), low[1:], nines, end)
            a += 1
        if high[1:] != nines:
            self._same_length(self._nfa.byte(start, zero + b, zero + b), zeros, high[1:], end)
            b -= 1
        if a <= b:
            self._same_length(self._nfa.byte(start, zero + a, zero + b), zeros, nines, end)

    def number(self, schema: dict[str, Any], start: int) -> int:
        """Any number, or one between whole numbers from 0 on. Beside bounds llguidance takes no exponents."""
        if not schema.keys() & BOUNDS:
            return self._any_number(start)
        low = _whole(schema.get("minimum"))
        below = _whole(schema["exclusiveMaximum"]) if "exclusiveMaximum" in schema else None
        high = _whole(schema["maximum"]) if "maximum" in schema else below
        if low < 0 or (below is not None and below != high):
            raise NotRegular
        nfa, end = self._nfa, self._nfa.state()
        if high is None or low < high:
            whole = nfa.state()
            self._naturals(start, low, None if high is None else high - 1, whole)
            nfa.join(whole, end)
            nfa.join(self._digits(nfa.text(whole, b".")), end)
        if high is not None and below is None:
            whole = nfa.text(start, str(high).encode())
            nfa.join(whole, end)
            if low < high:
                zeros = nfa.text(whole, b".0")
                nfa.byte(zeros, 0x30, 0x30, zeros)
                nfa.join(zeros, end)
        return end

    def _any_number(self, start: int) -> int:
        nfa, end, natural, whole, fraction = self._nfa, *(self._nfa.state() for _ in range(4))
        nfa.join(start, natural)
        nfa.join(nfa.text(start, b"-"), natural)
        self._naturals(natural, 0, None, whole)
        nfa.join(whole, fraction)
        nfa.join(self._digits(nfa.text(whole, b".")), fraction)
        nfa.join(fraction, end)
        for letter in b"eE":
            exponent = nfa.byte(fraction, letter, letter)
            signed = nfa.state()
            nfa.join(exponent, signed)
            for sign in b"+-":
                nfa.byte(exponent, sign, sign, signed)
            nfa.join(self._digits(signed), end)
        return end

    def _digits(self, start: int) -> int:
        """One or more."""
        end = self._nfa.byte(start, 0x30, 0x39)
        return self._nfa.byte(end, 0x30, 0x39, end)


def _bound(schema: dict[str, Any], inclusive: str, exclusive: str, step: int) -> int | None:
    """The tighter of the two, as a bound that is included."""
    bounds = []
    for word, shift in ((inclusive, 0), (exclusive, step)):
        if word in schema:
            value = schema[word]
            if not isinstance(value, int):
                raise NotRegular
            bounds.append(value + shift)
    return (max(bounds) if step > 0 else min(bounds)) if bounds else None


def _whole(bound: Any) -> int:
    if not isinstance(bound, int | float) or bound % 1 != 0:
        raise NotRegular
    return int(bound)


