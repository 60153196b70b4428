"""The seam between the engine and a grammar backend: Grammar (one per distinct schema), Guide (one per row)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from engine.guided.automaton import TokenAutomaton

if TYPE_CHECKING:
    from engine.guided.tools import Tool


class SchemaError(ValueError):
    """A schema, regex or choice that cannot be kept. `pointer`: JSON pointer to the place; `reason`: one line."""

    def __init__(self, pointer: str, reason: str) -> None:
        super().__init__(f"{pointer or '/'}: {reason}")
        self.pointer, self.reason = pointer, reason

    def __reduce__(self) -> tuple[type[SchemaError], tuple[str, str]]:
        return type(self), (self.pointer, self.reason)


class Guide(Protocol):
    """The state of one row. Not shared between threads."""

    def accept(self, tokens: Sequence[int]) -> int:
        """Advance by sampled tokens; returns how many were taken (fewer than given: the rest broke the grammar)."""

    def forced(self) -> list[int]:
        """The tokens that must come next, as the model would tokenise them; empty where there is a choice. Does not advance."""

    @property
    def finished(self) -> bool:
        """True when the output is complete and nothing may follow: no end token need be sampled."""

    @property
    def accepting(self) -> bool:
        """True when the output may end here."""

    @property
    def error(self) -> str | None:
        """Why the backend gave up on this row, if it did."""


class Grammar(Protocol):
    """A compiled schema. Immutable, shared by rows and threads."""

    min_tokens: int      # an upper bound on the fewest tokens a valid output needs
    minimal: np.ndarray  # such an output: int32 [min_tokens]
    automaton: TokenAutomaton | None     # lets through what the guides do

    def check(self, text: str) -> Any:
        """The value of a finished output: parsed JSON, or the text itself for regex and choice. ValueError if it is not valid."""

    def text(self, tokens: Sequence[int]) -> str:
        """What `tokens` spell: tokenizers may leave out a space that it begins with, which a regex or choice asks for."""

    def start(self) -> Guide:
        """A fresh guide at the start of the output."""

    def close(self, tokens: Sequence[int], budget: int) -> np.ndarray:
        """Trim `tokens` by as few as needed and append a short completion: at most `budget` tokens in all, int32, valid.

        A valid output within the budget comes back unchanged, quickly: calling this at the end of every row makes all of them
        valid, also those that the grammar lets through and `check` does not (numbers beyond a double). Needs at least min_tokens;
        raises ValueError otherwise.
        """


class GrammarBackend(Protocol):
    """Compiles grammars for one tokenizer and fills masks."""

    def compile_schema(self, schema: str | dict | bool) -> Grammar: ...
    def compile_regex(self, pattern: str) -> Grammar: ...
    def compile_choice(self, choices: Sequence[str]) -> Grammar: ...
    def compile_loose(self, schema: str | dict | bool) -> Grammar: ...
    def compile_tools(self, form: str, tools: Sequence[Tool], choice: str) -> Grammar: ...

    def fill(self, guides: Sequence[Guide], mask: np.ndarray) -> None:
        """Write row i of `mask` from guides[i], in parallel: int32 [n, ceil(vocab / 32)], bit set = allowed, low bits first."""
