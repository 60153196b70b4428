"""From what the user typed as `data` to files whose rows can be read by range: Input."""

from __future__ import annotations

import difflib
import fnmatch
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import fsspec
import pyarrow as pa

from pipeline.exits import ConfigError
from pipeline.input.csv import CsvReader, Dialect
from pipeline.input.formats import JSON_TEXT, Chunk, HfReader, ParquetReader, Reader, Scan, cast, first_line, select
from pipeline.input.jsonl import JsonlReader
from pipeline.input.plan import InputFile, Piece, Shard, check_unchanged, gone, make_plan

READERS: dict[str, Callable[..., Reader]] = {"parquet": ParquetReader, "jsonl": JsonlReader, "csv": CsvReader}
SUFFIXES = {
    ".parquet": "parquet",
    ".parq": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
}
JSON_WORD = "a list or an object"
_MAGIC = re.compile(r"[*?\[]")
_NOTHING = re.compile(r"(?!)")
_HUB = re.compile(r"hf://(?!datasets/|buckets/|models/|spaces/)[\w.-]+(/[\w.-]+)?(@[\w./-]+)?$")


@dataclass(frozen=True)
class Found:
    """A file before it is opened. `key`: its name within what the user gave; `open`: a fresh reader, told of an earlier scan."""

    key: str
    uri: str
    size: int
    open: Callable[[Scan | None], Reader]


class Input:
    """The files of a job, all of one schema. Shared between threads; `cursor()` is not."""

    def __init__(self, found: Sequence[Found]) -> None:
        with ThreadPoolExecutor(min(16, len(found))) as pool:
            looked = list(pool.map(_inspect, found))
        self.files = [file for file, _ in looked]
        schema = looked[0][1]
        for file, other in looked[1:]:
            schema = _common(self.files[0].uri, schema, file.uri, other)
        # A column without a value in any file has no type of its own.
        self.schema = pa.schema([field.with_type(pa.string()) if pa.types.is_null(field.type) else field for field in schema])
        if not any(file.num_rows for file in self.files):
            raise ConfigError(f"data: {self.files[0].uri} {'holds' if len(self.files) == 1 else 'and the others hold'} no rows")
        scans = [Scan(own, file.row_groups) for file, own in looked]
        self._open: dict[str, Callable[[], Reader]] = {
            item.key: partial(item.open, scan) for item, scan in zip(found, scans, strict=True)
        }
        with ThreadPoolExecutor(min(16, len(found))) as pool:
            list(pool.map(self._check_numbers, *zip(*looked, strict=True)))

    def check_there(self, shards: Iterable[Shard]) -> None:
        """Raises ConfigError where a file of these shards is no longer in the input."""
        for shard in shards:
            for piece in shard.pieces:
                if piece.file not in self._open:
                    raise gone(piece.file)

    def _check_numbers(self, file: InputFile, own: pa.Schema) -> None:
        """Read the columns that hold whole numbers here and fractions in other files: ConfigError where a number loses digits."""
        mixed = [field.name for field in self.schema if field.type == pa.float64() and own.field(field.name).type == pa.int64()]
        if mixed:
            cursor = self.cursor(mixed)
            for shard in make_plan([file], max(file.num_rows, 1)).shards:
                for _ in cursor.read(shard):
                    pass

    def cursor(self, columns: Sequence[str] | None = None) -> Cursor:
        """Reads `columns` (all by default) of shards, cheapest in the order of the plan."""
        return Cursor(self._open, {file.key: file for file in self.files}, select(self.schema, columns or self.schema.names))


