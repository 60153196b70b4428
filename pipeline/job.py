"""The run, read top to bottom: what a job does between its configuration and its exit code."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections import deque
from collections.abc import Hashable, Mapping
from typing import Any

from engine.guided.front import GuideSpec
from engine.guided.grammar import SchemaError
from engine.guided.validate import Validator
from engine.request import FinishReason
from pipeline.collect import Collect
from pipeline.config import RunConfig, flatten
from pipeline.exits import ConfigError, Exit
from pipeline.input.feed import Feed, Work
from pipeline.input.formats import first_line
from pipeline.input.plan import Shard, make_plan
from pipeline.input.prompts import Form, PromptBuilder
from pipeline.input.schemas import Guide, Guides
from pipeline.input.sources import Input, open_input
from pipeline.model import EngineFactory, EngineLike, Model, RealModel
from pipeline.observe.metrics import Metrics, find_gpus
from pipeline.observe.progress import Progress
from pipeline.observe.provenance import provenance
from pipeline.observe.report import finish, say_done
from pipeline.output.layout import OutputLayout
from pipeline.output.rows import Status
from pipeline.output.run_folder import PLAN, RUN, RunFolder
from pipeline.output.shards import ShardWriter
from pipeline.output.store import open_store
from pipeline.preview import preview
from pipeline.signals import Stop


def run_job(config: RunConfig, factory: EngineFactory = RealModel) -> int:
    """Do what `config` asks for and return the exit code. Raises JobError with one line."""
    stop = Stop(config.limits)
    stop.install()
    progress = Progress()
    model = factory(config)

    source = open_input(config.data, config.input)
    form = Form(config.task, config.input.columns, source.schema)
    plan = make_plan(source.files, config.plan.rows_per_shard, config.input.limit)
    spec = task_spec(config)
    layout = OutputLayout.make(source.schema, flat_schema(config, spec))
    if config.dry_run:
        return preview(config, source, plan, make_builder(config, form, spec, model), model.max_model_len())

    identity = model.fingerprint()
    fresh = open_store(config.output.dir).read(RUN) is None
    folder = RunFolder.open(
        config.output.dir,
        fingerprint(config, spec, identity),
        plan,
        layout,
        config.plan.on_change,
        provenance(config, identity),
    )
    workers = (config.cluster.worker, config.cluster.workers)
    again = folder.failed_shards(config.retry_errors, *workers) if config.retry_errors else []
    if folder.is_complete() and not again:
        return say_done(config, folder)

    shards = folder.pending_shards(*workers)
    if shards or again:
        try:
            reason = label(config, source, form, spec, folder, shards, again, model, stop, progress)
        except ConfigError:
            if fresh and config.cluster.workers == 1:
                forget(folder)
            raise
        if reason is not None:
            progress.line(f"stopped by {reason}: every finished row is kept; the same command goes on from here")
            return Exit.DRAINED
    return finish(config, folder, spec)


def forget(folder: RunFolder) -> None:
    """Take back what opening a new folder wrote, unless rows were written since: a mended configuration is not another run's."""
    if not list(folder.store.work.glob("*.journal")) and not any(
        shard.name in folder.store.names() for shard in folder.plan.shards
    ):
        for name in (RUN, PLAN):
            folder.store.delete(name)


def label(
    config: RunConfig,
    source: Input,
    form: Form,
    spec: GuideSpec | None,
    folder: RunFolder,
    shards: list[Shard],
    again: list[Shard],
    model: Model,
    stop: Stop,
    progress: Progress,
) -> str | None:
    """Compute and publish `shards`, and the failed rows of `again`; returns why it stopped early, or None."""
    progress.phase("loading the tokenizer")
    tokenizer = model.tokenizer()
    guides = Guides(model.grammars())
    builder = PromptBuilder(form, config.task, config.effective_sampling, tokenizer, guides, task_guide(config, spec, guides))
    reopened = {shard.index for shard in again}

    def open_shard(shard: Shard) -> ShardWriter:
        return folder.reopen_shard(shard, config.retry_errors) if shard.index in reopened else folder.open_shard(shard)

    collect = Collect(source, model.tokenizer(), lambda state: feed.published(state))
    feed = Feed(
        source,
        [*shards, *again],
        open_shard,
        builder,
        config.seed,
        config.engine.window,
        config.input.threads,
        collect.opened,
        collect.deliver,
    )
    collect.start()
    feed.start()  # prompts are made ready while the weights are read
    try:
        engine = model.load(progress.phase)
        try:
            stop.install()
            gpus = find_gpus()
            stop.gpus = len(gpus) if gpus else 0
            total = sum(shard.num_rows for shard in [*shards, *again])
            return Loop(engine, feed, collect, stop, progress, Metrics(folder.store, gpus), total).run(
                config.limits.grace_seconds
            )
        finally:
            engine.close()
    finally:
        feed.stop()
        collect.close()
        progress.end(collect.done)


def make_builder(config: RunConfig, form: Form, spec: GuideSpec | None, model: Model) -> PromptBuilder:
    """Load the tokenizer and compile the task's schema."""
    guides = Guides(model.grammars())
    guide = task_guide(config, spec, guides)
    return PromptBuilder(form, config.task, config.effective_sampling, model.tokenizer(), guides, guide)


