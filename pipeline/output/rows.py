"""What the job says of one (row, sample): RowResult and its Status."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

MOST_ERROR = 500    # characters of an error: it may quote the row, and stands beside each of its samples
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


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
    `tool_calls`: JSON text, kept only where the layout asks for that column. `error` is made brief.
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

    def __post_init__(self) -> None:
        if self.error is not None:
            self.error = brief(self.error)


def brief(error: str) -> str:
    """An error as one line of at most MOST_ERROR characters that a terminal may show: control characters are written escaped."""
    line = _CONTROL.sub(lambda match: ascii(match.group())[1:-1], error[:MOST_ERROR + 1])
    return line if len(line) <= MOST_ERROR else line[: MOST_ERROR - 1] + "…"
