"""Decode real schemas with a real model, one row each, at several budgets: every output that is written must be valid.

    python jobs/bench/schema_job.py FILE.jsonl OUT model=smollm2 [--restored] [any other KEY=VALUE of pipeline.run]

FILE as for guided_schemas.py. Each budget of max_tokens is a run of pipeline.run of its own under OUT. Every document is checked
again by another implementation of JSON Schema (jsonschema). Prints one JSON line a budget: rows by status and by how they ended,
documents that are valid, and why rows were refused.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[2]))

from pipeline.run import main as run

BUDGETS = (32, 96, 512)


def main() -> int:
    if len(sys.argv) < 3:
        print(__doc__)
        return 2
    file, out, words = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    restored = "--restored" in words
    rows = []
    for line in file.read_text().splitlines():
        row = json.loads(line)
        schema = row.get("schema_restored", row["schema"]) if restored else row["schema"]
        prompt = f"Write an example of a JSON document for {row['id']}."
        rows.append({"id": row["id"], "prompt": prompt, "schema": json.dumps(schema)})
    out.mkdir(parents=True, exist_ok=True)
    data = out / "schemas.parquet"
    pq.write_table(pa.Table.from_pylist(rows), data)
    for budget in BUDGETS:
        folder = out / f"max_tokens_{budget}"
        code = run([f"data={data}", f"output.dir={folder}", f"sampling.max_tokens={budget}", "sampling.temperature=0.8",
                    "limits.max_error_rate=1", *(word for word in words if word != "--restored")])
        if code:
            return code
        count: Counter[str] = Counter()
        refusals: Counter[str] = Counter()
        for row in pa.concat_tables(pq.read_table(part) for part in sorted(folder.glob("part-*.parquet"))).to_pylist():
            count[row["status"]] += 1
            if row["status"] != "ok":
                refusals[row["error"][:80]] += 1
                continue
            count[f"ended: {row['finish_reason']}"] += 1
            schema, value = json.loads(row["schema"]), json.loads(row["json"])
            check = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)(schema)
            count["valid"] += check.is_valid(value)
            if not check.is_valid(value):
                print(f"NOT VALID {row['id']}: {next(check.iter_errors(value)).message[:200]}", file=sys.stderr)
        print(json.dumps({"max_tokens": budget, "rows": len(rows), **dict(sorted(count.items())), "refusals": dict(refusals)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
