"""Whole jobs on a tiny random model: whatever rows ask for, each is served or refused with a reason, and the job goes on."""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from models import tiny_checkpoint, tiny_tokenizer
from tokenizers import decoders

from engine import automata
from engine.guided import llg
from engine.guided.llg import LLGrammar
from engine.guided.pool import GrammarPool
from pipeline.run import main

TEMPLATES = {
    "hermes": "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}",
    "mistral": "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if tools %}{{ tools | tojson }}[TOOL_CALLS]{% endif %}",
    "llama3": "<|python_tag|>{% for m in messages %}{{ m.content }}\n{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}",
}
TOOLS = [
    {"type": "function", "function": {"name": "look_up", "parameters": {
        "type": "object", "properties": {"id": {"type": "integer", "minimum": 1, "maximum": 99}, "deep": {"type": "boolean"}},
        "required": ["id"], "additionalProperties": False}}},
    {"type": "function", "function": {"name": "write", "parameters": {
        "type": "object", "properties": {"text": {"type": "string", "maxLength": 12}}, "required": ["text"]}}},
]  # fmt: skip
PARAMETERS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}

NODE = {"type": "object", "properties": {"v": {"enum": ["🙂", "中文"]}, "next": {"$ref": "#/$defs/n"}}, "required": ["v"]}
DEFS = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"$ref": f"#/$defs/d{i + 1}"}]} for i in range(40)}
# name -> (schema, the status that rows with it get)
ADVERSARIAL: dict[str, tuple[Any, str]] = {
    "explodes": ({"$defs": {**DEFS, "d40": {"type": "string"}}, "$ref": "#/$defs/d0"}, "schema_error"),
    "catastrophic regex": ({"type": "string", "pattern": "^(a+)+$", "maxLength": 40}, "ok"),
    "catastrophic alternation": ({"type": "string", "pattern": "^(a|a|aa)*b?$", "minLength": 20, "maxLength": 40}, "ok"),
    "too many states": ({"type": "string", "pattern": "^((a{1,100}){1,100}){1,100}$"}, "schema_error"),
    "emoji and CJK": ({"enum": ["😀👩‍👩‍👧", "非常好", "한국어", "a"]}, "ok"),
    "2,000 tokens at least": ({"type": "string", "minLength": 2000}, "schema_error"),
    "recursive": ({"$defs": {"n": NODE}, "$ref": "#/$defs/n"}, "ok"),
    "draft-07 with definitions": ({
        "$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"p": {"minimum": 3}}, "type": "object",
        "properties": {"a": {"type": "integer", "allOf": [{"$ref": "#/definitions/p"}]}}, "required": ["a"],
        "dependencies": {"a": ["b"]}}, "ok"),
    "look-behind": ({"type": "string", "pattern": "(?<=a)b"}, "schema_error"),
    "numbers beyond a double": ({"type": "array", "items": {"type": "number"}, "minItems": 8}, "ok"),
    "no schema": ({"type": "objekt"}, "schema_error"),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("guided"), max_position_embeddings=2048)


Job = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def job(model: Path, tmp_path: Path) -> Job:
    """`job(columns, "key=value", ...)`: the rows that a run writes."""

    def run(columns: dict[str, Any], *words: str, row_group_size: int | None = None) -> list[dict[str, Any]]:
        data, out = tmp_path / "in.parquet", tmp_path / "out"
        pq.write_table(pa.table(columns), data, row_group_size=row_group_size)
        code = main([f"data={data}", f"model={model}", f"output.dir={out}", "engine.max_model_len=2048", "engine.cpu_kv_gib=0.1",
                     "sampling.temperature=1", "limits.max_error_rate=1", *words])
        assert code == 0
        return pa.concat_tables(pq.read_table(part) for part in sorted(out.glob("part-*.parquet"))).to_pylist()

    return run


