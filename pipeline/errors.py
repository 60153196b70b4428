"""`python -m pipeline.errors OUT`: which rows failed, and why."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.command import command, run
from pipeline.exits import Exit
from pipeline.input.plan import Shard
from pipeline.output.rows import Status
from pipeline.output.run_folder import RunFolder
from pipeline.output.store import client_errors

FINE = (Status.OK, Status.LENGTH)
EXAMPLES = """\
  python -m pipeline.errors labels/nov                          how often each error came, with a row where it did
  python -m pipeline.errors labels/nov --rows --status timeout  each of those rows
  python -m pipeline.errors labels/nov --rows --json > failed.jsonl
  python -m pipeline.run <the same arguments> retry_errors=[timeout,engine_error]      to compute them again

Looks at the shards that are committed. Exit codes: 0 no row failed   4 some did   2 OUT is not the output of a job
"""


@dataclass(frozen=True, slots=True)
class FailedRow:
    """`file`, `row`: where the prompt stands in the input."""

    file: str
    row: int
    sample: int
    row_id: str
    status: str
    error: str


def failed_rows(folder: RunFolder, statuses: set[str] | None = None) -> Iterator[FailedRow]:
    """In input order: rows of `statuses`, or (None) all that are neither ok nor cut by their length."""
    done = folder.committed()
    for shard in folder.plan.shards:
        wanted = set(done[shard.index].statuses) if shard.index in done else set()
        wanted = wanted & statuses if statuses else wanted - {*map(str, FINE)}
        if wanted:
            yield from _failed_rows(folder, shard, wanted)


def _failed_rows(folder: RunFolder, shard: Shard, wanted: set[str]) -> Iterator[FailedRow]:
    places = dict(zip(shard.row_ids(), shard.places(), strict=True))
    with client_errors(folder.out), folder.store.open(shard.name) as file:
        for batch in pq.ParquetFile(file).iter_batches(columns=["row_id", "sample", "status", "error"]):
            for row in batch.filter(pc.is_in(batch.column("status"), value_set=pa.array(sorted(wanted)))).to_pylist():
                yield FailedRow(*places[row["row_id"]], row["sample"], row["row_id"], row["status"], row["error"] or "")


def main(arguments: argparse.Namespace) -> int:
    folder = RunFolder.load(arguments.out)
    rows = failed_rows(folder, set(arguments.status) if arguments.status else None)
    counts: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], FailedRow] = {}
    for row in rows:
        kind = (row.status, row.error)
        counts[kind] += 1
        first.setdefault(kind, row)
        if arguments.rows:
            print(orjson.dumps(asdict(row)).decode() if arguments.json else
                  f"{row.file}:{row.row}  sample {row.sample}  {row.row_id}  {row.status}  {row.error}")
    if not arguments.rows:
        for kind, count in counts.most_common(arguments.most):
            row = first[kind]
            if arguments.json:
                print(orjson.dumps({"count": count, "status": row.status, "error": row.error, "first": asdict(row)}).decode())
            else:
                print(f"{count:>9,}  {row.status:<16} {row.error}\n{'':>11}first: {row.file}:{row.row}, row_id {row.row_id}")
        if not arguments.json:
            print(f"{counts.total():,} rows failed, in {len(counts):,} ways" if counts else "no row failed")
    return Exit.ERROR_RATE if counts else Exit.COMPLETE


def parser() -> argparse.ArgumentParser:
    parser = command("errors", "Which rows failed, and why.", EXAMPLES)
    parser.add_argument("--rows", action="store_true", help="each row, instead of a count of each error")
    parser.add_argument("--status", action="append", choices=[*map(str, Status)], metavar="STATUS",
                        help="only this one (may be repeated)")
    parser.add_argument("--most", type=int, default=20, metavar="N", help="only the N most frequent errors (default: 20)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser


if __name__ == "__main__":
    sys.exit(run(main, parser()))