class Cursor:
    """Reads shards one after another. It stays where it stopped: formats without an index are costly to enter in the middle."""

    def __init__(self, openers: dict[str, Callable[[], Reader]], files: dict[str, InputFile], schema: pa.Schema) -> None:
        self._openers, self._files, self._schema = openers, files, schema
        self._key: str | None = None
        self._reader: Reader | None = None
        self._at: tuple[str, int, int] | None = None  # file, row group, and the next row of it that `_chunks` will give
        self._chunks: Iterator[Chunk] = iter(())

    def read(self, shard: Shard) -> Iterator[Chunk]:
        """The shard's rows in order. Raises ConfigError where a file is damaged, gone, or another than was planned."""
        for piece in shard.pieces:
            yield from self._piece(piece)

    def _piece(self, piece: Piece) -> Iterator[Chunk]:
        if self._at is None or self._at[:2] != (piece.file, piece.row_group) or self._at[2] > piece.offset:
            if self._key != piece.file:
                self._reader, self._key = self._open(piece.file), piece.file
            assert self._reader is not None
            self._chunks, self._at = self._reader.rows(piece.row_group, self._schema.names), (piece.file, piece.row_group, 0)
        at, end = self._at[2], piece.offset + piece.num_rows
        while at < end:
            chunk = next(self._chunks, None)
            if chunk is None:
                raise ConfigError(
                    f"{piece.file}: row group {piece.row_group} ends at row {at}, {end} were planned; restore the file"
                )
            rows = chunk.table.num_rows
            first, last = max(piece.offset - at, 0), min(end - at, rows)
            if last < rows:  # keep the rest for the next piece
                self._chunks = _chain(_slice(chunk, last, rows), self._chunks)
            at += last
            self._at = (piece.file, piece.row_group, at)
            if first < last:
                part = _slice(chunk, first, last)
                yield Chunk(cast(part.table, self._schema, self._files[piece.file].uri), part.repaired)

    def _open(self, key: str) -> Reader:
        if key not in self._files:
            raise gone(key)
        planned = self._files[key]
        reader = _guard(planned.uri, self._openers[key])
        if (reader.version, sum(reader.row_groups)) != (planned.version, planned.num_rows):
            check_unchanged(
                planned, InputFile(key, planned.uri, sum(reader.row_groups), planned.size, reader.version, reader.row_groups)
            )
        return reader


def open_input(data: str | Sequence[str], keys: Any, output: str | None = None) -> Input:
    """Find and look into every file of `data`. `keys`: the `input` section of the configuration. `output`: the job's output
    folder; what the job itself writes there is in none of the folders and globs of `data`.

    Raises ConfigError, one line: nothing there, not readable, damaged, or of different schemas.
    """
    entries = [data] if isinstance(data, str) else list(data)
    if not entries or not all(entries):
        raise ConfigError("data: give a path, a glob, a folder, a URL or a list of them")
    found = [item for entry in entries for item in _find(entry, keys, output)]
    names = [item.key for item in found]
    if len(set(names)) < len(names):  # a/x.parquet and b/x.parquet given one by one: only their whole addresses tell them apart
        found = [Found(item.uri, item.uri, item.size, item.open) if names.count(item.key) > 1 else item for item in found]
    return Input(sorted(found, key=lambda item: item.key))


def _find(entry: str, keys: Any, output: str | None) -> list[Found]:
    if _HUB.match(entry):
        return [_hub(entry, keys)]
    try:
        fs, path = fsspec.core.url_to_fs(os.path.expanduser(entry))
        if os.path.exists(os.path.join(path, "state.json")) or os.path.exists(os.path.join(path, "dataset_dict.json")):
            return [_saved(entry, path, keys)]
        return _files(entry, fs, path, keys, output)
    except ImportError as error:
        raise ConfigError(f"data={entry}: {first_line(error)}") from None
    except ConfigError:
        raise
    except PermissionError:
        raise ConfigError(f"data={entry}: permission denied") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"data={entry}: cannot be read ({getattr(error, 'strerror', None) or first_line(error)})") from None
    except Exception as error:
        # The clients of object stores raise errors of their own: whatever it is, these files cannot be had.
        raise ConfigError(f"data={entry}: cannot be read ({type(error).__name__}: {first_line(error)})") from None


