"""The torch twin of every op: what runs on CPU, and the oracle that the Triton kernels are tested against.

Shapes (the field's letters): T tokens of a step, N rows of a step, R rows of the row table, H query heads, K key/value heads,
D head size, P slots of a page, V columns of the logits. Integers are int32 unless said otherwise.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.formats import FP8_BLOCK

NEG_INF = float("-inf")


def compiling() -> AbstractContextManager[None]:
    """Nothing here is compiled: all runs as ever."""
    return nullcontext()


# --- step: the row table and the inputs of a step -------------------------------------------------------------------------------


def apply_writes(state: Tensor, packed: Tensor, segments: Tensor) -> None:
    """Copy packed[src : src + n] to state[dst : dst + n] for every (dst, src, n) of `segments` [S, 3]; both flat int32.

    Destinations must not overlap: segments are written in any order.
    """
    for dst, src, n in segments.tolist():
        state[dst : dst + n] = packed[src : src + n]


def expand(tokens: Tensor, block_table: Tensor, rows: Tensor, starts: Tensor, cu_q: Tensor, max_q: int, page_size: int,
           ids: Tensor, positions: Tensor, slots: Tensor) -> None:
    """From the plan to the model's inputs: token ids, positions and KV slots [T] of the queries of every row.

    Row i's queries are positions starts[i] .. starts[i] + cu_q[i + 1] - cu_q[i] of table row rows[i], at most `max_q`; they stand
    at cu_q[i] of the outputs. slot = page * page_size + offset.
    """
    counts = (cu_q[1:] - cu_q[:-1]).long()
    i = torch.repeat_interleave(torch.arange(rows.numel(), device=rows.device), counts)
    t = torch.arange(i.numel(), device=rows.device)
    pos = starts[i].long() + t - cu_q[i].long()
    row = rows[i].long()
    ids[: t.numel()] = tokens[row, pos]
    positions[: t.numel()] = pos.int()
    slots[: t.numel()] = block_table[row, pos // page_size] * page_size + (pos % page_size).int()


def commit(tokens: Tensor, rows: Tensor, positions: Tensor, sampled: Tensor, out: Tensor) -> None:
    """Write sampled[i] to tokens[rows[i], positions[i] + 1] and to out[i]; positions: of the tokens sampled from.

    Of -1, which is no token, tokens gets 0: steps in flight look it up.
    """
    tokens[rows.long(), positions.long() + 1] = sampled.clamp(min=0)
    out.copy_(sampled)


# --- pointwise ------------------------------------------------------------------------------------------------------------------


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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """x [T, K] times weight [N, K] transposed, plus bias [N] -> [T, N]; into `out`, contiguous, if given (then without bias)."""
    return F.linear(x, weight, bias) if out is None else torch.mm(x, weight.t(), out=out)


def linear_onto(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor | None:
    """linear, for whoever reads the residual [T, N] next to add to it; None: it has been added, rounded as ever."""
    return linear(x, weight, bias, None)


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """linear with the weight [gate | up], [2 I, K], then gated_act -> [T, I]."""
    return gated_act(linear(x, weight, bias, None), activation)


def between(h: Tensor, residual: Tensor, o: Tensor, mlp_norm: Tensor, gate_up: Tensor, down: Tensor, norm: Tensor,
            qkv: Tensor | None, eps: float, plus_one: bool, activation: str) -> Tensor | None:
    """What stands between one attention and the next, of plain weights [N, K] and norms' weights [hidden].

    residual [T, hidden] += h o^T in place, then the gated MLP of its norm; of the norm of that the product with qkv, without one
    the norm. h: what the heads have made, [T, K of o]. None: nothing was done, as others do it faster, product by product.
    """
    x = add_rms_norm(linear(h, o, None, None), residual, mlp_norm, eps, plus_one)
    x = linear(gated_linear(x, gate_up, None, activation), down, None, None)
    x = add_rms_norm(x, residual, norm, eps, plus_one)
    return x if qkv is None else linear(x, qkv, None, None)


def rope_and_cache(qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, plus_one: bool, cos_sin: Tensor,
                   positions: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor, num_heads: int,
                   kv_scales: Tensor | None = None, k_shift: Tensor | None = None) -> Tensor:
    """Optional RMSNorm of each head of q and k, rotary embedding, keys and values into the cache; returns q [T, H, D].

    qkv: [T, (H + 2 K) D]. cos_sin: float32 [positions, rotary], cosines then sines of rotary / 2 frequencies each, halves rotated
    against each other (arXiv 2104.09864, the layout of Llama checkpoints); dimensions past `rotary` pass through.
    Caches: [pages, K, P, D]. In float8_e4m3fn they hold keys and values over kv_scales, float32 [2, K], of keys, then of values.
    k_shift, float32 [K, D], is taken off such keys first: what all keys have in common softmax does not see.
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
    if k_shift is not None:
        k = k.float() - k_shift
    if kv_scales is not None:
        k, v = ((x.float() / scale[:, None]).clamp(-E4M3_MAX, E4M3_MAX) for x, scale in zip((k, v), kv_scales, strict=True))
    k_cache[slot // page, :, slot % page] = k.to(k_cache.dtype)
    v_cache[slot // page, :, slot % page] = v.to(v_cache.dtype)
    return q


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    a, b, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], dim=-1)


