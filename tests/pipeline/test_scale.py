"""Many rows and many shards: flat memory, a bounded share of the time, a quick resume."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from output_cases import FINGERPRINT, LAYOUT, SCHEMA

from pipeline.input.plan import InputFile, make_plan
from pipeline.output.part import PartInfo
from pipeline.output.rows import RowResult
from pipeline.output.run_folder import RunFolder

SHARDS = int(os.environ.get("GRISTMILL_SHARDS", "1000"))
ROWS = 8192


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_and_time_do_not_grow_with_the_rows(tmp_path: Path) -> None:
    """24 shards of 8,192 rows through journal and part; ten rows an append, as an engine's steps give them."""
    plan = make_plan([InputFile("a", "a", 24 * ROWS, 1, "1", (ROWS,) * 24)], ROWS)
    folder = RunFolder.open(str(tmp_path), FINGERPRINT, plan, LAYOUT)
    rows = pa.table({"prompt": [f"prompt {row} " + "x" * 100 for row in range(ROWS)], "gold": range(ROWS)}, SCHEMA)
    text = '{"label": "even", "length": 7}'
    memory, seconds = [], 0.0
    for shard in plan.shards:
        writer = folder.open_shard(shard)
        results = [RowResult(row, text=text, json=text, finish_reason="stop", prompt_tokens=100, completion_tokens=9)
                   for row in range(ROWS)]
        start = time.process_time()
        for first in range(0, ROWS, 10):
            writer.append(*results[first : first + 10])
        writer.commit([rows])
        seconds += time.process_time() - start
        memory.append(resident())
    folder.finalize()
    each = seconds / plan.num_rows
    print(f"{each * 1e6:.1f} us a row: {each * 20_000:.0%} of one core at 20,000 rows/s; {memory[-1] >> 20} MiB")
    assert max(memory) - memory[5] < 48 << 20
    assert each < 60e-6      # measured: 6 us on an idle core


def test_a_resume_looks_through_many_shards_quickly(tmp_path: Path) -> None:
    plan = make_plan([InputFile(f"{i:05d}", "a", 100, 1, "1", (100,)) for i in range(SHARDS)], 100)
    folder = RunFolder.open(str(tmp_path), FINGERPRINT, plan, LAYOUT)
    for shard in plan.shards[:-2]:
        with pq.ParquetWriter(tmp_path / shard.name, LAYOUT.schema) as writer:
            writer.write_table(LAYOUT.schema.empty_table())
            writer.add_key_value_metadata(PartInfo(folder.shard_id(shard), "0" * 32).to_footer())
    start = time.monotonic()
    folder = RunFolder.open(str(tmp_path), FINGERPRINT, plan, LAYOUT)
    assert [shard.index for shard in folder.pending_shards()] == [SHARDS - 2, SHARDS - 1]
    seconds = time.monotonic() - start
    print(f"{SHARDS:,} shards in {seconds:.2f} s")
    assert seconds < max(10 * SHARDS / 10_000, 3)
