"""The Gluon kernels compile for Hopper, without a GPU, to what they are made for; and where their operands' elements lie.

The interpreter knows no layouts, so what hangs on them is checked here: what a lane holds is what mma.sync takes (PTX ISA,
"Matrix fragments for mma.m16n8k16"), two neighbours along K stand side by side for the assembly, and nothing moves between lanes.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def compiled(function, signature, constants, options):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compile as build
    from triton.experimental.gluon._runtime import GluonASTSource

    unaligned = {"M", "units", "positions", "rows", "slots", "window", "eps", "scale"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names)
               if name in signature.keys() - unaligned}
    signature = {name: "constexpr" if name in constants else signature[name] for name in function.arg_names}
    source = GluonASTSource(function, signature, constants, aligned)
    return build(source, target=GPUTarget("cuda", 90, 32), options=options)


def check_code(kernel: str, constants: dict, copies: int, limit: int, most: int, registers: int) -> None:
    """copies: of 16 bytes a lane, for a block of 16 x 128 weights; most: instructions for it; limit: of registers, or 0."""
    from kernels import gemm_few

    kinds = {"scales": "*bf16", "zeros": "*u8", "bias": "*bf16", "out": "*bf16", "x_scales": "*fp32", "weight_scales": "*fp32",
             "packed": "*i32", "weight": "*i32", "x": "*bf16" if kernel == "_w4_kernel" else "*i32"}
    function = getattr(gemm_few, kernel)
    if constants.get("WHOLE") is False:
        kinds["zeros"] = "*bf16"
    if kernel == "_w4_kernel":
        constants = {"GELU": False, "GATED": False, "ZERO": True, "WHOLE": True, "stride_n": 1, **constants}
    constants = {"BIAS": True, "OVERLAP": True, **constants}
    signature = {name: kinds.get(name, "i32") for name in function.arg_names if name not in constants}
    options = {"num_warps": constants["WARPS"], "launch_pdl": True} | ({"maxnreg": limit} if limit else {})
    built = compiled(function, signature, constants, options)
    ptx, where = built.asm["ptx"], f"{kernel} {constants}"
    ahead, tiles = constants["AHEAD"], constants["OUTPUTS"] // 16
    assert ptx.count("mma.sync") == 8 * ahead * tiles, where
    early, late = ptx.split("griddepcontrol.wait")      # weights and scales are asked for before, nothing of x
    assert len(re.findall(r"ld\.global[^;]*v4\.b32", early)) == ahead * tiles * copies, where
    turns = late[: late.rindex("mma.sync")]
    assert not re.search(r"shfl|(ld|st)\.shared|ldmatrix|bar\.sync", early + turns), where
    assert ("st.shared" in late, late.count("bar.sync")) == (constants["WARPS"] > 1, int(constants["WARPS"] > 1)), where
    sass = built.asm["sass"]
    assert "STL" not in sass, f"spilled: {where}"
    taken = 1 + max(int(r) for r in re.findall(r"\bR(\d+)\b", sass))
    length = loop_length(sass) / ahead / tiles
    print(f"{where}: {taken} registers, {length:.0f} instructions")
    assert taken <= registers, (taken, where)
    assert length <= most, (length, where)


def check_dense(constants: dict, most: int, registers: int) -> None:
    """most: instructions for a tile of 16 x 128 weights."""
    from kernels import dense_few

    function = dense_few._product_kernel
    kinds = {"x": "*i32", "weight": "*i32", "bias": "*bf16", "out": "*bf16"}
    constants = {"BIAS": True, "GATED": False, "GELU": False, "OVERLAP": True, **constants}
    signature = {name: kinds.get(name, "i32") for name in function.arg_names if name not in constants}
    built = compiled(function, signature, constants, {"num_warps": constants["WARPS"], "launch_pdl": True})
    ptx, where = built.asm["ptx"], f"dense {constants}"
    tiles = constants["AHEAD"] * constants["OUTPUTS"] // 16 * constants["DEPTH"] / 128
    assert ptx.count("mma.sync") == 8 * tiles, where
    early, late = ptx.split("griddepcontrol.wait")      # weights are asked for before, nothing of x
    assert len(re.findall(r"ld\.global[^;]*v4\.b32", early)) == 8 * tiles, where
    turns = late[: late.rindex("mma.sync")]
    assert not re.search(r"shfl|(ld|st)\.shared|ldmatrix|bar\.sync", early + turns), where
    assert late.count("bar.sync") == int(constants["WARPS"] > 1), where
    sass = built.asm["sass"]
    taken = 1 + max(int(r) for r in re.findall(r"\bR(\d+)\b", sass))
    length = loop_length(sass) / tiles
    print(f"{where}: {taken} registers, {length:.0f} instructions")
    assert taken <= registers, where
    assert length <= most, where


def check_row(constants: dict, limit: int) -> None:
    """limit: of registers, or 0."""
    from kernels import dense_row

    function = dense_row._product_kernel
    kinds = {"x": "*i32", "weight": "*i32", "bias": "*bf16", "out": "*bf16"}
    constants = {"BIAS": False, "GATED": False, "GELU": False, "OVERLAP": True, **constants}
    signature = {name: kinds.get(name, "i32") for name in function.arg_names if name not in constants}
    options = {"num_warps": constants["WARPS"], "launch_pdl": True} | ({"maxnreg": limit} if limit else {})
    built = compiled(function, signature, constants, options)
    early, late = built.asm["ptx"].split("griddepcontrol.wait")     # weights are asked for before, nothing of x
    assert len(re.findall(r"ld\.global[^;]*v4\.b32", early)) == constants["OUTPUTS"] * constants["AHEAD"], constants
    turns = late[: [found.start() for found in re.finditer(r"ld\.global[^;]*v4\.b32", late)][-1]]
    assert not re.search(r"shfl|(ld|st)\.shared|bar\.sync", early + turns), constants
    assert "STL" not in built.asm["sass"], constants


def check_decode(constants: dict, fp8: bool, programs: int, most: int, registers: int) -> None:
    """most: instructions for 16 keys; programs: of a cluster."""
    from kernels import decode_few

    stored = "*fp8e4nv" if fp8 else "*bf16"
    kinds = {"scale": "fp32", "eps": "fp32", "window": "i32", "k_cache": stored, "v_cache": stored, "table_stride": "i32",
             "qkv_stride": "i32", **dict.fromkeys(("qkv", "q_weight", "k_weight", "out"), "*bf16"),
             **dict.fromkeys(("cos_sin", "prefix", "kv_scales", "k_shift"), "*fp32")}
    function = decode_few._decode_few_kernel
    dim = constants.get("D", 128)
    constants = {"H": 32, "K": 8, "P": 32, "D": 128, "ROTARY": dim, "ROWS": 8, "WINDOW": False, "SHARED": False,
                 "Q_NORM": False, "K_NORM": False, "PLUS_ONE": False, "FP8": fp8, "SHIFT": False, "OVERLAP": True, **constants}
    signature = {name: kinds.get(name, "*i32") for name in function.arg_names if name not in constants}
    options = {"num_warps": constants["WARPS"], "num_ctas": programs, "launch_pdl": True}
    built = compiled(function, signature, constants, options)
    ptx, where = built.asm["ptx"], f"decode {constants} x {programs}"
    early, late = ptx.split("griddepcontrol.wait")      # keys and values are asked for before; nothing is written
    turns = constants["AHEAD"] * constants["GROUPS"]
    copies = 16 * turns // (1 + fp8)
    assert len(re.findall(r"ld\.global[^;]*v4\.b32", early)) >= copies * dim // 128, where
    assert "st.global" not in early, where
    assert late.count("mma.sync") == turns * (dim // 8) * constants["ROWS"] // 8, where
    loop = late[late.index("mma.sync") : late.rindex("mma.sync")]
    assert not re.search(r"(ld|st)\.shared|ldmatrix|bar\.sync", loop), where
    assert ("st.async" in late) == (programs > 1), where
    sass = built.asm["sass"]
    assert "STL" not in sass, f"spilled: {where}"
    taken = 1 + max(int(r) for r in re.findall(r"\bR(\d+)\b", sass))
    length = loop_length(sass) / turns
    print(f"{where}: {taken} registers, {length:.0f} instructions, {late.count('bar.sync')} barriers")
    assert taken <= registers, (taken, where)
    assert length <= most, (length, where)


def loop_length(sass: str) -> int:
    """Instructions in the longest loop."""
    at, labels, longest = 0, {}, 0
    for line in sass.splitlines():
        if label := re.fullmatch(r"(LBB\d+):", line):
            labels[label[1]] = at
            continue
        at += 1
        jump = re.search(r"\bBRA (LBB\d+)", line)
        if jump and jump[1] in labels:
            longest = max(longest, at - labels[jump[1]])
    assert longest, "no loop found"
    return longest


def elements(layout, shape: list[int]) -> dict[tuple[int, int, int], tuple[int, ...]]:
    """Which element is in (warp, lane, place in the lane), as Triton has it."""
    from triton._C.libtriton import gluon_ir, ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    context = ir.context()
    ir.load_dialects(context)
    make_backend(GPUTarget("cuda", 90, 32)).load_dialects(context)
    builder = gluon_ir.GluonOpBuilder(context)
    linear = builder.to_linear_layout(layout._to_ir(builder), shape)

    def at(number: int, bases: list[list[int]]) -> list[int]:
        return [sum(basis[dim] for i, basis in enumerate(bases) if number >> i & 1) for dim in range(len(shape))]

    counts = (range(1 << len(bases)) for bases in (linear.warp_bases, linear.lane_bases, linear.reg_bases))
    return {place: tuple(map(sum, zip(at(place[0], linear.warp_bases), at(place[1], linear.lane_bases),
                                      at(place[2], linear.reg_bases), strict=True)))
            for place in itertools.product(*counts)}


def check_fragments() -> None:
    """What lies where in a lane: of runs of 2 just what mma.m16n8k16 takes; of runs of 4 the same k of weights and of x."""
    from kernels import decode_few, fragments

    sums = elements(fragments.sums_layout(4), [4, 16, 8])
    assert all(at == (warp, lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2) for (warp, lane, i), at in sums.items())
    a, b = elements(fragments.operand_layout(0, 4, 2), [4, 16, 16]), elements(fragments.operand_layout(1, 4, 2), [4, 16, 8])
    assert (len(a), len(b)) == (4 * 32 * 8, 4 * 32 * 4)
    for (warp, lane, i), at in a.items():
        assert at == (warp, lane // 4 + (i // 2 % 2) * 8, lane % 4 * 2 + i % 2 + i // 4 * 8)
    for (warp, lane, i), at in b.items():
        assert at == (warp, lane % 4 * 2 + i % 2 + i // 2 * 8, lane // 4)

    a, b = elements(fragments.operand_layout(0, 4, 4), [4, 16, 32]), elements(fragments.operand_layout(1, 4, 4), [4, 32, 8])
    assert (len(a), len(b)) == (4 * 32 * 16, 4 * 32 * 8)
    for (warp, lane, i), at in a.items():
        k = lane % 4 * 4 + i % 4 + i // 8 * 16
        assert at == (warp, lane // 4 + (i // 4 % 2) * 8, k)
        assert b[warp, lane, i % 4 + i // 8 * 4] == (warp, k, lane // 4)

    # Attention: runs of 8 numbers of keys and queries; two queries of a key side by side, as movmatrix takes them.
    a, b = elements(fragments.operand_layout(0, 4, 8), [4, 16, 64]), elements(fragments.operand_layout(1, 4, 8), [4, 64, 16])
    assert (len(a), len(b)) == (4 * 32 * 32, 4 * 32 * 32)
    for (warp, lane, i), at in a.items():
        k = lane % 4 * 8 + i % 8 + i // 16 * 32
        assert at == (warp, lane // 4 + (i // 8 % 2) * 8, k)
        assert b[warp, lane, i % 8 + i // 16 * 8] == (warp, k, lane // 4)
    sums = elements(fragments.sums_layout(4), [4, 16, 16])
    for (warp, lane, i), at in sums.items():
        assert at == (warp, lane // 4 + i // 2 % 2 * 8, lane % 4 * 2 + i % 2 + i // 4 * 8)
    # Values: a lane's 16 bytes of four keys as loaded, and words of two keys side by side.
    for words, run in ((16, 2), (32, 4), (64, 4)):
        loaded, paired = (elements(decode_few.values_layout(4, words, pairs, 1), [4, words, 16]) for pairs in (False, True))
        assert len(loaded) == len(paired) == 4 * words * 16
        for (warp, lane, i), at in loaded.items():
            word, key = i // (4 * run) * 32 + lane // 4 * run + i % run, lane % 4 * 2 + i // run % 2 + i // (2 * run) % 2 * 8
            assert at == (warp, word, key)
            assert paired[warp, lane, i // (2 * run) * 2 * run + i % run * 2 + i // run % 2] == at


def compile_all() -> None:
    import triton

    check_fragments()
    w4 = {"GROUP": 128, "PIECES": 1, "OUTPUTS": 16, "AHEAD": 2, "WARPS": 8}
    wide = {**w4, "OUTPUTS": 32, "AHEAD": 1, "WARPS": 4}
    fp8 = {"BLOCKS": False, "GATED": False, "GELU": False, "OUTPUTS": 16, "AHEAD": 1, "WARPS": 8}
    dense = {"OUTPUTS": 16, "DEPTH": 128, "AHEAD": 1, "WARPS": 8}
    for constants, limit, most, registers in (
        (w4, 64, 180, 64),
        ({**w4, "WARPS": 16, "AHEAD": 1}, 64, 180, 64),
        ({**w4, "ZERO": False}, 64, 170, 64),
        ({**w4, "WHOLE": False}, 0, 205, 80),
        ({**w4, "GROUP": 0}, 0, 165, 72),
        ({**w4, "GROUP": 64, "PIECES": 2}, 0, 210, 80),
        ({**w4, "GROUP": 32, "PIECES": 4}, 0, 255, 128),
        (wide, 72, 155, 72),
        ({**wide, "GATED": True}, 72, 160, 72),
    ):
        check_code("_w4_kernel", constants, 2, limit, most, registers)
    for constants, most, registers in (
        (fp8, 110, 64),
        ({**fp8, "WARPS": 16}, 110, 64),
        ({**fp8, "WARPS": 16, "BLOCKS": True}, 120, 80),
        ({**fp8, "OUTPUTS": 32, "WARPS": 4}, 95, 96),
        ({**fp8, "GATED": True}, 115, 64),
    ):
        check_code("_fp8_kernel", constants, 4, 0, most, registers)
    half_tile = 145 if triton.__version__.startswith("3.6.") else 130      # Triton 3.6 makes more of the loop around it
    for constants, most, registers in (
        (dense, 130, 80),
        ({**dense, "DEPTH": 64, "WARPS": 16}, half_tile, 64),
        ({**dense, "GATED": True}, 130, 80),
    ):
        check_dense(constants, most, registers)
    row = {"OUTPUTS": 4, "AHEAD": 2, "WARPS": 4}
    for constants, limit in ((row, 0), ({**row, "GATED": True, "WARPS": 8}, 0), ({"OUTPUTS": 8, "AHEAD": 1, "WARPS": 16}, 64)):
        check_row(constants, limit)
    decode = {"GROUPS": 1, "AHEAD": 1, "WARPS": 4}
    for constants, fp8, programs, most, registers in (
        (decode, True, 16, 330, 128),
        (decode, False, 8, 270, 168),
        ({**decode, "WARPS": 2}, False, 1, 270, 168),
        ({**decode, "WARPS": 8, "GROUPS": 2}, True, 1, 235, 184),
        ({**decode, "WARPS": 8, "AHEAD": 2}, True, 4, 260, 184),
        ({**decode, "WARPS": 8, "ROWS": 16, "H": 128}, True, 16, 365, 240),
        ({**decode, "D": 64, "WINDOW": True}, False, 8, 230, 128),
        ({**decode, "GROUPS": 2, "SHARED": True}, True, 1, 280, 184),
        ({**decode, "SHARED": True}, False, 8, 280, 168),
        ({**decode, "GROUPS": 2, "SHARED": True}, False, 1, 260, 255),
    ):
        check_decode(constants, fp8, programs, most, registers)


@pytest.mark.timeout(900)
def test_they_compile_for_hopper():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    compile_all()
