"""CSV, whatever stands between its fields: a header line, then rows, in UTF-8."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow as pa
import pyarrow.csv

from pipeline.exits import ConfigError
from pipeline.input.formats import CHUNK_ROWS, Chunk, Scan, check_names, first_line, select

BLOCK, LARGEST_BLOCK = 1 << 20, 64 << 20  # bytes read at once, the second where rows are long: one may stand in two blocks
TAIL = 1 << 16  # bytes of a file's end that are looked at


@dataclass(frozen=True, slots=True)
class Dialect:
    """`delimiter`: between fields; `quote`: around those that hold one, doubled within them; "none": there are no quotes."""

    delimiter: str = ","
    quote: str = '"'

    def options(self) -> pyarrow.csv.ParseOptions:
        quote = False if self.quote == "none" else self.quote
        return pyarrow.csv.ParseOptions(delimiter=self.delimiter, quote_char=quote, newlines_in_values=bool(quote))


class CsvReader:
    """A header line, then rows. Every column is text as it stands: guessed types would lose leading zeros. An empty field is
    null, an empty pair of quotes is empty text."""

    def __init__(self, handle: BinaryIO, name: str, stamp: str, scan: Scan | None = None, dialect: Dialect = Dialect()) -> None:
        self._dialect = dialect
        self._handle, self._lock, self._block = handle, threading.Lock(), BLOCK
        self._name, self.version = name, stamp
        if scan is not None:
            self.schema, self.row_groups = scan
            return
        with self._open({}) as reader:
            columns = reader.schema.names
        check_names(name, columns)
        self.schema = pa.schema([(column, pa.string()) for column in columns])
        rows, last = 0, None
        for chunk in self.rows(0, self.schema.names):
            rows, last = rows + chunk.table.num_rows, chunk.table.columns[-1][-1].as_py()
        if dialect.quote != "none":
            self._check_closed(rows, last)
        self.row_groups = (rows,)

    def rows(self, row_group: int, columns: Sequence[str]) -> Iterator[Chunk]:
        schema = select(self.schema, columns)
        given = 0
        while True:
            at = 0
            try:
                for batch in self._open(dict.fromkeys(self.schema.names, pa.string())):
                    for start in range(max(given - at, 0), batch.num_rows, CHUNK_ROWS):
                        part = batch.slice(start, CHUNK_ROWS)
                        given += part.num_rows
                        yield Chunk(pa.Table.from_batches([part]).select(schema.names))
                    at += batch.num_rows
                return
            except pa.ArrowException as error:
                self._grow(error)

    def _open(self, types: dict[str, pa.DataType]) -> pyarrow.csv.CSVStreamingReader:
        while True:
            try:
                return pyarrow.csv.open_csv(
                    pa.PythonFile(_View(self._handle, self._lock), "rb"),
                    pyarrow.csv.ReadOptions(use_threads=False, block_size=self._block),
                    self._dialect.options(),
                    pyarrow.csv.ConvertOptions(
                        column_types=types, null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False
                    ),
                )
            except pa.ArrowException as error:
                self._grow(error)

    def _check_closed(self, rows: int, last: str | None) -> None:
        """A quote that is never closed takes in all that follows it, and pyarrow lets the file end so: its last value is then
        what the file ends with, line ends and all."""
        with self._lock:
            self._handle.seek(-min(TAIL, self._handle.seek(0, io.SEEK_END)), io.SEEK_END)
            end = self._handle.read().rpartition(self._dialect.quote.encode())[2]
        if last is not None and {"\r", "\n"} & {*last} and end.strip() and last.encode().endswith(end):
            raise ConfigError(f"{self._name}: a quote that opens in row {rows}, the last, is never closed; mend it, write the "
                              "file as Parquet, or set input.quote=none where quotes are text like any other")

    def _grow(self, error: pa.ArrowException) -> None:
        """Larger blocks where a row was too long for these; the file is then read from its start again. Raises ConfigError
        where that is not what is wrong."""
        if not str(error).startswith("straddling object"):
            hint = "; is input.delimiter right?" if "columns, got" in str(error) else ""
            raise ConfigError(f"{self._name}: not CSV in UTF-8 ({first_line(error)}){hint}") from None
        if self._block == LARGEST_BLOCK:
            raise ConfigError(f"{self._name}: a row is longer than {LARGEST_BLOCK >> 20} MiB, which a quote that is never closed "
                              "also looks like; mend it, or write the file as Parquet") from None
        self._block = min(8 * self._block, LARGEST_BLOCK)


class _View(io.RawIOBase):
    """The file from its start, for one of pyarrow's readers, which closes what it is given. It has its own place in the file: a
    reader reads ahead in a thread of its own, for a while also after it was given up for another."""

    def __init__(self, handle: BinaryIO, lock: threading.Lock) -> None:
        self._handle, self._lock, self._at = handle, lock, 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        with self._lock:
            self._handle.seek(self._at)
            data = self._handle.read(size)
            self._at += len(data)
            return data