def copy_pages(storage: Tensor, pages: Tensor) -> None:
    """storage [A, pages, ...]: what is on page pages[i, 0] goes to page pages[i, 1], int32 [C, 2], in all A at once.

    No page is copied to twice, and none that is copied from is copied to.
    """
    source, target = pages.long().unbind(1)
    storage[:, target] = storage[:, source]


# --- quantised weights ----------------------------------------------------------------------------------------------------------
#
# Integer weights: codes with a scale and a zero point for every `group` inputs, weight = (code - zero) * scale in the dtype of
# scales, which is that of x. scales and zeros: [N, K / group]. zeros: whole as uint8, broken in the dtype of scales; None: the
# middle code, 8 of 16 or 128 of 256.
# perm int32 [K]: column i of the codes belongs to input perm[i] (GPTQ's act-order); None: in order.

# Nibble j of a word is column NIBBLES[j] of its eight: neighbours lie 16 bits apart, which is where a pair of halves wants them.
NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)
E4M3_MAX = 448.0        # largest float8_e4m3fn


def w4_pack(codes: Tensor) -> Tensor:
    """uint8 [N, K] of values 0 to 15, K a multiple of 8 -> int32 [N, K / 8], the layout of w4_matmul."""
    packed = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int32, device=codes.device)
    for j, at in enumerate(NIBBLES):
        packed |= codes[:, at::8].int() << (4 * j)
    return packed


def w4_unpack(packed: Tensor) -> Tensor:
    """The codes that w4_pack packed, uint8 [N, K]."""
    codes = torch.empty(*packed.shape, 8, dtype=torch.uint8, device=packed.device)
    for j, at in enumerate(NIBBLES):
        codes[..., at] = packed >> (4 * j) & 15
    return codes.flatten(1)


def dequantize_int(codes: Tensor, scales: Tensor, zeros: Tensor | None, group: int, middle: int) -> Tensor:
    """Codes uint8 [N, K] as weights [N, K] in the dtype of scales, columns in the codes' order."""
    grouped = codes.view(codes.shape[0], -1, group).to(scales.dtype)
    return ((grouped - (middle if zeros is None else zeros[..., None])) * scales[..., None]).flatten(1)


def dequantize_symmetric(codes: Tensor, scales: Tensor, group: int) -> Tensor:
    """8-bit codes uint8 [N, K], 128 the middle, as weights [N, K] in the dtype of scales [N, K / group]."""
    return dequantize_int(codes, scales, None, group, 128)


