"""llguidance behind the grammar seam: compile, guide rows, fill masks. Of the engines measured it was the only sound one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

from engine.guided.automaton import MAX_STATES, TokenAutomaton, token_automaton
from engine.guided.byte_dfa import ByteDfa, TooLarge
from engine.guided.closed import ClosedGrammar
from engine.guided.closing import Closer, byte_tokenizer
from engine.guided.dialect import Document
from engine.guided.distinct import CallScanner, Scanner, Unique, either
from engine.guided.front import parse_schema
from engine.guided.grammar import SchemaError
from engine.guided.hints import example, schema_hints
from engine.guided.lower import ExtraKeys, Lowered, lower
from engine.guided.regexes import overflow
from engine.guided.regular import choice_dfa, schema_dfa
from engine.guided.regular_numbers import NotRegular
from engine.guided.simple import choice_check, validator_of
from engine.guided.token_trie import Vocabulary
from engine.guided.tool_formats import FORMATS
from engine.guided.tools import Tool, ToolCheck, allowed
from engine.guided.vocabulary import GrammarVocabulary, MarkedVocabulary

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions
    from transformers import PreTrainedTokenizerFast

# No \\u escapes: with them a key could be spelled past the properties that are listed. Models write characters as they are.
_ESCAPES = 'bfnrt"\\\\'
# json.dumps style by default: models write it naturally, and it leaves 60-90 % of a labelling schema's tokens forced.
WHITESPACE: dict[str, JsonCompileOptions] = {
    "dumps": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "json_allowed_escapes": _ESCAPES},
    "compact": {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":", "json_allowed_escapes": _ESCAPES},
    "flexible": {"whitespace_flexible": True, "json_allowed_escapes": _ESCAPES},
}

# Grammars that are made an automaton, the first ones: that doubles the time to compile, takes megabytes, and pays where many rows
# have the same grammar.
MAX_AUTOMATA = 256
MAX_AUTOMATA_BYTES = 512 << 20       # of the tables of all of them


def default_limits(fuel: int = 20_000_000) -> LLParserLimits:
    """Above llguidance's own, at which real schemas ran into an error after some hundred tokens.

    fuel: what all rows of one grammar together may spend on new states of its lexer.
    """
    return LLParserLimits(initial_lexer_fuel=fuel, step_lexer_fuel=5_000_000, step_max_items=500_000,
                          max_items_in_row=50_000, max_lexer_states=2_000_000, verbose_errors=False)


class LLGuide:
    """One row's matcher. Not shared between threads."""

    __slots__ = ("matcher",)

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher

    def accept(self, tokens: Sequence[int]) -> int:
        return self.matcher.try_consume_tokens(tokens if isinstance(tokens, list) else list(tokens))

    def forced(self) -> list[int]:
        return self.matcher.compute_ff_tokens()

    @property
    def finished(self) -> bool:
        return self.matcher.is_stopped() and not self.matcher.is_error()

    @property
    def accepting(self) -> bool:
        return self.matcher.is_accepting()

    @property
    def error(self) -> str | None:
        # On a resource limit llguidance allows only the end token, which would cut the output silently: callers must look here.
        return (self.matcher.get_error() or "unknown error") if self.matcher.is_error() else None


