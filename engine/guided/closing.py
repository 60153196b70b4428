"""Trim and close: end a cut output within its budget, so that it still matches its grammar.

A row that runs out of tokens is rolled back a little and completed by a short text that the grammar accepts. The search runs on a
second matcher of the same grammar whose vocabulary is the 256 bytes: its masks are 32 bytes, its copies cost a microsecond, and
what it finds does not depend on the model's tokenizer. Any completion it finds is checked, so the heuristics only cost length.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from llguidance import LLTokenizer, TokenizerWrapper

from engine.guided.distinct import Scanner

END = 256
_QUOTE, _BACKSLASH = 0x22, 0x5C
# Outside strings: leave what is open, go on where that is needed, then the cheapest value that may begin.
_STRUCTURE = tuple(b'}],:0123456789"[{ntf-.eE+')
_SPACES = tuple(b" \n\t\r")
# Inside strings that may not end yet: plain characters first, and what patterns like to ask for.
_CHARACTERS = tuple(b"a0A-./:@_ #+,;=?&%()!*~$<>[]{}'|^`bcdefghijklmnopqrstuvwxyzBCDEFGHIJKLMNOPQRSTUVWXYZ123456789")
_FREE = 3                 # a state of _Place: in free text
_NARROW = 48              # next bytes up to which each is looked at one step ahead
_WIDE_STEPS = 16          # characters of one string that are chosen so where more are allowed
_MAX_BYTES = 1 << 16
_RETRIES = 8              # randomised searches where the greedy one finds nothing valid
_IMPROVEMENTS = 3         # randomised searches for something shorter than the greedy find
_RETURNS = 8              # choices of one search that are made anew
_NEVER = 1 << 30


class _Bytes:
    """What LLTokenizer asks of a tokenizer, for a vocabulary of single bytes."""

    eos_token_id, bos_token_id, special_token_ids = END, None, (END,)
    tokens = [bytes([i]) for i in range(256)] + [b"<end>"]

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


@cache
def byte_tokenizer() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Bytes()), n_vocab=257, eos_token=END, slices=[])


class ByteMatcher(Protocol):
    """A grammar over the 256 bytes and an end: LLMatcher's methods that the search needs; for other backends see
    engine.guided.state_matcher."""

    def deep_copy(self) -> ByteMatcher: ...
    def try_consume_tokens(self, tokens: list[int]) -> int: ...
    def consume_tokens(self, sampled_tokens: list[int]) -> bool: ...
    def consume_token(self, sampled_token: int) -> bool: ...
    def validate_tokens(self, tokens: list[int]) -> int: ...
    def rollback(self, num_tokens: int) -> bool: ...
    def is_accepting(self) -> bool: ...
    def compute_ff_bytes(self) -> bytes: ...
    def compute_bitmask(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a walk stands. state: 0 outside strings, 1 inside one, 2 after a backslash, _FREE; string: what it holds so far."""

    state: int = 0
    string: bytes = b""

    def after(self, data: bytes) -> _Place:
        """The place in JSON after `data`."""
        state, string = self.state, bytearray(self.string)
        for byte in data:
            if state == 0:
                state = int(byte == _QUOTE)
            elif state == 1 and byte == _QUOTE:
                state = 0
                string.clear()
            else:
                state = 2 if state == 1 and byte == _BACKSLASH else 1
                string.append(byte)
        return _Place(state, bytes(string))