def w4_matmul(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, group: int, bias: Tensor | None = None,
              perm: Tensor | None = None, unpacked: Tensor | None = None) -> Tensor:
    """x [M, K] times 4-bit weights, packed by w4_pack -> [M, N]; bias [N] in x's dtype.

    unpacked: what w4_weight makes of them, for where reading that is faster.
    """
    if unpacked is not None:
        return F.linear(x, unpacked, bias)
    zeros = torch.full_like(scales, 8, dtype=torch.uint8) if zeros is None else zeros
    return w8_matmul(x, w4_unpack(packed), scales, zeros, group, bias, perm)


def w4_matmul_onto(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, group: int, residual: Tensor,
                   bias: Tensor | None = None, perm: Tensor | None = None, unpacked: Tensor | None = None) -> Tensor | None:
    """w4_matmul as linear_onto has it."""
    return w4_matmul(x, packed, scales, zeros, group, bias, perm, unpacked)


def w4_gated_matmul(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, group: int, activation: str,
                    bias: Tensor | None = None, perm: Tensor | None = None, unpacked: Tensor | None = None) -> Tensor:
    """w4_matmul with the weight [gate | up], [2 I, K], then gated_act -> [M, I]."""
    return gated_act(w4_matmul(x, packed, scales, zeros, group, bias, perm, unpacked), activation)


def w4_weight(packed: Tensor, scales: Tensor, zeros: Tensor | None, group: int, perm: Tensor | None, width: int) -> Tensor:
    """The weight [N, K] that w4_matmul multiplies with, in the dtype of scales; K = width."""
    return in_input_order(dequantize_int(w4_unpack(packed), scales, zeros, group, 8), perm)


def w8_pack(codes: Tensor) -> Tensor:
    """uint8 [N, K] -> the layout of w8_matmul, here the codes themselves."""
    return codes.contiguous()


def w8_matmul(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, group: int, bias: Tensor | None = None,
              perm: Tensor | None = None, unpacked: Tensor | None = None) -> Tensor:
    """w4_matmul of 8-bit weights, packed by w8_pack."""
    if unpacked is not None:
        return F.linear(x, unpacked, bias)
    if perm is not None:
        x = x.index_select(1, perm)
    return F.linear(x, dequantize_int(packed, scales, zeros, group, 128), bias)


def w8_weight(packed: Tensor, scales: Tensor, zeros: Tensor | None, group: int, perm: Tensor | None, width: int) -> Tensor:
    """w4_weight of 8-bit weights."""
    return in_input_order(dequantize_int(packed, scales, zeros, group, 128), perm)


def in_input_order(weight: Tensor, perm: Tensor | None) -> Tensor:
    """A weight whose columns stand as `perm` says, in the order of its inputs."""
    return weight if perm is None else torch.empty_like(weight).index_copy_(1, perm.long(), weight)


