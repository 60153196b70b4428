"""Softmax sums of a cluster's programs together, through each other's shared memory (PTX ISA, "st.async" and "mbarrier").

Each program adds up a part of the numbers, which all send it. It waits for their bytes alone, for which no fence is needed, and
so nothing has to reach the L2 before others can go on.

For Triton all programs of a cluster do the same (`alike`), but for what `rank` tells apart; it has rank 0 store what all have.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

HEADER = tl.constexpr(16)       # bytes: the barrier, before the numbers
RANK = tl.constexpr("mov.u32 $0, %cluster_ctarank;")
EXPECT = tl.constexpr("""{
.reg .pred first;
.reg .b32 t;
mov.u32 t, %tid.x;
setp.eq.u32 first, t, 0;
@first mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], $2;
mov.u32 $0, 0;
}""")
ALL_BEGUN = tl.constexpr("barrier.cluster.wait.aligned; mov.u32 $0, 0;")
RECEIVED = tl.constexpr("""{
.reg .pred done;
again:
mbarrier.try_wait.parity.shared::cta.b64 done, [$1], 0;
@!done bra again;
mov.u32 $0, 0;
}""")
READ = tl.constexpr("""{
.reg .pred there;
setp.ne.u32 there, $2, 0;
mov.b32 $0, 0;
@there ld.shared.f32 $0, [$1];
}""")


@gluon.constexpr_function
def _begun(size):
    """$0: where so many bytes lie, a barrier first. All are told that it is there."""
    return "\n".join((
        "{", ".reg .pred first;", ".reg .b32 t;", f".shared .align 16 .b8 gathered[{size}];", "mov.u32 $0, gathered;",
        "mov.u32 t, %tid.x;", "setp.eq.u32 first, t, 0;", "@first mbarrier.init.shared::cta.b64 [gathered], 1;",
        "@first fence.mbarrier_init.release.cluster;", "barrier.cluster.arrive.relaxed.aligned;", "}"))


@gluon.constexpr_function
def _sent(each):
    """To send `each` numbers: after the outputs, these; then as many times the address of the first, whose, and the barrier's."""
    names = ", ".join(f"${each + i}" for i in range(each))
    vector, names = ("", names) if each == 1 else (f".v{each}", f"{{{names}}}")
    return "\n".join((
        "{", ".reg .b32 a, b;", f"mapa.shared::cluster.u32 a, ${2 * each}, ${3 * each};",
        f"mapa.shared::cluster.u32 b, ${4 * each}, ${3 * each};",
        f"st.async.weak.shared::cluster.mbarrier::complete_tx::bytes{vector}.f32 [a], {names}, [b];",
        *(f"mov.u32 ${i}, 0;" for i in range(each)), "}"))


@gluon.constexpr_function
def _registers(each):
    return ",".join(["=r"] * each + ["f"] * each + ["r"] * (3 * each))


@gluon.constexpr_function
def gathered_layout(warps, programs):
    """Of numbers [programs, numbers]: each program has a part of them, of all programs, and one's are in one lane."""
    return gl.BlockedLayout([programs, 1], [1, 32], [1, warps], [1, 0],
                            cga_layout=[[0, 1 << i] for i in range(programs.bit_length() - 1)])


@gluon.jit
def rank():
    """Which of its cluster's programs this is."""
    return gl.inline_asm_elementwise(RANK, "=r", [], gl.int32, is_pure=True, pack=1)


@gluon.jit
def begin(NUMBERS: tl.constexpr):
    """Make room for the sums, peaks and totals of so many numbers: where it is. Once in a kernel, by all its programs."""
    return gl.inline_asm_elementwise(_begun(HEADER + 12 * NUMBERS), "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def expect(gathered, bytes):
    """How much this program is sent, from all."""
    gl.inline_asm_elementwise(EXPECT, "=r,r,r", [gathered, bytes], gl.int32, is_pure=False, pack=1)


@gluon.jit
def _send(x, gathered, which: tl.constexpr, m, d, place, EACH: tl.constexpr):
    PROGRAMS: tl.constexpr = gl.num_ctas()
    PART: tl.constexpr = x.shape[0] * x.shape[1] // PROGRAMS
    number = m[:, None] * x.shape[1] + d[None, :]
    at = gathered + HEADER + ((which * PROGRAMS + place) * PART + number % PART) * 4
    gl.inline_asm_elementwise(_sent(EACH), _registers(EACH), [x, at, number // PART, number * 0 + gathered], gl.int32,
                              is_pure=False, pack=EACH)


@gluon.jit
def _receive(gathered, which: tl.constexpr, source, number, there, PART: tl.constexpr):
    at = gathered + HEADER + ((which * gl.num_ctas() + source) * PART + number % PART) * 4
    there = (there & (number >= 0)).to(gl.int32)
    return gl.inline_asm_elementwise(READ, "=f,r,r", [at, there], gl.float32, is_pure=False, pack=1)


@gluon.jit
def added(result, peak, total, gathered, m, d, place, used, LOWEST: tl.constexpr, EACH: tl.constexpr, WARPS: tl.constexpr):
    """Of sums, peaks and totals [M, D] of places 0 to `used` and of the last place: the quotients [M D], a part in each program.

    m, d: of the elements, of which a lane has EACH neighbours.
    """
    PROGRAMS: tl.constexpr = gl.num_ctas()
    NUMBERS: tl.constexpr = result.shape[0] * result.shape[1]
    layout: tl.constexpr = gathered_layout(WARPS, PROGRAMS)
    gl.inline_asm_elementwise(ALL_BEGUN, "=r", [], gl.int32, is_pure=False, pack=1)
    if (place < used) | (place == PROGRAMS - 1):
        _send(result, gathered, 0, m, d, place, EACH)
        _send(peak, gathered, 1, m, d, place, EACH)
        _send(total, gathered, 2, m, d, place, EACH)
    gl.inline_asm_elementwise(RECEIVED, "=r,r", [gathered], gl.int32, is_pure=False, pack=1)
    source = gl.arange(0, PROGRAMS, gl.SliceLayout(1, layout))[:, None]
    number = gl.arange(0, NUMBERS, gl.SliceLayout(0, layout))[None, :]
    there = (source < used) | (source == PROGRAMS - 1)
    peaks = gl.where(there, _receive(gathered, 1, source, number, there, NUMBERS // PROGRAMS), LOWEST)
    totals = _receive(gathered, 2, source, number, there, NUMBERS // PROGRAMS)
    results = _receive(gathered, 0, source, number, there, NUMBERS // PROGRAMS)
    shares = gl.exp2(peaks - gl.expand_dims(gl.max(peaks, 0), 0))
    return gl.sum(results * shares, 0) / gl.sum(totals * shares, 0)
