"""What a context-free grammar cannot say: that the keys of an object differ, and the items of an array with uniqueItems.

A scanner follows the output of one row. It tells which texts would repeat an earlier one, so that the mask can leave them out,
and notices repetitions that slip through (1 and 1.0, a token that ends one item and holds all of the next).
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.guided.values import canonical

ANY_ARRAY = "*"
Unique = Mapping[str, tuple[bytes, ...] | None]
_KEY_NEXT, _KEY, _VALUE = range(3)


@dataclass(slots=True)
class _Frame:
    """An open object or array. `start`: where its current key or item begins; -1 between two."""

    is_object: bool
    name: str                     # of the property an array stands under; "[]" is added for each array it stands in
    distinct: bool
    known: tuple[bytes, ...] = () # all items there may be, where they can be listed
    phase: int = _KEY_NEXT
    start: int = -1
    texts: list[bytes] = field(default_factory=list)
    values: set[Any] = field(default_factory=set)


class Scanner:
    """Follows JSON text byte by byte.

    unique: names of the arrays whose items must differ (see _Frame), or ANY_ARRAY, each with the texts of all items there may be
    (None: too many to list).
    """

    def __init__(self, unique: Unique) -> None:
        self._unique = unique
        self._text = bytearray()
        self._frames: list[_Frame] = []
        self._string = 0          # 0: outside, 1: inside, 2: after a backslash
        self._key = ""

    def feed(self, piece: bytes) -> bool:
        """False where `piece` completes a key or an item that was there before: then the scanner is of no more use."""
        return all(map(self._feed, piece))

    def _feed(self, byte: int) -> bool:
        self._text.append(byte)
        frame = self._frames[-1] if self._frames else None
        if self._string:
            self._string = 1 if self._string == 2 else 2 if byte == 0x5C else 0 if byte == 0x22 else 1
            if not self._string and frame and frame.is_object and frame.phase == _KEY:
                frame.phase = _VALUE
                return self._finish(frame, len(self._text))
            return True
        if byte in b" \t\r\n:":
            return True
        if byte == 0x2C or byte in b"]}":
            fine = True
            if frame and not frame.is_object:
                fine = frame.start < 0 or self._finish(frame, len(self._text) - 1)
            elif frame:
                frame.phase = _KEY_NEXT
            if byte != 0x2C:
                self._frames.pop()
            return fine
        if frame and frame.start < 0 and (not frame.is_object or frame.phase == _KEY_NEXT):
            frame.start = len(self._text) - 1
            frame.phase = _KEY
        if byte == 0x22:
            self._string = 1
        elif byte in b"[{":
            name = "" if frame is None else self._key if frame.is_object else frame.name + "[]"
            is_object = byte == 0x7B
            known = () if is_object else self._unique.get(name) or ()
            distinct = is_object or name in self._unique or ANY_ARRAY in self._unique
            self._frames.append(_Frame(is_object, name, distinct, known))
        return True

    def _finish(self, frame: _Frame, end: int) -> bool:
        text = bytes(self._text[frame.start : end]).strip()
        frame.start = -1
        if not frame.distinct:
            return True
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return True                                  # the final check refuses it
        if frame.is_object:
            self._key = value
        frame.texts.append(text)
        before = len(frame.values)
        frame.values.add(canonical(value))
        return len(frame.values) > before

    def repeats(self) -> tuple[list[bytes], list[bytes]]:
        """Bytes which, if the output went on with them, would repeat a key or an item; and bytes that would have to end so."""
        repeating: list[bytes] = []
        doomed: list[bytes] = []
        for frame in self._frames:
            if not frame.texts or not frame.distinct:
                continue
            gaps = [b""]
            begun = bytes(self._text[frame.start :]) if frame.start >= 0 else b""
            if frame.start < 0:
                if frame is not self._frames[-1] or (frame.is_object and frame.phase == _VALUE):
                    continue
                gaps = [b"", b" "]                       # before the space that follows a comma, or after it
            used = [text for text in frame.texts if text.startswith(begun)]
            repeating += [gap + rest for text in used for gap in gaps for rest in _ends(text, begun)]
            if frame.known:
                unused = [text for text in frame.known if text not in frame.texts and text.startswith(begun)]
                starts = [text[:end] for text in used for end in range(len(begun) + 1, len(text))]
                lost = [start for start in starts if not any(other.startswith(start) for other in unused)]
                doomed += [gap + start[len(begun) :] for start in lost for gap in gaps]
        return repeating, doomed


class CallScanner(Scanner):
    """Follows a text from `opening` on: free text before it is none of its business.

    anywhere: False where only a text that starts with `opening` is to be followed; `opening` belongs to the JSON then.
    """

    def __init__(self, unique: Unique, opening: bytes, anywhere: bool) -> None:
        super().__init__(unique)
        self._opening, self._anywhere, self._before = opening, anywhere, b""
        self._begun = False

    def feed(self, piece: bytes) -> bool:
        if self._begun:
            return super().feed(piece)
        text = self._before + piece
        at = text.find(self._opening) if self._anywhere else 0 if text.startswith(self._opening) else -1
        if at < 0:
            self._before = text[1 - len(self._opening) :] if self._anywhere else text
            return True
        self._begun = True
        return super().feed(text[at + len(self._opening) if self._anywhere else at :])


def _ends(text: bytes, begun: bytes) -> list[bytes]:
    """How `text`, of which `begun` is there, is completed. A number is complete only when something follows."""
    rest = text[len(begun) :]
    if text[-1:].isdigit():
        return [rest + stop for stop in (b",", b"]", b" ")]
    return [rest] if rest else [b",", b"]", b" "]


def either(uniques: Iterable[Unique]) -> Unique:
    """What keeps each of several documents: arrays that must differ in one of them do in all."""
    known: dict[str, tuple[bytes, ...] | None] = {}
    for unique in uniques:
        for name, items in unique.items():
            known[name] = items if known.get(name, items) == items else None
    return known


class TokensByPrefix:
    """Finds the tokens of a vocabulary that begin with given bytes."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._ids = np.asarray(sorted(range(len(pieces)), key=pieces.__getitem__), dtype=np.int64)
        self._sorted = [pieces[i] for i in self._ids]

    def clear(self, row: np.ndarray, prefixes: Iterable[bytes], exact: Iterable[bytes]) -> None:
        """Clear the bits of tokens that begin with one of `prefixes` or are one of `exact` in one row of a mask, int32."""
        words = row.view(np.uint32)
        for prefix in prefixes:
            first = bisect_left(self._sorted, prefix)
            last = bisect_left(self._sorted, prefix + b"\xff" * 64)
            for token in self._ids[first:last].tolist():
                words[token >> 5] &= np.uint32(0xFFFFFFFF ^ 1 << (token & 31))
        for piece in exact:
            first = bisect_left(self._sorted, piece)
            while first < len(self._sorted) and self._sorted[first] == piece:
                token = int(self._ids[first])
                words[token >> 5] &= np.uint32(0xFFFFFFFF ^ 1 << (token & 31))
                first += 1

    def set(self, row: np.ndarray, tokens: Iterable[int]) -> None:
        words = row.view(np.uint32)
        for token in tokens:
            words[token >> 5] |= np.uint32(1 << (token & 31))