def _files(entry: str, fs: fsspec.AbstractFileSystem, path: str, keys: Any, output: str | None) -> list[Found]:
    ours = _own_files(fs, output)
    magic = _MAGIC.search(path)
    if magic and not fs.exists(path):
        root = path[: magic.start()].rpartition("/")[0]
        infos = {p: info for p, info in fs.glob(path, detail=True).items()
                 if info["type"] == "file" and not _hidden(p, root) and not ours.fullmatch(p)}
        if not infos:
            raise ConfigError(f"data={entry}: no file matches")
    elif fs.isdir(path):
        root = path.rstrip("/")
        infos = {p: info for p, info in fs.find(path, detail=True).items()
                 if not _hidden(p, root) and not ours.fullmatch(p) and (keys.format != "auto" or _kind(p) is not None)}
        if not infos:
            raise ConfigError(f"data={entry}: the folder holds no .parquet, .jsonl, .csv or .tsv file")
    elif fs.exists(path):
        root, infos = path.rpartition("/")[0], {path: fs.info(path)}
    else:
        raise ConfigError(f"data={entry}: no such file or folder{_near(fs, path) or _list(entry)}")
    return [_file(fs, p, os.path.relpath(p, root) if root else p, info, keys) for p, info in sorted(infos.items())]


def _file(fs: fsspec.AbstractFileSystem, path: str, key: str, info: dict[str, Any], keys: Any) -> Found:
    uri = fs.unstrip_protocol(path).removeprefix("file://").removeprefix("local://")
    kind = _kind(path) if keys.format == "auto" else keys.format
    if kind is None:
        raise ConfigError(f"data: {uri} is not .parquet, .jsonl, .csv or .tsv; say which it is with input.format=...")
    if not info.get("size") and not (info := fs.info(path))["size"]:    # a listing may be wrong: of links, or without sizes
        raise ConfigError(f"{uri}: empty (0 bytes); write it again or leave it out")

    reader = READERS[kind]
    if kind == "csv":
        delimiter = keys.delimiter or ("\t" if path.lower().endswith(".tsv") else ",")
        reader = partial(CsvReader, dialect=Dialect(delimiter, keys.quote or '"'))

    def open(scan: Scan | None) -> Reader:
        return reader(fs.open(path, "rb"), uri, _stamp(info if scan is None else fs.info(path)), scan)

    return Found(key, uri, info["size"], open)


def _kind(path: str) -> str | None:
    return SUFFIXES.get(os.path.splitext(path)[1].lower())


def _stamp(info: dict[str, Any]) -> str:
    """What changes when a file is replaced, of what its file system tells: the etag, or the time."""
    names = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")
    return f"{info['size']} {next((info[name] for name in names if info.get(name)), '')}"


def _hidden(path: str, root: str) -> bool:
    return any(part.startswith(("_", ".")) for part in path[len(root) :].split("/"))


