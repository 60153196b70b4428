"""The torch twin of every op: what runs on CPU, and the oracle that the Triton kernels are tested against.

Shapes (the field's letters): T tokens of a step, N rows of a step, R rows of the row table, H query heads, K key/value heads, D head size,
P slots of a page, V columns of the logits. Integers are int32 unless said otherwise.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NEG_INF = float("-inf")


# --- step: the row table and the inputs of a step ---------------------------------------------------------------------------------------


def apply_writes(state: Tensor, packed: Tensor, segments: Tensor) -> None:
    """Copy packed[src : src + n] to state[dst : dst + n] for every (dst, src, n) of `segments` [S, 3]; both flat int32."""
    for dst, src, n in segments.tolist():
        state[dst : dst + n] = packed[src : src + n]


def expand(tokens: Tensor, block_table: Tensor, rows: Tensor, starts: Tensor, cu_q: Tensor, max_q: int, page_size: int,
           ids: Tensor, positions: Tensor, slots: Tensor) -> None:
    """From the plan to the model's inputs: token ids, positions and KV slots [T] of the queries of every row.

    Row i's queries are positions starts[i] .. starts[i] + cu_q[i + 1] - cu_q[i] of table row rows[i], at most `max_q`; they stand at
    cu_q[i] of the outputs. slot = page * page_size + offset.
    """
    counts = (cu_q[1:] - cu_q[:-1]).long()
    i = torch.repeat_interleave(torch.arange(rows.numel()), counts)
    t = torch.arange(i.numel())
    pos = starts[i].long() + t - cu_q[i].long()
    row = rows[i].long()
    ids[: t.numel()] = tokens[row, pos]
    positions[: t.numel()] = pos.int()
    slots[: t.numel()] = block_table[row, pos // page_size] * page_size + (pos % page_size).int()


def commit(tokens: Tensor, rows: Tensor, positions: Tensor, sampled: Tensor, out: Tensor) -> None:
    """Write sampled[i] to tokens[rows[i], positions[i] + 1] and to out[i]; positions[i] is that of the token it was sampled from."""
    tokens[rows.long(), positions.long() + 1] = sampled
    out.copy_(sampled)


# --- pointwise ---------------------------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
    """RMSNorm over the last dimension in float32 (arXiv 1910.07467); plus_one: the weight is stored as w - 1 (Gemma)."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    if plus_one:
        return (h * (1.0 + weight.float())).to(x.dtype)
    return weight * h.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
    """residual += x in place, then RMSNorm of it."""
    residual += x
    return rms_norm(residual, weight, eps, plus_one)


