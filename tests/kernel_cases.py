"""Checks of the pointwise, cache, step and sampling kernels on any device: tests/kernels interprets, tests/gpu compiles.

What is expected is computed in float64, or is exact; what must not be written holds NaN, or the largest integer.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels import ref, sample

# Two roundings to the type, and for float32 the approximate exponential.
RELATIVE = {torch.float32: 3e-6, torch.float16: 1.1e-3, torch.bfloat16: 9e-3}
UNTOUCHED = torch.iinfo(torch.int32).max


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=RELATIVE[got.dtype], atol=2e-7)


def randn(*shape: int, like: Tensor) -> Tensor:
    """Normal numbers of the type and on the device of `like`."""
    return torch.randn(shape, device=like.device).to(like.dtype)


# --- pointwise ------------------------------------------------------------------------------------------------------------------


def norm64(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
    h = x.double()
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps) * (weight.double() + plus_one)


def check_norms(kernels: ModuleType, like: Tensor, tokens: int, width: int, plus_one: bool) -> None:
    wide = randn(tokens, 2 * width, like=like)
    weight = randn(width, like=like)
    for x in (wide[:, :width], wide[:, width:].contiguous()):
        close(kernels.rms_norm(x, weight, 1e-5, plus_one), norm64(x, weight, 1e-5, plus_one))
        residual = randn(tokens, width, like=like)
        summed = residual + x
        got = kernels.add_rms_norm(x, residual, weight, 1e-5, plus_one)
        assert torch.equal(residual, summed)
        close(got, norm64(summed, weight, 1e-5, plus_one))


def check_gated_act(kernels: ModuleType, like: Tensor, tokens: int, width: int, activation: str) -> None:
    x = randn(tokens, 2 * width, like=like) * 4
    gate, up = x.double().chunk(2, -1)
    act = F.silu(gate) if activation == "silu" else gate * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))
    torch.testing.assert_close(kernels.gated_act(x, activation).double(), act * up, rtol=RELATIVE[x.dtype], atol=3e-6)


# --- dense layers ---------------------------------------------------------------------------------------------------------------


def check_linear(run: Callable[..., Tensor], like: Tensor, m: int, features: int, depth: int, activation: str = "",
                 bias: bool = False) -> None:
    """`run` takes what kernels.gemm_skinny.product takes, but for the tile; x stands in wider rows."""
    x = randn(m, depth + 16, like=like)[:, :depth]
    weight = randn(features, depth, like=like) / depth**0.5
    shift = randn(features, like=like) if bias else None
    want = x.double() @ weight.double().T
    if shift is not None:
        want += shift.double()
    size = float(want.abs().max())
    if activation:
        gate, up = want.to(like.dtype).double().chunk(2, -1)
        act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
        want, size = act * up, size * float(up.abs().max())
    out, again = (torch.full_like(want, float("nan"), dtype=like.dtype) for _ in range(2))
    assert run(x, weight, shift, activation, out) is out
    torch.testing.assert_close(out.double(), want, rtol=RELATIVE[like.dtype], atol=RELATIVE[like.dtype] * size)
    run(x, weight, shift, activation, again)
    assert torch.equal(out, again)


# --- rotary embedding and cache -------------------------------------------------------------------------------------------------


def check_rope_and_cache(kernels: ModuleType, like: Tensor, tokens: int, heads: int, kv_heads: int, dim: int, rotary: int,
                         norm: bool, plus_one: bool = False, page: int = 16, cache_dtype: torch.dtype | None = None) -> None:
    device = like.device
    pages = -(-tokens // page) + 2
    shape = pages, kv_heads, page, dim
    k_cache, v_cache = torch.full((2, *shape), float("nan"), dtype=cache_dtype or like.dtype, device=device)
    slots = torch.randperm(pages * page, device=device)[:tokens].int()
    positions = torch.randint(0, 500, (tokens,), device=device).int()
    angles = torch.rand(500, rotary // 2, device=device) * 6.3
    cos_sin = torch.cat([angles.cos(), angles.sin()], -1)
    width = (heads + 2 * kv_heads) * dim
    qkv = randn(tokens, width + 16, like=like)[:, :width]      # rows inside wider ones
    q_weight, k_weight = (randn(2, dim, like=like)) if norm else (None, None)
    q = kernels.rope_and_cache(qkv, q_weight, k_weight, 1e-6, plus_one, cos_sin, positions, slots, k_cache, v_cache, heads)

    split = qkv.reshape(tokens, -1, dim).split([heads, kv_heads, kv_heads], 1)
    cos, sin = cos_sin[positions.long()].double()[:, None].chunk(2, -1)
    want = []
    for x, weight in zip(split, (q_weight, k_weight), strict=False):
        h = x.double() if weight is None else norm64(x, weight, 1e-6, plus_one)
        a, b, rest = h[..., : rotary // 2], h[..., rotary // 2 : rotary], h[..., rotary:]
        want.append(torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1))

    def near(got: Tensor, expected: Tensor) -> None:
        limit = max(RELATIVE[got.dtype], RELATIVE[like.dtype])
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=limit * float(expected.abs().max()))

    assert q.shape == (tokens, heads, dim)
    near(q, want[0])
    at = slots.long()
    near(k_cache[at // page, :, at % page], want[1])
    assert torch.equal(v_cache[at // page, :, at % page], split[2].to(v_cache.dtype))
    for cache in (k_cache, v_cache):
        cache[at // page, :, at % page] = float("nan")
        assert bool(cache.isnan().all())


# --- step -----------------------------------------------------------------------------------------------------------------------


def check_fp8_cache(kernels: ModuleType, like: Tensor) -> None:
    """Keys and values over their heads' scales, cut off at what e4m3 holds; queries as ever."""
    heads, kv_heads, dim, page, tokens = 6, 3, 64, 16, 20
    cos_sin = torch.cat([torch.ones(100, dim // 2), torch.zeros(100, dim // 2)], -1).to(like.device)       # turned by nothing
    qkv = randn(tokens, (heads + 2 * kv_heads) * dim, like=like)
    qkv[3, heads * dim] = 3000.0
    caches = torch.zeros(2, 2, kv_heads, page, dim, device=like.device).to(torch.float8_e4m3fn)
    slots = torch.randperm(2 * page, device=like.device)[:tokens].int()
    scales = torch.rand(2, kv_heads, device=like.device) + 0.5
    at = slots.long()
    for shift in (None, 10 * torch.randn(kv_heads, dim, device=like.device)):
        q = kernels.rope_and_cache(qkv, None, None, 1e-6, False, cos_sin, slots, slots, caches[0], caches[1], heads, scales,
                                   shift)
        queries, keys, values = qkv.view(tokens, -1, dim).split([heads, kv_heads, kv_heads], 1)
        assert torch.equal(q, queries)
        keys = keys if shift is None else keys.float() - shift
        for cache, x, scale in zip(caches, (keys, values), scales, strict=True):
            want = (x.float() / scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn).float()
            torch.testing.assert_close(cache[at // page, :, at % page].float(), want, rtol=1 / 8, atol=2**-9)
        assert float(caches[0].float().max()) == 448


def check_apply_writes(kernels: ModuleType, device: str, lengths: list[int]) -> None:
    """Segments of the given lengths with gaps between them, in shuffled order, from a shuffled and offset source."""
    order = torch.randperm(len(lengths)).tolist()
    dst, at = {}, 5
    for i, n in enumerate(lengths):
        dst[i], at = at, at + n + i % 3
    state = torch.full((at + 7,), -1, dtype=torch.int32, device=device)
    packed = torch.randint(0, 10**9, (sum(lengths) + 3,), dtype=torch.int32, device=device)
    want, segments, src = state.clone(), [], 3
    for i in order:
        want[dst[i] : dst[i] + lengths[i]] = packed[src : src + lengths[i]]
        segments.append((dst[i], src, lengths[i]))
        src += lengths[i]
    kernels.apply_writes(state, packed, torch.tensor(segments, dtype=torch.int32, device=device).view(-1, 3))
    assert torch.equal(state, want)


def check_expand(kernels: ModuleType, device: str, counts: list[int], max_q: int, page: int = 16) -> None:
    n, length = len(counts), max(counts) + 40
    tokens = torch.randint(0, 10**6, (n + 3, length), dtype=torch.int32)
    table = torch.randint(0, 10**5, (n + 3, -(-length // page)), dtype=torch.int32)
    rows = torch.randperm(n + 3)[:n].int()
    starts = torch.tensor([int(torch.randint(0, length - c + 1, ())) for c in counts], dtype=torch.int32)
    cu_q = torch.tensor([0, *counts]).cumsum(0).int()
    outputs = torch.full((3, sum(counts) + 4), UNTOUCHED, dtype=torch.int32, device=device)
    kernels.expand(*(x.to(device) for x in (tokens, table, rows, starts, cu_q)), max_q, page, *outputs.unbind())
    want = torch.full_like(outputs, UNTOUCHED, device="cpu")
    at = 0
    for row, start, count in zip(rows.tolist(), starts.tolist(), counts, strict=True):
        for p in range(start, start + count):
            want[:, at] = torch.tensor([tokens[row, p], p, table[row, p // page] * page + p % page])
            at += 1
    assert torch.equal(outputs.cpu(), want)


def check_commit(kernels: ModuleType, device: str, n: int) -> None:
    """Rows of the row table, the last few all the same one, as padding is."""
    tokens = torch.full((n + 2, 50), -1, dtype=torch.int32)
    rows = torch.randperm(n + 1).int()[:n]
    rows[max(n - 3, 1) :] = n + 1
    positions, sampled = torch.randint(0, 49, (n,)).int(), torch.randint(0, 10**5, (n,)).int()
    positions[max(n - 3, 1) :] = 0
    sampled[0] = -1
    state, out = tokens.to(device), torch.full((n,), UNTOUCHED, dtype=torch.int32, device=device)
    kernels.commit(state, rows.to(device), positions.to(device), sampled.to(device), out)
    assert torch.equal(out.cpu(), sampled)
    for row, position, token in zip(rows.tolist(), positions.tolist(), sampled.tolist(), strict=True):
        tokens[row, position + 1] = max(token, 0)
    assert torch.equal(state.cpu()[: n + 1], tokens[: n + 1])


# --- sampling -------------------------------------------------------------------------------------------------------------------

# (temperature, top_k, top_p, min_p)
SETTINGS = [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.3, 0, 1.0, 0.0), (3.0, 0, 1.0, 0.0), (1.0, 1, 1.0, 0.0),
            (1.5, 40, 1.0, 0.0), (2.0, 10**6, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (1.0, 0, 1e-6, 0.0), (5.0, 0, 0.3, 0.0),
            (1.0, 0, 1.0, 0.1), (4.0, 0, 1.0, 0.02), (0.7, 20, 0.95, 0.0), (3.0, 150, 0.5, 0.01), (1e-6, 5, 0.5, 0.0)]


def sampling_table(settings: list[tuple[float, int, float, float]], seeds: list[int]) -> Tensor:
    """The table [R, 8] of (temperature, top_k, top_p, min_p) and 64-bit seeds."""
    table = torch.zeros(len(settings), ref.PARAM_COLUMNS, dtype=torch.int32)
    real = table.view(torch.float32)
    for i, ((temperature, top_k, top_p, min_p), seed) in enumerate(zip(settings, seeds, strict=True)):
        real[i, ref.TEMPERATURE], real[i, ref.TOP_P], real[i, ref.MIN_P] = temperature, top_p, min_p
        table[i, ref.TOP_K] = top_k
        table[i, [ref.SEED_LOW, ref.SEED_HIGH]] = torch.tensor([seed & 0xFFFFFFFF, seed >> 32]).int()
    return table


def kept64(x: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """bool [V]: what the filters leave of float64 logits x [V], already divided by the temperature."""
    kept = x > ref.NEG_INF
    if min_p > 0:
        kept &= x >= x.max() + torch.log(torch.tensor(min_p).double())
    if 0 < top_k < x.numel():
        kept &= x >= x.sort(descending=True).values[top_k - 1]
    if top_p < 1:
        weights = torch.where(kept, torch.exp(x - x.max()), 0.0)
        ordered, order = x.sort(descending=True)
        sums = weights[order].cumsum(0)
        likelier = torch.searchsorted(-ordered, -ordered, right=False)      # how many stand above each, ties excluded
        before = torch.where(likelier > 0, sums[(likelier - 1).clamp(min=0)], 0.0)
        inside = torch.zeros_like(kept)
        inside[order] = before < top_p * sums[-1]
        kept &= inside | (x == x.max())
    return kept


def sample64(logits: Tensor, table: Tensor, rows: Tensor, positions: Tensor) -> list[int]:
    """What ref.sample is to draw, by sorting, in float64."""
    logits, table, rows, positions = (t.cpu() for t in (logits, table, rows, positions))
    real, out = table.view(torch.float32), []
    column = torch.arange(logits.shape[1], dtype=torch.int32)
    for i, row in enumerate(rows.tolist()):
        x = logits[i].double()
        x[x.isnan()] = ref.NEG_INF
        temperature, top_p, min_p = (real[row, c].item() for c in (ref.TEMPERATURE, ref.TOP_P, ref.MIN_P))
        if temperature >= ref.COLDEST and bool((x > ref.NEG_INF).any()):
            x /= temperature
            kept = kept64(x, int(table[row, ref.TOP_K]), top_p, min_p)
            u = ref.uniform(ref.noise_key(table[row, ref.SEED_LOW], table[row, ref.SEED_HIGH], positions[i]), column).double()
            x = (x - torch.log(-torch.log(u))).masked_fill(~kept, ref.NEG_INF)
        out.append(int(x.argmax()) if bool((x > ref.NEG_INF).any()) else -1)
    return out


def check_sample(kernels: ModuleType, like: Tensor, n: int, width: int, spread: float = 3.0) -> None:
    """Every setting in one batch, rows shuffled; the logits stand in wider rows and some are -inf, NaN or tie."""
    table = sampling_table(SETTINGS, [(i << 33) + 7 * i for i in range(len(SETTINGS))])
    rows = (torch.arange(n) * 7 % len(SETTINGS)).int()
    positions = torch.randint(0, 10**6, (n,)).int()
    logits = (torch.randn(n, width + 16) * spread).round(decimals=2)
    logits[torch.rand(n, width + 16) < 0.1] = ref.NEG_INF
    logits[:, width // 3] = float("nan")
    if n > 2:
        logits[n // 2] = ref.NEG_INF
        logits[n // 2 + 1, 5:] = ref.NEG_INF
    logits[:, width:] = 1e4
    logits = logits.to(like.dtype).to(like.device)[:, :width]
    got = kernels.sample(logits, *(x.to(like.device) for x in (table, rows, positions)))
    assert got.dtype == torch.int32
    assert got.tolist() == sample64(logits, table, rows, positions)


def check_mask(kernels: ModuleType, like: Tensor, n: int, width: int, words: int) -> None:
    """A mask of `words` words, for every other of n rows in shuffled order."""
    logits = randn(n, width, like=like)
    index = torch.randperm(n)[: (n + 1) // 2]
    allowed = torch.rand(index.numel(), words * 32) < 0.3
    shifted = allowed.view(index.numel(), words, 32).long() << torch.arange(32)
    mask = shifted.sum(-1).to(torch.int32)      # wraps: bit 31 is the sign
    want = logits.cpu().clone()
    forbidden = torch.ones(index.numel(), width, dtype=torch.bool)
    common = min(width, words * 32)
    forbidden[:, :common] = ~allowed[:, :common]
    want[index] = want[index].masked_fill(forbidden, ref.NEG_INF)
    kernels.mask_logits(logits, mask.to(like.device), index.int().to(like.device))
    assert torch.equal(logits.cpu(), want)


def check_automaton(kernels: ModuleType, like: Tensor, n: int, width: int) -> None:
    """Rows in random states of two random automata, or in none: their masks, then their steps, against plain loops."""
    words, rows_of_table = -(-width // 32), n + 5
    masks = torch.randint(-(2**31), 2**31, (7, words)).int()
    classes = torch.randint(0, 6, (3, width)).short()
    sizes = {1: 4, 2: 6}                                        # classes of each automaton
    table, steps = torch.zeros(1, ref.STATE_COLUMNS, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    for kind in (1, 2, 1):
        classes[kind] %= sizes[kind]
        line = torch.tensor([[int(torch.randint(0, 7, ())), steps.numel(), kind, 0]], dtype=torch.int32)
        table, steps = torch.cat([table, line]), torch.cat([steps, torch.randint(-1, 4, (sizes[kind],)).int()])
    states = torch.randint(0, 4, (rows_of_table,)).int()
    rows = torch.randperm(rows_of_table)[:n].int()
    sampled = torch.randint(-1, width, (n,)).int()
    logits = randn(n, width + 16, like=like)[:, :width]
    want, after = logits.cpu().clone(), states.clone()
    for i, row in enumerate(rows.tolist()):
        if not (state := int(states[row])):
            continue
        mask, first, kind, _ = table[state].tolist()
        allowed = (masks[mask][:, None] >> torch.arange(32)).flatten()[:width] & 1
        want[i] = want[i].masked_fill(allowed == 0, ref.NEG_INF)
        after[row] = max(0, int(steps[first + int(classes[kind, max(0, int(sampled[i]))])]))
    device = like.device
    states, rows, table = states.to(device), rows.to(device), table.to(device)
    kernels.mask_by_state(logits, states, rows, table, masks.to(device))
    assert torch.equal(logits.cpu(), want)
    kernels.advance(states, rows, sampled.to(device), table, steps.to(device), classes.to(device))
    assert torch.equal(states.cpu(), after)


@triton.jit
def _noise_kernel(out, keys, second_keys, V, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    key, second_key = tl.load(keys + i).to(tl.uint32), tl.load(second_keys + i).to(tl.uint32)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        tl.store(out + i * V + column, sample._uniform(column, key, second_key), mask=column < V)


def check_noise(device: str, width: int) -> None:
    """The kernels' noise is ref.uniform to the bit."""
    keys = torch.randint(-(2**31), 2**31, (5,)).int()
    keys[0] = 0
    want = ref.uniform(keys[:, None], torch.arange(width, dtype=torch.int32))
    got = torch.empty(want.shape, device=device)
    second = ref.hash32(keys ^ (0x9E3779B9 - (1 << 32)))
    _noise_kernel[5,](got, keys.to(device), second.to(device), width, BLOCK=1024)
    assert torch.equal(got.cpu(), want)


def check_batch_invariance(kernels: ModuleType, like: Tensor, n: int, width: int) -> None:
    """A row draws the same token alone, among many, and wherever it stands."""
    settings = [s for s in SETTINGS if s[0] > ref.COLDEST]
    table = sampling_table(settings, list(range(len(settings)))).to(like.device)
    logits = randn(len(settings), width, like=like) * 2
    rows = torch.arange(len(settings), dtype=torch.int32, device=like.device)
    positions = rows * 100 + 3
    alone = [kernels.sample(logits[i : i + 1], table, rows[i : i + 1], positions[i : i + 1]).item() for i in range(len(settings))]
    order = torch.randint(0, len(settings), (n,), device=like.device)
    assert kernels.sample(logits[order], table, rows[order], positions[order]).tolist() == [alone[i] for i in order.tolist()]


def chi_square_holds(counts: Tensor, probs: Tensor) -> bool:
    """Whether the counts [V] agree with the probabilities [V]: chi-square below its mean plus five standard deviations.

    Columns expected less than five times are taken together; what has no probability must not occur.
    """
    if bool((counts[probs == 0] > 0).any()):
        return False
    expected = probs.double() * counts.sum()
    rare = expected < 5
    counts = torch.cat([counts[~rare].double(), counts[rare].sum().double()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    freedom = counts.numel() - 1
    statistic = float(((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum())
    return statistic < freedom + 5 * (2 * freedom) ** 0.5


def check_copy_pages(kernels: ModuleType, dtype: torch.dtype, device: str, shape: tuple[int, ...] = (6, 40, 3, 16, 80)) -> None:
    """Pages copied in all parts at once, one of them to several places; nothing else changes."""
    storage = torch.randn(shape, device=device).to(dtype)
    pages = torch.tensor([(1, 30), (1, 31), (7, 2), (39, 3)], dtype=torch.int32, device=device)
    want = storage.clone()
    for source, target in pages.tolist():
        want[:, target] = storage[:, source]
    kernels.copy_pages(storage, pages)
    assert torch.equal(storage, want)
