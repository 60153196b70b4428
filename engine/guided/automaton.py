"""Token automata: a grammar that is a regular language as tables over the whole vocabulary, which a device steps by itself.

A byte automaton is walked along the tokens, kept as a trie, from all its states at once. Tokens that lead alike from every
state are one class: a labelling schema has a thousand states and some hundred classes of tokens, so its tables are small.
Where the grammar forces text, the automaton lets through the first token alone of how the model would write that text; so a
forced run of tokens is the same whether it is sampled one by one or appended at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from engine.guided.byte_dfa import ByteDfa, TooLarge, reaching
from engine.guided.token_trie import TokenTrie, Vocabulary, string_states

MAX_STATES = 8192            # of a byte automaton
MAX_PAIRS = 64_000_000       # (state, token) that are allowed: what compiling costs
MAX_BYTES = 256 << 20        # of one automaton's tables
MAX_ENTRIES = 64_000_000     # states x classes while it is made
_AT_ONCE = 1 << 22           # states x texts walked at a time: bounds the memory


@dataclass(frozen=True, slots=True, eq=False)
class TokenAutomaton:
    """S states, the first is where outputs begin; C classes of tokens; V columns of the logits.

    classes: int16 [V], of each token. next: int16 [S, C], the next state, -1 where the class is not allowed. An end token leads
    to where it came from, if the output may end there.
    masks: int32 [M, ceil(V / 32)], sets of allowed tokens, low bits first; mask_of: int32 [S], which of them.
    final: bool [S], the output may end. finished: bool [S], it must.
    sound: what it lets through passes the grammar's check (all but numbers beyond a double).
    A state with chain_size[s] > 0 is forced: chain[chain_start[s] :][: chain_size[s]] follows, and leads to chain_end[s].
    """

    classes: np.ndarray
    next: np.ndarray
    masks: np.ndarray
    mask_of: np.ndarray
    final: np.ndarray
    finished: np.ndarray
    sound: bool
    chain: np.ndarray
    chain_start: np.ndarray
    chain_size: np.ndarray
    chain_end: np.ndarray

    @property
    def nbytes(self) -> int:
        """Of its tables."""
        return self.classes.nbytes + self.next.nbytes + self.masks.nbytes

    def step(self, state: int, token: int) -> int:
        return int(self.next[state, self.classes[token]])


def token_automaton(dfa: ByteDfa, vocabulary: Vocabulary, tokenize: Callable[[bytes], list[int]], end_tokens: Sequence[int],
                    vocab_size: int) -> TokenAutomaton | None:
    """None where the vocabulary cannot write any text of the language. Raises TooLarge.

    tokenize: text -> tokens, as the model would write it. vocab_size: columns of the logits, at least the vocabulary's tokens.
    """
    step, classes, longest = _steps(dfa, vocabulary)
    classes = np.pad(classes, (0, vocab_size - classes.size))    # class 0 is never allowed
    if not set(np.flatnonzero(np.any(dfa.delta >= 0, axis=0)).tolist()) <= vocabulary.single:
        alive = reaching(step, dfa.final)                        # else tokens of one byte lead on from everywhere
        step = np.where((step >= 0) & alive[step], step, -1)
        if not alive[0]:
            return None
    forced, reached = _forced(dfa, step, classes, longest, tokenize)
    step, classes = _with_forced(step, classes, forced)
    number = np.full(dfa.final.size, -1, dtype=np.int32)
    number[reached] = np.arange(reached.size)
    step, final = step[reached], dfa.final[reached]
    step = np.where(step >= 0, number[step], -1)
    ends = np.where(final, np.arange(final.size), -1)
    step = np.concatenate([step, ends[:, None]], axis=1)
    classes[[t for t in end_tokens if t < vocab_size]] = step.shape[1] - 1
    step, classes = _merged(step, classes)
    masks, mask_of = _masks(step >= 0, classes)
    if max(step.shape) > np.iinfo(np.int16).max or 4 * step.size + masks.nbytes > MAX_BYTES:
        raise TooLarge
    finished = final & np.all(dfa.delta[reached] < 0, axis=1)
    chains = _chains({int(number[s]): token for s, token in forced.items()}, step, classes)
    return TokenAutomaton(classes.astype(np.int16), step.astype(np.int16), masks, mask_of, final, finished, dfa.sound,
                          *chains)


def _steps(dfa: ByteDfa, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The step table int32 [S, C], class 0 allowed nowhere; of each token its class; of each state its longest text's length."""
    states = dfa.final.size
    left, right = np.random.default_rng(0).integers(1, 2**63, size=(2, states), dtype=np.uint64)
    longest, budget = np.zeros(states, dtype=np.int32), MAX_PAIRS
    in_string = string_states(dfa.delta)
    hashed: np.ndarray = np.zeros(vocabulary.exact.text_of.size, dtype=np.uint64)
    walks: list[tuple[TokenTrie, list[tuple[np.ndarray, ...]]]] = []
    for trie, starts in ((vocabulary.exact, np.flatnonzero(~in_string)), (vocabulary.alike, np.flatnonzero(in_string))):
        sums: np.ndarray = np.zeros(trie.size + 1, dtype=np.uint64)      # the last: of tokens without text
        found: list[tuple[np.ndarray, ...]] = []
        for some in np.array_split(starts, -(-starts.size * trie.size // _AT_ONCE) or 1):
            for size, text, begin, state in trie.walk(dfa.delta, some):
                longest[begin] = size
                np.add.at(sums, text, left[begin] * (right[state] | np.uint64(1)) ^ right[begin])
                found.append((text, begin, state))
                budget -= text.size
                if budget < 0:
                    raise TooLarge
        hashed += sums[trie.text_of]
        walks.append((trie, found))
    # Tokens that lead alike from every state have the same sum, and others have not, but for one chance in 2^34.
    _, one, classes = np.unique(np.append(np.uint64(0), hashed), return_index=True, return_inverse=True)
    if states * one.size > MAX_ENTRIES:
        raise TooLarge
    step = np.full((states, one.size), -1, dtype=np.int32)
    for trie, found in walks:
        # Of each text the classes of the tokens that have it, one token standing for each class.
        text = np.append(-1, trie.text_of)[one]
        order = np.argsort(text, kind="stable")
        count = np.bincount(text[text >= 0], minlength=trie.size)
        first = np.cumsum(count) - count + int((text < 0).sum())
        for texts, begin, state in found:
            times = count[texts]
            i = np.arange(int(times.sum())) - np.repeat(np.cumsum(times) - times, times)
            step[np.repeat(begin, times), order[np.repeat(first[texts], times) + i]] = np.repeat(state, times)
    return step, classes[1:].astype(np.int32), longest


def _with_forced(step: np.ndarray, classes: np.ndarray, forced: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Only the forced token is allowed in each forced state: it is told from those that lead alike by a class of its own."""
    own = {token: step.shape[1] + i for i, token in enumerate(dict.fromkeys(forced.values()))}
    step, classes = np.concatenate([step, step[:, classes[list(own)]]], axis=1), classes.copy()
    classes[list(own)] = list(own.values())
    for state, token in forced.items():
        after = step[state, own[token]]
        step[state] = -1
        step[state, own[token]] = after
    return step, classes


def _forced(dfa: ByteDfa, step: np.ndarray, classes: np.ndarray, longest: np.ndarray,
            tokenize: Callable[[bytes], list[int]]) -> tuple[dict[int, int], np.ndarray]:
    """The states where one token must follow, and which; and all that are reached then, int64.

    A state is forced where one text must follow that no token goes beyond: one that does might be how the model would write on.
    """
    choices = (dfa.delta >= 0).sum(1)
    only = np.where((choices == 1) & ~dfa.final, (dfa.delta >= 0).argmax(1), -1)
    forced: dict[int, int] = {}
    reached = np.zeros(dfa.final.size, dtype=bool)
    frontier = np.zeros(1, dtype=np.int64)
    while frontier.size:
        reached[frontier] = True
        for state in frontier[only[frontier] >= 0].tolist():
            text, at = bytearray(), state
            while only[at] >= 0:
                text.append(int(only[at]))
                at = int(dfa.delta[at, only[at]])
            if longest[state] <= len(text):
                token = tokenize(bytes(text))[0]
                if token < classes.size and step[state, classes[token]] >= 0:        # not beyond the logits, nor a dead end
                    forced[state] = token
        targets = np.zeros(dfa.final.size, dtype=bool)
        free = np.array([s for s in frontier.tolist() if s not in forced], dtype=np.int64)
        after = step[free]
        targets[after[after >= 0]] = True
        targets[[step[s, classes[forced[s]]] for s in frontier.tolist() if s in forced]] = True
        frontier = np.flatnonzero(targets & ~reached)
    return forced, np.flatnonzero(reached)


def _merged(step: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Classes that have become alike are made one."""
    weights = np.random.default_rng(1).integers(1, 2**63, size=(step.shape[0], 1), dtype=np.uint64)[:, 0]
    hashed = np.zeros(step.shape[1], dtype=np.uint64)
    for state in range(step.shape[0]):
        hashed += (step[state] + 1).astype(np.uint64) * weights[state]
    _, kept, merged = np.unique(hashed, return_index=True, return_inverse=True)
    assert (step == step[:, kept[merged]]).all(), "two classes that differ hash alike"
    return step[:, kept], merged[classes]


def _masks(allowed: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """allowed: bool [S, C] -> the different masks, int32 [M, ceil(V / 32)], and which is each state's, int32 [S]."""
    packed = np.packbits(allowed, axis=1)
    _, kept, mask_of = np.unique(packed, axis=0, return_index=True, return_inverse=True)
    words = -(-classes.size // 32)
    masks = np.zeros((kept.size, 4 * words), dtype=np.uint8)
    if masks.nbytes > MAX_BYTES:
        raise TooLarge
    for mask, state in zip(masks, kept.tolist(), strict=True):
        bits = np.packbits(allowed[state][classes], bitorder="little")
        mask[: bits.size] = bits
    return masks.view("<i4"), mask_of.ravel().astype(np.int32)


def _chains(forced: dict[int, int], step: np.ndarray,
            classes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """chain, chain_start, chain_size and chain_end of TokenAutomaton."""
    states = step.shape[0]
    start, size, end = np.zeros(states, dtype=np.int32), np.zeros(states, dtype=np.int32), np.arange(states, dtype=np.int32)
    chain: list[int] = []
    for first in forced:
        state, begin, passed = first, len(chain), []
        while state in forced and not size[state]:
            passed.append(state)
            chain.append(forced[state])
            state = int(step[state, classes[forced[state]]])
        if size[state]:                                          # what follows is known already
            chain += chain[start[state] : start[state] + size[state]]
        last = end[state]
        for i, s in enumerate(passed):
            start[s], size[s], end[s] = begin + i, len(chain) - begin - i, last
    return np.array(chain, dtype=np.int32), start, size, end