def _own_files(fs: fsspec.AbstractFileSystem, output: str | None) -> re.Pattern[str]:
    """Matches the paths of what a job writes into its output folder under names that readers see, where that lies in `fs`."""
    protocol = fsspec.core.split_protocol(output or "")[0] or "file"
    if output is None or protocol not in ([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol):
        return _NOTHING
    folder = re.escape(fs._strip_protocol(output).rstrip("/"))
    return re.compile(rf"{folder}/(part-\d+-of-\d+\.parquet|metrics\.parquet|report\.html)")


def _near(fs: fsspec.AbstractFileSystem, path: str) -> str:
    parent, _, name = path.rpartition("/")
    try:
        names = [p.rstrip("/").rpartition("/")[2] for p in fs.ls(parent, detail=False)]
    except OSError:
        return ""
    near = difflib.get_close_matches(name, names, n=1) or [other for other in names if fnmatch.fnmatch(other, name + ".*")][:1]
    return f"; did you mean {near[0]}?" if near else ""


def _list(entry: str) -> str:
    return f"; a list is written 'data=[{entry}]'" if "," in entry else ""


def _hub(entry: str, keys: Any) -> Found:
    name, _, revision = entry.removeprefix("hf://").partition("@")

    def load() -> Any:
        import datasets  # seconds to import, and few jobs need it

        datasets.utils.logging.disable_progress_bar()
        try:
            return datasets.load_dataset(name, name=keys.subset, split=keys.split, revision=revision or keys.revision)
        except ValueError as error:
            hint = "input.split" if "split" in str(error) else "input.subset" if "onfig" in str(error) else "data"
            raise ConfigError(f"{hint}: dataset {name}: {first_line(error)}") from None
        except Exception as error:
            # The hub's client raises errors of several libraries: whatever it is, this dataset cannot be had.
            raise ConfigError(
                f"data={entry}: the dataset cannot be loaded ({type(error).__name__}: {first_line(error)})"
            ) from None

    return _dataset(f"{name}/{keys.split}", entry, load())


def _saved(entry: str, path: str, keys: Any) -> Found:
    import datasets

    loaded = datasets.load_from_disk(path)
    if isinstance(loaded, datasets.DatasetDict):
        if keys.split not in loaded:
            raise ConfigError(f"input.split={keys.split}: {entry} has {', '.join(loaded)}")
        loaded = loaded[keys.split]
    return _dataset(os.path.basename(path.rstrip("/")), entry, loaded)


def _dataset(key: str, uri: str, dataset: Any) -> Found:
    version = str(dataset._fingerprint)
    return Found(key, uri, int(dataset.data.nbytes), lambda _: HfReader(dataset, uri, version))


def _inspect(item: Found) -> tuple[InputFile, pa.Schema]:
    reader = _guard(item.uri, partial(item.open, None))
    return InputFile(item.key, item.uri, sum(reader.row_groups), item.size, reader.version, reader.row_groups), reader.schema


def _guard(uri: str, open: Callable[[], Reader]) -> Reader:
    try:
        return open()
    except FileNotFoundError:
        raise ConfigError(f"{uri}: gone since the input was listed; restore it") from None
    except OSError as error:
        raise ConfigError(f"{uri}: cannot be read ({error.strerror or first_line(error)})") from None


def _common(first_uri: str, first: pa.Schema, uri: str, schema: pa.Schema) -> pa.Schema:
    """The schema of both: the same columns, and the same types but for what formats without types leave open."""
    for name in first.names:
        if name not in schema.names:
            raise ConfigError(f"{uri}: has no column {name}, which {first_uri} has; it has {', '.join(schema.names)}")
    fields = []
    for field in schema:
        if field.name not in first.names:
            raise ConfigError(f"{uri}: has a column {field.name} that {first_uri} has not; all files need the same columns")
        before = first.field(field.name)
        if pa.types.is_null(before.type) or {before.type, field.type} == {pa.int64(), pa.float64()}:
            common = field if pa.types.is_null(before.type) else field.with_type(pa.float64())
        elif pa.types.is_null(field.type) or (field.type == before.type and field.metadata == before.metadata):
            common = before
        else:
            was, now = (JSON_WORD if f.metadata == JSON_TEXT else str(f.type) for f in (before, field))
            raise ConfigError(f"{uri}: column {field.name} is {now}, but {was} in {first_uri}; write them with one type")
        fields.append(common.with_nullable(before.nullable or field.nullable))
    found = {field.name: field for field in fields}
    return pa.schema([found[name] for name in first.names])


def _slice(chunk: Chunk, first: int, last: int) -> Chunk:
    if first == 0 and last == chunk.table.num_rows:
        return chunk
    return Chunk(chunk.table.slice(first, last - first), frozenset(row - first for row in chunk.repaired if first <= row < last))


def _chain(chunk: Chunk, rest: Iterator[Chunk]) -> Iterator[Chunk]:
    yield chunk
    yield from rest
