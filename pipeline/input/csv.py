"""CSV: a header line, then rows, in UTF-8."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import pyarrow as pa
import pyarrow.csv

from pipeline.exits import ConfigError
from pipeline.input.formats import Chunk, Scan, check_names, first_line, select


class CsvReader:
    """A header line, then rows. Every column is text as it stands: guessed types would lose leading zeros. An empty field is
    null, an empty pair of quotes is empty text."""

    def __init__(self, handle: BinaryIO, name: str, stamp: str, scan: Scan | None = None) -> None:
        self._handle, self._name, self.version = handle, name, stamp
        if scan is not None:
            self.schema, self.row_groups = scan
            return
        with self._open({}) as reader:
            columns = reader.schema.names
        check_names(name, columns)
        self.schema = pa.schema([(column, pa.string()) for column in columns])
        self.row_groups = (sum(chunk.table.num_rows for chunk in self.rows(0, self.schema.names)),)

    def rows(self, row_group: int, columns: Sequence[str]) -> Iterator[Chunk]:
        reader = self._open(dict.fromkeys(self.schema.names, pa.string()))
        schema = select(self.schema, columns)
        while True:
            try:
                batch = reader.read_next_batch()
            except StopIteration:
                return
            except pa.ArrowException as error:
                raise ConfigError(f"{self._name}: not CSV in UTF-8 ({first_line(error)})") from None
            yield Chunk(pa.Table.from_batches([batch]).select(schema.names))

    def _open(self, types: dict[str, pa.DataType]) -> pyarrow.csv.CSVStreamingReader:
        self._handle.seek(0)
        try:
            return pyarrow.csv.open_csv(
                # The reader closes what it is given, and the file is read more than once.
                pa.PythonFile(_Unclosed(self._handle), "rb"),
                pyarrow.csv.ReadOptions(use_threads=False, block_size=1 << 20),
                pyarrow.csv.ParseOptions(newlines_in_values=True),
                pyarrow.csv.ConvertOptions(
                    column_types=types, null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False
                ),
            )
        except pa.ArrowException as error:
            raise ConfigError(f"{self._name}: not CSV in UTF-8 ({first_line(error)})") from None


class _Unclosed(io.RawIOBase):
    def __init__(self, handle: BinaryIO) -> None:
        self._handle = handle

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self._handle.read(size)
