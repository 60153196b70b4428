"""Finite automata over bytes: built piece by piece as an NFA (Thompson's construction), made deterministic by subsets."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

# Well-formed UTF-8 above ASCII (Unicode 15.0, table 3-7): what may follow the first byte, as ranges of the bytes to come.
_REST = (0x80, 0xBF)
_UTF8 = (
    ((0xC2, 0xDF), _REST), ((0xE0, 0xE0), (0xA0, 0xBF), _REST), ((0xE1, 0xEC), _REST, _REST), ((0xED, 0xED), (0x80, 0x9F), _REST),
    ((0xEE, 0xEF), _REST, _REST), ((0xF0, 0xF0), (0x90, 0xBF), _REST, _REST), ((0xF1, 0xF3), _REST, _REST, _REST),
    ((0xF4, 0xF4), (0x80, 0x8F), _REST, _REST),
)


class TooLarge(Exception):
    """More states than the limit."""


@dataclass(frozen=True, slots=True)
class ByteDfa:
    """State 0 is the start. Every state can reach a final one.

    delta: int32 [S, 256], the next state, -1 where the byte may not follow. final: bool [S], where the text may end.
    sound: all its texts pass the final check of the grammar it was made of.
    """

    delta: np.ndarray
    final: np.ndarray
    sound: bool


class Nfa:
    """An automaton under construction. Methods that add a piece take the state it begins in and return the one it ends in."""

    def __init__(self, max_states: int) -> None:
        self._max_states = max_states
        self._arcs: list[list[tuple[int, int, int]]] = []        # of each state: (first byte, last byte, next state)
        self._free: list[list[int]] = []                         # of each state: where it leads without a byte

    def state(self) -> int:
        if len(self._arcs) >= 4 * self._max_states:
            raise TooLarge
        self._arcs.append([])
        self._free.append([])
        return len(self._arcs) - 1

    def join(self, state: int, to: int) -> None:
        """From `state` one may go on as from `to`."""
        self._free[state].append(to)

    def byte(self, start: int, first: int, last: int, end: int | None = None) -> int:
        end = self.state() if end is None else end
        self._arcs[start].append((first, last, end))
        return end

    def text(self, start: int, text: bytes) -> int:
        for byte in text:
            start = self.byte(start, byte, byte)
        return start

    def text_to(self, start: int, text: bytes, end: int) -> None:
        self.byte(self.text(start, text[:-1]), text[-1], text[-1], end)

    def non_ascii(self, start: int, end: int) -> None:
        """Any one character above ASCII, as UTF-8."""
        left = {0: end}                                          # states in which so many continuation bytes remain
        for remain in (1, 2):
            left[remain] = self.state()
            self.byte(left[remain], *_REST, left[remain - 1])
        for (first, last), second, *rest in _UTF8:
            if second == _REST and len(rest) < 2:
                self.byte(start, first, last, left[len(rest) + 1])
            else:
                self.byte(self.byte(start, first, last), *second, left[len(rest)])

    def dfa(self, end: int, sound: bool = True) -> ByteDfa:
        """Of the texts from state 0 to `end`. Raises TooLarge."""
        closures = [self._closure(s) for s in range(len(self._arcs))]
        first = closures[0]
        number = {first: 0}
        queue, rows, final = [first], [], []
        for members in queue:                                    # grows meanwhile
            row = np.full(256, -1, dtype=np.int32)
            for lo, hi, targets in self._moves(members):
                key = closures[targets[0]] if len(targets) == 1 else frozenset().union(*(closures[t] for t in targets))
                if key not in number:
                    if len(number) >= self._max_states:
                        raise TooLarge
                    number[key] = len(number)
                    queue.append(key)
                row[lo : hi + 1] = number[key]
            rows.append(row)
            final.append(end in members)
        return _trimmed(ByteDfa(np.stack(rows), np.array(final), sound))

    def _closure(self, state: int) -> frozenset[int]:
        seen, stack = {state}, [state]
        while stack:
            for to in self._free[stack.pop()]:
                if to not in seen:
                    seen.add(to)
                    stack.append(to)
        return frozenset(seen)

    def _moves(self, members: frozenset[int]) -> list[tuple[int, int, list[int]]]:
        """Disjoint ranges of bytes, and the states each leads to."""
        arcs = sorted(arc for s in members for arc in self._arcs[s])
        if all(one[1] < two[0] for one, two in pairwise(arcs)):
            return [(lo, hi, [target]) for lo, hi, target in arcs]
        cuts = sorted({lo for lo, _, _ in arcs} | {hi + 1 for _, hi, _ in arcs})
        moves = []
        for lo, after in pairwise(cuts):
            if targets := [t for first, last, t in arcs if first <= lo <= last]:
                moves.append((lo, after - 1, targets))
        return moves


def reaching(step: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """bool [S]: from which states a goal is reached. step: int [S, K] next states, -1 for none; goal: bool [S]."""
    changes = np.ones(step.shape, dtype=bool)
    changes[:, 1:] = step[:, 1:] != step[:, :-1]                 # neighbouring bytes mostly lead alike
    source, column = np.nonzero(changes & (step >= 0))
    target, reached = step[source, column], goal.copy()
    while True:
        found = source[reached[target] & ~reached[source]]
        if not found.size:
            return reached
        reached[found] = True


def _trimmed(dfa: ByteDfa) -> ByteDfa:
    """Without states from which no final one is reached."""
    delta, alive = dfa.delta, reaching(dfa.delta, dfa.final)
    number = np.where(alive, np.cumsum(alive) - 1, -1).astype(np.int32)
    delta = np.where(delta >= 0, number[delta], -1)
    return ByteDfa(delta[alive].astype(np.int32), dfa.final[alive], dfa.sound)
