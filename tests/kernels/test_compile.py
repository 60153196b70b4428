"""The kernels compile for a GPU that is not there: the interpreter lets pass types that the compiler does not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

ROOT = Path(__file__).resolve().parents[2]


def compile_all() -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as build

    from kernels import (
        attention,
        automaton,
        decode_step,
        dequantize,
        gemm_fp8,
        gemm_skinny,
        gemm_w4,
        kv_cache,
        pointwise,
        quantize,
        sample,
        step,
    )

    elements = {"x", "residual", "weight", "bias", "qkv", "q_weight", "k_weight", "q_out", "q", "k_cache", "v_cache", "logits",
                "scales"}
    rounding = {"_rms_norm_kernel", "_add_rms_norm_kernel", "_gated_act_kernel", "_dequantize_kernel", "_product_kernel",
                "_skinny_kernel", "_dequantise_kernel", "_decode_kernel", "_prefill_kernel",
                "_decode_step_kernel"}
    reading = {"_rms_norm_kernel", "_add_rms_norm_kernel", "_skinny_kernel", "_decode_step_kernel", "_combine_kernel"}
    scalars = {"V", "W", "n", "M", "N", "K", "share", "ahead", "stride_n", "stride_g", "units", "splits", "window"}

    def kind(module: str, kernel: str, name: str, fp8: bool) -> str:
        if name in (("x", "weight") if kernel == "_product_kernel" else ("k_cache", "v_cache")) and fp8:
            return "*fp8e4nv"
        if module == "kernels.quantize" and name in ("out", "scales", "static"):
            return "*fp8e4nv" if name == "out" else "*fp32"
        if name in elements or (name == "out" and kernel in rounding):      # out as the model
            return "*bf16"
        if name in ("codes", "zeros"):
            return "*u8"
        if name == "packed":
            return "*i16"
        if name in ("eps", "scale", "inner"):
            return "fp32"
        if name in ("cos_sin", "kv_scales", "k_shift", "partial", "prefix", "x_scales", "weight_scales"):
            return "*fp32"
        if name == "classes":
            return "*i16"
        return "i32" if name in scalars or name.endswith("stride") else "*i32"

    row = {"WIDTH": 576, "BLOCK": 1024, "OVERLAP": True}
    plain = {"SPLITS": 1, "STAGES": 4, "GATED": False, "GELU": False, "BIAS": False, "PRECISION": "tf32", "OVERLAP": True}
    heads = {"H": 32, "K": 8, "P": 32, "HEADS_Q": 16, "HEADS_K": 8, "OVERLAP": True}
    packed = {"BITS": 4, "ZERO": True, "WHOLE": True, "BIAS": True, "SPLIT": True, "EVEN_K": True, "ASM": True, "OVERLAP": True,
              "WARPS": 4}
    codes = {"BIAS": True, "SPLIT": True, "EVEN_N": True, "EVEN_K": True, "BLOCK_K": 128, "OVERLAP": True, "FP8": True,
             "WARPS": 8}
    paged = {"H": 32, "K": 8, "P": 32, "D": 128, "BLOCK_N": 64, "BLOCK_D": 128, "WINDOW": False, "SOFTCAP": True, "FP8": True,
             "PRECISION": "tf32"}
    for module, kernel, constants in (
        (pointwise, "_rms_norm_kernel", {**row, "PLUS_ONE": True}),
        (pointwise, "_add_rms_norm_kernel", {**row, "PLUS_ONE": False}),
        (pointwise, "_gated_act_kernel", {**row, "GELU": True}),
        (pointwise, "_gated_act_kernel", {**row, "GELU": False}),
        (gemm_skinny, "_product_kernel", {**plain, "BLOCK_M": 1, "BLOCK_N": 8, "BLOCK_K": 512, "SPLITS": 2}),
        (gemm_skinny, "_product_kernel", {**plain, "BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 256, "BIAS": True}),
        (gemm_skinny, "_product_kernel", {**plain, "BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "SPLITS": 2}),
        (gemm_skinny, "_product_kernel", {**plain, "BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "GATED": True, "GELU": True}),
        (kv_cache, "_rope_and_cache_kernel",
         {**heads, "D": 128, "ROTARY": 128, "BLOCK_D": 128, "Q_NORM": False, "K_NORM": False, "PLUS_ONE": False, "FP8": False,
          "SHIFT": False}),
        (kv_cache, "_rope_and_cache_kernel",
         {**heads, "D": 80, "ROTARY": 32, "BLOCK_D": 128, "Q_NORM": True, "K_NORM": True, "PLUS_ONE": True, "FP8": True,
          "SHIFT": True}),
        *((gemm_w4, "_skinny_kernel", {**packed, "GROUP": group, "PIECE": group, "BLOCK_M": m, "BLOCK_N": n})
          for group, m, n in ((128, 16, 128), (32, 16, 64), (64, 64, 128))),
        (gemm_w4, "_skinny_kernel", {**packed, "BITS": 8, "GROUP": 0, "PIECE": 64, "BLOCK_M": 16, "BLOCK_N": 64}),
        (gemm_w4, "_dequantise_kernel", {"GROUP": 128, "PIECE": 128, "BITS": 4, "ZERO": True, "WHOLE": True, "BLOCK_N": 128,
                                         "ASM": True}),
        (gemm_fp8, "_product_kernel", {**codes, "BLOCKS": False, "BLOCK_M": 16, "BLOCK_N": 64}),
        (gemm_fp8, "_product_kernel", {**codes, "BLOCKS": True, "BLOCK_M": 128, "BLOCK_N": 128}),
        (quantize, "_quantize_kernel", {**row, "STATIC": False}),
        (quantize, "_add_rms_norm_kernel", {**row, "PLUS_ONE": False, "STATIC": True}),
        (quantize, "_gated_act_kernel", {**row, "GELU": False, "STATIC": False}),
        (attention, "_decode_kernel", {**paged, "BLOCK_M": 16, "SPLIT": True, "SHARED": True, "OVERLAP": True}),
        (decode_step, "_decode_step_kernel",
         {**paged, "ROTARY": 128, "BLOCK_M": 16, "SPLIT": True, "Q_NORM": True, "K_NORM": True, "PLUS_ONE": False,
          "SHIFT": True, "OVERLAP": True}),
        (attention, "_prefill_kernel", {**paged, "BLOCK_M": 128, "TILE": 128}),
        (kv_cache, "_copy_pages_kernel", {"SIZE": 16384, "BLOCK": 4096}),
        (step, "_apply_writes_kernel", {"BLOCK": 1024}),
        (step, "_expand_kernel", {"P": 32, "BLOCK": 1024}),
        (step, "_expand_decode_kernel", {"P": 32, "BLOCK": 128}),
        (step, "_commit_kernel", {"BLOCK": 128}),
        (dequantize, "_dequantize_kernel", {"WIDTH": 8960, "GROUP": 16, "MIDDLE": 128, "BLOCK": 2048}),
        (sample, "_sample_kernel", {"ZEROS": 16, "BLOCK": 4096}),
        (sample, "_mask_kernel", {"BYTES": 256}),
        (automaton, "_mask_kernel", {"BYTES": 256}),
        (automaton, "_advance_kernel", {"BLOCK": 128}),
    ):
        function = getattr(module, kernel)
        fp8 = constants.get("FP8", False)
        constants = {name: value for name, value in constants.items() if name in function.arg_names}
        signature = {name: "constexpr" if name in constants else kind(module.__name__, kernel, name, fp8)
                     for name in function.arg_names}
        aligned = {} if module not in (attention, decode_step, gemm_fp8, gemm_w4) else {
            (i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names)
            if signature[name] not in ("constexpr", "fp32") and name not in ("M", "splits", "stride_n", "stride_g")}
        source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
        overlaps, warps = bool(constants.get("OVERLAP")), 4 if kernel == "_skinny_kernel" else 8
        built = build(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "launch_pdl": overlaps})
        assert built.asm["cubin"], kernel
        if overlaps:    # nothing that the step makes is read before the wait: weights are, and what the step began with
            assert built.asm["ptx"].count("griddepcontrol.wait") == 1, kernel
            early = built.asm["ptx"].split("griddepcontrol.wait")[0]
            assert not re.search(r"\bst\.global", early), kernel
            assert kernel in reading or module is gemm_fp8 or not re.search(r"\bld\.global|cp\.async", early), kernel
        rows = constants.get("BLOCK_M", 0)
        if constants.get("BLOCK_N", 0) >= 64 and (rows >= 64 or (rows and module in (gemm_w4, gemm_fp8))):
            assert "wgmma" in built.asm["ptx"], kernel
        if module is gemm_fp8:      # steps of many rows have more elements than int32 counts
            assert re.search(r"addptr %x, .*: !tt\.ptr<f8E4M3FN>, i64", built.asm["ttir"]), constants
            assert f"tensor<{rows}x!tt.ptr<bf16>>, tensor<{rows}xi64>" in built.asm["ttir"], constants
        if kernel == "_skinny_kernel":      # what is unpacked goes from registers to the tensor cores, not through shared memory
            assert "ldmatrix" not in built.asm["ptx"], constants


@gluon.jit
def _widen(raw_layout: gl.constexpr, tile_layout: gl.constexpr, widened: gl.constexpr, D: gl.constexpr):
    """Keys as prefill_hopper.py widens them: no two of the lanes served together use the same banks."""
    raw = gl.allocate_shared_memory(gl.float8e4nv, [32, D], raw_layout)
    tile = gl.allocate_shared_memory(gl.float16, [32, D], tile_layout)
    x = raw.load(widened)
    gl.static_assert(gl.bank_conflicts(x.type, raw.type) == 0)
    y = x.to(gl.float16)
    gl.static_assert(gl.bank_conflicts(y.type, tile.type) == 0)
    tile.store(y)


def compile_gluon() -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compile as build
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
    from triton.runtime.jit import mangle_type

    from kernels import chain, gemm_fp8_ring, gemm_many, gemm_w4_ring, prefill_hopper

    spills = re.compile(r"\b(?:STL|LDL)\b")

    def compiled(function: Any, constants: dict, kinds: dict[str, str], odd: Sequence[str], registers: int) -> Any:
        """kinds: of what is no int32; odd: what need not be divisible by 16."""
        others = 1 if "TILE" in constants else 0        # waits that are not for operands
        signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in function.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names)
                   if signature[name] not in ("constexpr", "fp32") and name not in odd}
        built = build(GluonASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned),
                      target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "maxnreg": registers, "launch_pdl": True})
        assert "cp.async.cg.shared.global" in built.asm["ptx"]
        assert built.metadata.shared <= 227 << 10
        for operands in re.split(r"wgmma\.commit_group", built.asm["ptx"])[:-1]:     # the tensor cores read what was fenced
            since = operands.rpartition("fence.proxy.async")[2]
            assert "wgmma.mma_async" in operands and since.count("mbarrier.try_wait") <= others
        return built

    for rows, split, blocks, programs, gated in (
        (16, False, False, 1, False), (64, True, False, 2, False), (64, True, False, 1, False), (32, False, True, 2, False),
        (16, False, True, 2, False), (128, True, False, 1, False), (128, True, True, 1, False), (64, False, False, 2, True),
        (16, False, False, 2, True),
    ):
        registers, bringing = gemm_fp8_ring.REGISTERS[programs]
        constants = {"BLOCK_M": rows, "BLOCK_N": 64, "BLOCK_K": 128, "SPLIT": split, "BIAS": not gated, "BLOCKS": blocks,
                     "STAGES": gemm_fp8_ring.most_stages(rows, programs, blocks, 2 if gated else 1), "GATED": gated,
                     "GELU": False, "OVERLAP": True, "BRINGING": bringing}
        kinds = {"x": "*fp8e4nv", "weight": "*fp8e4nv", "bias": "*bf16", "out": "*bf16", "partial": "*fp32", "arrived": "*i32",
                 "x_scales": "*fp32", "weight_scales": "*fp32"}
        built = compiled(gemm_fp8_ring._product_kernel, constants, kinds, ("M", "splits"), registers)
        assert built.metadata.shared * programs <= 226 << 10
        sass = built.asm["sass"]
        assert len(spills.findall(sass)) <= 32      # none, or a few addresses
        assert not any(spills.search(part.partition("QGMMA")[2]) for part in sass.split("WARPGROUP.DEPBAR")[:-1])
        # A product of a block is waited for as a whole, the second one of two while the first one is added.
        products = 2 if gated else 3        # of a turn's, and of the last block of an odd number
        assert sass.count("QGMMA") == 4 * products
        assert sass.count("WARPGROUP.DEPBAR") == products
    for dtype, rows, outputs, programs, gated, ones in (        # numbers that are 1 are known when compiled: groups of 128
        ("bf16", 64, 64, 1, False, ()), ("fp16", 128, 64, 1, False, ("every",)), ("bf16", 16, 128, 2, False, ("every", "units")),
        ("bf16", 64, 128, 2, False, ("every",)), ("bf16", 128, 128, 1, False, ("every",)),
        ("fp16", 128, 256, 1, False, ("every",)), ("fp16", 64, 128, 2, True, ("every",)), ("bf16", 64, 128, 2, True, ()),
    ):
        registers, multiplying, bringing = gemm_w4_ring.registers_of(rows, gemm_w4_ring.Tile(outputs, 1, 0, programs), gated)
        constants = {"BLOCK_M": rows, "BLOCK_N": outputs, "SPLIT": not gated, "BIAS": not gated, "ZERO": outputs < 256,
                     "STAGES": gemm_w4_ring.most_stages(rows, outputs, programs), "OVERLAP": True, "MULTIPLYING": multiplying,
                     "BRINGING": bringing, "GATED": gated, "GELU": False, **dict.fromkeys(ones, 1)}
        kinds = {**dict.fromkeys(("x", "scales", "bias", "out"), "*" + dtype), "packed": "*i16", "zeros": "*u8",
                 "partial": "*fp32", "arrived": "*i32"}
        built = compiled(gemm_w4_ring._product_kernel, constants, kinds, ("M", "units", "every", "splits"), registers)
        assert built.metadata.shared * programs <= 226 << 10
        assert not re.search(r"ldmatrix\S*x4", built.asm["ptx"])     # what is unpacked goes from registers to the tensor cores
        sass = built.asm["sass"]
        assert len(spills.findall(sass)) <= 100     # none, or addresses that are needed once, and in a turn a few
        assert all(len(spills.findall(part.partition("HGMMA")[2])) < 4 for part in sass.split("WARPGROUP.DEPBAR")[:-1])
        # In each group: a half of a block is waited for when the next one has been unpacked, not each of its four instructions.
        assert sass.count("HGMMA") == 8 * max(outputs // 64, 2)
        assert sass.count("WARPGROUP.DEPBAR") == 2 * max(outputs // 64, 2)
        assert sass.count("WARPGROUP.ARRIVE") == 2 * max(outputs // 64, 2)

    function = prefill_hopper._prefill_kernel
    heads = {"H": 32, "K": 8, "P": 32, "TILE": 128, "BLOCK_M": prefill_hopper.BLOCK_M, "BLOCK_N": prefill_hopper.BLOCK_N,
             "COMPUTING": prefill_hopper.COMPUTING, "BRINGING": prefill_hopper.BRINGING}
    for dim, fp8, window, ones in ((128, False, False, ()), (128, True, False, ()), (64, True, True, ("window", "table_stride"))):
        constants = {**heads, "D": dim, "FP8": fp8, "WINDOW": window, **dict.fromkeys(ones, 1)}
        cache = "*fp8e4nv" if fp8 else "*bf16"
        kinds = {"q": "*bf16", "out": "*bf16", "k_cache": cache, "v_cache": cache, "kv_scales": "*fp32", "scale": "fp32",
                 "window": "i32", "table_stride": "i32", "q_stride": "i32", "blocks": "i32"}
        kinds |= dict.fromkeys(("block_table", "rows", "starts", "cu_q", "tiles", "counter"), "*i32")
        odd = "window", "blocks", "rows", "starts", "cu_q", "tiles"
        built = compiled(function, constants, kinds, odd, prefill_hopper.REGISTERS)
        ptx = built.asm["ptx"]
        assert ptx.count("setmaxnreg") >= 4
        # In each group that computes: no product is waited for right after it was asked for, but the first and the last.
        assert ptx.count("wgmma.wait_group.sync.aligned 1;") == 2 * (3 if window else 2)

    for dtype, end in ((torch.bfloat16, "silu"), (torch.float16, "gelu_tanh"), (torch.bfloat16, "add")):
        constants = {"END": end, "MULTIPLYING": gemm_many.MULTIPLYING, "BRINGING": gemm_many.BRINGING}
        like = torch.empty(256, 256, dtype=dtype)
        described = [mangle_type(TensorDescriptor.from_tensor(like, block, layout))
                     for block, layout in zip(gemm_many.BLOCKS, gemm_many.LAYOUTS[dtype], strict=True)]
        signature = {**dict(zip(("x", "weight", "out"), described, strict=True)), **dict.fromkeys("MNK", "i32"),
                     **dict.fromkeys(constants, "constexpr")}
        built = build(GluonASTSource(fn=gemm_many._product_kernel, signature=signature, constexprs=constants),
                      target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "maxnreg": gemm_many.REGISTERS})
        assert built.metadata.shared <= 227 << 10
        sass = built.asm["sass"]
        assert not spills.search(sass)
        assert built.asm["ptx"].count("cp.reduce.async.bulk.tensor") == (4 if end == "add" else 0)
        # In each group: four blocks, all but the last of which are waited for when the next one has been asked for.
        assert re.findall("HGMMA|WARPGROUP.DEPBAR", sass) == 2 * (4 * ["HGMMA"] + 3 * [*4 * ["HGMMA"], "WARPGROUP.DEPBAR"]
                                                                 + ["WARPGROUP.DEPBAR"])

    plan = chain.cuts_of(tuple(map(torch.Size, ((4096, 4096), (28672, 4096), (4096, 14336), (6144, 4096)))), 132)
    assert plan is not None
    for dtype, rows, products in ((torch.bfloat16, 64, 4), (torch.float16, 16, 3), (torch.bfloat16, 32, 4)):
        constants = {"WIDTH": 4096, "N": 6144, "BLOCK_M": rows, "CUTS": plan[1][:products], "PLUS_ONE": False, "GELU": False,
                     "OVERLAP": True, "BRINGING": chain.BRINGING}
        of_x = mangle_type(chain._described(torch.empty(256, 256, dtype=dtype), [rows, chain.PIECE_DEPTH]))
        block = [1, chain.MOST_HEIGHT, chain.PIECE_DEPTH]
        of_weight = mangle_type(chain._described(torch.empty(1, 256, 256, dtype=dtype), block))
        kinds = {**dict.fromkeys(("h", "normed_x", "active_x"), of_x), "partial": "*fp32", "counts": "*i32", "eps": "fp32",
                 **dict.fromkeys(("of_o", "of_gate_up", "of_down", "of_qkv"), of_weight),
                 **dict.fromkeys(("residual", "mlp_norm", "next_norm", "normed", "active", "out"),
                                 "*bf16" if dtype == torch.bfloat16 else "*fp16"), **dict.fromkeys(constants, "constexpr")}
        signature = {name: kinds.get(name, "i32") for name in chain._chain_kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if signature[name].startswith("*")}
        built = build(GluonASTSource(fn=chain._chain_kernel, signature=signature, constexprs=constants, attrs=aligned),
                      target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "maxnreg": chain.REGISTERS, "launch_pdl": True})
        assert built.metadata.shared <= 227 << 10
        assert not spills.search(built.asm["sass"])
        assert built.asm["ptx"].count("cp.async.bulk.tensor.3d") == 2 * (products + 1)

    for dim in (64, 128):
        constants = {"raw_layout": prefill_hopper.swizzled(dim), "widened": prefill_hopper.WIDENED.value, "D": dim,
                     "tile_layout": gl.NVMMASharedLayout.get_default_for([32, dim], gl.float16)}
        build(GluonASTSource(fn=_widen, signature=dict.fromkeys(constants, "constexpr"), constexprs=constants),
              target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


@pytest.mark.timeout(900)
def test_kernels_compile_for_hopper():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    compile_all()
    compile_gluon()
