"""One attempt at one shard: results go to its journal as they come, and make the part once all are there."""

from __future__ import annotations

import re
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import orjson
import pyarrow as pa

from pipeline.exits import StorageError
from pipeline.input.plan import Shard
from pipeline.output.journal import Journal, read_journal
from pipeline.output.layout import OutputLayout
from pipeline.output.part import FORMAT, PartInfo, ShardId, build_part, read_part
from pipeline.output.rows import RowResult, Status
from pipeline.output.store import Store, storage_errors

_values = attrgetter(*RowResult.__slots__)


class ShardWriter:
    """Used by one thread at a time; two writers are independent and may commit at the same time. After a StorageError a writer
    can only be closed: its journal is whole, but the process should end."""

    def __init__(self, store: Store, shard: Shard, id: ShardId, layout: OutputLayout, generation: int = 0,
                 kept: Iterable[RowResult] = ()) -> None:
        """`generation`, `kept`: when failed rows are done again, which time this is and the rows that stay as they are."""
        self.shard = shard
        self._store, self._layout = store, layout
        self._info = PartInfo(id, uuid.uuid4().hex, generation)
        self._results: dict[tuple[int, int], RowResult] = {}
        self._num_rows = self._rows_left = shard.num_rows
        self._samples_left: dict[int, int] = {}        # of rows with several samples, once one is there
        self._journal = Journal(self._path("journal"), _header(id, generation))
        for result in kept:
            self._add(result)
        for result in journalled(store, shard, id, generation):
            if (result.row, result.sample) not in self._results:       # two attempts that raced may both have done it
                self._add(result)

    def recovered(self) -> Mapping[tuple[int, int], RowResult]:
        """(row, sample) -> result of what is there already, from earlier attempts or this one: not to be computed again. A row is
        whole when all of its `samples` are there."""
        return self._results

    def missing(self) -> int:
        """Rows that lack a sample yet; commit needs 0."""
        return self._rows_left

    def append(self, *results: RowResult) -> None:
        """Journal finished rows, in any order. They survive a killed process at once and a power cut within two seconds.
        ValueError: a row or sample out of range, or one that is there already. StorageError: disk full and the like."""
        payloads = [_encode(result) for result in results]
        for result in results:
            self._add(result)
        with self._unless_committed():
            self._journal.append(payloads)

    def flush(self) -> None:
        """Force what was appended to disk: to be called now and then, and before a commit that may take long to come."""
        with self._unless_committed():
            self._journal.sync()

    def close(self) -> None:
        """Flush and let go, without a commit; the journal stays for the next attempt."""
        with storage_errors(str(self._store.work)):
            self._journal.close()

    def commit(self, input_tables: Iterable[pa.Table]) -> bool:
        """Write, check and publish the part; then drop the journals. True: this attempt's part was published; False: another's
        was there first, which is just as good. `input_tables`: the shard's input rows in order, in chunks of any size, with the
        columns of layout.input. ValueError if rows are missing; ConfigError if the input no longer holds the rows planned."""
        if self._rows_left:
            raise ValueError(f"shard {self.shard.index} lacks {self._rows_left} rows")
        path = self._path("inprogress")
        try:
            counted = replace(self._info, statuses=Counter())      # a commit that failed may be tried again
            build_part(path, self.shard, self._layout, self._results, input_tables, counted)
            won = self._publish(path)
        except StorageError:
            if not self._is_committed():
                raise
            won = False
        finally:
            path.unlink(missing_ok=True)
        with storage_errors(str(self._store.work)):
            self._journal.close()
            for journal in _journals(self._store, self.shard):
                if not is_later(journal.name, {self.shard.index: self._info.generation}):
                    journal.unlink(missing_ok=True)
        return won

    def _publish(self, path: Path) -> bool:
        name, info = self.shard.name, self._info
        if info.generation:
            if read_part(self._store, name, info.id).generation >= info.generation:
                return False
            self._store.supersede(path, name, f"{name.removesuffix('.parquet')}.g{info.generation - 1:03d}.parquet")
            return True
        # A link or PUT that was sent twice is told "exists" of its own first try: the footer knows whose part it is.
        return self._store.publish(path, name) or read_part(self._store, name, info.id).attempt == info.attempt

    @contextmanager
    def _unless_committed(self) -> Iterator[None]:
        """What becomes of the journal matters until another worker has committed this shard."""
        try:
            with storage_errors(str(self._store.work)):
                yield
        except StorageError:
            if not self._is_committed():
                raise

    def _is_committed(self) -> bool:
        """Another worker has committed this shard, and its sweep may have taken our journal or part from under us."""
        name, info = self.shard.name, self._info
        return name in self._store.names() and read_part(self._store, name, info.id).generation >= info.generation

    def _path(self, suffix: str) -> Path:
        again = f".g{self._info.generation:03d}" if self._info.generation else ""
        return self._store.work / f"{self.shard.index:05d}{again}.{self._info.attempt}.{suffix}"

    def _add(self, result: RowResult) -> None:
        row, sample, samples = result.row, result.sample, result.samples
        if not (0 <= row < self._num_rows and 0 <= sample < samples):
            raise ValueError(f"shard {self.shard.index} has no row {row}, sample {sample} of {samples}")
        if (row, sample) in self._results:
            raise ValueError(f"shard {self.shard.index} has row {row}, sample {sample} already")
        self._results[row, sample] = result
        left = self._samples_left.get(row, samples) - 1
        if left:
            self._samples_left[row] = left
        else:
            self._rows_left -= 1


def journalled(store: Store, shard: Shard, id: ShardId, generation: int = 0) -> Iterator[RowResult]:
    """What all attempts at a shard have journalled; a row that two of them did comes twice."""
    with storage_errors(str(store.work)):
        for path in sorted(_journals(store, shard)):
            for payload in read_journal(path, _header(id, generation)):
                result = RowResult(*orjson.loads(payload))
                result.status = Status(result.status)
                yield result


def is_later(name: str, generations: Mapping[int, int]) -> bool:
    """Whether a file of the work folder is of an attempt at a shard that these generations of parts, by shard, do not settle."""
    of = re.match(r"(\d+)\.(?:g(\d+)\.)?", name)
    return of is not None and int(of[2] or 0) > generations.get(int(of[1]), -1)


def _journals(store: Store, shard: Shard) -> Iterable[Path]:
    return store.work.glob(f"{shard.index:05d}.*.journal")


def _header(id: ShardId, generation: int) -> bytes:
    """A journal that another run left in the same place does not begin with this."""
    return orjson.dumps([FORMAT, id.fingerprint, id.plan, id.shard, generation])


def _encode(result: RowResult) -> bytes:
    """As JSON. Lone surrogates, which neither JSON nor Arrow can hold, become "?" in the result itself."""
    try:
        return orjson.dumps(_values(result), option=orjson.OPT_SERIALIZE_NUMPY)
    except orjson.JSONEncodeError:
        for name in ("error", "text", "json", "tool_calls"):
            value = getattr(result, name)
            if value is not None:
                setattr(result, name, value.encode("utf-8", "replace").decode())
        return orjson.dumps(_values(result), option=orjson.OPT_SERIALIZE_NUMPY)
