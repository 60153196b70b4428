"""outlines_core behind the grammar seam, chosen by guided.backend=outlines_core: for comparisons, not for production.

It turns a schema into a regular expression and that into an automaton over tokens. Measured on 217 real schemas (outlines_core
0.2.14): 76 % compiled within 10 s, at up to 1 GB of memory; 10.7 % of the outputs that its grammar let through were not valid:
numeric bounds, multipleOf, uniqueItems, contains, not, if and dependent* are ignored, allOf is concatenated, `{}` takes
anything, recursion ends at depth 3. Such outputs are trimmed and closed, or fail the final check: none is written as valid. The
root may not be a bare number or an unbounded string (a state where the output may end allows nothing but the end). Between values
stands at most one space. Tools and best effort need llguidance.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from outlines_core import Guide as Walker
from outlines_core import Index, Vocabulary, json_schema

from engine.guided.closed import ClosedGrammar
from engine.guided.closing import END, Closer
from engine.guided.front import parse_schema
from engine.guided.grammar import SchemaError
from engine.guided.hints import example, schema_hints
from engine.guided.simple import SimpleBackend, choice_check, regex_check, validator_of
from engine.guided.state_matcher import StateMatcher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SPACES = {"dumps": "[ ]?", "compact": "", "flexible": "[ ]?"}


class OutlinesGuide:
    __slots__ = ("_end", "_failed", "walker")

    def __init__(self, index: Index, end: frozenset[int]) -> None:
        self.walker, self._end, self._failed = Walker(index), end, False

    def accept(self, tokens: Sequence[int]) -> int:
        for taken, token in enumerate(tokens):
            if token in self._end or not self.walker.accepts_tokens([token]):
                return taken
            self.walker.advance(token, return_tokens=False)
        return len(tokens)

    def forced(self) -> list[int]:
        return []

    @property
    def finished(self) -> bool:
        return self.walker.is_finished()

    accepting = finished

    @property
    def error(self) -> str | None:
        return None


class OutlinesGrammar(ClosedGrammar):
    def __init__(self, backend: OutlinesCoreBackend, regex: str, check: Callable[[str], Any], hints: Sequence[bytes],
                 is_json: bool) -> None:
        try:
            self._index = Index(regex, backend.tokens)
            by_bytes = Index(regex, backend.bytes)
        except ValueError as error:
            raise SchemaError("", " ".join(str(error).split())) from None
        self._end = frozenset(backend.end)
        matcher = StateMatcher(by_bytes.get_transitions(), by_bytes.get_final_states(), by_bytes.get_initial_state())
        closer = Closer(matcher, backend.vocabulary.tokenize, check, hints, is_json)
        super().__init__(backend.vocabulary, closer, check)

    def start(self) -> OutlinesGuide:
        return OutlinesGuide(self._index, self._end)


class OutlinesCoreBackend(SimpleBackend):
    """Thread-safe; but a compilation holds the interpreter's lock, so a time limit is noticed only when it ends."""

    name = "outlines_core"

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocab_size: int, eos_token_ids: Sequence[int],
                 whitespace: str = "dumps") -> None:
        super().__init__(tokenizer, vocab_size, eos_token_ids)
        self._spaces = _SPACES[whitespace]

    @cached_property
    def tokens(self) -> Vocabulary:
        """From the bytes of the tokens: as text, those that hold part of a character could not be told apart."""
        known: dict[bytes, list[int]] = {}
        for token, piece in enumerate(self.vocabulary.token_bytes[: self.vocab_size]):
            if piece and token not in self.end:
                known.setdefault(piece, []).append(token)
        return Vocabulary(self.end[0], known)

    @cached_property
    def bytes(self) -> Vocabulary:
        return Vocabulary(END, {bytes([byte]): [byte] for byte in range(256)})

    def compile_schema(self, schema: str | dict[str, Any] | bool) -> OutlinesGrammar:
        original = parse_schema(schema) if isinstance(schema, str) else schema
        check = validator_of(original).check
        try:
            regex = json_schema.build_regex_from_schema(json.dumps(original), self._spaces)
        except ValueError as error:
            raise SchemaError("", " ".join(str(error).split())) from None
        return OutlinesGrammar(self, regex, check, schema_hints(original), True)

    def compile_regex(self, pattern: str) -> OutlinesGrammar:
        return OutlinesGrammar(self, pattern, regex_check(pattern), [(example(pattern) or "").encode()], False)

    def compile_choice(self, choices: Sequence[str]) -> OutlinesGrammar:
        check = choice_check(choices)
        regex = "|".join(f"({_literal(choice)})" for choice in dict.fromkeys(choices))
        return OutlinesGrammar(self, regex, check, [], False)

    def fill(self, guides: Sequence[OutlinesGuide], mask: np.ndarray) -> None:
        mask[: len(guides)] = 0
        for row, guide in zip(mask, guides, strict=False):
            guide.walker.write_mask_into(row.ctypes.data, row.size, 4)


def _literal(text: str) -> str:
    return "".join("\\" + char if char in r"\.+*?()|[]{}^$-&~#/" else char for char in text)
