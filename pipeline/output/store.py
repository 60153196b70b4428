"""Where a run's files live: a POSIX folder or an object store. Each file appears whole, under its name, or not at all.

Create-if-absent is what makes a race harmless: of many workers that publish one part, one wins and the others discard theirs. On
POSIX (also NFS, Lustre) it is a hard link, on object stores a conditional PUT.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Protocol

import fsspec

from pipeline.exits import ConfigError, JobError, StorageError

_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EROFS, errno.EACCES, errno.EPERM}
_TRIES = 6
_SWEEPS = 64            # workers that may end at one moment
SUPERSEDED = "_superseded"       # Parquet readers skip folders that begin with an underscore


class Store(Protocol):
    """Flat names under one root. `work`: a local folder for journals and parts in the making."""

    out: str
    work: Path

    def names(self, folder: str = "") -> set[str]:
        """The names there are now, under the root or in one of its folders; not those in subfolders."""

    def read(self, name: str) -> bytes | None:
        """The whole file; None if there is none."""

    def open(self, name: str) -> BinaryIO:
        """Open for reading, seekable."""

    def publish(self, path: Path, name: str) -> bool:
        """Make the local file `path` (in `work`, closed) appear as `name`, durably, unless that is there. False: it was there."""

    def create(self, name: str, data: bytes) -> bool:
        """The same for bytes."""

    def replace(self, name: str, data: bytes) -> None:
        """Make `data` appear as `name`, in place of what was there."""

    def supersede(self, path: Path, name: str, kept_as: str) -> None:
        """Keep the file `name` as SUPERSEDED/`kept_as` and put the local file `path` in its place; readers see one of them."""

    def delete(self, name: str) -> None:
        """Remove `name` if it is there."""


def open_store(out: str, spool: str | None = None) -> Store:
    """The store of an output folder: a path, or an fsspec URL. `spool`: local folder of an object store's journals; by default
    one of the user's own, which outlasts the process, its scratch folder and the next start of the machine."""
    protocol, path = fsspec.core.split_protocol(out)
    if protocol in (None, "file", "local"):
        return LocalStore(str(_expanded(path)))
    return ObjectStore(out, _expanded(spool or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/gristmill/spool"))


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path}: nobody knows that home folder; write the path out (output.dir, output.spool)") from error


@contextmanager
def storage_errors(out: str) -> Iterator[None]:
    """Turn an OSError into one line that says what to do. What is committed and journalled is safe in each case."""
    try:
        yield
    except NotADirectoryError as error:
        raise ConfigError(f"{out}: a file stands where a folder is needed; give another folder") from error
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise StorageError(f"no room left in {out} ({error.strerror}): make room and run the same command again; "
                               "committed parts and journalled rows are kept") from error
        if error.errno in _DENIED:
            raise StorageError(f"{out} cannot be written ({error.strerror}): check its permissions and mount") from error
        raise StorageError(f"{out}: {error}; run the same command again once it can be reached") from error


@contextmanager
def client_errors(out: str) -> Iterator[None]:
    """The same for object stores, whose client libraries raise errors of their own."""
    try:
        with storage_errors(out):
            yield
    except JobError:
        raise
    except Exception as error:
        raise StorageError(f"{out}: {error}; run the same command again once it can be reached") from error


class LocalStore:
    def __init__(self, out: str) -> None:
        self.out = out
        self.root = Path(out)
        self.work = self.root / "_work"

    def names(self, folder: str = "") -> set[str]:
        with storage_errors(self.out):
            try:
                return {entry.name for entry in os.scandir(self.root / folder) if entry.is_file()}
            except FileNotFoundError:
                return set()

    def read(self, name: str) -> bytes | None:
        with storage_errors(self.out):
            try:
                return (self.root / name).read_bytes()
            except FileNotFoundError:
                return None

    def open(self, name: str) -> BinaryIO:
        return open(self.root / name, "rb")

    def publish(self, path: Path, name: str) -> bool:
        with storage_errors(self.out):
            sync_file(path)
            won = self._link(path, self.root / name)
            sync_folder(self.root)
            path.unlink(missing_ok=True)
            return won

    def create(self, name: str, data: bytes) -> bool:
        return self.publish(_write_temporary(self.work, name, data), name)

    def replace(self, name: str, data: bytes) -> None:
        def put(path: Path) -> None:
            with storage_errors(self.out):
                sync_file(path)
                os.replace(path, self.root / name)
                sync_folder(self.root)

        _until_put(self.work, name, data, put)

    def supersede(self, path: Path, name: str, kept_as: str) -> None:
        old = self.root / SUPERSEDED
        with storage_errors(self.out):
            old.mkdir(exist_ok=True)
            if not (old / kept_as).exists():
                shutil.copy2(self.root / name, path.with_suffix(".old"))
                sync_file(path.with_suffix(".old"))
                os.replace(path.with_suffix(".old"), old / kept_as)
                sync_folder(old)
            sync_file(path)
            os.replace(path, self.root / name)
            sync_folder(self.root)

    def delete(self, name: str) -> None:
        with storage_errors(self.out):
            (self.root / name).unlink(missing_ok=True)
            sync_folder(self.root)

    def _link(self, path: Path, final: Path) -> bool:
        try:
            os.link(path, final)
        except FileExistsError:
            # An NFS client that sends its request twice is told "exists" of the link it has just made.
            return os.path.samefile(path, final)
        except FileNotFoundError:
            # A worker that slept through the end of the run: the sweep has taken its copy, the part is there.
            if final.exists():
                return False
            raise
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            # No hard links here (some FUSE mounts). Two attempts may both pass the test; they hold the same rows and a rename is
            # atomic, so readers see one whole part at any time.
            if final.exists():
                return False
            os.rename(path, final)
        return True


class ObjectStore:
    """Through fsspec. Parts are spooled locally and sent in one PUT; nothing is renamed or appended to."""

    def __init__(self, out: str, spool: Path) -> None:
        self.out = out.rstrip("/")
        self.fs, self.root = fsspec.url_to_fs(self.out, use_listings_cache=False)
        self.work = spool / hashlib.blake2b(self.out.encode(), digest_size=8).hexdigest()

    def names(self, folder: str = "") -> set[str]:
        with client_errors(self.out):
            try:
                entries = self.fs.ls(self._key(folder).rstrip("/"), detail=True)
            except FileNotFoundError:
                return set()
        return {entry["name"].rsplit("/", 1)[-1] for entry in entries if entry["type"] == "file"}

    def read(self, name: str) -> bytes | None:
        with client_errors(self.out):
            try:
                return self.fs.cat_file(self._key(name))
            except FileNotFoundError:
                return None

    def open(self, name: str) -> BinaryIO:
        return self.fs.open(self._key(name), "rb", cache_type="readahead", block_size=1 << 20)

    def publish(self, path: Path, name: str) -> bool:
        with client_errors(self.out):
            try:
                won = self._put(path, name, "create")
            except FileNotFoundError:
                if not self.fs.exists(self._key(name)):
                    raise
                return False
            path.unlink(missing_ok=True)
            return won

    def create(self, name: str, data: bytes) -> bool:
        return self.publish(_write_temporary(self.work, name, data), name)

    def replace(self, name: str, data: bytes) -> None:
        def put(path: Path) -> None:
            with client_errors(self.out):
                self._put(path, name, "overwrite")
                path.unlink(missing_ok=True)

        _until_put(self.work, name, data, put)

    def supersede(self, path: Path, name: str, kept_as: str) -> None:
        with client_errors(self.out):
            self.fs.cp_file(self._key(name), self._key(f"{SUPERSEDED}/{kept_as}"))
            self._put(path, name, "overwrite")

    def delete(self, name: str) -> None:
        with client_errors(self.out), suppress(FileNotFoundError):
            self.fs.rm_file(self._key(name))

    def _key(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _put(self, path: Path, name: str, mode: str) -> bool:
        for attempt in range(_TRIES):
            try:
                self.fs.put_file(str(path), self._key(name), mode=mode)
                return True
            except FileExistsError:
                return False
            except (FileNotFoundError, PermissionError):
                raise
            except Exception:        # 409 of a PUT at the same moment, 503, a dropped connection: each client has its own class
                if attempt == _TRIES - 1:
                    raise
                time.sleep(0.1 * 2**attempt)
        raise AssertionError


def _until_put(folder: Path, name: str, data: bytes, put: Callable[[Path], None]) -> None:
    """`put` a temporary file of the data; once more where the sweep of a worker that has just finished the run has taken it."""
    for left in reversed(range(_SWEEPS)):
        path = _write_temporary(folder, name, data)
        try:
            put(path)
            return
        except StorageError:
            if not left or path.exists():
                raise
            time.sleep(0.01)


def _write_temporary(folder: Path, name: str, data: bytes) -> Path:
    path = folder / f"{name}.{uuid.uuid4().hex}.inprogress"
    with storage_errors(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            path.write_bytes(data)
        except OSError:
            path.unlink(missing_ok=True)      # half of it would only fill a full disk
            raise
    return path


def check_writable(store: Store) -> None:
    """Raises ConfigError unless a file can be made and removed in the store's work folder."""
    try:
        with storage_errors(str(store.work)):
            store.work.mkdir(parents=True, exist_ok=True)
            probe = store.work / f"probe.{uuid.uuid4().hex}"
            probe.write_bytes(b"")
            probe.unlink(missing_ok=True)
    except StorageError as error:
        other = "" if isinstance(store, LocalStore) else ", or set output.spool to another folder"
        raise ConfigError(f"{error}{other}") from error


def sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable, where the file system knows such a thing."""
    try:
        sync_file(path)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def sweep(store: Store, keep: Callable[[str], bool] = lambda name: False) -> None:
    """Remove what attempts left in the work folder, but for names that are to `keep`. Not the folder itself: a late worker may be
    about to use it."""
    with storage_errors(str(store.work)):
        for path in store.work.glob("*"):
            if not keep(path.name):
                path.unlink(missing_ok=True)
