"""The journal of one attempt at one shard: finished rows, so that a killed job computes only those again that were in flight.

A record is `length: u32, crc32: u32, payload`, little-endian. Each attempt writes a file of its own and reads those of all
attempts, each up to its first torn record. So nobody appends behind a torn tail, and nobody truncates a file that another process
may still hold. No payload is empty: the zeros that a power cut may leave would pass for one.
"""

from __future__ import annotations

import os
import struct
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

_HEAD = struct.Struct("<II")
SYNC_SECONDS = 1.5


class Journal:
    """Append-only. The file is made by the first append and begins with `header`, which says whose rows these are.

    Records reach the kernel with each append (a killed process loses none) and the disk within SYNC_SECONDS of steady appends;
    who appends seldom has to `sync`.
    """

    def __init__(self, path: Path, header: bytes) -> None:
        self.path = path
        self._header = header
        self._fd = -1
        self._size = 0
        self._synced_at = 0.0
        self._dirty = False

    def append(self, payloads: Iterable[bytes]) -> None:
        """Raises OSError if the disk is full; the journal then ends with its last whole append."""
        if self._fd < 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)
        head = [] if self._size else [self._header]
        self._write(b"".join(map(_record, [*head, *payloads])))
        if time.monotonic() - self._synced_at >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        if self._dirty:
            os.fsync(self._fd)
            self._dirty = False
        self._synced_at = time.monotonic()

    def close(self) -> None:
        if self._fd >= 0:
            try:
                self.sync()
            finally:
                os.close(self._fd)
                self._fd = -1

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest):]
        except OSError:
            os.ftruncate(self._fd, self._size)
            raise
        self._size += len(data)
        self._dirty = True


def read_journal(path: Path, header: bytes) -> Iterator[bytes]:
    """The payloads up to the first torn record; none if the file is gone or is headed by something else than `header`."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:      # another attempt has committed the shard
        return
    records = _records(data)
    if next(records, None) == header:
        yield from records


def _record(payload: bytes) -> bytes:
    return _HEAD.pack(len(payload), zlib.crc32(payload)) + payload


def _records(data: bytes) -> Iterator[bytes]:
    at = 0
    while at + _HEAD.size <= len(data):
        length, crc = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        payload = data[at : at + length]
        if not length or len(payload) < length or zlib.crc32(payload) != crc:
            return
        yield payload
        at += length
