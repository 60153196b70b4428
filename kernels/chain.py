"""All products of few rows between one attention and the next in one kernel on Hopper, in Gluon: o, [gate | up], down and qkv.

Kernels of their own stand still at their ends: their last programs finish, the next ones start, and meanwhile nobody asks the
memory for weights, for 5 to 9 microseconds of each product. Here a program stays on its multiprocessor. One of its warps brings
its weights by TMA into a ring in shared memory, product after product, whatever the others wait for: no kernel writes weights.
Another brings x, as soon as it is there, to a ring of its own, and two warp groups multiply by wgmma, W x^T.

Of each product a program has one tile of the weight's rows, up to 128, and one split of K. [gate | up] is not split, and the
program has the same rows of both, so that it makes the activation of its own sums. Of the others all leave their sums: of o and
down a program a row of x adds them to the residual, split after split, and normalises; of qkv the programs of a tile share its
rows of x. Where there are fewer tiles the last programs have some past the weight, for which TMA brings zeros.

Counters in memory say what is there: all programs are on the chip at once. So launches must run one after the other, as
split_k.py's counters want it too: two that share the chip could wait for each other for ever.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.gemm_many import tma_load
from kernels.hopper import barrier, block_m, least_power_of_2, processors, reinterpret
from kernels.linear import SMALL_BYTES
from kernels.overlap import after, launch_options, overlaps
from kernels.pointwise import gate
from kernels.split_k import counters

MOST_HEIGHT, BLOCK_DEPTH, PIECE_DEPTH, COUNTERS = 128, 128, 64, 512      # by these names for the launch
TILE = gl.constexpr(MOST_HEIGHT)        # rows of a weight, in a tile at most
DEPTH = gl.constexpr(BLOCK_DEPTH)       # of K, in a block of the rings
PIECE = gl.constexpr(PIECE_DEPTH)       # of K, in what TMA brings at once
PIECES = gl.constexpr(BLOCK_DEPTH // PIECE_DEPTH)       # side by side: the memory gives more where more lies together
STAGES = gl.constexpr(5)        # blocks of weights in their ring
COMING = gl.constexpr(2)        # of these on their way at once: more would keep all else waiting in the memory's queues
X_STAGES = gl.constexpr(3)      # blocks of x in theirs
WARPS = gl.constexpr(8)         # that multiply
ALONG = gl.constexpr(gl.BlockedLayout([4, 1], [4, 8], [8, 1], [0, 1]))
O_PROJ, GATE_UP, DOWN, QKV = (gl.constexpr(i) for i in range(4))
# What is counted: programs that have left o's sums, rows normalised, likewise of down; programs that are done. Then those that
# have left their part of the activation, by the split of down that reads it; those that have left their sums of a tile of qkv.
O_LEFT, MLP_READY, DOWN_LEFT, QKV_READY, DONE, ACTIVE = (gl.constexpr(i) for i in range(6))
OF_QKV, COUNTED = gl.constexpr(128), gl.constexpr(COUNTERS)

Cut = tuple[int, int, int]      # of a product: rows of the weight in a tile, splits of K, blocks of K in a split
Plan = tuple[int, tuple[Cut, ...]]      # programs, and how each product is cut


@gluon.jit
def _fence(pointer):
    """TMA reads memory by another way than stores reach it: whoever stored and whoever reads stand behind a fence."""
    gl.inline_asm_elementwise("fence.proxy.async.global; mov.u32 $0, 0;", "=r,l", [pointer.to(gl.int64, bitcast=True)], gl.int32,
                              is_pure=False, pack=1)


@gluon.jit
def _await(counter, count):
    """Until so many have signed; what they stored before can be read then, by TMA too."""
    at = counter.to(gl.int64, bitcast=True)
    signed = 0
    while signed < count:
        signed = gl.inline_asm_elementwise("ld.acquire.gpu.global.s32 $0, [$1];", "=r,l", [at], gl.int32, is_pure=False, pack=1)
    _fence(counter)


@gluon.jit
def _sign(counter):
    """What this group has stored can be read by who awaits its signature; by TMA if _fence stands before."""
    barrier()
    gl.atomic_add(counter, 1, sem="release")


@gluon.jit
def _place(CUTS: gl.constexpr, W: gl.constexpr):
    """(the program's tile of a product, its split of K)."""
    SPLITS: gl.constexpr = CUTS[W][1]
    return gl.program_id(0) // SPLITS, gl.program_id(0) % SPLITS


@gluon.jit
def _block(i, CUTS: gl.constexpr, W: gl.constexpr):
    """The program's block of K that comes as its i-th: programs begin at different ones, or all would want the same of x, and of
    the memory's channels."""
    BLOCKS: gl.constexpr = CUTS[W][2]
    tile, split = _place(CUTS, W)
    return split * BLOCKS + (i + 5 * tile) % BLOCKS


@gluon.jit
def _bring_weight(weight, turn, ring, bars, CUTS: gl.constexpr, W: gl.constexpr):
    """The program's blocks of a weight, [tiles, rows of one, K]; of [gate | up] those of both, in turns."""
    ready, free = bars
    HALVES: gl.constexpr = 2 if W == GATE_UP else 1
    tile, _ = _place(CUTS, W)
    for i in range(CUTS[W][2]):
        block = _block(i, CUTS, W)
        for half in gl.static_range(HALVES):
            stage = turn % STAGES
            mbarrier.wait(free.index(stage), turn // STAGES & 1 ^ 1)
            before = turn + STAGES - COMING
            mbarrier.wait(ready.index(before % STAGES), before // STAGES & 1 ^ 1, pred=turn >= COMING)
            bar = ready.index(stage)
            mbarrier.expect(bar, TILE * DEPTH * 2)
            for piece in gl.static_range(PIECES):
                tma_load(weight, [half * gl.num_programs(0) + tile, 0, block * DEPTH + piece * PIECE], bar,
                         ring.index(stage * PIECES + piece))
            turn += 1
    return turn


@gluon.jit
def _bring_weights(weights, ring, bars, CUTS: gl.constexpr):
    """Nothing here waits for the kernel before: no kernel writes weights."""
    turn = 0
    for i in gl.static_range(len(CUTS)):
        turn = _bring_weight(weights[i], turn, ring, bars, CUTS, i)


@gluon.jit
def _bring_columns(x, counter, count, turn, ring, bars, CUTS: gl.constexpr, W: gl.constexpr):
    """x's part of the program's blocks, once so many have signed that it is there."""
    ready, free = bars
    _await(counter, count)
    for i in range(CUTS[W][2]):
        block = _block(i, CUTS, W)
        stage = turn % X_STAGES
        mbarrier.wait(free.index(stage), turn // X_STAGES & 1 ^ 1)
        bar = ready.index(stage)
        mbarrier.expect(bar, ring.shape[1] * DEPTH * 2)
        for piece in gl.static_range(PIECES):
            tma_load(x, [0, block * DEPTH + piece * PIECE], bar, ring.index(stage * PIECES + piece))
        turn += 1
    return turn


@gluon.jit
def _bring_x(h, normed, active, M, counts, ring, bars, CUTS: gl.constexpr, OVERLAP: gl.constexpr):
    """The two norms leave their rows in one place: nobody needs the first when the second is made."""
    SPLITS: gl.constexpr = CUTS[DOWN][1]
    turn = 0
    after(OVERLAP)
    turn = _bring_columns(h, counts, 0, turn, ring, bars, CUTS, O_PROJ)
    turn = _bring_columns(normed, counts + MLP_READY, M, turn, ring, bars, CUTS, GATE_UP)
    turn = _bring_columns(active, counts + ACTIVE + gl.program_id(0) % SPLITS, gl.num_programs(0) // SPLITS, turn, ring, bars,
                          CUTS, DOWN)
    if len(CUTS) > QKV:
        _bring_columns(normed, counts + QKV_READY, M, turn, ring, bars, CUTS, QKV)


@gluon.jit
def _add(acc, turn, x_turn, rings, bars):
    """Plus W x^T of one block."""
    weights, columns = rings
    ready, free = bars[0]
    stage = turn % STAGES
    mbarrier.wait(ready.index(stage), turn // STAGES & 1)
    for piece in gl.static_range(PIECES):
        x = columns.index(x_turn % X_STAGES * PIECES + piece)
        acc = warpgroup_mma(weights.index(stage * PIECES + piece), x.permute((1, 0)), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(free.index(stage), count=1)
    return acc


@gluon.jit
def _sums(turns, rings, bars, CUTS: gl.constexpr, W: gl.constexpr):
    """Of the program's blocks of a product: W x^T, float32 [TILE, rows of x]; of [gate | up] both, else zeros as well."""
    BLOCK_M: gl.constexpr = rings[1].shape[1]
    turn, x_turn = turns
    ready, free = bars[1]
    acc = gl.zeros([TILE, BLOCK_M], gl.float32, gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16]))
    up = acc
    for _ in range(CUTS[W][2]):
        stage = x_turn % X_STAGES
        mbarrier.wait(ready.index(stage), x_turn // X_STAGES & 1)
        acc = _add(acc, turn, x_turn, rings, bars)
        turn += 1
        if W == GATE_UP:
            up = _add(up, turn, x_turn, rings, bars)
            turn += 1
        mbarrier.arrive(free.index(stage), count=1)
        x_turn += 1
    return acc, up, (turn, x_turn)


@gluon.jit
def _along(acc):
    """[TILE, rows of x], so that a thread has four of a row together, to store them at once."""
    return gl.convert_layout(acc, ALONG)


@gluon.jit
def _leave(partial, counter, M, turns, rings, bars, CUTS: gl.constexpr, W: gl.constexpr):
    """The program's sums, [rows of x, rows of the tile]."""
    ROWS: gl.constexpr = CUTS[W][0]
    acc, _, turns = _sums(turns, rings, bars, CUTS, W)
    acc = _along(acc)
    BLOCK_M: gl.constexpr = acc.shape[1]
    row, m = gl.arange(0, TILE, gl.SliceLayout(1, ALONG)), gl.arange(0, BLOCK_M, gl.SliceLayout(0, ALONG))
    at = partial + (gl.program_id(0) * (ROWS * BLOCK_M) + m[None, :] * ROWS + row[:, None])
    # To stay in the L2, or weights drive them out, to memory.
    gl.store(at, acc, mask=(m < M)[None, :] & (row < ROWS)[:, None], eviction_policy="evict_last")
    _sign(counter)
    return turns


@gluon.jit
def _gather(at, mask, SIZE: gl.constexpr, SPLITS: gl.constexpr):
    """The sums of all splits, SIZE apart, in their order."""
    y = 0.0
    for split in gl.static_range(SPLITS):
        y += gl.load(at + split * SIZE, mask=mask, other=0.0, cache_modifier=".cg")
    return y


@gluon.jit
def _normalise(partial, residual, weight, normed, left, made, M, eps, BLOCK_M: gl.constexpr, WIDTH: gl.constexpr,
               PLUS_ONE: gl.constexpr, CUTS: gl.constexpr, W: gl.constexpr):
    """Rows of x, of which a program has one or none: the residual and its norm, rounded where the separate kernels round."""
    ROWS: gl.constexpr = CUTS[W][0]
    SPLITS: gl.constexpr = CUTS[W][1]
    SIZE: gl.constexpr = ROWS * BLOCK_M
    DTYPE: gl.constexpr = normed.dtype.element_ty
    n = gl.arange(0, least_power_of_2(WIDTH), gl.BlockedLayout([4], [32], [WARPS], [0]))
    inside = n < WIDTH
    for m in range(gl.program_id(0), M, gl.num_programs(0)):
        where = residual + (m * WIDTH + n)
        before = gl.load(where, mask=inside, other=0.0)
        w = gl.load(weight + n, mask=inside, other=0.0).to(gl.float32)
        _await(left, gl.num_programs(0))
        at = partial + (n // ROWS * (SPLITS * SIZE) + m * ROWS + n % ROWS)
        y = _gather(at, inside, SIZE, SPLITS)
        h = (y.to(DTYPE).to(gl.float32) + before.to(gl.float32)).to(DTYPE)
        gl.store(where, h, mask=inside)
        h = h.to(gl.float32)
        h *= gl.rsqrt(gl.sum(h * h, 0) / WIDTH + eps)
        h = h * (1.0 + w) if PLUS_ONE else h.to(DTYPE).to(gl.float32) * w
        gl.store(normed + (m * WIDTH + n), h.to(DTYPE), mask=inside, eviction_policy="evict_last")
        _fence(made)
        _sign(made)


@gluon.jit
def _activate(active, counter, M, turns, rings, bars, GELU: gl.constexpr, CUTS: gl.constexpr):
    """The gated activation of the program's rows of [gate | up], rounded where the separate kernels round."""
    DTYPE: gl.constexpr = active.dtype.element_ty
    ROWS: gl.constexpr = CUTS[GATE_UP][0]
    low, up, turns = _sums(turns, rings, bars, CUTS, GATE_UP)
    y = _along(gate(low.to(DTYPE).to(gl.float32), up.to(DTYPE).to(gl.float32), GELU, DTYPE).to(DTYPE))
    row, m = gl.arange(0, TILE, gl.SliceLayout(1, ALONG)), gl.arange(0, y.shape[1], gl.SliceLayout(0, ALONG))
    at = active + (m[None, :] * (gl.num_programs(0) * ROWS) + (gl.program_id(0) * ROWS + row)[:, None])
    gl.store(at, y, mask=(m < M)[None, :] & (row < ROWS)[:, None], eviction_policy="evict_last")
    _fence(counter)
    _sign(counter)
    return turns


@gluon.jit
def _share(out, partial, left, M, BLOCK_M: gl.constexpr, N: gl.constexpr, CUTS: gl.constexpr):
    """The program's rows of x of its tile of qkv, from the sums of all splits, in their order."""
    ROWS: gl.constexpr = CUTS[QKV][0]
    SPLITS: gl.constexpr = CUTS[QKV][1]
    SIZE: gl.constexpr = ROWS * BLOCK_M
    EACH: gl.constexpr = (BLOCK_M + SPLITS - 1) // SPLITS
    BY: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    tile, split = _place(CUTS, QKV)
    i, n = gl.arange(0, least_power_of_2(EACH), gl.SliceLayout(1, BY)), gl.arange(0, TILE, gl.SliceLayout(0, BY))
    m = split * EACH + i
    mask = ((i < EACH) & (m < M))[:, None] & ((n < ROWS) & (tile * ROWS < N))[None, :]
    at = partial + (tile * (SPLITS * SIZE) + m[:, None] * ROWS + n[None, :])
    _await(left, SPLITS)
    y = _gather(at, mask, SIZE, SPLITS)
    gl.store(out + (m[:, None] * N + (tile * ROWS + n)[None, :]), y.to(out.dtype.element_ty), mask=mask)


@gluon.jit
def _multiply(residual, norms, normed, active, out, partial, counts, M, eps, rings, bars, WIDTH: gl.constexpr, N: gl.constexpr,
              PLUS_ONE: gl.constexpr, GELU: gl.constexpr, CUTS: gl.constexpr, OVERLAP: gl.constexpr):
    BLOCK_M: gl.constexpr = rings[1].shape[1]
    OPERAND: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, PIECE], rings[0].dtype)
    rings = reinterpret(rings[0], rings[0].dtype, [STAGES * PIECES, TILE, PIECE], OPERAND), rings[1]
    after(OVERLAP)      # before anything is counted: the kernel before has set the counters back by then
    turns = 0, 0
    turns = _leave(partial, counts + O_LEFT, M, turns, rings, bars, CUTS, O_PROJ)
    _normalise(partial, residual, norms[0], normed, counts + O_LEFT, counts + MLP_READY, M, eps, BLOCK_M, WIDTH, PLUS_ONE,
               CUTS, O_PROJ)
    reader = gl.program_id(0) // (gl.num_programs(0) // CUTS[DOWN][1])
    turns = _activate(active, counts + ACTIVE + reader, M, turns, rings, bars, GELU, CUTS)
    turns = _leave(partial, counts + DOWN_LEFT, M, turns, rings, bars, CUTS, DOWN)
    _normalise(partial, residual, norms[1], normed, counts + DOWN_LEFT, counts + QKV_READY, M, eps, BLOCK_M, WIDTH, PLUS_ONE,
               CUTS, DOWN)
    if len(CUTS) > QKV:
        left = counts + OF_QKV + gl.program_id(0) // CUTS[QKV][1]
        _leave(partial, left, M, turns, rings, bars, CUTS, QKV)
        _share(out, partial, left, M, BLOCK_M, N, CUTS)
    barrier()       # all of this program have seen what they awaited
    if gl.atomic_add(counts + DONE, 1, sem="acq_rel") == gl.num_programs(0) - 1:
        i = gl.arange(0, COUNTED, gl.BlockedLayout([1], [32], [WARPS], [0]))
        gl.store(counts + i, gl.zeros_like(i))


@gluon.jit(do_not_specialize=["M"])
def _chain_kernel(h, normed_x, active_x, of_o, of_gate_up, of_down, of_qkv, residual, mlp_norm, next_norm, normed, active, out,
                  partial, counts, M, eps, WIDTH: gl.constexpr, N: gl.constexpr, BLOCK_M: gl.constexpr, CUTS: gl.constexpr,
                  PLUS_ONE: gl.constexpr, GELU: gl.constexpr, OVERLAP: gl.constexpr, BRINGING: gl.constexpr):
    """N: columns of out."""
    weights = gl.allocate_shared_memory(h.dtype, [STAGES * PIECES, 1, TILE, PIECE], of_o.layout)
    columns = gl.allocate_shared_memory(h.dtype, [X_STAGES * PIECES, BLOCK_M, PIECE], h.layout)
    w_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    w_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    x_ready = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    x_free = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(w_ready.index(stage), count=1)
        mbarrier.init(w_free.index(stage), count=1)
    for stage in gl.static_range(X_STAGES):
        mbarrier.init(x_ready.index(stage), count=1)
        mbarrier.init(x_free.index(stage), count=1)
    w_bars, x_bars = (w_ready, w_free), (x_ready, x_free)
    gl.warp_specialize([(_multiply, (residual, (mlp_norm, next_norm), normed, active, out, partial, counts, M, eps,
                                     (weights, columns), (w_bars, x_bars), WIDTH, N, PLUS_ONE, GELU, CUTS, OVERLAP)),
                        (_bring_weights, ((of_o, of_gate_up, of_down, of_qkv), weights, w_bars, CUTS)),
                        (_bring_x, (h, normed_x, active_x, M, counts, columns, x_bars, CUTS, OVERLAP))],
                       [1, 1], [BRINGING, BRINGING])


LEAST_ROWS, MOST_ROWS = 9, 64       # of x: with fewer the kernels of their own are as near to the memory's speed
LEAST_BUSY = 0.9                    # of multiprocessors, and of the programs, that have work of each product
REGISTERS, BRINGING = 168, 96       # of a thread: on average, and of those that bring


def _cut(shape: torch.Size, programs: int) -> Cut | None:
    """How a weight [features, depth] is cut among so many programs: so that each has the least; of these, the highest tiles."""
    features, depth = shape
    cuts = [(rows, splits, depth // (splits * BLOCK_DEPTH)) for rows, splits in product(range(MOST_HEIGHT, 0, -8), range(1, 17))
            if features % rows == 0 and LEAST_BUSY * programs <= features // rows * splits <= programs
            and programs % splits == 0 and depth % (splits * BLOCK_DEPTH) == 0]
    return min(cuts, key=lambda cut: cut[0] * cut[2], default=None)


@cache
def cuts_of(shapes: tuple[torch.Size, ...], chips: int) -> Plan | None:
    """(programs, how the weights o, [gate | up], down and qkv, if any, are cut), on so many multiprocessors; None: too few would
    have work."""
    o, (features, depth), *others = shapes
    inner = features // 2
    rows = next((rows for rows in range(8, MOST_HEIGHT + 1, 8) if inner % rows == 0 and inner // rows <= chips), 0)
    if not rows or inner // rows < LEAST_BUSY * chips or depth % BLOCK_DEPTH:
        return None
    programs = inner // rows
    cuts = [_cut(o, programs), (rows, 1, depth // BLOCK_DEPTH), *(_cut(shape, programs) for shape in others)]
    found = tuple(cut for cut in cuts if cut is not None)
    return (programs, found) if len(found) == len(cuts) else None


def plan_of(h: Tensor, residual: Tensor, weights: list[Tensor]) -> Plan | None:
    """cuts_of the weights; None too where it is not for them or so many rows: it is for few of 16 bits, on a Hopper."""
    chips = processors(h.device)
    if not chips or h.dtype.itemsize != 2 or not LEAST_ROWS <= h.shape[0] <= MOST_ROWS:
        return None
    fit = all(t.dtype == h.dtype and t.is_contiguous() and t.data_ptr() % 16 == 0 for t in (h, residual, *weights))
    large = all(weight.nbytes > SMALL_BYTES for weight in weights)
    return cuts_of(tuple(weight.shape for weight in weights), chips) if fit and large else None


def between(h: Tensor, residual: Tensor, o: Tensor, mlp_norm: Tensor, gate_up: Tensor, down: Tensor, norm: Tensor,
            qkv: Tensor | None, eps: float, plus_one: bool, activation: str) -> Tensor | None:
    """See ref.between."""
    weights = [o, gate_up, down] if qkv is None else [o, gate_up, down, qkv]
    plan = plan_of(h, residual, weights)
    if plan is None:
        return None
    (programs, cuts), (rows, width), block = plan, residual.shape, block_m(h.shape[0])
    partial = torch.empty((programs, MOST_HEIGHT * block), dtype=torch.float32, device=h.device)
    normed, active = torch.empty_like(residual), h.new_empty((rows, down.shape[1]))
    out = normed if qkv is None else h.new_empty((rows, qkv.shape[0]))
    described = [_described(x, [block, PIECE_DEPTH]) for x in (h, normed, active)]
    for weight, (height, _, _) in zip(weights, cuts, strict=True):
        described.append(_described(weight.view(-1, height, weight.shape[1]), [1, MOST_HEIGHT, PIECE_DEPTH]))
    if qkv is None:
        described.append(described[-1])     # not read
    _chain_kernel[programs,](
        *described, residual, mlp_norm, norm, normed, active, out, partial, counters(h.device)[-COUNTERS:], rows, eps,
        WIDTH=width, N=out.shape[1], BLOCK_M=block, CUTS=cuts, PLUS_ONE=plus_one, GELU=activation == "gelu_tanh",
        BRINGING=BRINGING, num_warps=8, maxnreg=REGISTERS, **launch_options(overlaps(h.device)))
    return out


def _described(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    kind = gl.bfloat16 if tensor.dtype == torch.bfloat16 else gl.float16
    return TensorDescriptor.from_tensor(tensor, block, gl.NVMMASharedLayout.get_default_for(block, kind))
