"""Runs of the real pipeline with the scripted engine, each in a process of its own that may be struck at any point.

The zygote imports everything and composes each configuration once, then forks for each run, so that hundreds of runs take
seconds. It reads one JSON object a line. `{"keys", "input", "output", "log", ...}` starts a run and answers with its process id;
`{input}` and `{output}` in the keys stand for its folders. `{"wait": pid}` answers with its exit code, negative for a signal.

A step is a call that changes what is on disk. A run's `strike` is `{"step": number or "regex", "when", "signal"}`: the process
sends itself that signal before or after the first such step, or in the middle of it. `steps`: file that gets the name of each
step. `rows`: file that gets a line for each row that the engine is given. `clock`: seconds by which the run's clock is wrong.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.config import check
from pipeline.exits import JobError
from pipeline.job import run_job
from pipeline.output.store import ObjectStore
from pipeline.run import read_config
from tests.pipeline.scripted_engine import ScriptedEngine, ScriptedModel

with contextlib.suppress(ImportError):
    import s3fs  # noqa: F401  (a second for each run on S3, otherwise)


class Steps:
    """Wraps the calls that change what is on disk."""

    def __init__(self, strike: dict[str, Any] | None, names: str | None) -> None:
        self._strike = strike
        self._names = os.open(names, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if names else -1
        self._count = 0
        self._lock = threading.Lock()
        self._write = os.write

    def install(self) -> None:
        self.wrap(os, "link", lambda a, b: Path(b).name)
        self.wrap(os, "replace", lambda a, b: Path(b).name)
        self.wrap(os, "rename", lambda a, b: Path(b).name)
        self.wrap(os, "fsync", name_of)
        self.wrap(os, "write", name_of, lambda fd, data: (fd, data[: len(data) // 2]))
        self.wrap(Path, "write_bytes", lambda path, data: path.name, lambda path, data: (path, data[: len(data) // 2]))
        self.wrap(Path, "unlink", lambda path, missing_ok=False: path.name if path.exists() else None)
        self.wrap(Path, "mkdir", lambda path, *_, **__: None if path.exists() else path.name)
        self.wrap(ObjectStore, "_put", lambda store, path, name, mode: name)
        self.wrap(pq.ParquetWriter, "write_table", on_disk)
        self.wrap(pq.ParquetWriter, "close", on_disk)

    def wrap(self, owner: Any, name: str, label: Callable[..., str | None], half: Callable[..., tuple] | None = None) -> None:
        """`label`: what the call is about, None where it is not a step; `half`: the arguments of half a call."""
        call = getattr(owner, name)

        def step(*args: Any, **kwargs: Any) -> Any:
            about = label(*args, **kwargs)
            if about is None:
                return call(*args, **kwargs)
            now = self._now(f"{name} {about}{' torn' if half else ''}")
            if now == "before" or (now == "half" and half is None):
                self._fire()
            elif now == "half" and half is not None:
                call(*half(*args))
                self._fire()
            result = call(*args, **kwargs)
            if now == "after":
                self._fire()
            return result

        setattr(owner, name, step)

    def _now(self, name: str) -> str:
        """When to strike in this step; empty for not at all."""
        with self._lock:
            self._count += 1
            if self._names >= 0:
                self._write(self._names, f"{name}\n".encode())
            if self._strike is None:
                return ""
            step = self._strike["step"]
            if not (step == self._count if isinstance(step, int) else re.search(step, name)):
                return ""
            when = self._strike["when"]
            self._strike = {**self._strike, "step": -1}
            return when

    def _fire(self) -> None:
        assert self._strike is not None
        os.kill(os.getpid(), signal.Signals[self._strike.get("signal", "SIGKILL")])
        time.sleep(0.05)      # the signal may take a moment to arrive


def name_of(fd: int, data: Any = None) -> str:
    return Path(os.readlink(f"/proc/self/fd/{fd}")).name


def on_disk(writer: pq.ParquetWriter, *_: Any, **__: Any) -> str | None:
    return writer.where.name if isinstance(writer.where, Path) else None


@functools.cache
def composed(keys: tuple[str, ...]) -> str:
    return json.dumps(read_config(keys).resolved())


def run(order: dict[str, Any], config: str) -> int:
    """In the child: the job, as its own process would run it."""
    os.setsid()
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(order.get("env", {}))
    if "clock" in order:
        right = time.time
        time.time = lambda: right() + order["clock"]
    if "rows" in order:
        log_rows(order["rows"])
    Steps(order.get("strike"), order.get("steps")).install()
    try:
        here = config.replace("{input}", order["input"]).replace("{output}", order["output"])
        return run_job(check(json.loads(here)), ScriptedModel)
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def log_rows(path: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    submit, write = ScriptedEngine.submit, os.write

    def logged(engine: ScriptedEngine, request: Any) -> None:
        write(fd, bytes(token for token in request.prompt.tolist() if token < 256).replace(b"\n", b" ") + b"\n")
        submit(engine, request)

    ScriptedEngine.submit = logged      # type: ignore[method-assign]


def serve() -> None:
    running: set[int] = set()
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            running.remove(order["wait"])
            answer = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
        else:
            config = composed(tuple(order["keys"]))
            answer = os.fork()
            if answer == 0:
                os._exit(run(order, config))
            running.add(answer)
        print(answer, flush=True)
    for pid in running:      # of tests that failed
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    serve()
