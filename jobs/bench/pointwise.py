"""Time the kernels around attention and the matrix products: microseconds, and the share of the speed of a plain copy.

    python jobs/bench/pointwise.py

Each is captured in a CUDA graph, so that launches cost what they cost in a decode step; median of the replays. Needs CUDA; under
a minute on one H200.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jobs.bench.graph_timing import replay_seconds
from kernels import ops, ref

COPY_RATE = 4.27e12     # bytes read and written a second by a device copy on an H200
REPEATS = 20
MODELS = {"Mistral-7B": (4096, 14336, 32, 8, 128), "SmolLM2-135M": (576, 1536, 9, 3, 64)}
TOKENS = (1, 64, 1024, 16384)
SAMPLERS = {"greedy": (0.0, 0, 1.0), "temperature": (1.0, 0, 1.0), "top-p 0.9": (1.0, 0, 0.9), "top-k 50": (1.0, 50, 1.0),
            "0.7, top-k 20, p 0.95": (0.7, 20, 0.95)}


def microseconds(launch: Callable[[], object]) -> float:
    def repeated() -> None:
        for _ in range(REPEATS):
            launch()

    return 1e6 * replay_seconds([repeated]) / REPEATS


def cell(launch: Callable[[], object], moved: int) -> str:
    time = microseconds(launch)
    return f"{time:7.1f} {moved / COPY_RATE / time * 1e8:4.0f}%"


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def pointwise(model: str) -> None:
    hidden, inner, heads, kv_heads, dim = MODELS[model]
    weight, head_weight = randn(hidden), randn(dim)
    cos_sin = torch.rand(4096, dim, device="cuda")
    pages = max(TOKENS) // 32
    k_cache, v_cache = randn(2, pages, kv_heads, 32, dim)
    print(f"\n{model:24s}" + "".join(f"{f'T={t}':>13s}" for t in TOKENS))
    rows: dict[str, list[str]] = {}
    for t in TOKENS:
        x, residual, gate_up = randn(t, hidden), randn(t, hidden), randn(t, 2 * inner)
        qkv = randn(t, (heads + 2 * kv_heads) * dim)
        slots, positions = torch.randperm(pages * 32, device="cuda")[:t].int(), torch.arange(t, device="cuda").int() % 4096

        def rope(norm: Tensor | None, qkv: Tensor = qkv, slots: Tensor = slots, positions: Tensor = positions) -> Tensor:
            return ops.rope_and_cache(qkv, norm, norm, 1e-5, False, cos_sin, positions, slots, k_cache, v_cache, heads)

        for name, launch, moved in (
            ("rms_norm", lambda x=x: ops.rms_norm(x, weight, 1e-5), 4 * x.numel()),
            ("add_rms_norm", lambda x=x, r=residual: ops.add_rms_norm(x, r, weight, 1e-5), 8 * x.numel()),
            ("gated_act silu", lambda g=gate_up: ops.gated_act(g, "silu"), 3 * gate_up.numel()),
            ("gated_act gelu", lambda g=gate_up: ops.gated_act(g, "gelu_tanh"), 3 * gate_up.numel()),
            ("rope_and_cache", lambda rope=rope: rope(None), 4 * qkv.numel()),
            ("rope_and_cache, qk-norm", lambda rope=rope: rope(head_weight), 4 * qkv.numel()),
        ):
            rows.setdefault(name, []).append(cell(launch, moved))
    for name, cells in rows.items():
        print(f"{name:24s}" + " ".join(cells))


def sampling(width: int) -> None:
    """Logits as a model gives them: a few tokens stand out of a broad mass."""
    counts = (1, 64, 1024, 2048)
    print(f"\n{f'sample, V={width}':24s}" + "".join(f"{f'N={n}':>13s}" for n in counts))
    logits = torch.randn(counts[-1], width, device="cuda").mul_(2.5)
    logits[:, :50] += torch.rand(counts[-1], 50, device="cuda") * 10
    logits = logits[:, torch.randperm(width, device="cuda")].bfloat16()
    mask = torch.full((counts[-1], -(-width // 32)), 0x00010001, dtype=torch.int32, device="cuda")
    index = torch.arange(counts[-1], dtype=torch.int32, device="cuda")
    for name, (temperature, top_k, top_p) in SAMPLERS.items():
        table = torch.zeros(counts[-1], ref.PARAM_COLUMNS, dtype=torch.int32, device="cuda")
        real = table.view(torch.float32)
        real[:, ref.TEMPERATURE], real[:, ref.TOP_P] = temperature, top_p
        table[:, ref.TOP_K], table[:, ref.SEED_LOW] = top_k, index
        print(f"{name:24s}" + " ".join(
            cell(lambda n=n, table=table: ops.sample(logits[:n], table, index[:n], index[:n]), 2 * n * width) for n in counts))
    print(f"{'mask_logits':24s}" + " ".join(
        cell(lambda n=n: ops.mask_logits(logits[:n], mask[:n], index[:n]), 2 * n * width) for n in counts))


def steps() -> None:
    counts = (1, 64, 1024, 2048)
    print(f"\n{'step':24s}" + "".join(f"{f'N={n}':>13s}" for n in counts))
    tokens = torch.zeros(2049, 2049, dtype=torch.int32, device="cuda")
    table = torch.zeros(2049, 64, dtype=torch.int32, device="cuda")
    rows = torch.arange(2049, dtype=torch.int32, device="cuda")
    starts, out = torch.full_like(rows, 700), torch.empty_like(rows)
    outputs = torch.empty(3, 2048, dtype=torch.int32, device="cuda").unbind()
    segments = torch.stack([rows * 2049, rows, torch.ones_like(rows)], 1).contiguous()
    for name, launch in (
        ("apply_writes, n=1", lambda n: ops.apply_writes(tokens.view(-1), rows, segments[:n])),
        ("expand", lambda n: ops.expand(tokens, table, rows[:n], starts[:n], rows[: n + 1], 1, 32, *outputs)),
        ("commit", lambda n: ops.commit(tokens, rows[:n], starts[:n], rows[:n], out[:n])),
    ):
        print(f"{name:24s}" + "".join(f"{microseconds(lambda n=n, launch=launch: launch(n)):13.1f}" for n in counts))


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("jobs/bench/pointwise.py needs CUDA")
    print(f"{torch.cuda.get_device_name()}: microseconds, share of {COPY_RATE / 1e12} TB/s")
    for model in MODELS:
        pointwise(model)
    for width in (32000, 49152, 151936):
        sampling(width)
    steps()


if __name__ == "__main__":
    main()
