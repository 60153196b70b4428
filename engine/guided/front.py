"""What a user may give as a guide, and the three kinds it comes down to: JSON Schema, regex, choice."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_origin

from engine.guided.grammar import SchemaError
from engine.guided.tools import Tool, allowed

IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*(\.\w+)*")


@dataclass(frozen=True, slots=True)
class GuideSpec:
    """`text`: canonical JSON of the schema, of the list of choices or of the tools, or the regex. Equal specs share a grammar."""

    kind: Literal["schema", "regex", "choice", "tools", "loose"]
    text: str

    @classmethod
    def regex(cls, pattern: str) -> GuideSpec:
        """All of the output must match `pattern`."""
        if not isinstance(pattern, str) or not pattern:
            raise SchemaError("", "a regex must be a string that is not empty")
        return cls("regex", pattern)

    @classmethod
    def choice(cls, options: list[str] | tuple[str, ...]) -> GuideSpec:
        if not isinstance(options, (list, tuple)) or not options or not all(isinstance(o, str) and o for o in options):
            raise SchemaError("", "a choice must be a list of one or more strings, none of them empty")
        return cls("choice", _text(list(dict.fromkeys(options))))

    @classmethod
    def schema(cls, schema: dict[str, Any] | bool) -> GuideSpec:
        return cls("schema", _text(schema))

    def loosened(self) -> GuideSpec:
        """For a schema that cannot be kept: a grammar that comes near it, and lets outputs through that do not fit."""
        return GuideSpec("loose", self.text)

    @classmethod
    def tools(cls, form: str, tools: Sequence[Tool], choice: str) -> GuideSpec:
        """form: a name of tool_formats.FORMATS; choice: from tools.read_choice, not "none"."""
        called = [[tool.name, tool.parameters] for tool in allowed(tools, choice)]
        return cls("tools", _text({"format": form, "choice": choice, "tools": called}))

    def read_tools(self) -> tuple[str, list[Tool], str]:
        """What `tools` was given."""
        value = json.loads(self.text)
        return value["format"], [Tool(name, parameters) for name, parameters in value["tools"]], value["choice"]

    @classmethod
    def of_named_type(cls, path: str) -> GuideSpec:
        """From "package.module:Name" that is written in data: one name of a class, a type such as a Literal, or an outlines term.
        Values, functions and the modules that a module imports are not for data to reach."""
        from outlines.types.dsl import Term

        name = path.partition(":")[2]
        if "." in name or name.startswith("_"):
            raise SchemaError("", f"{path}: rows name a type by one plain name, module:Name")
        target = _load(path)
        if not isinstance(target, (type, Term)) and get_origin(target) is None:
            raise SchemaError("", f"{path} is not a type")
        return cls._of_type(target, path)

    @classmethod
    def of(cls, source: Any) -> GuideSpec:
        """From a schema (dict, bool or JSON text), a list of choices, "package.module:Name", or a type that outlines knows.

        Names and types may be Pydantic models, dataclasses, TypedDicts, enums, Literals and outlines terms.
        Raises SchemaError where nothing can be made of `source`.
        """
        if isinstance(source, (dict, bool)):
            return cls.schema(source)
        if isinstance(source, (list, tuple)):
            return cls.choice(source)
        if isinstance(source, str) and IMPORT_PATH.fullmatch(source.strip()):
            return cls._of_type(_load(source.strip()), source.strip())
        if isinstance(source, str):
            return cls.schema(parse_schema(source))
        if source is None:
            raise SchemaError("", "no schema given")
        return cls._of_type(source, f"a value of type {type(source).__name__}")

    @classmethod
    def _of_type(cls, source: Any, name: str) -> GuideSpec:
        from outlines.types import JsonSchema
        from outlines.types.dsl import CFG, Alternatives, Regex, String, python_types_to_terms, to_regex

        if isinstance(source, (dict, bool, list, tuple, str)):
            return cls.of(source)
        if hasattr(source, "model_json_schema"):
            return cls.schema(source.model_json_schema())
        try:
            term = python_types_to_terms(source)
        except (TypeError, ValueError, RecursionError):  # their text may hold what the name stands for, not just its type
            raise SchemaError("", f"cannot make a guide of {name}: give a Pydantic model, dataclass, TypedDict, enum, Literal "
                              "or outlines term") from None
        if isinstance(term, JsonSchema):
            return cls.schema(json.loads(term.schema))
        if isinstance(term, Alternatives):
            options = [t.value for t in term.terms if isinstance(t, String)]
            if len(options) == len(term.terms):
                return cls.choice(options)
        if isinstance(term, CFG):
            raise SchemaError("", "context-free grammars are not supported: give a JSON schema, a regex or a list of choices")
        return cls.regex(term.pattern if isinstance(term, Regex) else to_regex(term))


def _text(value: Any) -> str:
    """JSON in a form of its own. Keys keep their order: the order of properties is that of the output."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        text.encode()                                    # no lone surrogates
    except (TypeError, ValueError, RecursionError) as error:
        raise SchemaError("", f"not JSON: {error}") from None
    return text


def parse_schema(text: str) -> dict[str, Any] | bool:
    """Raises SchemaError where `text` holds no JSON object or boolean."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SchemaError("", f"neither JSON nor an import path (package.module:Name): {error}") from None
    if not isinstance(value, (dict, bool)):
        raise SchemaError("", f"a JSON Schema is an object or a boolean, not {type(value).__name__}")
    return value


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    try:
        target: Any = importlib.import_module(module)
        for part in name.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError) as error:
        raise SchemaError("", f"cannot import {path!r}: {error}") from None
    return target
