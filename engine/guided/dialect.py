"""A schema document: which draft it speaks, where its references lead, and each subschema in the words of 2020-12."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote, urldefrag, urljoin

import jsonschema_rs

from engine.guided.grammar import SchemaError

Node = dict[str, Any] | bool        # a JSON Schema: an object or a boolean

# Oldest first; a schema without $schema speaks the newest draft whose meta-schema accepts it.
_DRAFTS = {
    4: "http://json-schema.org/draft-04/schema#",
    6: "http://json-schema.org/draft-06/schema#",
    7: "http://json-schema.org/draft-07/schema#",
    2019: "https://json-schema.org/draft/2019-09/schema",
    2020: "https://json-schema.org/draft/2020-12/schema",
}
_BY_URI = {uri.partition("://")[2].rstrip("#"): draft for draft, uri in _DRAFTS.items()}

_MAX_WORK = 10_000       # subschemas applied to one value
_MAX_WALK = 1000         # levels of JSON: the engine stands some thousands
_PATTERN_BYTES = 32 << 20      # of the patterns of a schema, compiled: a name in any alphabet of at most 100 letters takes 8 MB
_WHOLE = "json-schema:///document"      # the document itself, in the registry of its validators

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minContains", "maxContains", "minProperties", "maxProperties")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SINGLE = ("additionalProperties", "items", "additionalItems", "not", "if", "then", "else", "contains", "propertyNames",
           "unevaluatedItems", "unevaluatedProperties", "contentSchema")


@dataclass(frozen=True)
class Dialect:
    """draft: 4, 6, 7, 2019 or 2020. schema: the document with `$schema` written out, so that any validator agrees."""

    draft: int
    schema: Node

    @classmethod
    def of(cls, schema: Node) -> Dialect:
        """Find the draft and check the schema against its meta-schema. Raises SchemaError."""
        if isinstance(schema, bool):
            return cls(2020, schema)
        named = schema.get("$schema")
        if named is None:
            candidates = sorted(_DRAFTS, reverse=True)
        elif isinstance(named, str) and (draft := _BY_URI.get(named.partition("://")[2].rstrip("#"))):
            candidates = [draft]
        else:
            raise SchemaError("/$schema", f"{named!r} is not a known draft: use {_DRAFTS[2020]!r} or drafts 04 to 2019-09")
        errors = {}
        for draft in candidates:
            whole = {**schema, "$schema": _DRAFTS[draft]}
            try:
                jsonschema_rs.meta.validate(whole)
                return cls(draft, whole)
            except jsonschema_rs.ValidationError as error:
                errors[draft] = error
        first = errors[candidates[0]]
        pointer = "".join(f"/{part}" for part in first.instance_path)
        raise SchemaError(pointer, f"not a JSON Schema: {first.message}")


def pattern_options(schema: Node) -> jsonschema_rs.FancyRegexOptions:
    """Limits for the patterns of `schema`: twenty bytes make one of megabytes, and a schema may hold thousands."""
    patterns, stack = 0, [schema]
    while stack:
        node: Any = stack.pop()
        if isinstance(node, dict):
            named = node.get("patternProperties")
            patterns += isinstance(node.get("pattern"), str) + (len(named) if isinstance(named, dict) else 0)
        stack.extend(node.values() if isinstance(node, dict) else node if isinstance(node, list) else ())
    return jsonschema_rs.FancyRegexOptions(size_limit=_PATTERN_BYTES // max(1, patterns))


class Document:
    """A schema with its references resolved on demand. Subschemas are told apart by identity: they are never copied.

    declared: the schema names its draft itself, with `$schema`.
    """

    def __init__(self, schema: Node) -> None:
        try:
            own: Node = json.loads(json.dumps(schema, allow_nan=False).encode())
        except (TypeError, ValueError, RecursionError) as error:
            raise SchemaError("", f"the schema is not JSON: {error}") from None
        dialect = Dialect.of(own)
        self.draft, self.root = dialect.draft, dialect.schema
        self.declared = isinstance(own, dict) and "$schema" in own
        self._pointers: dict[int, str] = {}
        self._bases: dict[int, str] = {}
        self._targets: dict[str, Node] = {"": self.root}
        self._validators: dict[int, Any] = {}
        self._registry: Any = None
        self._pattern_options = pattern_options(self.root)
        self._dynamic: dict[str, list[Node]] = {}
        self._index(self.root, "", "")

    def pointer(self, node: Node) -> str:
        """Where `node` stands; empty for one that was made up."""
        return self._pointers.get(id(node), "")

    def _index(self, node: Any, pointer: str, base: str) -> None:
        """Note places, identifiers and anchors of `node` and what lies below it."""
        stack = [(node, pointer, base)]
        while stack:
            node, pointer, base = stack.pop()
            if not isinstance(node, dict) or id(node) in self._pointers:
                continue
            self._pointers[id(node)] = pointer
            name = node.get("id" if self.draft == 4 else "$id")
            if isinstance(name, str) and not (self.draft <= 7 and "$ref" in node):
                if name.startswith("#"):
                    self._targets[base + name] = node
                else:
                    base = urljoin(base, name).rstrip("#")
                    self._targets.setdefault(base, node)
            for keyword in ("$anchor", "$dynamicAnchor"):
                if isinstance(anchor := node.get(keyword), str):
                    self._targets[f"{base}#{anchor}"] = node
                    if keyword == "$dynamicAnchor":
                        self._dynamic.setdefault(anchor, []).append(node)
            self._bases[id(node)] = base
            for key in _MAPS:
                if isinstance(children := node.get(key), dict):
                    stack.extend((child, f"{pointer}/{key}/{_escape(name)}", base) for name, child in children.items())
            for key in _LISTS:
                if isinstance(children := node.get(key), list):
                    stack.extend((child, f"{pointer}/{key}/{i}", base) for i, child in enumerate(children))
            stack.extend((node[key], f"{pointer}/{key}", base) for key in _SINGLE if key in node)

    def resolve(self, node: dict[str, Any], ref: str) -> Node:
        """The schema that `ref`, standing in `node`, leads to. Raises SchemaError where it leads out of the document."""
        where = self.pointer(node) + "/$ref"
        base = self._bases.get(id(node), "")
        url, fragment = urldefrag(base + ref if ref.startswith("#") else urljoin(base, ref))
        url = url.rstrip("#")
        if fragment and not fragment.startswith("/"):
            target = self._targets.get(f"{url}#{unquote(fragment)}")
        else:
            target = self._targets.get(url)
        if target is None:
            raise SchemaError(where, f"{ref!r} is not in this document: put what it means into $defs")
        if fragment.startswith("/"):
            found: Any = target
            pointer = self.pointer(target)
            for part in unquote(fragment)[1:].split("/"):
                part = part.replace("~1", "/").replace("~0", "~")
                if isinstance(found, list) and part.isdigit() and int(part) < len(found):
                    found = found[int(part)]
                elif isinstance(found, dict) and part in found:
                    found = found[part]
                else:
                    raise SchemaError(where, f"{ref!r} leads nowhere")
                pointer += f"/{_escape(part)}"
            if not isinstance(found, (dict, bool)):
                raise SchemaError(where, f"{ref!r} does not lead to a schema")
            target = found
            self._index(target, pointer, self._bases.get(id(target), url))
        return target

    def keywords(self, node: dict[str, Any]) -> dict[str, Any]:
        """One subschema in the words of 2020-12. Keywords newer than the draft count: their authors meant them."""
        words = dict(node)
        if isinstance(words.get("$ref"), str) and self.draft <= 7:
            return {"$ref": words["$ref"]}               # what stands beside it has no meaning in these drafts
        for name in _COUNTS:
            if isinstance(words.get(name), float):
                words[name] = int(words[name])           # 2.0 is an integer too
        for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
            if isinstance(words.get(exclusive), bool) and words.pop(exclusive) and bound in words:   # draft 04
                words[exclusive] = words.pop(bound)
        if isinstance(words.get("items"), list):
            words["prefixItems"] = words.pop("items")
            if "additionalItems" in words:
                words["items"] = words["additionalItems"]
        for name, needs in words.pop("dependencies", {}).items():
            keyword = "dependentRequired" if isinstance(needs, list) else "dependentSchemas"
            words[keyword] = {**words.get(keyword, {}), name: needs}
        if "$recursiveRef" in words:
            if any("$recursiveAnchor" in n for n in self._nodes()):
                raise SchemaError(self.pointer(node) + "/$recursiveRef", "$recursiveAnchor is not supported: use $ref")
            words["allOf"] = [*words.get("allOf", []), self.resolve(node, words.pop("$recursiveRef"))]
        if "$dynamicRef" in words:
            words["allOf"] = [*words.get("allOf", []), self._dynamic_target(node, words.pop("$dynamicRef"))]
        return words

    def holds(self, node: Node, value: Any) -> bool | None:
        """Whether `value` is valid under a subschema of this document, by the reference validator; None for one made up."""
        if isinstance(node, bool):
            return node
        if id(node) not in self._pointers:
            return None
        if id(node) not in self._validators:
            self._registry = self._registry or jsonschema_rs.Registry([(_WHOLE, self.root)])
            reference = {"$schema": _DRAFTS[self.draft], "$ref": f"{_WHOLE}#{quote(self.pointer(node))}"}
            try:
                self._validators[id(node)] = jsonschema_rs.validator_for(
                    reference, registry=self._registry, validate_formats=False, pattern_options=self._pattern_options)
            except jsonschema_rs.ValidationError as error:
                raise SchemaError(self.pointer(node), f"{error.message}: its patterns are too large") from None
        return self._validators[id(node)].is_valid(value)

    def check_work(self) -> None:
        """Raise SchemaError for a subschema that applies too many others to one value, or, without going down, itself.

        Validators walk all of them, each time they are met: a short schema can keep one busy for ever.
        """
        work: dict[int, int] = {}                        # subschemas applied; 0 while they are counted
        starts: list[Node] = [self.root]
        while starts:
            stack = [(starts.pop(), False)]
            while stack:
                node, counting = stack.pop()
                if not isinstance(node, dict):
                    continue
                if not counting and id(node) in work:
                    if not work[id(node)]:
                        raise SchemaError(self.pointer(node), "refers to itself without going down into a property or an item")
                    continue
                here, below = self._applied(node)
                if counting:
                    work[id(node)] = 1 + sum(work[id(n)] for n in here if isinstance(n, dict))
                    if work[id(node)] > _MAX_WORK:
                        raise SchemaError(self.pointer(node), f"applies more than {_MAX_WORK} subschemas to one value")
                else:
                    work[id(node)] = 0
                    stack += [(node, True), *((n, False) for n in here)]
                    starts += below

    def is_shallow(self) -> bool:
        """Whether no walk along references, each followed once, can get so deep that the stack of the grammar engine ends."""
        references: set[str] = set()
        deepest = 0
        stack: list[tuple[Any, int]] = [(self.root, 1)]
        while stack:
            value, depth = stack.pop()
            deepest = max(deepest, depth)
            if isinstance(value, dict):
                references |= {text for key in _REFERENCES if isinstance(text := value.get(key), str)}
            children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
            stack.extend((child, depth + 1) for child in children)
        return (1 + len(references)) * deepest <= _MAX_WALK

    def _applied(self, node: dict[str, Any]) -> tuple[list[Node], list[Node]]:
        """The subschemas that apply to the same value as `node`, and those that apply to its properties and items."""
        words = self.keywords(node)
        here: list[Node] = [self.resolve(node, words["$ref"])] if "$ref" in words else []
        for key in ("allOf", "anyOf", "oneOf"):
            here += words.get(key, ())
        here += [words[key] for key in ("not", "if", "then", "else") if key in words]
        here += words.get("dependentSchemas", {}).values()
        below = [words[key] for key in ("items", "contains", "additionalProperties", "propertyNames", "unevaluatedItems",
                                        "unevaluatedProperties") if key in words]
        for key in ("properties", "patternProperties"):
            below += words.get(key, {}).values()
        return here, below + list(words.get("prefixItems", ()))

    def _dynamic_target(self, node: dict[str, Any], ref: str) -> Node:
        """A dynamic reference has one meaning only where its anchor stands once in the document."""
        target = self.resolve(node, ref)
        anchor = ref.rpartition("#")[2]
        if isinstance(target, dict) and target.get("$dynamicAnchor") == anchor and len(self._dynamic[anchor]) > 1:
            raise SchemaError(self.pointer(node) + "/$dynamicRef", f"{ref!r} has more than one meaning here: use $ref")
        return target

    def _nodes(self) -> list[dict[str, Any]]:
        found, stack = [], [self.root]
        while stack:
            node: Any = stack.pop()
            if isinstance(node, dict):
                found.append(node)
            stack.extend(node.values() if isinstance(node, dict) else node if isinstance(node, list) else ())
        return found


def _escape(part: str) -> str:
    return part.replace("~", "~0").replace("/", "~1")
