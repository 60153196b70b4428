"""What users give as a guide."""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass
from typing import Any, Literal

import pydantic
import pytest
from outlines.types import JsonSchema, Regex

from engine.guided.front import GuideSpec
from engine.guided.grammar import SchemaError


class Review(pydantic.BaseModel):
    label: Literal["good", "bad"]
    score: float = pydantic.Field(ge=0, le=1)


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Point:
    x: int
    y: int


SCHEMA: dict[str, Any] = {"type": "object", "properties": {"b": {}, "a": {}}}


@pytest.mark.parametrize("source", [SCHEMA, json.dumps(SCHEMA), json.dumps(SCHEMA, indent=4), JsonSchema(SCHEMA)])
def test_schemas_that_are_equal(source: Any) -> None:
    assert GuideSpec.of(source) == GuideSpec.schema(SCHEMA)
    assert list(json.loads(GuideSpec.of(source).text)["properties"]) == ["b", "a"]


@pytest.mark.parametrize(
    "source, properties",
    [
        (Review, ["label", "score"]),
        (Point, ["x", "y"]),
        ("decimal:DecimalTuple", None),
        ("guided_models:Review", ["label", "score"]),
        ("guided_models:Nested.Inner", ["a"]),
    ],
)
def test_python_types(source: Any, properties: list[str] | None, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "guided_models.py").write_text(
        "import pydantic\nclass Review(pydantic.BaseModel):\n    label: str\n    score: int\n"
        "class Nested:\n    class Inner(pydantic.BaseModel):\n        a: int\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    if properties is None:
        with pytest.raises(SchemaError, match="cannot make a guide"):
            GuideSpec.of(source)
        return
    spec = GuideSpec.of(source)
    assert spec.kind == "schema" and list(json.loads(spec.text)["properties"]) == properties


@pytest.mark.parametrize("source", [["red", "blue"], ("red", "blue"), ["red", "blue", "red"], Literal["red", "blue"]])
def test_choices(source: Any) -> None:
    assert GuideSpec.of(source) == GuideSpec.choice(["red", "blue"])


def test_enums_and_regexes() -> None:
    colours = GuideSpec.of(Colour)
    assert colours.kind == "choice" and set(json.loads(colours.text)) == {"red", "blue"}
    assert GuideSpec.of(Regex(r"\d+")) == GuideSpec.regex(r"\d+")
    assert GuideSpec.of(Literal["a", 1]).kind == "regex"


@pytest.mark.parametrize(
    "source, reason",
    [
        ("", "neither JSON nor an import path"),
        ("{", "neither JSON"),
        ("[1]", "object or a boolean"),
        ('"text"', "object or a boolean"),
        (None, "no schema"),
        ([], "one or more strings"),
        (["a", 1], "one or more strings"),
        ([""], "one or more strings"),
        ("no_such_module:X", "cannot import"),
        ("json:nothing", "cannot import"),
        ({"a": object()}, "not JSON"),
        ({"enum": [float("nan")]}, "not JSON"),
        ({"enum": ["\ud800"]}, "not JSON"),
        (["\ud800"], "not JSON"),
    ],
)
def test_what_is_no_guide(source: Any, reason: str) -> None:
    with pytest.raises(SchemaError, match=reason):
        GuideSpec.of(source)


def test_data_names_types_and_nothing_else(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "named_types.py").write_text(
        "import enum, os, typing\nclass Team(enum.Enum):\n    A = 'a'\n    B = 'b'\n"
        "class Plain:\n    class Inner: pass\n"
        "Size = typing.Literal['s', 'm']\nkey = 'secret'\nkeys = ['secret']\n_Size = Size\ndef find() -> None: ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert GuideSpec.of_named_type("named_types:Team").kind == "choice"
    assert GuideSpec.of_named_type("named_types:Size") == GuideSpec.choice(["s", "m"])
    reasons = {"one plain name": ["os.environ", "Team.A", "_Size", "__builtins__"], "not a type": ["os", "key", "keys", "find"],
               "cannot import": ["Absent"]}
    for reason, names in reasons.items():
        for name in names:
            with pytest.raises(SchemaError, match=reason) as caught:
                GuideSpec.of_named_type(f"named_types:{name}")
            assert "secret" not in str(caught.value)


def test_an_error_does_not_show_what_a_name_stands_for() -> None:
    with pytest.raises(SchemaError, match="cannot make a guide of os:environ: ") as caught:
        GuideSpec.of("os:environ")
    assert "PATH" not in str(caught.value)


@pytest.mark.parametrize("source", [True, False, "true", {}])
def test_the_smallest_schemas(source: Any) -> None:
    assert GuideSpec.of(source).kind == "schema"
