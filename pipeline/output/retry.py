"""Doing failed rows again: which rows of a committed part stay as they are."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow.parquet as pq

from pipeline.input.plan import Shard
from pipeline.output.layout import RESULTS, OutputLayout
from pipeline.output.rows import RowResult, Status
from pipeline.output.store import Store, client_errors


def settled_rows(store: Store, shard: Shard, layout: OutputLayout, statuses: frozenset[str]) -> Iterator[RowResult]:
    """The rows of a part all of whose samples have a status outside `statuses`. Memory holds one row group."""
    columns = [*RESULTS.names, "tool_calls"] if layout.tool_calls else RESULTS.names
    ids = enumerate(shard.row_ids())
    row_id = ""
    samples: list[dict] = []
    with client_errors(store.out), store.open(shard.name) as file:
        for batch in pq.ParquetFile(file).iter_batches(columns=columns):
            for values in batch.to_pylist():
                if values["row_id"] != row_id:
                    yield from _settled(ids, samples, statuses)
                    row_id, samples = values["row_id"], []
                samples.append(values)
    yield from _settled(ids, samples, statuses)


def _settled(ids: Iterator[tuple[int, str]], samples: list[dict], statuses: frozenset[str]) -> Iterator[RowResult]:
    if not samples:
        return
    row, _ = next(ids)
    if any(sample["status"] in statuses for sample in samples):
        return
    for sample in samples:
        sample.pop("row_id")
        yield RowResult(row=row, samples=len(samples), **{**sample, "status": Status(sample["status"])})
