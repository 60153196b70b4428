"""The only door to the kernels: a function an op, Triton or Gluon on CUDA, else the torch twin. The contracts stand in ref.py."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import ModuleType

import torch
from torch import Tensor

from kernels import ref

ahead: ModuleType = ref
automaton: ModuleType = ref
chain: ModuleType = ref
decode_step: ModuleType = ref
dequantize: ModuleType = ref
gemm_fp8: ModuleType = ref
gemm_w4: ModuleType = ref
kv_cache: ModuleType = ref
prefill: ModuleType = ref
dense: ModuleType = ref
pointwise: ModuleType = ref
quantize: ModuleType = ref
sampling: ModuleType = ref
step: ModuleType = ref
if torch.cuda.is_available():
    from kernels import (
        ahead,
        automaton,
        chain,
        decode_step,
        dequantize,
        gemm_fp8,
        gemm_w4,
        kv_cache,
        pointwise,
        quantize,
        step,
    )
    from kernels import linear as dense
    from kernels import prefill_hopper as prefill
    from kernels import sample as sampling

QUERY_TILE = ref.QUERY_TILE
PREFIX_TILE = ref.PREFIX_TILE
E4M3_MAX = ref.E4M3_MAX


def compiling() -> AbstractContextManager[None]:
    """Within, kernels that are launched are compiled, many at a time, and do not run; torch's own run on what they leave."""
    context: AbstractContextManager[None] = ahead.compiling()
    return context


def apply_writes(state: Tensor, packed: Tensor, segments: Tensor) -> None:
    (step if state.is_cuda else ref).apply_writes(state, packed, segments)


def expand(tokens: Tensor, block_table: Tensor, rows: Tensor, starts: Tensor, cu_q: Tensor, max_q: int, page_size: int,
           ids: Tensor, positions: Tensor, slots: Tensor) -> None:
    (step if tokens.is_cuda else ref).expand(tokens, block_table, rows, starts, cu_q, max_q, page_size, ids, positions, slots)


def commit(tokens: Tensor, rows: Tensor, positions: Tensor, sampled: Tensor, out: Tensor) -> None:
    (step if tokens.is_cuda else ref).commit(tokens, rows, positions, sampled, out)


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool = False) -> Tensor:
    return (pointwise if x.is_cuda else ref).rms_norm(x, weight, eps, plus_one)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, plus_one: bool = False) -> Tensor:
    return (pointwise if x.is_cuda else ref).add_rms_norm(x, residual, weight, eps, plus_one)


def gated_act(x: Tensor, activation: str) -> Tensor:
    return (pointwise if x.is_cuda else ref).gated_act(x, activation)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    return (dense if x.is_cuda else ref).linear(x, weight, bias, out)


