"""Facts: what one alternative of a schema says about a value, with all its keywords merged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from fractions import Fraction
from math import gcd, lcm
from typing import Any

from engine.guided.dialect import Node
from engine.guided.grammar import SchemaError
from engine.guided.regexes import split_lookaheads
from engine.guided.values import TYPES, canonical, type_of

NUMERIC = int | float


@dataclass(frozen=True)
class ArrayPart:
    """`prefix` and `items` of one subschema; they depend on one another, so parts are kept apart until they are written."""

    prefix: tuple[Node, ...]
    items: Node
    scopes: tuple[object, ...] = ()
    open: bool = True                    # no `items` stood there

    def at(self, index: int) -> Node:
        return self.prefix[index] if index < len(self.prefix) else self.items


@dataclass(frozen=True)
class ObjectPart:
    """`properties`, `patternProperties` and `additionalProperties` of one subschema (None: not given)."""

    properties: dict[str, Node]
    patterns: dict[str, Node]
    additional: Node | None
    scopes: tuple[object, ...] = ()


@dataclass
class Facts:
    """Bounds hold for their own type only, as in JSON Schema. `types` is what is left; empty means that nothing fits."""

    types: frozenset[str] = frozenset(TYPES)
    integer: bool = False
    values: dict[Any, Any] | None = None                       # enum and const: canonical form -> value
    low: tuple[NUMERIC, bool] | None = None                    # (bound, exclusive)
    high: tuple[NUMERIC, bool] | None = None
    multiple: Fraction | None = None
    lengths: tuple[int, int | None] = (0, None)
    patterns: list[str] = field(default_factory=list)
    formats: list[str] = field(default_factory=list)
    arrays: list[ArrayPart] = field(default_factory=list)
    items: tuple[int, int | None] = (0, None)
    unique: bool = False
    contains: list[tuple[Node, int, int | None]] = field(default_factory=list)
    objects: list[ObjectPart] = field(default_factory=list)
    required: dict[str, None] = field(default_factory=dict)
    sizes: tuple[int, int | None] = (0, None)                  # minProperties, maxProperties
    names: list[Node] = field(default_factory=list)            # propertyNames
    unevaluated: list[tuple[object, str, Node, tuple[object, ...]]] = field(default_factory=list)
    trial: bool = False                  # drawn up to see whether nothing fits: may say less than the schema, never more

    def copy(self) -> Facts:
        other = Facts()
        for f in fields(self):
            value = getattr(self, f.name)
            setattr(other, f.name, value.copy() if isinstance(value, (list, dict)) else value)
        return other

    def known_names(self) -> dict[str, None]:
        names = {name: None for part in self.objects for name in part.properties}
        return names | self.required

    def merge(self, words: dict[str, Any], scopes: tuple[object, ...] = ()) -> None:
        """Add the keywords of one subschema, in 2020-12; those that hold other schemas in place are the caller's."""
        if "type" in words:
            names = words["type"] if isinstance(words["type"], list) else [words["type"]]
            if "integer" in names and "number" not in names:
                self.integer = True
            self.types &= {"number" if name == "integer" else name for name in names}
        if "const" in words:
            self._keep_values([words["const"]])
        if "enum" in words:
            self._keep_values(words["enum"])
        self._merge_numbers(words)
        self.lengths = _narrow(self.lengths, words.get("minLength"), words.get("maxLength"))
        if "pattern" in words:
            self.patterns.extend(p for p in split_lookaheads(words["pattern"]) if p not in self.patterns)
        if isinstance(words.get("format"), str) and words["format"] not in self.formats:
            self.formats.append(words["format"])
        self._merge_arrays(words, scopes)
        self._merge_objects(words, scopes)
        self._drop_empty()

    def _keep_values(self, values: Iterable[Any]) -> None:
        given = {canonical(value): value for value in values}
        self.values = given if self.values is None else {form: v for form, v in self.values.items() if form in given}
        self.types &= {type_of(v) for v in self.values.values()}

    def _merge_numbers(self, words: dict[str, Any]) -> None:
        for key, exclusive in (("minimum", False), ("exclusiveMinimum", True)):
            if key in words and (self.low is None or (words[key], exclusive) > self.low):
                self.low = (words[key], exclusive)
        for key, exclusive in (("maximum", False), ("exclusiveMaximum", True)):
            if key in words and (self.high is None or (words[key], not exclusive) < (self.high[0], not self.high[1])):
                self.high = (words[key], exclusive)
        if "multipleOf" in words:
            step = Fraction(str(words["multipleOf"]))
            if (old := self.multiple) is not None:
                step = Fraction(lcm(step.numerator, old.numerator), gcd(step.denominator, old.denominator))
            self.multiple = step

    def _merge_arrays(self, words: dict[str, Any], scopes: tuple[object, ...]) -> None:
        self.items = _narrow(self.items, words.get("minItems"), words.get("maxItems"))
        self.unique |= words.get("uniqueItems") is True
        if "prefixItems" in words or "items" in words:
            prefix = tuple(words.get("prefixItems", ()))
            self.arrays.append(ArrayPart(prefix, words.get("items", True), scopes, "items" not in words))
        if "contains" in words:
            self.contains.append((words["contains"], words.get("minContains", 1), words.get("maxContains")))

    def _merge_objects(self, words: dict[str, Any], scopes: tuple[object, ...]) -> None:
        self.required |= dict.fromkeys(words.get("required", ()))
        self.sizes = _narrow(self.sizes, words.get("minProperties"), words.get("maxProperties"))
        if words.keys() & {"properties", "patternProperties", "additionalProperties"}:
            self.objects.append(ObjectPart(words.get("properties", {}), words.get("patternProperties", {}),
                                           words.get("additionalProperties"), scopes))
        if "propertyNames" in words:
            self.names.append(words["propertyNames"])

    def _drop_empty(self) -> None:
        """Types whose bounds leave nothing."""
        if self.low and self.high:
            (low, above), (high, below) = self.low, self.high
            if low > high or (low == high and (above or below)):
                self.types -= {"number"}
        for kind, (least, most) in (("string", self.lengths), ("array", self.items), ("object", self.sizes)):
            if most is not None and least > most:
                self.types -= {kind}
        if "object" in self.types and any(part.properties.get(name) is False for part in self.objects for name in self.required):
            self.types -= {"object"}
        if self.values is not None:
            self.values = {form: v for form, v in self.values.items() if type_of(v) in self.types and self.number_fits(v)}
            self.types &= {type_of(v) for v in self.values.values()}

    def number_fits(self, value: Any) -> bool:
        if type_of(value) != "number":
            return True
        if self.integer and value != int(value):
            return False
        if self.low and (value < self.low[0] or (value == self.low[0] and self.low[1])):
            return False
        if self.high and (value > self.high[0] or (value == self.high[0] and self.high[1])):
            return False
        return self.multiple is None or Fraction(str(value)) % self.multiple == 0

    def settle_unevaluated(self) -> None:
        """Turn `unevaluatedProperties` and `unevaluatedItems` into parts, innermost first, once all else is merged."""
        if self.trial:                                   # another branch that also holds may evaluate more
            self.unevaluated.clear()
        while self.unevaluated:
            scope, keyword, rest, outer = self.unevaluated.pop()
            if keyword == "unevaluatedProperties":
                parts = [p for p in self.objects if scope in p.scopes]
                if all(p.additional is None for p in parts):
                    names: dict[str, Node] = {name: True for p in parts for name in p.properties}
                    patterns: dict[str, Node] = {pattern: True for p in parts for pattern in p.patterns}
                    self.objects.append(ObjectPart(names, patterns, rest, outer))
            else:
                arrays = [p for p in self.arrays if scope in p.scopes]
                if all(p.open for p in arrays):
                    length = max((len(p.prefix) for p in arrays), default=0)
                    self.arrays.append(ArrayPart((True,) * length, rest, outer, open=False))


def _narrow(old: tuple[int, int | None], least: Any, most: Any) -> tuple[int, int | None]:
    low = max(old[0], _count(least, 0))
    high = old[1] if most is None else _count(most, 0) if old[1] is None else min(old[1], _count(most, 0))
    return low, high


def _count(value: Any, default: int) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or value < 0:
        raise SchemaError("", f"{value!r} is not a count")
    return int(value)
