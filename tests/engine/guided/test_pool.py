"""The pool: each guide once, failures too, within time and size, without holding up the interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from engine.guided.front import GuideSpec
from engine.guided.grammar import SchemaError
from engine.guided.llg import LLGuidanceBackend
from engine.guided.pool import GrammarPool


class Counting:
    """A backend that counts what it is asked for; a schema with "sleep" takes that many seconds."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.release = threading.Event()

    def compile_schema(self, schema: Any) -> Any:
        self.asked.append(schema)
        if isinstance(schema, dict) and "sleep" in schema:
            self.release.wait(schema["sleep"])
        if isinstance(schema, dict) and "fail" in schema:
            raise SchemaError("/fail", "as asked")
        if isinstance(schema, dict) and "trip" in schema:
            raise TypeError("'three' is no number")
        return object()

    compile_regex = compile_choice = compile_schema

    def fill(self, guides: Any, mask: Any) -> None:
        raise NotImplementedError


@pytest.fixture
def counting() -> Iterator[Counting]:
    backend = Counting()
    yield backend
    backend.release.set()


def test_each_guide_is_compiled_once(counting: Counting) -> None:
    pool = GrammarPool(counting, workers=2)
    first = pool.get({"type": "object", "properties": {"a": {}}})
    assert pool.get('{"type":"object", "properties": {"a": {}}}') is first
    assert pool.submit({"type": "object", "properties": {"a": {}}}).result() is first
    assert pool.get({"properties": {"a": {}}, "type": "object"}) is not first  # the order of keys is the order of the output
    assert pool.get(GuideSpec.regex("a+")) is not pool.get(["a+"])
    assert len(counting.asked) == 4


def test_failures_are_kept(counting: Counting) -> None:
    pool = GrammarPool(counting, workers=1)
    errors = []
    for _ in range(3):
        with pytest.raises(SchemaError) as error:
            pool.get({"fail": 1})
        errors.append(error.value)
    assert len(counting.asked) == 1
    assert errors[0] is not errors[1] and errors[2].pointer == "/fail"
    with pytest.raises(SchemaError):
        pool.submit({"fail": 1}).result()


def test_a_schema_that_trips_the_compiler_is_refused(counting: Counting, caplog: pytest.LogCaptureFixture) -> None:
    pool = GrammarPool(counting, workers=1)
    with pytest.raises(SchemaError, match="cannot be compiled: TypeError: 'three' is no number"):
        pool.get({"trip": 1})
    assert "Traceback" in caplog.text
    assert pool.get({"n": 1}) is not None


def test_a_slow_schema_is_given_up_and_blocks_no_other(counting: Counting) -> None:
    pool = GrammarPool(counting, workers=2, seconds=1)
    slow = pool.submit({"sleep": 30})
    assert pool.get({"quick": 1}) is not None
    begin = time.monotonic()
    with pytest.raises(SchemaError, match="longer than 1 s"):
        pool.get({"sleep": 30})
    assert time.monotonic() - begin < 20
    assert isinstance(slow.exception(timeout=1), SchemaError)
    with pytest.raises(SchemaError):
        pool.get({"sleep": 30})
    counting.release.set()
    pool.close()


def test_behind_compilations_that_were_given_up(counting: Counting) -> None:
    pool = GrammarPool(counting, workers=1, seconds=0.5)
    with pytest.raises(SchemaError, match="longer than"):
        pool.get({"sleep": 600})
    with pytest.raises(SchemaError, match="busy with schemas that took too long"):
        pool.get({"a": 1})
    counting.release.set()
    assert pool.submit({"a": 1}).result(timeout=60)


def test_a_lost_compilation_does_not_keep_the_process() -> None:
    code = ("import time\nfrom types import SimpleNamespace\nfrom engine.guided.pool import GrammarPool\n"
            "GrammarPool(SimpleNamespace(compile_schema=lambda schema: time.sleep(600)), 1).submit({})")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_time_in_the_queue_does_not_count(counting: Counting) -> None:
    pool = GrammarPool(counting, workers=1, seconds=1.5)
    for i in range(4):
        pool.submit({"sleep": 0.5, "i": i})
    assert pool.get({"sleep": 0.5, "i": 3}) is not None


def test_limits_come_first(counting: Counting) -> None:
    pool = GrammarPool(counting, workers=1, max_bytes=2000, max_depth=20)
    for schema, reason in (
        (json.loads('{"items":' * 30 + "{}" + "}" * 30), "deeper than 20"),
        ({"enum": ["x" * 3000]}, "larger than 2000"),
    ):
        with pytest.raises(SchemaError, match=reason):
            pool.get(schema)
    assert counting.asked == []
    with pytest.raises(SchemaError, match="neither JSON nor"):
        pool.get('{"items":' * 100_000 + "{}" + "}" * 100_000)


def test_the_least_recently_used_go_first(counting: Counting) -> None:
    pool = GrammarPool(counting, workers=1, max_grammars=2)
    first = pool.get({"n": 1})
    pool.get({"n": 2})
    assert pool.get({"n": 1}) is first
    pool.get({"n": 3})
    assert pool.get({"n": 1}) is first
    pool.get({"n": 2})
    assert len(counting.asked) == 4


def test_close_lets_no_one_wait(counting: Counting) -> None:
    pool = GrammarPool(counting, workers=1, seconds=30)
    pool.submit({"sleep": 30})
    waiting = pool.submit({"n": 1})
    pool.close()
    assert isinstance(waiting.exception(timeout=1), RuntimeError)
    with pytest.raises(RuntimeError):
        pool.submit({"n": 2})
    counting.release.set()


def test_many_distinct_schemas(backend: LLGuidanceBackend) -> None:
    pool = GrammarPool(backend, workers=2)
    schemas = [
        {
            "type": "object",
            "properties": {f"field_{i}": {"enum": [f"v{i}", "other"]}, "n": {"type": "integer", "minimum": i}},
            "required": [f"field_{i}"],
        }
        for i in range(200)
    ]
    for schema in schemas:
        pool.submit(schema)
    begin = time.monotonic()
    grammars = [pool.get(schema) for schema in schemas]
    assert time.monotonic() - begin < 30
    assert len(set(map(id, grammars))) == 200


def test_the_interpreter_goes_on_meanwhile(backend: LLGuidanceBackend) -> None:
    pool = GrammarPool(backend, workers=1)
    pool.submit({"type": "object", "properties": {f"k{i}": {"type": "string", "maxLength": i} for i in range(1200)}})
    heavy = pool.submit({"type": "object", "properties": {f"p{i}": {"enum": [f"{i}"]} for i in range(1200)}, "required": ["p7"]})
    longest, last = 0.0, time.monotonic()
    while not heavy.done():
        time.sleep(0.001)
        now = time.monotonic()
        longest, last = max(longest, now - last), now
    assert longest < 1.0