def linear_onto(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor | None:
    return (dense if x.is_cuda else ref).linear_onto(x, weight, bias, residual)


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return (dense if x.is_cuda else ref).gated_linear(x, weight, bias, activation)


def between(h: Tensor, residual: Tensor, o: Tensor, mlp_norm: Tensor, gate_up: Tensor, down: Tensor, norm: Tensor,
            qkv: Tensor | None, eps: float, plus_one: bool, activation: str) -> Tensor | None:
    return (chain if h.is_cuda else ref).between(h, residual, o, mlp_norm, gate_up, down, norm, qkv, eps, plus_one, activation)


def rope_and_cache(qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, plus_one: bool, cos_sin: Tensor,
                   positions: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor, num_heads: int,
                   kv_scales: Tensor | None = None, k_shift: Tensor | None = None) -> Tensor:
    return (kv_cache if qkv.is_cuda else ref).rope_and_cache(
        qkv, q_weight, k_weight, eps, plus_one, cos_sin, positions, slots, k_cache, v_cache, num_heads, kv_scales, k_shift)


def w4_pack(codes: Tensor) -> Tensor:
    return (gemm_w4 if codes.is_cuda else ref).w4_pack(codes)


def w8_pack(codes: Tensor) -> Tensor:
    return (gemm_w4 if codes.is_cuda else ref).w8_pack(codes)


def dequantize_symmetric(codes: Tensor, scales: Tensor, group: int) -> Tensor:
    return (dequantize if codes.is_cuda else ref).dequantize_symmetric(codes, scales, group)


def w4_matmul(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, group: int, bias: Tensor | None = None,
              perm: Tensor | None = None, unpacked: Tensor | None = None) -> Tensor:
    return (gemm_w4 if x.is_cuda else ref).w4_matmul(x, packed, scales, zeros, group, bias, perm, unpacked)


def w4_matmul_onto(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, group: int, residual: Tensor,
                   bias: Tensor | None = None, perm: Tensor | None = None, unpacked: Tensor | None = None) -> Tensor | None:
    return (gemm_w4 if x.is_cuda else ref).w4_matmul_onto(
        x, packed, scales, zeros, group, residual, bias, perm, unpacked)


def w4_gated_matmul(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, group: int, activation: str,
                    bias: Tensor | None = None, perm: Tensor | None = None, unpacked: Tensor | None = None) -> Tensor:
    return (gemm_w4 if x.is_cuda else ref).w4_gated_matmul(
        x, packed, scales, zeros, group, activation, bias, perm, unpacked)


def w8_matmul(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, group: int, bias: Tensor | None = None,
              perm: Tensor | None = None, unpacked: Tensor | None = None) -> Tensor:
    return (gemm_w4 if x.is_cuda else ref).w8_matmul(x, packed, scales, zeros, group, bias, perm, unpacked)


def w4_weight(packed: Tensor, scales: Tensor, zeros: Tensor | None, group: int, perm: Tensor | None, width: int) -> Tensor:
    return (gemm_w4 if packed.is_cuda else ref).w4_weight(packed, scales, zeros, group, perm, width)


def w8_weight(packed: Tensor, scales: Tensor, zeros: Tensor | None, group: int, perm: Tensor | None, width: int) -> Tensor:
    return (gemm_w4 if packed.is_cuda else ref).w8_weight(packed, scales, zeros, group, perm, width)


def fp8_quantize(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return (quantize if x.is_cuda else ref).fp8_quantize(x, scale)


def add_rms_norm_fp8(x: Tensor, residual: Tensor, weight: Tensor, eps: float, plus_one: bool,
                     scale: Tensor | None) -> tuple[Tensor, Tensor]:
    return (quantize if x.is_cuda else ref).add_rms_norm_fp8(x, residual, weight, eps, plus_one, scale)


def gated_act_fp8(x: Tensor, activation: str, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    return (quantize if x.is_cuda else ref).gated_act_fp8(x, activation, scale)


def fp8_product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None,
                dtype: torch.dtype) -> Tensor:
    return (gemm_fp8 if x.is_cuda else ref).fp8_product(x, x_scale, weight, weight_scale, bias, dtype)


def fp8_gated_product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype,
                      activation: str, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    return (gemm_fp8 if x.is_cuda else ref).fp8_gated_product(
        x, x_scale, weight, weight_scale, bias, dtype, activation, scale)


def fp8_matmul(x: Tensor, weight: Tensor, weight_scale: Tensor, input_scale: Tensor | None = None,
               bias: Tensor | None = None) -> Tensor:
    return (gemm_fp8 if x.is_cuda else ref).fp8_matmul(x, weight, weight_scale, input_scale, bias)


def fp8_block_matmul(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return (gemm_fp8 if x.is_cuda else ref).fp8_block_matmul(x, weight, weight_scale, bias)


def copy_pages(storage: Tensor, pages: Tensor) -> None:
    (kv_cache if storage.is_cuda else ref).copy_pages(storage, pages)


def rope_and_decode(qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, plus_one: bool, cos_sin: Tensor,
                    positions: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor, num_heads: int, block_table: Tensor,
                    rows: Tensor, scale: float, window: int, softcap: float, max_context: int,
                    kv_scales: Tensor | None = None, k_shift: Tensor | None = None, shared: Tensor | None = None,
                    prefix_tiles: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    return (decode_step if qkv.is_cuda else ref).rope_and_decode(
        qkv, q_weight, k_weight, eps, plus_one, cos_sin, positions, slots, k_cache, v_cache, num_heads, block_table, rows, scale,
        window, softcap, max_context, kv_scales, k_shift, shared, prefix_tiles, out)


def prefill_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, rows: Tensor, starts: Tensor,
                      cu_q: Tensor, tiles: Tensor, scale: float, window: int, softcap: float,
                      out: Tensor | None = None, kv_scales: Tensor | None = None) -> Tensor:
    return (prefill if q.is_cuda else ref).prefill_attention(
        q, k_cache, v_cache, block_table, rows, starts, cu_q, tiles, scale, window, softcap, out, kv_scales)


def mask_logits(logits: Tensor, mask: Tensor, index: Tensor) -> None:
    (sampling if logits.is_cuda else ref).mask_logits(logits, mask, index)


def sample(logits: Tensor, params: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    return (sampling if logits.is_cuda else ref).sample(logits, params, rows, positions)


def mask_by_state(logits: Tensor, states: Tensor, rows: Tensor, table: Tensor, masks: Tensor) -> None:
    (automaton if logits.is_cuda else ref).mask_by_state(logits, states, rows, table, masks)


def advance(states: Tensor, rows: Tensor, sampled: Tensor, table: Tensor, next: Tensor, classes: Tensor) -> None:
    (automaton if states.is_cuda else ref).advance(states, rows, sampled, table, next, classes)


def apply_penalties(logits: Tensor, index: Tensor, tokens: Tensor, rows: Tensor, prompt_len: Tensor, length: Tensor,
                    repetition: Tensor, presence: Tensor, frequency: Tensor) -> None:
    ref.apply_penalties(logits, index, tokens, rows, prompt_len, length, repetition, presence, frequency)


def logprobs(logits: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    return ref.logprobs(logits, tokens, k)