def test_adversarial_schemas_beside_many_others(job: Job) -> None:
    many = [{"type": "object", "properties": {f"k{i}": {"enum": [i, f"v{i}"]}}, "required": [f"k{i}"]} for i in range(60)]
    schemas = [*many, *(schema for schema, _ in ADVERSARIAL.values())]
    rows = job({"prompt": ["x"] * len(schemas), "schema": [json.dumps(schema) for schema in schemas]}, "sampling.max_tokens=100")
    expected = ["ok"] * len(many) + [status for _, status in ADVERSARIAL.values()]
    assert [row["status"] for row in rows] == expected, [row["error"] for row in rows if row["error"]]
    for row, schema in zip(rows, schemas, strict=True):
        assert (row["json"] is not None) == (row["status"] == "ok") and (row["error"] is None) == (row["status"] == "ok")
        if row["status"] == "ok":
            dialect = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
            assert dialect(schema).is_valid(json.loads(row["json"]))
            assert row["completion_tokens"] <= 100


def test_a_schema_that_takes_too_long_is_refused_and_the_job_goes_on(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    released, over, compile_schema = threading.Event(), threading.Event(), llg.LLGuidanceBackend.compile_schema

    def slowly(self: llg.LLGuidanceBackend, schema: Any) -> LLGrammar:
        if "slow" not in schema["title"]:
            return compile_schema(self, schema)
        released.wait(120)
        try:
            return compile_schema(self, schema)
        finally:
            over.set()

    monkeypatch.setattr(llg.LLGuidanceBackend, "compile_schema", slowly)
    schemas = [{"title": "slow" if i == 1 else f"quick {i}", "enum": ["a", "b"]} for i in range(4)]
    try:
        rows = job({"prompt": ["x"] * 4, "schema": [json.dumps(s) for s in schemas]}, "guided.compile_seconds=3")
        assert not released.is_set()
    finally:
        released.set()
        assert over.wait(60)      # in its thread, which the next test is not to meet
    assert [row["status"] for row in rows] == ["ok", "schema_error", "ok", "ok"]
    assert "compiling took longer than 3 s" in rows[1]["error"]


def test_every_row_brings_its_own_schema(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grammars live as long as their rows are at hand, and the tables of automata stay within their bound."""
    alive: weakref.WeakSet[LLGrammar] = weakref.WeakSet()
    made, most, tables, counting = 0, 0, [], threading.Lock()      # the pool compiles in several threads
    grammar_init, automata_init = LLGrammar.__init__, automata.Automata.__init__

    def count_grammar(self: LLGrammar, *args: Any, **kwargs: Any) -> None:
        nonlocal made, most
        grammar_init(self, *args, **kwargs)
        with counting:
            alive.add(self)
            made, most = made + 1, max(most, len(alive))

    def see_automata(self: automata.Automata, *args: Any) -> None:
        automata_init(self, *args)
        tables.append(self)

    monkeypatch.setattr(LLGrammar, "__init__", count_grammar)
    monkeypatch.setattr(automata.Automata, "__init__", see_automata)
    monkeypatch.setattr(automata, "MAX_BYTES", 1 << 19)
    monkeypatch.setattr(llg, "MAX_AUTOMATA", 64)
    monkeypatch.setattr("pipeline.input.schemas._KEPT", 16)
    monkeypatch.setattr(GrammarPool, "__init__", partialmethod(GrammarPool.__init__, max_grammars=16))
    rows = 400
    schemas = [
        {"type": "object", "required": [f"l{i}", "n"], "properties": {
            f"l{i}": {"enum": [f"a{i}", f"b{i}", "other"]}, "n": {"type": "integer", "minimum": i, "maximum": 2 * i + 9}}}
        for i in range(rows)
    ]  # fmt: skip
    out = job({"prompt": [f"p{i}" for i in range(rows)], "schema": [json.dumps(s) for s in schemas]}, "engine.window=16",
              "sampling.max_tokens=60", row_group_size=20)  # fmt: skip
    assert [row["status"] for row in out] == ["ok"] * rows
    for row, schema in zip(out, schemas, strict=True):
        assert jsonschema.Draft202012Validator(schema).is_valid(json.loads(row["json"]))
    (table,) = tables
    assert 0 < len(table._placed) < 64
    assert sum(c.device.nbytes for c in vars(table).values() if isinstance(c, automata._Column)) <= 1 << 19
    # Alive: the engine's window and those on their way to it, the rows that run, and what is kept for later rows.
    assert made == rows and most < 3 / 4 * rows, most


@pytest.mark.parametrize("form", TEMPLATES)
def test_calls_are_valid_whatever_the_model_says(job: Job, form: str) -> None:
    choices = ["required", "look_up", "write", "auto", "none"] * 2
    limits = [json.dumps({"max_tokens": 80 + 3 * i}) for i in range(len(choices))]
    rows = job({"prompt": [f"p{i}" for i in range(len(choices))], "tool_choice": choices, "sampling": limits,
                "tools": [json.dumps(TOOLS)] * len(choices)}, f"model.chat_template={TEMPLATES[form]!r}")
    for row, choice in zip(rows, choices, strict=True):
        calls = json.loads(row["tool_calls"] or "[]")
        for call in calls:
            assert jsonschema.Draft202012Validator(PARAMETERS[call["name"]]).is_valid(call["arguments"])
        if choice in ("auto", "none"):
            assert row["status"] in ("ok", "length"), row["error"]
        else:
            assert row["status"] == "ok" and calls, row["error"]
            assert choice == "required" or [call["name"] for call in calls] == [choice]
        assert choice != "none" or not calls


def test_regexes_and_choices(job: Job) -> None:
    rows = job({"prompt": ["x"] * 6, "guided_regex": ["[a-c]{3}-[0-9]+", None, None, "([", "((a|aa)+)+!", "((x{1,99}){99}){99}"],
                "guided_choice": [None, ["ja", "nein"], None, None, None, None],
                "guided_json": [None, None, '{"type": "boolean"}', None, None, None]}, "sampling.max_tokens=20")  # fmt: skip
    assert [row["status"] for row in rows] == ["ok", "ok", "ok", "schema_error", "ok", "schema_error"]
    assert rows[4]["text"].strip("a") == "!"
    assert rows[0]["text"][:3].strip("abc") == "" and rows[0]["text"][3] == "-" and rows[0]["text"][4:].isdigit()
    assert rows[1]["text"] in ("ja", "nein")
    assert rows[2]["json"] in ("true", "false")


def test_a_space_at_the_start_of_a_choice_is_kept(job: Job, tmp_path: Path) -> None:
    """Tokenizers in the manner of sentencepiece leave one out of what they decode."""
    tokenizer = tiny_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    assert backend.decode(backend.encode("  c").ids) == " c"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = job({"prompt": ["x"] * 3, "guided_regex": [None, None, " [ab]"], "guided_choice": [[" c"], ["  c", "  d"], None]},
               f"model.tokenizer={tmp_path}/tokenizer", "sampling.max_tokens=9")
    assert [row["status"] for row in rows] == ["ok"] * 3
    assert rows[0]["text"] == " c" and rows[1]["text"] in ("  c", "  d") and rows[2]["text"] in (" a", " b")


def test_a_schema_that_is_refused_may_be_tried(job: Job) -> None:
    schema = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 3, "contains": {"const": 1},
              "maxContains": 1, "allOf": [{"contains": {"const": 2}, "maxContains": 1, "minContains": 0}]}  # fmt: skip
    columns = {"prompt": [f"p{i}" for i in range(8)], "schema": [json.dumps(schema)] * 8}
    rows = job(columns, "sampling.max_tokens=40", "guided.on_unsupported=best_effort", "guided.retries=8")
    statuses = {row["status"] for row in rows}
    assert "ok" in statuses and statuses <= {"ok", "schema_error"}
    for row in rows:
        assert (row["json"] is not None) == (row["status"] == "ok")
        if row["json"] is not None:
            assert jsonschema.Draft202012Validator(schema).is_valid(json.loads(row["json"]))
