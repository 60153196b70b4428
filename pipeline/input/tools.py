"""Tools of a task and of rows: which the chat template shows, and what the output is held to because of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.guided.front import GuideSpec
from engine.guided.grammar import SchemaError
from engine.guided.tool_formats import FORMATS, format_of
from engine.guided.tools import read_choice, read_tools
from pipeline.config import TaskKeys
from pipeline.exits import ConfigError
from pipeline.input.form import Refused, json_value
from pipeline.output.rows import Status


@dataclass(frozen=True, slots=True)
class ToolUse:
    """shown: tools for the chat template, as they were given. spec: what the output must match; None: no tool may be called."""

    shown: list[dict[str, Any]] | None = None
    spec: GuideSpec | None = None


NO_TOOLS = ToolUse()


class ToolReader:
    """Reads the tools of rows for one chat template (None: prompts are plain text). `task`: for rows that have none of their own.

    form: a name of tool_formats.FORMATS, or "auto": told from the template. Raises ConfigError where the task's tools cannot be.
    """

    def __init__(self, chat_template: str | None, form: str, task: TaskKeys) -> None:
        self._takes_tools = "tools" in (chat_template or "")
        self._form = format_of(chat_template or "") if form == "auto" else form
        self._tools, self._choice = task.tools, task.tool_choice
        try:
            self.task = self._use(task.tools, task.tool_choice)
        except SchemaError as error:
            raise ConfigError(f"task.{error}") from None
        except Refused as refused:
            raise ConfigError(f"task.tools: {refused}") from None
        if self.task.spec is not None and task.guides():
            raise ConfigError(f"task.tools and task.{task.guides()[0]}: give one of them, or task.tool_choice=none")

    def check_columns(self) -> None:
        """The input has a column of tools. Raises ConfigError where no row's calls could be read."""
        if self._takes_tools and self._form is None:
            raise ConfigError("model.tool_format: how the model writes tool calls cannot be told from its chat template; set one "
                              f"of {', '.join(FORMATS)}, or input.columns.tools=null to leave the column alone")

    def of_row(self, row: Mapping[str, Any]) -> ToolUse | None:
        """What the row's `tools` and `tool_choice` come to; None: it says nothing of tools. Raises Refused."""
        tools, choice = row.get("tools"), row.get("tool_choice")
        if tools is None and choice is None:
            return None
        if isinstance(choice, str) and choice.lstrip().startswith("{"):
            choice = json_value(choice, "tool_choice", Status.SCHEMA_ERROR)
        tools = self._tools if tools is None else json_value(tools, "tools", Status.SCHEMA_ERROR)
        try:
            return self._use(tools, self._choice if choice is None else choice)
        except SchemaError as error:
            raise Refused(Status.SCHEMA_ERROR, str(error)) from None

    def _use(self, value: Any, choice: Any) -> ToolUse:
        """Raises SchemaError, its pointer with the key before it, or Refused."""
        if value is None and choice in (None, "none", "auto"):
            return NO_TOOLS
        try:
            tools = read_tools([] if value is None else value)
        except SchemaError as error:
            raise SchemaError(f"tools{error.pointer}", error.reason) from None
        try:
            choice = read_choice(choice, tools)
        except SchemaError as error:
            raise SchemaError("tool_choice", error.reason) from None
        if choice == "none":
            return NO_TOOLS                              # a model that does not see them does not call them
        if not self._takes_tools:
            raise Refused(Status.TEMPLATE_ERROR, "the model's chat template takes no tools")
        if self._form is None:
            raise Refused(Status.TEMPLATE_ERROR, "how the model writes tool calls cannot be told from its chat template; set "
                          f"model.tool_format={'|'.join(FORMATS)}")
        return ToolUse(value, GuideSpec.tools(self._form, tools, choice))
