"""xgrammar behind the grammar seam, chosen by guided.backend=xgrammar: for comparisons, not for production. Needs the extra.

Measured on 217 real schemas (xgrammar 0.2.8): 99 % compiled within 10 s, many in seconds; 5.8 % of the outputs that its grammar
let through were not valid: keywords that it does not know are dropped; oneOf, several allOf, not, if, dependent*, uniqueItems,
contains, required keys that are not listed and a pattern beside a length are not kept; raw control characters and lone surrogates
may come. Such outputs are trimmed and closed, or fail the final check: none is written as valid. There is no jump-forward here,
masks are filled one after another (50 ms for 256 rows of 152k tokens), and an end token is always sampled. Tools and best effort
need llguidance.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xgrammar

from engine.guided.closed import ClosedGrammar
from engine.guided.closing import END, Closer
from engine.guided.front import parse_schema
from engine.guided.grammar import SchemaError
from engine.guided.hints import example, schema_hints
from engine.guided.simple import SimpleBackend, choice_check, regex_check, validator_of
from engine.guided.state_matcher import ByteByByte

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SPACES: dict[str, dict[str, Any]] = {
    "dumps": {"any_whitespace": False, "separators": (", ", ": ")},
    "compact": {"any_whitespace": False, "separators": (",", ":")},
    "flexible": {"any_whitespace": True},
}


class XGuide:
    __slots__ = ("_end", "matcher")

    def __init__(self, matcher: xgrammar.GrammarMatcher, end: frozenset[int]) -> None:
        self.matcher, self._end = matcher, end

    def accept(self, tokens: Sequence[int]) -> int:
        for taken, token in enumerate(tokens):
            if token in self._end or not self.matcher.accept_token(token):
                return taken
        return len(tokens)

    def forced(self) -> list[int]:
        return []

    @property
    def finished(self) -> bool:
        return False                                     # it does not say whether more may follow: the end token does

    @property
    def accepting(self) -> bool:
        return self.matcher.is_completed()

    @property
    def error(self) -> str | None:
        return None


class XBytes(ByteByByte):
    """closing.ByteMatcher over xgrammar's matcher for the vocabulary of single bytes."""

    def __init__(self, matcher: xgrammar.GrammarMatcher) -> None:
        self._matcher = matcher
        self._mask = np.zeros((1, (END + 32) // 32), dtype=np.int32)

    def deep_copy(self) -> XBytes:
        return XBytes(self._matcher.fork())

    def consume_token(self, sampled_token: int) -> bool:
        return sampled_token != END and self._matcher.accept_token(sampled_token)

    def rollback(self, num_tokens: int) -> bool:
        if num_tokens:
            self._matcher.rollback(num_tokens)
        return True

    def is_accepting(self) -> bool:
        return self._matcher.is_completed()

    def compute_ff_bytes(self) -> bytes:
        out = bytearray()
        while not self.is_accepting() and len(out) < 1 << 16:
            bits = int.from_bytes(self.compute_bitmask(), "little")
            if bits.bit_count() != 1 or not self.consume_token(bits.bit_length() - 1):
                break
            out.append(bits.bit_length() - 1)
        self.rollback(len(out))
        return bytes(out)

    def compute_bitmask(self) -> bytes:
        self._matcher.fill_next_token_bitmask(torch.from_numpy(self._mask))
        return self._mask.tobytes()[:33]


class XGrammar(ClosedGrammar):
    def __init__(self, backend: XGrammarBackend, compile: Callable[[xgrammar.GrammarCompiler], xgrammar.CompiledGrammar],
                 check: Callable[[str], Any], hints: Sequence[bytes], is_json: bool) -> None:
        try:
            self._compiled, by_bytes = compile(backend.compiler), compile(backend.byte_compiler)
        except (RuntimeError, ValueError) as error:
            raise SchemaError("", " ".join(str(error).split())[:300]) from None
        self._end = frozenset(backend.end)
        closer = Closer(XBytes(xgrammar.GrammarMatcher(by_bytes)), backend.vocabulary.tokenize, check, hints, is_json)
        super().__init__(backend.vocabulary, closer, check)

    def start(self) -> XGuide:
        return XGuide(xgrammar.GrammarMatcher(self._compiled), self._end)


class XGrammarBackend(SimpleBackend):
    """Thread-safe."""

    name = "xgrammar"

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocab_size: int, eos_token_ids: Sequence[int],
                 whitespace: str = "dumps") -> None:
        super().__init__(tokenizer, vocab_size, eos_token_ids)
        self._spaces = _SPACES[whitespace]

    @cached_property
    def compiler(self) -> xgrammar.GrammarCompiler:
        return self._compiler(self.vocabulary.token_bytes[: self.vocab_size], self.end)

    @cached_property
    def byte_compiler(self) -> xgrammar.GrammarCompiler:
        return self._compiler([bytes([byte]) for byte in range(256)] + [b"<end>"], [END])

    @staticmethod
    def _compiler(tokens: list[bytes], end: list[int]) -> xgrammar.GrammarCompiler:
        return xgrammar.GrammarCompiler(xgrammar.TokenizerInfo(tokens, stop_token_ids=end), max_threads=1)

    def compile_schema(self, schema: str | dict[str, Any] | bool) -> XGrammar:
        original = parse_schema(schema) if isinstance(schema, str) else schema
        text = json.dumps(original)
        return XGrammar(self, lambda compiler: compiler.compile_json_schema(text, **self._spaces), validator_of(original).check,
                        schema_hints(original), True)

    def compile_regex(self, pattern: str) -> XGrammar:
        check = regex_check(pattern)
        return XGrammar(self, lambda compiler: compiler.compile_regex(pattern), check, [(example(pattern) or "").encode()], False)

    def compile_choice(self, choices: Sequence[str]) -> XGrammar:
        check = choice_check(choices)
        grammar = "root ::= " + " | ".join(json.dumps(choice) for choice in dict.fromkeys(choices))
        return XGrammar(self, lambda compiler: compiler.compile_grammar(grammar), check, [], False)

    def fill(self, guides: Sequence[XGuide], mask: np.ndarray) -> None:
        rows = torch.from_numpy(mask)
        for index, guide in enumerate(guides):
            guide.matcher.fill_next_token_bitmask(rows, index)