class DistinctGuide(LLGuide):
    """A row whose keys, or the items of some arrays, must differ: a mask alone does not say so."""

    __slots__ = ("_error", "_pieces", "_scanner", "_vocabulary")

    def __init__(self, matcher: LLMatcher, scanner: Scanner, vocabulary: GrammarVocabulary) -> None:
        super().__init__(matcher)
        self._scanner, self._vocabulary, self._pieces = scanner, vocabulary, vocabulary.token_bytes
        self._error: str | None = None

    def accept(self, tokens: Sequence[int]) -> int:
        taken = super().accept(tokens) if self._error is None else 0
        for i in range(taken):
            if not self._scanner.feed(self._pieces[tokens[i]]):
                self._error = "a key or an item that must differ is repeated"
                return i
        return taken

    def forced(self) -> list[int]:
        tokens = super().forced()
        text = b"".join(self._pieces[t] for t in tokens)
        return [] if text and any(text.startswith(rest) for rest in self._scanner.repeats()[0]) else tokens

    def restrict(self, row: np.ndarray, end: Sequence[int]) -> None:
        """Leave out of a filled mask row what would repeat. Where nothing is left: an error, with only `end` allowed."""
        repeating, doomed = self._scanner.repeats()
        if repeating:
            self._vocabulary.by_prefix.clear(row, repeating, doomed)
            if not row.any():
                self._error = "whatever may follow repeats a key or an item that must differ"
                self._vocabulary.by_prefix.set(row, end)

    @property
    def finished(self) -> bool:
        return self._error is None and super().finished

    @property
    def accepting(self) -> bool:
        return self._error is None and super().accepting

    @property
    def error(self) -> str | None:
        return self._error or super().error


class LLGrammar(ClosedGrammar):
    """hints, is_json, opening: see Closer. notes: (JSON pointer, what the grammar leaves out of what the schema allows).
    scanner: makes what follows keys and items that must differ, see Scanner; None: none must.
    automaton: the same grammar as a table, where it is regular and small enough; else rows need guides."""

    def __init__(self, backend: LLGuidanceBackend, source: str, check: Callable[[str], Any], hints: Sequence[bytes] = (),
                 is_json: bool = True, scanner: Callable[[], Scanner] | None = None, notes: Sequence[tuple[str, str]] = (),
                 vocabulary: GrammarVocabulary | None = None, opening: bytes = b"",
                 automaton: TokenAutomaton | None = None, limits: LLParserLimits | None = None) -> None:
        vocabulary, limits = vocabulary or backend.vocabulary, limits or backend.limits
        self.notes, self._scanner, self.automaton = notes, scanner, automaton
        self._matcher = _matcher(vocabulary.tokenizer, source, limits)
        by_bytes = _matcher(byte_tokenizer(), source, limits)
        super().__init__(vocabulary, Closer(by_bytes, vocabulary.tokenize, check, hints, is_json, scanner, opening), check)

    def start(self) -> LLGuide:
        if self._scanner is None:
            return LLGuide(self._matcher.deep_copy())
        return DistinctGuide(self._matcher.deep_copy(), self._scanner(), self.vocabulary)


class LooseGrammar(LLGrammar):
    """A grammar that is only near to its schema: what comes out of it must be checked. Where no valid output is known, `minimal`
    is empty and `close` may give back what it was given."""

    def _shortest(self) -> list[int]:
        minimal = self._closer.minimal()
        return [] if minimal is None else self.vocabulary.tokenize(minimal)

    def close(self, tokens: Sequence[int], budget: int) -> np.ndarray:
        closed = super().close(tokens, max(budget, self.min_tokens))
        return closed if 0 < len(closed) <= budget else np.asarray(tokens[:budget], dtype=np.int32)


