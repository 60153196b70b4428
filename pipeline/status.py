"""`python -m pipeline.status OUT`: how far a run is, how fast, and how its rows end."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta

import orjson

from pipeline.command import add_spool, command, histogram, ranges, run
from pipeline.exits import Exit
from pipeline.observe.metrics import read_metrics
from pipeline.output.run_folder import RunFolder
from pipeline.output.shards import journalled

RECENT = timedelta(minutes=5)      # over which rates are taken
EXAMPLES = """\
  python -m pipeline.status labels/nov
  python -m pipeline.status labels/nov --json | jq .rows
  sbatch --array=$(python -m pipeline.status labels/nov --missing 64) jobs/slurm/array.sbatch ... cluster.workers=64

Exit codes: 0 the run is complete   3 it is not   2 OUT is not the output of a job
"""


@dataclass
class Status:
    """`rows`: planned; `done`: of those, committed or journalled. Rates are of all live workers together; None: not known."""

    complete: bool
    shards: int
    committed: int
    begun: int
    rows: int
    done: int = 0
    journalled: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    rows_per_second: float | None = None
    tokens_per_second: float | None = None
    workers: int = 0


def look(folder: RunFolder) -> Status:
    done = folder.committed()
    begun = {int(path.name.split(".")[0]) for path in folder.store.work.glob("*.journal")} - done.keys()
    plan = folder.plan
    status = Status(folder.is_complete(), len(plan.shards), len(done), len(begun), plan.num_rows)
    status.done = sum(plan.shards[index].num_rows for index in done)
    for info in done.values():
        status.statuses += info.statuses
    for index in begun:
        shard = plan.shards[index]
        results = {(result.row, result.sample): result for result in journalled(folder.store, shard, folder.shard_id(shard))}
        samples = Counter(row for row, _ in results)
        status.journalled += sum(results[row, 0].samples == n for row, n in samples.items() if (row, 0) in results)
        status.statuses.update(str(result.status) for result in results.values())
    status.done += status.journalled
    _rates(folder, status)
    return status


def _rates(folder: RunFolder, status: Status) -> None:
    """From the samples of the attempts that still wrote some when the newest was written."""
    samples = read_metrics(folder.store).select(["attempt", "time", "seconds", "rows", "generated_tokens"]).to_pylist()
    if not samples or status.done == status.rows:
        return
    newest = max(sample["time"] for sample in samples)
    recent = [sample for sample in samples if newest - sample["time"] <= RECENT]
    spans = {sample["attempt"]: (first, sample) for sample in recent
             for first in [next(other for other in recent if other["attempt"] == sample["attempt"])]}
    live = [(first, last) for first, last in spans.values() if last["seconds"] > first["seconds"]]
    status.workers = len(spans)
    if live:
        status.rows_per_second, status.tokens_per_second = (
            sum((last[name] - first[name]) / (last["seconds"] - first["seconds"]) for first, last in live)
            for name in ("rows", "generated_tokens")
        )


def show(folder: RunFolder, status: Status) -> None:
    whole = "all shards are committed, not finalized" if status.committed == status.shards else "not complete"
    print(f"{folder.out}: {'complete' if status.complete else whole}")
    print(f"shards  {status.committed:,} of {status.shards:,} committed, {status.begun:,} begun")
    print(f"rows    {status.done:,} of {status.rows:,} ({status.done / max(status.rows, 1):.1%}), "
          f"{status.journalled:,} of them in shards that are begun")
    if status.rows_per_second:
        left = timedelta(seconds=round((status.rows - status.done) / status.rows_per_second))
        print(f"rate    {status.rows_per_second:,.1f} rows/s, {status.tokens_per_second:,.0f} tokens/s generated "
              f"by {status.workers} workers when last heard of; {left} left at that rate")
    if status.statuses:
        print(histogram(status.statuses))


def main(arguments: argparse.Namespace) -> int:
    folder = RunFolder.load(arguments.out, arguments.spool)
    if arguments.missing is not None:
        done = folder.committed()
        missing = [shard.index for shard in folder.plan.shards if shard.index not in done]
        if missing:
            print(ranges([index % (arguments.missing or len(folder.plan.shards)) for index in missing]))
        return Exit.SHARDS_MISSING if missing else Exit.COMPLETE
    status = look(folder)
    if arguments.json:
        print(orjson.dumps(status).decode())
    else:
        show(folder, status)
    return Exit.COMPLETE if status.complete else Exit.SHARDS_MISSING


def parser() -> argparse.ArgumentParser:
    parser = command("status", "How far a run is, how fast, and how its rows end.", EXAMPLES)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--missing", metavar="WORKERS", nargs="?", type=int, const=0,
                        help="only print which workers, of so many, have shards left, as an array expression for sbatch; "
                             "without a number, which shards are missing")
    add_spool(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run(main, parser()))
