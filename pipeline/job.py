"""The run, read top to bottom: what a job does between its configuration and its exit code."""

from __future__ import annotations

import gc
import hashlib
import json
import sys
from collections.abc import Mapping
from typing import Any

from engine.guided.front import GuideSpec
from engine.guided.grammar import SchemaError
from engine.guided.validate import Validator
from engine.request import EngineError
from pipeline.collect import Collect
from pipeline.config import RunConfig, flatten
from pipeline.exits import ConfigError, Exit, JobError
from pipeline.input.feed import Assigned, Feed
from pipeline.input.form import Form
from pipeline.input.formats import first_line
from pipeline.input.plan import Shard, make_plan
from pipeline.input.prompts import PromptBuilder
from pipeline.input.schemas import Guide, Guides
from pipeline.input.sources import Input, open_input
from pipeline.input.tools import ToolReader
from pipeline.loop import Loop
from pipeline.model import EngineFactory, Model, RealModel
from pipeline.observe.metrics import Metrics, find_gpu
from pipeline.observe.progress import Progress
from pipeline.observe.provenance import provenance
from pipeline.observe.report import finish, say_done
from pipeline.output.claims import Claims
from pipeline.output.layout import OutputLayout
from pipeline.output.run_folder import RUN, RunFolder
from pipeline.output.shards import ShardWriter
from pipeline.output.store import open_store
from pipeline.preview import preview
from pipeline.signals import Interrupted, Stop


def run_job(config: RunConfig, factory: EngineFactory = RealModel) -> int:
    """Do what `config` asks for and return the exit code. Raises JobError with one line."""
    sys.setswitchinterval(0.0002)    # threads that make prompts must not keep the engine's waiting for the lock 5 ms at a time
    gc.set_threshold(100_000, 20, 20)    # rows are kept until their shard is out: walking them again and again finds little
    progress = Progress()
    with Stop(config.limits) as stop, progress.shown_logs("pipeline"), progress.shown_logs("engine"):
        return _run(config, factory(config), stop, progress)


def _run(config: RunConfig, model: Model, stop: Stop, progress: Progress) -> int:
    source = open_input(config.data, config.input, config.output.dir)
    form = Form(config.task, config.input.columns, source.schema)
    if form.alike:
        progress.line("note: the task's template uses no column, so every row gets the same prompt; in a template a column is "
                      f"written {{{{ {source.schema.names[0]} }}}}")
    plan = make_plan(source.files, config.plan.rows_per_shard, config.input.limit)
    spec = task_spec(config)
    calls = config.task.tools is not None or "tools" in form.overrides
    layout = OutputLayout.make(source.schema, flat_schema(config, spec), tool_calls=calls)
    if config.dry_run:
        return preview(config, source, plan, make_builder(config, form, spec, model), model)

    identity = model.fingerprint()
    fresh = open_store(config.output.dir, config.output.spool).read(RUN) is None
    keys, info = fingerprint(config, spec, identity), provenance(config, identity)
    folder = RunFolder.open(config.output.dir, keys, plan, layout, config.plan.on_change, info, config.output.spool)
    workers = (config.cluster.worker, config.cluster.workers)
    again = folder.failed_shards(config.retry_errors, *workers) if config.retry_errors else []
    if folder.is_complete() and not again:
        return say_done(config, folder)

    shards = folder.pending_shards(*workers)
    if config.cluster.lease and not shards and not again:
        shards = folder.pending_shards()      # of others, who may have died on them
    alone = fresh and config.cluster.workers == 1 and not config.cluster.lease
    if shards or again:
        source.check_there([*shards, *again])
        try:
            progress.phase("loading the tokenizer" + (" and compiling the schema" if spec else ""))
            builder = make_builder(config, form, spec, model)
            reason = label(config, source, builder, folder, shards, again, model, stop, progress)
        except ConfigError:
            if alone:
                folder.forget()
            raise
        if reason is not None:
            if alone:
                folder.forget()
            progress.line(f"stopped by {reason}: every finished row is kept; the same command goes on from here")
            return Exit.DRAINED
    return finish(config, folder, spec)


