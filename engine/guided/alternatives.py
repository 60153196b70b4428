"""A conjunction of subschemas as a list of alternatives, each free of applicators: the disjunctive form the lowering writes out.

Every alternative implies the conjunction. Where a schema needs a negation that cannot be written, alternatives are missing
(narrower), never added. To prove that two subschemas exclude each other the opposite is needed: on trial, what cannot be written
counts as met.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from engine.guided.dialect import Document, Node
from engine.guided.facts import Facts
from engine.guided.grammar import SchemaError
from engine.guided.negate import all_ways, negate
from engine.guided.regexes import matches
from engine.guided.values import canonical, type_of

_MAX_STEPS = 100_000         # subschemas merged for one document
_MAX_ALTERNATIVES = 1024     # of one conjunction
_MAX_LOOKAHEAD = 3           # levels of required properties and items searched for contradictions

Conjunction = tuple[Node, ...]


@dataclass(frozen=True)
class _Task:
    """A subschema still to be merged. scopes: see ObjectPart."""

    node: Node
    scopes: tuple[object, ...] = ()


@dataclass(frozen=True)
class _Choice:
    """One of `branches` must hold, and for oneOf (exclusive) none of the others; or one of the ways for `negation` to fail."""

    scopes: tuple[object, ...]
    branches: tuple[Conjunction, ...] = ()
    exclusive: bool = False
    negation: Node | None = None


class Alternatives:
    """The alternatives of one document's subschemas. Nodes are told apart by identity, so made-up ones are kept."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self._steps = 0
        self._level = 0
        self._words: dict[int, dict[str, Any]] = {}
        self._negations: dict[tuple[int, tuple[str, ...]], tuple[Node, list[Node]]] = {}
        self._known: dict[frozenset[int], list[Facts]] = {}
        self._empty: dict[frozenset[int], bool] = {}
        self._made: dict[tuple[object, ...], tuple[Node, Any]] = {}

    def of(self, conjunction: Conjunction) -> list[Facts]:
        """Raises SchemaError where there are too many, or where a schema refers to itself without going down."""
        key = frozenset(map(id, conjunction))
        if key not in self._known:
            found: list[Facts] = []
            for facts in self._expand(Facts(), [_Task(node) for node in conjunction], [], set()):
                found.append(facts)
                if len(found) > _MAX_ALTERNATIVES:
                    raise SchemaError(self._place(conjunction), "too many combinations of anyOf, oneOf, not, if and dependencies")
            self._known[key] = found
        return self._known[key]

    def empty(self, conjunction: Conjunction) -> bool:
        """True where nothing fits. False may also mean that a contradiction lies too deep to be seen."""
        if any(node is False for node in conjunction):
            return True
        key = frozenset(map(id, conjunction))
        if key not in self._empty:
            if self._level >= _MAX_LOOKAHEAD:
                return False
            self._empty[key] = False             # while it is worked out: a recursive schema may be finite
            self._level += 1
            try:
                tasks = [_Task(node) for node in conjunction]
                self._empty[key] = next(self._expand(Facts(trial=True), tasks, [], set()), None) is None
            finally:
                self._level -= 1
        return self._empty[key]

    def negated(self, node: Node) -> Node:
        """The schema {"not": node}, the same object each time."""
        return self.made(("not", id(node)), node, {"not": node})

    def made(self, key: tuple[object, ...], keep: Any, node: Node) -> Node:
        """`node`, or the equal one made before under `key`; `keep` stays alive, so that its identity is not given away."""
        return self._made.setdefault(key, (node, keep))[0]

    def property_nodes(self, facts: Facts, name: str) -> Conjunction:
        """All that `facts` says about the property `name`."""
        nodes: list[Node] = []
        for part in facts.objects:
            here = [part.properties[name]] if name in part.properties else []
            here += [schema for pattern, schema in part.patterns.items() if matches(pattern, name)]
            nodes += here or ([part.additional] if part.additional is not None else [])
        if any(self.document.holds(node, name) is False for node in facts.names):
            return (False,)
        return unique(nodes)

    def item_nodes(self, facts: Facts, index: int) -> Conjunction:
        """All that `facts` says about the item at `index`."""
        return unique(part.at(index) for part in facts.arrays)

    def admits(self, conjunction: Conjunction, value: Any) -> bool:
        """Whether `value` fits one of the alternatives."""
        return any(self.fits(facts, value) for facts in self.of(conjunction))

    def fits(self, facts: Facts, value: Any) -> bool:
        kind = type_of(value)
        if kind not in facts.types or (facts.values is not None and canonical(value) not in facts.values):
            return False
        if kind == "number":
            return facts.number_fits(value)
        if kind == "string":
            return _within(len(value), facts.lengths) and all(matches(p, value) for p in facts.patterns)
        if kind == "array":
            return (_within(len(value), facts.items)
                    and all(self.admits(self.item_nodes(facts, i), item) for i, item in enumerate(value))
                    and not (facts.unique and len(set(map(canonical, value))) < len(value))
                    and all(_within(sum(self.admits((node,), item) for item in value), (least, most))
                            for node, least, most in facts.contains))
        if kind == "object":
            return (_within(len(value), facts.sizes) and all(name in value for name in facts.required)
                    and all(self.admits(self.property_nodes(facts, name), item) for name, item in value.items()))
        return True

    def _expand(self, facts: Facts, tasks: list[_Task], choices: list[_Choice], seen: set[object]) -> Iterator[Facts]:
        """Merge `tasks` into `facts`, then branch on the first choice. Takes over its arguments."""
        while tasks:
            task = tasks.pop(0)
            if task.node is True or (id(task.node), task.scopes) in seen:
                continue
            if task.node is False:
                return
            seen.add((id(task.node), task.scopes))
            tasks[:0] = self._merge(facts, task, choices)
            if not facts.types:
                return
        if not choices:
            facts.settle_unevaluated()
            self._drop_contradictions(facts)
            if facts.types:
                yield facts
            return
        choice, *rest = choices
        for option, more in self._options(choice, facts, seen):
            yield from self._expand(facts.copy(), option, more + rest, seen.copy())

    def _merge(self, facts: Facts, task: _Task, choices: list[_Choice]) -> list[_Task]:
        """Merge one subschema's own keywords, note its choices, and return the subschemas that hold at the same place."""
        node, document = task.node, self.document
        assert isinstance(node, dict)
        self._steps += 1
        if self._steps > _MAX_STEPS:
            raise SchemaError(document.pointer(node), "the schema has too many combinations")
        if id(node) not in self._words:
            self._words[id(node)] = document.keywords(node)
        words = self._words[id(node)]
        scopes = task.scopes
        for keyword in ("unevaluatedProperties", "unevaluatedItems"):
            if keyword in words:
                scope = object()
                facts.unevaluated.append((scope, keyword, words[keyword], scopes))
                scopes = (*scopes, scope)
        facts.merge(words, scopes)
        if "anyOf" in words:
            choices.append(_Choice(scopes, tuple((branch,) for branch in words["anyOf"])))
        if "oneOf" in words:
            choices.append(_Choice(scopes, tuple((branch,) for branch in words["oneOf"]), exclusive=True))
        if "not" in words:
            choices.append(_Choice(scopes, negation=words["not"]))
        if "if" in words and ("then" in words or "else" in words):
            branches = ((words["if"], words.get("then", True)), (self.negated(words["if"]), words.get("else", True)))
            choices.append(_Choice(scopes, branches))
        for name, needs in words.get("dependentRequired", {}).items():
            if needs:
                choices.append(_Choice(scopes, self._dependency(node, name, {"required": needs})))
        for name, schema in words.get("dependentSchemas", {}).items():
            choices.append(_Choice(scopes, self._dependency(node, name, schema)))
        nodes = [document.resolve(node, words["$ref"])] if "$ref" in words else []
        return [_Task(n, scopes) for n in [*nodes, *words.get("allOf", ())]]

    def _dependency(self, node: Node, name: str, schema: Node) -> tuple[Conjunction, ...]:
        absent = self.made(("absent", id(node), name), node, {"properties": {name: False}})
        present = self.made(("present", id(node), name), node, {"type": "object", "required": [name]})
        return ((absent,), (present, self.made(("needs", id(node), name, id(schema)), (node, schema), schema)))

    def _options(self, choice: _Choice, facts: Facts, seen: set[object]) -> Iterator[tuple[list[_Task], list[_Choice]]]:
        """The ways to meet a choice that are not refuted at once: (subschemas to merge, choices that come with them)."""
        def tasks(nodes: Iterable[Node], scopes: tuple[object, ...] = ()) -> list[_Task]:
            return [_Task(n, scopes) for n in nodes]

        def viable(*nodes: Node) -> bool:
            trial = facts.copy()
            trial.trial = True
            return next(self._expand(trial, tasks(nodes), [], seen.copy()), None) is not None

        if choice.negation is not None:
            if facts.values is not None and (left := self._failing(choice.negation, facts.values.values())) is not None:
                yield tasks([left]), []
                return
            # What a negation looks at counts as not evaluated: no scopes.
            for node in self._negate(choice.negation, facts):
                if viable(node):
                    yield tasks([node]), []
            if facts.trial and not all_ways(self.document, choice.negation):
                yield [], []
            return
        branches = [branch for branch in choice.branches if viable(*branch)]
        for i, branch in enumerate(branches):
            others = [other for j, other in enumerate(branches) if choice.exclusive and j != i and viable(*branch, *other)]
            yield tasks(branch, choice.scopes), [_Choice((), negation=node) for other in others for node in other]

    def _failing(self, node: Node, values: Iterable[Any]) -> Node | None:
        """The enum of those of `values` that are not valid under `node`; None where that cannot be told."""
        held = [(value, self.document.holds(node, value)) for value in values]
        if any(valid is None for _, valid in held):
            return None
        left = [value for value, valid in held if not valid]
        return self.made(("failing", id(node), json.dumps(left)), node, {"enum": left})

    def _negate(self, node: Node, facts: Facts) -> list[Node]:
        names = tuple(facts.known_names())
        key = (id(node), names)
        if key not in self._negations:
            self._negations[key] = (node, negate(self.document, node, names))
        return self._negations[key][1]

    def _drop_contradictions(self, facts: Facts) -> None:
        """Drop the types whose required parts cannot be."""
        if "object" in facts.types and any(self.empty(self.property_nodes(facts, name)) for name in facts.required):
            facts.types -= {"object"}
        if "array" in facts.types and any(self.empty(self.item_nodes(facts, i)) for i in range(min(facts.items[0], 16))):
            facts.types -= {"array"}

    def _place(self, conjunction: Conjunction) -> str:
        return next((p for node in conjunction if (p := self.document.pointer(node))), "")


def unique(nodes: Iterable[Node]) -> Conjunction:
    """Without True and repetitions, in order; (False,) where one of them is False."""
    kept: dict[int, Node] = {id(node): node for node in nodes if node is not True}
    return (False,) if any(node is False for node in kept.values()) else tuple(kept.values())


def _within(count: int, bounds: tuple[int, int | None]) -> bool:
    return bounds[0] <= count and (bounds[1] is None or count <= bounds[1])