class LLGuidanceBackend:
    """Compiles for one tokenizer. Thread-safe.

    vocab_size: columns of the logits, padding included; padded columns are never allowed.
    whitespace: "dumps" (`{"a": 1, "b": 2}`), "compact" or "flexible".
    extra_keys: whether objects that list properties, and say nothing of others, may get others; see lower().
    """

    name = "llguidance"

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocab_size: int, eos_token_ids: Sequence[int],
                 whitespace: str = "dumps", extra_keys: ExtraKeys = "auto", limits: LLParserLimits | None = None,
                 threads: int | None = None) -> None:
        if whitespace not in WHITESPACE:
            raise ValueError(f"guided whitespace must be one of {', '.join(WHITESPACE)}, not {whitespace!r}")
        self.vocab_size = vocab_size
        self.limits = limits or default_limits()
        # Nothing but this bounds how long a text a regex may force at once; patterns of schemas the validator bounds as well.
        self.regex_limits = limits or default_limits(2_000_000)
        self._extra_keys = extra_keys
        self.whitespace = whitespace
        self.vocabulary = GrammarVocabulary(tokenizer, vocab_size, eos_token_ids)
        self._added = dict(tokenizer.get_added_vocab())
        self._with_markers: dict[tuple[str, ...], MarkedVocabulary] = {}
        self._lock = threading.Lock()
        self._end = [t for t in eos_token_ids if t < vocab_size]
        self._executor = LLExecutor(threads)
        self._automata_left, self._bytes_left = MAX_AUTOMATA, MAX_AUTOMATA_BYTES
        # The mask llguidance writes: as wide as the larger of its vocabulary and the logits.
        self._words = (self.vocabulary.size + 31) // 32

    @cached_property
    def _texts(self) -> Vocabulary:
        return Vocabulary(self.vocabulary.token_bytes[: self.vocab_size])

    def compile_schema(self, schema: str | dict[str, Any] | bool) -> LLGrammar:
        original = parse_schema(schema) if isinstance(schema, str) else schema
        lowered = lower(original, self._extra_keys)
        validator = validator_of(original)
        source = LLMatcher.grammar_from_json_schema(json.dumps(lowered.schema), overrides=WHITESPACE[self.whitespace])
        scanner = None if lowered.distinct is None else partial(Scanner, lowered.distinct)
        return LLGrammar(self, source, validator.check, schema_hints(lowered.schema), scanner=scanner, notes=lowered.notes,
                         automaton=self._automaton(lambda: self._regular(lowered)))

    def compile_loose(self, schema: str | dict[str, Any] | bool) -> LooseGrammar:
        """The keywords that the engine knows, the others left out; any JSON where even that cannot be."""
        original = parse_schema(schema) if isinstance(schema, str) else schema
        document = Document(original)
        document.check_work()                            # the outputs are checked against all of it
        check = validator_of(original).check
        loosest: dict[str, Any] = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
        near = original if isinstance(original, dict) and not overflow(original) and document.is_shallow() else loosest
        options: JsonCompileOptions = {**WHITESPACE[self.whitespace], "lenient": True}
        for candidate in (near, loosest):
            source = LLMatcher.grammar_from_json_schema(json.dumps(candidate), overrides=options)
            try:
                return LooseGrammar(self, source, check, schema_hints(candidate))
            except SchemaError as error:
                reason = error
        raise reason

    def compile_regex(self, pattern: str) -> LLGrammar:
        source = LLMatcher.grammar_from_regex(pattern)
        start = _matcher(byte_tokenizer(), source, self.regex_limits)

        def check(text: str) -> str:
            matcher, data = start.deep_copy(), list(text.encode())
            if matcher.try_consume_tokens(data) < len(data) or not matcher.is_accepting():
                raise ValueError(f"{text!r} does not match {pattern!r}")
            return text

        return LLGrammar(self, source, check, [(example(pattern) or "").encode()], is_json=False, limits=self.regex_limits)

    def compile_choice(self, choices: Sequence[str]) -> LLGrammar:
        check = choice_check(choices)
        options = list(dict.fromkeys(choices))
        lark = "start: " + " | ".join(json.dumps(c, ensure_ascii=False) for c in options)
        return LLGrammar(self, LLMatcher.grammar_from_lark(lark), check, is_json=False,
                         automaton=self._automaton(lambda: choice_dfa(options, MAX_STATES)))

    def _regular(self, lowered: Lowered) -> ByteDfa:
        style = WHITESPACE[self.whitespace]
        comma, colon = style.get("item_separator"), style.get("key_separator")
        if lowered.distinct is not None or comma is None or colon is None:      # no separators: white space as the model likes
            raise NotRegular
        return schema_dfa(lowered.schema, comma, colon, MAX_STATES)

    def _automaton(self, build: Callable[[], ByteDfa]) -> TokenAutomaton | None:
        """None where guides are to serve: the language is not regular, its tables are too large, or many have some already."""
        if self._automata_left <= 0 or self._bytes_left <= 0:    # first: building is half of the time to compile
            return None
        try:
            dfa = build()
            with self._lock:
                self._automata_left -= 1
            automaton = token_automaton(dfa, self._texts, self.vocabulary.tokenize, self._end, self.vocab_size)
        except (NotRegular, TooLarge):
            return None
        if automaton is not None:
            with self._lock:
                self._bytes_left -= automaton.nbytes
        return automaton

    def compile_tools(self, form: str, tools: Sequence[Tool], choice: str) -> LLGrammar:
        """Outputs that call tools (read_tools) as `choice` (read_choice, but "none") has it, in a format of tool_formats."""
        family, callable_tools = FORMATS[form], allowed(tools, choice)
        check = ToolCheck(form, tools, choice).check
        rules: list[str] = []
        hints: list[bytes] = []
        notes: list[tuple[str, str]] = []
        distinct: list[Unique] = []
        for tool in callable_tools:
            try:
                lowered = lower(tool.parameters, self._extra_keys)
            except SchemaError as error:
                raise SchemaError(error.pointer, f"the parameters of {tool.name}: {error.reason}") from None
            schema = json.dumps({**lowered.schema, "x-guidance": WHITESPACE[self.whitespace]})
            rules.append(f'{json.dumps(family.head(tool.name), ensure_ascii=False)} %json {schema} "}}"')
            hints += schema_hints(lowered.schema)
            notes += lowered.notes
            if lowered.distinct is not None:
                distinct.append(lowered.distinct)
        opening = family.trigger.encode()
        free = choice == "auto"
        source = LLMatcher.grammar_from_lark(family.lark(rules, free, many=choice in ("auto", "required")))
        scanner = partial(CallScanner, either(distinct), opening, family.anywhere) if distinct else None
        return LLGrammar(self, source, check, hints, scanner=scanner, notes=notes, vocabulary=self._marked(family.markers),
                         opening=opening if free and family.anywhere else b"")

    def _marked(self, markers: tuple[str, ...]) -> GrammarVocabulary:
        """The vocabulary in which those of `markers` that are tokens are text. Made when it is first asked for."""
        tokens = {text: self._added[text] for text in markers if self._added.get(text, self.vocab_size) < self.vocab_size}
        if not tokens:
            return self.vocabulary
        with self._lock:
            if markers not in self._with_markers:
                self._with_markers[markers] = MarkedVocabulary(self.vocabulary, tokens, self._end)
            return self._with_markers[markers]

    def fill(self, guides: Sequence[LLGuide], mask: np.ndarray) -> None:
        words = (self.vocab_size + 31) // 32
        if mask.dtype != np.int32 or mask.ndim != 2 or mask.shape[0] < len(guides) or mask.shape[1] != words \
                or not mask.flags.c_contiguous:
            raise ValueError(f"mask must be contiguous int32 [>= {len(guides)}, {words}], not {mask.dtype} {list(mask.shape)}")
        out = mask if words == self._words else np.empty((len(guides), self._words), dtype=np.int32)
        self._executor.unsafe_compute_mask_ptr([(guide.matcher, i) for i, guide in enumerate(guides)], out.ctypes.data,
                                               4 * self._words, len(guides))
        if out is not mask:
            mask[: len(guides)] = out[:, :words]
            if tail := self.vocab_size % 32:
                mask[: len(guides), -1] &= (1 << tail) - 1
        for row, guide in zip(mask, guides, strict=False):
            if isinstance(guide, DistinctGuide):
                guide.restrict(row, self._end)


def _matcher(tokenizer: LLTokenizer, source: str, limits: LLParserLimits) -> LLMatcher:
    matcher = LLMatcher(tokenizer, source, log_level=0, limits=limits)
    if matcher.is_error():
        raise SchemaError("", " ".join(matcher.get_error().split()))
    return matcher
