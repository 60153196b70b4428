"""Lower any JSON Schema to a sound subset in the keywords the grammar engine takes: nothing it lets through is invalid.

Each conjunction of subschemas becomes `anyOf` over its alternatives, with properties and items written out as definitions of
their own, so that references never have siblings and recursion stays finite. What narrows is noted; what cannot be kept is
refused with a JSON pointer, never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import combinations, count, pairwise, permutations
from math import comb, factorial
from typing import Any

from engine.guided.alternatives import Alternatives, Conjunction, unique
from engine.guided.dialect import Document, Node
from engine.guided.distinct import ANY_ARRAY, Unique
from engine.guided.facts import Facts
from engine.guided.grammar import SchemaError
from engine.guided.regexes import can_meet, engine_pattern, literal, matches, refusal
from engine.guided.values import canonical

# Formats are annotations, so only those that help a model to write a good value need be kept.
_FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"}
_ANY_NAME = {"", "^", ".*", "^.*", ".*$"}     # patterns that are found in every property name
_LOWS, _HIGHS = {"minimum", "exclusiveMinimum"}, {"maximum", "exclusiveMaximum"}
_SCALARS = ("null", "boolean", "number", "string")
_EXACT = 2**53            # beyond, readers that take numbers for doubles may not see a multiple as one
_INLINE = 200            # characters up to which a schema is written where it is used
_MAX_ARRAYS = 1500       # of unique items, written out one by one
_MAX_SUBSETS = 256       # of an object's properties, written out one by one
_MAX_SLOTS = 64          # items with schemas of their own
_MAX_NAMES = 4096        # properties of one object: the engine's time to compile grows with the square
_MAX_PATTERNS = 64       # patterns of property names: each is compared with each


@dataclass
class Lowered:
    """schema: in the keywords that llguidance takes. notes: (pointer, what was narrowed).

    distinct: what a grammar cannot say and a Scanner must see to: that keys differ, and the items of the arrays it names. None:
    nothing is left to see to.
    """

    schema: dict[str, Any]
    distinct: Unique | None = None
    notes: list[tuple[str, str]] = field(default_factory=list)


def lower(schema: Node, close_objects: bool = True) -> Lowered:
    """Raises SchemaError for what cannot be kept.

    close_objects: an object that lists properties and says nothing of others gets no others. Valid outputs are lost that way, but
    the model is not tempted to go on, and the end of the object is forced.
    """
    document = Document(schema)
    document.check_work()
    return _Writer(document, close_objects).write()


class _Unsatisfiable(Exception):
    """A definition that recursion relied on turned out to be empty: start again, knowing it."""


class _Writer:
    def __init__(self, document: Document, close_objects: bool) -> None:
        self._document, self._close = document, close_objects
        self._alternatives = Alternatives(document)
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
            self._unique: dict[frozenset[int], list[Any] | None] = {}
            self._reached: list[tuple[str, frozenset[int]]] = [("", frozenset([id(self._document.root)]))]
            self._free_keys = False
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
            if key in self._unique:
                items.setdefault(name, []).append(self._unique[key])
        distinct: Unique = {name: None if None in lists else tuple(
            json.dumps(value, ensure_ascii=False).encode() for values in lists for value in values or ())
            for name, lists in items.items()}
        return Lowered(schema, distinct if distinct or self._free_keys else None, list(self._notes))

    def _child(self, nodes: Conjunction, name: str = ANY_ARRAY) -> Node:
        """The schema of a property or item; `name`: of the property."""
        nodes = unique(nodes)
        self._reached.append((name, frozenset(map(id, nodes))))
        return self._conjunction(nodes)

    def _conjunction(self, nodes: Conjunction) -> Node:
        """The schema for `nodes`, all of which hold at one place: False, True, a reference or a small schema."""
        nodes = unique(nodes)
        if not nodes:
            self._free_keys = True
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
        for facts in self._alternatives.of(nodes):
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
            values = [v for v in facts.values.values() if self._alternatives.fits(facts, v)]
            return [{"enum": values}] if values else []
        out = []
        scalars = self._scalars(facts, place)
        if scalars:
            out.append(scalars)
        arrays = self._arrays(facts, key, place) if "array" in facts.types else []
        objects = self._objects(facts, place) if "object" in facts.types else []
        anything = ([{"type": list(_SCALARS)}], [{"type": "array"}], [{"type": "object"}])
        if not facts.integer and (out, arrays, objects) == anything:
            self._free_keys = True
            return [{}]
        return out + arrays + objects

    def _scalars(self, facts: Facts, place: str) -> dict[str, Any]:
        types = [t for t in _SCALARS if t in facts.types]
        out: dict[str, Any] = {}
        if "number" in types:
            kind = "integer" if facts.integer else "number"
            numbers = _numbers(facts)
            reason = refusal({"type": kind, **numbers})
            if reason and not reason.startswith("Unsatisfiable"):
                # Perhaps the bounds are beyond what the engine can count to.
                numbers = {key: max(value, -_EXACT) if key in _LOWS else min(value, _EXACT) if key in _HIGHS else value
                           for key, value in numbers.items()}
                reason = refusal({"type": kind, **numbers})
                self._note(place, "numbers: only between -2^53 and 2^53")
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

    # Arrays

    def _arrays(self, facts: Facts, key: frozenset[int], place: str) -> list[dict[str, Any]]:
        least, most = facts.items
        slots = max((len(part.prefix) for part in facts.arrays), default=0)
        extra: dict[int, list[Node]] = {}
        rest_extra: list[Node] = []
        wanted = [c for c in facts.contains if c[1] > 0 or c[2] is not None]
        filled = 0
        for node, at_least, at_most in wanted:
            for i in range(filled, filled + at_least):
                extra.setdefault(i, []).append(node)
            filled += at_least
            if at_most is not None:
                if len(wanted) > 1:
                    raise SchemaError(place, "maxContains beside another contains cannot be kept")
                refused = self._alternatives.negated(node)
                for i in range(at_most, max(slots, at_most)):
                    extra.setdefault(i, []).append(refused)
                rest_extra.append(refused)
                slots = max(slots, at_most)
            self._note(place, "contains: the first items are the ones that match")
        slots, least = max(slots, filled), max(least, filled)
        if slots > _MAX_SLOTS:
            raise SchemaError(place, f"more than {_MAX_SLOTS} items with schemas of their own")
        prefix: list[Node] = []
        for i in range(slots):
            item = self._child((*self._alternatives.item_nodes(facts, i), *extra.get(i, ())))
            if item is False:
                most = i if most is None else min(most, i)
                break
            prefix.append(item)
        rest_nodes = unique((*self._alternatives.item_nodes(facts, 1 << 30), *rest_extra))
        rest = self._child(rest_nodes) if most is None or most > len(prefix) else False
        if rest is False:
            most = len(prefix) if most is None else min(most, len(prefix))
        if most is not None and most < least:
            return []
        prefix = prefix[:most]
        if facts.unique and (most is None or most > 1):
            return self._unique_items(key, prefix, rest, rest_nodes, least, most, place)
        return [_array(prefix, rest, least, most)]

    def _unique_items(self, key: frozenset[int], prefix: list[Node], rest: Node, rest_nodes: Conjunction, least: int,
                      most: int | None, place: str) -> list[dict[str, Any]]:
        """Arrays whose items differ: by construction where they must be many of a few values, else the Scanner sees to it."""
        values = self._finite(rest_nodes) if not prefix and rest_nodes else None
        if values is None or least <= 1:
            before = self._unique.get(key, [])
            self._unique[key] = None if values is None or before is None else before + values
            if values is not None:
                most = len(values) if most is None else min(most, len(values))
            return [_array(prefix, rest, least, most)]
        most = len(values) if most is None else min(most, len(values))
        if least > most:
            return []
        if sum(comb(len(values), n) * factorial(n) for n in range(least, most + 1)) <= _MAX_ARRAYS // 4:
            arrays = [list(p) for n in range(least, most + 1) for p in permutations(values, n)]
            return [{"enum": arrays}]
        self._note(place, "uniqueItems: items stand in the order of the enum")
        arrays, written = [], []
        for n in range(least, most + 1):
            if len(arrays) + comb(len(values), n) > _MAX_ARRAYS:
                break
            arrays += [list(c) for c in combinations(values, n)]
        else:
            return [{"enum": arrays}]
        if arrays:
            written.append({"enum": arrays})
            self._note(place, f"uniqueItems: any {len(arrays[-1])} items; more only one from each part of the enum")
        # Longer arrays: one value from each of as many contiguous groups as there may be items.
        slots = min(most, max(least, 8))
        cuts = [len(values) * i // slots for i in range(slots + 1)]
        groups: list[Node] = [{"enum": values[a:b]} for a, b in pairwise(cuts)]
        return [*written, _array(groups, False, least, slots)]

    def _finite(self, nodes: Conjunction) -> list[Any] | None:
        """All values that fit, where they are finitely many."""
        values: dict[Any, Any] = {}
        for facts in self._alternatives.of(nodes):
            if facts.values is not None:
                found = [v for v in facts.values.values() if self._alternatives.fits(facts, v)]
            elif facts.types <= {"null", "boolean"}:
                found = [v for v in (None, False, True) if self._alternatives.fits(facts, v)]
            elif facts.types == {"number"} and facts.integer and facts.low and facts.high and facts.high[0] - facts.low[0] <= 64:
                found = [v for v in range(int(facts.low[0]) - 1, int(facts.high[0]) + 2) if facts.number_fits(v)]
            else:
                return None
            values |= {canonical(v): v for v in found}
        return list(values.values())

    # Objects

    def _objects(self, facts: Facts, place: str) -> list[dict[str, Any]]:
        names = facts.known_names()
        if len(names) > _MAX_NAMES:
            raise SchemaError(place, f"more than {_MAX_NAMES} properties in one object")
        properties: dict[str, Node] = {}
        for name in names:
            properties[name] = self._child(self._alternatives.property_nodes(facts, name), name)
            if properties[name] is False and name in facts.required:
                return []
        patterns, rest = self._free(facts, place)
        if facts.names:
            patterns, rest = self._named(facts, patterns, rest, properties, place)
        declared = [name for name, child in properties.items() if child is not False]
        listed = any(node is not False for part in facts.objects for node in [*part.properties.values(), *part.patterns.values()])
        unsaid = all(part.additional is None for part in facts.objects)
        least, most = facts.sizes
        if self._close and listed and unsaid and least <= len(declared):
            rest = (False,)
        free, additional = self._settle_patterns(patterns, rest, declared, properties, place)
        optional = [name for name in declared if name not in facts.required]
        needed = len(declared) - len(optional)
        if most is not None and (free or additional is not False) and len(declared) < len(properties) + len(optional):
            # The engine counts properties only where all that it knows by name are required.
            self._note(place, "maxProperties: no properties but those listed")
            free, additional = {}, False
        if additional is False and not free:
            if least > len(declared):
                return []
            most = None if most is None or most >= len(declared) else most
        if most is not None and needed > most:
            return []
        if least <= needed:
            least = 0
        self._free_keys |= bool(free) or additional is not False
        base = {"properties": properties, "patternProperties": free, "additionalProperties": additional}
        required = [name for name in declared if name in facts.required]
        if not optional or (not least and most is None):
            return [_object(base, required, least, most)]
        written: list[dict[str, Any]] = []
        for kept, must in _subsets(optional, max(0, least - needed), None if most is None else most - needed):
            if len(written) >= _MAX_SUBSETS:
                self._note(place, f"minProperties, maxProperties: only {_MAX_SUBSETS} of the possible sets of properties")
                break
            some = {n: child for n, child in properties.items() if n in kept or n not in optional}
            written.append(_object({**base, "properties": some}, [n for n in declared if n in must or n in facts.required]))
        return written

    def _free(self, facts: Facts, place: str) -> tuple[dict[str, Conjunction], Conjunction]:
        """What holds for properties that are not listed: by pattern (no key matches two of them), and for all others."""
        parts = facts.objects
        patterns: dict[str, Conjunction] = {}
        if sum(len(part.patterns) for part in parts) > _MAX_PATTERNS:
            raise SchemaError(place, f"more than {_MAX_PATTERNS} patterns of property names in one object")
        for pattern in dict.fromkeys(pattern for part in parts for pattern in part.patterns):
            reason = refusal({"type": "string", "pattern": engine_pattern(pattern)})
            if reason.startswith("Unsatisfiable"):
                continue
            if reason:
                raise SchemaError(f"{place}/patternProperties", reason)
            here = [p.patterns.get(pattern, p.additional) for p in parts]
            nodes = unique(node for node in here if node is not None)
            for other in [o for o in patterns if can_meet(pattern, o)]:
                # The engine wants disjoint patterns. Keys that match either get what both say.
                self._note(place, f"patternProperties: keys like {pattern!r} and {other!r} must fit both")
                nodes = unique((*patterns.pop(other), *nodes))
                pattern = ".*" if {pattern, other} & _ANY_NAME else f"(?:{other})|(?:{pattern})"
            patterns[pattern] = nodes
        return patterns, unique(part.additional for part in parts if part.additional is not None)

    def _settle_patterns(self, patterns: dict[str, Conjunction], rest: Conjunction, declared: list[str],
                         properties: dict[str, Node], place: str) -> tuple[dict[str, Node], Node]:
        free: dict[str, Node] = {}
        additional = self._child(rest)
        for pattern, nodes in patterns.items():
            child = self._child(nodes)
            if pattern in _ANY_NAME:
                additional = child
            elif child is False and additional is False:
                continue
            elif "$ref" in json.dumps([child, *(properties[n] for n in declared if matches(pattern, n))]) and any(
                    matches(pattern, n) for n in declared):
                # The engine would intersect the references of both, which it cannot do where they are recursive.
                self._note(place, f"patternProperties: no keys by {pattern!r} beside the listed properties")
                free, additional = {}, False
                break
            else:
                free[engine_pattern(pattern)] = child
        return free, additional

    def _named(self, facts: Facts, patterns: dict[str, Conjunction], rest: Conjunction, properties: dict[str, Node],
               place: str) -> tuple[dict[str, Conjunction], Conjunction]:
        """Properties that are not listed, where their names must fit `propertyNames`; those an enum names join `properties`."""
        options = [f for f in self._alternatives.of(tuple(facts.names)) if "string" in f.types]
        if all(f.values is not None for f in options):
            for name in (v for f in options for v in (f.values or {}).values() if isinstance(v, str) and v not in properties):
                properties[name] = self._child(self._alternatives.property_nodes(facts, name), name)
            return {}, (False,)
        if any(f.values is None and not f.patterns and f.lengths == (0, None) for f in options):
            return patterns, rest
        names = [_name_pattern(f) for f in options]
        if None in names:
            self._note(place, "propertyNames: no properties but those listed")
            return {}, (False,)
        pattern = "|".join(f"(?:{n})" for n in names) if len(names) > 1 else str(names[0])
        if pattern in patterns:
            return {pattern: patterns[pattern]}, (False,)
        if reason := refusal({"type": "string", "pattern": engine_pattern(pattern)}):
            raise SchemaError(f"{place}/propertyNames", reason)
        if patterns:
            self._note(place, "propertyNames: keys must fit all of patternProperties as well")
        met = [node for other, nodes in patterns.items() if can_meet(pattern, other) for node in nodes]
        return {pattern: unique((*rest, *met))}, (False,)

    def _note(self, place: str, text: str) -> None:
        self._notes[(place, text)] = None


def _name_pattern(facts: Facts) -> str | None:
    """One pattern for the strings that fit, or None."""
    least, most = facts.lengths
    if facts.values is not None:
        return literal([v for v in facts.values.values() if isinstance(v, str)])
    if len(facts.patterns) == 1 and facts.lengths == (0, None):
        return facts.patterns[0]
    return None if facts.patterns else f"^[\\s\\S]{{{least},{'' if most is None else most}}}$"


def _subsets(names: list[str], least: int, most: int | None) -> Iterator[tuple[Collection[str], Collection[str]]]:
    """(names that may stand, names that must), so that at least `least` and at most `most` do."""
    for kept in [tuple(names)] if most is None else combinations(names, min(most, len(names))):
        for must in combinations(kept, least):
            yield kept, must


def _object(words: dict[str, Any], required: list[str], least: int = 0, most: int | None = None) -> dict[str, Any]:
    closed = words["additionalProperties"] is False and not words["patternProperties"]
    properties = {name: child for name, child in words["properties"].items() if not closed or child is not False}
    out: dict[str, Any] = {"type": "object"}
    if properties:
        out["properties"] = properties
    if words["patternProperties"]:
        out["patternProperties"] = words["patternProperties"]
    if words["additionalProperties"] not in (True, {}):
        out["additionalProperties"] = words["additionalProperties"]
    if required:
        out["required"] = required
    return out | _bounds("Properties", least, most)


def _array(prefix: list[Node], rest: Node, least: int, most: int | None) -> dict[str, Any]:
    out: dict[str, Any] = {"type": "array"}
    if prefix:
        out["prefixItems"] = prefix
    if rest is False or (most is not None and most <= len(prefix)):
        return {**out, "items": False, **_bounds("Items", least, None if most is None or most >= len(prefix) else most)}
    if rest not in (True, {}):
        out["items"] = rest
    return out | _bounds("Items", least, most)


def _bounds(what: str, least: int, most: int | None) -> dict[str, int]:
    return ({f"min{what}": least} if least else {}) | ({f"max{what}": most} if most is not None else {})


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