def fp8_quantize(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows of x [M, K] as float8_e4m3fn and what multiplies them back, float32: `scale` [1], or [M, 1] of each row's largest.

    They are multiplied by its reciprocal: a division for each of them takes longer than the memory does.
    """
    if scale is None:
        scale = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / E4M3_MAX
    return (x.float() * scale.reciprocal()).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def add_rms_norm_fp8(x: Tensor, residual: Tensor, weight: Tensor, eps: float, plus_one: bool,
                     scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """fp8_quantize of add_rms_norm."""
    return fp8_quantize(add_rms_norm(x, residual, weight, eps, plus_one), scale)


def gated_act_fp8(x: Tensor, activation: str, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """fp8_quantize of gated_act."""
    return fp8_quantize(gated_act(x, activation), scale)


def fp8_product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None,
                dtype: torch.dtype) -> Tensor:
    """fp8_matmul of what fp8_quantize has made of x, in `dtype`."""
    out = (x.float() @ weight.float().t()) * x_scale * weight_scale
    return (out if bias is None else out + bias.float()).to(dtype)


def fp8_gated_product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype,
                      activation: str, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """gated_act_fp8 of fp8_product by a weight [gate | up]."""
    return gated_act_fp8(fp8_product(x, x_scale, weight, weight_scale, bias, dtype), activation, scale)


def fp8_matmul(x: Tensor, weight: Tensor, weight_scale: Tensor, input_scale: Tensor | None = None,
               bias: Tensor | None = None) -> Tensor:
    """x [M, K] times float8_e4m3fn weights [N, K], both quantised, sums in float32 -> [M, N] in x's dtype.

    weight_scale: float32 [N], of output channels. input_scale: float32 [1], of all of x; None: each row is scaled by its largest.
    """
    return fp8_product(*fp8_quantize(x, input_scale), weight, weight_scale, bias, x.dtype)


def fp8_block_matmul(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [M, K] times float8_e4m3fn weights [N, K] with a scale for every 128 x 128 block, float32 [N / 128, K / 128] -> [M, N].

    Every 128 inputs of a row of x are scaled by their largest (DeepSeek-V3, arXiv 2412.19437, section 3.3).
    """
    groups, scale = fp8_quantize(x.reshape(-1, FP8_BLOCK))
    inputs = (groups.float() * scale).view(x.shape)
    weights = weight.float() * weight_scale.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
    out = inputs @ weights.t()
    return (out if bias is None else out + bias.float()).to(x.dtype)


# --- attention ------------------------------------------------------------------------------------------------------------------

QUERY_TILE = 128    # queries of one tile of prefill_attention's work list
PREFIX_TILE = 32    # rows of one tile of decode_attention's shared prefixes


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, rows: Tensor, positions: Tensor,
                     scale: float, window: int, softcap: float, max_context: int, shared: Tensor | None = None,
                     prefix_tiles: Tensor | None = None, out: Tensor | None = None, kv_scales: Tensor | None = None) -> Tensor:
    """One query a row: q [N, H, D] at positions [N] attends to positions 0 .. positions[i] of table row rows[i] -> [N, H, D].

    window > 0: only the last `window` positions, the query's own included. softcap > 0: scores become
    softcap * tanh(score / softcap).
    max_context: an upper bound of positions + 1, known on the host.
    shared [N], prefix_tiles [M, 2]: rows tiles[j, 0] .. + tiles[j, 1] (at most PREFIX_TILE) have the same first shared[i] keys
    and values, so a kernel may read them once; 0: none. No window then. They change how the result is computed, not what it is.
    out: where to write the result; None: a new tensor.
    kv_scales [2, K]: of float8_e4m3fn caches, see rope_and_cache.
    """
    n, heads, dim = q.shape
    kv_heads, page = k_cache.shape[1], k_cache.shape[2]
    first = max(0, int(positions.min()) + 1 - window) // page if window else 0
    pages = block_table[rows.long(), first : (max_context + page - 1) // page].long()
    k, v = _read(q, k_cache, v_cache, pages, kv_scales)
    k = k.transpose(1, 2).reshape(n, kv_heads, -1, dim)
    v = v.transpose(1, 2).reshape(n, kv_heads, -1, dim)
    where = first * page + torch.arange(k.shape[2], device=q.device)
    last = positions.long().unsqueeze(1)
    visible = where <= last
    if window:
        visible &= where > last - window
    scores = (q.view(n, kv_heads, heads // kv_heads, dim) * scale).to(k.dtype) @ k.transpose(2, 3)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.float().masked_fill(~visible[:, None, None], NEG_INF)
    v.masked_fill_(~visible[:, None, :, None], 0)        # a copy; what is not seen may be no number
    out = torch.empty_like(q) if out is None else out
    return out.copy_((torch.softmax(scores, -1).to(v.dtype) @ v).reshape(n, heads, dim))


def rope_and_decode(qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, plus_one: bool, cos_sin: Tensor,
                    positions: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor, num_heads: int, block_table: Tensor,
                    rows: Tensor, scale: float, window: int, softcap: float, max_context: int,
                    kv_scales: Tensor | None = None, k_shift: Tensor | None = None, shared: Tensor | None = None,
                    prefix_tiles: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """rope_and_cache, then decode_attention of the queries: one token a row, qkv [N, (H + 2 K) D] -> [N, H, D].

    Rows may repeat only where their slots and what is written there do too (the padding of a step). No row's new token is among
    the keys that it shares.
    """
    q = rope_and_cache(qkv, q_weight, k_weight, eps, plus_one, cos_sin, positions, slots, k_cache, v_cache, num_heads, kv_scales,
                       k_shift)
    return decode_attention(q, k_cache, v_cache, block_table, rows, positions, scale, window, softcap, max_context, shared,
                            prefix_tiles, out, kv_scales)


def _read(q: Tensor, k_cache: Tensor, v_cache: Tensor, pages: Tensor, kv_scales: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values of these pages, [*pages.shape, K, P, D], as the numbers that they stand for."""
    k, v = k_cache[pages], v_cache[pages]
    if kv_scales is not None:
        k, v = ((x.float() * scale[:, None, None]).to(q.dtype) for x, scale in zip((k, v), kv_scales, strict=True))
    return k, v


def prefill_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, rows: Tensor, starts: Tensor,
                      cu_q: Tensor, tiles: Tensor, scale: float, window: int, softcap: float,
                      out: Tensor | None = None, kv_scales: Tensor | None = None) -> Tensor:
    """Several queries a row: q [T, H, D]; row i's stand at cu_q[i] .. cu_q[i + 1] and start at position starts[i] of row rows[i].

    Each attends to all positions up to its own (keys and values of the step are in the cache already) -> [T, H, D].
    tiles [M, 2]: (i, first query) of every tile of QUERY_TILE queries, the kernel's work list; not needed here.
    out: where to write the result; None: a new tensor.
    """
    out = torch.empty_like(q) if out is None else out
    heads, page = q.shape[1], k_cache.shape[2]
    groups = heads // k_cache.shape[1]
    for row, start, begin, end in zip(rows.tolist(), starts.tolist(), cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
        context = start + end - begin
        first = max(0, start + 1 - window) // page if window else 0
        pages = block_table[row, first : (context + page - 1) // page].long()
        k, v = _read(q, k_cache, v_cache, pages, kv_scales)
        k = k.transpose(0, 1).flatten(1, 2)[:, : context - first * page]
        v = v.transpose(0, 1).flatten(1, 2)[:, : context - first * page]
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
            result = F.scaled_dot_product_attention(query[None], k[None], v[None], visible, scale=scale, enable_gqa=True)[0]
        out[begin:end] = result.transpose(0, 1).to(q.dtype)
    return out


# --- sampling -------------------------------------------------------------------------------------------------------------------

# Columns of the sampling table [R, 8] int32; floats are stored by their bits.
TEMPERATURE, TOP_P, MIN_P, TOP_K, SEED_LOW, SEED_HIGH = range(6)
PARAM_COLUMNS = 8
COLDEST = 1e-5                              # temperatures below are greedy: logits divided by them would overflow
GOLDEN = 0x9E3779B1 - (1 << 32)             # odd, close to 2^32 / golden ratio: spreads neighbouring columns over all bits
LARGEST_NOISE = 24 * math.log(2)            # Gumbel noise of the largest uniform, 1 - 2^-24


def mask_logits(logits: Tensor, mask: Tensor, index: Tensor) -> None:
    """logits[index[i], v] = -inf in place where bit v of mask[i] is 0 or missing; int32 [n, ceil(V / 32)], little-endian."""
    byte = torch.arange(256, device=mask.device).unsqueeze(1)
    bits = (byte >> torch.arange(8, device=mask.device)) & 1 == 1       # bool [256, 8]
    allowed = bits[mask.contiguous().view(torch.uint8).int()].flatten(1)
    width = logits.shape[1]
    allowed = F.pad(allowed, (0, max(0, width - allowed.shape[1])))[:, :width]
    rows = index.long()
    logits[rows] = torch.where(allowed, logits[rows], NEG_INF)


# Columns of an automaton state's line [N, 4] int32: which mask, where its steps begin, which row of classes.
STATE_MASK, STATE_NEXT, STATE_CLASSES = range(3)
STATE_COLUMNS = 4


def mask_by_state(logits: Tensor, states: Tensor, rows: Tensor, table: Tensor, masks: Tensor) -> None:
    """logits[i, v] = -inf in place where the state of row rows[i] forbids token v; state 0 forbids nothing.

    states: [R], of each table row. table: [N, STATE_COLUMNS]. masks: [M, ceil(V / 32)], bits of allowed tokens, little-endian.
    """
    state = states[rows.long()].long()
    index = state.nonzero().flatten()
    if index.numel():
        mask_logits(logits, masks[table[state[index], STATE_MASK].long()], index)


def advance(states: Tensor, rows: Tensor, sampled: Tensor, table: Tensor, next: Tensor, classes: Tensor) -> None:
    """Move states[rows[i]] on by the token sampled[i], -1 as 0, in place; 0 stays, and what is not allowed leads to 0.

    next: flat [...], of each state and class the next state, or -1; classes: int16 [G, V], of each token. Rows must not repeat.
    """
    state = states[rows.long()].long()
    line = table[state]
    kind = classes[line[:, STATE_CLASSES].long(), sampled.long().clamp(min=0)]
    after = next[(line[:, STATE_NEXT] + kind).long()].clamp(min=0)
    states[rows.long()] = torch.where(state > 0, after, 0)


def apply_penalties(logits: Tensor, index: Tensor, tokens: Tensor, rows: Tensor, prompt_len: Tensor, length: Tensor,
                    repetition: Tensor, presence: Tensor, frequency: Tensor) -> None:
    """Penalise in place what a row has seen: logits[index[i]] by tokens[rows[i], :length[i]], prompt_len[i] of them the prompt.

    repetition (arXiv 1909.05858), over prompt and output: logits above 0 are divided by it, others multiplied. Then, over the
    output alone, less `presence` where the token occurs and less `frequency` for each time it does. All [n]; penalties float32.
    Not for CUDA graphs.
    """
    width = logits.shape[1]
    for part in torch.arange(index.numel(), device=logits.device).split(64):      # bounds the counts [64, V]
        n, longest = part.numel(), int(length[part].max())
        history = tokens[rows[part].long(), :longest].long()
        where = torch.arange(longest, device=logits.device)
        seen = (where < length[part, None]) & (history < width)
        history = history.masked_fill(~seen, 0)
        output = seen & (where >= prompt_len[part, None])
        counts = torch.zeros(n, width, device=logits.device).scatter_add_(1, history, output.float())
        occurs = torch.zeros(n, width, device=logits.device).scatter_add_(1, history, seen.float()) > 0
        at = index[part].long()
        x = logits[at].float()
        factor = torch.where(x > 0, 1.0 / repetition[part, None], repetition[part, None])
        x = torch.where(occurs, x * factor, x) - frequency[part, None] * counts - presence[part, None] * (counts > 0)
        logits[at] = x.to(logits.dtype)


def logprobs(logits: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities under softmax(logits [N, V]): of tokens [N] -> float32 [N], and the k likeliest, likeliest first.

    The latter: float32 [N, k] and their token ids int32 [N, k].
    """
    x = logits.float()
    total = torch.logsumexp(x, -1, keepdim=True)
    values, ids = x.topk(k, dim=-1)
    return (x.gather(1, tokens.long()[:, None]) - total).squeeze(1), values - total, ids.int()


def hash32(x: Tensor) -> Tensor:
    """A bijective mixing of int32 bits: xorshift-multiply with the hash-prospector survey's constants; int32 products wrap."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x21F0AAAD
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * (0xD35A2D97 - (1 << 32))
    return x ^ ((x >> 15) & 0x1FFFF)


def noise_key(seed_low: Tensor, seed_high: Tensor, positions: Tensor) -> Tensor:
    """What the noise of one row at one position is keyed by, int32."""
    return hash32(hash32(seed_low ^ hash32(positions)) ^ seed_high)


def uniform(key: Tensor, column: Tensor) -> Tensor:
    """Uniform noise in (0, 1), float32: 23 bits that are a function of (key, column) alone; the arguments (int32) are broadcast.

    hash32 of spread column plus key, with a second key inside: else keys a few times GOLDEN apart had the same noise, shifted.
    """
    x = column * GOLDEN + key
    x ^= (x >> 16) & 0xFFFF
    x *= 0x21F0AAAD
    x ^= (x >> 15) & 0x1FFFF
    x ^= hash32(key ^ (0x9E3779B9 - (1 << 32)))
    x *= 0xD35A2D97 - (1 << 32)
    x ^= (x >> 15) & 0x1FFFF
    return ((x >> 9) & 0x7FFFFF).float().add_(0.5).mul_(1.0 / (1 << 23))


def sample(logits: Tensor, params: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """Sample one token a row -> int32 [N]. logits [N, V], any float type; params [R, 8]; positions: of the token sampled from.

    NaN counts as -inf; a row with nothing above -inf gives -1. temperature below COLDEST: the first largest logit. Otherwise the
    filters keep: of the tokens at least min_p times as likely as the likeliest, those that reach the k-th largest logit (top_k,
    0: all), and of these the fewest likeliest that reach top_p of their mass; what ties stays or goes together. Of what is kept,
    the argmax of logit / temperature + Gumbel noise.
    """
    table = params[rows.long()]
    real = table.view(torch.float32)
    largest, out = logits.max(-1)
    if bool(largest.isnan().any()):
        logits = logits.masked_fill(logits.isnan(), NEG_INF)
        largest, out = logits.max(-1)
    out = out.int().masked_fill(largest == NEG_INF, -1)
    hot = ((real[:, TEMPERATURE] >= COLDEST) & (largest > NEG_INF)).nonzero().flatten().tolist()
    if hot:
        keys = noise_key(table[:, SEED_LOW], table[:, SEED_HIGH], positions)
        top_k = table[:, TOP_K].tolist()
        temperature, top_p, min_p = real[:, [TEMPERATURE, TOP_P, MIN_P]].T.tolist()
        out[hot] = torch.stack([_draw(logits[i].float(), keys[i], temperature[i], top_k[i], top_p[i], min_p[i]) for i in hot])
    return out


def _draw(x: Tensor, key: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """One token of the row of logits x [V]."""
    column = torch.arange(x.numel(), dtype=torch.int32, device=x.device)
    top = x.max()
    floor = top + temperature * math.log(min_p) if min_p > 0 else top.new_full((), NEG_INF)
    if 0 < top_k < x.numel():
        floor = torch.maximum(floor, x.topk(top_k).values[-1])
    if bool(floor > NEG_INF):
        kept = (x >= floor).nonzero().flatten()
        x, column = x[kept], column[kept]
    x = (x - top) / temperature     # the likeliest is 0: it can be drawn however cold it is
    # In parts too small for torch to spread over threads: waiting for each other at every little operation would cost more.
    z = x + torch.cat([_gumbel(key, part) for part in column.split(1 << 15)])
    at = z.argmax()
    if top_p < 1:
        # A token is kept if the mass of likelier ones is below top_p. If the one drawn is, it is the argmax over all that are.
        # If not, nothing less likely is either, and what remains are the likelier ones.
        weights = torch.exp(x)
        most = top_p * weights.sum()
        while bool((x[at] < 0) & (weights[x > x[at]].sum() >= most)):
            z.masked_fill_(x <= x[at], NEG_INF)
            at = z.argmax()
    return column[at]


def _gumbel(key: Tensor, column: Tensor) -> Tensor:
    return uniform(key, column).log_().neg_().log_().neg_()
