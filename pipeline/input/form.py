"""Form: which columns a prompt is made of, and how: `messages`, `prompt`, or templates over any others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jinja2
import jinja2.meta
import jinja2.sandbox
import orjson
import pyarrow as pa

from pipeline.config import TaskKeys
from pipeline.exits import ConfigError
from pipeline.input.formats import JSON_TEXT, first_line
from pipeline.output.rows import Status, brief

GUIDES = ("schema", "guided_json", "guided_regex", "guided_choice")
OVERRIDES = (*GUIDES, "tools", "tool_choice", "sampling", "adapter")
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})

_BYTES = (pa.binary(), pa.large_binary())

_JINJA = jinja2.sandbox.ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, finalize=lambda value: "" if value is None else _decode(value), keep_trailing_newline=True)
_JINJA.filters["json"] = lambda value: orjson.dumps(value).decode()


class Refused(Exception):
    """A row that cannot be run, with its status."""

    def __init__(self, status: Status, error: str) -> None:
        self.status, self.error = status, brief(error)
        super().__init__(self.error)


def refused(error: Exception) -> Refused:
    """What a row is refused with, whatever it ran into: the type of an error tells a mistake of ours from one of the row."""
    return error if isinstance(error, Refused) else Refused(Status.TEMPLATE_ERROR, f"{type(error).__name__}: {first_line(error)}")


def given(row: dict[str, Any] | Refused) -> dict[str, Any]:
    """A row of Form.rows as its values. Raises Refused."""
    if isinstance(row, Refused):
        raise row
    return row


class Form:
    """Which columns a prompt is made of, and how: checked against the input's schema before anything is loaded."""

    def __init__(self, task: TaskKeys, mapping: Mapping[str, str | None], schema: pa.Schema) -> None:
        self._there = schema.names
        for name, column in mapping.items():
            if column is not None and column not in schema.names:
                there = ", ".join(schema.names)
                raise ConfigError(f"input.columns.{name}={column}: the input has no such column; it has {there}")
        self._column = {name: name for name in schema.names} | dict(mapping)
        used: set[str] = set()
        self._parts = [(role, self._compile(key, text, used)) for key, role, text in _sources(task)]
        self.base = None if task.prompt is not None or task.messages is not None else self._base_column(mapping)
        self._fields = sorted(used)
        self.alike = self.base is None and not used  # every row gets the same prompt
        self.overrides = frozenset(name for name in OVERRIDES if self._column.get(name) is not None and name not in used)
        self._names = list(dict.fromkeys([*self._fields, *filter(None, [self.base]), *sorted(self.overrides)]))
        for name, column in mapping.items():
            ignored = column is None and name in (*OVERRIDES, "messages", "prompt")
            if name not in self._names and not ignored:
                uses = ", ".join(self._names) or "no column"
                raise ConfigError(f"input.columns.{name}: nothing uses the name {name}; the task uses {uses}")
        self._json = {name for name in self._names if schema.field(self._of(name)).metadata == JSON_TEXT}
        self._pruned = (self.overrides | {"messages"}) - used
        # One column at least, to count the rows by.
        self.columns = list(dict.fromkeys(map(self._of, self._names))) or schema.names[:1]

    def rows(self, table: pa.Table) -> Iterator[dict[str, Any] | Refused]:
        """The values of the names in use, row by row; Refused in place of a row that has one which Python does not hold."""
        try:
            columns = [self._values(name, table.column(self._of(name))) for name in self._names]
        except Refused as error:
            if table.num_rows == 1:
                yield error
            else:                                        # of some row: read alone, it gets the error as its status
                for row in range(table.num_rows):
                    yield from self.rows(table.slice(row, 1))
            return
        for values in zip(*columns, strict=True) if columns else ((),) * table.num_rows:
            yield dict(zip(self._names, values, strict=True))

    def content(self, row: dict[str, Any]) -> list[dict[str, Any]] | str:
        """The row's conversation, or its text. Raises Refused."""
        messages = [{"role": role, "content": _render(part, row)} for role, part in self._parts]
        if self.base is None:
            if self._fields and all(_blank(row[name]) for name in self._fields):
                many = len(self._fields) > 1
                names = f"column{'s' if many else ''} {', '.join(self._fields)} {'are' if many else 'is'}"
                raise Refused(Status.PROMPT_NULL, f"the template's {names} null or empty")
            if not any(message["content"].strip() for message in messages):
                raise Refused(Status.PROMPT_NULL, "the template renders to nothing")
            return messages
        value = row[self.base]
        if self.base == "messages":
            return [*messages, *_conversation(value)]
        if _blank(value):
            raise Refused(Status.PROMPT_NULL, "the prompt is null or empty")
        if isinstance(value, (dict, list)):
            _bad(f"the prompt is not text; where it is a conversation, set input.columns.messages={self._of(self.base)}")
        text = str(_decode(value))
        return [*messages, {"role": "user", "content": text}] if messages else text

    def _of(self, name: str) -> str:
        column = self._column[name]
        assert column is not None, name
        return column

    def _values(self, name: str, column: pa.ChunkedArray) -> list[Any]:
        """Raises Refused where one of them cannot be had: a date beyond the year 9999, say."""
        try:
            values = column.to_pylist()
            if name in self._json:
                return [None if value is None else orjson.loads(value) for value in values]
            if pa.types.is_nested(column.type):
                return [_prune(value) for value in values] if name in self._pruned else values
            return [_decode(value) for value in values] if column.type in _BYTES else values
        except Exception as error:
            raise Refused(Status.TEMPLATE_ERROR, f"the column {self._of(name)} cannot be read: {refused(error)}") from None

    def _compile(self, key: str, text: str, used: set[str]) -> jinja2.Template | str:
        """The template, or what it renders to where it uses no column; the names it uses are added to `used`."""
        try:
            names = jinja2.meta.find_undeclared_variables(_JINJA.parse(text)) - (set(_JINJA.globals) - set(self._column))
            template = _JINJA.from_string(text)
            template.globals = dict(template.globals)        # a ChainMap, which each rendering would walk
            constant = template.render() if not names else None
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"{key}: line {error.lineno}: {first_line(error)}") from None
        except Exception as error:
            # What uses no column fails on every row alike, whatever it is.
            raise ConfigError(f"{key}: {type(error).__name__}: {first_line(error)}") from None
        for name in sorted(names):
            if self._column.get(name) is None:
                there = ", ".join(self._there)
                raise ConfigError(f"{key}: the template uses the column {name}, which the input has not; it has {there}; "
                                  f"for another name set input.columns.{name}=COLUMN")
        used |= names
        return template if constant is None else constant

    def _base_column(self, mapping: Mapping[str, str | None]) -> str:
        """What the user maps goes before what is found by name."""
        for name in sorted(("messages", "prompt"), key=lambda name: mapping.get(name) is None):
            if self._column.get(name) is not None:
                return name
        there, first = ", ".join(self._there), self._there[0]
        raise ConfigError(f"the input has no column messages or prompt, and the task has no template; it has {there}; "
                          f"set input.columns.prompt=COLUMN or task.prompt='... {{{{ {first} }}}} ...'")


