"""A tokenizer's texts as tries, which byte automata are walked along from many states at once.

From inside a JSON string nearly all letters lead alike. So the texts are kept a second time in classes of bytes, where fifty
thousand are some hundred, and the states that do take bytes so are walked along those: most states of a labelling schema.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class _Level:
    """Nodes of the trie at one depth. Children: count[i] nodes of the next level, from first[i]. text: what ends here, or -1."""

    byte: np.ndarray
    first: np.ndarray
    count: np.ndarray
    text: np.ndarray


class TokenTrie:
    """Texts as a trie. text_of: int32 [V], which text is each token's, -1 for tokens without."""

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        texts = sorted({text for text in token_bytes if text})
        number = {text: i for i, text in enumerate(texts)}
        self.size = len(texts)
        self.text_of = np.array([number.get(text, -1) for text in token_bytes], dtype=np.int32)
        self._lengths = np.array([len(text) for text in texts], dtype=np.int32)
        self._levels = list(self._build(texts))

    def _build(self, texts: list[bytes]) -> Iterator[_Level]:
        deepest = int(self._lengths.max())
        letters = np.frombuffer(b"".join(text.ljust(deepest, b"\0") for text in texts), dtype=np.uint8).reshape(-1, deepest)
        inside = np.arange(deepest) < self._lengths[:, None]
        differs = np.ones(letters.shape, dtype=bool)
        differs[1:] = (letters[1:] != letters[:-1]) | ~inside[:-1]
        opens = np.logical_or.accumulate(differs, axis=1) & inside       # a text begins a node where it leaves the one before
        rows = np.arange(len(texts))
        for depth in range(deepest):
            here = rows[opens[:, depth]]
            text = np.where(self._lengths[here] == depth + 1, here, -1).astype(np.int32)
            if depth + 1 < deepest:
                below = np.concatenate([[0], np.cumsum(opens[:, depth + 1])])
                ends = np.append(here[1:], len(texts))
                first, count = below[here], below[ends] - below[here]
            else:
                first = count = np.zeros(here.size, dtype=np.int64)
            yield _Level(letters[here, depth].astype(np.int32), first.astype(np.int32), count.astype(np.int32), text)

    def walk(self, delta: np.ndarray, starts: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """(bytes, text, from, to) int32 of every text that leads from one of the states `starts` to another, short ones first."""
        flat = delta.ravel()
        reached = delta[starts[:, None], self._levels[0].byte]
        begin, node = np.nonzero(reached >= 0)
        state = reached[begin, node]
        begin, node = starts[begin], node.astype(np.int32)
        for depth, level in enumerate(self._levels):
            text = level.text[node]
            if (hit := text >= 0).any():
                yield depth + 1, text[hit], begin[hit], state[hit]
            count = level.count[node]
            if not (total := int(count.sum())):
                return
            child = np.repeat(level.first[node] - (np.cumsum(count) - count), count).astype(np.int32)
            child += np.arange(total, dtype=np.int32)
            state = flat[np.repeat(state * 256, count) + self._levels[depth + 1].byte[child]]
            kept = state >= 0
            begin, node, state = np.repeat(begin, count)[kept], child[kept], state[kept]


# A byte for each class of bytes that JSON strings treat alike. Letters that may follow a backslash are a class of their own.
_LETTER, _BACKSLASH, _QUOTE = 0x62, 0x5C, 0x22
_ALIKE = np.zeros(256, dtype=np.uint8)
for _first, _last in ((0x20, 0x7E), (0x80, 0x8F), (0x90, 0x9F), (0xA0, 0xBF), (0xC2, 0xDF), (0xE0, 0xE0), (0xE1, 0xEF),
                      (0xED, 0xED), (0xF0, 0xF0), (0xF1, 0xF3), (0xF4, 0xF4), (_BACKSLASH, _BACKSLASH), (_QUOTE, _QUOTE)):
    _ALIKE[_first : _last + 1] = _first
_ALIKE[list(b"bfnrt")] = _LETTER


class Vocabulary:
    """The texts of a tokenizer's tokens, made once: what is walked for each grammar.

    exact: as they are. alike: as a JSON string sees them, where nearly all letters are one: some hundred texts.
    """

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self.exact, self.alike = TokenTrie(token_bytes), TokenTrie(_alike(token_bytes))
        self.single = {text[0] for text in token_bytes if len(text) == 1}


def _alike(texts: Sequence[bytes]) -> list[bytes]:
    """Classes of bytes up to the first quote, which may end the string. A letter may be an escape first, or after a backslash."""
    data = np.frombuffer(b"".join(texts), dtype=np.uint8)
    ends = np.cumsum([len(text) for text in texts])
    kinds = _ALIKE[data]
    escapes = np.zeros(data.size, dtype=bool)
    escapes[1:] = kinds[:-1] == _BACKSLASH
    escapes[np.append(0, ends[:-1])[np.diff(ends, prepend=0) > 0]] = True
    kinds[(kinds == _LETTER) & ~escapes] = 0x20
    whole = kinds.tobytes()
    out = []
    for text, end in zip(texts, ends.tolist(), strict=True):
        inside = len(text.partition(b'"')[0])
        first = end - len(text)
        out.append(whole[first : first + inside] + text[inside:])
    return out


def string_states(delta: np.ndarray) -> np.ndarray:
    """bool [S]: states from which a text leads where its _alike does: they and what follows, up to a quote, take bytes so."""
    kinds = [np.flatnonzero(kind == _ALIKE) for kind in np.unique(_ALIKE) if kind != _QUOTE]
    takes = np.logical_and.reduce([(delta[:, kind] == delta[:, kind[:1]]).all(1) for kind in kinds])
    letters_too = takes & (delta[:, 0x20] == delta[:, _LETTER])
    after = delta[:, [kind[0] for kind in kinds if kind[0] != _BACKSLASH]]
    escaped = delta[:, _BACKSLASH]
    while True:
        goes_on = ((after < 0) | letters_too[after]).all(1) & ((escaped < 0) | takes[escaped])
        if (goes_on | ~takes).all():
            return takes
        takes, letters_too = takes & goes_on, letters_too & goes_on
