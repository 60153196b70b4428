"""Guides: what a schema becomes before rows use it, a grammar for the engine and a validator for the finished text."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Protocol

from engine.guided.front import GuideSpec
from engine.guided.grammar import Grammar, SchemaError
from engine.guided.validate import Validator

_KEPT = 4096


class Grammars(Protocol):
    """Compiles under a time limit; engine.guided.pool.GrammarPool."""

    def get(self, source: Any) -> Grammar: ...


@dataclass(frozen=True, eq=False)
class Guide:
    """One distinct schema, regex or choice. `validator`: None where the output is not JSON."""

    spec: GuideSpec
    grammar: Grammar
    validator: Validator | None


class Guides:
    """Distinct schemas compiled once. Thread-safe; the least recently used are dropped, but live on in the rows that use them."""

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._made: OrderedDict[GuideSpec, Guide] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, source: Any) -> Guide:
        """Raises SchemaError where the schema cannot be kept."""
        spec = source if isinstance(source, GuideSpec) else GuideSpec.of(source)
        with self._lock:
            guide = self._made.get(spec)
            if guide is not None:
                self._made.move_to_end(spec)
                return guide
        grammar = self._grammars.get(spec)
        try:
            validator = Validator(json.loads(spec.text)) if spec.kind == "schema" else None
        except ValueError as error:
            raise SchemaError("", f"not a JSON Schema: {error}") from None
        guide = Guide(spec, grammar, validator)
        with self._lock:
            guide = self._made.setdefault(spec, guide)
            while len(self._made) > _KEPT:
                self._made.popitem(last=False)
        return guide
