"""A run's output folder: who may write to it, what is still to do, and when it is whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import pyarrow as pa

from pipeline.input.plan import Plan, Shard
from pipeline.output.layout import OutputLayout
from pipeline.output.rows import RowResult


class ShardWriter:
    """One attempt at one shard: a journal that survives the process, then the part. Not shared between threads; two writers are
    independent and may commit at the same time."""

    shard: Shard

    def recovered(self) -> Mapping[tuple[int, int], RowResult]:
        """(row, sample) -> result of what earlier attempts journalled: not to be computed again. A row is whole when all of its
        `samples` are there."""
        raise NotImplementedError

    def append(self, *results: RowResult) -> None:
        """Journal finished rows, in any order. They survive a killed process at once and a power cut within two seconds.
        ValueError: a row or sample out of range, or one that is there already. StorageError: disk full and the like."""
        raise NotImplementedError

    def missing(self) -> int:
        """Rows that lack a sample yet; commit needs 0."""
        raise NotImplementedError

    def flush(self) -> None:
        """Force what was appended to disk: on drain, and now and then while few rows finish."""
        raise NotImplementedError

    def commit(self, input_tables: Iterator[pa.Table]) -> bool:
        """Write, check and publish the part; then drop the journal. `input_tables`: the shard's input rows in order, in chunks of any
        size, with the columns of layout.input. True: this attempt's part was published; False: another's was there first (just as good)."""
        raise NotImplementedError

    def close(self) -> None:
        """Flush and let go, without a commit; the journal stays for the next attempt."""
        raise NotImplementedError


class RunFolder:
    """The output folder of one run. Everything here may be called by many workers at once, and again after a kill."""

    out: str
    plan: Plan

    @classmethod
    def open(
        cls,
        out: str,
        fingerprint: Mapping[str, str],
        plan: Plan,
        layout: OutputLayout,
        on_change: Literal["refuse", "append"] = "refuse",
        info: Mapping[str, Any] | None = None,
    ) -> RunFolder:
        """Create the run or resume it: `plan` is what the input holds now, `self.plan` the one that counts.

        `fingerprint`: what changes results, by config key, so that a refusal can name the keys (values short: a hash or the value).
        `info`: kept in _run.json for people (resolved config, versions), never compared. Secrets must be redacted beforehand.
        ConfigError: another fingerprint (names the keys), an input that changed (names the file), a folder that cannot be written.
        """
        raise NotImplementedError

    def pending_shards(self, worker: int = 0, workers: int = 1) -> list[Shard]:
        """This worker's shards (index % workers == worker) that are not committed. Checks the footers of those that are:
        StorageError on a part at our name that this run did not write, or that is damaged; it is never overwritten."""
        raise NotImplementedError

    def open_shard(self, shard: Shard) -> ShardWriter:
        raise NotImplementedError

    def is_complete(self) -> bool:
        """True when _SUCCESS stands for the plan as it is now. Cheap: two small reads."""
        raise NotImplementedError

    def finalize(self) -> dict[str, Any]:
        """Check every part, write _manifest.json, then _SUCCESS, then sweep leftovers. Any worker may call it, and again.
        Returns the manifest: {"shards", "rows", "statuses": {status: n}, "prompt_tokens", "cached_tokens", "completion_tokens", "parts": [...]}.
        ShardsMissing (exit 3) names how many and which."""
        raise NotImplementedError
