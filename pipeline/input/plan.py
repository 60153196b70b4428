"""The plan: which rows of which files stand in which shard. Made once, saved beside the output, never changed afterwards.

Shards are cut at row-group borders, so that a worker reads each row group once; a row group larger than a shard is cut inside.
A later run may append shards for new files (`plan.on_change=append`), which leaves every earlier shard as it is.
"""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, field
from functools import cached_property
from typing import Literal

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.exits import ConfigError

FORMAT = 1
_PIECES = pa.schema(
    [
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("of", pa.int32(), nullable=False),
        pa.field("file", pa.string(), nullable=False),
        pa.field("row_group", pa.int32(), nullable=False),
        pa.field("first_row", pa.int64(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("num_rows", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class InputFile:
    """One input file as it was when it was planned.

    `key`: stable name, relative to what the user gave, so that row ids survive a move of the whole input. `uri`: where to open
    it. `size`: bytes. `version`: what changes when the file is replaced (footer hash, mtime or etag). `row_groups`: rows in each;
    formats without row groups give the pieces they can seek to, or the whole file as one.
    """

    key: str
    uri: str
    num_rows: int
    size: int
    version: str
    row_groups: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "row_groups", tuple(self.row_groups))
        if sum(self.row_groups) != self.num_rows:
            raise ValueError(f"{self.key}: {self.num_rows} rows, but its row groups hold {sum(self.row_groups)}")

    @property
    def content(self) -> tuple[int, str, int]:
        """What two names of one file have in common."""
        return self.size, self.version, self.num_rows


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive rows of one row group. `first_row`: index in the file (row ids); `offset`: index in the group (reading)."""

    file: str
    row_group: int
    first_row: int
    offset: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class Shard:
    """The rows of one output part. `of`: how many shards the plan had when this one was added: the name never changes."""

    index: int
    of: int
    pieces: tuple[Piece, ...]

    @property
    def num_rows(self) -> int:
        return sum(piece.num_rows for piece in self.pieces)

    @property
    def name(self) -> str:
        return f"part-{self.index:05d}-of-{self.of:05d}.parquet"

    def row_ids(self) -> Iterator[str]:
        """The id of each row, in order."""
        for piece in self.pieces:
            yield from row_ids(piece.file, piece.first_row, piece.num_rows)

    def places(self) -> Iterator[tuple[str, int]]:
        """The file and the index in it of each row, in order."""
        for piece in self.pieces:
            for row in range(piece.first_row, piece.first_row + piece.num_rows):
                yield piece.file, row


@dataclass(frozen=True)
class Plan:
    files: tuple[InputFile, ...]
    shards: tuple[Shard, ...]
    rows_per_shard: int
    limit: int | None = None
    _hashes: dict[int, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def num_rows(self) -> int:
        return sum(shard.num_rows for shard in self.shards)

    @cached_property
    def file(self) -> dict[str, InputFile]:
        """Files by key."""
        return {file.key: file for file in self.files}

    def hash(self, shards: int | None = None) -> str:
        """Hash of the first `shards` shards (all by default) and the files they read, 32 hex digits.

        A part's footer carries the hash of the plan that added it, `plan.hash(shard.of)`, which later appends do not change.
        """
        count = len(self.shards) if shards is None else shards
        if count not in self._hashes:
            digest = hashlib.blake2b(digest_size=16)
            for shard in self.shards[:count]:
                for piece in shard.pieces:
                    file = self.file[piece.file]
                    digest.update(orjson.dumps([shard.index, shard.of, *astuple(piece), file.size, file.version, file.num_rows]))
            self._hashes[count] = digest.hexdigest()
        return self._hashes[count]

    def reconcile(self, found: Plan, on_change: Literal["refuse", "append"] = "refuse") -> Plan:
        """This plan, made sure of against what the input holds now; with "append", plus shards for the files it does not know.

        Raises ConfigError naming the first file that changed or has another key, or (refuse) went or came.
        """
        new = [file for file in found.files if file.key not in self.file]
        renamed = {mark: file for file in new for mark in (file.uri, file.content)}
        for file in self.files:
            now = found.file.get(file.key)
            if now is not None:
                check_unchanged(file, now)
            elif (same := renamed.get(file.uri) or renamed.get(file.content)) is not None:
                raise ConfigError(f"input file {file.key} of the plan of this output is named {same.key} now (it was moved, or"
                                  " data is written another way), and its rows would be done twice: undo that, or set another"
                                  " output.dir")
            elif on_change == "refuse":
                raise ConfigError(f"input file {file.key} is in the plan of this output but no longer in the input: restore it, "
                                  "or set another output.dir")
        if not new:
            return self
        if on_change == "refuse":
            raise ConfigError(f"the input has {len(new)} file(s) that are not in the plan of this output (first: {new[0].key}):"
                              " set plan.on_change=append to label them too, or another output.dir")
        if found.limit is not None:
            raise ConfigError("plan.on_change=append takes in whole files, which input.limit does not allow: leave one out")
        added = make_plan(new, found.rows_per_shard)
        total = len(self.shards) + len(added.shards)
        shards = tuple(Shard(len(self.shards) + shard.index, total, shard.pieces) for shard in added.shards)
        return Plan(self.files + added.files, self.shards + shards, self.rows_per_shard)

    def to_bytes(self, since: Plan | None = None) -> bytes:
        """As a Parquet file, one row a piece, the files in its metadata; with `since`, only what was added to that plan."""
        first_file, first_shard = (len(since.files), len(since.shards)) if since else (0, 0)
        rows = [(shard.index, shard.of, *astuple(piece)) for shard in self.shards[first_shard:] for piece in shard.pieces]
        columns = list(zip(*rows, strict=True)) or [()] * len(_PIECES)
        files = [asdict(file) for file in self.files[first_file:]]
        meta = {"format": FORMAT, "rows_per_shard": self.rows_per_shard, "limit": self.limit, "files": files}
        table = pa.table([pa.array(c, f.type) for c, f in zip(columns, _PIECES, strict=True)], schema=_PIECES)
        sink = io.BytesIO()
        with pq.ParquetWriter(sink, _PIECES, compression="zstd") as writer:
            writer.write_table(table)
            writer.add_key_value_metadata({"gristmill.plan": orjson.dumps(meta).decode()})
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, parts: Sequence[bytes]) -> Plan:
        """From the plan's file and those of its appends, in order. Raises ValueError on bytes that are not a plan."""
        files: list[InputFile] = []
        pieces: dict[tuple[int, int], list[Piece]] = {}
        rows_per_shard, limit = 0, None
        for part in parts:
            source = pq.ParquetFile(io.BytesIO(part))
            meta = orjson.loads((source.metadata.metadata or {}).get(b"gristmill.plan", b"{}"))
            if meta.get("format") != FORMAT:
                raise ValueError(f"not a plan of format {FORMAT}")
            rows_per_shard, limit = rows_per_shard or meta["rows_per_shard"], meta["limit"]
            files.extend(InputFile(**file) for file in meta["files"])
            for index, of, *piece in zip(*(column.to_pylist() for column in source.read().columns), strict=True):
                pieces.setdefault((index, of), []).append(Piece(*piece))
        shards = tuple(Shard(index, of, tuple(found)) for (index, of), found in pieces.items())
        if [shard.index for shard in shards] != list(range(len(shards))):
            raise ValueError("its shards are not numbered from 0 without a gap")
        return cls(tuple(files), shards, rows_per_shard, limit)


def make_plan(files: Iterable[InputFile], rows_per_shard: int, limit: int | None = None) -> Plan:
    """Cut `files`, in the order of their keys, into shards of at most `rows_per_shard` rows; `limit`: only that many rows."""
    if rows_per_shard < 1:
        raise ConfigError("plan.rows_per_shard must be at least 1")
    ordered = tuple(sorted(files, key=lambda file: file.key))
    for before, after in itertools.pairwise(ordered):
        if before.key == after.key:
            raise ConfigError(f"two input files have the same name {after.key} ({before.uri} and {after.uri}): give each once")
    groups: list[list[Piece]] = []
    room = 0
    for piece in _take(_pieces(ordered, rows_per_shard), limit):
        if piece.num_rows > room:
            groups.append([])
            room = rows_per_shard
        groups[-1].append(piece)
        room -= piece.num_rows
    shards = tuple(Shard(index, len(groups), tuple(pieces)) for index, pieces in enumerate(groups))
    return Plan(ordered, shards, rows_per_shard, limit)


def _pieces(files: Iterable[InputFile], most: int) -> Iterator[Piece]:
    """Row groups, those larger than `most` in even parts."""
    for file in files:
        start = 0
        for row_group, rows in enumerate(file.row_groups):
            parts = -(-rows // most)
            for part in range(parts):
                first, last = rows * part // parts, rows * (part + 1) // parts
                yield Piece(file.key, row_group, start + first, first, last - first)
            start += rows


def _take(pieces: Iterable[Piece], limit: int | None) -> Iterator[Piece]:
    """The pieces that hold the first `limit` rows."""
    left = limit
    for piece in pieces:
        if left is None:
            yield piece
        elif left > 0:
            yield Piece(piece.file, piece.row_group, piece.first_row, piece.offset, min(piece.num_rows, left))
            left -= piece.num_rows
        else:
            return


def gone(key: str) -> ConfigError:
    return ConfigError(f"input file {key} is in the plan of this output but no longer in the input, and rows of it are still to"
                       " do: restore it, or set another output.dir")


def check_unchanged(planned: InputFile, now: InputFile) -> None:
    """Raises ConfigError, naming the file and what differs, when a file is not the one that was planned."""
    for what in ("num_rows", "size", "version"):
        before, after = getattr(planned, what), getattr(now, what)
        if before != after:
            raise ConfigError(f"input file {planned.key} has changed since it was planned ({what} was {before}, is {after}):"
                              " restore it, or set another output.dir")


def row_ids(file_key: str, first_row: int, num_rows: int) -> Iterator[str]:
    """Ids of consecutive rows of a file: 24 hex digits of BLAKE2b(key, row index). Not of the text: equal rows are legitimate."""
    prefix = hashlib.blake2b(file_key.encode() + b"\0", digest_size=12)
    for row in range(first_row, first_row + num_rows):
        digest = prefix.copy()
        digest.update(b"%d" % row)
        yield digest.hexdigest()


def row_id(file_key: str, row_index: int) -> str:
    """The id of one row: see row_ids."""
    return next(row_ids(file_key, row_index, 1))
