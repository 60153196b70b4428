"""Stores: create-if-absent on a POSIX folder and on S3 (a server on localhost), whatever file system or network do."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from output_cases import assert_whole, contents, fill, open_folder, write_input
from s3_server import S3Server, serve_s3

from pipeline.exits import ConfigError, StorageError
from pipeline.output import store as module
from pipeline.output.store import LocalStore, ObjectStore, Store, check_writable, open_store, sweep


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(str(tmp_path / "out"))
    request.getfixturevalue("s3")
    return open_store(f"s3://bucket/{tmp_path.name}", str(tmp_path / "spool"))


@pytest.fixture(scope="module")
def s3_server() -> Iterator[S3Server]:
    yield from serve_s3()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    s3_server.spoil = lambda method, path: None
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    return s3_server


def put(store: Store, name: str, data: bytes) -> bool:
    path = store.work / f"{name}.{data.hex()}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    won = store.publish(path, name)
    assert not path.exists() or not won
    return won


def test_the_first_to_publish_wins(store: Store) -> None:
    assert store.names() == store.names("_superseded") == set()
    assert store.read("a") is None
    assert put(store, "a", b"1")
    assert not put(store, "a", b"2")
    assert store.create("b", b"3")
    assert not store.create("b", b"4")
    assert (store.read("a"), store.read("b")) == (b"1", b"3")
    with store.open("a") as file:
        assert file.read() == b"1"
    store.replace("a", b"5")
    assert store.read("a") == b"5"
    assert store.names() == {"a", "b"}
    path = store.work / "new"
    path.write_bytes(b"6")
    store.supersede(path, "a", "a.old")
    assert store.read("a") == b"6"
    assert store.names() == {"a", "b"}      # what it replaced is kept where readers do not look
    assert store.names("_superseded") == {"a.old"}
    assert store.read("_superseded/a.old") == b"5"
    for _ in range(2):
        store.delete("a")
    assert store.names() == {"b"}
    (store.work / "left.over").write_bytes(b"")
    sweep(store)
    sweep(store)
    assert list(store.work.iterdir()) == []


def test_what_a_sweep_took_is_written_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that end together write the report while others sweep."""
    write, swept = module._write_temporary, []

    def taken(*args: Any) -> Path:
        path = write(*args)
        if len(swept) < 10:
            swept.append(path)
            sweep(store)
        return path

    put(store, "a", b"1")
    monkeypatch.setattr(module, "_write_temporary", taken)
    store.replace("a", b"2")
    assert store.read("a") == b"2" and len(swept) == 10
    assert list(store.work.iterdir()) == []


def test_of_sixteen_that_publish_at_once_one_wins(store: Store) -> None:
    barrier, won = threading.Barrier(16), []

    def publish(number: int) -> None:
        data = b"%d" % number
        barrier.wait()
        if put(store, "a", data):
            won.append(data)

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [store.read("a")] == won


@pytest.mark.parametrize("url", ["{}/out", "file://{}/out"])
def test_a_path_and_a_file_url_are_folders(tmp_path: Path, url: str) -> None:
    assert isinstance(open_store(url.format(tmp_path)), LocalStore)
    open_store(url.format(tmp_path)).create("a", b"")
    assert (tmp_path / "out" / "a").exists()
    assert isinstance(open_store("memory://x"), ObjectStore)


def test_a_home_folder_is_meant_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    store = open_store("~/out")
    store.create("a", b"")
    assert (store.out, (tmp_path / "out" / "a").exists()) == (str(tmp_path / "out"), True)
    assert open_store("memory://x", "~/spool").work.parent == tmp_path / "spool"
    with pytest.raises(ConfigError, match=r"~nobody-of-that-name/out: .*write the path out"):
        open_store("~nobody-of-that-name/out")


def test_the_spool_is_the_users_own_and_outlasts_scratch_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert open_store("memory://x").work.parent == tmp_path / "home/.cache/gristmill/spool"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert open_store("memory://x").work.parent == tmp_path / "cache/gristmill/spool"
    assert open_store("memory://x", str(tmp_path / "spool")).work.parent == tmp_path / "spool"


def test_a_spool_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, data: bytes) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    spool = tmp_path / "spool"
    with pytest.raises(ConfigError, match=rf"^{spool}/\w+ cannot be written \(Permission denied\).*, or set output.spool"):
        check_writable(open_store("memory://x", str(spool)))


# --- POSIX ---


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_hard_links_a_rename_publishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(module.os, "link", refuse)
    store = LocalStore(str(tmp_path / "out"))
    assert put(store, "a", b"1")
    assert not put(store, "a", b"2")
    assert store.read("a") == b"1"