class Loop:
    """The turns between the feed, the engine and the collector."""

    def __init__(
        self, engine: EngineLike, feed: Feed, collect: Collect, stop: Stop, progress: Progress, metrics: Metrics, total: int
    ) -> None:
        self._engine, self._feed, self._collect = engine, feed, collect
        self._stop, self._progress, self._metrics, self._total = stop, progress, metrics, total
        self._ready: deque[Work] = deque()
        self._running: dict[Hashable, Work] = {}  # what the engine holds
        self._numbers = itertools.count()
        self._looked = 0.0
        self._generated = 0

    def run(self, grace_seconds: float) -> str | None:
        """Until all is done (None) or a stop is asked for (why)."""
        self._progress.phase("labelling" if self._total else "nothing to label")
        self._progress.begin(self._total)
        while (reason := self._stop.reason(self._generated)) is None:
            self._admit()
            if self._engine.pending:
                self._step()
            elif self._feed.exhausted and not self._ready:
                break
            else:
                self._ready.extend(self._feed.take(wait=0.05))
            self._look()
        if reason is not None:
            self._drain(reason, grace_seconds)
        self._feed.stop()
        self._collect.close()
        self._look(now=True)
        return reason

    def _admit(self) -> None:
        """Row by row as there is room: whole batches would wait for their slowest row."""
        for _ in range(self._engine.room()):
            if not self._ready:
                self._ready.extend(self._feed.take())
                if not self._ready:
                    return
            self._submit(self._ready.popleft())

    def _submit(self, work: Work) -> None:
        limit, output = self._engine.max_model_len, work.ask.guide.grammar.min_tokens if work.ask.guide else 1
        if len(work.tokens) + output > limit:
            error = f"{len(work.tokens)} prompt tokens leave no room for an output of {output} in engine.max_model_len={limit}"
            self._collect.refuse(work, Status.PROMPT_TOO_LONG, error)
            return
        number = next(self._numbers)
        try:
            self._engine.submit(work.request(number))
        except ValueError as error:
            self._collect.refuse(work, Status.ENGINE_ERROR, first_line(error))
            return
        self._running[number] = work

    def _step(self) -> None:
        for completion in self._engine.step():
            work = self._running.pop(completion.id)
            if completion.finish_reason is FinishReason.ERROR and not work.tries:
                work.tries = 1  # once more: what failed may have been the company it kept
                self._ready.appendleft(work)
            elif completion.finish_reason is not FinishReason.ABORTED:
                self._collect.put(work, completion)

    def _drain(self, reason: str, grace_seconds: float) -> None:
        """Admit nothing more, give running rows their grace, then abort the rest: the next attempt computes those again."""
        self._progress.line(f"{reason}: finishing the rows that run, at most {grace_seconds:g} s")
        deadline = time.monotonic() + grace_seconds
        while self._engine.pending and time.monotonic() < deadline:
            self._step()
            self._look()
        self._engine.abort()
        while self._engine.pending:
            self._step()

    def _look(self, now: bool = False) -> None:
        """A few times a second: errors of the threads, progress, metrics."""
        if not now and time.monotonic() - self._looked < 0.1:
            return
        self._looked = time.monotonic()
        self._feed.check()
        self._collect.check()
        stats = self._engine.stats()
        self._generated = stats.generated_tokens
        self._progress.update(
            self._collect.done, self._collect.recovered, stats.prompt_tokens, stats.generated_tokens, stats.running, stats.waiting
        )
        self._metrics.tick(self._collect.results, stats, now)


def task_spec(config: RunConfig) -> GuideSpec | None:
    """The task's schema, checked to be one."""
    source = config.task.json_schema
    if source is None:
        return None
    try:
        spec = GuideSpec.of(source)
        if spec.kind == "schema":
            Validator(json.loads(spec.text))
    except (SchemaError, ValueError) as error:
        raise ConfigError(f"task.schema: {first_line(error)}") from None
    return spec


def task_guide(config: RunConfig, spec: GuideSpec | None, guides: Guides) -> Guide | None:
    """The task's schema, compiled; what the grammar cannot keep stops the job before the model is loaded."""
    if spec is None:
        return None
    try:
        guide = guides.get(spec)
    except SchemaError as error:
        raise ConfigError(f"task.schema: {error}") from None
    max_tokens = config.effective_sampling.params().max_tokens
    if max_tokens < guide.grammar.min_tokens:
        raise ConfigError(
            f"sampling.max_tokens={max_tokens}: the shortest output that the schema allows needs {guide.grammar.min_tokens}; "
            f"set sampling.max_tokens={4 * guide.grammar.min_tokens} or so"
        )
    return guide


def flat_schema(config: RunConfig, spec: GuideSpec | None) -> dict[str, Any] | None:
    """The schema whose properties become columns."""
    if not config.output.flatten:
        return None
    schema = json.loads(spec.text) if spec is not None and spec.kind == "schema" else None
    if not isinstance(schema, dict) or not schema.get("properties"):
        raise ConfigError("output.flatten=true: the task has no schema with properties to make columns of; set task.schema=FILE")
    return schema


def fingerprint(config: RunConfig, spec: GuideSpec | None, identity: Mapping[str, str]) -> dict[str, str]:
    """What changes results, by key: a run resumes only under an equal one. Speed, places and limits are not in it."""
    sections = config.resolved()
    task = {key: value for key, value in sections["task"].items() if key not in ("name", "sampling", "schema")}
    parts: dict[str, Any] = {
        "task": {**task, "schema": spec.text if spec else None},
        "sampling": config.effective_sampling.model_dump(mode="json"),
        "seed": config.seed,
        "input": {key: value for key, value in sections["input"].items() if key != "threads"},
        "engine": {key: sections["engine"][key] for key in ("dtype", "max_model_len")},
        "guided": {key: sections["guided"][key] for key in ("backend", "whitespace")},
    }
    return {**identity, **{key: short(value) for key, value in flatten(parts) if value not in (None, {}, [])}}


def short(value: Any) -> str:
    """The value itself, or a hash where it is long."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= 80 and "\n" not in text else "hash " + hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
