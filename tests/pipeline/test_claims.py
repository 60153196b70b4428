"""Leases: unequal workers end together, the dead are inherited from, and nothing rests on them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from output_cases import assert_whole, fill, open_folder, write_input

from pipeline.exits import ConfigError
from pipeline.output import claims as module
from pipeline.output.claims import Claims
from pipeline.output.run_folder import RunFolder


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.05)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return open_folder(tmp_path / "out", write_input(tmp_path / "in", 200), rows_per_shard=10)


def test_a_fast_worker_takes_over_from_a_slow_one(folder: RunFolder) -> None:
    done: dict[int, list[int]] = {0: [], 1: []}

    def work(worker: int, seconds: float) -> None:
        claims = Claims(folder, worker, 2)
        for shard in claims:
            time.sleep(seconds)
            assert fill(folder, shard)      # nobody else was at it
            claims.release(shard)
            done[worker].append(shard.index)

    threads = [threading.Thread(target=work, args=arguments) for arguments in ((0, 0.3), (1, 0.0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done[0] + done[1]) == list(range(len(folder.plan.shards)))
    assert len(done[1]) > len(done[0])
    assert [index % 2 for index in done[1][:10]] == [1] * 10      # its own share first
    folder.finalize()


def test_a_sweep_under_held_leases_harms_nobody(folder: RunFolder) -> None:
    claims = Claims(folder)
    shards = list(claims)
    for shard in folder.plan.shards:      # by workers that know of no leases
        fill(folder, shard)
    folder.finalize()
    assert list(folder.store.work.iterdir()) == []
    for shard in shards[:3]:
        assert not fill(folder, shard)
        claims.release(shard)
    claims.stop()
    assert list(Claims(folder)) == []


def test_alone_it_is_its_share_and_then_the_rest(folder: RunFolder) -> None:
    count = len(folder.plan.shards)
    order = [shard.index for shard in Claims(folder, 1, 4)]
    assert order[: count // 4] == list(range(1, count, 4))
    assert sorted(order) == list(range(count))


def test_it_does_not_hoard(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AHEAD_ROWS", 30)
    claims = Claims(folder)
    given: list[int] = []

    def take() -> None:
        for shard in claims:
            given.append(shard.index)

    thread = threading.Thread(target=take)
    thread.start()
    for held in (3, 4, 5):
        end = time.monotonic() + 60
        while len(given) < held and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.3)      # time to take one too many
        assert len(given) == held
        claims.release(folder.plan.shards[given[held - 3]])
    claims.stop()
    thread.join()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_dead_are_inherited_from(tmp_path: Path, folder: RunFolder, number: signal.Signals) -> None:
    code = f"""
import sys; sys.path[:0] = {sys.path!r}
import time
from pipeline.output.claims import Claims
from pipeline.output.run_folder import RunFolder
claims = iter(Claims(RunFolder.load({folder.out!r}), seconds=2))
print(next(claims).index, next(claims).index, flush=True)
time.sleep(100)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        held = [int(index) for index in holder.stdout.readline().split()]
        claims = iter(Claims(folder, seconds=2))
        first = [next(claims).index for _ in range(len(folder.plan.shards) - 2)]
        assert not {*first} & {*held}
        os.kill(holder.pid, number)
        assert sorted(shard.index for shard in claims) == sorted(held)
    finally:
        holder.kill()
        holder.communicate()


@pytest.mark.parametrize("marker", [
    b"", b"someone else's", b"filelock/9\npid=1\n", b"filelock/2\npid=1\nhost=x\nmode=lease\ntoken=ab\nduration=7.0\nstart=1\n",
])
def test_a_marker_that_nobody_can_read_is_outlived(folder: RunFolder, monkeypatch: pytest.MonkeyPatch, marker: bytes) -> None:
    """Left by a worker that was killed before it had written it, or by another version."""
    monkeypatch.setattr(module, "_EMPTY_SECONDS", 0.5)
    (folder.store.work / "00003.lease").write_bytes(marker)
    start = time.monotonic()
    given = {shard.index: time.monotonic() - start for shard in Claims(folder, seconds=0.5)}
    assert sorted(given) == list(range(len(folder.plan.shards)))
    assert 0.4 < given[3] < 10


def test_stop_ends_a_wait(folder: RunFolder) -> None:
    holder = Claims(folder)
    held = list(holder)
    assert len(held) == len(folder.plan.shards)
    waiting = Claims(folder)
    thread = threading.Thread(target=lambda: list(waiting))
    thread.start()
    waiting.stop()
    thread.join(timeout=5)
    assert not thread.is_alive()
    holder.stop()
    assert len(list(Claims(folder))) == len(held)


def test_a_shard_that_its_holder_commits_is_not_given_out(folder: RunFolder, tmp_path: Path) -> None:
    holder = Claims(folder)
    shards = list(holder)
    waiting = Claims(folder)
    given: list[int] = []
    thread = threading.Thread(target=lambda: given.extend(shard.index for shard in waiting))
    thread.start()
    for shard in shards:
        fill(folder, shard)
        holder.release(shard)
    thread.join(timeout=10)
    assert given == []
    assert_whole(Path(folder.out), [*folder.plan.files])


def test_leases_need_a_shared_file_system(tmp_path: Path) -> None:
    folder = open_folder("memory://claims", write_input(tmp_path / "in"), spool=str(tmp_path / "spool"))
    with pytest.raises(ConfigError, match=r"cluster\.lease=false"):
        Claims(folder)
