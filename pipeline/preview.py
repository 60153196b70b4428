"""`dry_run=true`: what the job would do, found out without the model's weights."""

from __future__ import annotations

from collections import Counter

import numpy as np

from pipeline.config import RunConfig
from pipeline.estimate import H100, Workload, fresh_tokens, seconds, this_device
from pipeline.exits import Exit
from pipeline.input.plan import Plan
from pipeline.input.prompts import Prompt, PromptBuilder
from pipeline.input.sources import Input
from pipeline.model import Model
from pipeline.observe.progress import duration
from pipeline.output.rows import Status

SAMPLE_ROWS = 2000  # that are rendered and tokenised, from the start of the input
_BINS = 12
_BAR = 40


def preview(config: RunConfig, source: Input, plan: Plan, builder: PromptBuilder, model: Model) -> int:
    """Print the plan, the token lengths of the first rows, what is wrong with them, the time, and what the schema needs."""
    max_model_len = model.max_model_len()
    size = sum(file.size for file in source.files) / 2**20
    print(f"input:   {_count(len(source.files), 'file')}, {size:,.1f} MiB, {_count(plan.num_rows, 'row')} "
          f"in {_count(len(plan.shards), 'shard')} of at most {plan.rows_per_shard:,}")
    print(f"columns: {', '.join(f'{field.name} ({field.type})' for field in source.schema)}")
    print(f"prompts: made of {'no column' if builder.alike else ', '.join(builder.columns)}")
    ask = builder.default
    need = ask.guide.grammar.min_tokens if ask.guide else 1
    shortest = f"; the shortest that the schema allows has about {need:,}" if ask.guide else ""
    print(f"output:  {config.output.dir}; {_count(ask.n, 'sample')} a row of at most {ask.params.max_tokens:,} tokens{shortest}")
    refused = _refusals(source, plan, builder)
    prompts = _sample(source, plan, builder)
    for prompt in prompts:
        if prompt.tokens is not None and len(prompt.tokens) + need > max_model_len:
            prompt.status = Status.PROMPT_TOO_LONG
            prompt.error = f"{len(prompt.tokens)} prompt tokens leave no room in engine.max_model_len={max_model_len}"
    _lengths([len(prompt.tokens) for prompt in prompts if prompt.tokens is not None], len(prompts), plan.num_rows)
    if runnable := [prompt.tokens for prompt in prompts if prompt.status is Status.OK and prompt.tokens is not None]:
        _time(config, model, runnable, plan.num_rows * len(runnable) / len(prompts), need)
    for prompt in [prompt for prompt in prompts if prompt.error and prompt.row not in refused][:5]:
        print(f"row {prompt.row}: {prompt.status}: {prompt.error}")
    for status, count in Counter(prompt.status for prompt in prompts).most_common():
        print(f"{'would run' if status is Status.OK else status:<16} {count:>8,}  {count / len(prompts):7.2%}")
    return Exit.COMPLETE


def _refusals(source: Input, plan: Plan, builder: PromptBuilder) -> set[int]:
    """Print every row, of all the input, whose own schema, tools or sampling is refused; returns their numbers."""
    refused: set[int] = set()
    if not builder.rows_ask:
        return refused
    cursor = source.cursor(builder.columns)
    first = 0
    for shard in plan.shards:
        ids, at = list(shard.row_ids()), first
        for chunk in cursor.read(shard):
            for row, reason in builder.refusals(chunk, at):
                refused.add(row)
                print(f"row {row} ({ids[row - first]}): {reason.status}: {reason}")
            at += chunk.table.num_rows
        first = at
    if refused:
        print(f"refused: {_count(len(refused), 'row')} of {plan.num_rows:,}; they will have these statuses, and the others run")
    return refused


def _sample(source: Input, plan: Plan, builder: PromptBuilder) -> list[Prompt]:
    cursor = source.cursor(builder.columns)
    prompts: list[Prompt] = []
    for shard in plan.shards:
        for chunk in cursor.read(shard):
            prompts += builder.build(chunk, len(prompts))
            if len(prompts) >= SAMPLE_ROWS:
                return prompts[:SAMPLE_ROWS]
    return prompts


def _lengths(lengths: list[int], sampled: int, rows: int) -> None:
    """A histogram of prompt lengths, and what they come to over the whole input."""
    if not lengths:
        return
    mean = sum(lengths) / len(lengths)
    print(
        f"prompt tokens of the first {sampled:,} rows: {min(lengths):,} to {max(lengths):,}, mean {mean:,.0f}; "
        f"about {mean * rows * len(lengths) / sampled:,.0f} in all"
    )
    width = max(-(-(max(lengths) + 1 - min(lengths)) // _BINS), 1)
    bins = Counter((length - min(lengths)) // width for length in lengths)
    for index in range(max(bins) + 1):
        first = min(lengths) + index * width
        print(f"{first:>8,} - {first + width - 1:<8,} {bins[index]:>6,}  {'#' * round(_BAR * bins[index] / max(bins.values()))}")


def _time(config: RunConfig, model: Model, prompts: list[np.ndarray], rows: float, need: int) -> None:
    """From the shortest outputs that are allowed to the longest."""
    most = config.effective_sampling.params().max_tokens
    samples, n = config.effective_sampling.n or 1, len(prompts)
    fresh = fresh_tokens(prompts) if config.engine.prefix_sharing else sum(map(len, prompts))
    here = this_device(config.engine_config())
    for device in (here, H100) if here.kind == "cpu" and config.engine.device == "auto" else (here,):
        size = model.size(device.kind)
        least, longest = (
            seconds(size, device, Workload(rows * samples, sum(map(len, prompts)) / n, fresh / n / samples, output))
            / config.cluster.workers for output in (need, most)
        )
        span = f"{duration(max(least, 1))} (outputs of {need:,}) to {duration(max(longest, 1))} (of {most:,} tokens)"
        each = f", on each of {config.cluster.workers} workers" if config.cluster.workers > 1 else ""
        print(f"time:    about {span} on {device.name}{each}")


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"
