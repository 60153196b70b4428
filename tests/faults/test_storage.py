"""Disks that are full, read-only or hold what is not ours; inputs that change or break. Each is one line, and nothing is lost."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.faults.jobs import Job, Zygote, assert_readable, assert_same, make_job, write_rows


def one_line(job: Job) -> str:
    """The last thing that a run said: an error of one line."""
    last = job.said().splitlines()[-1]
    assert last.startswith("error: "), job.said()
    assert "Traceback" not in job.said()
    return last


class Disk:
    """A small file system of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)], capture_output=True).returncode:
            pytest.skip("mounting a file system is not allowed here")

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.path)], check=True, capture_output=True)

    def fill(self, leave: int) -> None:
        """Leave so many bytes free."""
        usage = shutil.disk_usage(self.path)
        (self.path / "ballast").write_bytes(bytes(usage.free - leave))

    def empty(self) -> None:
        (self.path / "ballast").unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    yield disk
    subprocess.run(["umount", str(disk.path)], check=True)


@pytest.mark.parametrize("leave", [0, 4096, 20_000, 30_000, 40_000, 50_000, 60_000])
def test_a_full_disk(zygote: Zygote, disk: Disk, tmp_path: Path, whole: Job, leave: int) -> None:
    """Wherever the room ends: in the plan, a journal, a part, the report or the manifest."""
    job = make_job(zygote, tmp_path / "job", disk.path / "out")
    disk.fill(leave)
    assert job.run() in (1, 2), job.said()
    assert "no room left" in one_line(job)
    assert "make room" in one_line(job)
    assert_readable(job)
    committed = len(job.parts())
    disk.empty()
    inodes = {path.name: path.stat().st_ino for path in job.parts()}
    assert job.run() == 0, job.said()
    assert {name: (job.out / name).stat().st_ino for name in inodes} == inodes
    assert len(inodes) == committed
    assert_same(job, whole)


def test_a_read_only_output(zygote: Zygote, disk: Disk, tmp_path: Path, whole: Job) -> None:
    job = make_job(zygote, tmp_path / "job", disk.path / "out")
    disk.remount("ro")
    assert job.run() == 2
    assert "cannot be written" in one_line(job)
    disk.remount("rw")
    assert job.run(strike={"step": "link part-00001", "when": "after"}) == -9
    disk.remount("ro")
    assert job.run() == 2
    assert "cannot be written" in one_line(job)
    disk.remount("rw")
    assert job.run() == 0
    disk.remount("ro")
    assert job.run() == 0      # to say that all is done needs no writing
    assert_same(job, whole)


@pytest.mark.parametrize("damage", ["another program's", "cut", "empty"])
def test_something_else_at_a_parts_name(job: Job, whole: Job, damage: str) -> None:
    assert job.run(strike={"step": "link part-", "when": "after"}) == -9
    (path,) = job.parts()
    if damage == "another program's":
        pq.write_table(pq.read_table(path, columns=["text"]), path)
    else:
        path.write_bytes(path.read_bytes()[:-9] if damage == "cut" else b"")
    before = path.read_bytes()
    for _ in range(2):
        assert job.run() == 1
        assert path.name in one_line(job)
        assert "move it away" in one_line(job)
    assert path.read_bytes() == before
    path.unlink()
    assert job.run() == 0, job.said()
    assert_same(job, whole)


def test_leftovers_of_another_version_are_swept(job: Job, whole: Job) -> None:
    work = job.out / "_work"
    work.mkdir(parents=True)
    (work / "00000.old.journal").write_bytes(b"\x10\0\0\0garbage")
    (work / "00001.v0.inprogress").write_bytes(b"PAR1")
    (work / "00003.lease").write_text("someone")
    assert job.run() == 0, job.said()
    assert_same(job, whole)


@pytest.mark.parametrize("name", ["_run.json", "_plan.parquet"])
def test_a_damaged_record_of_the_run(job: Job, whole: Job, name: str) -> None:
    assert job.run(strike={"step": "link part-00001", "when": "after"}) == -9
    data = (job.out / name).read_bytes()
    (job.out / name).write_bytes(data[: len(data) // 2])
    assert job.run() == 1
    assert f"{name} is damaged" in one_line(job)
    (job.out / name).write_bytes(data)
    assert job.run() == 0
    assert_same(job, whole)


# --- the input ---


def test_an_input_that_vanishes_and_comes_back(job: Job, whole: Job) -> None:
    path = job.folder / "in" / "b.parquet"
    late = job.start(strike={"step": "link _plan", "when": "after", "signal": "SIGSTOP"})
    late.wait_until_stopped()
    path.rename(job.folder / "away")
    late.send(signal.SIGCONT)
    assert late.wait() == 2
    assert "b.parquet" in one_line(job)
    (job.folder / "away").rename(path)
    assert job.run(strike={"step": "link part-00002", "when": "after"}) == -9
    path.rename(job.folder / "away")
    assert job.run() == 2
    assert "input file b.parquet" in one_line(job)
    (job.folder / "away").rename(path)
    assert job.run() == 0, job.said()
    assert_same(job, whole)


@pytest.mark.parametrize("rows", [50, 49])
def test_an_input_that_is_replaced_between_plan_and_read(job: Job, whole: Job, rows: int) -> None:
    path = job.folder / "in" / "b.parquet"
    keep = path.read_bytes()
    late = job.start(strike={"step": "link _plan", "when": "after", "signal": "SIGSTOP"})
    late.wait_until_stopped()
    write_rows(path, 1000, rows)
    late.send(signal.SIGCONT)
    assert late.wait() == 2
    assert "b.parquet has changed" in one_line(job)
    assert not [p for p in job.parts() if "prompt 100" in str(pq.read_table(p).column("text").to_pylist())]
    path.write_bytes(keep)
    assert job.run() == 0, job.said()
    assert_same(job, whole)


@pytest.mark.parametrize("damage", ["page", "footer", "empty"])
def test_a_damaged_input(job: Job, whole: Job, damage: str) -> None:
    path = job.folder / "in" / "b.parquet"
    keep = path.read_bytes()
    if damage == "page":      # inside a good footer: found only when it is read
        column = pq.read_metadata(path).row_group(1).column(0)
        at = (column.dictionary_page_offset or column.data_page_offset) + 20
        path.write_bytes(keep[:at] + bytes(30) + keep[at + 30 :])
    else:
        path.write_bytes(keep[:-30] if damage == "footer" else b"")
    assert job.run() == 2, job.said()
    assert "b.parquet" in one_line(job)
    assert_readable(job)
    path.write_bytes(keep)
    assert job.run() == 0, job.said()
    assert_same(job, whole)
