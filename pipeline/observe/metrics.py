"""metrics.parquet: a sample each few seconds, over all attempts and workers of a run."""

from __future__ import annotations

import io
import logging
import resource
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from engine.request import EngineStats
from pipeline.output.store import Store

_log = logging.getLogger(__name__)

SECONDS = 5.0  # between samples
_WRITE_SECONDS = 60.0  # between writes of what was sampled
_PREFIX, MERGED = "_metrics-", "metrics.parquet"
SCHEMA = pa.schema([
    ("attempt", pa.string()), ("host", pa.string()), ("time", pa.timestamp("ms", "UTC")), ("seconds", pa.float64()),
    ("rows", pa.int64()), ("rows_per_second", pa.float64()),
    ("prompt_tokens", pa.int64()), ("cached_tokens", pa.int64()),
    ("generated_tokens", pa.int64()), ("forced_tokens", pa.int64()),
    ("prompt_tokens_per_second", pa.float64()),
    ("generated_tokens_per_second", pa.float64()),
    ("running", pa.int32()), ("waiting", pa.int32()), ("kv_use", pa.float32()),
    ("preemptions", pa.int64()), ("steps", pa.int64()), ("graph_steps", pa.int64()),
    ("gpu_use", pa.float32()), ("gpu_memory_gib", pa.float32()), ("gpu_watts", pa.float32()),
    ("memory_gib", pa.float32()),
])  # fmt: skip


class NvidiaGpu:
    """Use, memory and power of one GPU, as far as its driver tells them. `uuid`: as torch writes it."""

    def __init__(self, uuid: str) -> None:
        import pynvml

        self._nvml = pynvml
        self._missed: set[str] = set()
        pynvml.nvmlInit()
        try:
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except pynvml.NVMLError:
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")

    def sample(self) -> dict[str, float | None]:
        n, handle = self._nvml, self._handle
        return {
            "gpu_use": self._read("gpu_use", lambda: n.nvmlDeviceGetUtilizationRates(handle).gpu / 100),
            "gpu_memory_gib": self._read("gpu_memory_gib", lambda: n.nvmlDeviceGetMemoryInfo(handle).used / 2**30),
            "gpu_watts": self._read("gpu_watts", lambda: n.nvmlDeviceGetPowerUsage(handle) / 1000),
        }

    def _read(self, name: str, figure: Callable[[], float]) -> float | None:
        """None where it cannot be read, as the use of a slice of a GPU: no figure is worth a job."""
        try:
            return figure()
        except Exception as error:
            if name not in self._missed:
                self._missed.add(name)
                _log.warning("metrics.parquet has no %s while that cannot be read: %s", name, error)
            return None


def find_gpu(uuid: str | None) -> NvidiaGpu | None:
    """None where there is none, or where its driver does not tell of it."""
    try:
        return NvidiaGpu(uuid) if uuid is not None else None
    except Exception as error:
        # pynvml raises its own errors for a missing library, driver or device: all mean that there is nothing to sample.
        _log.warning("metrics.parquet has no figures of the GPU: %s", error)
        return None


class Metrics:
    """Samples of this attempt. `tick` may be called as often as one likes; it works each few seconds."""

    def __init__(self, store: Store, gpu: NvidiaGpu | None) -> None:
        self._store, self._gpu = store, gpu
        self._attempt, self._host = uuid.uuid4().hex[:12], socket.gethostname()
        self._started = self._written = time.monotonic()
        self._samples: list[dict[str, Any]] = []

    def tick(self, rows: int, stats: EngineStats, force: bool = False) -> None:
        seconds = time.monotonic() - self._started
        last = self._samples[-1] if self._samples else None
        if not force and last is not None and seconds - last["seconds"] < SECONDS:
            return
        now: dict[str, Any] = {
            "attempt": self._attempt, "host": self._host, "time": round(time.time() * 1000), "seconds": seconds, "rows": rows,
            "prompt_tokens": stats.prompt_tokens, "cached_tokens": stats.cached_tokens,
            "generated_tokens": stats.generated_tokens, "forced_tokens": stats.forced_tokens,
            "running": stats.running, "waiting": stats.waiting,
            "kv_use": stats.kv_pages_used / max(stats.kv_pages_total, 1), "preemptions": stats.preemptions,
            "steps": stats.steps, "graph_steps": stats.graph_steps,
            "memory_gib": peak_memory() / 2**30,
            **(self._gpu.sample() if self._gpu else {}),
        }  # fmt: skip
        past = last or {"seconds": 0.0, "rows": 0, "prompt_tokens": 0, "generated_tokens": 0}
        for name in ("rows", "prompt_tokens", "generated_tokens"):
            now[f"{name}_per_second"] = (now[name] - past[name]) / max(seconds - past["seconds"], 1e-9)
        self._samples.append(now)
        if force or time.monotonic() - self._written >= _WRITE_SECONDS:
            self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        self._store.replace(f"{_PREFIX}{self._attempt}.parquet", to_bytes(pa.Table.from_pylist(self._samples, SCHEMA)))


def to_bytes(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def read_metrics(store: Store) -> pa.Table:
    """The samples of all attempts, oldest first: those merged before and those since."""
    names = sorted(name for name in store.names() if name == MERGED or name.startswith(_PREFIX))
    parts = [pq.read_table(io.BytesIO(data), schema=SCHEMA) for name in names if (data := store.read(name)) is not None]
    if not parts:
        return SCHEMA.empty_table()
    return pa.Table.from_pylist(
        list({(row["attempt"], row["seconds"]): row for part in parts for row in part.to_pylist()}.values()), SCHEMA
    ).sort_by("time")


def merge_metrics(store: Store) -> pa.Table:
    """Write metrics.parquet from what the attempts left, and drop that."""
    table = read_metrics(store)
    names = [name for name in store.names() if name.startswith(_PREFIX)]
    store.replace(MERGED, to_bytes(table))
    for name in names:
        store.delete(name)
    return table


def peak_memory() -> int:
    """Most resident bytes of this process so far. Linux tells it of the program alone; getrusage also counts what started it."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):    # a sandbox may leave it out
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
