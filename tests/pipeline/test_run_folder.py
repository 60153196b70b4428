"""The run folder: whose it is, what is left, who may finish it, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from output_cases import (
    FINGERPRINT,
    LAYOUT,
    SCHEMA,
    assert_whole,
    contents,
    fill,
    found,
    make_result,
    make_results,
    open_folder,
    parts,
    tables,
    write_input,
)

from pipeline.exits import ConfigError, Exit, ShardsMissing, StorageError
from pipeline.input.plan import make_plan
from pipeline.output.layout import OutputLayout
from pipeline.output.rows import RowResult, Status
from pipeline.output.run_folder import RunFolder


def finish(out: Path, files: list, **kwargs) -> RunFolder:
    folder = open_folder(out, files, **kwargs)
    for shard in folder.pending_shards():
        fill(folder, shard)
    folder.finalize()
    return folder


def test_a_run_from_plan_to_success(tmp_path: Path) -> None:
    files = write_input(tmp_path / "in")
    out = tmp_path / "out"
    folder = open_folder(out, files, info={"seed": 7})
    assert not folder.is_complete()
    shards = folder.pending_shards()
    assert len(shards) == len(folder.plan.shards) > 3
    with pytest.raises(ShardsMissing, match=r"4 of 4 shards .* \(0, 1, 2, 3\)") as caught:
        folder.finalize()
    assert caught.value.exit_code == Exit.SHARDS_MISSING
    for shard in shards:
        assert fill(folder, shard)
    assert folder.pending_shards() == []
    manifest = folder.finalize()
    assert folder.is_complete()
    assert_whole(out, files)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["_SUCCESS", "_work", "_manifest.json", "_plan.parquet", "_run.json", *(shard.name for shard in shards)])
    table = pa.concat_tables(pq.read_table(path) for path in parts(out))
    assert manifest["rows"] == sum(manifest["statuses"].values()) == table.num_rows
    assert manifest["statuses"]["prompt_null"] == table.column("status").to_pylist().count("prompt_null")
    assert manifest["completion_tokens"] == 8 * manifest["statuses"]["ok"]
    assert orjson.loads((out / "_manifest.json").read_bytes()) == manifest
    assert orjson.loads((out / "_run.json").read_bytes())["info"] == {"seed": 7}
    assert open_folder(out, files).finalize() == manifest      # again, by another worker
    assert RunFolder.load(str(out)).is_complete()
    assert list((out / "_work").iterdir()) == []


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    files = write_input(tmp_path / "in")
    folder = open_folder(tmp_path / "out", files)
    fill(folder, folder.plan.shards[2])
    writer = folder.open_shard(folder.plan.shards[0])
    writer.append(*list(make_results(folder.plan.shards[0]))[:5])
    writer.close()
    again = finish(tmp_path / "out", files)
    assert_whole(tmp_path / "out", files)
    whole = finish(tmp_path / "whole", files)
    for shard in again.plan.shards:
        assert contents(tmp_path / "out" / shard.name) == contents(tmp_path / "whole" / shard.name)
    assert whole.fingerprint == again.fingerprint


def test_workers_share_the_shards(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "out", write_input(tmp_path / "in"), rows_per_shard=7)
    shares = [[shard.index for shard in folder.pending_shards(worker, 4)] for worker in range(4)]
    assert sorted(index for share in shares for index in share) == [shard.index for shard in folder.plan.shards]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    fill(folder, folder.plan.shards[5])
    assert 5 not in [shard.index for shard in folder.pending_shards(1, 4)]


def test_another_config_is_refused_by_key(tmp_path: Path) -> None:
    files = write_input(tmp_path / "in")
    open_folder(tmp_path / "out", files)
    plan = make_plan(files, 30)
    other = {"model": "made-up", "sampling.temperature": "0.7", "task.schema": "ab12"}
    with pytest.raises(ConfigError) as caught:
        RunFolder.open(str(tmp_path / "out"), other, plan, LAYOUT)
    line = str(caught.value)
    assert "sampling.temperature (was 0.0, is 0.7)" in line
    assert "task.schema (was not set, is ab12)" in line
    assert "model" not in line
    assert caught.value.exit_code == Exit.CONFIG
    with pytest.raises(ConfigError, match=r"output\.columns"):
        RunFolder.open(str(tmp_path / "out"), FINGERPRINT, plan, OutputLayout.make(SCHEMA))


def test_a_changed_input_is_refused_and_new_files_are_appended(tmp_path: Path) -> None:
    files = write_input(tmp_path / "in", 100)
    out = tmp_path / "out"
    before = finish(out, files)
    stamps = {path.name: path.stat().st_mtime_ns for path in parts(out)}
    pq.write_table(pa.table({"prompt": ["new"] * 40, "gold": [0] * 40}, SCHEMA), tmp_path / "in" / "in-9.parquet")
    with pytest.raises(ConfigError, match=r"in-9.parquet.*plan.on_change=append"):
        open_folder(out, found(tmp_path / "in"))
    assert before.is_complete()
    after = open_folder(out, found(tmp_path / "in"), on_change="append")
    assert not after.is_complete()
    assert [shard.name for shard in after.pending_shards()] == ["part-00004-of-00006.parquet", "part-00005-of-00006.parquet"]
    finish(out, found(tmp_path / "in"), on_change="append")
    assert_whole(out, found(tmp_path / "in"))
    assert {name: (out / name).stat().st_mtime_ns for name in stamps} == stamps
    assert RunFolder.load(str(out)).is_complete()
    pq.write_table(pa.table({"prompt": ["other"] * 50, "gold": [0] * 50}, SCHEMA), tmp_path / "in" / "in-0.parquet")
    with pytest.raises(ConfigError, match=r"in-0.parquet has changed"):
        open_folder(out, found(tmp_path / "in"), on_change="append")


def test_a_stale_success_does_not_stand_for_an_appended_plan(tmp_path: Path) -> None:
    """A worker that finalizes while another appends may write its mark late."""
    files = write_input(tmp_path / "in", 60)
    late = finish(tmp_path / "out", files)
    shutil.copy(tmp_path / "in" / "in-0.parquet", tmp_path / "in" / "in-8.parquet")
    now = open_folder(tmp_path / "out", found(tmp_path / "in"), on_change="append")
    late.finalize()
    assert not now.is_complete()
    assert not RunFolder.load(str(tmp_path / "out")).is_complete()


@pytest.mark.parametrize("damage", ["foreign", "short", "cut", "empty", "text", "other run"])
def test_what_is_not_ours_at_our_name_is_never_overwritten(tmp_path: Path, damage: str) -> None:
    files = write_input(tmp_path / "in")
    folder = open_folder(tmp_path / "out", files)
    shard = folder.plan.shards[1]
    path = tmp_path / "out" / shard.name
    if damage == "foreign":
        pq.write_table(pa.table({"a": [1]}), path)
    elif damage == "other run":
        other = RunFolder.open(str(tmp_path / "other"), {"model": "another"}, make_plan(files, 30), LAYOUT)
        fill(other, other.plan.shards[1])
        shutil.copy(tmp_path / "other" / shard.name, path)
    elif damage == "short":
        fill(folder, shard)
        meta = pq.read_metadata(path).metadata
        table = pq.read_table(path).slice(1)
        with pq.ParquetWriter(path, table.schema) as writer:
            writer.write_table(table)
            writer.add_key_value_metadata({key: value for key, value in meta.items() if key.startswith(b"gristmill")})
    else:
        fill(folder, shard)
        path.write_bytes({"cut": path.read_bytes()[:-5], "empty": b"", "text": b"not Parquet at all"}[damage])
    before = path.read_bytes()
    for attempt in (folder.pending_shards, folder.manifest, folder.finalize, lambda: fill(folder, shard)):
        with pytest.raises(StorageError, match=f"{shard.name} .*move it away") as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    path.rename(tmp_path / "away")
    finish(tmp_path / "out", files)
    assert_whole(tmp_path / "out", files)


def test_a_part_that_went_away_is_missed(tmp_path: Path) -> None:
    files = write_input(tmp_path / "in")
    folder = finish(tmp_path / "out", files)
    (tmp_path / "out" / folder.plan.shards[2].name).unlink()
    assert not folder.is_complete()
    assert [shard.index for shard in folder.pending_shards()] == [2]
    finish(tmp_path / "out", files)
    assert_whole(tmp_path / "out", files)


@pytest.mark.parametrize("name", ["_run.json", "_plan.parquet"])
def test_a_damaged_run_or_plan_is_one_line(tmp_path: Path, name: str) -> None:
    files = write_input(tmp_path / "in")
    open_folder(tmp_path / "out", files)
    path = tmp_path / "out" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(StorageError, match=f"{name} is damaged"):
        open_folder(tmp_path / "out", files)


def test_looking_at_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not the output of a job"):
        RunFolder.load(str(tmp_path))
    files = write_input(tmp_path / "in")
    folder = open_folder(tmp_path / "out", files)
    with pytest.raises(ValueError, match="open it"):
        RunFolder.load(str(tmp_path / "out")).open_shard(folder.plan.shards[0])


def test_journals_of_another_run_are_not_taken(tmp_path: Path) -> None:
    """Spools of object stores outlive the bucket's folder, and people copy folders."""
    files = write_input(tmp_path / "in")
    one = open_folder(tmp_path / "out", files)
    writer = one.open_shard(one.plan.shards[0])
    writer.append(RowResult(0, text="of another model"))
    writer.close()
    shutil.copytree(tmp_path / "out" / "_work", tmp_path / "other" / "_work")
    other = RunFolder.open(str(tmp_path / "other"), {"model": "another"}, make_plan(files, 30), LAYOUT)
    assert other.open_shard(other.plan.shards[0]).recovered() == {}
    assert len(one.open_shard(one.plan.shards[0]).recovered()) == 1


