"""Where a workload's time goes: the host's by phase of the step loop, and the GPU's in the first steps and in decode.

    python jobs/bench/breakdown.py --workloads workloads.py --model models/mistral-7b --dummy --w W1 W3 [--steps 6]

For each workload one run with clocks around the phases (a few microseconds a step), then another that stops after two windows of
`--steps` profiled steps: the first ones, and the first after the last prompt was computed. `wait` is the time that the host stood
still for the GPU: where it is near zero, the host is what holds the job up.
"""

from __future__ import annotations

import json
import time
from collections import Counter

import torch
from throughput import load_engine, load_workloads, options, requests_of

from engine.engine import Engine
from engine.request import Request

PHASES = {"_scheduler": ("refill", "schedule", "retire", "finished"), "_runner": ("launch_forward", "launch_sample", "wait"),
          "_guided": ("fill",)}


def main() -> None:
    ap = options(__doc__)
    ap.add_argument("--steps", type=int, default=6)
    ap.add_argument("--no-kernels", action="store_true", help="only the host's phases")
    a = ap.parse_args()
    workloads = load_workloads(a.workloads)
    engine, guided, tokenizer = load_engine(a.model, a.dummy, a.engine)
    vocab = min(32000, len(tokenizer))
    list(engine.run(requests_of(workloads.workload("warm", vocab), guided, a.temperature)))
    for name in a.w:
        phases(name, engine, requests_of(workloads.workload(name, vocab), guided, a.temperature))
        if not a.no_kernels:
            kernels(name, engine, requests_of(workloads.workload(name, vocab), guided, a.temperature), a.steps)


def phases(name: str, engine: Engine, requests: list[Request]) -> None:
    """Seconds of the host by phase, over a whole run."""
    spent: Counter[str] = Counter()
    wrapped = []
    for owner_name, methods in PHASES.items():
        owner = getattr(engine, owner_name)
        for method in methods:
            setattr(owner, method, timed(getattr(owner, method), spent, method))
            wrapped.append((owner, method))
    before, started = engine.stats(), time.perf_counter()
    done = list(engine.run(requests))
    wall = time.perf_counter() - started
    after = engine.stats()
    for owner, method in wrapped:
        delattr(owner, method)
    steps = after.steps - before.steps
    spent["other"] = wall - sum(spent.values())
    print(json.dumps({"w": name, "sec": round(wall, 3), "out_tok_s": round(sum(c.tokens.size for c in done) / wall, 1),
                      "steps": steps, "graph_steps": after.graph_steps - before.graph_steps,
                      "ms_a_step": round(1e3 * wall / steps, 3),
                      "us_a_step": {k: round(1e6 * v / steps) for k, v in spent.most_common()}}), flush=True)


def timed(call, spent: Counter[str], name: str):
    def wrapper(*args, **kwargs):
        started = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            spent[name] += time.perf_counter() - started
    return wrapper


def kernels(name: str, engine: Engine, requests: list[Request], steps: int) -> None:
    for request in requests:
        engine.submit(request)
    window(f"{name} first", engine, steps)
    last = -1
    while engine.pending and (engine.stats().waiting or engine.stats().prompt_tokens != last):
        last = engine.stats().prompt_tokens
        for _ in range(3):
            engine.step()
    window(f"{name} decode", engine, steps)
    engine.abort()
    while engine.pending:
        engine.step()


def window(title: str, engine: Engine, steps: int) -> None:
    torch.cuda.synchronize()
    started = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(steps):
            engine.step()
        torch.cuda.synchronize()
    wall = time.perf_counter() - started
    events = sorted(trace.key_averages(), key=lambda e: -e.self_device_time_total)
    busy = sum(e.self_device_time_total for e in events)
    launches = sum(e.count for e in events) / steps
    print(f"# {title}: {engine.stats().running} rows, {1e3 * wall / steps:.2f} ms a step, GPU busy {busy / 1e6 / wall:.0%}, "
          f"{launches:.0f} launches")
    for e in events[:16]:
        print(f"#   {e.self_device_time_total / 1e3 / steps:8.3f} ms {e.count / steps:6.1f} x  {e.key[:100]}", flush=True)


if __name__ == "__main__":
    main()
