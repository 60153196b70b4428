"""What the backends that are there for comparisons share: they compile schemas, regexes and choices, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from engine.guided.grammar import SchemaError
from engine.guided.tools import Tool
from engine.guided.validate import Validator
from engine.guided.vocabulary import GrammarVocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class SimpleBackend:
    """end: token ids that end an output. vocab_size: columns of the logits, padding included."""

    name: str

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self.vocab_size, self.vocabulary = vocab_size, GrammarVocabulary(tokenizer, vocab_size, eos_token_ids)
        self.end = [token for token in eos_token_ids if token < vocab_size]

    def compile_loose(self, schema: str | dict[str, Any] | bool) -> NoReturn:
        raise SchemaError("", f"guided.on_unsupported=best_effort needs guided.backend=llguidance, not {self.name}")

    def compile_tools(self, form: str, tools: Sequence[Tool], choice: str) -> NoReturn:
        raise SchemaError("", f"tools need guided.backend=llguidance, not {self.name}")


def validator_of(schema: dict[str, Any] | bool) -> Validator:
    """Raises SchemaError for what is no JSON Schema."""
    try:
        return Validator(schema)
    except ValueError as error:
        raise SchemaError("", " ".join(str(error).split())) from None


def choice_check(choices: Sequence[str]) -> Callable[[str], str]:
    """Raises SchemaError for choices that are none; the check, ValueError for a text that is not one of them."""
    options = dict.fromkeys(choices)
    if not options or not all(isinstance(option, str) and option for option in options):
        raise SchemaError("", "a choice needs at least one string, and none of them empty")

    def check(text: str) -> str:
        if text not in options:
            raise ValueError(f"{text!r} is not one of the choices")
        return text

    return check


def regex_check(pattern: str) -> Callable[[str], str]:
    """By Python's regular expressions. Raises SchemaError for what is none."""
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise SchemaError("", f"{pattern!r} is no regular expression: {error}") from None

    def check(text: str) -> str:
        if compiled.fullmatch(text) is None:
            raise ValueError(f"{text!r} does not match {pattern!r}")
        return text

    return check
