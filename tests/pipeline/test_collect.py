"""The collector's thread by itself: what it does while nothing comes."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from output_cases import make_results, open_folder, write_input

from pipeline.collect import Collect
from pipeline.input.feed import OpenShard
from pipeline.output import journal
from tests.pipeline.scripted_engine import ScriptedTokenizer


def test_rows_are_on_disk_soon_also_where_no_others_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a power cut: what was in the journal at its last fsync."""
    on_disk: list[int] = []
    monkeypatch.setattr(journal, "SYNC_SECONDS", float("inf"))      # appends alone do not sync
    monkeypatch.setattr(journal.os, "fsync", lambda fd: on_disk.append(os.fstat(fd).st_size))
    folder = open_folder(tmp_path / "out", write_input(tmp_path / "in"))
    state = OpenShard(folder.plan.shards[0], folder.open_shard(folder.plan.shards[0]))
    source: Any = SimpleNamespace(cursor=lambda: None)
    collect = Collect(source, ScriptedTokenizer(), lambda state: None)
    collect.start()
    for result in list(make_results(state.shard))[:3]:
        del on_disk[:]
        collect.deliver(state, [result])
        end = time.monotonic() + 60
        while not on_disk and time.monotonic() < end:
            collect.check()
            time.sleep(0.01)
        (path,) = folder.store.work.glob("*.journal")
        assert on_disk == [path.stat().st_size]
    collect.close()
