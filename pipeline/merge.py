"""`python -m pipeline.merge OUT FILE`: all parts as one Parquet file, in input order."""

from __future__ import annotations

import argparse
import sys
import uuid
from pathlib import Path

import pyarrow.parquet as pq

from pipeline.command import command, run
from pipeline.exits import ConfigError, Exit, ShardsMissing
from pipeline.output.run_folder import RunFolder
from pipeline.output.store import client_errors, storage_errors, sync_file

EXAMPLES = """\
  python -m pipeline.merge labels/nov nov.parquet
  python -m pipeline.merge labels/nov so-far.parquet --partial

Exit codes: 0 written   3 shards are missing   2 OUT is not the output of a job, or FILE is there already or in no folder
"""


def merge(folder: RunFolder, target: Path, partial: bool = False) -> int:
    """Copy the parts, a row group at a time, to `target`, which appears once it is whole. Returns the number of rows."""
    done = folder.committed()
    shards = [shard for shard in folder.plan.shards if shard.index in done]
    if len(shards) < len(folder.plan.shards) and not partial:
        folder.manifest()      # says which are missing
    if not shards:
        raise ShardsMissing(f"{folder.out} has no committed shard yet")
    if target.exists():
        raise ConfigError(f"{target} exists: remove it, or choose another name")
    if not target.parent.is_dir():
        raise ConfigError(f"{target.parent}: no such folder; make it, or choose another")
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.inprogress")
    writer: pq.ParquetWriter | None = None
    rows = 0
    try:
        for shard in shards:
            with client_errors(folder.out), folder.store.open(shard.name) as file:
                part = pq.ParquetFile(file, page_checksum_verification=True)
                for number in range(part.num_row_groups):
                    group = part.read_row_group(number)
                    with storage_errors(str(target)):
                        writer = writer or pq.ParquetWriter(temporary, group.schema.remove_metadata(), compression="zstd")
                        writer.write_table(group)
                    rows += group.num_rows
        with storage_errors(str(target)):
            assert writer is not None
            writer.close()
            sync_file(temporary)
            temporary.rename(target)
    finally:
        temporary.unlink(missing_ok=True)
    return rows


def main(arguments: argparse.Namespace) -> int:
    rows = merge(RunFolder.load(arguments.out), Path(arguments.file), arguments.partial)
    print(f"{arguments.file}: {rows:,} rows")
    return Exit.COMPLETE


def parser() -> argparse.ArgumentParser:
    parser = command("merge", "All parts as one Parquet file, in input order.", EXAMPLES)
    parser.add_argument("file", metavar="FILE", help="the Parquet file to write")
    parser.add_argument("--partial", action="store_true", help="also when shards are missing")
    return parser


if __name__ == "__main__":
    sys.exit(run(main, parser()))
