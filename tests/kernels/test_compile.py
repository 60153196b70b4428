"""The kernels compile for a GPU that is not there: the interpreter lets pass types that the compiler does not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

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
        (attention, "_decode_kernel", {**paged, "BLOCK_M": 16, "SPLIT": True, "SHARED": False, "OVERLAP": True}),
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
        if overlaps:    # nothing of the layer is read before the wait: scales of packed weights are, and what the step began with
            assert built.asm["ptx"].count("griddepcontrol.wait") == 1, kernel
            early = built.asm["ptx"].split("griddepcontrol.wait")[0]
            reads = re.search(r"\b(ld|st)\.global|cp\.async", early)
            assert kernel in ("_skinny_kernel", "_decode_step_kernel") or not reads, kernel
        rows = constants.get("BLOCK_M", 0)
        if constants.get("BLOCK_N", 0) >= 64 and (rows >= 64 or (rows and module in (gemm_w4, gemm_fp8))):
            assert "wgmma" in built.asm["ptx"], kernel
        if module is gemm_fp8:      # steps of many rows have more elements than int32 counts
            assert re.search(r"addptr %x, .*: !tt\.ptr<f8E4M3FN>, i64", built.asm["ttir"]), constants
            assert f"tensor<{rows}x!tt.ptr<bf16>>, tensor<{rows}xi64>" in built.asm["ttir"], constants
        if kernel == "_skinny_kernel":      # what is unpacked goes from registers to the tensor cores, not through shared memory
            assert "ldmatrix" not in built.asm["ptx"], constants


def test_kernels_compile_for_hopper():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    compile_all()
