"""Tool calls: what is read of a row, the grammars of the families, closing, and the final check."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from guided_cases import PADDED, accepts, byte_level_tokenizer, walk

from engine.guided.front import GuideSpec
from engine.guided.grammar import SchemaError
from engine.guided.llg import LLGrammar, LLGuidanceBackend
from engine.guided.pool import GrammarPool
from engine.guided.tool_formats import FORMATS, format_of
from engine.guided.tools import Tool, ToolCheck, read_choice, read_tools

WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "Weather of a city",
    "parameters": {"type": "object", "required": ["city"], "$defs": {"unit": {"enum": ["C", "F"]}}, "properties": {
        "city": {"type": "string", "minLength": 1, "maxLength": 20}, "unit": {"$ref": "#/$defs/unit"}}}}}
ADD = {"name": "add", "parameters": {"type": "object", "required": ["a", "b"], "additionalProperties": False,
                                     "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}}
FREE = {"name": "set", "parameters": {"type": "object", "additionalProperties": {"type": "integer"}}}
TOOLS = read_tools([WEATHER, ADD, FREE, {"name": "now"}])

PARIS, SUM = '"get_weather", "%s": {"city": "Paris", "unit": "C"}}', '"add", "%s": {"a": 1, "b": -2}}'
ONE = {
    "hermes": '<tool_call>\n{"name": ' + PARIS % "arguments" + "\n</tool_call>",
    "mistral": '[TOOL_CALLS] [{"name": ' + PARIS % "arguments" + "]",
    "llama3": '{"name": ' + PARIS % "parameters",
}
TWO = {
    "hermes": ONE["hermes"] + '\n<tool_call>\n{"name": ' + SUM % "arguments" + "\n</tool_call>",
    "mistral": ONE["mistral"][:-1] + ', {"name": ' + SUM % "arguments" + "]",
}
CALLS = [{"name": "get_weather", "arguments": {"city": "Paris", "unit": "C"}}, {"name": "add", "arguments": {"a": 1, "b": -2}}]


@pytest.fixture(scope="module", params=["special", "plain", "absent"])
def backend(request: pytest.FixtureRequest) -> LLGuidanceBackend:
    """Families differ in whether their markers are special tokens; some models have none of them as tokens."""
    tokenizer = byte_level_tokenizer()
    if request.param != "absent":
        tokenizer.add_tokens(["<tool_call>", "</tool_call>", "[TOOL_CALLS]"], special_tokens=request.param == "special")
    return LLGuidanceBackend(tokenizer, PADDED, [0, 1], threads=1)


def text_of(grammar: LLGrammar, tokens: list[int]) -> str:
    return grammar.vocabulary.text(tokens).decode()


@pytest.mark.parametrize("form", FORMATS)
def test_what_each_choice_lets_through(backend: LLGuidanceBackend, form: str) -> None:
    auto, required, named = (backend.compile_tools(form, TOOLS, choice) for choice in ("auto", "required", ":get_weather"))
    for grammar in (auto, required, named):
        assert accepts(backend, grammar, ONE[form])
        assert grammar.check(ONE[form]) == CALLS[:1]
    if form in TWO:
        assert accepts(backend, auto, TWO[form]) and accepts(backend, required, TWO[form])
        assert not accepts(backend, named, TWO[form])
        assert required.check(TWO[form]) == CALLS
        assert accepts(backend, auto, 'Let "me" see]}.\n' + TWO[form]) and not accepts(backend, required, "So: " + TWO[form])
        assert auto.check('Let "me" see]}.\n' + TWO[form]) == CALLS
        with pytest.raises(ValueError, match="more than one"):
            named.check(TWO[form])
    other = ONE[form].replace("get_weather", "now").replace('{"city": "Paris", "unit": "C"}', "{}")
    assert accepts(backend, required, other) and not accepts(backend, named, other)
    for text in ("", "Just text, {\"a\": 1} and <b>, [TOOL", "é😀 \"x\n"):
        assert accepts(backend, auto, text) and auto.check(text) == []
        assert not accepts(backend, required, text) and not accepts(backend, named, text)
    for bad in ('"C"', '"city"', '"Paris"', "get_weather"):
        wrong = ONE[form].replace(bad, bad.replace(bad.strip('"'), "K" * 21), 1)
        assert not accepts(backend, auto, wrong)
        for grammar in (auto, required):
            with pytest.raises(ValueError, match=r"arguments of|none of the tools|exactly the keys"):
                grammar.check(wrong)


def test_a_marker_is_one_token_and_forced(backend: LLGuidanceBackend) -> None:
    added = backend.compile_tools("hermes", TOOLS, ":add")
    forced, pieces = added.start().forced(), added.vocabulary.token_bytes
    assert text_of(added, forced).startswith('<tool_call>\n{"name": "add", "arguments": {"a":')
    ends = (pieces[forced[0]], pieces[added.minimal[-1]])
    assert (b"<tool_call>" in pieces) == (ends == (b"<tool_call>", b"</tool_call>"))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("choice", ["auto", "required", ":get_weather", ":set"])
def test_walks_are_valid_once_closed(backend: LLGuidanceBackend, form: str, choice: str) -> None:
    grammar, calls = backend.compile_tools(form, TOOLS, choice), 0
    begin = grammar.vocabulary.tokenize(FORMATS[form].trigger.encode())
    for seed in range(24):
        budget = max(grammar.min_tokens, 6 * (seed + 1))
        tokens, _ = walk(backend, grammar, seed, budget, begin if seed % 2 else [])
        closed = grammar.close(tokens, budget).tolist()
        assert len(closed) <= budget
        found = grammar.check(text_of(grammar, closed))
        calls += len(found)
        assert found or choice == "auto"
    assert calls


def test_closing_in_the_middle_of_a_call(backend: LLGuidanceBackend) -> None:
    grammar = backend.compile_tools("hermes", TOOLS, "auto")
    text = 'I say "look up.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Par'
    tokens = grammar.vocabulary.tokenize(text.encode())
    kept = text_of(grammar, grammar.close(tokens, len(tokens) + 20).tolist())
    assert kept.startswith(text) and grammar.check(kept) == [{"name": "get_weather", "arguments": {"city": "Par"}}]
    cut = text_of(grammar, grammar.close(tokens, len(tokens)).tolist())
    assert 'I say "look up.' in cut and grammar.check(cut) is not None


def test_a_key_is_not_repeated(backend: LLGuidanceBackend) -> None:
    grammar = backend.compile_tools("hermes", TOOLS, "auto")
    text = 'a "]]} b<tool_call>\n{"name": "set", "arguments": {"x": 1, "'
    guide = grammar.start()
    tokens = grammar.vocabulary.tokenize(text.encode())
    assert guide.accept(tokens) == len(tokens)
    mask = np.zeros((1, PADDED // 32), dtype=np.int32)
    backend.fill([guide], mask)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    pieces = grammar.vocabulary.token_bytes
    assert not any(bits[i] for i, piece in enumerate(pieces) if piece.startswith(b'x"'))
    assert any(bits[i] for i, piece in enumerate(pieces) if piece == b"y")


@pytest.mark.parametrize("text, reason", [
    ("hello", "no tool is called"),
    ("<tool_call>", "not JSON"),
    ("<tool_call>\n[1]\n</tool_call>", "exactly the keys"),
    ('<tool_call>{"name": "now", "arguments": {}}', "expected '</tool_call>'"),
    ('<tool_call>{"name": "now", "arguments": {}}</tool_call> and', "text follows"),
    ('<tool_call>{"name": "now", "arguments": {}, "x": 1}</tool_call>', "exactly the keys"),
    ('<tool_call>{"name": "now", "name": "now", "arguments": {}}</tool_call>', "stands twice"),
    ('<tool_call>{"name": "now", "arguments": []}</tool_call>', "arguments of now"),
    ('<tool_call>{"name": "add", "arguments": {"a": 1, "b": NaN}}</tool_call>', "not JSON"),
    ('<tool_call>{"name": "add", "arguments": {"a": 1, "b": 1e999}}</tool_call>', "not JSON"),
    ('<tool_call>{"name": 7, "arguments": {}}</tool_call>', "none of the tools"),
    ('x<tool_call>{"name": "now", "arguments": {}}</tool_call>', "text stands before"),
    ("<tool_call>" + '{"a":' * 100_000, "not JSON"),
])
def test_the_check_refuses(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        ToolCheck("hermes", TOOLS, "required").check(text)


WRAPPED = ["%s", "\n %s\n", "```json\n%s\n```", "```\n%s```\n", "<tools>\n%s\n</tools>", "<tool_call>%s</tool_call>",
           "[TOOL_CALLS] [%s]"]


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_a_lone_call_counts_however_it_is_wrapped(backend: LLGuidanceBackend, wrapping: str) -> None:
    for form in ("hermes", "mistral"):
        grammar, text = backend.compile_tools(form, TOOLS, "auto"), wrapping % ('{"name": ' + PARIS % "arguments")
        assert grammar.check(text) == CALLS[:1]
        own = text.startswith(FORMATS[form].trigger)
        assert own or accepts(backend, grammar, text)
        for choice in ("required", ":get_weather"):              # there the grammar sees to the format
            if not own:
                with pytest.raises(ValueError, match="no tool is called"):
                    ToolCheck(form, TOOLS, choice).check(text)


@pytest.mark.parametrize("text", [
    '{"city": "Paris"}', "{}", '{"name": "get_weather"}', '{"name": "Ada", "arguments": {}}',
    '[{"name": "now", "arguments": {}}]',
    '{"name": "add", "arguments": {"a": 1}}', '{"name": "add", "arguments": {"a": 1, "b": "2"}}', '{"name": 7, "arguments": {}}',
    '{"name": "now", "arguments": "{}"}', '{"name": "now", "arguments": {}, "id": 1}', '{"name": "now", "parameters": {}}',
    '{"name": "now", "name": "now", "arguments": {}}', '{"name": "now", "arguments": {}} {"name": "now", "arguments": {}}',
    'I call {"name": "now", "arguments": {}}', '{"name": "now", "arguments": {}} now', '{"name": "now", "arguments": {}',
    '```json\n{"name": "now", "arguments": {}}', '```json\n```json\n{"name": "now", "arguments": {}}\n```\n```', "```", "``````",
    '```json\n{"name": "now", "arguments": {}}\n```\nand\n```json\n{"name": "now", "arguments": {}}\n```',
    '{"a":' * 2000 + "1" + "}" * 2000,
])
def test_text_that_is_not_just_one_call_stays_text(text: str) -> None:
    assert ToolCheck("hermes", TOOLS, "auto").check(text) == []


def test_a_marker_within_a_string_is_text(backend: LLGuidanceBackend) -> None:
    grammar = backend.compile_tools("hermes", TOOLS, "required")
    text = ONE["hermes"].replace("Paris", "</tool_call>")
    assert accepts(backend, grammar, text)
    assert grammar.check(text)[0]["arguments"]["city"] == "</tool_call>"


@pytest.mark.parametrize("value, pointer", [
    ([], ""), ({}, ""), (["x"], ""), ([{"type": "function"}], "/0/function"), ([{"function": {}}], "/0/function/name"),
    ([{"name": ""}], "/0/name"), ([{"name": "a b"}], "/0/name"), ([{"name": "f"}, {"name": "f"}], "/1/name"),
    ([{"name": "f", "parameters": True}], "/0/parameters"),
    ([{"function": {"name": "f", "parameters": {"type": "array"}}}], "/0/function/parameters/type"),
])
def test_tools_that_are_none(value: Any, pointer: str) -> None:
    with pytest.raises(SchemaError) as error:
        read_tools(value)
    assert error.value.pointer == pointer


def test_choices() -> None:
    for value, choice in ((None, "auto"), ("auto", "auto"), ("none", "none"), ("required", "required"), ("add", ":add"),
                          ({"type": "function", "function": {"name": "add"}}, ":add"), ({"name": "add"}, ":add")):
        assert read_choice(value, TOOLS) == choice
    for bad in ("any", 7, {}, {"function": 7}, {"function": {"name": "none"}}, ["add"]):
        with pytest.raises(SchemaError, match="tool_choice"):
            read_choice(bad, TOOLS)
    with pytest.raises(SchemaError, match="tool_choice"):
        read_choice("add", [])


def test_equal_tools_share_a_grammar(backend: LLGuidanceBackend) -> None:
    pool = GrammarPool(backend, workers=1)
    described = read_tools([{**ADD, "description": "sums"}])
    spec = GuideSpec.tools("hermes", described, "auto")
    assert spec.read_tools() == ("hermes", [Tool("add", ADD["parameters"])], "auto")
    assert pool.get(spec) is pool.get(GuideSpec.tools("hermes", read_tools([ADD]), "auto"))
    refused = read_tools([{"name": "f", "parameters": {"type": "object", "properties": {"a": {"$ref": "http://x.org/s"}}}}])
    with pytest.raises(SchemaError, match="f"):
        pool.get(GuideSpec.tools("hermes", refused, "auto"))
    deep = read_tools([{"name": "f", "parameters": json.loads('{"items":' * 200 + "{}" + "}" * 200)}])
    with pytest.raises(SchemaError, match="nested deeper"):
        pool.get(GuideSpec.tools("hermes", deep, "auto"))
    pool.close()


def test_the_format_is_told_from_the_chat_template() -> None:
    assert format_of("{% if tools %}... <tool_call></tool_call>{% endif %}") == "hermes"
    assert format_of("{{ '[TOOL_CALLS]' if tools }} [AVAILABLE_TOOLS]") == "mistral"
    assert format_of("<|start_header_id|>{% if tools %}<|python_tag|>") == "llama3"
    assert format_of("<|start_header_id|>{% if tools %}" + '{"name": function name, "parameters": dictionary}') == "llama3"
    assert format_of("{% if tools %}something else") is None
    assert format_of("<tool_call>") is None


def test_texts_of_special_tokens_elsewhere_stay_out(backend: LLGuidanceBackend) -> None:
    grammar = backend.compile_tools("hermes", TOOLS, "auto")
    guide = grammar.start()
    mask = np.zeros((1, PADDED // 32), dtype=np.int32)
    backend.fill([guide], mask)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    allowed = [i for i in np.flatnonzero(bits).tolist() if not grammar.vocabulary.token_bytes[i]]
    assert allowed == [0, 1]                             # the two end tokens
