"""How model families write tool calls. One table: a family is a row of literals around JSON, told from its chat template.

Sources: the chat templates of Qwen 2.5 and 3 (the format of Nous' Hermes models), Mistral-7B-Instruct v0.3, Llama 3.1 to 3.3.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_DECODER = json.JSONDecoder()


class NotCalls(ValueError):
    """A text that begins a call and is none."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """Calls stand as `begin CALL (between CALL)* end`, where CALL is a JSON object with the keys `name` and `arguments`.

    trigger: what begins a call, and stands in no free text; `anywhere`: text may come before it, else only an output that starts
    with it has calls. markers: tokens of the format that tokenizers may hold for special. between: None where there is one call
    at most. sign: a text that chat templates of the family hold.
    """

    trigger: str
    anywhere: bool
    markers: tuple[str, ...]
    begin: str
    between: str | None
    end: str
    arguments: str
    sign: str

    def head(self, name: str) -> str:
        """The start of a call of the tool `name`, up to its arguments; a brace closes it."""
        return f'{{"name": {json.dumps(name, ensure_ascii=False)}, {json.dumps(self.arguments)}: '

    def lark(self, calls: list[str], free: bool, many: bool) -> str:
        """A Lark grammar of llguidance. calls: a rule for each tool, from its head to its brace. free: an output may be plain
        text, and have it before its calls. many: several calls may follow each other."""
        rules = [f"tool{i}: {rule}" for i, rule in enumerate(calls)]
        rules.append("call: " + " | ".join(f"tool{i}" for i in range(len(calls))))
        begin = self.begin.removeprefix(self.trigger) if free and self.anywhere else self.begin
        more = f"({_literal(self.between)} call)*" if self.between is not None and many else ""
        rules.append(" ".join(["calls:", _literal(begin), "call", more, _literal(self.end)]))
        if not free:
            return "\n".join(["start: calls", *rules])
        trigger = "".join(f"\\x{byte:02x}" for byte in self.trigger.encode())       # ASCII in all formats
        if not self.anywhere:
            return "\n".join(["start: TEXT | calls", f"TEXT: /(.|\\n)*/ & ~/{trigger}(.|\\n)*/", *rules])
        text = [f"TEXT: /(.|\\n)*/ & ~/(.|\\n)*{trigger}(.|\\n)*/", f"open[lazy]: /(.|\\n)*{trigger}/"]
        return "\n".join(["start: TEXT | open calls", *text, *rules])

    def split(self, text: str) -> tuple[str, list[str]]:
        """(what stands before the calls, the JSON text of each call); no calls: all of it is free text.

        White space between the literals and the calls does not matter. Raises NotCalls for what only begins like calls.
        """
        at = text.find(self.trigger) if self.anywhere else 0 if text.startswith(self.trigger) else -1
        if at < 0:
            return text, []
        return text[:at], list(self._calls(text, at))

    def _calls(self, text: str, at: int) -> Iterator[str]:
        at = _skip(text, at, self.begin)
        while True:
            try:
                _, end = _DECODER.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                raise NotCalls(f"a tool call is not JSON: {error}") from None
            yield text[at:end]
            if self.between is None or (after := _skip(text, end, self.between, required=False)) < 0:
                break
            at = after
        if text[_skip(text, end, self.end) :].strip():
            raise NotCalls("text follows the tool calls")


HERMES = ToolFormat("<tool_call>", True, ("<tool_call>", "</tool_call>"), "<tool_call>\n", "\n</tool_call>\n<tool_call>\n",
                    "\n</tool_call>", "arguments", "<tool_call>")
MISTRAL = ToolFormat("[TOOL_CALLS]", True, ("[TOOL_CALLS]",), "[TOOL_CALLS] [", ", ", "]", "arguments", "[TOOL_CALLS]")
LLAMA3 = ToolFormat("{", False, (), "", None, "", "parameters", "<|python_tag|>")
FORMATS = {"hermes": HERMES, "mistral": MISTRAL, "llama3": LLAMA3}


def format_of(chat_template: str) -> str | None:
    """The name of the format that a chat template shows, or None: templates that take tools say how calls are written."""
    if "tools" not in chat_template:
        return None
    for name, form in FORMATS.items():
        if form.sign in chat_template:
            return name
    # Llama 3.2's template for small models has no <|python_tag|>.
    return "llama3" if "<|start_header_id|>" in chat_template and '"parameters"' in chat_template else None


# Small models write calls as they have seen them elsewhere, whatever their chat template says: bare, as Markdown, between the
# tags that the template shows the tools in, or as another family does.
_WRAPPINGS = [("```json", "```"), ("```", "```"), ("<tools>", "</tools>"),
              *((form.begin.strip(), form.end.strip()) for form in (HERMES, MISTRAL))]


def unwrapped(text: str) -> str:
    """What is left of a whole text without one of these wrappings and white space."""
    text = text.strip()
    for begin, end in _WRAPPINGS:
        if text.startswith(begin) and text.endswith(end) and len(text) >= len(begin) + len(end):
            return text[len(begin) : -len(end)].strip()
    return text


def json_call(text: str, form: ToolFormat) -> tuple[Any, Any]:
    """(name, arguments) of a call that was parsed before. Raises NotCalls for other keys."""
    call = json.loads(text)
    if not isinstance(call, dict) or set(call) != {"name", form.arguments}:
        raise NotCalls(f"a tool call must have exactly the keys name and {form.arguments}")
    return call["name"], call[form.arguments]


def _literal(text: str | None) -> str:
    return json.dumps(text) if text else ""


def _skip(text: str, at: int, literal: str, required: bool = True) -> int:
    """Where `literal` ends that stands at `at`, but for white space; -1 (or NotCalls, where it is required) if it does not."""
    for word in literal.split():
        at = _space(text, at)
        if not text.startswith(word, at):
            if required:
                raise NotCalls(f"expected {word!r} at {text[at : at + 20]!r}")
            return -1
        at += len(word)
    return _space(text, at)


def _space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at
