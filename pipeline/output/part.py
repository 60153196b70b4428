"""A part: one shard's Parquet file. Its footer says which run, plan and shard it belongs to; it is itself the shard's commit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.exits import ConfigError, StorageError
from pipeline.input.plan import Shard
from pipeline.output.layout import OutputLayout
from pipeline.output.rows import RowResult
from pipeline.output.store import Store, client_errors, storage_errors

FORMAT = 1
BLOCK_ROWS = 512                 # rows turned into Arrow at once
BLOCK_BYTES = 64 << 20           # of input rows that are repeated for their samples
ROW_GROUP_ROWS = 32_768
ROW_GROUP_BYTES = 64 << 20       # in memory, before compression
_PREFIX = "gristmill."
_COUNTS = ("prompt_tokens", "cached_tokens", "completion_tokens")


@dataclass(frozen=True, slots=True)
class ShardId:
    """What ties a part, and a journal, to its run: hashes of the fingerprint and of the plan that added the shard."""

    fingerprint: str
    plan: str
    shard: int


@dataclass(slots=True)
class PartInfo:
    """What a footer says. `rows`: one for each sample. `generation`: 0, and one more for each time that failed rows were done
    again. `attempt`: the writer's uuid, the only value in a part that two attempts at the same rows do not share."""

    id: ShardId
    attempt: str
    generation: int = 0
    rows: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def count(self, table: pa.Table) -> None:
        self.rows += table.num_rows
        for pair in pc.value_counts(table.column("status")).to_pylist():
            self.statuses[pair["values"]] += pair["counts"]
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + (pc.sum(table.column(name)).as_py() or 0))

    def to_footer(self) -> dict[str, str]:
        values: dict[str, Any] = {
            "format": FORMAT, "fingerprint": self.id.fingerprint, "plan": self.id.plan, "shard": self.id.shard,
            "generation": self.generation, "rows": self.rows, "statuses": dict(sorted(self.statuses.items())),
            **{name: getattr(self, name) for name in _COUNTS}, "attempt": self.attempt,
        }
        return {_PREFIX + key: value if isinstance(value, str) else orjson.dumps(value).decode() for key, value in values.items()}

    @classmethod
    def from_footer(cls, metadata: pq.FileMetaData) -> PartInfo:
        """Raises ValueError or KeyError if this is not a part, or not a whole one."""
        footer = metadata.metadata or {}
        raw = {key.decode().removeprefix(_PREFIX): value.decode("utf-8", "replace") for key, value in footer.items()}
        if raw.get("format") != str(FORMAT):
            raise ValueError("no job of this version wrote it")
        id = ShardId(raw["fingerprint"], raw["plan"], int(raw["shard"]))
        info = cls(id, raw["attempt"], int(raw["generation"]), int(raw["rows"]), Counter(orjson.loads(raw["statuses"])),
                   *(int(raw[name]) for name in _COUNTS))
        if metadata.num_rows != info.rows:
            raise ValueError(f"it holds {metadata.num_rows} of {info.rows} rows")
        return info


def read_part(store: Store, name: str, expected: ShardId) -> PartInfo:
    """The footer of a published part. StorageError if it is damaged or not the expected one: it is never overwritten."""
    mend = "move it away and run the same command again"
    with client_errors(store.out), store.open(name) as file:
        try:
            info = PartInfo.from_footer(pq.read_metadata(file))
        except (ValueError, KeyError, OSError) as error:      # pyarrow calls a footer that it cannot parse an OSError
            raise StorageError(f"{store.out}/{name} is not a whole part of any run ({error}): {mend}") from error
    if info.id != expected:
        raise StorageError(f"{store.out}/{name} belongs to another run or plan: {mend}")
    return info