# --- doing failed rows again ---


def test_failed_rows_are_done_again_and_the_rest_is_kept(tmp_path: Path) -> None:
    files = write_input(tmp_path / "in", 200)
    out = tmp_path / "out"
    folder = finish(out, files, rows_per_shard=40)
    first = {shard.index: contents(out / shard.name) for shard in folder.plan.shards}
    shards = folder.failed_shards(["prompt_null"])
    assert 0 < len(shards) <= len(folder.plan.shards)
    assert folder.failed_shards(["timeout"]) == []
    for shard in shards:
        before = pq.read_table(out / shard.name).to_pylist()
        writer = folder.reopen_shard(shard, ["prompt_null"])
        ids = list(shard.row_ids())
        redo = [row for row in range(shard.num_rows) if make_result(row, ids[row]).status == Status.PROMPT_NULL]
        assert writer.missing() == len(redo) > 0
        todo = [result for result in make_results(shard) if result.row in redo]
        again = [RowResult(r.row, r.sample, r.samples, text="better", completion_tokens=1) for r in todo]
        writer.append(*again[:1])
        writer = folder.reopen_shard(shard, ["prompt_null"])      # killed in between
        writer.append(*again[1:])
        assert writer.commit(tables(folder.plan, shard))
        after = pq.read_table(out / shard.name).to_pylist()
        assert len(after) == len(before)
        for old, new in zip(before, after, strict=True):
            better = {**old, "status": "ok", "error": None, "text": "better", "completion_tokens": 1}
            assert new == (old if old["status"] == "ok" else better)
        kept = out / "_superseded" / shard.name.replace(".parquet", ".g000.parquet")
        assert contents(kept) == first[shard.index]
    assert folder.failed_shards(["prompt_null"]) == []
    assert not folder.is_complete()      # _SUCCESS stands for the parts that were there before
    manifest = folder.finalize()
    assert set(manifest["statuses"]) == {"ok"}
    assert [part["generation"] for part in manifest["parts"]] == [int(shard in shards) for shard in folder.plan.shards]
    assert len(parts(out)) == len(folder.plan.shards)


