"""Tools as rows and tasks give them: read, checked, brought to one form; and the check of what the model wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.guided.grammar import SchemaError
from engine.guided.tool_formats import FORMATS, json_call, unwrapped
from engine.guided.validate import Validator, parse_strict

CHOICES = ("none", "auto", "required")
_NAME = re.compile(r"[\w.:-]{1,128}")


@dataclass(frozen=True, slots=True)
class Tool:
    """parameters: the JSON Schema of its arguments, an object's."""

    name: str
    parameters: dict[str, Any]


def read_tools(value: Any) -> list[Tool]:
    """From the list of the chat completions API, `{"type": "function", "function": {...}}`, or bare `{"name", "parameters"}`.

    Raises SchemaError, whose pointer is into `value`.
    """
    if not isinstance(value, list) or not value or not all(isinstance(tool, dict) for tool in value):
        raise SchemaError("", "tools must be a list of one or more objects")
    tools: dict[str, Tool] = {}
    for i, item in enumerate(value):
        where, function = f"/{i}", item
        if "function" in item or (item.get("type") == "function" and "name" not in item):
            where, function = f"/{i}/function", item.get("function")
        if not isinstance(function, dict):
            raise SchemaError(where, "a tool needs an object `function` with a name")
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise SchemaError(f"{where}/name", "a tool's name is 1 to 128 letters, digits, _ . : -")
        if name in tools:
            raise SchemaError(f"{where}/name", f"two tools are called {name}")
        tools[name] = Tool(name, _object_schema(parameters, f"{where}/parameters"))
    return list(tools.values())


def _object_schema(parameters: Any, where: str) -> dict[str, Any]:
    if parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(parameters, dict):
        raise SchemaError(where, "a tool's parameters are a JSON Schema object")
    kinds = parameters.get("type", "object")
    if kinds != "object" and not (isinstance(kinds, list) and "object" in kinds):
        raise SchemaError(f"{where}/type", "a tool's parameters must be of type object")
    return {**parameters, "type": "object"}


def read_choice(value: Any, tools: Sequence[Tool]) -> str:
    """"none", "auto", "required", or the name of a tool with a colon before it. Raises SchemaError.

    `value`: one of these words, the name of a tool, or `{"type": "function", "function": {"name": ...}}`; None: auto.
    """
    if value is None:
        return "auto"
    if isinstance(value, Mapping):
        function = value.get("function", value)
        value = function.get("name") if isinstance(function, Mapping) else None
    elif value in CHOICES:
        return value
    if value not in [tool.name for tool in tools]:
        names = ", ".join(tool.name for tool in tools)
        raise SchemaError("", f"tool_choice must be one of {', '.join(CHOICES)}, or a tool: {names}; it is {value!r}")
    return f":{value}"


def allowed(tools: Sequence[Tool], choice: str) -> list[Tool]:
    """Those that may be called."""
    return [tool for tool in tools if choice in ("auto", "required", f":{tool.name}")]


class ToolCheck:
    """The final check of an output that may call tools. It shares no code with the grammar. Safe to share between threads."""

    def __init__(self, form: str, tools: Sequence[Tool], choice: str) -> None:
        """Raises SchemaError for parameters that are no JSON Schema."""
        self._format, self._free, self._one = FORMATS[form], choice == "auto", choice.startswith(":")
        self._validators: dict[str, Validator] = {}
        for tool in allowed(tools, choice):
            try:
                self._validators[tool.name] = Validator(tool.parameters)
            except ValueError as error:
                raise SchemaError("", f"the parameters of {tool.name}: {' '.join(str(error).split())}") from None

    def check(self, text: str) -> list[dict[str, Any]]:
        """The calls, `{"name", "arguments"}` each; none: the output is plain text. Raises ValueError with one line."""
        before, texts = self._format.split(text)
        if not texts:
            if self._free:
                return self._lone_call(text)
            raise ValueError("no tool is called")
        if before.strip() and not self._free:
            raise ValueError("text stands before the tool call")
        if len(texts) > 1 and self._one:
            raise ValueError("more than one tool is called")
        return [self._call(call) for call in texts]

    def _lone_call(self, text: str) -> list[dict[str, Any]]:
        """The call that all of a free text is, but for how the family writes calls; anything less than a valid call is text."""
        call = unwrapped(text)
        if not call.startswith("{"):
            return []
        try:
            return [self._call(call)]
        except ValueError:
            return []

    def _call(self, text: str) -> dict[str, Any]:
        parse_strict(text)
        name, arguments = json_call(text, self._format)
        validator = self._validators.get(name) if isinstance(name, str) else None
        if validator is None:
            raise ValueError(f"{name!r} is none of the tools that may be called: {', '.join(self._validators)}")
        try:
            validator.check(json.dumps(arguments))
        except ValueError as error:
            raise ValueError(f"arguments of {name}: {error}") from None
        return {"name": name, "arguments": arguments}
