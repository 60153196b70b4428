"""From rows to prompts: columns by name, templates, the chat template, batched tokenising, and what one row asks for itself.

A row that cannot become a prompt becomes a `Prompt` with a status; only what is wrong for every row raises.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Protocol

import jinja2
import jinja2.meta
import jinja2.sandbox
import numpy as np
import orjson
import pyarrow as pa
from pydantic import ValidationError

from engine.guided.grammar import SchemaError
from engine.request import SamplingParams
from pipeline.config import Sampling, TaskKeys
from pipeline.exits import ConfigError
from pipeline.input.formats import JSON_TEXT, Chunk, first_line
from pipeline.input.schemas import Guide, Guides
from pipeline.output.rows import Status

OVERRIDES = ("schema", "tools", "sampling", "adapter")
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
# Private-use characters stand for the special tokens of a row's own text, and for themselves, while the chat template is applied.
_MARK, _MARKS = 0xF0000, 0x1FFFE


class Tokenizer(Protocol):
    """What rows need of a tokenizer; thread-safe."""

    chat_template: str | None
    special_tokens: Sequence[str]

    def render_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> str:
        """The conversation as text, with the header of the answer. Raises what the template raises where it refuses."""

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[Sequence[int]]: ...

    def encode_plain(self, text: str) -> Sequence[int]:
        """Special tokens in `text` are text like any other."""

    def decode_batch(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        """Special tokens are left out."""


class Refused(Exception):
    """A row that cannot be run, with its status."""

    def __init__(self, status: Status, error: str) -> None:
        super().__init__(error)
        self.status, self.error = status, error


@dataclass(frozen=True, slots=True)
class Ask:
    """How a row is to be run. `seed`: the row's own, None where it follows from the run's."""

    params: SamplingParams
    n: int = 1
    seed: int | None = None
    guide: Guide | None = None
    adapter: str | None = None


@dataclass(slots=True)
class Prompt:
    """Row `row` of its shard: tokens (int32) and what it asks for, or a status and an error. `note`: error of a row that runs."""

    row: int
    tokens: np.ndarray | None = None
    ask: Ask | None = None
    status: Status = Status.OK
    error: str | None = None
    note: str | None = None


class Form:
    """Which columns a prompt is made of, and how: checked against the input's schema before anything is loaded."""

    def __init__(self, task: TaskKeys, mapping: Mapping[str, str | None], schema: pa.Schema) -> None:
        self._there = schema.names
        for name, column in mapping.items():
            if column is not None and column not in schema.names:
                raise ConfigError(
                    f"input.columns.{name}={column}: the input has no such column; it has {', '.join(schema.names)}"
                )
        self._column = {name: name for name in schema.names} | dict(mapping)
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            undefined=jinja2.StrictUndefined, finalize=lambda value: "" if value is None else value, keep_trailing_newline=True
        )
        environment.filters["json"] = lambda value: orjson.dumps(value).decode()
        used: set[str] = set()
        if task.messages is not None:
            sources = [
                (f"task.messages.{i}.content", message["role"], message["content"]) for i, message in enumerate(task.messages)
            ]
        else:
            sources = [
                (f"task.{key}", role, text)
                for key, role, text in (("system", "system", task.system), ("prompt", "user", task.prompt))
                if text is not None
            ]
        self._templates = [(role, self._compile(environment, key, text, used)) for key, role, text in sources]
        self.templated = task.messages is not None or task.prompt is not None
        self.base = None if self.templated else self._base_column()
        self._fields = sorted(used)
        overrides = [name for name in OVERRIDES if self._column.get(name) is not None and name not in used]
        for name in mapping:
            if name not in used and name not in OVERRIDES and name != self.base and name not in ("messages", "prompt"):
                raise ConfigError(
                    f"input.columns.{name}: nothing uses the name {name}; the task uses "
                    f"{', '.join([*self._fields, *filter(None, [self.base])]) or 'no column'}"
                )
        self._names = dict.fromkeys([*self._fields, *([self.base] if self.base else []), *overrides])
        self._json = {name for name in self._names if schema.field(self._column[name]).metadata == JSON_TEXT}  # type: ignore[arg-type]
        self.overrides = frozenset(overrides)
        self._structured = self.overrides | {"messages"} - set(self._fields)
        self.columns = (
            list(dict.fromkeys(self._column[name] for name in self._names)) or schema.names[:1]
        )  # one at least counts the rows

    def _compile(self, environment: jinja2.Environment, key: str, text: str, used: set[str]) -> jinja2.Template:
        try:
            names = jinja2.meta.find_undeclared_variables(environment.parse(text)) - (
                set(environment.globals) - set(self._column)
            )
            template = environment.from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"{key}: line {error.lineno}: {first_line(error)}") from None
        for name in sorted(names):
            if self._column.get(name) is None:
                raise ConfigError(
                    f"{key}: the template uses the column {name}, which the input has not; it has {', '.join(self._there)}; "
                    f"for another name set input.columns.{name}=COLUMN"
                )
        used |= names
        return template

    def _base_column(self) -> str:
        for name in ("messages", "prompt"):
            if self._column.get(name) is not None:
                return name
        raise ConfigError(
            "the input has no column messages or prompt, and the task has no template; it has "
            f"{', '.join(self._there)}; set input.columns.prompt=COLUMN or task.prompt='... {{{{ {self._there[0]} }}}} ...'"
        )

    def rows(self, table: pa.Table) -> Iterator[dict[str, Any]]:
        """The values of the names in use, row by row."""
        columns = [self._values(name, table.column(column)) for name in self._names if (column := self._column[name]) is not None]
        for values in zip(*columns, strict=True) if columns else ((),) * table.num_rows:
            yield dict(zip(self._names, values, strict=True))

    def _values(self, name: str, column: pa.ChunkedArray) -> list[Any]:
        values = column.to_pylist()
        if name in self._json:
            return [None if value is None else orjson.loads(value) for value in values]
        return [_pruned(value) for value in values] if name in self._structured and pa.types.is_nested(column.type) else values

    def content(self, row: dict[str, Any]) -> list[dict[str, Any]] | str:
        """The row's conversation, or its text. Raises Refused."""
        extra = [{"role": role, "content": self._render(template, row)} for role, template in self._templates]
        if self.base is None:
            if self._fields and all(_blank(row[name]) for name in self._fields):
                raise Refused(
                    Status.PROMPT_NULL,
                    f"the template's {_plural('column', self._fields)} {', '.join(self._fields)} "
                    f"{'is' if len(self._fields) == 1 else 'are'} null or empty",
                )
            if not any(message["content"].strip() for message in extra):
                raise Refused(Status.PROMPT_NULL, "the template renders to nothing")
            return extra
        value = row[self.base]
        if self.base == "prompt":
            if _blank(value):
                raise Refused(Status.PROMPT_NULL, "the prompt is null or empty")
            text = value if isinstance(value, str) else str(value)
            return [*extra, {"role": "user", "content": text}] if extra else text
        return [*extra, *_conversation(value)]

    @staticmethod
    def _render(template: jinja2.Template, row: dict[str, Any]) -> str:
        try:
            return template.render(row)
        except Exception as error:
            # Whatever an expression of the user's template runs into is an error of this row, not of the job.
            raise Refused(Status.TEMPLATE_ERROR, f"{type(error).__name__}: {first_line(error)}") from None


