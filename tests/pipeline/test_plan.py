"""The plan: cuts, ids, what is saved, and what happens when the input changes."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.exits import ConfigError
from pipeline.input.plan import InputFile, Plan, check_unchanged, make_plan, row_id, row_ids


def file(key: str, *row_groups: int, version: str = "1", size: int = 10) -> InputFile:
    return InputFile(key, f"folder/{key}", sum(row_groups), size, version, row_groups)


@given(st.lists(st.lists(st.integers(0, 40), max_size=5), max_size=6), st.integers(1, 25), st.none() | st.integers(0, 60))
def test_every_row_is_in_one_shard_in_order(files: list[list[int]], rows_per_shard: int, limit: int | None) -> None:
    given_files = [file(f"f{number}", *groups) for number, groups in enumerate(files)]
    plan = make_plan(reversed(given_files), rows_per_shard, limit)
    rows = [(piece.file, row) for shard in plan.shards for piece in shard.pieces
            for row in range(piece.first_row, piece.first_row + piece.num_rows)]
    assert rows == [(f.key, row) for f in given_files for row in range(f.num_rows)][:limit]
    assert [shard.index for shard in plan.shards] == list(range(len(plan.shards)))
    for shard in plan.shards:
        assert 0 < shard.num_rows <= rows_per_shard
        for piece in shard.pieces:
            groups = plan.file[piece.file].row_groups
            assert piece.first_row == sum(groups[: piece.row_group]) + piece.offset
            assert piece.offset + piece.num_rows <= groups[piece.row_group]
    assert Plan.from_bytes([plan.to_bytes()]) == plan
    assert Plan.from_bytes([plan.to_bytes()]).hash() == plan.hash()


def test_a_row_group_is_cut_only_when_it_is_larger_than_a_shard() -> None:
    plan = make_plan([file("a", 60, 40), file("b", 35), file("c", 5)], 50)
    assert [[(p.file, p.row_group, p.offset, p.num_rows) for p in shard.pieces] for shard in plan.shards] == [
        [("a", 0, 0, 30)], [("a", 0, 30, 30)], [("a", 1, 0, 40)], [("b", 0, 0, 35), ("c", 0, 0, 5)],
    ]
    assert plan.shards[3].name == "part-00003-of-00004.parquet"


def test_the_hash_tells_plans_apart() -> None:
    base = [file("a", 60, 40), file("b", 35)]
    plans = [
        make_plan(base, 50),
        make_plan(base, 29),
        make_plan(base, 50, limit=90),
        make_plan([base[0], file("b", 35, version="2")], 50),
        make_plan([base[0], file("c", 35)], 50),
    ]
    assert max(Counter(plan.hash() for plan in plans).values()) == 1


def test_row_ids_name_the_place_and_not_the_text() -> None:
    ids = [id for key in ("a", "b", "a1") for id in row_ids(key, 0, 1000)]
    assert len(set(ids)) == len(ids)
    assert row_id("a", 7) == ids[7]
    assert row_id("a", 7) == "439d97d531ea008e5b269fe3"      # frozen: a resume months later must find the same
    assert len(row_id("", 0)) == 24


@pytest.mark.parametrize("change", [{"size": 11}, {"version": "2"}, {"num_rows": 36, "row_groups": (36,)}])
def test_a_changed_file_is_refused_by_name(change: dict) -> None:
    planned = [file("a", 10), file("b", 35)]
    plan = make_plan(planned, 50)
    now = dataclasses.replace(planned[1], **change)
    for mode in ("refuse", "append"):
        with pytest.raises(ConfigError, match=f"input file b has changed.*{next(iter(change))}"):
            plan.reconcile(make_plan([planned[0], now], 50), mode)
    with pytest.raises(ConfigError):
        check_unchanged(planned[1], now)
    check_unchanged(planned[1], planned[1])


def test_files_that_went_or_came_are_refused_unless_appended() -> None:
    plan = make_plan([file("b", 30), file("c", 20)], 25)
    with pytest.raises(ConfigError, match="input file b"):
        plan.reconcile(make_plan([file("c", 20)], 25))
    with pytest.raises(ConfigError, match=r"first: a.*append"):
        plan.reconcile(make_plan([file("a", 5), file("b", 30), file("c", 20)], 25))
    assert plan.reconcile(make_plan([file("b", 30), file("c", 20)], 25)) is plan


def test_a_limit_and_new_files_exclude_each_other() -> None:
    plan = make_plan([file("b", 30)], 25, limit=10)
    with pytest.raises(ConfigError, match=r"input\.limit"):
        plan.reconcile(make_plan([file("b", 30), file("c", 30)], 25, limit=10), "append")


def test_append_keeps_every_earlier_shard_and_its_name() -> None:
    first = make_plan([file("b", 30), file("c", 20)], 25)
    second = first.reconcile(make_plan([file("a", 30, version="2"), file("c", 20)], 25), "append")    # b has been archived
    third = second.reconcile(make_plan([file("z", 1)], 25), "append")
    assert third.shards[: len(first.shards)] == first.shards
    assert [shard.name for shard in third.shards] == [
        "part-00000-of-00003.parquet", "part-00001-of-00003.parquet", "part-00002-of-00003.parquet",
        "part-00003-of-00005.parquet", "part-00004-of-00005.parquet", "part-00005-of-00006.parquet",
    ]
    assert third.hash(3) == first.hash()
    assert third.hash(5) == second.hash()
    assert Plan.from_bytes([first.to_bytes(), second.to_bytes(first), third.to_bytes(second)]) == third


@pytest.mark.parametrize("now", [
    InputFile("d1/b", "folder/b", 30, 10, "1", (30,)),       # the same place
    InputFile("d1/b", "elsewhere/d1/b", 30, 10, "1", (30,)),  # the same content
])  # fmt: skip
def test_a_planned_file_under_another_name_is_not_appended(now: InputFile) -> None:
    plan = make_plan([file("b", 30), file("c", 20, version="2")], 25)
    for mode in ("refuse", "append"):
        with pytest.raises(ConfigError, match="input file b of the plan of this output is named d1/b now"):
            plan.reconcile(make_plan([now, file("c", 20, version="2"), file("d", 5)], 25), mode)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match="rows_per_shard"):
        make_plan([], 0)
    with pytest.raises(ConfigError, match="same name x"):
        make_plan([file("x", 1), file("x", 2)], 5)
    with pytest.raises(ValueError, match="row groups hold 3"):
        InputFile("x", "x", 4, 1, "1", (3,))


@pytest.mark.parametrize("damage", [b"", b"PAR1", None])
def test_a_damaged_plan_is_not_read(damage: bytes | None) -> None:
    data = make_plan([file("a", 10)], 5).to_bytes()
    with pytest.raises((ValueError, OSError)):
        Plan.from_bytes([data[:-20] if damage is None else damage])
