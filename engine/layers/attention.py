"""Attention over the paged cache. A step's tokens stand as [decode | rest]: one query a row first, then rows with several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.layers.linear import Linear, MethodOf, make_linear
from engine.layers.norm import RMSNorm
from engine.models.spec import ModelSpec
from kernels import ops

# What ops.rope_and_cache and rope_and_decode begin with: the projection, norms of queries and keys, where tokens are and go.
RopeInputs = tuple[Tensor, Tensor | None, Tensor | None, float, bool, Tensor, Tensor, Tensor, Tensor, Tensor, int]


@dataclass(slots=True)
class StepInputs:
    """What a forward pass reads besides the weights; int32 tensors on the device. T = num_decode + the rest's queries."""

    ids: Tensor                # [T]
    positions: Tensor          # [T]
    slots: Tensor              # [T] slot of the KV cache that the token writes
    block_table: Tensor        # [rows of the table, pages of a row]
    decode_rows: Tensor        # [num_decode]
    num_decode: int
    max_context: int           # upper bound of a decode row's context, in tokens
    shared: Tensor | None = None         # [num_decode] tokens of the prefix that the row shares with its neighbours ...
    prefix_tiles: Tensor | None = None   # ... [M, 2] and the tiles of rows that share one; see ref.decode_attention
    rest_rows: Tensor | None = None      # [N]
    rest_starts: Tensor | None = None    # [N] first position of the row's queries
    rest_cu_q: Tensor | None = None      # [N + 1] where the row's queries stand among the rest's
    tiles: Tensor | None = None          # [M, 2] work list of ops.prefill_attention
    ends: Tensor | None = None           # [S] the tokens whose hidden states are wanted; None: all


@dataclass(slots=True)
class LayerCache:
    """Keys and values of one layer, [pages, kv heads, page size, head dim] each; as FP8, over `scales` [2, kv heads], and keys
    less `k_shift` [kv heads, head dim]."""

    k: Tensor
    v: Tensor
    scales: Tensor | None = None
    k_shift: Tensor | None = None


class KVCache:
    """All layers' keys and values in one tensor, [2 layers, pages, kv heads, page size, head dim]: one launch copies a page.

    Zeroed, since masked slots are multiplied too, and 0 x NaN is NaN.
    """

    def __init__(self, spec: ModelSpec, pages: int, page_size: int, dtype: torch.dtype, device: torch.device,
                 scales: Sequence[tuple[Tensor, Tensor | None]] = ()) -> None:
        shape = (2 * spec.num_layers, pages, spec.num_kv_heads, page_size, spec.head_dim)
        self.storage = torch.zeros(shape, dtype=dtype, device=device)
        pairs = self.storage.view(-1, 2, *shape[1:])
        self.layers = [LayerCache(k, v, *(scales[i] if scales else ())) for i, (k, v) in enumerate(pairs)]


class Attention(nn.Module):
    def __init__(self, spec: ModelSpec, index: int, prefix: str, method_of: MethodOf, dtype: torch.dtype) -> None:
        super().__init__()
        heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        self.num_heads, self.scale, self.softcap = heads, spec.attn_scale, spec.attn_softcap
        self.window, self.eps, self.plus_one = spec.layers[index].window, spec.norm_eps, spec.norm_plus_one
        parts = [(f"{prefix}.q_proj", heads * dim), (f"{prefix}.k_proj", kv_heads * dim), (f"{prefix}.v_proj", kv_heads * dim)]
        self.qkv = make_linear(spec.hidden_size, parts, bias=spec.qkv_bias, dtype=dtype, method_of=method_of)
        out = f"{prefix}.o_proj"
        self.out = Linear(heads * dim, [(out, spec.hidden_size)], bias=spec.o_bias, dtype=dtype, method=method_of(out))
        if spec.qk_norm:
            self.q_norm: RMSNorm | None = RMSNorm(dim, f"{prefix}.q_norm", eps=self.eps, plus_one=self.plus_one, dtype=dtype)
            self.k_norm: RMSNorm | None = RMSNorm(dim, f"{prefix}.k_norm", eps=self.eps, plus_one=self.plus_one, dtype=dtype)
        else:
            self.q_norm = self.k_norm = None

    def forward(self, qkv: Tensor, step: StepInputs, cache: LayerCache, cos_sin: Tensor) -> Tensor:
        """What the heads make of self.qkv's product, [T, heads * head dim], for `out` to project."""
        n, out = step.num_decode, qkv.new_empty(qkv.shape[0], self.num_heads, cache.k.shape[-1])
        # Neither part reads what the other one writes in this step.
        if n:
            ops.rope_and_decode(*self._rope(qkv[:n], step.positions[:n], step.slots[:n], cache, cos_sin), step.block_table,
                                step.decode_rows, self.scale, self.window, self.softcap, step.max_context, cache.scales,
                                cache.k_shift, step.shared, step.prefix_tiles, out[:n])
        if (step.rest_rows is not None and step.rest_starts is not None and step.rest_cu_q is not None
                and step.tiles is not None):
            q = ops.rope_and_cache(*self._rope(qkv[n:], step.positions[n:], step.slots[n:], cache, cos_sin), cache.scales,
                                   cache.k_shift)
            ops.prefill_attention(q, cache.k, cache.v, step.block_table, step.rest_rows, step.rest_starts, step.rest_cu_q,
                                  step.tiles, self.scale, self.window, self.softcap, out[n:], cache.scales)
        return out.flatten(1)

    def _rope(self, qkv: Tensor, positions: Tensor, slots: Tensor, cache: LayerCache, cos_sin: Tensor) -> RopeInputs:
        q_weight = self.q_norm.weight if self.q_norm is not None else None
        k_weight = self.k_norm.weight if self.k_norm is not None else None
        return (qkv, q_weight, k_weight, self.eps, self.plus_one, cos_sin, positions, slots, cache.k, cache.v, self.num_heads)