def test_of_two_that_do_the_same_rows_again_one_wins(tmp_path: Path) -> None:
    files = write_input(tmp_path / "in", 60)
    folder = finish(tmp_path / "out", files)
    shard = folder.failed_shards(["prompt_null"])[0]
    writers = [folder.reopen_shard(shard, ["prompt_null"]) for _ in range(2)]
    for writer in writers:
        todo = [result for result in make_results(shard) if (result.row, result.sample) not in writer.recovered()]
        writer.append(*todo)
    assert [writer.commit(tables(folder.plan, shard)) for writer in writers] == [True, False]
    assert_whole(tmp_path / "out", files)


def test_a_worker_that_ends_takes_nothing_from_one_that_does_rows_again(tmp_path: Path) -> None:
    """All parts are there all the time, so that each may finish the run; and a part that comes later unsettles it."""
    files = write_input(tmp_path / "in", 200)
    folder = finish(tmp_path / "out", files, rows_per_shard=40)
    shard = folder.failed_shards(["prompt_null"])[0]

    def again() -> list[RowResult]:
        return [result for result in make_results(shard) if (result.row, result.sample) not in writer.recovered()]

    def tables_while_others_end():
        folder.finalize()
        yield from tables(folder.plan, shard)

    writer = folder.reopen_shard(shard, ["prompt_null"])
    writer.append(*again()[:1])
    folder.finalize()
    missing = writer.missing()
    writer = folder.reopen_shard(shard, ["prompt_null"])      # it was killed
    assert writer.missing() == missing
    writer.append(*again())
    manifest = folder.manifest()      # of one that ends slowly
    assert writer.commit(tables_while_others_end())
    assert not folder.is_complete()
    folder.finalize(manifest)
    assert not folder.is_complete()
    folder.finalize()
    assert folder.is_complete()
    assert list((tmp_path / "out" / "_work").iterdir()) == []
    shutil.rmtree(tmp_path / "out" / "_superseded")      # nobody needs it
    folder.finalize()
    assert folder.is_complete()


def test_a_worker_that_ends_takes_nothing_of_shards_that_were_appended(tmp_path: Path) -> None:
    late = finish(tmp_path / "out", write_input(tmp_path / "in", 60))
    shutil.copy(tmp_path / "in" / "in-0.parquet", tmp_path / "in" / "in-8.parquet")
    now = open_folder(tmp_path / "out", found(tmp_path / "in"), on_change="append")
    shard = now.pending_shards()[0]
    now.open_shard(shard).append(*list(make_results(shard))[:5])
    late.finalize()
    assert len(now.open_shard(shard).recovered()) == 5
