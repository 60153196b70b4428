"""A run's output folder: whose it is, what is still to do, and when it is whole.

    _run.json        the fingerprint, key by key          _plan.parquet     the plan (_plan.g001.parquet ...: what was appended)
    part-*.parquet   the committed shards                 _work/            journals and parts in the making
    _manifest.json   the parts and their sums             _SUCCESS          last; names the plan and parts that it stands for
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import orjson

from pipeline.exits import ConfigError, ShardsMissing, StorageError
from pipeline.input.plan import Plan, Shard
from pipeline.output.layout import OutputLayout
from pipeline.output.part import PartInfo, ShardId, read_part
from pipeline.output.retry import settled_rows
from pipeline.output.shards import ShardWriter, is_later
from pipeline.output.store import SUPERSEDED, LocalStore, Store, check_writable, open_store, sweep

FORMAT = 1
RUN, PLAN, MANIFEST, SUCCESS = "_run.json", "_plan.parquet", "_manifest.json", "_SUCCESS"
COLUMNS = "output.columns"    # of the fingerprint: a hash of the names and types of all columns
_READERS = 16


class RunFolder:
    """Everything here may be called by many workers at once, and again after a kill."""

    def __init__(self, store: Store, fingerprint: Mapping[str, str], plan: Plan, layout: OutputLayout | None = None,
                 run: Mapping[str, Any] | None = None) -> None:
        """`run`: what _run.json holds, where this is opened to be added to."""
        self.out, self.store, self.plan, self.layout, self._run = store.out, store, plan, layout, run
        self.fingerprint = _hash(fingerprint)

    @classmethod
    def open(
        cls,
        out: str,
        fingerprint: Mapping[str, str],
        plan: Plan,
        layout: OutputLayout,
        on_change: Literal["refuse", "append"] = "refuse",
        info: Mapping[str, Any] | None = None,
        spool: str | None = None,
    ) -> RunFolder:
        """Create the run or resume it: `plan` is what the input holds now, `self.plan` the one that counts.

        `fingerprint`: what changes results, by config key, so that a refusal can name the keys (short values: the value or its
        hash). `info`: kept in _run.json for people (resolved config, versions; redacted), never compared. `spool`: local folder
        for the journals of an output in an object store. ConfigError: another fingerprint (names the keys), an input that changed
        (names the file), a folder that cannot be written.
        """
        store = open_store(out, spool)
        fingerprint = {**fingerprint, COLUMNS: layout.hash()}
        run = {"format": FORMAT, "fingerprint": fingerprint, "info": dict(info or {})}
        _settle_run(store, run)
        folder = cls(store, fingerprint, _settle_plan(store, plan, on_change), layout, run)
        if not folder.is_complete():
            check_writable(store)
        return folder

    @classmethod
    def load(cls, out: str, spool: str | None = None) -> RunFolder:
        """The run that is there, to look at or to finalize, not to add to. ConfigError if there is none."""
        store = open_store(out, spool)
        fingerprint = _read_run(store)
        plan = _read_plan(store, _plan_names(store))
        if plan is None:
            raise ConfigError(f"{out} has no {PLAN} yet: its job has not begun")
        return cls(store, fingerprint, plan)

    def forget(self) -> None:
        """Take back what opening a new folder wrote, unless rows were written since: a mended configuration is not another
        run's. For a worker that has no others."""
        if not _holds_rows(self.store):
            for name in (RUN, PLAN):
                self.store.delete(name)

    def settle(self) -> None:
        """Before the first row: take the folder once more, should an earlier attempt have forgotten it since it was opened."""
        if self._run is not None:
            _settle_run(self.store, self._run)
            if PLAN not in self.store.names():
                self.store.create(PLAN, self.plan.to_bytes())

    def shard_id(self, shard: Shard) -> ShardId:
        return ShardId(self.fingerprint, self.plan.hash(shard.of), shard.index)

    def pending_shards(self, worker: int = 0, workers: int = 1) -> list[Shard]:
        """This worker's shards (index % workers == worker) that are not committed. Checks the footers of those that are:
        StorageError on a part at our name that this run did not write, or that is damaged; it is never overwritten."""
        mine = self.plan.shards[worker::workers]
        done = self.committed(mine)
        return [shard for shard in mine if shard.index not in done]

    def committed(self, shards: Iterable[Shard] | None = None) -> dict[int, PartInfo]:
        """Shard index -> footer, of the given shards (all by default) that are committed."""
        names = self.store.names()
        there = [shard for shard in (self.plan.shards if shards is None else shards) if shard.name in names]
        with ThreadPoolExecutor(_READERS) as pool:
            footers = pool.map(lambda shard: read_part(self.store, shard.name, self.shard_id(shard)), there)
            return {shard.index: footer for shard, footer in zip(there, footers, strict=True)}

    def is_committed(self, shard: Shard) -> bool:
        return shard.name in self.store.names()

    def open_shard(self, shard: Shard) -> ShardWriter:
        """An attempt at a pending shard."""
        return ShardWriter(self.store, shard, self.shard_id(shard), self._opened())

    def failed_shards(self, statuses: Iterable[str], worker: int = 0, workers: int = 1) -> list[Shard]:
        """This worker's committed shards that hold rows of one of `statuses`: to be done again with reopen_shard."""
        mine = self.plan.shards[worker::workers]
        done = self.committed(mine)
        return [shard for shard in mine if shard.index in done and any(done[shard.index].statuses[status] for status in statuses)]

    def reopen_shard(self, shard: Shard, statuses: Iterable[str]) -> ShardWriter:
        """An attempt at the rows of `statuses` of a committed shard; all other rows are `recovered` already. Its commit takes the
        place of the part in one step, and keeps the old one in _superseded/."""
        before = read_part(self.store, shard.name, self.shard_id(shard))
        kept = settled_rows(self.store, shard, self._opened(), frozenset(statuses))
        return ShardWriter(self.store, shard, self.shard_id(shard), self._opened(), before.generation + 1, kept)

    def is_complete(self) -> bool:
        """True when _SUCCESS stands for the plan and the parts as they are now, and every part is there by name. Cheap: only the
        footers of parts that took the place of others are read."""
        mark = self.store.read(SUCCESS)
        if mark is None or not self.store.names().issuperset(shard.name for shard in self.plan.shards):
            return False
        done = self.committed(self._replaced())
        return mark == self._mark({self.plan.shards[index].name: info.generation for index, info in done.items()})

    def manifest(self, remedy: str = "run the same command again to compute them") -> dict[str, Any]:
        """Check every part's footer and sum up. ShardsMissing (exit 3) says how many and which, and the remedy."""
        done = self.committed()
        missing = [shard.index for shard in self.plan.shards if shard.index not in done]
        if missing:
            some = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
            raise ShardsMissing(f"{len(missing)} of {len(self.plan.shards)} shards of {self.out} are missing ({some}): {remedy}")
        statuses: Counter[str] = sum((info.statuses for info in done.values()), Counter())
        return {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "plan": self.plan.hash(),
            "shards": len(done),
            "rows": sum(info.rows for info in done.values()),
            "statuses": dict(sorted(statuses.items())),
            "prompt_tokens": sum(info.prompt_tokens for info in done.values()),
            "cached_tokens": sum(info.cached_tokens for info in done.values()),
            "completion_tokens": sum(info.completion_tokens for info in done.values()),
            "parts": [
                {"path": shard.name, "rows": done[shard.index].rows, "generation": done[shard.index].generation,
                 "attempt": done[shard.index].attempt, "statuses": dict(sorted(done[shard.index].statuses.items()))}
                for shard in self.plan.shards
            ],
        }

    def finalize(self, manifest: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        """Write _manifest.json (`manifest`, or a fresh one), sweep leftovers, write _SUCCESS. Any worker may, and again: others
        may be doing failed rows again meanwhile, or shards that were appended. What is theirs stays, and _SUCCESS does not stand
        for the parts that they publish later."""
        manifest = manifest or self.manifest()
        generations = dict(enumerate(part["generation"] for part in manifest["parts"]))
        self.store.replace(MANIFEST, orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
        sweep(self.store, lambda name: is_later(name, generations))      # before the mark: a run that finds it looks no further
        self.store.replace(SUCCESS, self._mark({shard.name: generations[shard.index] for shard in self._replaced()}))
        return manifest

    def _opened(self) -> OutputLayout:
        if self.layout is None:
            raise ValueError("this run folder was loaded to be looked at: RunFolder.open it to add to it")
        return self.layout

    def _replaced(self) -> list[Shard]:
        """The shards of which an earlier part is kept: the part there now may be of a later generation than any manifest says."""
        kept = {name.partition(".")[0] for name in self.store.names(SUPERSEDED)}
        return [shard for shard in self.plan.shards if shard.name.partition(".")[0] in kept]

    def _mark(self, generations: Mapping[str, int]) -> bytes:
        """`generations`: of the parts that took the place of others."""
        again = {"generations": dict(generations)} if generations else {}
        return orjson.dumps({"fingerprint": self.fingerprint, "plan": self.plan.hash(), **again})


def _hash(fingerprint: Mapping[str, str]) -> str:
    return hashlib.blake2b(orjson.dumps(dict(fingerprint), option=orjson.OPT_SORT_KEYS), digest_size=16).hexdigest()


def _holds_rows(store: Store) -> bool:
    """Whether rows were written: journalled, as far as this worker sees, or committed."""
    return any(store.work.glob("*.journal")) or any(name.startswith("part-") for name in store.names())


def _read_run(store: Store) -> dict[str, str]:
    data = store.read(RUN)
    if data is None:
        raise ConfigError(f"{store.out} is not the output of a job: it has no {RUN}")
    try:
        run = orjson.loads(data)
        if run["format"] != FORMAT:
            raise ValueError(f"format {run['format']}, not {FORMAT}")
        return run["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{store.out}/{RUN} is damaged ({error}): restore it, or set another output.dir") from error


def _settle_run(store: Store, run: Mapping[str, Any]) -> None:
    """Make the folder this run's, unless it is: raises ConfigError if it is another's."""
    if store.read(RUN) is None:
        try:
            check_writable(store)
            store.create(RUN, orjson.dumps(run, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS))
        except StorageError as error:
            raise ConfigError(str(error)) from error
    before, fingerprint = _read_run(store), run["fingerprint"]
    differ = [key for key in sorted({*before, *fingerprint}) if before.get(key) != fingerprint.get(key)]
    if differ:
        changes = ", ".join(f"{key} (those of data, or by output.flatten)" if key == COLUMNS else
                            f"{key} (was {before.get(key, 'not set')}, is {fingerprint.get(key, 'not set')})" for key in differ)
        empty = isinstance(store, LocalStore) and not _holds_rows(store)     # elsewhere, journals lie where each worker is
        remedy = ", these back, or, unless a job is at it, remove it: it holds no rows yet" if empty else ", or these back"
        raise ConfigError(f"{store.out} holds the output of another config: {changes}; set another output.dir{remedy}")


def _settle_plan(store: Store, found: Plan, on_change: Literal["refuse", "append"]) -> Plan:
    """The plan of the folder, made from `found` if it has none. When workers plan at the same time, one's plan is everyone's."""
    while True:
        names = _plan_names(store)
        plan = _read_plan(store, names)
        if plan is None:
            store.create(PLAN, found.to_bytes())
            continue
        now = plan.reconcile(found, on_change)
        if now == plan:
            return plan
        store.delete(SUCCESS)
        # Named after what was read: of two that append to the same plan one wins, and the other reads what that one added.
        store.create(_appended(len(names)), now.to_bytes(plan))


def _appended(number: int) -> str:
    return f"_plan.g{number:03d}.parquet"


def _plan_names(store: Store) -> list[str]:
    """The plan and its appends, as far as there are any."""
    names = store.names()
    appended = itertools.takewhile(names.__contains__, map(_appended, itertools.count(1)))
    return [PLAN, *appended] if PLAN in names else []


def _read_plan(store: Store, names: Iterable[str]) -> Plan | None:
    parts = [data for data in map(store.read, names) if data is not None]
    if not parts:
        return None
    try:
        return Plan.from_bytes(parts)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise StorageError(f"{store.out}/{PLAN} is damaged ({error}): restore it, or set another output.dir") from error