def build_part(path: Path, shard: Shard, layout: OutputLayout, results: Mapping[tuple[int, int], RowResult],
               input_tables: Iterable[pa.Table], info: PartInfo) -> None:
    """Write the part to the local file `path`, counting into `info`, and read it back.

    Memory holds one row group. Where the groups end depends on the rows alone, so equal rows give equal bytes.
    ConfigError if the input does not hold the planned number of rows.
    """
    row_ids: list[pa.Array] = []
    with storage_errors(str(path.parent)):
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = pq.ParquetWriter(path, layout.schema, compression="zstd", compression_level=3, write_page_checksum=True)
    try:
        for group in _row_groups(_output(shard, layout, results, input_tables)):
            info.count(group)
            row_ids += group.column("row_id").chunks
            with storage_errors(str(path.parent)):
                writer.write_table(group, row_group_size=group.num_rows)
        writer.add_key_value_metadata(info.to_footer())
    finally:
        with storage_errors(str(path.parent)):
            writer.close()
    _check(path, layout, info, pa.chunked_array(row_ids, pa.string()))


def _check(path: Path, layout: OutputLayout, info: PartInfo, row_ids: pa.ChunkedArray) -> None:
    """Reopen a closed part: its footer, schema and row ids must be what was meant."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            same = (
                PartInfo.from_footer(file.metadata) == info
                and file.schema_arrow.remove_metadata().equals(layout.schema)
                and file.read(["row_id"]).column("row_id").equals(row_ids)
            )
        reason = "its values differ"
    except (ValueError, KeyError, OSError) as error:
        same, reason = False, str(error)
    if not same:
        raise StorageError(f"{path} does not read back as it was written ({reason}): its disk is at fault, or something else"
                           " writes there; run the same command again")


def _output(shard: Shard, layout: OutputLayout, results: Mapping[tuple[int, int], RowResult], input_tables: Iterable[pa.Table]
            ) -> Iterator[pa.Table]:
    """Input rows beside their results, in input order, a block at a time."""
    row_ids = shard.row_ids()
    start = 0
    for block in _blocks(input_tables, layout.input):
        rows = range(start, start + block.num_rows)
        start = rows.stop
        if start > shard.num_rows:
            break
        ids = list(islice(row_ids, len(rows)))
        picked = [results[row, sample] for row in rows for sample in range(results[row, 0].samples)]
        if len(picked) == len(rows):
            yield layout.table(block, ids, picked)
            continue
        for piece in _pieces(block, [result.row - rows.start for result in picked]):
            indices = [result.row - rows.start for result in picked[piece]]
            first, end = indices[0], indices[-1] + 1
            repeated = block.slice(first, end - first).take([index - first for index in indices])
            yield layout.table(repeated, [ids[index] for index in indices], picked[piece])
    if start != shard.num_rows:
        raise ConfigError(f"the input of shard {shard.index} no longer holds the {shard.num_rows} rows that were planned:"
                          " restore it, or set another output.dir")


def _pieces(block: pa.Table, indices: list[int]) -> Iterator[slice]:
    """Cuts `indices`, rising and each once for every sample, where the rows of `block` come to as much as one array may hold."""
    sizes = [block.slice(index, 1).nbytes for index in range(block.num_rows)]
    start = size = 0
    for end, index in enumerate(indices):
        if end > start and (end - start == BLOCK_ROWS or size + sizes[index] > BLOCK_BYTES):
            yield slice(start, end)
            start, size = end, 0
        size += sizes[index]
    yield slice(start, len(indices))


def _blocks(tables: Iterable[pa.Table], schema: pa.Schema) -> Iterator[pa.Table]:
    """The same rows in tables of BLOCK_ROWS rows, the last one shorter."""
    held = schema.empty_table()
    for table in tables:
        table = table.select(schema.names)
        held = pa.concat_tables([held, table.cast(schema) if table.schema != schema else table])
        whole = held.num_rows - held.num_rows % BLOCK_ROWS
        for start in range(0, whole, BLOCK_ROWS):
            yield held.slice(start, BLOCK_ROWS)
        held = held.slice(whole)
    if held.num_rows:
        yield held


def _row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables that make one row group each."""
    held: list[pa.Table] = []
    rows = size = 0
    for table in tables:
        held.append(table)
        rows, size = rows + table.num_rows, size + table.nbytes
        if rows >= ROW_GROUP_ROWS or size >= ROW_GROUP_BYTES:
            yield pa.concat_tables(held).combine_chunks()
            held, rows, size = [], 0, 0
    if held:
        yield pa.concat_tables(held).combine_chunks()
