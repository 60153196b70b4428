"""Leases on shards: which shard a worker does next, so that workers of unequal speed end together.

A lease saves GPU time and no more. Two workers at one shard are harmless (the first to publish wins), so a lease that is lost,
stolen or swept away costs a shard's work at most, and nobody asks whether it still holds.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

from pipeline.exits import ConfigError
from pipeline.input.plan import Shard
from pipeline.output.run_folder import RunFolder
from pipeline.output.store import LocalStore, storage_errors

LEASE_SECONDS = 60.0      # after so long without a sign of life, by the contender's own clock, a holder counts as dead
AHEAD_ROWS = 16_384       # held at once beyond two shards: enough to keep the engine busy, few enough to leave others some
_POLL_SECONDS = 2.0
_EMPTY_SECONDS = 5.0


class Claims:
    """Iterates the shards that this worker should do: its own share first, then what others have not begun, and at the end what
    they began and let die. Blocks while others hold all that is left; ends when every shard is committed or in its own hands.

    `release` and `stop` may be called from any thread.
    """

    def __init__(self, folder: RunFolder, worker: int = 0, workers: int = 1, seconds: float = LEASE_SECONDS) -> None:
        if not isinstance(folder.store, LocalStore):
            raise ConfigError(f"leases need a folder that all workers share, and {folder.out} is none: set cluster.lease=false")
        if not hasattr(filelock, "SoftFileLease"):
            raise ConfigError("leases need filelock 3.30 or newer: pip install -U filelock, or set cluster.lease=false")
        self._folder, self._seconds = folder, seconds
        self._work = folder.store.work
        self._leases: dict[int, filelock.SoftFileLease] = {}
        self._held: dict[int, int] = {}      # shard index -> rows
        self._seen: dict[Path, tuple[tuple[int, ...], float]] = {}      # of others' markers: the state, and since when
        self._changed = threading.Event()
        self._stopped = False
        pending = folder.pending_shards()
        others = [shard for shard in pending if shard.index % workers != worker]
        random.Random(worker).shuffle(others)      # so that two thieves rarely want the same
        self._left = [*(shard for shard in pending if shard.index % workers == worker), *others]

    def __iter__(self) -> Iterator[Shard]:
        while self._left and not self._stopped:
            self._changed.clear()
            full = len(self._held) > 1 and sum(self._held.values()) >= AHEAD_ROWS
            shard = None if full else self._next()
            if shard is not None:
                yield shard
            elif self._left:
                self._changed.wait(_POLL_SECONDS)

    def release(self, shard: Shard) -> None:
        """The shard is committed, or given up."""
        if self._held.pop(shard.index, None) is not None:
            self._changed.set()
            with storage_errors(str(self._work)):
                self._leases.pop(shard.index).release()

    def stop(self) -> None:
        """End the iteration, soon, and release all."""
        self._stopped = True
        self._changed.set()
        for shard in self._folder.plan.shards:
            self.release(shard)

    def _next(self) -> Shard | None:
        """The first shard that is free, or None. Forgets those that are committed."""
        names = self._folder.store.names()
        self._left = [shard for shard in self._left if shard.name not in names]
        for shard in self._left:
            if self._claim(shard):
                self._left.remove(shard)
                if not self._folder.is_committed(shard):
                    return shard
                self.release(shard)      # its holder committed it a moment ago
        return None

    def _claim(self, shard: Shard) -> bool:
        lease = self._leases.get(shard.index)
        if lease is None:
            # One object a shard: it remembers since when it has seen no sign of life. Released by another thread than claims.
            path = self._work / f"{shard.index:05d}.lease"
            lease = self._leases[shard.index] = filelock.SoftFileLease(path, lease_duration=self._seconds, thread_local=False)
        with storage_errors(str(self._work)):
            for _ in range(2):
                try:
                    lease.acquire(blocking=False)
                except (filelock.Timeout, filelock.LeaseSettingsMismatch, filelock.SoftFileLockProtocolError):
                    if not self._is_abandoned(Path(lease.lock_file)):
                        return False
                    Path(lease.lock_file).unlink(missing_ok=True)
                else:
                    self._held[shard.index] = shard.num_rows
                    return True
        return False

    def _is_abandoned(self, marker: Path) -> bool:
        """filelock takes over from the dead, but never touches a marker that it cannot read: one whose maker was killed before it
        had written it, or of another version. A holder that lives touches its own."""
        try:
            stat = marker.stat()
        except FileNotFoundError:
            return False
        state = (stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)
        if self._seen.get(marker, ((), 0.0))[0] != state:
            self._seen[marker] = state, time.monotonic()
        return time.monotonic() - self._seen[marker][1] >= (self._seconds if stat.st_size else _EMPTY_SECONDS)
