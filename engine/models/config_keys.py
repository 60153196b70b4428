"""What the keys of a model's config may hold, checked before anything is made of them: the files come from strangers."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from engine.models.errors import ModelError

MOST = 2**31 - 1


class Kind(NamedTuple):
    """`text`: what a value must be, for people."""

    text: str
    holds: Callable[[Any], bool]


def whole(least: int, most: int = MOST) -> Kind:
    return Kind(f"a whole number from {least} to {most}", lambda value: type(value) is int and least <= value <= most)


def list_of(kind: Kind) -> Kind:
    return Kind(f"a list, each item {kind.text}", lambda value: isinstance(value, list) and all(map(kind.holds, value)))


def mapping_of(kind: Kind) -> Kind:
    return Kind(f"an object, each value {kind.text}", lambda value: OBJECT.holds(value) and all(map(kind.holds, value.values())))


def either(*kinds: Kind) -> Kind:
    return Kind(", or ".join(kind.text for kind in kinds), lambda value: any(kind.holds(value) for kind in kinds))


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30 and not math.isnan(value)


SIZE, COUNT = whole(1), whole(0)
NUMBER = Kind("a number of at least 0", lambda value: _finite(value) and value >= 0)
POSITIVE = Kind("a number above 0", lambda value: _finite(value) and value > 0)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("text", lambda value: isinstance(value, str))
OBJECT = Kind("an object", lambda value: isinstance(value, Mapping))
TEXTS = list_of(TEXT)
TOKENS = either(COUNT, list_of(COUNT))


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises ModelError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}): fetch the model again") from None
    check_value(value, OBJECT, str(path), "its content")
    return value


def check_keys(values: Mapping[str, Any], kinds: Mapping[str, Kind], where: str = "the model's config", prefix: str = "") -> None:
    """Raise ModelError for the first key whose value is of another kind; those that are null or not there pass."""
    for key, kind in kinds.items():
        if (value := values.get(key)) is not None:
            check_value(value, kind, where, prefix + key)


def check_value(value: Any, kind: Kind, where: str, key: str) -> None:
    if not kind.holds(value):
        raise ModelError(f"{where} holds {reprlib.repr(value)} as {key}, which must be {kind.text}")


def needed(values: Mapping[str, Any], key: str, where: str = "the model's config") -> Any:
    """The value of a key that must be there. Raises ModelError."""
    if (value := values.get(key)) is None:
        raise ModelError(f"{where} has no {key}")
    return value
