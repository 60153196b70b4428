"""Random paged caches, and attention in float64 over them: what tests/kernels and tests/gpu check the kernels against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor

from kernels import ref


@dataclass
class Case:
    """Rows of a table with their pages shuffled. All that belongs to no row is NaN: a kernel that lets it in is found out."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    rows: Tensor
    scale: float
    kv_scales: Tensor | None = None

    def as_fp8(self) -> Case:
        """With keys and values rounded to e4m3, over scales of their own for every head."""
        heads = self.k_cache.shape[1]
        scales = torch.tensor([2.0**i for i in range(-1, 2 * heads - 1)], device=self.q.device).view(2, heads) / heads
        k, v = ((cache.float() / scale[:, None, None]).to(torch.float8_e4m3fn)
                for cache, scale in zip((self.k_cache, self.v_cache), scales, strict=True))
        return replace(self, k_cache=k, v_cache=v, kv_scales=scales)

    def plain(self) -> Case:
        """The same numbers in float32."""
        assert self.kv_scales is not None
        k, v = (cache.float() * scale[:, None, None]
                for cache, scale in zip((self.k_cache, self.v_cache), self.kv_scales, strict=True))
        return replace(self, k_cache=k, v_cache=v, kv_scales=None)


def make_case(contexts: Sequence[int], queries: int, heads: int, kv_heads: int, dim: int, page: int, dtype: torch.dtype,
              device: str = "cpu", seed: int = 0, firsts: Sequence[int] | None = None) -> Case:
    """One table row for each context length, in shuffled order, and `queries` query tokens in all.

    firsts: the lowest position of each row that any query sees; what lies before belongs to no row any more.
    """
    g = torch.Generator().manual_seed(seed)
    need = [-(-c // page) for c in contexts]
    pages = sum(need) + 2
    order = torch.randperm(pages, generator=g).int()
    poison, order = order[0], order[1:]
    k = torch.full((pages, kv_heads, page, dim), float("nan"))
    v = k.clone()
    rows = torch.randperm(len(contexts) + 1, generator=g)[: len(contexts)].int()
    table = torch.full((len(contexts) + 1, max(need) + 3), int(poison), dtype=torch.int32)
    for row, context, count, first in zip(rows.tolist(), contexts, need, firsts or [0] * len(need), strict=True):
        mine, order = order[:count], order[count:]
        table[row, first // page : count] = mine[first // page :]
        for at in range(first // page * page, context, page):
            here = slice(max(first - at, 0), min(page, context - at))
            shape = (kv_heads, here.stop - here.start, dim)
            k[mine[at // page], :, here] = torch.randn(shape, generator=g)
            v[mine[at // page], :, here] = torch.randn(shape, generator=g)
    q = torch.randn(queries, heads, dim, generator=g)
    q, k, v = (x.to(dtype).to(device) for x in (q, k, v))
    return Case(q, k, v, table.to(device), rows.to(device), dim**-0.5)


def exact(case: Case, cu_q: Sequence[int], starts: Sequence[int], window: int, softcap: float) -> Tensor:
    """float64 [cu_q[-1], H, D] on the CPU: row i's queries are positions starts[i] .. of table row rows[i]."""
    q, k_cache, v_cache, table, rows = (x.cpu() for x in (case.q, case.k_cache, case.v_cache, case.block_table, case.rows))
    groups, page = q.shape[1] // k_cache.shape[1], k_cache.shape[2]
    out = torch.empty((cu_q[-1], *q.shape[1:]), dtype=torch.float64)
    for i, start in enumerate(starts):
        count = cu_q[i + 1] - cu_q[i]
        where = torch.arange(max(start + 1 - window, 0) if window else 0, start + count)
        pages = table[rows[i], where // page].long()
        k, v = (x[pages, :, where % page].double().transpose(0, 1).repeat_interleave(groups, 0) for x in (k_cache, v_cache))
        scores = q[cu_q[i] : cu_q[i + 1]].double().transpose(0, 1) @ k.transpose(1, 2) * case.scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        at = (start + torch.arange(count)).unsqueeze(1)
        visible = (where <= at) & ((where > at - window) if window else torch.ones((), dtype=torch.bool))
        out[cu_q[i] : cu_q[i + 1]] = (torch.softmax(scores.masked_fill(~visible, ref.NEG_INF), -1) @ v).transpose(0, 1)
    return out


def work_list(cu_q: Sequence[int]) -> Tensor:
    """The tiles [M, 2] of prefill attention: every row's queries in steps of QUERY_TILE."""
    spans = enumerate(b - a for a, b in pairwise(cu_q))
    return torch.tensor([(i, first) for i, n in spans for first in range(0, n, ref.QUERY_TILE)], dtype=torch.int32).view(-1, 2)


def error(got: Tensor, want: Tensor) -> float:
    """Relative error in the 2-norm; NaN if anything is NaN."""
    return float((got.double().cpu() - want).norm() / want.norm())


def share(case: Case, groups: Sequence[tuple[int, int, int]], page: int) -> tuple[Tensor, Tensor]:
    """(shared, prefix_tiles) of ref.decode_attention where rows first .. end have the same first pages, as the table has then."""
    shared, tiles = torch.zeros(case.rows.numel(), dtype=torch.int32), [(0, 0)]
    for first, end, count in groups:
        shared[first:end] = count * page
        case.block_table[case.rows[first:end].long(), :count] = case.block_table[case.rows[first].long(), :count]
        tiles += [(at, min(ref.PREFIX_TILE, end - at)) for at in range(first, end, ref.PREFIX_TILE)]
    return shared, torch.tensor(tiles, dtype=torch.int32)


def shared_prefix_error(kernel: Callable[..., Tensor], heads: int, kv_heads: int, dim: int, page: int, dtype: torch.dtype,
                        device: str, fp8: bool = False) -> float:
    """Relative error of a decode step of 75 rows, two groups of which share 5 and 3 pages; unequal lengths."""
    gen = torch.Generator().manual_seed(heads * dim + page)
    pages = torch.randn(2, 120, kv_heads, page, dim, generator=gen).to(dtype)
    n, table = 75, torch.randint(1, 120, (80, 12), generator=gen).int()
    rows, positions = torch.randperm(80, generator=gen)[:n].int(), torch.randint(6 * page, 12 * page, (n,), generator=gen).int()
    q = torch.randn(n, heads, dim, generator=gen).to(dtype)
    case = Case(q, pages[0], pages[1], table, rows, dim**-0.5)
    shared, tiles = share(case, ((3, 40, 5), (45, 65, 3)), page)
    if fp8:
        case = case.as_fp8()
    same = case.plain() if fp8 else case
    k, v = same.k_cache.double(), same.v_cache.double()
    want = ref.decode_attention(q.double(), k, v, table, rows, positions, case.scale, 0, 0.0, 12 * page)
    got = kernel(*(t.to(device) for t in (q, case.k_cache, case.v_cache, table, rows, positions)), case.scale, 0, 0.0, 12 * page,
                 shared.to(device), tiles.to(device), kv_scales=None if case.kv_scales is None else case.kv_scales.to(device))
    return error(got.cpu(), want)


def rope_and_decode_error(kernels: ModuleType, contexts: Sequence[int], heads: int, kv_heads: int, dim: int, page: int,
                          dtype: torch.dtype, device: str, window: int = 0, softcap: float = 0.0, rotary: int = 0,
                          norm: bool = False, fp8: bool = False, shifted: bool = False, max_context: int = 4096,
                          groups: Sequence[tuple[int, int, int]] | None = None) -> float:
    """Relative error of a step with one new token a row, whose key and value are not in the cache yet (NaN, but in FP8).

    Also checks that these are written where they belong, and nothing else is. groups: (first, end, pages) of those rows that
    share so many.
    """
    firsts = [max(c - window, 0) if window else 0 for c in contexts]
    n, seed = len(contexts), sum(contexts) + dim
    case = make_case(contexts, n, heads, kv_heads, dim, page, dtype, seed=seed, firsts=firsts)
    shared, prefix_tiles = share(case, groups, page) if groups is not None else (None, None)
    if fp8:
        case = case.as_fp8()
    g = torch.Generator().manual_seed(seed)
    rotary = rotary or dim
    angles = torch.rand(max(contexts), rotary // 2, generator=g) * 6.3
    cos_sin = torch.cat([angles.cos(), angles.sin()], -1)
    weights = torch.randn(2, dim, generator=g).to(dtype) if norm else (None, None)
    positions = torch.tensor(contexts, dtype=torch.int32) - 1
    slots = (case.block_table[case.rows.long(), positions.long() // page] * page + positions % page).int()
    qkv = torch.randn(n, (heads + 2 * kv_heads) * dim + 16, generator=g).to(dtype)[:, :-16]       # rows inside wider ones
    if case.kv_scales is not None:      # turned by nothing, and what e4m3 holds: the interpreter rounds to it wrongly
        cos_sin[:, : rotary // 2], cos_sin[:, rotary // 2 :] = 1.0, 0.0
        scale = case.kv_scales.view(-1, 1)
        codes = (qkv[:, heads * dim :].view(n, -1, dim) / scale).to(torch.float8_e4m3fn)
        qkv[:, heads * dim :] = (codes.float() * scale).to(dtype).flatten(1)
    shift = torch.randn(kv_heads, dim, generator=g) if shifted else None
    at = slots.long() // page, slice(None), slots.long() % page
    k_cache, v_cache = case.k_cache.clone(), case.v_cache.clone()
    for cache in (k_cache, v_cache):
        cache[at] = float("nan")
    inputs = (*weights, 1e-6, False, cos_sin, positions, slots)
    q = ref.rope_and_cache(qkv, *inputs, case.k_cache, case.v_cache, heads, case.kv_scales, shift)
    done = replace(case, q=q).plain() if fp8 else replace(case, q=q)
    want = exact(done, list(range(n + 1)), [c - 1 for c in contexts], window, softcap)

    def there(x: Tensor | None) -> Tensor | None:
        return x if x is None else x.to(device)

    k_cache, v_cache = k_cache.to(device), v_cache.to(device)
    longer = torch.full((n + 2, heads, dim), float("nan"), dtype=dtype, device=device)
    wide = qkv.as_strided((n, qkv.stride(0)), qkv.stride()).to(device)[:, : qkv.shape[1]]
    got = kernels.rope_and_decode(wide, *map(there, weights), 1e-6, False, there(cos_sin), there(positions), there(slots),
                                  k_cache, v_cache, heads, there(case.block_table), there(case.rows), case.scale, window,
                                  softcap, max_context, there(case.kv_scales), there(shift), there(shared),
                                  there(prefix_tiles), longer[1:-1])
    assert got.shape == q.shape and got.data_ptr() == longer[1].data_ptr() and longer[[0, -1]].isnan().all()
    for cache, expected in ((k_cache, case.k_cache), (v_cache, case.v_cache)):
        torch.testing.assert_close(cache.float().cpu(), expected.float(), rtol=1e-2, atol=1e-2, equal_nan=True)
    return error(got, want)