def label(config: RunConfig, source: Input, builder: PromptBuilder, folder: RunFolder, shards: list[Shard], again: list[Shard],
          model: Model, stop: Stop, progress: Progress) -> str | None:
    """Compute and publish `shards`, and the failed rows of `again`; returns why it stopped early, or None."""
    reopened = {shard.index for shard in again}

    def open_shard(shard: Shard) -> ShardWriter:
        return folder.reopen_shard(shard, config.retry_errors) if shard.index in reopened else folder.open_shard(shard)

    cluster = config.cluster
    leased = cluster.lease and not again
    mine = Claims(folder, cluster.worker, cluster.workers) if leased else Assigned([*shards, *again])
    collect = Collect(source, model.tokenizer(), lambda state: feed.published(state))
    feed = Feed(source, mine, open_shard, builder, config.seed, config.engine.window, config.input.threads,
                collect.opened, collect.deliver)

    def phase(name: str) -> None:
        if reason := stop.interrupted():
            raise Interrupted(reason)
        progress.phase(name)

    feed.start()    # prompts are made ready while the weights are read
    try:
        engine = model.load(phase)
        folder.settle()
        collect.start()    # not before: what a model refuses has journalled no row, and so the configuration can be mended
        try:
            stop.install()
            stop.gpus = int(engine.gpu is not None)
            rows = sum(shard.num_rows for shard in [*shards, *again])
            metrics = Metrics(folder.store, find_gpu(engine.gpu))
            return Loop(engine, feed, collect, stop, progress, metrics, rows).run(config.limits)
        finally:
            engine.close()
    except Interrupted as interrupted:
        return str(interrupted)
    except EngineError as error:
        raise JobError(f"{error}; every finished row is kept, and the same command goes on from here") from error
    finally:
        feed.stop()
        collect.close()
        progress.end(collect.done)


def make_builder(config: RunConfig, form: Form, spec: GuideSpec | None, model: Model) -> PromptBuilder:
    """Load the tokenizer and compile the task's schema or tools."""
    keys, tokenizer = config.guided, model.tokenizer()
    tools = ToolReader(tokenizer.chat_template if config.task.chat else None, config.model.tool_format, config.task)
    guides = Guides(model.grammars(), keys.retries if keys.on_unsupported == "best_effort" else 0, keys.row_types)
    guide = task_guide(config, tools.task.spec or spec, guides)
    return PromptBuilder(form, config.task, config.effective_sampling, tokenizer, guides, guide, tools, model.max_model_len(),
                         config.limits.hang_seconds)


def task_spec(config: RunConfig) -> GuideSpec | None:
    """What the task's outputs must match, checked to be a schema, a regex or a choice; None: nothing, or what its tools say."""
    task = config.task
    if not task.guides():
        return None
    key = task.guides()[0]
    try:
        if task.guided_regex is not None:
            return GuideSpec.regex(task.guided_regex)
        if task.guided_choice is not None:
            return GuideSpec.choice(task.guided_choice)
        spec = GuideSpec.of(task.guided_json if task.json_schema is None else task.json_schema)
        if spec.kind == "schema":
            Validator(json.loads(spec.text))
    except (SchemaError, ValueError) as error:
        raise ConfigError(f"task.{key}: {first_line(error)}") from None
    return spec


def task_guide(config: RunConfig, spec: GuideSpec | None, guides: Guides) -> Guide | None:
    """The task's schema or tools, compiled; what the grammar cannot keep stops the job before the model is loaded."""
    if spec is None:
        return None
    try:
        guide = guides.get(spec)
    except SchemaError as error:
        raise ConfigError(f"task.{'tools' if spec.kind == 'tools' else config.task.guides()[0]}: {error}") from None
    max_tokens = config.effective_sampling.params().max_tokens
    if max_tokens < guide.grammar.min_tokens:
        raise ConfigError(
            f"sampling.max_tokens={max_tokens}: the shortest valid output needs {guide.grammar.min_tokens}; "
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
    left_out = ("name", "sampling", "schema", "guided_json", "guided_regex", "guided_choice")
    task = {key: value for key, value in sections["task"].items() if key not in left_out}
    parts: dict[str, Any] = {
        "task": {**task, "schema": spec.text if spec else None, "guided": spec.kind if spec and spec.kind != "schema" else None},
        "sampling": config.effective_sampling.model_dump(mode="json"),
        "seed": config.seed,
        "input": {key: value for key, value in sections["input"].items() if key != "threads"},
        "engine": {key: sections["engine"][key] for key in ("dtype", "quantization", "kv_dtype", "max_model_len")},
        "guided": {key: value for key, value in sections["guided"].items() if key not in ("threads", "compile_seconds")},
        "model": {"tool_format": sections["model"]["tool_format"]},
    }
    return {**identity, **{key: short(value) for key, value in flatten(parts) if value not in (None, {}, [])}}


def short(value: Any) -> str:
    """The value itself, or a hash where it is long."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= 80 and "\n" not in text else "hash " + hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
