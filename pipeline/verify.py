"""`python -m pipeline.verify OUT`: read every part to the last page and hold it against the plan."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Generator, Iterator

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.command import add_spool, command, histogram, run
from pipeline.exits import Exit, StorageError
from pipeline.input.plan import Shard
from pipeline.output.part import PartInfo
from pipeline.output.run_folder import MANIFEST, RUN, RunFolder
from pipeline.output.store import client_errors

EXAMPLES = """\
  python -m pipeline.verify labels/nov
  python -m pipeline.verify labels/nov --finalize      then write what a worker that did not live to the end left unwritten

Every planned row must be there once for each of its samples, in input order, in a part that this run wrote and whose pages
have their checksums. Exit codes: 0 whole   3 shards are missing   1 damaged or not ours   2 OUT is not the output of a job
"""


def verify(folder: RunFolder) -> Iterator[str]:
    """What is wrong with the parts that are there, one line each. Memory holds one row group."""
    names = folder.store.names()
    planned = {shard.name for shard in folder.plan.shards}
    for name in sorted(names):
        if name.startswith("part-") and name not in planned:
            yield f"{name} is in no plan of this run: move it away, Parquet readers would take its rows too"
    schema: pa.Schema | None = None
    for shard in folder.plan.shards:
        if shard.name not in names:
            continue
        try:
            (info,) = folder.committed([shard]).values()
            found = yield from _verify_part(folder, shard, info)
        except StorageError as error:
            yield str(error)
            continue
        if schema is not None and not found.equals(schema):
            yield f"{shard.name} has other columns than the parts before it"
        schema = schema or found


def is_finalized(folder: RunFolder) -> bool:
    """_SUCCESS is there, and the manifest speaks of the parts as they are."""
    manifest = folder.store.read(MANIFEST)
    if manifest is None or not folder.is_complete():
        return False
    stated = {part["path"]: part["attempt"] for part in orjson.loads(manifest)["parts"]}
    return stated == {folder.plan.shards[index].name: info.attempt for index, info in folder.committed().items()}


def _verify_part(folder: RunFolder, shard: Shard, info: PartInfo) -> Generator[str, None, pa.Schema]:
    ids = shard.row_ids()
    expected, sample, rows, statuses = "", 0, 0, Counter[str]()
    with client_errors(folder.out), folder.store.open(shard.name) as file:
        part = pq.ParquetFile(file, page_checksum_verification=True)
        try:
            for batch in part.iter_batches():
                statuses.update(batch.column("status").to_pylist())
                for id, number in zip(batch.column("row_id").to_pylist(), batch.column("sample").to_pylist(), strict=True):
                    if number == 0:
                        expected, sample = next(ids, ""), 0
                    if (id, number) != (expected, sample):
                        yield f"{shard.name}: row {rows} is {id}, sample {number}, planned is {expected}, sample {sample}"
                        return part.schema_arrow
                    rows, sample = rows + 1, sample + 1
        except (OSError, ValueError) as error:
            raise StorageError(f"{folder.out}/{shard.name} is damaged after row {rows} ({error}): move it away and run the job"
                               " again") from error
        if next(ids, None) is not None:
            yield f"{shard.name}: rows are missing at its end"
        if statuses != info.statuses:
            yield f"{shard.name}: its statuses are not those that its footer counts"
        return part.schema_arrow


def main(arguments: argparse.Namespace) -> int:
    folder = RunFolder.load(arguments.out, arguments.spool)
    wrong = 0
    for line in verify(folder):
        print(f"wrong: {line}", file=sys.stderr)
        wrong += 1
    if wrong:
        return Exit.FAILED
    manifest = folder.manifest()
    if arguments.finalize and not is_finalized(folder):
        _finalize(folder)
    state = "complete" if is_finalized(folder) else "whole, but not finalized (--finalize does it)"
    print(f"{folder.out}: {state}: {manifest['shards']:,} shards, {manifest['rows']:,} rows")
    print(histogram(manifest["statuses"]))
    return Exit.COMPLETE


def _finalize(folder: RunFolder) -> None:
    """As the job's last worker would have: with the report, from the configuration that _run.json keeps."""
    from engine.guided.front import GuideSpec
    from pipeline.config import check
    from pipeline.observe.report import finish

    config = check(orjson.loads(folder.store.read(RUN) or b"")["info"]["config"])
    schema = config.task.json_schema
    finish(config, folder, None if schema is None else GuideSpec.of(schema))


def parser() -> argparse.ArgumentParser:
    parser = command("verify", "Read every part to the last page and hold it against the plan.", EXAMPLES)
    parser.add_argument("--finalize", action="store_true", help="if all is whole, write the report, _manifest.json and _SUCCESS")
    add_spool(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run(main, parser()))
