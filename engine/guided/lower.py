"""Lower any JSON Schema to a sound subset in the keywords the grammar engine takes: nothing it lets through is invalid.

Each conjunction of subschemas becomes `anyOf` over its alternatives, with properties and items written out as definitions of
their own, so that references never have siblings and recursion stays finite. What narrows is noted; what cannot be kept is
refused with a JSON pointer, never ignored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import count
from math import copysign, ulp
from typing import Any, Literal

from engine.guided.alternatives import Alternatives, Conjunction, unique
from engine.guided.dialect import Document, Node
from engine.guided.distinct import ANY_ARRAY, Unique
from engine.guided.facts import Facts
from engine.guided.grammar import SchemaError
from engine.guided.lower_arrays import write_arrays
from engine.guided.lower_objects import write_objects
from engine.guided.regexes import engine_pattern, overflow, refusal

# Formats are annotations, so only those that help a model to write a good value need be kept.
_FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"}
_LOWS, _HIGHS = {"minimum", "exclusiveMinimum"}, {"maximum", "exclusiveMaximum"}
_SCALARS = ("null", "boolean", "number", "string")
_EXACT = 2**53           # beyond, readers that take numbers for doubles may not see a multiple as one
_INSIDE = 1e-9           # of a range: where its numbers begin beside an excluded bound that the engine would take
_INLINE = 200            # characters up to which a schema is written where it is used

ExtraKeys = Literal["auto", True, False]


@dataclass
class Lowered:
    """schema: in the keywords that llguidance takes. notes: (pointer, what was narrowed).

    distinct: what a grammar cannot say and a Scanner must see to: that keys differ, and the items of the arrays it names. None:
    nothing is left to see to.
    """

    schema: dict[str, Any]
    distinct: Unique | None = None
    notes: list[tuple[str, str]] = field(default_factory=list)


def lower(schema: Node, extra_keys: ExtraKeys = "auto") -> Lowered:
    """Raises SchemaError for what cannot be kept.

    extra_keys: whether an object that lists properties, and says nothing of others, may get others. Where it may not, valid
    outputs are lost, but the model is not tempted to go on, and the end of the object is forced. "auto": it may where it requires
    nothing and the schema declares its draft with `$schema`.
    """
    document = Document(schema)
    document.check_work()
    return Writer(document, extra_keys).write()


class _Unsatisfiable(Exception):
    """A definition that recursion relied on turned out to be empty: start again, knowing it."""


class Writer:
    """Writes one document. `child`, `note` and the public attributes serve the writers of arrays and objects."""

    def __init__(self, document: Document, extra_keys: ExtraKeys) -> None:
        self._document, self._extra_keys = document, extra_keys
        self.alternatives = Alternatives(document)
        self._hopeless: set[frozenset[int]] = set()

    def write(self) -> Lowered:
        root: Node | None = None
        while root is None:
            self._done: dict[frozenset[int], Node] = {}
            self._active: dict[frozenset[int], str] = {}
            self._recursive: set[str] = set()
            self._definitions: dict[str, Node] = {}
            self._notes: dict[tuple[str, str], None] = {}
            self._numbers_used = count()
            # Conjunctions with arrays whose items must differ, and their items where those can be listed.
            self.unique_items: dict[frozenset[int], list[Any] | None] = {}
            self._reached: list[tuple[str, frozenset[int]]] = [("", frozenset([id(self._document.root)]))]
            self.free_keys = False                             # some object may have keys of the model's choice
            try:
                root = self._conjunction((self._document.root,))
            except _Unsatisfiable:
                pass
            except RecursionError:
                raise SchemaError("", "its definitions are nested too deep") from None
        if root is False:
            raise SchemaError("", "no value is valid: the schema contradicts itself")
        schema = dict(root) if isinstance(root, dict) else {}
        if self._definitions:
            schema["$defs"] = self._definitions
        items: dict[str, list[list[Any] | None]] = {}
        for name, key in self._reached:
            if key in self.unique_items:
                items.setdefault(name, []).append(self.unique_items[key])
        distinct: Unique = {name: None if None in lists else tuple(
            json.dumps(value, ensure_ascii=False).encode() for values in lists for value in values or ())
            for name, lists in items.items()}
        return Lowered(schema, distinct if distinct or self.free_keys else None, list(self._notes))

    def child(self, nodes: Conjunction, name: str = ANY_ARRAY) -> Node:
        """The schema of a property or item; `name`: of the property."""
        nodes = unique(nodes)
        self._reached.append((name, frozenset(map(id, nodes))))
        return self._conjunction(nodes)

    def _conjunction(self, nodes: Conjunction) -> Node:
        """The schema for `nodes`, all of which hold at one place: False, True, a reference or a small schema."""
        nodes = unique(nodes)
        if not nodes:
            self.free_keys = True
            return True
        key = frozenset(map(id, nodes))
        if nodes == (False,) or key in self._hopeless:
            return False
        if key in self._done:
            return self._done[key]
        if key in self._active:
            self._recursive.add(self._active[key])
            return {"$ref": f"#/$defs/{self._active[key]}"}
        name = self._active[key] = f"d{next(self._numbers_used)}"
        place = next((p for n in nodes if (p := self._document.pointer(n))), "")
        written: list[dict[str, Any]] = []
        for facts in self.alternatives.of(nodes):
            written += [s for s in self._facts(facts, key, place) if s not in written]
        del self._active[key]
        result: Node = False if not written else written[0] if len(written) == 1 else {"anyOf": written}
        if result is False and name in self._recursive:
            self._hopeless.add(key)
            raise _Unsatisfiable
        if isinstance(result, dict) and (name in self._recursive or len(json.dumps(result)) > _INLINE):
            self._definitions[name] = result
            result = {"$ref": f"#/$defs/{name}"}
        self._done[key] = result
        return result

    def _facts(self, facts: Facts, key: frozenset[int], place: str) -> list[dict[str, Any]]:
        """One alternative as schemas, split by type where a type needs more than one."""
        if facts.values is not None:
            values = [v for v in facts.values.values() if self.alternatives.fits(facts, v)]
            writable = [v for v in values if _writable(v)]
            if len(writable) < len(values):
                self.note(place, "enum: no values with control characters, which outputs cannot hold")
            if reason := overflow({"enum": writable}):
                raise SchemaError(place, reason)
            return [{"enum": writable}] if writable else []
        scalars = self._scalars(facts, place)
        out = [scalars] if scalars else []
        arrays = write_arrays(self, facts, key, place) if "array" in facts.types else []
        objects = write_objects(self, facts, place) if "object" in facts.types else []
        anything = ([{"type": list(_SCALARS)}], [{"type": "array"}], [{"type": "object"}])
        if not facts.integer and (out, arrays, objects) == anything:
            self.free_keys = True
            return [{}]
        return out + arrays + objects

    def _scalars(self, facts: Facts, place: str) -> dict[str, Any]:
        types = [t for t in _SCALARS if t in facts.types]
        out: dict[str, Any] = {}
        if "number" in types:
            kind = "integer" if facts.integer else "number"
            facts = self._off_whole_bounds(facts, place)
            numbers = _numbers(facts)
            reason = refusal({"type": kind, **numbers})
            if reason and not reason.startswith("Unsatisfiable"):
                # Perhaps the bounds are beyond what the engine can count to.
                numbers = {key: max(value, -_EXACT) if key in _LOWS else min(value, _EXACT) if key in _HIGHS else value
                           for key, value in numbers.items()}
                reason = refusal({"type": kind, **numbers})
                self.note(place, "numbers: only between -2^53 and 2^53")
            if not reason:
                out |= numbers
            elif reason.startswith("Unsatisfiable"):
                types.remove("number")
            else:
                raise SchemaError(place, reason)
        if "string" in types:
            strings = self._strings(facts, place)
            if strings is None:
                types.remove("string")
            else:
                out |= strings
        names = ["integer" if t == "number" and facts.integer else t for t in types]
        return {"type": names if len(names) > 1 else names[0], **out} if names else {}

    def _off_whole_bounds(self, facts: Facts, place: str) -> Facts:
        """For numbers above 0 and up to 0.5, say, the engine takes 0 as well: it does so with a whole bound, where the other is
        less than 1 further from 0. Such ranges begin a little beside the bound."""
        low, high = facts.low, facts.high
        if facts.integer or not low or not high:
            return facts
        facts = facts.copy()
        for name, (bound, exclusive), (other, _) in (("low", low, high), ("high", high, low)):
            if exclusive and bound % 1 == 0 and abs(bound) < abs(other) < abs(bound) + 1 and abs(other - bound) < 1:
                # Not by one step of a double: what is as near as that the engine takes for the bound.
                moved = bound + copysign(max(abs(other - bound) * _INSIDE, 8 * ulp(bound)), other)
                setattr(facts, name, (moved, False))
                self.note(place, f"numbers: only {'from' if name == 'low' else 'up to'} {moved}")
        return facts

    def _strings(self, facts: Facts, place: str) -> dict[str, Any] | None:
        out: dict[str, Any] = {}
        least, most = facts.lengths
        if least:
            out["minLength"] = least
        if most is not None:
            out["maxLength"] = most
        if len(facts.patterns) == 1:
            out["pattern"] = engine_pattern(facts.patterns[0])
        elif facts.patterns:
            out["allOf"] = [{"pattern": engine_pattern(p)} for p in facts.patterns]
        formats = [f for f in facts.formats if f in _FORMATS]
        if len(formats) == 1 and not refusal({"type": "string", **out, "format": formats[0]}):
            return {**out, "format": formats[0]}
        reason = refusal({"type": "string", **out})
        if reason and not reason.startswith("Unsatisfiable"):
            raise SchemaError(place + ("/pattern" if facts.patterns else ""), reason)
        return None if reason else out

    def may_extend(self, facts: Facts) -> bool:
        """Whether an object that lists properties, and says nothing of others, may get others."""
        if self._extra_keys == "auto":
            # Who cites the standard means it: an object that requires nothing then describes what may be there. Without `$schema`
            # a list of properties is the answer that is asked for, and so is what is required.
            return self._document.declared and not facts.required
        return self._extra_keys

    def note(self, place: str, text: str) -> None:
        self._notes[(place, text)] = None


def _writable(value: Any) -> bool:
    """Whether JSON needs no \\u escapes for `value`."""
    return not any(char == "\x7f" or (char < " " and char not in "\b\f\n\r\t") for char in _characters(value))


def _characters(value: Any) -> str:
    """All text in `value`."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return "".join([*value, *map(_characters, value.values())])
    return "".join(map(_characters, value)) if isinstance(value, list) else ""


def _numbers(facts: Facts) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if facts.low:
        out["exclusiveMinimum" if facts.low[1] else "minimum"] = facts.low[0]
    if facts.high:
        out["exclusiveMaximum" if facts.high[1] else "maximum"] = facts.high[0]
    if facts.multiple is not None:
        out["multipleOf"] = int(facts.multiple) if facts.multiple.denominator == 1 else float(facts.multiple)
        if not facts.low:
            out["minimum"] = -_EXACT
        if not facts.high:
            out["maximum"] = _EXACT
    return out
