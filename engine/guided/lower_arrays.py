"""Lowering of arrays: `contains` becomes leading items that match, unique items are left to a Scanner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine.guided.alternatives import Conjunction, unique
from engine.guided.dialect import Node
from engine.guided.facts import Facts
from engine.guided.grammar import SchemaError
from engine.guided.values import canonical

if TYPE_CHECKING:
    from engine.guided.lower import Writer

_MAX_SLOTS = 64          # items with schemas of their own
_MAX_VALUES = 64         # integers in a range that counts as an enum
_REST = 1 << 30          # an index beyond all items with schemas of their own


def write_arrays(writer: Writer, facts: Facts, key: frozenset[int], place: str) -> list[dict[str, Any]]:
    """The arrays that fit `facts`, as no schema or one. key: of the conjunction they are written for."""
    least, most = facts.items
    slots = max((len(part.prefix) for part in facts.arrays), default=0)
    extra: dict[int, list[Node]] = {}
    rest_extra: list[Node] = []
    wanted = [c for c in facts.contains if c[1] > 0 or c[2] is not None]
    filled = 0
    for node, at_least, at_most in wanted:
        if at_most is not None and at_most < at_least:
            return []
        if max(filled + at_least, at_most or 0) > _MAX_SLOTS:
            raise SchemaError(place, f"more than {_MAX_SLOTS} items with schemas of their own")
        for i in range(filled, filled + at_least):
            extra.setdefault(i, []).append(node)
        filled += at_least
        if at_most is not None:
            if len(wanted) > 1:
                raise SchemaError(place, "maxContains beside another contains cannot be kept")
            refused = writer.alternatives.negated(node)
            for i in range(at_most, max(slots, at_most)):
                extra.setdefault(i, []).append(refused)
            rest_extra.append(refused)
            slots = max(slots, at_most)
        writer.note(place, "contains: the first items are the ones that match")
    slots, least = max(slots, filled), max(least, filled)
    if slots > _MAX_SLOTS:
        raise SchemaError(place, f"more than {_MAX_SLOTS} items with schemas of their own")
    prefix: list[Node] = []
    for i in range(slots):
        item = writer.child((*writer.alternatives.item_nodes(facts, i), *extra.get(i, ())))
        if item is False:
            most = i if most is None else min(most, i)
            break
        prefix.append(item)
    rest_nodes = unique((*writer.alternatives.item_nodes(facts, _REST), *rest_extra))
    rest = writer.child(rest_nodes) if most is None or most > len(prefix) else False
    if rest is False:
        most = len(prefix) if most is None else min(most, len(prefix))
    if most is not None and most < least:
        return []
    prefix = prefix[:most]
    if facts.unique and (most is None or most > 1):
        values = _finite(writer, rest_nodes) if not prefix and rest_nodes else None
        before = writer.unique_items.get(key, [])
        writer.unique_items[key] = None if values is None or before is None else before + values
        if values is not None:
            most = len(values) if most is None else min(most, len(values))
            if least > most:
                return []
    return [_array(prefix, rest, least, most)]


def _finite(writer: Writer, nodes: Conjunction) -> list[Any] | None:
    """All values that fit, where they are finitely many."""
    values: dict[Any, Any] = {}
    for facts in writer.alternatives.of(nodes):
        if facts.values is not None:
            found = [v for v in facts.values.values() if writer.alternatives.fits(facts, v)]
        elif facts.types <= {"null", "boolean"}:
            found = [v for v in (None, False, True) if writer.alternatives.fits(facts, v)]
        elif facts.types == {"number"} and facts.integer and facts.low and facts.high:
            first, last = int(facts.low[0]) - 1, int(facts.high[0]) + 1
            if last - first > _MAX_VALUES:
                return None
            found = [v for v in range(first, last + 1) if facts.number_fits(v)]
        else:
            return None
        values |= {canonical(v): v for v in found}
    return list(values.values())


def _array(prefix: list[Node], rest: Node, least: int, most: int | None) -> dict[str, Any]:
    out: dict[str, Any] = {"type": "array"}
    if prefix:
        out["prefixItems"] = prefix
    if rest is False or (most is not None and most <= len(prefix)):
        return {**out, "items": False, **_bounds(least, None if most is None or most >= len(prefix) else most)}
    if rest not in (True, {}):
        out["items"] = rest
    return out | _bounds(least, most)


def _bounds(least: int, most: int | None) -> dict[str, int]:
    return ({"minItems": least} if least else {}) | ({"maxItems": most} if most is not None else {})
