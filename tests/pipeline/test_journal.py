"""The journal: what was appended comes back, whatever tore its tail."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.output import journal as module
from pipeline.output.journal import Journal, read_journal

HEADER = b"header"


def write(path: Path, payloads: list[bytes]) -> None:
    journal = Journal(path, HEADER)
    for payload in payloads:
        journal.append([payload])
    journal.close()


@given(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=8), st.data())
def test_a_torn_journal_keeps_what_stands_before_the_tear(tmp_path_factory, payloads: list[bytes], data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("journal") / "j"
    write(path, payloads)
    assert list(read_journal(path, HEADER)) == payloads
    whole = path.read_bytes()
    ends = [8 + len(HEADER)]
    for payload in payloads:
        ends.append(ends[-1] + 8 + len(payload))
    assert ends[-1] == len(whole)
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    assert list(read_journal(path, HEADER)) == payloads[: sum(end <= cut for end in ends[1:])]
    flipped = data.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(whole[:flipped] + bytes([whole[flipped] ^ 0x10]) + whole[flipped + 1 :])
    intact = sum(end <= flipped for end in ends[1:]) if flipped >= ends[0] else 0
    assert list(read_journal(path, HEADER)) == payloads[:intact]
    path.write_bytes(whole + data.draw(st.binary(min_size=1, max_size=20)))
    assert list(read_journal(path, HEADER))[: len(payloads)] == payloads


def test_a_tail_of_zeros_is_not_taken_for_records(tmp_path: Path) -> None:
    """After a power cut some file systems leave zeros; an empty payload's checksum is zero too."""
    write(tmp_path / "j", [b"one"])
    with open(tmp_path / "j", "ab") as file:
        file.write(bytes(64))
    assert list(read_journal(tmp_path / "j", HEADER)) == [b"one"]


def test_other_journals_are_not_read(tmp_path: Path) -> None:
    write(tmp_path / "j", [b"one"])
    assert list(read_journal(tmp_path / "j", b"another run")) == []
    assert list(read_journal(tmp_path / "none", HEADER)) == []


def test_no_file_without_an_append(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "work" / "j", HEADER)
    journal.sync()
    journal.close()
    assert not (tmp_path / "work").exists()


def test_records_are_readable_at_once_and_synced_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, synced = [1000.0], []
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(module.os, "fsync", synced.append)
    journal = Journal(tmp_path / "j", HEADER)
    journal.append([b"0"])
    assert len(synced) == 1      # a slow stream is on disk row by row
    for number in range(1, 10):
        clock[0] += 0.4
        journal.append([b"%d" % number])
        assert len(list(read_journal(tmp_path / "j", HEADER))) == number + 1
    assert len(synced) == 3
    journal.sync()
    journal.sync()
    assert len(synced) == 4      # and not again when there is nothing new
    journal.close()
    assert len(synced) == 4


@pytest.mark.parametrize("first", [True, False])
def test_after_a_full_disk_the_last_append_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool) -> None:
    journal = Journal(tmp_path / "j", HEADER)
    if not first:
        journal.append([b"before"])
    write = os.write

    def full(fd: int, data: memoryview) -> int:
        if len(data) <= 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data[: len(data) - 3])      # as the kernel does: what fits, then the error

    monkeypatch.setattr(module.os, "write", full)
    with pytest.raises(OSError, match="No space"):
        journal.append([b"lost", b"lost too"])
    monkeypatch.setattr(module.os, "write", write)
    journal.append([b"after"])
    journal.close()
    assert list(read_journal(tmp_path / "j", HEADER)) == ([] if first else [b"before"]) + [b"after"]
