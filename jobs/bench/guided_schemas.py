"""Measure guided decoding on real schemas: accepted, valid, closed within budget, known instances, times.

    python jobs/bench/guided_schemas.py FILE.jsonl --tokenizer MODEL [--restored] [--walks 2] [--whitespace dumps]

FILE: one JSON object a line with `id`, `schema`, and where known `instances`, `invalid_instances`, `schema_restored`. Each
accepted schema is walked at random through masks, at 32, 96 and 512 tokens; what does not end, or ends and is not valid (numbers
beyond a double), is trimmed and closed. Known valid instances are tried as they stand, then with their keys in the order of the
grammar, in which outputs are written. Those left out fall in two classes: keys that the schema does not list (which
guided.extra_keys=true lets through; --extra-keys measures all with another value), and the rest.
Prints one JSON line, details on stderr.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from engine.guided.grammar import SchemaError
from engine.guided.llg import LLGrammar, LLGuidanceBackend
from engine.guided.lower import ExtraKeys
from engine.guided.validate import parse_strict
from pipeline.model_source import resolve_model
from pipeline.tokenizer import load_tokenizer

BUDGETS = (32, 96, 512)
EXTRA_KEYS: dict[str, ExtraKeys] = {"auto": "auto", "true": True, "false": False}


class Walker:
    """Random walks, uniform over the allowed tokens half of the time, else over those that end strings, arrays and objects."""

    def __init__(self, backend: LLGuidanceBackend, eos: int, seed: int = 0) -> None:
        self.backend, self.eos, self.random = backend, eos, random.Random(seed)
        self.mask = np.zeros((1, (backend.vocab_size + 31) // 32), dtype=np.int32)
        closers = [i for i, piece in enumerate(backend.vocabulary.token_bytes) if piece and not piece.strip(b'"}],: ')]
        self.closers = np.zeros(backend.vocab_size, dtype=bool)
        self.closers[[i for i in closers if i < backend.vocab_size]] = True
        self.fill_seconds: list[float] = []

    def walk(self, grammar: LLGrammar, budget: int) -> tuple[list[int], bool, str | None]:
        """(tokens, whether they ended by themselves, the guide's error)."""
        guide, tokens = grammar.start(), []
        while len(tokens) < budget and not guide.finished:
            if guide.error:
                return tokens, False, guide.error
            step = guide.forced()[: budget - len(tokens)]
            if not step:
                begin = time.perf_counter()
                self.backend.fill([guide], self.mask)
                self.fill_seconds.append(time.perf_counter() - begin)
                bits = np.unpackbits(self.mask.view(np.uint8), bitorder="little")[: self.backend.vocab_size].astype(bool)
                closing = np.flatnonzero(bits & self.closers)
                pool = closing if len(closing) and self.random.random() < 0.5 else np.flatnonzero(bits)
                if not len(pool):
                    return tokens, False, "empty mask"
                step = [int(pool[self.random.randrange(len(pool))])]
                if step[0] == self.eos:
                    return tokens, guide.accepting, guide.error
            if guide.accept(step) != len(step):
                return tokens, False, guide.error or "a token of the mask was not accepted"
            tokens += step
        return tokens, guide.accepting and guide.error is None, guide.error


class At(NamedTuple):
    """Where a walk stands: a matcher and the text that led there."""

    matcher: Any
    text: str


class Speller:
    """Whether a grammar lets a value through, written with the backend's white space. `steps`: pieces tried at most."""

    def __init__(self, backend: LLGuidanceBackend, schema: Any, steps: int = 5_000) -> None:
        self.orders = list(_orders(schema))
        self.tokenize, self.most = backend.vocabulary.tokenize, steps
        self.comma, self.colon = (",", ":") if backend.whitespace == "compact" else (", ", ": ")

    def as_given(self, grammar: LLGrammar, value: Any) -> bool:
        return self.lets_through(grammar, json.dumps(value, ensure_ascii=False, separators=(self.comma, self.colon)))

    def in_any_order(self, grammar: LLGrammar, value: Any) -> bool:
        """JSON objects have no order, outputs have the schema's: tries the keys in turn, and goes back where that led nowhere."""
        self.left = self.most
        return any(self.lets_through(grammar, at.text) for at in self.value(At(grammar.start().matcher, ""), value))

    def lets_through(self, grammar: LLGrammar, text: str) -> bool:
        guide, tokens = grammar.start(), self.tokenize(text.encode())
        return guide.accept(tokens) == len(tokens) and guide.accepting

    def value(self, at: At, value: Any) -> Iterator[At]:
        """Where a walk may stand after `value`, once for each way to write it."""
        if isinstance(value, dict):
            yield from self.members(at, value, "{")
        elif isinstance(value, list):
            yield from self.items(at, value, "[")
        else:
            yield from self.written(at, json.dumps(value, ensure_ascii=False))

    def written(self, at: At, text: str) -> Iterator[At]:
        self.left -= 1
        after = at.matcher.deep_copy()
        if self.left > 0 and after.consume_tokens(self.tokenize(text.encode())):
            yield At(after, at.text + text)

    def members(self, at: At, left: dict[str, Any], before: str) -> Iterator[At]:
        if not left:
            yield from self.written(at, "{}" if before == "{" else "}")
        for key in self.likely_order(left):
            for at_value in self.written(at, before + json.dumps(key, ensure_ascii=False) + self.colon):
                for after in self.value(at_value, left[key]):
                    yield from self.members(after, {k: v for k, v in left.items() if k != key}, self.comma)

    def items(self, at: At, left: list[Any], before: str) -> Iterator[At]:
        if not left:
            yield from self.written(at, "[]" if before == "[" else "]")
            return
        for at_value in self.written(at, before):
            for after in self.value(at_value, left[0]):
                yield from self.items(after, left[1:], self.comma)

    def likely_order(self, keys: Any) -> list[str]:
        """As in the list of properties that has the most of them."""
        best = max(self.orders, key=lambda order: sum(key in order for key in keys), default={})
        return sorted(keys, key=lambda key: best.get(key, len(best)))


def _orders(schema: Any) -> Iterator[dict[str, int]]:
    """The place of each key in every list of properties."""
    if isinstance(schema, dict):
        if isinstance(names := schema.get("properties"), dict):
            yield {name: place for place, name in enumerate(names)}
        for child in schema.values():
            yield from _orders(child)
    elif isinstance(schema, list):
        for child in schema:
            yield from _orders(child)


def percentiles(values: list[float], unit: float = 1e3) -> dict[str, float]:
    points = np.percentile(np.asarray(values or [0.0]) * unit, [50, 95, 100])
    return dict(zip(("p50", "p95", "max"), (round(float(p), 3) for p in points), strict=True))


def measure(rows: list[dict[str, Any]], backend: LLGuidanceBackend, extra_backend: LLGuidanceBackend, eos: int,
            walks: int) -> dict[str, Any]:
    """extra_backend: with guided.extra_keys=true, to tell why instances are left out."""
    walker = Walker(backend, eos)
    count: Counter[str] = Counter()
    refusals: Counter[str] = Counter()
    compile_seconds, close_seconds, check_seconds = [], [], []
    least: list[float] = []
    for row in rows:
        schema = row["schema"]
        begin = time.perf_counter()
        try:
            grammar = backend.compile_schema(schema)
        except SchemaError as error:
            refusals[error.reason[:80]] += 1
            print(f"refused {row['id']}: {error}", file=sys.stderr)
            continue
        finally:
            compile_seconds.append(time.perf_counter() - begin)
        count["accepted"] += 1
        least.append(grammar.min_tokens)
        # A second opinion: another implementation, with Python's regular expressions.
        second = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)(schema)
        for budget in BUDGETS:
            if budget < grammar.min_tokens:
                count["budget below the shortest output"] += 1
                continue
            for _ in range(walks):
                tokens, ended, error = walker.walk(grammar, budget)
                count["resource errors"] += error is not None
                count["walks"] += 1
                count["ended"] += ended
                if ended:
                    try:
                        grammar.check(backend.vocabulary.text(tokens).decode())
                    except ValueError as reason:
                        count["ended, not valid before closing"] += 1
                        count["of these " + str(reason).partition(":")[0]] += 1
                        print(f"repaired {row['id']}: {reason}", file=sys.stderr)
                begin = time.perf_counter()
                closed = grammar.close(tokens, budget)
                if not ended:
                    close_seconds.append(time.perf_counter() - begin)
                    count["trimmed tokens"] += max(0, len(tokens) - len(closed))
                    count["closed by the minimal output"] += closed.tolist() == grammar.minimal.tolist()
                text = backend.vocabulary.text(closed.tolist()).decode()
                begin = time.perf_counter()
                try:
                    grammar.check(text)
                    count["valid"] += len(closed) <= budget
                except ValueError as reason:
                    print(f"INVALID {row['id']}: {reason}: {text[:200]}", file=sys.stderr)
                check_seconds.append(time.perf_counter() - begin)
                value = parse_strict(text)
                if not second.is_valid(value):
                    count["second validator disagrees"] += 1
                    print(f"second validator {row['id']}: {next(second.iter_errors(value)).message[:300]}", file=sys.stderr)
        speller = Speller(backend, schema)
        for instance in row.get("instances") or ():
            try:
                grammar.check(json.dumps(instance))
            except ValueError:
                count["known instances that are not valid"] += 1
                continue
            count["known valid"] += 1
            if speller.as_given(grammar, instance):
                count["known valid accepted"] += 1
                continue
            if speller.in_any_order(grammar, instance):
                count["known valid accepted, with its keys in the schema's order"] += 1
                continue
            with_extra = speller.in_any_order(extra_backend.compile_schema(schema), instance)
            why = "keys not listed" if with_extra else "other"
            count[f"known valid left out: {why}"] += 1
            print(f"known valid not accepted {row['id']}: {why}", file=sys.stderr)
        for instance in row.get("invalid_instances") or ():
            count["known invalid"] += 1
            try:
                grammar.check(json.dumps(instance))
            except ValueError:
                if speller.in_any_order(grammar, instance):
                    count["known invalid accepted"] += 1
                    print(f"known INVALID accepted {row['id']}", file=sys.stderr)
            else:
                count["known invalid that is valid"] += 1
    for name in ("resource errors", "known invalid accepted", "second validator disagrees"):
        count.setdefault(name, 0)
    total = len(rows)

    as_given = count["known valid accepted"]
    accepted = as_given + count["known valid accepted, with its keys in the schema's order"]
    known = max(1, count["known valid"])
    return {
        "schemas": total, "accepted_share": round(count["accepted"] / total, 4), "refusals": dict(refusals),
        "valid_share": round(count["valid"] / max(1, count["walks"]), 6),
        "known_valid_share": round(accepted / known, 4), "known_valid_share_as_given": round(as_given / known, 4),
        "known_valid_share_with_extra_keys": round((accepted + count["known valid left out: keys not listed"]) / known, 4),
        **dict(sorted(count.items())),
        "min_tokens": percentiles(least, 1.0), "compile_ms": percentiles(compile_seconds), "close_ms": percentiles(close_seconds),
        "check_ms": percentiles(check_seconds), "mask_us": percentiles(walker.fill_seconds, 1e6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokenizer", required=True, help="of a model: whatever model.source takes")
    parser.add_argument("--restored", action="store_true", help="use schema_restored where there is one")
    parser.add_argument("--walks", type=int, default=2, help="per schema and budget")
    parser.add_argument("--whitespace", default="dumps")
    parser.add_argument("--extra-keys", choices=EXTRA_KEYS, default="auto", help="as guided.extra_keys")
    parser.add_argument("--limit", type=int, default=None)
    args = parser.parse_args()
    tokenizer = load_tokenizer(resolve_model(args.tokenizer))
    eos = tokenizer.eos_token_id
    backend, extra_backend = (LLGuidanceBackend(tokenizer, len(tokenizer), [eos], args.whitespace, extra_keys=extra)
                              for extra in (EXTRA_KEYS[args.extra_keys], True))
    rows = [json.loads(line) for line in args.file.read_text().splitlines()][: args.limit]
    if args.restored:
        rows = [{**row, "schema": row.get("schema_restored", row["schema"])} for row in rows]
    result = measure(rows, backend, extra_backend, eos, args.walks)
    print(json.dumps({"file": args.file.name, "restored": args.restored, "extra_keys": args.extra_keys,
                      "tokenizer": args.tokenizer, **result}))


if __name__ == "__main__":
    main()