class Closer:
    """Finds short completions for one grammar. Immutable; safe to share between threads.

    matcher: the grammar compiled for `byte_tokenizer()`, at its start.
    tokenize: bytes -> token ids of the model.
    check: raises ValueError for a text that the grammar accepts and the schema does not (duplicate keys, huge numbers).
    hints: texts of strings that bring the walk to its end.
    is_json: False for grammars of plain text (regex, choice): one string that quotes do not end.
    scanner: makes one where keys or items must differ; None: none must.
    opening: JSON begins after it; what stands before is text that may end anywhere. Empty: all is JSON.
    """

    def __init__(self, matcher: ByteMatcher, tokenize: Callable[[bytes], list[int]], check: Callable[[str], object],
                 hints: Sequence[bytes] = (), is_json: bool = True, scanner: Callable[[], Scanner] | None = None,
                 opening: bytes = b"") -> None:
        self._matcher, self._tokenize, self._check, self._is_json = matcher, tokenize, check, is_json
        self._scanner, self._opening = scanner, opening
        self._start = _Place(state=_FREE) if opening else _Place() if is_json else _Place(state=1)
        self._hints = [hint + (b'"' if is_json else b"") for hint in hints if hint]

    def minimal(self, seconds: float = 2.0) -> bytes | None:
        """A short valid output; None where none was found within about `seconds` of computing."""
        deadline = time.thread_time() + seconds
        best = self._search(self._matcher, b"", self._start, deadline)
        for seed in range(_RETRIES, _RETRIES + _IMPROVEMENTS):
            if best is not None and time.thread_time() < deadline:
                found = self._walk(self._matcher, b"", self._start, len(best) - 1, deadline, random.Random(seed))
                best = found if found is not None and self.holds(found) else best
        return best

    def close(self, pieces: Sequence[bytes], budget: int, seconds: float = 0.1) -> tuple[int, list[int]] | None:
        """Keep the first n of `pieces` (the bytes of the sampled tokens) and close them: (n, closing tokens).

        n + len(closing tokens) <= budget, and n is as large as can be. None when nothing was found within about `seconds` of
        computing: by the thread's own clock, so that what else the machine does changes no output.
        """
        deadline = time.thread_time() + seconds
        matcher, ends, places = self._matcher.deep_copy(), [0], [self._start]
        for piece in pieces[:budget]:
            taken = matcher.try_consume_tokens(list(piece))
            if taken < len(piece):
                matcher.rollback(taken)
                break
            ends.append(ends[-1] + len(piece))
            places.append(self._after(places[-1], piece))
        text = b"".join(pieces[: len(ends) - 1])
        at = kept = len(ends) - 1                        # `matcher` stands after `at` tokens

        def attempt(kept: int) -> list[int] | None:
            nonlocal at
            if kept < at:
                matcher.rollback(ends[at] - ends[kept])
            else:
                matcher.consume_tokens(list(text[ends[at] : ends[kept]]))
            at = kept
            closing = self._search(matcher, text[: ends[kept]], places[kept], deadline)
            tokens = None if closing is None else self._tokenize(closing)
            return tokens if tokens is not None and kept + len(tokens) <= budget else None

        # Drop tokens one by one at first, then in growing strides; then see whether less would have done.
        found, stride, tries, failed = attempt(kept), 1, 0, kept + 1
        while found is None and kept and time.thread_time() < deadline:
            tries, failed = tries + 1, kept
            stride = stride if tries < 3 else stride * 2
            kept = max(0, kept - stride)
            found = attempt(kept)
        while found is not None and failed - kept > 1 and time.thread_time() < deadline:
            middle = (kept + failed) // 2
            if (better := attempt(middle)) is not None:
                found, kept = better, middle
            else:
                failed = middle
        return None if found is None else (kept, found)

    def holds(self, text: bytes) -> bool:
        """Whether `text` is a valid output as it stands."""
        try:
            self._check(text.decode())
        except ValueError:
            return False
        return True

    def _search(self, matcher: ByteMatcher, prefix: bytes, place: _Place, deadline: float) -> bytes | None:
        """What completes `prefix`, whose end `matcher` is at: greedily, else with random choices."""
        for attempt in range(_RETRIES):
            noise = random.Random(attempt) if attempt else None
            now = time.thread_time()
            found = self._walk(matcher, prefix, place, _MAX_BYTES, now + (deadline - now) / 2, noise)
            if found is not None and self.holds(prefix + found):
                return found
            if now > deadline:
                break
        return None

    def _walk(self, matcher: ByteMatcher, prefix: bytes, place: _Place, limit: int, deadline: float,
              noise: random.Random | None) -> bytes | None:
        """From `matcher`'s state, after `prefix`, to the first where the output may end, in at most `limit` bytes."""
        matcher, out = matcher.deep_copy(), bytearray()
        scanner = None if self._scanner is None else self._scanner()
        if scanner is not None and not scanner.feed(prefix):
            return None                                  # what repeats already stays so
        # Choices made, where some may lead to repetitions only: what stood before, and the first bytes that were tried.
        turns: list[tuple[ByteMatcher, _Place, int, bytes]] = []
        tried, returns = b"", 0
        while not matcher.is_accepting():
            forced = matcher.compute_ff_bytes()
            step = forced or self._choose(matcher, place, noise, scanner, tried)
            if len(out) + len(step) > limit or time.thread_time() > deadline:
                return None
            if scanner is not None and step and not forced:
                turns.append((matcher.deep_copy(), place, len(out), tried + step[:1]))
            tried = b""
            if step and matcher.consume_tokens(list(step)) and (scanner is None or scanner.feed(step)):
                out += step
                place = self._after(place, step)
            elif self._scanner is not None and turns and returns < _RETURNS:
                matcher, place, length, tried = turns.pop()
                del out[length:]
                scanner, returns = self._scanner(), returns + 1
                scanner.feed(prefix + out)
            else:
                return None
        return bytes(out)

    def _after(self, place: _Place, data: bytes) -> _Place:
        if place.state == _FREE:
            text = place.string + data
            at = text.find(self._opening)
            return _Place(_FREE, text[1 - len(self._opening) :]) if at < 0 else _Place().after(text[at + len(self._opening) :])
        return place.after(data) if self._is_json else _Place(1, place.string + data)

    def _choose(self, matcher: ByteMatcher, place: _Place, noise: random.Random | None, scanner: Scanner | None,
                tried: bytes) -> bytes:
        """The next bytes at a choice, none of `tried` first; empty where the grammar allows none."""
        mask = int.from_bytes(matcher.compute_bitmask(), "little") & ((1 << 256) - 1)
        repeating, doomed = scanner.repeats() if scanner is not None else ([], [])
        for byte in (*tried, *(piece[0] for piece in (*repeating, *doomed) if len(piece) == 1)):
            mask &= ~(1 << byte)
        easy = noise is None or noise.random() < 0.8
        if place.state == 0:
            allowed = [b for b in _STRUCTURE if mask >> b & 1] or [b for b in _SPACES if mask >> b & 1]
            if easy and allowed and allowed[0] in b"}],:":
                return bytes(allowed[:1])
        else:
            if easy and self._is_json and place.state == 1 and mask >> _QUOTE & 1:
                return b'"'
            for rest in self._rests(place.string):
                if (rest[:1] not in tried and matcher.validate_tokens(list(rest)) == len(rest)
                        and not any(rest.startswith(piece) for piece in repeating)):
                    return rest
            allowed = [b for b in _CHARACTERS if mask >> b & 1]
            if mask.bit_count() <= _NARROW or not allowed:
                allowed = [b for b in range(256) if mask >> b & 1][:_NARROW]
        if len(allowed) <= 1:
            return bytes(allowed)
        if noise is not None and noise.random() < 0.5:
            return bytes([noise.choice(allowed)])
        if len(allowed) > _NARROW and len(place.string) > _WIDE_STEPS:
            return bytes(allowed[:1])                    # a long string: what it says does not matter
        return bytes([min(allowed, key=lambda byte: _cost(matcher, byte, place))])

    def _rests(self, string: bytes) -> Iterator[bytes]:
        """Ends of hints that may end a string which holds `string`: first of those it begins, then, shortest first, of all."""
        yield from (hint[len(string) :] for hint in self._hints if hint.startswith(string))
        if string:
            yield from (hint[i:] for hint in self._hints for i in range(len(hint) - 1, -1, -1))


def _cost(matcher: ByteMatcher, byte: int, place: _Place) -> int:
    """Bytes forced after `byte`, and a guess at what stands open then."""
    ahead = matcher.deep_copy()
    if not ahead.consume_token(byte):
        return _NEVER
    tail = ahead.compute_ff_bytes()
    ahead.consume_tokens(list(tail))
    if ahead.is_accepting():
        return len(tail)
    mask = int.from_bytes(ahead.compute_bitmask(), "little")
    ends = b'"' if place.state or byte == _QUOTE else b"}],"
    still_open = not any(mask >> end & 1 for end in ends) and not (place.state and b'"' in tail)
    return len(tail) + 8 * still_open + 8 * (byte in b"[{" and not place.state)
