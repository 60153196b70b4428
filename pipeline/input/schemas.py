"""Guides: what a schema becomes before rows use it, a grammar for the engine and a check of the finished text."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from engine.guided.front import IMPORT_PATH, GuideSpec
from engine.guided.grammar import Grammar, SchemaError
from pipeline.input.form import GUIDES, Refused, json_value
from pipeline.output.rows import Status

_KEPT = 512              # each may take megabytes


class Grammars(Protocol):
    """Compiles under a time limit; engine.guided.pool.GrammarPool."""

    def get(self, source: Any) -> Grammar: ...


@dataclass(frozen=True, eq=False)
class Guide:
    """One distinct schema, regex, choice or set of tools.

    check: the value of a finished text, ValueError where it does not fit. `retries`: above 0, the grammar is only near to the
    schema, and an output that does not fit is sampled again as many times.
    """

    spec: GuideSpec
    grammar: Grammar
    check: Callable[[str], Any]
    retries: int = 0


class Guides:
    """Distinct schemas compiled once. Thread-safe; the least recently used are dropped, but live on in the rows that use them.

    retries: for schemas that the grammar engine refuses (see Guide.retries); 0: they are refused.
    row_types: modules whose Python types rows may name.
    """

    def __init__(self, grammars: Grammars, retries: int = 0, row_types: Iterable[str] = ()) -> None:
        self._grammars, self._retries, self._row_types = grammars, retries, frozenset(row_types)
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
        guide = self._make(spec)
        with self._lock:
            guide = self._made.setdefault(spec, guide)
            while len(self._made) > _KEPT:
                self._made.popitem(last=False)
        return guide

    def of_row(self, row: Mapping[str, Any]) -> Guide | None:
        """The guide that the row's own columns ask for; None: they ask for none. Raises Refused."""
        given = [name for name in GUIDES if row.get(name) is not None]
        if not given:
            return None
        name, value = given[0], row[given[0]]
        if len(given) > 1:
            raise Refused(Status.SCHEMA_ERROR, f"{' and '.join(given)}: give one of them")
        try:
            return self.get(self._row_spec(name, value))
        except SchemaError as error:
            raise Refused(Status.SCHEMA_ERROR, f"{name}: {error}") from None

    def _row_spec(self, name: str, value: Any) -> GuideSpec:
        if name == "guided_regex":
            return GuideSpec.regex(value)
        if name == "guided_choice":
            return GuideSpec.choice(json_value(value, name, Status.SCHEMA_ERROR))
        if isinstance(value, str) and IMPORT_PATH.fullmatch(value.strip()):
            # Rows are data: they import nothing but what the job was told they may.
            module = value.strip().partition(":")[0]
            if module not in self._row_types:
                raise SchemaError("", f"rows may not name types of {module}; allow it with guided.row_types=[{module}]")
            return GuideSpec.of_named_type(value.strip())
        value = json_value(value, name, Status.SCHEMA_ERROR)
        if not isinstance(value, (dict, bool)):
            raise Refused(Status.SCHEMA_ERROR, f"{name} is not an object, true or false")
        return GuideSpec.schema(value)

    def _make(self, spec: GuideSpec) -> Guide:
        try:
            grammar, retries = self._grammars.get(spec), 0
        except SchemaError:
            if spec.kind != "schema" or not self._retries:
                raise
            grammar, retries = self._grammars.get(spec.loosened()), self._retries
        return Guide(spec, grammar, grammar.check, retries)
