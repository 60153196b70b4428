"""decode_step.py's op in Gluon, from registers: keys and values go from memory to where mma.sync takes them.

The warps of a program share a row's keys: each takes every WARPS-th group of 16 with a softmax of its own, and none waits for
another before their sums are merged. That is a batch of products, one a warp, as in gemm_few.py: scores^T [16 keys, queries] =
K Q^T and out^T [D, queries] += V^T P^T, so that 8 columns, not 16 rows, are filled up by the queries of a KV head.

A lane loads 16 bytes at a time of the keys that are its rows of K; which numbers along D those are is the same for queries. Of
values it loads 16 bytes of each of the four keys that are its columns of V^T, and pairs two neighbouring keys' numbers of one
dimension; which dimensions are its rows shows in the sums alone. The scores' fragment transposed is the weights' as an operand.
Words of 32 bits are carried; of smaller ones each would take a register.

Of few rows the programs of a cluster share a row's keys, and add up what they have in shared memory; see cluster.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from kernels import cluster
from kernels.attention import LOWEST, MASKED, key_scaled, log2_scales
from kernels.fragments import alike, count, halves, numbers, operand_layout, sums_layout
from kernels.hopper import least_power_of_2, processors
from kernels.kv_cache import rotated, rotation, scaled, shifted
from kernels.overlap import after, launch_options, overlaps
from kernels.shapes import next_power_of_2

ENABLED = True      # decode_step.py asks; for measuring it without
GROUP = 16          # keys of a product's rows
KEYS = tl.constexpr(GROUP)

# --- fragments ------------------------------------------------------------------------------------------------------------------


@gluon.constexpr_function
def run_of(words):
    """Words of a value that a lane has together: eight lanes share it."""
    return min(4, words // 8)


@gluon.constexpr_function
def shared_layout(vector, phases, rank, programs):
    return gl.SwizzledSharedLayout(vector, 1, phases, list(reversed(range(rank))), cga_layout=alike(programs, rank))


@gluon.constexpr_function
def values_layout(warps, words, paired, programs):
    """Of values [warps, words, 16]: a lane has runs of keys 2 t, 2 t + 1, 2 t + 8, 2 t + 9; paired: two keys' words first."""
    run = run_of(words)
    pair, along = [[0, 0, 1]], [[0, 1 << i, 0] for i in range(run.bit_length() - 1)]
    apart = [[0, 0, 8]] + [[0, 1 << i, 0] for i in range((8 * run).bit_length() - 1, words.bit_length() - 1)]
    lanes = [[0, 0, 2], [0, 0, 4]] + [[0, run << i, 0] for i in range(3)]
    return gl.DistributedLinearLayout((pair + along if paired else along + pair) + apart, lanes,
                                      [[1 << i, 0, 0] for i in range(warps.bit_length() - 1)], alike(programs, 3),
                                      [warps, words, 16])


