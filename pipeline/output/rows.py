"""What the job says of one (row, sample): RowResult and its Status."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """Why a row looks as it does. Each planned (row, sample) ends with exactly one."""

    OK = "ok"
    LENGTH = "length"                        # max_tokens or the context cut it, and no grammar could close it
    PROMPT_NULL = "prompt_null"
    PROMPT_TOO_LONG = "prompt_too_long"
    TEMPLATE_ERROR = "template_error"
    SCHEMA_ERROR = "schema_error"
    ENGINE_ERROR = "engine_error"
    TIMEOUT = "timeout"
    ABORTED = "aborted"


@dataclass(slots=True)
class RowResult:
    """The result of one sample of one row.

    `row`: index of the row in its shard, from 0, in input order. `sample`: from 0 to `samples` - 1, where `samples` is how many
    this row has in all: a shard is whole when every row has all of its own. `json`: the checked document as text.
    `tool_calls`: JSON text, kept only where the layout asks for that column.
    """

    row: int
    sample: int = 0
    samples: int = 1
    status: Status = Status.OK
    error: str | None = None
    text: str | None = None
    json: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    tool_calls: str | None = None
