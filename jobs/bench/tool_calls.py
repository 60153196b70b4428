"""Fifty function-calling rows on a real model: does every call that had to come parse and validate, and is text left alone?

    python jobs/bench/tool_calls.py model=qwen2.5-1.5b output.dir=out/tools [any other KEY=VALUE of pipeline.run]

The rows are written to a Parquet file, run by pipeline.run, and the output's `tool_calls` checked again by another implementation
of JSON Schema (jsonschema). Prints one JSON line: by tool_choice, how many rows there are, how many called a tool, how many calls
are valid, how often the tool was the one that the row is about; and for `auto` how many rows that need no tool were left as text.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[2]))

from pipeline.run import main as run


def tool(name: str, description: str, required: list[str], **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TEXT = {"type": "string", "minLength": 1, "maxLength": 60}
DATE = {"type": "string", "pattern": "^20[0-9]{2}-[01][0-9]-[0-3][0-9]$", "description": "YYYY-MM-DD"}
TOOLS = {t["function"]["name"]: t for t in [
    tool("get_weather", "Current weather of a city", ["city"], city=TEXT, unit={"enum": ["celsius", "fahrenheit"]}),
    tool("convert_currency", "Convert an amount of money", ["amount", "source", "target"],
         amount={"type": "number", "exclusiveMinimum": 0}, source={"type": "string", "pattern": "^[A-Z]{3}$"},
         target={"type": "string", "pattern": "^[A-Z]{3}$"}),
    tool("book_table", "Book a table in a restaurant", ["restaurant", "people", "date"], restaurant=TEXT,
         people={"type": "integer", "minimum": 1, "maximum": 20}, date=DATE, outside={"type": "boolean"}),
    tool("send_email", "Send an email", ["to", "subject", "body"],
         to={"type": "array", "items": TEXT, "minItems": 1, "maxItems": 3, "uniqueItems": True}, subject=TEXT,
         body={"type": "string", "maxLength": 200}),
    tool("create_event", "Put an event into the calendar", ["title", "date"], title=TEXT, date=DATE,
         place={"anyOf": [TEXT, {"type": "null"}]}, priority={"enum": ["low", "normal", "high"]}),
    tool("search_flights", "Find flights", ["origin", "destination", "date"], origin=TEXT, destination=TEXT, date=DATE,
         cabin={"enum": ["economy", "business"]}),
    tool("set_thermostat", "Set the temperature of a room", ["room", "degrees"],
         room={"enum": ["kitchen", "bedroom", "living room", "bathroom"]},
         degrees={"type": "number", "minimum": 5, "maximum": 30, "multipleOf": 0.5}),
    tool("order_status", "Look up an order", ["order_id"], order_id={"type": "string", "pattern": "^[A-Z]{2}[0-9]{6}$"}),
    tool("translate", "Translate a text", ["text", "language"], text={"type": "string", "maxLength": 120},
         language={"enum": ["de", "fr", "es", "ja"]}),
    tool("now", "The time of day", []),
]}

ASKED = [
    ("get_weather", "What is the weather like in Lisbon right now?"),
    ("get_weather", "How warm is it in Chicago, in fahrenheit?"),
    ("get_weather", "Do I need an umbrella in Bergen today?"),
    ("get_weather", "東京の天気はどうですか?"),
    ("convert_currency", "How much is 250 EUR in USD?"),
    ("convert_currency", "Convert 19.99 pounds to yen."),
    ("convert_currency", "I have 3000 Swiss francs. What is that in Swedish kronor?"),
    ("book_table", "Book a table for four at Trattoria Nova on 2026-12-24."),
    ("book_table", "Reserve an outside table for two at Café 'Zur Post' for 2026-07-01."),
    ("book_table", "We are seven people, at Blue Fin on 2027-01-15, please."),
    ("send_email", 'Write to anna@example.com with the subject "Lunch" that I will be ten minutes late.'),
    ("send_email", "Email bob@example.com and eve@example.com that the meeting is moved to Friday."),
    ("create_event", "Add a dentist appointment on 2026-11-30 to my calendar, high priority."),
    ("create_event", "Put Maria's birthday on 2027-03-09 into my calendar."),
    ("create_event", "Calendar: team meeting in room 4 on 2026-12-01."),
    ("search_flights", "Find business class flights from Oslo to Rome on 2026-12-20."),
    ("search_flights", "Flights from Boston to Denver on 2027-02-02?"),
    ("set_thermostat", "Make the bedroom 18.5 degrees."),
    ("set_thermostat", "It is cold in the living room, set it to 22."),
    ("order_status", "Where is my order AB123456?"),
    ("order_status", "Has order ZX000042 been shipped yet?"),
    ("translate", 'How do you say "good morning" in Japanese?'),
    ("translate", "Translate 'the cat sleeps on the roof' into German."),
    ("now", "What time is it?"),
    ("now", "Tell me the current time, please."),
]
NEEDLESS = ["Hello!", "Thank you, that was helpful.", "What is 2 + 2?", "Write a haiku about the sea.", "Who wrote Hamlet?",
            "Name three primary colours.", "Explain what a prime number is in one sentence.", "Tell me a short joke.",
            "Is the Earth round?", "Spell the word necessary."]  # fmt: skip


def rows() -> list[dict[str, Any]]:
    """20 rows that must call some tool, 10 that must call a named one, 10 that need one under auto, 10 that need none."""
    names, out = list(TOOLS), []
    for i, (name, prompt) in enumerate([*ASKED, *ASKED[:15]]):
        choice = "required" if i < 20 else name if i < 30 else "auto"
        offered = {name, *(names[(i + k) % len(names)] for k in (1, 3, 7))}
        out.append({"prompt": prompt, "wanted": name, "tool_choice": choice, "tools": [TOOLS[n] for n in names if n in offered]})
    for i, prompt in enumerate(NEEDLESS):
        tools = [TOOLS[names[(i + k) % len(names)]] for k in (0, 4)]
        out.append({"prompt": prompt, "wanted": None, "tool_choice": "auto", "tools": tools})
    return out


def main() -> int:
    words = sys.argv[1:]
    folder = next((Path(word.partition("=")[2]) for word in words if word.startswith("output.dir=")), None)
    if folder is None:
        print(__doc__)
        return 2
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "tool_calls.parquet"
        table = [{**row, "tools": json.dumps(row["tools"])} for row in rows()]
        pq.write_table(pa.Table.from_pylist(table), path)
        began = time.perf_counter()
        code = run(["task=generate", f"data={path}", *words])
        seconds = time.perf_counter() - began
    if code not in (0, 4):
        return code
    count: Counter[str] = Counter()
    done = pa.concat_tables(pq.read_table(part) for part in sorted(folder.glob("part-*.parquet"))).to_pylist()
    for row in done:
        kind = row["tool_choice"] if row["tool_choice"] in ("auto", "required") else "named"
        kind = "auto, no tool needed" if row["wanted"] is None else kind
        count[f"{kind}: rows"] += 1
        count[f"status {row['status']}"] += 1
        calls = json.loads(row["tool_calls"] or "[]")
        count[f"{kind}: rows with a call"] += bool(calls)
        count[f"{kind}: left as text"] += not calls and bool(row["text"])
        for call in calls:
            schema = {t["function"]["name"]: t["function"]["parameters"] for t in json.loads(row["tools"])}[call["name"]]
            good = jsonschema.Draft202012Validator(schema).is_valid(call["arguments"])
            count["calls"] += 1
            count["calls that are valid"] += good
            if not good:
                print(f"INVALID {row['text']}", file=sys.stderr)
        count[f"{kind}: the tool it is about"] += bool(calls) and calls[0]["name"] == row["wanted"]
        shown = {key: row[key] for key in ("prompt", "tool_choice", "text", "status", "finish_reason")}
        print(json.dumps(shown, ensure_ascii=False), file=sys.stderr)
    print(json.dumps({"rows": len(done), "seconds": round(seconds, 1), **dict(sorted(count.items()))}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