@gluon.constexpr_function
def neighbours(warps, queries, dim):
    """Numbers along D that a lane has together of a head's queries."""
    return max(1, dim // 32 * min(warps, queries) // warps)


@gluon.constexpr_function
def held(warps, queries, dim):
    """Numbers of a head's queries that lanes have, those counted twice that two have."""
    return max(queries * dim, 32 * warps * neighbours(warps, queries, dim))


@gluon.constexpr_function
def heads_layout(warps, dim, programs):
    """Of heads [heads, D], with one warp to a head, or several that have the same."""
    # A slice, since Triton 3.6 cannot join tensors of a cluster in a plain layout.
    return gl.SliceLayout(0, gl.BlockedLayout([1, 1, dim // 32], [1, 1, 32], [1, warps, 1], [2, 1, 0],
                                              cga_layout=alike(programs, 3)))


@gluon.constexpr_function
def merged_layout(warps, queries, dim, programs):
    """Of a head's queries [warps, queries, D], with all warps' sums of an element in one lane."""
    rows = min(warps, queries)
    return gl.BlockedLayout([warps, 1, neighbours(warps, queries, dim)], [1, 1, 32], [1, rows, warps // rows], [2, 1, 0],
                            cga_layout=alike(programs, 3))


@gluon.constexpr_function
def queries_layout(warps, each, programs):
    """Of queries [warps, queries, D], all of them in each warp: a lane has `each` numbers together, as of its keys."""
    return gl.BlockedLayout([1, 1, each], [1, 8, 4], [warps, 1, 1], [2, 1, 0], cga_layout=alike(programs, 3))


# The words of two keys, their numbers paired; and what a warp holds of 8 x 8 numbers transposed.
PAIRED_HALVES = tl.constexpr("""{
prmt.b32 $0, $2, $3, 0x5410;
prmt.b32 $1, $2, $3, 0x7632;
}""")
PAIRED_NUMBERS = tl.constexpr("""{
.reg .b32 t, u;
.reg .b16 a, b, c, d;
prmt.b32 t, $4, $5, 0x5140;
prmt.b32 u, $4, $5, 0x7362;
mov.b32 {a, b}, t;
mov.b32 {c, d}, u;
cvt.rn.f16x2.e4m3x2 $0, a;
cvt.rn.f16x2.e4m3x2 $1, b;
cvt.rn.f16x2.e4m3x2 $2, c;
cvt.rn.f16x2.e4m3x2 $3, d;
}""")
TRANSPOSED = tl.constexpr("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;")


@gluon.jit
def _value_operands(words, KIND: tl.constexpr, FP8: tl.constexpr):
    """Words of values [WARPS, WORDS, 16] -> operands [WARPS, WORDS, 16], one for each number of a word.

    Row 8 i + g of a tile of eight runs is word i of run g.
    """
    WARPS: tl.constexpr = words.shape[0]
    WORDS: tl.constexpr = words.shape[1]
    RUN: tl.constexpr = run_of(WORDS)
    words = gl.convert_layout(words, values_layout(WARPS, WORDS, True, gl.num_ctas()), assert_trivial=True)
    if FP8:
        parts = gl.inline_asm_elementwise(PAIRED_NUMBERS, "=&r,=&r,=&r,=&r,r,r", [words], (gl.int16,) * 4, is_pure=True, pack=2)
    else:
        parts = gl.inline_asm_elementwise(PAIRED_HALVES, "=&r,=&r,r,r", [words], (gl.int16,) * 2, is_pure=True, pack=2)
    operands = ()  # type: tuple
    for i in gl.static_range(4 if FP8 else 2):
        runs = gl.permute(gl.reshape(parts[i].to(KIND, bitcast=True), [WARPS, WORDS // (8 * RUN), 8, RUN, KEYS]), [0, 1, 3, 2, 4])
        rows = gl.reshape(runs, [WARPS, WORDS, KEYS])
        operands += (gl.convert_layout(rows, operand_layout(0, WARPS, 2, gl.num_ctas()), assert_trivial=True),)
    return operands


@gluon.jit
def _of_dimensions(acc, PARTS: tl.constexpr):
    """Sums [WARPS, WORDS, queries], one for each number of a word, rows as _value_operands has them -> [WARPS, queries, D]."""
    WARPS: tl.constexpr = acc[0].shape[0]
    WORDS: tl.constexpr = acc[0].shape[1]
    ROWS: tl.constexpr = acc[0].shape[2]
    RUN: tl.constexpr = run_of(WORDS)
    whole = gl.join(gl.join(acc[0], acc[2]), gl.join(acc[1], acc[3])) if PARTS == 4 else gl.join(acc[0], acc[1])
    whole = gl.reshape(whole, [WARPS, WORDS // (8 * RUN), RUN, 8, ROWS, PARTS])
    return gl.reshape(gl.permute(whole, [0, 4, 1, 3, 2, 5]), [WARPS, ROWS, WORDS * PARTS])


@gluon.jit
def _weight_operand(weights):
    """Weights [WARPS, 16, queries] as scores lie -> as the operand that the values are multiplied with."""
    WARPS: tl.constexpr = weights.shape[0]
    ROWS: tl.constexpr = weights.shape[2]
    squares = gl.permute(gl.reshape(weights, [WARPS, 2, 8, ROWS // 8, 8]), [0, 1, 3, 2, 4])
    # Each lane's two numbers become others, but it is the same to all squares. Not pure: all lanes take part.
    squares = gl.inline_asm_elementwise(TRANSPOSED, "=r,r", [squares], weights.dtype, is_pure=False, pack=2)
    operand = gl.reshape(gl.permute(squares, [0, 1, 4, 2, 3]), [WARPS, KEYS, ROWS])
    return gl.convert_layout(operand, operand_layout(1, WARPS, 2, gl.num_ctas()), assert_trivial=True)


@gluon.jit
def _query_operands(shared, WARPS: tl.constexpr, FP8: tl.constexpr):
    """Queries [ROWS, D] -> operands of all warps: two [WARPS, D / 2, ROWS], half of D each, or FP8 four [WARPS, D / 4, ROWS]."""
    ROWS: tl.constexpr = shared.shape[0]
    D: tl.constexpr = shared.shape[1]
    layout: tl.constexpr = queries_layout(WARPS, 16 if FP8 else 8, gl.num_ctas())
    right: tl.constexpr = operand_layout(1, WARPS, 4 if FP8 else 8, gl.num_ctas())
    queries = gl.expand_dims(shared.load(gl.SliceLayout(0, layout)), 0)
    queries, _ = gl.broadcast(queries, gl.full([WARPS, ROWS, D], 0.0, queries.dtype, layout))
    if FP8:
        pairs = gl.permute(gl.reshape(queries, [WARPS, ROWS, D // 8, 2, 2, 2]), [0, 1, 2, 5, 3, 4])
        even, odd = gl.split(gl.reshape(pairs, [WARPS, ROWS, D // 4, 2, 2]))
        a, c = gl.split(even)
        b, d = gl.split(odd)
        parts = (a, b, c, d)
    else:
        parts = gl.split(gl.permute(gl.reshape(queries, [WARPS, ROWS, 2, D // 2]), [0, 1, 3, 2]))
    operands = ()  # type: tuple
    for i in gl.static_range(4 if FP8 else 2):
        operands += (gl.convert_layout(gl.permute(parts[i], [0, 2, 1]), right, assert_trivial=True),)
    return operands


@gluon.jit
def _key_operands(words, KIND: tl.constexpr, FP8: tl.constexpr):
    """Words of keys [WARPS, 16, WORDS] -> as many operands as of queries."""
    WARPS: tl.constexpr = words.shape[0]
    if FP8:
        operands = numbers(words)
    else:
        stored: tl.constexpr = operand_layout(0, WARPS, 4, gl.num_ctas())
        left: tl.constexpr = operand_layout(0, WARPS, 8, gl.num_ctas())
        low, high = gl.split(gl.permute(gl.reshape(words, [WARPS, KEYS, 2, words.shape[2] // 2]), [0, 1, 3, 2]))
        low = halves(gl.convert_layout(low, stored, assert_trivial=True), KIND)
        high = halves(gl.convert_layout(high, stored, assert_trivial=True), KIND)
        operands = gl.convert_layout(low, left, assert_trivial=True), gl.convert_layout(high, left, assert_trivial=True)
    return operands


# --- a product has eight columns or more, a head may have fewer queries ---------------------------------------------------------


@gluon.jit
def _repeated(queries, ROWS: tl.constexpr, layout: tl.constexpr):
    """[QUERIES, D] -> [ROWS, D], over and over."""
    QUERIES: tl.constexpr = queries.shape[0]
    if QUERIES < ROWS:
        twice = gl.reshape(gl.permute(gl.join(queries, queries), [2, 0, 1]), [2 * QUERIES, queries.shape[1]])
        queries = _repeated(gl.convert_layout(twice, layout, assert_trivial=True), ROWS, layout)
    return queries


@gluon.jit
def _first_queries(x, QUERIES: tl.constexpr, layout: tl.constexpr):
    """[WARPS, ROWS, D] -> [WARPS, QUERIES, D]. The others are in the same lanes, which need not load them then."""
    WARPS: tl.constexpr = x.shape[0]
    HALF: tl.constexpr = x.shape[1] // 2
    if QUERIES <= HALF:
        first, _ = gl.split(gl.permute(gl.reshape(x, [WARPS, 2, HALF, x.shape[2]]), [0, 2, 3, 1]))
        x = _first_queries(gl.convert_layout(first, layout, assert_trivial=True), QUERIES, layout)
    return x


@gluon.jit
def _spread(x, like):
    """[WARPS, ROWS] -> [WARPS, ROWS, D]."""
    x, _ = gl.broadcast(gl.expand_dims(x, 2), like)
    return x


# --- a turn: GROUPS groups of each warp's keys ----------------------------------------------------------------------------------


@gluon.jit
def _first(turn, group: tl.constexpr, base, GROUPS: tl.constexpr, WARPS: tl.constexpr, layout: tl.constexpr):
    """The first key of each warp's group [WARPS, 1, 1]."""
    return base + ((turn * GROUPS + group) * WARPS + count(WARPS, 0, 3, layout)) * KEYS


@gluon.jit
def _within(key, lo, last, WINDOW: tl.constexpr):
    """The nearest key that is there to be read: what else is loaded, weighs nothing."""
    if WINDOW:
        key = gl.maximum(key, lo)
    return gl.minimum(key, last)


@gluon.jit
def _pages(turn, table, base, lo, last, P: tl.constexpr, WINDOW: tl.constexpr, GROUPS: tl.constexpr, WARPS: tl.constexpr):
    """Of a turn's groups, each of which lies in a page: these, and the first keys there [WARPS, 1, 1]."""
    pages = ()  # type: tuple
    for group in gl.static_range(GROUPS):
        first = _first(turn, group, base, GROUPS, WARPS, operand_layout(0, WARPS, 4, gl.num_ctas()))
        pages += (gl.load(table + _within(first, lo, last, WINDOW) // P),)
    return pages


@gluon.jit
def _at(cache, page, first, lo, last, head, K: tl.constexpr, P: tl.constexpr, WORDS: tl.constexpr, WINDOW: tl.constexpr):
    """Where in a cache key 0 would lie, if all keys lay as those of the page that `first` is in."""
    before = _within(first, lo, last, WINDOW) // P * P
    return cache + ((page.to(gl.int64) * K + head) * P - before) * WORDS


@gluon.jit
def _fetch(cache, pages, turn, base, lo, last, head, K: tl.constexpr, P: tl.constexpr, WORDS: tl.constexpr,
           WINDOW: tl.constexpr, GROUPS: tl.constexpr, WARPS: tl.constexpr, VALUES: tl.constexpr):
    """Words of a turn's keys [WARPS, 16, WORDS], or of its VALUES [WARPS, WORDS, 16]."""
    PROGRAMS: tl.constexpr = gl.num_ctas()
    layout: tl.constexpr = values_layout(WARPS, WORDS, False, PROGRAMS) if VALUES else operand_layout(0, WARPS, 4, PROGRAMS)
    words = ()  # type: tuple
    for group in gl.static_range(GROUPS):
        first = _first(turn, group, base, GROUPS, WARPS, layout)
        page = gl.convert_layout(pages[group], layout, assert_trivial=True)
        key = _within(first + count(KEYS, 2 if VALUES else 1, 3, layout), lo, last, WINDOW)
        word = count(WORDS, 1 if VALUES else 2, 3, layout)
        words += (gl.load(_at(cache, page, first, lo, last, head, K, P, WORDS, WINDOW) + (key * WORDS + word)),)
    return words


@gluon.jit
def _weigh(words, queries, peak, total, turn, base, lo, hi, scale, KIND: tl.constexpr, FP8: tl.constexpr,
           WINDOW: tl.constexpr, GROUPS: tl.constexpr):
    """Of a turn's keys: weights [WARPS, 16, ROWS], peaks [WARPS, ROWS], totals [WARPS, 16, ROWS], what shrinks earlier sums."""
    WARPS: tl.constexpr = words[0].shape[0]
    ROWS: tl.constexpr = queries[0].shape[2]
    HALF: tl.constexpr = 2 if FP8 else 1
    sums: tl.constexpr = sums_layout(WARPS, gl.num_ctas())
    zeros = gl.full([WARPS, KEYS, ROWS], 0.0, gl.float32, sums)
    scores = ()  # type: tuple
    for group in gl.static_range(GROUPS):
        # Two sums, since each product waits for the one before it.
        parts = _key_operands(words[group], KIND, FP8)
        low, high = zeros, zeros
        for i in gl.static_range(HALF):
            low, high = mma_v2(parts[i], queries[i], low), mma_v2(parts[HALF + i], queries[HALF + i], high)
        score = low + high
        key = _first(turn, group, base, GROUPS, WARPS, sums) + count(KEYS, 1, 3, sums)
        there = (key >= lo) & (key < hi) if WINDOW else key < hi
        score = gl.where(there, score, MASKED)
        scores += (score,)
    highest = scores[0]
    for group in gl.static_range(1, GROUPS):
        highest = gl.maximum(highest, scores[group])
    higher = gl.maximum(peak, gl.max(highest, 1) * scale)
    shrink = gl.exp2(peak - higher)
    total *= gl.expand_dims(shrink, 1)
    weights = ()  # type: tuple
    for group in gl.static_range(GROUPS):
        weight = gl.exp2(scores[group] * scale - gl.expand_dims(higher, 1))
        total += weight
        weights += (weight.to(KIND),)
    return weights, higher, total, shrink


@gluon.jit(do_not_specialize_on_alignment=["rows", "positions", "slots", "shared"])
def _decode_few_kernel(qkv, q_weight, k_weight, cos_sin, positions, slots, k_cache, v_cache, k_words, v_words, kv_scales, k_shift,
                       block_table, rows, shared, prefix, out, scale, eps, window, table_stride, qkv_stride,
                       H: tl.constexpr, K: tl.constexpr, P: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr,
                       ROWS: tl.constexpr, WINDOW: tl.constexpr, SHARED: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
                       PLUS_ONE: tl.constexpr, FP8: tl.constexpr, SHIFT: tl.constexpr, GROUPS: tl.constexpr,
                       AHEAD: tl.constexpr, OVERLAP: tl.constexpr, WARPS: tl.constexpr):
    # Before the wait: what the projection did not make, as decode_step.py has it.
    STORED: tl.constexpr = k_cache.dtype.element_ty
    KIND: tl.constexpr = gl.float16 if FP8 else STORED
    PARTS: tl.constexpr = 4 if FP8 else 2
    WORDS: tl.constexpr = D // PARTS
    G: tl.constexpr = H // K
    QUERIES: tl.constexpr = least_power_of_2(G)
    PROGRAMS: tl.constexpr = gl.num_ctas()
    heads: tl.constexpr = heads_layout(WARPS, D, PROGRAMS)
    head, i = gl.program_id(0), gl.program_id(1).to(gl.int64)
    if PROGRAMS > 1:
        gathered = cluster.begin(QUERIES * D)
    position = gl.load(positions + i)
    table = block_table + gl.load(rows + i).to(gl.int64) * table_stride
    slot = gl.load(slots + i)
    lo = gl.load(shared + i) if SHARED else gl.maximum(position + 1 - window, 0) if WINDOW else 0
    if SHARED:
        resuming = gl.minimum(lo, 1)        # 1 where sums of the keys before lo are to be gone on with
    hi = position
    own = True
    if PROGRAMS > 1:
        # The new token is the last one's, which has the fewest keys of the cache, if any; rank 0, since that can write it there.
        TILE: tl.constexpr = WARPS * GROUPS * KEYS
        place = PROGRAMS - 1 - cluster.rank()
        own = place == PROGRAMS - 1
        tiles = gl.cdiv(hi - lo, TILE)
        share = gl.maximum(gl.cdiv(tiles, PROGRAMS), 1)
        used = gl.cdiv(tiles, share)
        if SHARED:
            resuming = gl.where(own, resuming, 0)
        senders = gl.minimum(used, PROGRAMS - 1) + 1
        cluster.expect(gathered, senders * (12 * held(WARPS, QUERIES, D) // PROGRAMS))
        lo += place * share * TILE
        hi = gl.minimum(lo + share * TILE, hi)
    last = gl.maximum(hi - 1, gl.minimum(lo, position))
    base = lo // KEYS * KEYS if WINDOW else lo
    pages = ()  # type: tuple
    for ahead in gl.static_range(AHEAD + 2):
        pages += (_pages(ahead, table, base, lo, last, P, WINDOW, GROUPS, WARPS),)
    keys = ()  # type: tuple
    values = ()  # type: tuple
    for ahead in gl.static_range(AHEAD):
        keys += (_fetch(k_words, pages[ahead], ahead, base, lo, last, head, K, P, WORDS, WINDOW, GROUPS, WARPS, False),)
        values += (_fetch(v_words, pages[ahead], ahead, base, lo, last, head, K, P, WORDS, WINDOW, GROUPS, WARPS, True),)
    pages = pages[AHEAD:]
    d = gl.arange(0, D, gl.SliceLayout(0, heads))
    # As many queries as warps, some of them twice: a warp would have nothing else to do.
    TURNED: tl.constexpr = min(ROWS, max(QUERIES, WARPS))
    m = gl.arange(0, TURNED, gl.SliceLayout(1, heads)) % QUERIES
    one = gl.arange(0, 1, gl.SliceLayout(1, heads))
    partner, cos, sin = rotation(cos_sin, position, d, ROTARY)
    if FP8:
        k_scale, v_scale = gl.load(kv_scales + head), gl.load(kv_scales + K + head)
        scale, _ = key_scaled(scale, 0.0, k_scale, False)
    after(OVERLAP)

    x = qkv + i * qkv_stride
    kind: tl.constexpr = qkv.dtype.element_ty
    inside = (d < D)[None, :]
    real = (m < G)[:, None] & inside
    queries = rotated(x, head * G + m, real, d, partner, cos, sin, q_weight, eps, D, Q_NORM, PLUS_ONE).to(kind).to(KIND)
    shared_queries = gl.allocate_shared_memory(KIND, [ROWS, D], shared_layout(8, 8, 2, PROGRAMS), _repeated(queries, ROWS, heads))
    # Not kept in registers: the ptxas of Triton 3.6 takes a byte of an e4m3 value that outlives the loop before it is there.
    plain: tl.constexpr = shared_layout(1, 1, 2, PROGRAMS)
    own_value = gl.allocate_shared_memory(KIND, [1, D], plain)
    own_peaks = gl.allocate_shared_memory(gl.float32, [TURNED], shared_layout(1, 1, 1, PROGRAMS))
    if own:
        key = rotated(x + H * D, head + one, inside, d, partner, cos, sin, k_weight, eps, D, K_NORM, PLUS_ONE).to(kind)
        value = gl.load(x + (H + K + head) * D + d[None, :])
        if SHIFT:
            key = shifted(key, k_shift, head + one, inside, d, D)
        if FP8:
            key, value = scaled(key, k_scale), scaled(value, v_scale)
        key, value = key.to(STORED), value.to(STORED)
        at = ((slot // P).to(gl.int64) * K + head) * P * D + slot % P * D + d[None, :]
        gl.store(k_cache + at, key)
        gl.store(v_cache + at, value)
        own_value.store(value.to(KIND))
        own_peaks.store(gl.sum(queries.to(gl.float32) * key.to(gl.float32), 1) * scale)

    operands = _query_operands(shared_queries, WARPS, FP8)
    sums: tl.constexpr = sums_layout(WARPS, PROGRAMS)
    peak = gl.full([WARPS, ROWS], LOWEST, gl.float32, gl.SliceLayout(1, sums))
    total = gl.full([WARPS, KEYS, ROWS], 0.0, gl.float32, sums)
    acc = (gl.full([WARPS, WORDS, ROWS], 0.0, gl.float32, sums),) * PARTS
    for begin in range(0, gl.cdiv(gl.where(hi > lo, hi - base, 0), GROUPS * WARPS * KEYS), AHEAD):
        next_keys = ()  # type: tuple
        next_values = ()  # type: tuple
        for ahead in gl.static_range(AHEAD):
            turn = begin + ahead + AHEAD
            weights, peak, total, shrink = _weigh(keys[ahead], operands, peak, total, begin + ahead, base, lo, hi, scale, KIND,
                                                  FP8, WINDOW, GROUPS)
            next_keys += (_fetch(k_words, pages[0], turn, base, lo, last, head, K, P, WORDS, WINDOW, GROUPS, WARPS, False),)
            shrunk = ()  # type: tuple
            for part in gl.static_range(PARTS):
                shrunk += (acc[part] * gl.expand_dims(shrink, 1),)
            acc = shrunk
            for group in gl.static_range(GROUPS):
                weight = _weight_operand(weights[group])
                parts = _value_operands(values[ahead][group], KIND, FP8)
                folded = ()  # type: tuple
                for part in gl.static_range(PARTS):
                    folded += (mma_v2(parts[part], weight, acc[part]),)
                acc = folded
            next_values += (_fetch(v_words, pages[0], turn, base, lo, last, head, K, P, WORDS, WINDOW, GROUPS, WARPS, True),)
            pages = pages[1:]
            pages += (_pages(turn + 2, table, base, lo, last, P, WINDOW, GROUPS, WARPS),)
        keys = next_keys
        values = next_values

    # The warps' sums together, and the new token.
    shared_acc = gl.allocate_shared_memory(gl.float32, [WARPS, ROWS, D], shared_layout(4, 8, 3, PROGRAMS),
                                           _of_dimensions(acc, PARTS))
    shared_peaks = gl.allocate_shared_memory(gl.float32, [WARPS, ROWS], plain, peak)
    shared_totals = gl.allocate_shared_memory(gl.float32, [WARPS, ROWS], plain, gl.sum(total, 1))
    merged: tl.constexpr = merged_layout(WARPS, QUERIES, D, PROGRAMS)
    whole: tl.constexpr = gl.SliceLayout(0, merged)
    results = shared_acc.load(merged)
    ends: tl.constexpr = gl.SliceLayout(2, merged)
    peaks = _first_queries(_spread(shared_peaks.load(ends), results), QUERIES, merged)
    totals = _first_queries(_spread(shared_totals.load(ends), results), QUERIES, merged)
    own_peak = gl.where(own, gl.expand_dims(own_peaks.load(gl.SliceLayout(0, ends)), 0), LOWEST)
    own_peak = _first_queries(_spread(own_peak, gl.full([WARPS, TURNED, D], 0.0, gl.float32, merged)), QUERIES, merged)
    own_peak = gl.max(own_peak, 0)
    peak = gl.maximum(gl.max(peaks, 0), own_peak)
    d = gl.arange(0, D, gl.SliceLayout(0, whole))
    m = gl.arange(0, QUERIES, gl.SliceLayout(1, whole))
    at = i * H + head * G + m
    if SHARED:      # what attention.py has summed of the keys before lo
        before = (m < G * resuming)[:, None]
        heads_of_all = gl.num_programs(1).to(gl.int64) * H
        each = d[None, :] * 0
        prefix_peak = gl.load(prefix + (heads_of_all * D + at)[:, None] + each, mask=before, other=LOWEST)
        prefix_total = gl.load(prefix + (heads_of_all * (D + 1) + at)[:, None] + each, mask=before, other=0.0)
        prefix_sums = gl.load(prefix + at[:, None] * D + d[None, :], mask=before, other=0.0)
        peak = gl.maximum(peak, prefix_peak)
    shares = gl.exp2(peaks - gl.expand_dims(peak, 0))
    own_share = gl.where(own, gl.exp2(own_peak - peak), 0.0)
    total = gl.sum(totals * shares, 0) + own_share
    result = gl.sum(_first_queries(results, QUERIES, merged) * shares, 0)
    result += gl.where(own, own_share * own_value.load(whole).to(gl.float32), 0.0)
    if SHARED:
        prefix_share = gl.exp2(prefix_peak - peak)
        total += prefix_total * prefix_share
        result += prefix_sums * prefix_share
    if FP8:
        result *= v_scale
    if PROGRAMS > 1:
        y = cluster.added(result, peak, total, gathered, m, d, place, used, LOWEST, neighbours(WARPS, QUERIES, D), WARPS)
        number = gl.arange(0, QUERIES * D, gl.SliceLayout(0, cluster.gathered_layout(WARPS, PROGRAMS)))
        gl.store(out + (i * H + head * G) * D + number, y.to(kind), mask=number < G * D)
    else:
        gl.store(out + at[:, None] * D + d[None, :], (result / total).to(kind), mask=(m < G)[:, None])


# --- launches -------------------------------------------------------------------------------------------------------------------


class Way(NamedTuple):
    """What a program does, and how."""

    warps: int      # they share a row's keys
    groups: int     # of 16 keys that a warp takes in a turn
    ahead: int      # turns that a warp has asked for while it takes one
    programs: int = 1           # of a cluster, that share a row's keys: a power of two up to 16


def way_of(cache: Tensor, heads: int, queries: int, max_context: int) -> Way:
    """For so many KV heads of all rows together, queries of each, and keys at most.

    As measured on an H100 between the products around them (jobs/bench/decode_step.py --chain, parts.py), of many heads on an
    H200 alone. Of more than 8 queries, 4 warps of a cluster would want a little more than the 48 KB that a launch gets without
    asking, and Triton asks only if its own share, without cluster.py's, is more.
    """
    fp8 = cache.element_size() == 1
    if heads < 64:
        if queries > 8:
            return Way(8, 1, 1, 8)
        if heads > 16:
            return Way(4, 1, 1, 8 if heads <= 32 else 4)
        if max_context > 1 << 13:
            return Way(4, 1, 1, 16)
        return Way(4, 2, 1, 8) if fp8 else Way(8, 1, 1, 8)
    if heads <= 160 and not fp8:
        return Way(8, 2, 1)
    # Two groups take more registers, so that fewer programs run at once: some hundreds would take a second turn for a few. Of
    # thousands that is nothing, and FP8 gains 1 to 3 %; in 16 bits they gain nothing then, and 16 queries would spill.
    return Way(4, 2 if heads <= 320 or (fp8 and heads >= 1536) else 1, 1)


def takes(qkv: Tensor, k_cache: Tensor, num_heads: int, softcap: float) -> bool:
    """Whether this is for the kernel: on Hopper, where its ways were measured."""
    _, kv_heads, page, dim = k_cache.shape
    stored = qkv.element_size() == 2 and k_cache.dtype in (torch.float8_e4m3fn, qkv.dtype)
    return (ENABLED and stored and dim in (64, 128) and num_heads // kv_heads <= 16 and page % GROUP == 0 and not softcap
            and processors(qkv.device) > 0)


def rope_and_decode(qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, plus_one: bool, cos_sin: Tensor,
                    positions: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor, num_heads: int, block_table: Tensor,
                    rows: Tensor, scale: float, window: int, max_context: int, kv_scales: Tensor | None,
                    k_shift: Tensor | None, shared: Tensor | None, prefix: Tensor | None, out: Tensor | None) -> Tensor:
    """See decode_step.rope_and_decode; for what `takes` takes. prefix: attention.prefix_sums, where keys are shared."""
    n = qkv.shape[0]
    _, kv_heads, page, dim = k_cache.shape
    way = way_of(k_cache, n * kv_heads, num_heads // kv_heads, min(max_context, window) if window else max_context)
    out = torch.empty((n, num_heads, dim), dtype=qkv.dtype, device=qkv.device) if out is None else out
    _decode_few_kernel[kv_heads, n](
        qkv, qkv if q_weight is None else q_weight, qkv if k_weight is None else k_weight, cos_sin, positions, slots,
        k_cache, v_cache, k_cache.view(torch.int32), v_cache.view(torch.int32), out if kv_scales is None else kv_scales,
        out if k_shift is None else k_shift, block_table, rows, positions if shared is None else shared,
        out if prefix is None else prefix, out, log2_scales(scale, 0.0)[0], eps, window,
        block_table.stride(0), qkv.stride(0), H=num_heads, K=kv_heads, P=page, D=dim, ROTARY=cos_sin.shape[1],
        ROWS=max(8, next_power_of_2(num_heads // kv_heads)), WINDOW=window > 0, SHARED=prefix is not None,
        Q_NORM=q_weight is not None, K_NORM=k_weight is not None, PLUS_ONE=plus_one, FP8=k_cache.dtype == torch.float8_e4m3fn,
        SHIFT=k_shift is not None, GROUPS=way.groups, AHEAD=way.ahead, WARPS=way.warps, num_warps=way.warps,
        num_ctas=way.programs, **launch_options(overlaps(qkv.device)))
    return out
