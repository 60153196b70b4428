"""Admission by forecast: how many waiting requests fit, given when the running ones will end.

A row's future is guessed from the output lengths seen so far in this job: given that it has produced g tokens, a high quantile of
the finished outputs longer than g. Until enough have been seen, max_tokens is believed.
"""

from __future__ import annotations

from collections import deque

import numpy as np

QUANTILE = 0.8          # of the outputs still possible: between the mean, which preempts, and the maximum, which wastes
MIN_SEEN = 64
KEPT = 8192             # lengths remembered, the latest


class LengthPredictor:
    def __init__(self) -> None:
        self._seen: deque[int] = deque(maxlen=KEPT)
        self._sorted = np.empty(0, dtype=np.int64)
        self._unsorted = 0

    def observe(self, length: int) -> None:
        self._seen.append(length)
        self._unsorted += 1

    def remaining(self, produced: np.ndarray, most: np.ndarray, exact: np.ndarray) -> np.ndarray:
        """Tokens still to come of rows that have `produced`, of at most `most`; `exact` rows are known to reach their most."""
        left = most - produced
        if len(self._seen) < MIN_SEEN:
            return left
        if self._unsorted > len(self._seen) // 10:                        # kept a little stale: sorting is the cost
            self._sorted, self._unsorted = np.sort(np.array(self._seen)), 0
        longer = np.searchsorted(self._sorted, produced, side="right")
        count = self._sorted.size - longer
        at = np.minimum(longer + (count * QUANTILE).astype(np.int64), self._sorted.size - 1)
        guess = np.where(count > 0, self._sorted[at] - produced, left)
        return np.where(exact, left, np.clip(guess, 1, left))


def peak_tokens(held: np.ndarray, left: np.ndarray, page: int) -> int:
    """The most KV tokens that pages will be taken for at once when row i holds held[i] now, and ends after left[i] more.

    The peak is at the end of some row: all that outlive it then hold what they have now, as much more as steps have passed, and
    on average half a page; those that end then, whole pages (LightLLM's forecast, with pages).
    """
    if held.size == 0:
        return 0
    order = np.argsort(-left, kind="stable")
    held, left = held[order], left[order]
    grown = np.concatenate([[0], np.cumsum(held)])
    whole = np.concatenate([[0], np.cumsum(-(-(held + left) // page) * page)])
    outlive, there = (np.searchsorted(-left, -left, side=side) for side in ("left", "right"))
    return int((grown[outlive] + outlive * (left + page // 2) + whole[there] - whole[outlive]).max())


Rows = tuple[np.ndarray, np.ndarray]        # tokens held now, tokens still to come


def admissible(running: Rows, new: Rows, capacity: int, page: int) -> int:
    """How many of the new rows, in order, fit beside the running ones so that the forecast peak is at most `capacity` tokens."""
    def fits(n: int) -> bool:
        held, left = (np.concatenate([ours, theirs[:n]]) for ours, theirs in zip(running, new, strict=True))
        return peak_tokens(held, left, page) <= capacity

    most = int(new[0].size)
    if fits(most):
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
