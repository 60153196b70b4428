"""The end of a run: metrics.parquet, report.html, the manifest, _SUCCESS, and what is said on standard output, statuses last."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import jinja2
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from engine.guided.front import GuideSpec
from pipeline.command import histogram
from pipeline.config import RunConfig
from pipeline.exits import Exit
from pipeline.observe.metrics import merge_metrics
from pipeline.observe.progress import duration
from pipeline.output.rows import Status
from pipeline.output.run_folder import MANIFEST, RUN, RunFolder

REPORT = "report.html"
FINE = (Status.OK, Status.LENGTH)  # all others are errors
OTHERS = "this worker's are done, others have these; the last of them completes the run"
LABEL_ROWS = 200_000  # that the table of labels counts, at most


def finish(config: RunConfig, folder: RunFolder, spec: GuideSpec | None) -> int:
    """Check that every part is there, write what stands beside them, _SUCCESS last, and say how it went. Raises ShardsMissing."""
    manifest = folder.manifest(OTHERS) if config.cluster.workers > 1 else folder.manifest()
    metrics = merge_metrics(folder.store)
    manifest |= {"labels": count_labels(folder, spec), "speed": speed(metrics)}
    run = orjson.loads(folder.store.read(RUN) or b"{}")
    folder.store.replace(REPORT, render(manifest, metrics, run.get("info", {})).encode())
    folder.finalize(manifest)
    return say(config, folder, manifest)


def say_done(config: RunConfig, folder: RunFolder) -> int:
    """The same words again for a run that was complete already."""
    print("All is done: every row of this input has its result.")
    return say(config, folder, orjson.loads(folder.store.read(MANIFEST) or b"{}"))


def say(config: RunConfig, folder: RunFolder, manifest: Mapping[str, Any]) -> int:
    """Labels, speed, place, what to type next, statuses. Returns the exit code."""
    labels: dict[str, dict[str, int]] = manifest.get("labels", {})
    width = max(map(len, labels), default=0)
    for name, counts in labels.items():
        print(f"{name:<{width}}  " + ", ".join(f"{value} {count:,}" for value, count in Counter(counts).most_common()))
    if rate := manifest.get("speed"):
        print(
            f"{rate['rows']:,} rows in {duration(rate['seconds'])}: {rate['rows_per_second']:,.1f} rows/s, "
            f"{rate['generated_tokens_per_second']:,.0f} tokens/s generated, "
            f"{rate['prompt_tokens_per_second']:,.0f} tokens/s of prompts"
        )
    out = folder.out.rstrip("/")
    print(f"output: {out}/{folder.plan.shards[0].name}{' and its siblings' if manifest['shards'] > 1 else ''}, {out}/{REPORT}")
    print(f"next:   {reading(out, folder.plan.shards[0].name)}")
    print(f"        python -m pipeline.merge {out} {out}.parquet")
    statuses: dict[str, int] = manifest["statuses"]
    rows = max(sum(statuses.values()), 1)
    bad = sum(count for status, count in statuses.items() if status not in FINE)
    too_many = bad / rows > config.limits.max_error_rate
    if too_many:
        print(
            f"{bad:,} of {rows:,} rows have errors, more than limits.max_error_rate={config.limits.max_error_rate:g}; "
            "the column error says why"
        )
    print(histogram(statuses))
    return Exit.ERROR_RATE if too_many else Exit.COMPLETE


def reading(out: str, part: str) -> str:
    """A command that shows the rows: the parts by name, since other Parquet and HTML stands beside them. Of a URL, one part."""
    if "://" in out:
        return f"python -c \"import pandas; print(pandas.read_parquet('{out}/{part}'))\""
    return f"python -c \"import glob, pandas; print(pandas.read_parquet(sorted(glob.glob('{out}/part-*.parquet'))))\""


def count_labels(folder: RunFolder, spec: GuideSpec | None) -> dict[str, dict[str, int]]:
    """How often each value of the schema's top-level enums and truth values was given, in the first LABEL_ROWS rows."""
    schema = json.loads(spec.text) if spec is not None and spec.kind == "schema" else None
    properties = schema.get("properties", {}) if isinstance(schema, dict) else {}
    names = [
        name for name, sub in properties.items() if isinstance(sub, dict) and ("enum" in sub or sub.get("type") == "boolean")
    ]
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    seen = 0
    for shard in folder.plan.shards if names else ():
        with folder.store.open(shard.name) as file:
            texts = [text for text in pq.ParquetFile(file).read(["json"]).column("json").to_pylist() if text is not None]
        for text in texts:
            value = json.loads(text)
            for name in names:
                if isinstance(value, dict) and name in value:
                    counts[name][value[name] if isinstance(value[name], str) else json.dumps(value[name])] += 1
        seen += len(texts)
        if seen >= LABEL_ROWS:
            break
    return {name: dict(found) for name, found in counts.items() if found}


def speed(metrics: pa.Table) -> dict[str, float] | None:
    """Sums over attempts and workers; None where nothing was measured."""
    last: dict[str, dict[str, Any]] = {row["attempt"]: row for row in metrics.to_pylist()}
    seconds = sum(row["seconds"] for row in last.values())
    if not seconds:
        return None
    total = {name: sum(row[name] for row in last.values()) for name in ("rows", "prompt_tokens", "generated_tokens")}
    return {"seconds": seconds, "rows": total["rows"], **{f"{name}_per_second": value / seconds for name, value in total.items()}}


def render(manifest: Mapping[str, Any], metrics: pa.Table, info: Mapping[str, Any]) -> str:
    """report.html: one file that needs no network."""
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        files("pipeline.observe").joinpath(REPORT).read_text()
    )
    charts = [
        (title, *_line(metrics, column), unit)
        for title, column, unit in (
            ("Generated tokens a second", "generated_tokens_per_second", "tok/s"),
            ("Prompt tokens a second", "prompt_tokens_per_second", "tok/s"),
            ("Rows a second", "rows_per_second", "rows/s"), ("Rows running", "running", "rows"),
            ("KV pool in use", "kv_use", ""), ("GPU in use", "gpu_use", ""),
        )
    ]  # fmt: skip
    return template.render(
        manifest=manifest,
        charts=[chart for chart in charts if chart[1]],
        info=info,
        config=json.dumps(info.get("config", {}), indent=2, ensure_ascii=False),
        duration=duration,
    )


def _line(metrics: pa.Table, column: str, width: int = 600, height: int = 120, points: int = 300) -> tuple[str, float]:
    """The points of an SVG polyline over time, and the largest value; no points where nothing was measured."""
    rows = [
        (row["time"].timestamp(), row[column]) for row in metrics.select(["time", column]).to_pylist() if row[column] is not None
    ]
    if len(rows) < 2:
        return "", 0.0
    rows = rows[:: -(-len(rows) // points)]
    first, last, top = rows[0][0], rows[-1][0], max(value for _, value in rows) or 1.0
    return " ".join(
        f"{(t - first) / max(last - first, 1e-9) * width:.1f},{height - value / top * height:.1f}" for t, value in rows
    ), top
