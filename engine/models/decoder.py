"""The one Decoder: Llama, Mistral, Qwen2, Qwen3 and Gemma 3 differ by their ModelSpec, resolved here when the model is built."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from engine.layers.attention import Attention, KVCache, LayerCache, StepInputs
from engine.layers.embedding import Embedding
from engine.layers.kv_scales import KVScales
from engine.layers.linear import Joined, Linear, MethodOf
from engine.layers.mlp import MLP
from engine.layers.norm import RMSNorm
from engine.layers.quantized import linear_methods
from engine.layers.rope import cos_sin_table
from engine.models.spec import ModelSpec
from kernels import ops

if TYPE_CHECKING:
    from engine.weights import Checkpoint


class Block(nn.Module):
    """Pre-norm block; the residual stream is carried beside x, so that each addition fuses with the norm that follows it, or with
    the product before."""

    def __init__(self, spec: ModelSpec, index: int, method_of: MethodOf, dtype: torch.dtype) -> None:
        super().__init__()
        prefix = f"model.layers.{index}"

        def norm(name: str) -> RMSNorm:
            return RMSNorm(spec.hidden_size, f"{prefix}.{name}", eps=spec.norm_eps, plus_one=spec.norm_plus_one, dtype=dtype)

        self.attention = Attention(spec, index, f"{prefix}.self_attn", method_of, dtype)
        self.mlp = MLP(spec, f"{prefix}.mlp", method_of, dtype)
        self.input_norm = norm("input_layernorm")
        if spec.sandwich_norms:
            self.attention_out: RMSNorm | None = norm("post_attention_layernorm")
            self.mlp_norm = norm("pre_feedforward_layernorm")
            self.mlp_out: RMSNorm | None = norm("post_feedforward_layernorm")
        else:
            self.attention_out = self.mlp_out = None
            self.mlp_norm = norm("post_attention_layernorm")

    def forward(self, h: Tensor, residual: Tensor, norm: RMSNorm, qkv: Linear | Joined | None) -> Tensor:
        """h: what the attention's heads have made. Updates the residual in place; what `qkv`, the next block's, makes of its
        `norm`, or without one that norm."""
        after = self._in_one(h, residual, norm, qkv)
        if after is not None:
            return after
        left = self.onto(h, residual)
        return norm.add(left, residual) if qkv is None else qkv.after_norm(left, residual, norm)

    def onto(self, h: Tensor, residual: Tensor) -> Tensor | None:
        """What is left to be added to the residual, after which the block is done; None: it has been."""
        project, mlp = self.attention.out, self.mlp
        left = project.onto(h, residual) if self.attention_out is None else self.attention_out(project(h))
        if self.mlp_out is None:
            return mlp.onto(left, residual, self.mlp_norm)
        return self.mlp_out(mlp(left, residual, self.mlp_norm))

    def _in_one(self, h: Tensor, residual: Tensor, norm: RMSNorm, qkv: Linear | Joined | None) -> Tensor | None:
        """The same by ops.between; None: nothing was done, as it is not for these layers, or not for so many rows."""
        o, gate_up, down = self.attention.out.plain, self.mlp.gate_up.plain, self.mlp.down.plain
        into = None if qkv is None else qkv.plain
        if self.mlp_out is not None or o is None or gate_up is None or down is None or (into is None) != (qkv is None):
            return None
        return ops.between(h, residual, o, self.mlp_norm.weight, gate_up, down, norm.weight, into, norm.eps, norm.plus_one,
                           self.mlp.activation)


class Decoder(nn.Module):
    """`quantization`: what becomes of linear layers' weights, see linear_methods. `fp8_kv`: keys and values are kept as e4m3."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, max_positions: int, device: torch.device,
                 quantization: str = "stored", fp8_kv: bool = False) -> None:
        super().__init__()
        method_of = linear_methods(spec, quantization, device)
        self.spec, self.dtype = spec, dtype
        with torch.device(device):
            self.embedding = Embedding(spec.vocab_size, spec.hidden_size, "model.embed_tokens", scale=spec.embed_scale,
                                       dtype=dtype)
            self.blocks = nn.ModuleList(Block(spec, i, method_of, dtype) for i in range(spec.num_layers))
            self.norm = RMSNorm(spec.hidden_size, "model.norm", eps=spec.norm_eps, plus_one=spec.norm_plus_one, dtype=dtype)
            self.head = self.embedding if spec.tied_embeddings else Embedding(
                spec.vocab_size, spec.hidden_size, "lm_head", scale=1.0, dtype=dtype)
            tables = {rope: cos_sin_table(rope, max_positions, device) for rope in {layer.rope for layer in spec.layers}}
            self.cos_sin = [tables[layer.rope] for layer in spec.layers]
            self.kv_scales = nn.ModuleList(KVScales(spec, f"model.layers.{i}.self_attn", cos_sin)
                                           for i, cos_sin in enumerate(self.cos_sin) if fp8_kv)
        self.kv_dtype = torch.float8_e4m3fn if fp8_kv else dtype
        self._running: Sequence[int] = range(spec.num_layers)

    def load(self, checkpoint: Checkpoint) -> None:
        """Fill every weight from the checkpoint; raises KeyError or ValueError naming a tensor that is missing or misshapen."""
        for module in self.modules():
            if isinstance(module, (Embedding, Linear, RMSNorm, KVScales)):
                module.load(checkpoint)

    def make_cache(self, pages: int, page_size: int) -> KVCache:
        """Room for the keys and values of so many pages."""
        scales = [(layer.scales, layer.k_shift) for layer in self.kv_scales if isinstance(layer, KVScales)]
        return KVCache(self.spec, pages, page_size, self.kv_dtype, self.embedding.weight.device, scales)

    def weight_bytes(self) -> int:
        """Memory of the weights as they are kept."""
        return sum(tensor.nbytes for module in self.modules() if isinstance(module, (Embedding, Linear, RMSNorm, KVScales))
                   for tensor in module.buffers(recurse=False))

    def unpack(self, limit: float) -> None:
        """Keep packed weights unpacked too, of the first layers that take no more than so many bytes."""
        for layer in self.modules():
            if isinstance(layer, Linear) and layer.method.packs:
                limit -= layer.in_features * layer.out_features * layer.dtype.itemsize
                if limit < 0:
                    return
                layer.keep_unpacked()

    def unpacked_bytes(self) -> int:
        """Memory of the copies that unpack() has made."""
        layers = [module for module in self.modules() if isinstance(module, Linear)]
        return sum(layer.unpacked.nbytes for layer in layers if layer.unpacked is not None)

    def token_flops(self) -> int:
        """Of the products that every token goes through."""
        return sum(2 * module.in_features * module.out_features for module in self.modules() if isinstance(module, Linear))

    def forward(self, step: StepInputs, caches: Sequence[LayerCache]) -> Tensor:
        """-> hidden states after the last norm, [S, hidden_size] of step.ends, else [T, hidden_size].

        In the last block the other tokens need no more than their keys and values: of a prompt, nearly a layer is saved.
        """
        residual, blocks = self.embedding(step.ids), cast("Sequence[Block]", self.blocks)
        qkv = blocks[0].attention.qkv.after_norm(None, residual, blocks[0].input_norm)
        *others, last = self._running
        for i in others:
            h, following = blocks[i].attention(qkv, step, caches[i], self.cos_sin[i]), blocks[i + 1]
            qkv = blocks[i](h, residual, following.input_norm, following.attention.qkv)
        h = blocks[last].attention(qkv, step, caches[last], self.cos_sin[last])
        if step.ends is not None:
            h, residual = h.index_select(0, step.ends), residual.index_select(0, step.ends)
        hidden: Tensor = blocks[last](h, residual, self.norm, None)
        return hidden

    @contextmanager
    def one_block_of_each_kind(self) -> Iterator[None]:
        """Within, one block of each kind runs, and the last: they launch every kernel that all of them do.

        A block makes the product that the next one begins with.
        """
        kinds: dict[object, int] = {}
        blocks = cast("Sequence[Block]", self.blocks)
        for i, block in enumerate(blocks):
            products = [block, *(following.attention.qkv for following in blocks[i + 1 : i + 2])]
            linears = tuple((layer.method, layer.in_features, layer.out_features, layer.unpacked is None)
                            for module in products for layer in module.modules() if isinstance(layer, Linear))
            kinds.setdefault((self.spec.layers[i], linears), i)
        self._running = sorted({*kinds.values(), len(self.blocks) - 1})
        try:
            yield
        finally:
            self._running = range(len(self.blocks))

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """[N, hidden_size] -> [N, vocab_size]; into `out` if given."""
        logits = self.head.logits(hidden, out)
        cap = self.spec.logit_softcap
        return logits.div_(cap).tanh_().mul_(cap) if cap else logits
