"""From rows to prompts: the chat template, batched tokenising, and what a row asks for itself.

A row that cannot become a prompt becomes a `Prompt` with a status; only what is wrong for every row raises.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from pydantic import ValidationError

from engine.guided.grammar import SchemaError
from engine.request import SamplingParams
from pipeline.config import Sampling, TaskKeys
from pipeline.exits import ConfigError
from pipeline.input.form import Form, Refused, given, json_value, refused
from pipeline.input.formats import Chunk, first_line
from pipeline.input.schemas import Guide, Guides
from pipeline.input.tools import ToolReader
from pipeline.output.rows import Status
from pipeline.signals import Watchdog

# Private-use characters stand for the special tokens of a row's own text, and for themselves, while the chat template is applied.
_MARK, _MARKS = 0xF0000, 0x1FFFE
_BATCH_BYTES = 16 << 20  # of text tokenised in one call, which takes many times as much memory


Tokens = Sequence[int] | np.ndarray


class Tokenizer(Protocol):
    """What rows need of a tokenizer; thread-safe."""

    @property
    def chat_template(self) -> str | None: ...

    @property
    def special_tokens(self) -> Sequence[str]: ...

    @property
    def longest_token(self) -> int:
        """Bytes of text, in UTF-8, that one token stands for at most."""

    def render_chats(self, conversations: Sequence[Sequence[Mapping[str, Any]]], tools: Sequence[Any] | None = None) -> list[str]:
        """Each conversation as text, with the header of the answer. Raises what the template raises where it refuses one."""

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> Sequence[Tokens]: ...

    def encode_plain(self, text: str) -> Tokens:
        """Special tokens in `text` are text like any other."""

    def decode_batch(self, tokens: Sequence[Tokens]) -> list[str]:
        """Special tokens are left out."""

    def decode_marked(self, tokens: Sequence[Tokens]) -> list[str]:
        """Special tokens are written as their text."""


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

    def refuse(self, error: Exception) -> None:
        why = refused(error)
        self.status, self.error = why.status, why.error


@dataclass(slots=True)
class _Talk:
    """On its way to a prompt: the text to encode, made of the messages where there is a chat template. `hidden`: the special
    tokens that stand in it as marks."""

    prompt: Prompt
    text: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    hidden: list[str] = field(default_factory=list)


class PromptBuilder:
    """Makes prompts of chunks of rows, in any thread. `guide`: of the task's schema or tools. `max_model_len`: a text that cannot
    be within it is not tokenised. `hang_seconds`: that the chat template may take for a chunk; it is code of strangers, and one
    that does not end ends the process. `default`: what rows get unasked."""

    def __init__(self, form: Form, task: TaskKeys, sampling: Sampling, tokenizer: Tokenizer, guides: Guides, guide: Guide | None,
                 tools: ToolReader, max_model_len: int | None = None, hang_seconds: float = math.inf) -> None:
        self._form, self._tokenizer, self._guides, self._sampling = form, tokenizer, guides, sampling
        self._tools, self._max_model_len, self._hang_seconds = tools, max_model_len, hang_seconds
        self._longest_token = tokenizer.longest_token
        if "tools" in form.overrides:
            tools.check_columns()
        self.default = Ask(sampling.params(), sampling.n or 1, guide=guide)
        chat = bool(tokenizer.chat_template) if task.chat == "auto" else task.chat
        if chat and not tokenizer.chat_template:
            raise ConfigError("task.chat=true: the model has no chat template; set model.chat_template=FILE, or task.chat=false")
        if not chat and form.base == "messages":
            raise ConfigError("the input has a column messages, but no chat template applies; set model.chat_template=FILE")
        self._chat = chat
        with self._watched():
            self._folds_system = chat and not _takes_system(tokenizer)
        special = sorted(filter(None, tokenizer.special_tokens), key=len, reverse=True)
        marks = f"{chr(_MARK)}-{chr(_MARK + _MARKS)}"
        self._special = re.compile("|".join([*map(re.escape, special), f"[{marks}]"]))
        # Few texts have a character that a special token starts with, and looking for one is fast.
        self._suspect = re.compile(f"[{re.escape(''.join({token[0] for token in special}))}{marks}]")

    @property
    def columns(self) -> list[str]:
        """The columns of the files that prompts are made of."""
        return self._form.columns

    @property
    def alike(self) -> bool:
        """Every row gets the same prompt."""
        return self._form.alike

    def build(self, chunk: Chunk, first_row: int) -> list[Prompt]:
        """The prompts of the chunk's rows, numbered from `first_row`. Special tokens in the rows' own text become plain text."""
        prompts: list[Prompt] = []
        talks: list[_Talk] = []
        for index, row in enumerate(self._form.rows(chunk.table)):
            prompt = Prompt(first_row + index)
            if index in chunk.repaired:
                prompt.note = "text of this row was not Unicode: replaced by U+FFFD"
            try:
                row = given(row)
                prompt.ask, tools = self._ask(row)
                talks.append(self._talk(prompt, row, tools))
            except Exception as error:
                prompt.refuse(error)
            prompts.append(prompt)
        if self._chat:
            with self._watched():
                self._render(talks)
        for batch in self._batches([talk for talk in talks if talk.prompt.status is Status.OK]):
            self._encode(batch)
        return prompts

    @property
    def rows_ask(self) -> bool:
        """Rows may have a schema, tools or sampling of their own."""
        return bool(self._form.overrides)

    def refusals(self, chunk: Chunk, first_row: int) -> Iterator[tuple[int, Refused]]:
        """The rows whose own schema, tools or sampling cannot be, without making prompts of the others."""
        if self._form.overrides:
            for index, row in enumerate(self._form.rows(chunk.table)):
                try:
                    self._ask(given(row))
                except Exception as error:
                    yield first_row + index, refused(error)

    def _watched(self) -> Watchdog:
        return Watchdog(self._hang_seconds, "the chat template did not end within")

    def _talk(self, prompt: Prompt, row: dict[str, Any], tools: list[dict[str, Any]] | None) -> _Talk:
        content = self._form.content(row)
        if not self._chat:
            return _Talk(prompt, content if isinstance(content, str) else "\n\n".join(message["content"] for message in content))
        talk = _Talk(prompt, "", [{"role": "user", "content": content}] if isinstance(content, str) else content, tools)
        if any(self._suspect.search(text) and self._special.search(text) for text in _strings([talk.messages, tools])):
            talk.messages, talk.tools = self._hide(talk.messages, talk.hidden), self._hide(tools, talk.hidden)
        if self._folds_system:
            talk.messages = _fold_system(talk.messages)
        return talk

    def _render(self, talks: list[_Talk]) -> None:
        """Fill in the texts, of rows with the same tools at once; rows that the template refuses get a status."""
        together: dict[int, list[_Talk]] = {}
        for talk in talks:
            together.setdefault(id(talk.tools), []).append(talk)
        for batch in together.values():
            if len(batch) == 1:
                self._render_alone(batch[0])
                continue
            try:
                texts = self._tokenizer.render_chats([talk.messages for talk in batch], batch[0].tools)
            except Exception:                            # of some row: rendered alone, it gets the error as its status
                for talk in batch:
                    self._render_alone(talk)
                continue
            for talk, text in zip(batch, texts, strict=True):
                talk.text = text

    def _render_alone(self, talk: _Talk) -> None:
        try:
            talk.text = self._tokenizer.render_chats([talk.messages], talk.tools)[0]
        except Exception as error:
            # Chat templates are code of the model's makers: what one raises on a conversation is an error of this row.
            talk.prompt.refuse(Refused(Status.TEMPLATE_ERROR, f"the chat template refuses: {first_line(error)}"))

    def _batches(self, talks: list[_Talk]) -> Iterator[list[_Talk]]:
        """What to encode at once; a text too long for the context, should each of its tokens be the longest, gets a status."""
        batch: list[_Talk] = []
        held = 0
        for talk in talks:
            size = len(talk.text.encode("utf-8", "surrogatepass"))
            if self._max_model_len is not None and size > self._max_model_len * self._longest_token:
                talk.prompt.refuse(Refused(Status.PROMPT_TOO_LONG, f"{size} bytes of prompt are more than the tokens of "
                                                                   f"engine.max_model_len={self._max_model_len} can be"))
                continue
            if batch and held + size > _BATCH_BYTES:
                yield batch
                batch, held = [], 0
            batch.append(talk)
            held += size
        if batch:
            yield batch

    def _encode(self, talks: list[_Talk]) -> None:
        """Fill in the tokens; a row whose text the tokenizer does not take, half a surrogate pair say, gets a status."""
        try:
            encoded = self._tokenizer.encode_batch([talk.text for talk in talks], not self._chat)
            for talk, ids in zip(talks, encoded, strict=True):
                talk.prompt.tokens = np.asarray(self._encode_hidden(talk) if talk.hidden else ids, dtype=np.int32)
        except Exception as error:
            if len(talks) == 1:
                talks[0].prompt.refuse(error)
            else:                                        # of some row: encoded alone, it gets the error as its status
                for talk in talks:
                    self._encode([talk])

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

    def _encode_hidden(self, talk: _Talk) -> np.ndarray:
        # A special token ends what stands before it anyway, so cutting there changes no other token.
        parts = re.split(f"([{chr(_MARK)}-{chr(_MARK + len(talk.hidden) - 1)}])", talk.text)
        plain = self._tokenizer.encode_batch(parts[::2], False)
        pieces = [plain[0]]
        for mark, rest in zip(parts[1::2], plain[1:], strict=True):
            pieces += [self._tokenizer.encode_plain(talk.hidden[ord(mark) - _MARK]), rest]
        return np.concatenate(pieces)

    def _ask(self, row: dict[str, Any]) -> tuple[Ask, list[dict[str, Any]] | None]:
        """The task's parameters under the row's own, and the tools that the chat template shows. Raises Refused."""
        ask, shown = self.default, self._tools.task.shown
        if not self._form.overrides:
            return ask, shown
        if (value := row.get("sampling")) is not None:
            ask = self._sampled(ask, json_value(value, "sampling", Status.TEMPLATE_ERROR))
        guide, use = self._guides.of_row(row), self._tools.of_row(row)
        if use is not None and use.spec is not None:
            if guide is not None:
                raise Refused(Status.SCHEMA_ERROR, "a schema and tools: give one of them, or tool_choice none")
            shown = use.shown
            try:
                guide = self._guides.get(use.spec)
            except SchemaError as error:
                raise Refused(Status.SCHEMA_ERROR, f"tools: {error}") from None
        elif use is not None or guide is not None:
            shown = None                                 # the row does without the task's tools
        if guide is not None or (use is not None and self._tools.task.spec is not None):
            ask = replace(ask, guide=guide)
        if (value := row.get("adapter")) is not None:
            ask = replace(ask, adapter=str(value))
        if ask.guide is not None and ask.params.max_tokens < ask.guide.grammar.min_tokens:
            raise Refused(
                Status.SCHEMA_ERROR,
                f"max_tokens={ask.params.max_tokens} is below the {ask.guide.grammar.min_tokens} tokens "
                "that the shortest valid output needs",
            )
        return ask, shown

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


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _strings(item)


def _takes_system(tokenizer: Tokenizer) -> bool:
    """Some templates raise on a system message, and some drop it."""
    try:
        probe = [{"role": "system", "content": "gristmill-probe"}, {"role": "user", "content": "x"}]
        return "gristmill-probe" in tokenizer.render_chats([probe])[0]
    except Exception:
        # Each template raises what it likes; the rows' own conversations will tell if it cannot be used at all.
        return False


def _fold_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The system message as the start of the first user message, for templates that have no place for it."""
    if len(messages) < 2 or messages[0]["role"] not in ("system", "developer") or messages[1]["role"] != "user":
        return messages
    return [{"role": "user", "content": messages[0]["content"] + "\n\n" + messages[1]["content"]}, *messages[2:]]
