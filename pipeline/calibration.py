"""Calibration data: the first rows of an input that become a prompt, as token ids."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from engine.guided.grammar import Grammar, SchemaError
from pipeline.config import InputKeys, Sampling, TaskKeys
from pipeline.exits import ConfigError
from pipeline.input.form import OVERRIDES, Form
from pipeline.input.plan import make_plan
from pipeline.input.prompts import Prompt, PromptBuilder, Tokenizer
from pipeline.input.schemas import Guides
from pipeline.input.sources import Input, open_input
from pipeline.input.tools import ToolReader


class _NoGrammars:
    """Rows are read without what guides their outputs: nothing is generated."""

    def get(self, source: object) -> Grammar:
        raise SchemaError("", "calibration compiles no schemas")


_ROWS = 8192    # of one shard of the plan: only as many as are needed are read


def calibration_set(data: str | list[str], keys: InputKeys, task: TaskKeys, tokenizer: Tokenizer, samples: int,
                    length: int) -> list[np.ndarray]:
    """At most `samples` token sequences (int32) of at most `length` tokens each.

    Columns are found as in a job: a template's, else `messages` or `prompt` through the chat template, else `text` as it stands.
    Raises ConfigError, one line, where the input cannot be read or no row becomes a prompt.
    """
    source = open_input(data, keys)
    names = source.schema.names
    columns: dict[str, str | None] = {name: None for name in OVERRIDES if name in names}
    columns |= keys.columns
    plain = task.prompt is None and task.messages is None and "text" in names and not {"messages", "prompt"} & {*names, *columns}
    if plain:
        columns["prompt"], task = "text", task.model_copy(update={"chat": False})
    tools = ToolReader(None, "auto", task)
    builder = PromptBuilder(Form(task, columns, source.schema), task, Sampling(), tokenizer, Guides(_NoGrammars()), None, tools)
    found: list[np.ndarray] = []
    refused: str | None = None
    for prompt in _prompts(source, builder, keys.limit):
        if prompt.tokens is not None and prompt.tokens.size:
            found.append(prompt.tokens[:length])
            if len(found) == samples:
                break
        elif refused is None:
            refused = prompt.error
    if not found:
        raise ConfigError(f"data: no row becomes a prompt to calibrate with ({refused})")
    return found


def _prompts(source: Input, builder: PromptBuilder, limit: int | None) -> Iterator[Prompt]:
    cursor = source.cursor(builder.columns)
    for shard in make_plan(source.files, _ROWS, limit).shards:
        for chunk in cursor.read(shard):
            yield from builder.build(chunk, 0)
