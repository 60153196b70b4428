"""ClosedGrammar: what all backends' grammars share: the check, a shortest output, trim and close."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from engine.guided.automaton import TokenAutomaton
from engine.guided.closing import Closer
from engine.guided.grammar import SchemaError
from engine.guided.vocabulary import GrammarVocabulary


class ClosedGrammar:
    """Immutable, shared by rows and threads.

    closer: of the same language. check: text -> value; raises ValueError where the text is not a valid output.
    minimal: a short valid output, int32 tokens; min_tokens is its length.
    """

    automaton: TokenAutomaton | None = None              # see Grammar

    def __init__(self, vocabulary: GrammarVocabulary, closer: Closer, check: Callable[[str], Any]) -> None:
        self.vocabulary, self.check, self._closer = vocabulary, check, closer
        self.minimal = np.asarray(self._shortest(), dtype=np.int32)
        self.min_tokens = len(self.minimal)

    def _shortest(self) -> list[int]:
        minimal = self._closer.minimal()
        if minimal is None:
            raise SchemaError("", "no valid output was found: the schema contradicts itself or asks for too much")
        return self.vocabulary.tokenize(minimal)

    def text(self, tokens: Sequence[int]) -> str:
        return self.vocabulary.text(tokens).decode(errors="replace")

    def close(self, tokens: Sequence[int], budget: int) -> np.ndarray:
        if budget < self.min_tokens:
            raise ValueError(f"{budget} tokens are too few: the shortest output known for this schema needs {self.min_tokens}; "
                             "raise max_tokens")
        taken = np.asarray(tokens, dtype=np.int32)
        pieces = [self.vocabulary.token_bytes[t] for t in taken.tolist()]
        if len(pieces) <= budget and self._closer.holds(b"".join(pieces)):
            return taken.copy()
        found = self._closer.close(pieces, budget)
        if found is None:
            return self.minimal.copy()
        kept, closing = found
        return np.concatenate([taken[:kept], np.asarray(closing, dtype=np.int32)])
