"""Lowering of objects: names, patterns of names, how many there are, and whether others may come."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from itertools import combinations
from typing import TYPE_CHECKING, Any

from engine.guided.alternatives import Conjunction, unique
from engine.guided.dialect import Node
from engine.guided.facts import Facts
from engine.guided.grammar import SchemaError
from engine.guided.regexes import can_meet, engine_pattern, literal, matches, refusal

if TYPE_CHECKING:
    from engine.guided.lower import Writer

_ANY_NAME = {"", "^", ".*", "^.*", ".*$"}     # patterns that are found in every property name
_MAX_SUBSETS = 256       # of an object's properties, written out one by one
_MAX_NAMES = 4096        # properties of one object: the engine's time to compile grows with the square
_MAX_PATTERNS = 64       # patterns of property names: each is compared with each


def write_objects(writer: Writer, facts: Facts, place: str) -> list[dict[str, Any]]:
    """The objects that fit `facts`, as schemas in any of which they fit."""
    names = facts.known_names()
    if len(names) > _MAX_NAMES:
        raise SchemaError(place, f"more than {_MAX_NAMES} properties in one object")
    properties: dict[str, Node] = {}
    for name in names:
        properties[name] = writer.child(writer.alternatives.property_nodes(facts, name), name)
        if properties[name] is False and name in facts.required:
            return []
    patterns, rest = _free(writer, facts, place)
    if facts.names:
        patterns, rest = _named(writer, facts, patterns, rest, properties, place)
    declared = [name for name, child in properties.items() if child is not False]
    listed = any(node is not False for part in facts.objects for node in [*part.properties.values(), *part.patterns.values()])
    unsaid = all(part.additional is None for part in facts.objects)
    least, most = facts.sizes
    if listed and unsaid and not writer.may_extend(facts) and least <= len(declared):
        rest = (False,)
    free, additional = _settle_patterns(writer, patterns, rest, declared, properties, place)
    optional = [name for name in declared if name not in facts.required]
    needed = len(declared) - len(optional)
    if most is not None and (free or additional is not False) and (optional or len(declared) < len(properties)):
        # The engine counts properties only where all that it knows by name are required.
        writer.note(place, "maxProperties: no properties but those listed")
        free, additional = {}, False
    if additional is False and not free:
        if least > len(declared):
            return []
        most = None if most is None or most >= len(declared) else most
    if most is not None and needed > most:
        return []
    if least <= needed:
        least = 0
    writer.free_keys |= bool(free) or additional is not False
    words = {"properties": properties, "patternProperties": free, "additionalProperties": additional}
    required = [name for name in declared if name in facts.required]
    if not optional or (not least and most is None):
        return [_object(words, required, least, most)]
    if least > len(declared):
        return [_object(words, declared, least)]          # others make up the number
    written: list[dict[str, Any]] = []
    for kept, must in _subsets(optional, max(0, least - needed), None if most is None else most - needed):
        if len(written) >= _MAX_SUBSETS:
            writer.note(place, f"minProperties, maxProperties: only {_MAX_SUBSETS} of the possible sets of properties")
            break
        some = {n: child for n, child in properties.items() if n in kept or n not in optional}
        written.append(_object({**words, "properties": some}, [n for n in declared if n in must or n in facts.required]))
    return written


def _free(writer: Writer, facts: Facts, place: str) -> tuple[dict[str, Conjunction], Conjunction]:
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
            writer.note(place, f"patternProperties: keys like {pattern!r} and {other!r} must fit both")
            nodes = unique((*patterns.pop(other), *nodes))
            pattern = ".*" if {pattern, other} & _ANY_NAME else f"(?:{other})|(?:{pattern})"
        patterns[pattern] = nodes
    return patterns, unique(part.additional for part in parts if part.additional is not None)


def _settle_patterns(writer: Writer, patterns: dict[str, Conjunction], rest: Conjunction, declared: list[str],
                     properties: dict[str, Node], place: str) -> tuple[dict[str, Node], Node]:
    """The schemas to write under patternProperties, and under additionalProperties."""
    free: dict[str, Node] = {}
    additional = writer.child(rest)
    for pattern, nodes in patterns.items():
        child = writer.child(nodes)
        met = [properties[name] for name in declared if matches(pattern, name)]
        if pattern in _ANY_NAME:
            additional = child
        elif child is False and additional is False:
            continue
        elif met and "$ref" in json.dumps([child, *met]):
            # The engine would intersect the references of both, which it cannot do where they are recursive.
            writer.note(place, f"patternProperties: no keys by {pattern!r} beside the listed properties")
            free, additional = {}, False
            break
        else:
            free[engine_pattern(pattern)] = child
    return free, additional


def _named(writer: Writer, facts: Facts, patterns: dict[str, Conjunction], rest: Conjunction, properties: dict[str, Node],
           place: str) -> tuple[dict[str, Conjunction], Conjunction]:
    """Properties that are not listed, where their names must fit `propertyNames`; those an enum names join `properties`."""
    options = [f for f in writer.alternatives.of(tuple(facts.names)) if "string" in f.types]
    if all(f.values is not None for f in options):
        for name in (v for f in options for v in (f.values or {}).values() if isinstance(v, str) and v not in properties):
            properties[name] = writer.child(writer.alternatives.property_nodes(facts, name), name)
        return {}, (False,)
    if any(f.values is None and not f.patterns and f.lengths == (0, None) for f in options):
        return patterns, rest
    names = [_name_pattern(f) for f in options]
    if None in names:
        writer.note(place, "propertyNames: no properties but those listed")
        return {}, (False,)
    pattern = "|".join(f"(?:{n})" for n in names) if len(names) > 1 else str(names[0])
    if pattern in patterns:
        return {pattern: patterns[pattern]}, (False,)
    if reason := refusal({"type": "string", "pattern": engine_pattern(pattern)}):
        raise SchemaError(f"{place}/propertyNames", reason)
    if patterns:
        writer.note(place, "propertyNames: keys must fit all of patternProperties as well")
    met = [node for other, nodes in patterns.items() if can_meet(pattern, other) for node in nodes]
    return {pattern: unique((*rest, *met))}, (False,)


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
    if least:
        out["minProperties"] = least
    if most is not None:
        out["maxProperties"] = most
    return out