def test_a_link_that_was_sent_twice_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(module.os, "link", twice)
    assert put(LocalStore(str(tmp_path / "out")), "a", b"1")


def test_a_copy_that_the_sweep_took_has_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(str(tmp_path / "out"))
    put(store, "a", b"1")
    sync = module.sync_file

    def swept(path: Path) -> None:
        sync(path)
        path.unlink(missing_ok=path == store.root)

    (store.work / "late").write_bytes(b"2")
    monkeypatch.setattr(module, "sync_file", lambda path: sync(path) if path.is_dir() else swept(path))
    assert not store.publish(store.work / "late", "a")
    (store.work / "late").write_bytes(b"2")
    with pytest.raises(StorageError):
        store.publish(store.work / "late", "b")


def test_everything_is_synced_before_it_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a power cut: at each fsync and link, only names and files that were synced would still be there."""
    events: list[str] = []
    link, replace = os.link, os.replace
    monkeypatch.setattr(module, "sync_file", lambda path: events.append(f"sync {'out' if path.is_dir() else 'file'}"))
    monkeypatch.setattr(module.os, "link", lambda a, b: (events.append("link"), link(a, b)))
    monkeypatch.setattr(module.os, "replace", lambda a, b: (events.append("replace"), replace(a, b)))
    store = LocalStore(str(tmp_path / "out"))
    store.create("a", b"1")
    store.replace("a", b"2")
    assert events == ["sync file", "link", "sync out", "sync file", "replace", "sync out"]


@pytest.mark.parametrize("code, line", [
    (errno.ENOSPC, "no room left"), (errno.EDQUOT, "no room left"), (errno.EROFS, "cannot be written"),
    (errno.ESTALE, "the same command"),
])
def test_a_storage_error_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, line: str) -> None:
    def refuse(fd: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(module.os, "fsync", refuse)
    with pytest.raises(StorageError, match=line) as caught:
        put(LocalStore(str(tmp_path / "out")), "a", b"1")
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_sync_its_names_is_used_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def no_folders(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(fd)

    monkeypatch.setattr(module.os, "fsync", no_folders)
    assert put(LocalStore(str(tmp_path / "out")), "a", b"1")


# --- S3 ---


@pytest.mark.parametrize("status", ["409 Conflict", "503 Slow Down"])
def test_a_put_that_is_told_to_come_back_comes_back(s3: S3Server, tmp_path: Path, status: str) -> None:
    store = open_store(f"s3://bucket/{tmp_path.name}", str(tmp_path / "spool"))
    left = [3]

    def storm(method: str, path: str) -> str | None:
        if method == "PUT" and left[0]:
            left[0] -= 1
            return status
        return None

    s3.spoil = storm
    assert put(store, "a", b"1")
    assert (store.read("a"), left) == (b"1", [0])


def test_a_store_that_stays_away_is_one_line(s3: S3Server, tmp_path: Path) -> None:
    store = open_store(f"s3://bucket/{tmp_path.name}", str(tmp_path / "spool"))
    s3.spoil = lambda method, path: "409 Conflict" if method == "PUT" else None
    with pytest.raises(StorageError, match="once it can be reached"):
        put(store, "a", b"1")
    s3.spoil = lambda method, path: None
    assert store.names() == set()
    with pytest.raises(ConfigError, match=r"bucket does not exist"):
        open_folder("s3://no-such-bucket/out", write_input(tmp_path / "in"), spool=str(tmp_path / "spool"))


def test_a_run_on_s3_equals_one_on_disk(s3: S3Server, tmp_path: Path) -> None:
    files = write_input(tmp_path / "in")
    local = open_folder(tmp_path / "out", files)
    for shard in local.pending_shards():
        fill(local, shard)
    local.finalize()
    assert_whole(tmp_path / "out", files)
    one, two = (open_folder(f"s3://bucket/{tmp_path.name}", files, spool=str(tmp_path / name)) for name in ("one", "two"))
    shards = one.pending_shards()
    assert fill(one, shards[0])
    assert not fill(two, shards[0])      # it did not know
    assert [shard.index for shard in two.pending_shards()] == [shard.index for shard in shards[1:]]
    for shard in two.pending_shards():
        fill(two, shard)
    manifest = one.finalize()
    assert one.is_complete()
    assert two.is_complete()
    assert manifest["rows"] == local.manifest()["rows"]
    store = one.store
    for shard in shards:
        (tmp_path / "copy.parquet").write_bytes(store.read(shard.name))
        assert contents(tmp_path / "copy.parquet") == contents(tmp_path / "out" / shard.name)