def _sources(task: TaskKeys) -> list[tuple[str, str, str]]:
    """(key, role, template) of each message that the task writes itself."""
    if task.messages is not None:
        return [(f"task.messages.{i}.content", message["role"], message["content"]) for i, message in enumerate(task.messages)]
    written = (("task.system", "system", task.system), ("task.prompt", "user", task.prompt))
    return [(key, role, text) for key, role, text in written if text is not None]


def _render(template: jinja2.Template | str, row: dict[str, Any]) -> str:
    if isinstance(template, str):
        return template
    try:
        return template.render(row)
    except Exception as error:
        # Whatever an expression of the user's template runs into is an error of this row, not of the job.
        raise refused(error) from None


def _conversation(value: Any) -> list[dict[str, Any]]:
    """A row's `messages`, checked: what a chat template makes of a wrong one is anybody's guess."""
    value = json_value(value, "messages", Status.TEMPLATE_ERROR)
    if not value:
        raise Refused(Status.PROMPT_NULL, "messages is null or empty")
    if not isinstance(value, list):
        _bad("messages is not a list")
    messages = []
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            _bad(f"messages.{index} is not an object")
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            _bad(f"messages.{index}.role is {role!r}; there are {', '.join(sorted(ROLES))}")
        content = message.get("content") or ""
        if isinstance(content, list):  # parts, as the chat completions API writes them
            for part in content:
                if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                    _bad(f"messages.{index}.content has a part that is not text")
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            _bad(f"messages.{index}.content is not text")
        messages.append({**message, "content": content})
    if not any(message["content"].strip() or message.get("tool_calls") for message in messages):
        raise Refused(Status.PROMPT_NULL, "no message has content")
    return messages


def json_value(value: Any, name: str, status: Status) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise Refused(status, f"{name} is not JSON: {first_line(error)}") from None


def _prune(value: Any) -> Any:
    """Without nulls, since an Arrow struct has every key of every row, and bytes as text."""
    if isinstance(value, dict):
        return {key: _prune(item) for key, item in value.items() if item is not None}
    return [_prune(item) for item in value] if isinstance(value, list) else _decode(value)


def _decode(value: Any) -> Any:
    """Bytes as the text that they are: some writers of Parquet do not mark it as such. Raises UnicodeDecodeError."""
    return value.decode() if isinstance(value, bytes) else value


def _blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _bad(error: str) -> NoReturn:
    raise Refused(Status.TEMPLATE_ERROR, error)