def gated_act(x: Tensor, activation: str) -> Tensor:
    """act(gate) * up of x = [gate | up], [T, 2 I] -> [T, I]. activation: silu or gelu_tanh."""
    gate, up = x.chunk(2, dim=-1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def rope_and_cache(qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, plus_one: bool, cos_sin: Tensor,
                   positions: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor, num_heads: int) -> Tensor:
    """Optional RMSNorm of each head of q and k, rotary embedding, keys and values into the cache; returns q [T, H, D].

    qkv: [T, (H + 2 K) D]. cos_sin: float32 [positions, rotary], cosines then sines of rotary / 2 frequencies each, halves rotated
    against each other (arXiv 2104.09864, the layout of Llama checkpoints); dimensions past `rotary` pass through.
    Caches: [pages, K, P, D].
    """
    _, kv_heads, page, dim = k_cache.shape
    q, k, v = qkv.view(qkv.shape[0], -1, dim).split([num_heads, kv_heads, kv_heads], dim=1)
    if q_weight is not None:
        q = rms_norm(q, q_weight, eps, plus_one)
    if k_weight is not None:
        k = rms_norm(k, k_weight, eps, plus_one)
    cos, sin = cos_sin[positions.long()].unsqueeze(1).chunk(2, dim=-1)
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    slot = slots.long()
    k_cache[slot // page, :, slot % page] = k.to(k_cache.dtype)
    v_cache[slot // page, :, slot % page] = v.to(v_cache.dtype)
    return q


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    a, b, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], dim=-1)


# --- attention ---------------------------------------------------------------------------------------------------------------------------

QUERY_TILE = 128    # queries of one tile of prefill_attention's work list


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, rows: Tensor, positions: Tensor,
                     scale: float, window: int, softcap: float, max_context: int) -> Tensor:
    """One query a row: q [N, H, D] at positions [N] attends to positions 0 .. positions[i] of table row rows[i] -> [N, H, D].

    window > 0: only the last `window` positions, the query's own included. softcap > 0: scores become softcap * tanh(score / softcap).
    max_context: an upper bound of positions + 1, known on the host.
    """
    n, heads, dim = q.shape
    kv_heads, page = k_cache.shape[1], k_cache.shape[2]
    first = max(0, int(positions.min()) + 1 - window) // page if window else 0
    pages = block_table[rows.long(), first : (max_context + page - 1) // page].long()
    k = k_cache[pages].transpose(1, 2).reshape(n, kv_heads, -1, dim)
    v = v_cache[pages].transpose(1, 2).reshape(n, kv_heads, -1, dim)
    where = first * page + torch.arange(k.shape[2], device=q.device)
    last = positions.long().unsqueeze(1)
    visible = where <= last
    if window:
        visible &= where > last - window
    scores = (q.view(n, kv_heads, heads // kv_heads, dim) * scale).to(k.dtype) @ k.transpose(2, 3)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.float().masked_fill(~visible[:, None, None], NEG_INF)
    return (torch.softmax(scores, -1).to(v.dtype) @ v).reshape(n, heads, dim).to(q.dtype)


def prefill_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, rows: Tensor, starts: Tensor, cu_q: Tensor,
                      tiles: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    """Several queries a row: q [T, H, D]; row i's stand at cu_q[i] .. cu_q[i + 1] and are positions starts[i] .. of table row rows[i].

    Each attends to all positions up to its own (keys and values of the step are in the cache already) -> [T, H, D].
    tiles [M, 2]: (i, first query) of every tile of QUERY_TILE queries, the kernel's work list; not needed here.
    """
    out = torch.empty_like(q)
    heads, page = q.shape[1], k_cache.shape[2]
    groups = heads // k_cache.shape[1]
    for row, start, begin, end in zip(rows.tolist(), starts.tolist(), cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
        context = start + end - begin
        first = max(0, start + 1 - window) // page if window else 0
        pages = block_table[row, first : (context + page - 1) // page].long()
        k = k_cache[pages].transpose(0, 1).flatten(1, 2)[:, : context - first * page]
        v = v_cache[pages].transpose(0, 1).flatten(1, 2)[:, : context - first * page]
        where = torch.arange(first * page, context, device=q.device)
        at = torch.arange(start, context, device=q.device).unsqueeze(1)
        visible = where <= at
        if window:
            visible &= where > at - window
        query = q[begin:end].transpose(0, 1).to(k.dtype)
        if softcap:
            scores = query @ k.repeat_interleave(groups, 0).transpose(1, 2) * scale
            scores = (softcap * torch.tanh(scores / softcap)).float().masked_fill(~visible, NEG_INF)
            result = torch.softmax(scores, -1).to(v.dtype) @ v.repeat_interleave(groups, 0)
        else:
            result = F.scaled_dot_product_attention(query[None], k[None], v[None], attn_mask=visible, scale=scale, enable_gqa=True)[0]
        out[begin:end] = result.transpose(0, 1).to(q.dtype)
    return out


# --- sampling ----------------------------------------------------------------------------------------------------------------------------

# Columns of the sampling table [R, 8] int32; floats are stored by their bits.
TEMPERATURE, TOP_P, MIN_P, TOP_K, SEED_LOW, SEED_HIGH = range(6)
PARAM_COLUMNS = 8


def mask_logits(logits: Tensor, mask: Tensor, index: Tensor) -> None:
    """logits[index[i], v] = -inf in place where bit v of mask[i] (int32 [n, ceil(V / 32)], little-endian) is 0; past the mask too."""
    bits = torch.arange(32, dtype=torch.int32, device=mask.device)
    allowed = ((mask.unsqueeze(-1) >> bits) & 1).flatten(1).bool()
    width = logits.shape[1]
    allowed = F.pad(allowed, (0, max(0, width - allowed.shape[1])))[:, :width]
    logits[index.long()] = logits[index.long()].masked_fill(~allowed, NEG_INF)


def hash32(x: Tensor) -> Tensor:
    """A bijective mixing of int32 bits: xorshift-multiply with the constants of the hash-prospector survey; int32 products wrap."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x21F0AAAD
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * (0xD35A2D97 - (1 << 32))
    return x ^ ((x >> 15) & 0x1FFFF)


def uniform(seed_low: Tensor, seed_high: Tensor, positions: Tensor, width: int) -> Tensor:
    """Uniform noise in (0, 1), float32 [N, width], a function of (seed, position, column) alone."""
    key = hash32(hash32(seed_low ^ hash32(positions)) ^ seed_high).unsqueeze(1)
    column = torch.arange(width, dtype=torch.int32, device=positions.device)
    bits = hash32(hash32(column) ^ key)
    return ((bits >> 8) & 0xFFFFFF).float().add_(0.5).mul_(1.0 / (1 << 24))


def sample(logits: Tensor, params: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """Sample one token a row -> int32 [N]. logits [N, V], any float type; params [R, 8]; positions: of the token sampled from.

    temperature 0: the first largest logit. Otherwise logits / temperature, then min_p (against the likeliest token), top_k (every token
    that ties with the k-th is kept), top_p (the fewest likeliest tokens that reach p of what top_k left, ties kept), then the argmax of logit + Gumbel noise.
    """
    table = params[rows.long()]
    real = table.view(torch.float32)
    temperature = real[:, TEMPERATURE]
    out = logits.argmax(-1).int()
    hot = (temperature > 0).nonzero().flatten()
    if hot.numel():
        table, real = table[hot], real[hot]
        x = logits[hot].float() / real[:, TEMPERATURE, None]
        x = _filter(x, table[:, TOP_K], real[:, TOP_P], real[:, MIN_P])
        noise = uniform(table[:, SEED_LOW], table[:, SEED_HIGH], positions[hot], x.shape[1])
        out[hot] = (x - torch.log(-torch.log(noise))).argmax(-1).int()
    return out


def _filter(x: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    if bool((min_p > 0).any()):
        x = x.masked_fill(x < x.amax(-1, keepdim=True) + torch.log(min_p)[:, None], NEG_INF)
    if bool((top_k > 0).any()) or bool((top_p < 1).any()):
        width = x.shape[1]
        ordered = x.sort(-1, descending=True).values
        k = torch.where(top_k > 0, top_k, width).clamp(max=width).long()
        x = x.masked_fill(x < ordered.gather(1, k[:, None] - 1), NEG_INF)
        ordered = ordered.masked_fill(ordered < ordered.gather(1, k[:, None] - 1), NEG_INF)
        probs = torch.softmax(ordered, -1)
        before = probs.cumsum(-1) - probs
        kept = ((before < top_p[:, None]) & (ordered > NEG_INF)).sum(-1).clamp(min=1)
        cut = ordered.gather(1, kept[:, None] - 1)
        x = torch.where((top_p < 1)[:, None] & (x < cut), torch.full_like(x, NEG_INF), x)
    return x
