"""Random quantised layers, and products with them in float64: what tests/kernels and tests/gpu check the kernels against."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from kernels import gemm_few, gemm_fp8, gemm_w4, pointwise, quantize, ref
from kernels.formats import FP8_BLOCK

ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}      # of the output, in the 2-norm
FP8_STEP = 1 / 8        # neighbouring e4m3 numbers differ by so much at most; a quotient may be rounded to either


def mend_interpreted_casts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter drops the carry of a significand that it rounds up to e4m3: 15.9 becomes 8."""
    own = interpreter.InterpreterBuilder.create_fp_to_fp

    def convert(builder: Any, x: Any, kind: Any, rounding: Any) -> Any:
        if kind.scalar != tl.float8e4nv:
            return own(builder, x, kind, rounding)
        codes = torch.from_numpy(np.array(x.data, dtype=np.float32)).to(torch.float8_e4m3fn)
        return interpreter.TensorHandle(codes.view(torch.uint8).numpy(), kind.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fp_to_fp", convert)


def error(got: Tensor, want: Tensor) -> float:
    """Relative, in the 2-norm; NaN if anything is NaN."""
    return float((got.double() - want).norm() / want.norm())


def randn(*shape: int, like: Tensor) -> Tensor:
    """Normal numbers, one in a hundred of them 10 times larger."""
    x = torch.randn(shape, device=like.device)
    return torch.where(torch.rand(shape, device=like.device) < 0.01, 10 * x, x).to(like.dtype)


def integer_layer(like: Tensor, bits: int, outputs: int, inputs: int, group: int,
                  zeros: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Codes, scales and zeros ("whole", "broken" or "none"), of the type and on the device of `like`; the weights in float64."""
    groups, middle = inputs // group, 1 << (bits - 1)
    codes = torch.randint(0, 2 * middle, (outputs, inputs), dtype=torch.uint8, device=like.device)
    scales = (randn(groups, outputs, like=like).abs() * 0.01 + 1e-3).to(like.dtype).t()
    zero = None
    if zeros == "whole":
        zero = torch.randint(0, 2 * middle, (groups, outputs), dtype=torch.uint8, device=like.device).t()
    elif zeros == "broken":
        zero = (torch.rand(groups, outputs, device=like.device) * 2 * middle).to(like.dtype).t()
    less = torch.full_like(scales, middle) if zero is None else zero
    exact = (codes.double() - less.double().repeat_interleave(group, 1)) * scales.double().repeat_interleave(group, 1)
    return codes, scales, zero, exact


def check_integer(like: Tensor, bits: int, rows: int, outputs: int, inputs: int, group: int, *, zeros: str = "whole",
                  bias: bool = False, perm: bool = False, tile: gemm_w4.Tile | None = None) -> None:
    """A product of the type and on the device of `like`, by the given tile or as the op chooses, and the dequantised weights.

    zeros: "whole", "broken" or "none". The dequantised weights are checked too.
    """
    codes, scales, zero, exact = integer_layer(like, bits, outputs, inputs, group, zeros)
    packed = (gemm_w4.w4_pack if bits == 4 else gemm_w4.w8_pack)(codes)
    limit = ROUNDING[like.dtype] * (1 if zeros != "broken" else 2)
    assert error(gemm_w4._dequantise(packed, scales, zero, group, bits, inputs), exact) < limit

    x = randn(rows, inputs + 16, like=like)[:, :inputs]        # rows inside wider ones
    b = randn(outputs, like=like) if bias else None
    order = torch.randperm(inputs, device=like.device).int() if perm else None
    picked = x if order is None else x[:, order.long()]
    want = picked.double() @ exact.t() + (0 if b is None else b.double())
    if tile is not None:
        got = gemm_w4._skinny(picked, packed, scales, zero, group, b, bits, tile)
    else:
        matmul, unpack, own = ((gemm_w4.w4_matmul, gemm_w4.w4_weight, ref.w4_pack) if bits == 4 else
                               (gemm_w4.w8_matmul, gemm_w4.w8_weight, ref.w8_pack))
        got = matmul(x, packed, scales, zero, group, b, order, None)
        weight = unpack(packed, scales, zero, group, order, inputs)
        assert error(weight if order is None else weight[:, order.long()], exact) < limit
        assert error(matmul(x, packed, scales, zero, group, b, order, weight), want) < limit
        if bits == 4:
            for copy in (None, weight):
                before = randn(rows, outputs, like=like)
                residual = before.clone()
                left = gemm_w4.w4_matmul_onto(x, packed, scales, zero, group, residual, b, order, copy)
                assert left is None or torch.equal(residual, before)
                assert error(residual.double() if left is None else residual.double() + left, before.double() + want) < 2 * limit
        twin = ref.w4_matmul if bits == 4 else ref.w8_matmul
        assert error(twin(x, own(codes), scales, zero, group, b, order), want) < 2 * limit
    assert got.dtype == like.dtype
    assert error(got, want) < limit
    assert not bool(gemm_w4.counters(like.device).any())


def check_fp8(like: Tensor, rows: int, outputs: int, inputs: int, *, static: bool = False, bias: bool = False,
              tile: gemm_w4.Tile | None = None) -> None:
    """A product of rows and outputs that are scaled each, by the given tile or as the op chooses."""
    x, b = randn(rows, inputs + 16, like=like)[:, :inputs], randn(outputs, like=like) if bias else None
    weight, weight_scale = ref.fp8_quantize(randn(outputs, inputs, like=like.float()))
    weight_scale = weight_scale.flatten()
    scale = torch.tensor([0.01], device=like.device) if static else None
    codes, scales = quantize.fp8_quantize(x, scale)
    want, want_scales = ref.fp8_quantize(x, scale)
    torch.testing.assert_close(scales, want_scales.expand(rows, 1))
    torch.testing.assert_close(codes.float(), want.float(), rtol=FP8_STEP, atol=2**-9)
    exact = (codes.double() * scales.double()) @ (weight.double() * weight_scale.double()[:, None]).t()
    exact += 0 if b is None else b.double()
    if tile is not None:
        got = gemm_fp8._product(codes, scales, weight, weight_scale, b, like.dtype, False, tile)
    else:
        got = gemm_fp8.fp8_matmul(x, weight, weight_scale, scale, b)
    assert got.dtype == like.dtype
    assert error(got, exact) < 2 * ROUNDING[like.dtype]


def check_gated(like: Tensor, rows: int, outputs: int, inputs: int, group: int) -> None:
    """The gated activation of a product, as the op chooses, with a column order."""
    codes, scales, zero, exact = integer_layer(like, 4, outputs, inputs, group, "whole")
    x, order = randn(rows, inputs, like=like), torch.randperm(inputs, device=like.device).int()
    want = ref.gated_act((x[:, order.long()].double() @ exact.t()).to(like.dtype), "silu").double()
    args = x, gemm_w4.w4_pack(codes), scales, zero, group, "silu", None, order
    assert error(gemm_w4.w4_gated_matmul(*args, None), want) < 2 * ROUNDING[like.dtype]
    unpacked = gemm_w4.w4_weight(*args[1:5], order, inputs)
    assert error(gemm_w4.w4_gated_matmul(*args, unpacked), want) < 3 * ROUNDING[like.dtype]
    twin = ref.w4_gated_matmul(x, ref.w4_pack(codes), *args[2:])
    assert error(twin, want) < 3 * ROUNDING[like.dtype]


def check_few_w4(kernels: ModuleType, like: Tensor, rows: int, outputs: int, inputs: int, group: int, tile: gemm_few.Tile, *,
                 zeros: str = "whole", bias: bool = False, activation: str = "") -> None:
    """A product of few rows by a tile of kernels.gemm_few, or of that module interpreted."""
    codes, scales, zero, exact = integer_layer(like, 4, outputs, inputs, group, zeros)
    x, b = randn(rows, inputs + 16, like=like)[:, :inputs], randn(outputs, like=like) if bias else None
    got = kernels.w4_product(x, gemm_w4.w4_pack(codes), scales, zero, group, b, tile, activation)
    want = x.double() @ exact.t() + (0 if b is None else b.double())
    want = ref.gated_act(want.to(like.dtype), activation).double() if activation else want
    assert got.dtype == like.dtype
    assert error(got, want) < ROUNDING[like.dtype] * (1 if zeros != "broken" and not activation else 2)


def check_few_fp8(kernels: ModuleType, like: Tensor, rows: int, outputs: int, inputs: int, tile: gemm_few.Tile, *,
                  bias: bool = False, blocks: bool = False, activation: str = "") -> None:
    """Likewise of e4m3 numbers, with scales of rows and outputs or of blocks."""
    def codes(*shape: int) -> Tensor:
        return randn(*shape, like=like.float()).mul(100).clamp(-ref.E4M3_MAX, ref.E4M3_MAX).to(torch.float8_e4m3fn)

    x, weight, b = codes(rows, inputs), codes(outputs, inputs), randn(outputs, like=like) if bias else None
    sizes = ((rows, inputs // FP8_BLOCK), (outputs // FP8_BLOCK, inputs // FP8_BLOCK)) if blocks else ((rows,), (outputs,))
    x_scale, weight_scale = (torch.rand(size, device=like.device) * 1e-2 + 1e-3 for size in sizes)
    got = kernels.fp8_product(x, x_scale, weight, weight_scale, b, like.dtype, blocks, tile, activation)
    if blocks:
        x_scale = x_scale.repeat_interleave(FP8_BLOCK, 1)
        weight_scale = weight_scale.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
    else:
        x_scale, weight_scale = x_scale[:, None], weight_scale[:, None]
    exact = (x.double() * x_scale.double()) @ (weight.double() * weight_scale.double()).t() + (0 if b is None else b.double())
    if activation:
        exact = ref.gated_act(exact.to(like.dtype), activation).double()
    assert got.dtype == like.dtype
    assert error(got, exact) < ROUNDING[like.dtype] * (2 if activation else 1)


def check_fp8_gated(like: Tensor, rows: int, outputs: int, inputs: int, static: bool = False) -> None:
    """The op against the kernels that it stands for."""
    codes, scales = quantize.fp8_quantize(randn(rows, inputs, like=like))
    weight, weight_scale = ref.fp8_quantize(randn(outputs, inputs, like=like) / inputs**0.5)
    scale = torch.tensor([0.02], device=like.device) if static else None
    for activation in ("silu", "gelu_tanh"):
        parts = codes, scales, weight, weight_scale.flatten(), randn(outputs, like=like), like.dtype
        got, got_scales = gemm_fp8.fp8_gated_product(*parts, activation, scale)
        want, want_scales = ref.fp8_gated_product(*parts, activation, scale)
        off = (got.float() * got_scales - want.float() * want_scales).double()
        assert got.shape == (rows, outputs // 2)
        assert float(off.norm() / (want.double() * want_scales.double()).norm()) < 0.03


def check_fp8_blocks(like: Tensor, rows: int, outputs: int, inputs: int) -> None:
    x, weight = randn(rows, inputs, like=like), randn(outputs, inputs, like=like.float())
    scale = weight.view(outputs // 128, 128, inputs // 128, 128).abs().amax((1, 3)) / ref.E4M3_MAX
    spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    weight = (weight / spread).to(torch.float8_e4m3fn)
    codes, scales = quantize.quantize_blocks(x, FP8_BLOCK)
    want, want_scales = ref.fp8_quantize(x.reshape(-1, 128))
    torch.testing.assert_close(scales.view(-1, 1), want_scales)
    torch.testing.assert_close(codes.float().view(-1, 128), want.float(), rtol=FP8_STEP, atol=2**-9)
    exact = (codes.double() * scales.double().repeat_interleave(128, 1)) @ (weight.double() * spread.double()).t()
    assert error(gemm_fp8.fp8_block_matmul(x, weight, scale, None), exact) < 2 * ROUNDING[like.dtype]


def check_fused_quantization(like: Tensor, rows: int, width: int, static: bool) -> None:
    """The norm and the activation give the codes of their own kernels followed by that of the quantisation."""
    scale = torch.tensor([0.02], device=like.device) if static else None
    x, residual, weight = randn(rows, 2 * width, like=like)[:, :width], randn(rows, width, like=like), randn(width, like=like)
    for plus_one in (False, True):
        summed = residual.clone()
        codes, scales = quantize.add_rms_norm_fp8(x, summed, weight, 1e-5, plus_one, scale)
        apart = residual.clone()
        want, want_scales = quantize.fp8_quantize(pointwise.add_rms_norm(x, apart, weight, 1e-5, plus_one), scale)
        assert torch.equal(summed, apart)
        _same_but_for_last_bits(codes, scales, want, want_scales)
    x = randn(rows, 2 * width, like=like)
    for activation in ("silu", "gelu_tanh"):
        codes, scales = quantize.gated_act_fp8(x, activation, scale)
        want, want_scales = quantize.fp8_quantize(pointwise.gated_act(x, activation), scale)
        _same_but_for_last_bits(codes, scales, want, want_scales)


def _same_but_for_last_bits(codes: Tensor, scales: Tensor, want: Tensor, want_scales: Tensor) -> None:
    """Two kernels may sum a row in another order: then a few values are rounded to the neighbouring code, and no further."""
    got, expected = codes.float() * scales, want.float() * want_scales
    off = (got - expected).abs()
    assert (off <= 0.13 * expected.abs() + 2**-8 * want_scales).all()
    assert (off > 0.01 * expected.abs() + 2**-12 * want_scales).float().mean() < 1e-3