class PromptBuilder:
    """Makes prompts of chunks of rows, in any thread. `guide`: the task's schema, compiled. `default`: what rows get unasked."""

    def __init__(
        self, form: Form, task: TaskKeys, sampling: Sampling, tokenizer: Tokenizer, guides: Guides, guide: Guide | None
    ) -> None:
        self._form, self._tokenizer, self._guides, self._sampling = form, tokenizer, guides, sampling
        self.default = Ask(sampling.params(), sampling.n or 1, guide=guide)
        chat = bool(tokenizer.chat_template) if task.chat == "auto" else task.chat
        if chat and not tokenizer.chat_template:
            raise ConfigError("task.chat=true: the model has no chat template; set model.chat_template=FILE, or task.chat=false")
        if not chat and form.base == "messages":
            raise ConfigError("the input has a column messages, but no chat template applies; set model.chat_template=FILE")
        self._chat = chat
        self._takes_tools = bool(chat and "tools" in (tokenizer.chat_template or ""))
        self._folds_system = chat and not _takes_system(tokenizer)
        special = [re.escape(token) for token in sorted(tokenizer.special_tokens, key=len, reverse=True)]
        self._special = re.compile("|".join([*special, f"[{chr(_MARK)}-{chr(_MARK + _MARKS)}]"]))

    @property
    def columns(self) -> list[str]:
        """The columns of the files that prompts are made of."""
        return self._form.columns

    def build(self, chunk: Chunk, first_row: int) -> list[Prompt]:
        """The prompts of the chunk's rows, numbered from `first_row`. Special tokens in the rows' own text become plain text."""
        prompts: list[Prompt] = []
        texts: list[str] = []
        waiting: list[tuple[Prompt, list[str]]] = []
        for index, row in enumerate(self._form.rows(chunk.table)):
            prompt = Prompt(first_row + index)
            if index in chunk.repaired:
                prompt.note = "text of this row was not Unicode: replaced by U+FFFD"
            try:
                prompt.ask = self._ask(row) if self._form.overrides else self.default
                text, hidden = self._text(row)
            except Refused as refused:
                prompt.status, prompt.error = refused.status, refused.error
            else:
                texts.append(text)
                waiting.append((prompt, hidden))
            prompts.append(prompt)
        for (prompt, hidden), text, ids in zip(waiting, texts, self._tokenizer.encode_batch(texts, not self._chat), strict=True):
            prompt.tokens = np.asarray(self._encode_hidden(text, hidden) if hidden else ids, dtype=np.int32)
        return prompts

    def _text(self, row: dict[str, Any]) -> tuple[str, list[str]]:
        """The text to encode, and the special tokens that stand in it as marks."""
        content = self._form.content(row)
        if not self._chat:
            return content if isinstance(content, str) else "\n\n".join(message["content"] for message in content), []
        messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
        tools = self._tools(row)
        hidden: list[str] = []
        if any(map(self._special.search, _strings([messages, tools]))):
            messages, tools = self._hide(messages, hidden), self._hide(tools, hidden)
        if self._folds_system:
            messages = _fold_system(messages)
        try:
            return self._tokenizer.render_chat(messages, tools), hidden
        except Exception as error:
            # Chat templates are code of the model's makers: what one raises on a conversation is an error of this row.
            raise Refused(Status.TEMPLATE_ERROR, f"the chat template refuses: {first_line(error)}") from None

    def _tools(self, row: dict[str, Any]) -> list[dict[str, Any]] | None:
        if (tools := row.get("tools")) is None or "tools" not in self._form.overrides:
            return None
        tools = _json_value(tools, "tools", Status.SCHEMA_ERROR)
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise Refused(Status.SCHEMA_ERROR, "tools is not a list of objects")
        if not self._takes_tools:
            raise Refused(Status.TEMPLATE_ERROR, "the model's chat template takes no tools")
        return tools

    def _hide(self, value: Any, hidden: list[str]) -> Any:
        """`value` with each special token replaced by a mark that the chat template leaves alone."""
        if isinstance(value, str):

            def mark(match: re.Match[str]) -> str:
                if len(hidden) == _MARKS:
                    raise Refused(Status.TEMPLATE_ERROR, f"more than {_MARKS} special tokens in the text")
                hidden.append(match.group())
                return chr(_MARK + len(hidden) - 1)

            return self._special.sub(mark, value)
        if isinstance(value, dict):
            return {self._hide(key, hidden): self._hide(item, hidden) for key, item in value.items()}
        return [self._hide(item, hidden) for item in value] if isinstance(value, list) else value

    def _encode_hidden(self, text: str, hidden: list[str]) -> list[int]:
        # A special token ends what stands before it anyway, so cutting there changes no other token.
        parts = re.split(f"([{chr(_MARK)}-{chr(_MARK + len(hidden) - 1)}])", text)
        plain = self._tokenizer.encode_batch(parts[::2], False)
        ids = list(plain[0])
        for mark, rest in zip(parts[1::2], plain[1:], strict=True):
            ids += self._tokenizer.encode_plain(hidden[ord(mark) - _MARK])
            ids += rest
        return ids

    def _ask(self, row: dict[str, Any]) -> Ask:
        """The task's parameters under the row's own. Raises Refused."""
        ask = self.default
        if (value := row.get("sampling")) is not None:
            ask = self._sampled(ask, _json_value(value, "sampling", Status.TEMPLATE_ERROR))
        if (value := row.get("schema")) is not None:
            try:
                guide = self._guides.get(value)
            except SchemaError as error:
                raise Refused(Status.SCHEMA_ERROR, f"schema: {error}") from None
            ask = replace(ask, guide=guide)
        if (value := row.get("adapter")) is not None:
            ask = replace(ask, adapter=str(value))
        if ask.guide is not None and ask.params.max_tokens < ask.guide.grammar.min_tokens:
            raise Refused(
                Status.SCHEMA_ERROR,
                f"max_tokens={ask.params.max_tokens} is below the {ask.guide.grammar.min_tokens} tokens "
                "that the shortest valid output needs",
            )
        return ask

    def _sampled(self, ask: Ask, value: Any) -> Ask:
        if not isinstance(value, dict):
            raise Refused(Status.TEMPLATE_ERROR, "sampling is not an object")
        keys = {key: item for key, item in value.items() if item is not None}
        seed = keys.pop("seed", None)
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63):
            raise Refused(Status.TEMPLATE_ERROR, f"sampling.seed={seed}: a whole number from 0 to 2^63 - 1 is needed")
        if isinstance(keys.get("stop"), str):
            keys["stop"] = (keys["stop"],)
        try:
            sampling = Sampling(**keys).over(self._sampling)
            return replace(ask, params=sampling.params(), n=sampling.n or 1, seed=seed)
        except ValidationError as error:
            item = error.errors()[0]
            message = "no such key" if item["type"] == "extra_forbidden" else item["msg"][0].lower() + item["msg"][1:]
            raise Refused(Status.TEMPLATE_ERROR, f"sampling.{item['loc'][0]}: {message}") from None
        except (ValueError, TypeError) as error:
            raise Refused(Status.TEMPLATE_ERROR, f"sampling.{first_line(error)}") from None


