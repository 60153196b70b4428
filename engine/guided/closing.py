"""Trim and close: end a cut output within its budget, so that it still matches its grammar.

A row that runs out of tokens is rolled back a little and completed by a short text that the grammar accepts. The search runs on a
second matcher of the same grammar whose vocabulary is the 256 bytes: its masks are 32 bytes, its copies cost a microsecond, and
what it finds does not depend on the model's tokenizer. Any completion it finds is valid, so the heuristics only cost length.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from functools import cache

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

_EOS = 256
_QUOTE, _BACKSLASH = 0x22, 0x5C
# Outside strings: leave what is open, go on where that is needed, then the cheapest value that may begin.
_STRUCTURE = tuple(b'}],:0123456789"[{ntf-.eE+ \n\t\r')
# Inside strings that may not end yet: plain characters first, and what patterns like to ask for.
_CHARACTERS = tuple(b"a0A-./:@_ #+,;=?&%()!*~$<>[]{}'|^`") + tuple(b"bcdefghijklmnopqrstuvwxyzBCDEFGHIJKLMNOPQRSTUVWXYZ123456789")
_NARROW = 48              # at most this many next bytes: look one step ahead at each
_WIDE_STEPS = 16          # characters of one string chosen with a look ahead where many are allowed
_MAX_BYTES = 1 << 16
_RETRIES = 8
_IMPROVEMENTS = 3         # randomised searches for something shorter than the greedy find


class _Bytes:
    """What LLTokenizer asks of a tokenizer, for a vocabulary of single bytes."""

    eos_token_id, bos_token_id, special_token_ids = _EOS, None, (_EOS,)
    tokens = [bytes([i]) for i in range(256)] + [b"<eos>"]

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


@cache
def byte_tokenizer() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Bytes()), n_vocab=257, eos_token=_EOS, slices=[])


def _open_string(text: bytes, states: bytes | bytearray, end: int) -> bytes:
    """What stands in the string that is open at `end`."""
    start = end
    while start and states[start]:
        start -= 1
    return text[start + 1 : end]


def string_states(text: bytes) -> bytearray:
    """For each prefix of JSON `text` (len + 1 of them): 0 outside strings, 1 inside one, 2 just after a backslash in one."""
    states, state = bytearray(1), 0
    for byte in text:
        state = _next_state(state, byte)
        states.append(state)
    return states


def _next_state(state: int, byte: int) -> int:
    if state == 2:
        return 1
    if byte == _QUOTE:
        return state ^ 1
    return 2 if byte == _BACKSLASH and state else state


class Closer:
    """Finds short completions for one grammar. Immutable; safe to share between threads.

    matcher: the grammar compiled for `byte_tokenizer()`, at its start.
    tokenize: bytes -> token ids of the model.
    check: raises ValueError for a text that the grammar accepts and the schema does not (duplicate keys, huge numbers).
    hints: texts of strings that the grammar's patterns accept.
    is_json: False for grammars of plain text (regex, choice), where quotes have no meaning.
    """

    def __init__(self, matcher: LLMatcher, tokenize: Callable[[bytes], list[int]], check: Callable[[str], object],
                 hints: Sequence[bytes] = (), is_json: bool = True) -> None:
        self._start, self._tokenize, self._check, self._is_json = matcher, tokenize, check, is_json
        self._hints = [hint + (b'"' if is_json else b"") for hint in hints if hint]

    def minimal(self, seconds: float = 2.0) -> bytes | None:
        """A short checked output; None where none was found within about `seconds`."""
        return self._search(self._start, b"", 0, b"", time.monotonic() + seconds, improve=True)

    def close(self, pieces: Sequence[bytes], budget: int, seconds: float = 0.1) -> tuple[int, list[int]] | None:
        """Keep the first n of `pieces` (the bytes of the sampled tokens) and close them: (n, closing tokens).

        n + len(closing tokens) <= budget, and n is as large as can be. None when nothing was found within about `seconds`.
        """
        deadline = time.monotonic() + seconds
        matcher, ends = self._start.deep_copy(), [0]
        for piece in pieces[:budget]:
            taken = matcher.try_consume_tokens(list(piece))
            if taken < len(piece):
                matcher.rollback(taken)
                break
            ends.append(ends[-1] + len(piece))
        text = b"".join(pieces[: len(ends) - 1])
        states = string_states(text) if self._is_json else bytes(len(text) + 1)
        kept, trim, retries = len(ends) - 1, 1, 0
        while True:
            here = ends[kept]
            closing = self._search(matcher, text[:here], states[here], _open_string(text, states, here), deadline, improve=False)
            if closing is not None:
                tokens = self._tokenize(closing)
                if kept + len(tokens) <= budget:
                    return kept, tokens
            if kept == 0 or time.monotonic() > deadline:
                return None
            # One token at a time at first, then in growing strides.
            retries += 1
            trim = min(kept, trim if retries < 3 else trim * 2)
            matcher.rollback(here - ends[kept - trim])
            kept -= trim

    def _search(self, matcher: LLMatcher, prefix: bytes, state: int, string: bytes, deadline: float,
                improve: bool) -> bytes | None:
        """A checked completion of `prefix`: the greedy one, else a randomised one; or the shortest of some (`improve`)."""
        best: bytes | None = None
        for attempt in range(_RETRIES + 1):
            if best is not None and attempt > _IMPROVEMENTS:
                break
            noise = random.Random(attempt) if attempt else None
            limit = _MAX_BYTES if best is None else len(best) - 1
            found = self._complete(matcher.deep_copy(), state, string, limit, deadline, noise)
            if found is not None and self.holds(prefix + found):
                best = found
                if not improve:
                    break
            if time.monotonic() > deadline:
                break
        return best

    def holds(self, text: bytes) -> bool:
        """Whether `text` is a valid output as it stands."""
        try:
            self._check(text.decode())
        except ValueError:
            return False
        return True

    def _complete(self, matcher: LLMatcher, state: int, string: bytes, limit: int, deadline: float,
                  noise: random.Random | None) -> bytes | None:
        """One greedy walk to an accepting state. `string`: what stands in the open string."""
        out, current = bytearray(), bytearray(string)
        while not matcher.is_accepting():
            step = matcher.compute_ff_bytes() or self._choose(matcher, state, bytes(current), noise)
            if not step or len(out) + len(step) > limit or not matcher.consume_tokens(list(step)) or time.monotonic() > deadline:
                return None
            out += step
            if self._is_json:
                for byte in step:
                    state = _next_state(state, byte)
                    if state and not (state == 1 and byte == _QUOTE and not current):
                        current.append(byte)
                    elif not state:
                        current.clear()
            else:
                current += step
        return bytes(out)

    def _choose(self, matcher: LLMatcher, state: int, string: bytes, noise: random.Random | None) -> bytes:
        """The next bytes at a choice; empty where the grammar allows none."""
        mask = int.from_bytes(matcher.compute_bitmask(), "little") & ((1 << 256) - 1)
        if self._is_json and not state:
            allowed = [b for b in _STRUCTURE if mask >> b & 1]
            if allowed and allowed[0] in b"}],:" and (noise is None or len(allowed) == 1 or noise.random() < 0.8):
                return bytes(allowed[:1])
        elif self._is_json and state == 1 and mask >> _QUOTE & 1 and (noise is None or noise.random() < 0.8):
            return b'"'
        else:
            for hint in self._hints:
                rest = list(hint[len(string) :])
                if hint.startswith(string) and rest and matcher.validate_tokens(rest) == len(rest):
                    return bytes(rest)
            allowed = [b for b in _CHARACTERS if mask >> b & 1]
            if mask.bit_count() <= _NARROW or not allowed:
                allowed = [b for b in range(256) if mask >> b & 1][:_NARROW]
        if not allowed:
            return b""
        if noise is not None and noise.random() < 0.5:
            return bytes([noise.choice(allowed)])
        if len(allowed) == 1:
            return bytes(allowed)
        if len(allowed) > _NARROW and len(string) > _WIDE_STEPS:
            return bytes(allowed[:1])                    # a long string: what it says does not matter
        return bytes([min(allowed, key=lambda byte: self._cost(matcher, byte, state))])

    def _cost(self, matcher: LLMatcher, byte: int, state: int) -> int:
        """Bytes forced after `byte`, and a guess at what stands open then."""
        ahead = matcher.deep_copy()
        if not ahead.consume_token(byte):
            return 1 << 30
        tail = ahead.compute_ff_bytes()
        if tail:
            ahead.consume_tokens(list(tail))
        if ahead.is_accepting():
            return len(tail)
        mask = int.from_bytes(ahead.compute_bitmask(), "little")
        if state or byte == _QUOTE:
            open_ends = 0 if mask >> _QUOTE & 1 or (tail and tail[-1] != byte and _QUOTE in tail) else 8
        else:
            open_ends = 0 if any(mask >> b & 1 for b in b"}],") else 8
        return len(tail) + open_ends + (8 if byte in b"[{" else 0)
