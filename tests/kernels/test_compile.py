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

    from kernels import automaton, dequantize, gemm_skinny, kv_cache, pointwise, sample, step

    elements = {"x", "residual", "weight", "bias", "qkv", "q_weight", "k_weight", "q_out", "k_cache", "v_cache", "logits",
                "scales"}
    rounding = {"_rms_norm_kernel", "_add_rms_norm_kernel", "_gated_act_kernel", "_product_kernel", "_dequantize_kernel"}
    scalars = {"V", "W", "n", "M", "N", "K", "share", "ahead"}

    def kind(kernel: str, name: str, fp8: bool) -> str:
        if name in ("k_cache", "v_cache") and fp8:
            return "*fp8e4nv"
        if name in elements or (name == "out" and kernel in rounding):      # out: as the model
            return "*bf16"
        if name == "codes":
            return "*u8"
        if name == "eps":
            return "fp32"
        if name in ("cos_sin", "partial", "kv_scales"):
            return "*fp32"
        if name == "classes":
            return "*i16"
        return "i32" if name in scalars or name.endswith("stride") else "*i32"

    row = {"WIDTH": 576, "BLOCK": 1024, "OVERLAP": True}
    plain = {"SPLITS": 1, "STAGES": 4, "GATED": False, "GELU": False, "BIAS": False, "PRECISION": "tf32", "OVERLAP": True}
    heads = {"H": 32, "K": 8, "P": 32, "HEADS_Q": 16, "HEADS_K": 8, "OVERLAP": True}
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
         {**heads, "D": 128, "ROTARY": 128, "BLOCK_D": 128, "Q_NORM": False, "K_NORM": False, "PLUS_ONE": False, "FP8": False}),
        (kv_cache, "_rope_and_cache_kernel",
         {**heads, "D": 80, "ROTARY": 32, "BLOCK_D": 128, "Q_NORM": True, "K_NORM": True, "PLUS_ONE": True, "FP8": True}),
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
        signature = {name: "constexpr" if name in constants else kind(kernel, name, fp8) for name in function.arg_names}
        source = ASTSource(fn=function, signature=signature, constexprs=constants)
        overlaps = bool(constants.get("OVERLAP"))
        built = build(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "launch_pdl": overlaps})
        assert built.asm["cubin"], kernel
        if overlaps:    # nothing of the step is read before the wait
            assert built.asm["ptx"].count("griddepcontrol.wait") == 1, kernel
            assert not re.search(r"\b(ld|st)\.global|cp\.async", built.asm["ptx"].split("griddepcontrol.wait")[0]), kernel
        if constants.get("BLOCK_N", 0) >= 64 <= constants.get("BLOCK_M", 0):
            assert "wgmma" in built.asm["ptx"], kernel


def test_kernels_compile_for_hopper():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    compile_all()