def row_seed(run_seed: int, row_id: str, sample: int) -> int:
    """The seed of one sample, 63 bits: the same whatever the shard, the batch or the attempt."""
    digest = hashlib.blake2b(f"{run_seed}/{row_id}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _conversation(value: Any) -> list[dict[str, Any]]:
    """A row's `messages`, checked: what a chat template makes of a wrong one is anybody's guess."""
    value = _json_value(value, "messages", Status.TEMPLATE_ERROR)
    if not value:
        raise Refused(Status.PROMPT_NULL, "messages is null or empty")
    if not isinstance(value, list):
        _bad("messages is not a list")
    messages = []
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            _bad(f"messages.{index} is not an object")
        if message.get("role") not in ROLES:
            _bad(f"messages.{index}.role is {message.get('role')!r}; there are {', '.join(sorted(ROLES))}")
        content = message.get("content") or ""
        if isinstance(content, list):  # parts, as the chat completions API writes them
            if not all(
                isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
            ):
                _bad(f"messages.{index}.content has a part that is not text")
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            _bad(f"messages.{index}.content is not text")
        messages.append({**message, "content": content})
    if not any(message["content"].strip() or message.get("tool_calls") for message in messages):
        raise Refused(Status.PROMPT_NULL, "no message has content")
    return messages


def _json_value(value: Any, name: str, status: Status) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise Refused(status, f"{name} is not JSON: {first_line(error)}") from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _strings(item)


def _pruned(value: Any) -> Any:
    """Without nulls: an Arrow struct has every key of every row."""
    if isinstance(value, dict):
        return {key: _pruned(item) for key, item in value.items() if item is not None}
    return [_pruned(item) for item in value] if isinstance(value, list) else value


def _takes_system(tokenizer: Tokenizer) -> bool:
    """Some templates raise on a system message, and some drop it."""
    try:
        return "gristmill-probe" in tokenizer.render_chat(
            [{"role": "system", "content": "gristmill-probe"}, {"role": "user", "content": "x"}]
        )
    except Exception:
        # Each template raises what it likes; the rows' own conversations will tell if it cannot be used at all.
        return False


def _fold_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The system message as the start of the first user message, for templates that have no place for it."""
    if len(messages) < 2 or messages[0]["role"] not in ("system", "developer") or messages[1]["role"] != "user":
        return messages
    return [{"role": "user", "content": messages[0]["content"] + "\n\n" + messages[1]["content"]}, *messages[2:]]


def _blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _plural(word: str, items: Sequence[Any]) -> str:
    return word if len(items) == 1 else word + "s"


def _bad(error: str) -> NoReturn:
    raise Refused(Status.TEMPLATE_ERROR, error)
