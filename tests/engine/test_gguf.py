"""GGUF: every storage type against the gguf package, tiny models as a converter writes them, SmolLM2 as transformers reads it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine_cases import full_logits, load_decoder
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize as reference_dequantize
from gguf.quants import quantize
from models import load_reference, real_model, tiny_checkpoint

from engine.gguf import GgufFile
from engine.gguf_quants import BLOCK_TYPES, dequantize
from engine.layers.gguf import GgufMethod
from engine.layers.linear import DenseMethod, Linear
from engine.layers.quantized import linear_methods
from engine.models import decoder
from engine.models.quantization import GGUF_KEPT
from engine.models.spec import ModelError
from engine.weights import Checkpoint, open_checkpoint

NUMBERS = {kind.name: number for number, kind in BLOCK_TYPES.items()}
PACKED = [kind.name for kind in BLOCK_TYPES.values() if kind.unpack]
# Where a block keeps its half-precision scales; random bits there would make infinities.
HALVES = {"Q6_K": [208], "Q4_0": [0], "Q5_0": [0], "Q8_0": [0]}
META = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3"}


@pytest.mark.parametrize("name", PACKED)
def test_blocks_unpack_as_the_reference_does(name):
    kind, rng = BLOCK_TYPES[NUMBERS[name]], np.random.default_rng(0)
    blocks = rng.integers(0, 256, size=(6 << 17 >> 8, kind.bytes), dtype=np.uint8)      # several chunks
    for at in HALVES.get(name, [0, 2]):
        blocks[:, at:at + 2] = rng.normal(size=(len(blocks), 1)).astype(np.float16).view(np.uint8)
    got = dequantize(torch.from_numpy(blocks.reshape(-1)), kind, (len(blocks), kind.weights))
    expected = reference_dequantize(blocks, GGMLQuantizationType(NUMBERS[name]))
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(got.numpy(), expected)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantized_values_stay_close(name):
    values = np.random.default_rng(1).normal(size=(4, 256)).astype(np.float32)
    packed = quantize(values, GGMLQuantizationType(NUMBERS[name]))
    got = dequantize(torch.from_numpy(packed.reshape(-1)), BLOCK_TYPES[NUMBERS[name]], (4, 256)).numpy()
    assert np.abs(got - values).max() < {"4": 0.3, "5": 0.15, "8": 0.02}[name[1]]


def test_q4_0_by_hand():
    # Scale 0.5; byte j holds weight j in its low half and weight j + 16 in its high half, each plus 8.
    scale, low = np.array([0.5], np.float16).view(np.uint8), np.arange(16, dtype=np.uint8)
    got = dequantize(torch.from_numpy(np.concatenate([scale, low | (15 - low) << 4])), BLOCK_TYPES[2], (32,))
    assert got.tolist() == [0.5 * (j - 8) for j in range(16)] + [0.5 * (7 - j) for j in range(16)]


def test_q6_k_by_hand():
    block = np.zeros(210, np.uint8)
    block[192:208] = np.arange(16)                                    # scale of each 16 weights
    block[208:210] = np.array([2.0], np.float16).view(np.uint8)
    block[0], block[128] = 0x5A, 0b11_10_01_00                        # low and high bits of weights 0, 32, 64 and 96
    got = dequantize(torch.from_numpy(block), BLOCK_TYPES[14], (256,))
    assert got[0] == 2.0 * 0 * (0xA - 32)
    assert got[32] == 2.0 * 2 * (0x10 - 32)                           # low half of byte 32 is 0, high bits 01
    assert got[64] == 2.0 * 4 * (0x25 - 32)                           # high half of byte 0 is 5, high bits 10
    assert got[96] == 2.0 * 6 * (0x30 - 32)
    assert got[255] == 2.0 * 15 * -32


def write_gguf(checkpoint: Checkpoint, path, tensor_type="F32", rope_factors=None, **extra) -> None:
    """Write a checkpoint as llama.cpp's converter does: its names, permuted llama queries and keys, Gemma's norms plus 1.

    `tensor_type`: of all matrices, or a function from the file's names to it. `extra`: more metadata, or other (None: none), with
    `__` for dots in the keys.
    """
    spec, arch = checkpoint.spec, META[checkpoint.spec.family]
    writer = GGUFWriter(path, arch)
    writer.add_block_count(spec.num_layers)
    writer.add_context_length(spec.max_positions)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_rope_freq_base(spec.layers[-1].rope.theta)
    writer.add_file_type(LlamaFileType.ALL_F32)
    if window := max(layer.window for layer in spec.layers):
        writer.add_sliding_window(window)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "<|im_end|>", "<|endoftext|>", "b"])
    writer.add_token_types([1, 3, 3, 1])
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(0)
    for key, value in extra.items():
        writer.kv_data[0].pop(name := key.replace("__", "."), None)
        if value is not None:
            writer.add_key_value(name, value, GGUFValueType.get_type(value))
    names = {
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        "post_attention_layernorm": "post_attention_norm" if arch == "gemma3" else "ffn_norm",
        "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm"}
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
           "lm_head.weight": "output.weight"}
    for name in sorted(checkpoint.names()):
        weight = checkpoint.tensor(name).numpy()
        if name not in top:
            _, _, layer, module = name.split(".", 3)
            module, suffix = module.rsplit(".", 1)
            if arch == "llama" and module in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = spec.num_heads if "q_proj" in module else spec.num_kv_heads
                weight = weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)
            stored = f"blk.{layer}.{names[module]}.{suffix}"
        else:
            stored = top[name]
        if arch == "gemma3" and name.endswith("norm.weight"):
            weight = weight + 1
        wanted = tensor_type(stored) if callable(tensor_type) else tensor_type
        if wanted != "F32" and weight.ndim == 2:
            kind = GGMLQuantizationType[wanted]
            writer.add_tensor(stored, quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, weight)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(rope_factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("family", ["llama", "llama-bias", "mistral", "qwen2", "qwen3", "gemma3"])
def test_tiny_models_come_back(family, tmp_path):
    more = {"query_pre_attn_scalar": 32} if family == "gemma3" else {}      # GGUF cannot say otherwise
    original = open_checkpoint(tiny_checkpoint(family, tmp_path, **more))
    path = tmp_path / "model.gguf"
    write_gguf(original, path, **({"gemma3__attention__sliding_window_pattern": 3} if family == "gemma3" else {}))
    got = open_checkpoint(path)
    assert got.names() == original.names()
    for name in original.names():
        torch.testing.assert_close(got.tensor(name), original.tensor(name), rtol=0, atol=1e-6 if family == "gemma3" else 0)
    differing = {"eos_token_ids", "bos_token_id", "norm_eps"}               # other tokenizer; float32 in the file
    for field in set(original.spec.__slots__) - differing:
        assert getattr(got.spec, field) == getattr(original.spec, field), field
    assert got.spec.eos_token_ids == (2, 1)
    assert open_checkpoint(tmp_path).fingerprint() == got.fingerprint()     # the folder that holds it


@pytest.mark.parametrize("tensor_type", ["F16", "BF16", "Q8_0"])
def test_stored_types(tensor_type, tmp_path):
    original = open_checkpoint(tiny_checkpoint("qwen2", tmp_path))
    write_gguf(original, tmp_path / "model.gguf", tensor_type)
    got, name = open_checkpoint(tmp_path / "model.gguf"), "model.layers.1.mlp.down_proj.weight"
    assert got.tensor(name).dtype == {"F16": torch.float16, "BF16": torch.bfloat16, "Q8_0": torch.float32}[tensor_type]
    assert got.tensor("model.norm.weight").dtype == torch.float32
    torch.testing.assert_close(got.tensor(name).float(), original.tensor(name), rtol=1e-2, atol=1e-2)


def test_rope_factors_are_part_of_the_config(tmp_path):
    factors = [1.0, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0]
    original = open_checkpoint(tiny_checkpoint("llama", tmp_path))
    write_gguf(original, tmp_path / "model.gguf", rope_factors=factors)
    got = open_checkpoint(tmp_path / "model.gguf")
    assert got.names() == original.names()
    plain = original.spec.layers[0].rope.inv_freq()
    torch.testing.assert_close(got.spec.layers[0].rope.inv_freq() * torch.tensor(factors), plain)


def _other_architecture(data: bytes) -> bytes:
    return data.replace(b"llama", b"mamba")


def _cut(data: bytes) -> bytes:
    return data[:-1000]


def _cut_head(data: bytes) -> bytes:
    return data[:200]


def _not_gguf(data: bytes) -> bytes:
    return b"PK\x03\x04" + data[4:]


def _old_version(data: bytes) -> bytes:
    return data[:4] + b"\1" + data[5:]


def _no_embedding(data: bytes) -> bytes:
    return data.replace(b"token_embd.weight", b"token_embd.heights"[:17])


def _other_name(data: bytes) -> bytes:
    return data.replace(b"blk.1.ffn_gate.weight", b"blk.1.ffn_gaze.weight")


@pytest.mark.parametrize(("damage", "says"), [
    (_other_architecture, "architecture 'mamba' is not supported"), (_cut, "cut short or damaged at tensor"),
    (_cut_head, "cut short or damaged"), (_not_gguf, "not a GGUF file"), (_old_version, "GGUF version 1"),
    (_no_embedding, r"has no matrix token_embd\.weight"), (_other_name, r"blk\.1\.ffn_gaze\.weight is not known"),
])
def test_refusals(damage, says, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(open_checkpoint(tiny_checkpoint("llama", tmp_path)), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelError, match=says):
        open_checkpoint(path)


@pytest.mark.parametrize(("extra", "says"), [
    ({"llama__expert_count": 8}, "num_local_experts"), ({"llama__rope__scaling__type": "yarn"}, "yarn"),
    ({"llama__rope__dimension_count": 8}, "rope.dimension_count"), ({"split__count": 3}, "llama-gguf-split"),
])
def test_metadata_refusals(extra, says, tmp_path):
    write_gguf(open_checkpoint(tiny_checkpoint("llama", tmp_path)), tmp_path / "model.gguf", **extra)
    with pytest.raises(ModelError, match=says):
        open_checkpoint(tmp_path / "model.gguf")


@pytest.mark.parametrize(("key", "value", "says"), [
    ("general.architecture", ["llama"], "as general.architecture"), ("general.file_type", [1], "as general.file_type"),
    ("general.alignment", 0, "holds 0 as general.alignment"), ("split.count", "abc", "as split.count"),
    ("llama.embedding_length", "abc", "holds 'abc' as llama.embedding_length"),
    ("llama.embedding_length", None, "has no llama.embedding_length"),
    ("llama.attention.head_count", 0, "holds 0 as llama.attention.head_count"),
    ("llama.attention.head_count", 48, "speaks of 48 heads, but queries or keys have 64 rows"),
    ("llama.feed_forward_length", [[1]], "as llama.feed_forward_length"),
    ("llama.context_length", -1, "holds -1 as max_position_embeddings"),
    ("llama.rope.scaling.type", 5, "as llama.rope.scaling.type"),
    ("tokenizer.ggml.tokens", [1], r"holds \[1\] as tokenizer.ggml.tokens"),
    ("tokenizer.ggml.tokens", ["a"], "has 1 tokens, but 4 entries in tokenizer.ggml.token_type"),
    ("tokenizer.ggml.eos_token_id", 9, "holds 9 as tokenizer.ggml.eos_token_id, of 4 tokens"),
    ("tokenizer.ggml.eos_token_id", "abc", "as tokenizer.ggml.eos_token_id"),
])
def test_metadata_of_another_kind_is_refused_by_name(key, value, says, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(open_checkpoint(tiny_checkpoint("llama", tmp_path)), path, **{key.replace(".", "__"): value})
    with pytest.raises(ModelError, match=says) as error:
        open_checkpoint(path).tensor("model.layers.0.self_attn.q_proj.weight")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("extra", [
    {"tokenizer__ggml__padding_token_id": 4}, {"tokenizer__ggml__padding_token_id": -1},
    {"tokenizer__ggml__tokens": None, "tokenizer__ggml__token_type": None},
])
def test_metadata_that_nothing_is_made_of_may_be_odd(extra, tmp_path):
    """Published files name a token for padding that they lack, and files without a vocabulary go with a folder that has it."""
    path = tmp_path / "model.gguf"
    write_gguf(open_checkpoint(tiny_checkpoint("llama", tmp_path)), path, **{"tokenizer__ggml__eos_token_id": 3, **extra})
    assert 3 in open_checkpoint(path).spec.eos_token_ids


def test_unsupported_storage_type_is_named(tmp_path):
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 84), np.uint8), raw_dtype=GGMLQuantizationType.Q2_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"token_embd\.weight is stored as Q2_K"):
        GgufFile(tmp_path / "model.gguf")


def test_two_files_are_ambiguous(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ModelError, match=r"holds 2 \.gguf files"):
        open_checkpoint(tmp_path)


def test_reading_writes_nothing_back(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(open_checkpoint(tiny_checkpoint("qwen2", tmp_path)), path)
    before = path.read_bytes()
    open_checkpoint(path).tensor("model.norm.weight").zero_()
    assert path.read_bytes() == before


def test_smollm2_is_what_transformers_reads():
    path = real_model("smollm2")
    checkpoint, expected = open_checkpoint(path), load_reference(path).state_dict()
    assert checkpoint.names() == set(expected) - {"lm_head.weight"}
    for name in checkpoint.names():
        assert torch.equal(checkpoint.tensor(name), expected[name]), name
    assert checkpoint.spec.eos_token_ids[0] == 2           # <|im_end|>
    assert checkpoint.spec.tied_embeddings


def as_on_a_gpu(monkeypatch) -> None:
    """Keep blocks packed, as is done on CUDA devices alone."""
    monkeypatch.setattr(decoder, "linear_methods", lambda spec, how, _: linear_methods(spec, how, torch.device("cuda")))


@pytest.mark.parametrize("name", GGUF_KEPT)
def test_blocks_kept_as_integers_stand_for_the_same_weights(name):
    """Random blocks; among Q4_K's also such whose scale, or scale and minimum, are nought."""
    kind, rng, outputs, inputs = BLOCK_TYPES[NUMBERS[name]], np.random.default_rng(2), 24, 512
    blocks = rng.integers(0, 256, size=(outputs * inputs // kind.weights, kind.bytes), dtype=np.uint8)
    for at in HALVES.get(name, [0, 2]):
        blocks[:, at:at + 2] = rng.uniform(0.01, 1, size=(len(blocks), 1)).astype(np.float16).view(np.uint8)
    if name == "Q4_K":
        blocks[:6, 0:2] = 0                             # no scales
        blocks[3:9, 2:4] = 0                            # no minimums
        blocks[9:20, 4:8] = 0                           # no scale in half of the groups
        blocks[-8:, 0:2] = np.array([1e-7], np.float16).view(np.uint8)          # scales that are next to nothing
    want = torch.from_numpy(reference_dequantize(blocks, GGMLQuantizationType(NUMBERS[name])).reshape(outputs, inputs))
    codes, scales, minimums = kind.integers(torch.from_numpy(blocks))
    terms = want.abs() if minimums is None else ((codes * scales).abs() + minimums.abs()).view(outputs, inputs)
    packed = {"layer.blocks": torch.from_numpy(blocks.reshape(outputs, -1))}
    checkpoint = SimpleNamespace(has=packed.__contains__, tensor=packed.__getitem__)
    for dtype, close in ((torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        layer = Linear(inputs, [("layer", outputs)], bias=False, dtype=dtype, method=GgufMethod.of(name))
        layer.load(checkpoint)
        got = layer(torch.eye(inputs, dtype=dtype)).t().float()
        apart = (got - want).abs() / (terms + 1e-5)
        assert apart[:20].max() < close, dtype
        assert apart.max() < max(close, 5e-3), dtype        # the last four rows' codes do not show in 16 bits, so are let go


@pytest.mark.parametrize(("family", "tensor_type"), [("llama-bias", "Q8_0"), ("qwen2", "Q4_0")])
def test_models_that_are_kept_packed(family, tensor_type, tmp_path, monkeypatch):
    """Logits as with the blocks unpacked at load; Llama's queries and keys are put in order block by block."""
    path, prompt = tmp_path / "model.gguf", list(range(40))
    write_gguf(open_checkpoint(tiny_checkpoint(family, tmp_path)), path, tensor_type)
    unpacked = load_decoder(path, torch.float32)
    as_on_a_gpu(monkeypatch)
    packed, dense = load_decoder(path, torch.float32), load_decoder(path, torch.float32, quantization="dense")
    want = full_logits(unpacked, prompt)
    assert (full_logits(packed, prompt) - want).abs().max() < 1e-4 * want.std()
    assert torch.equal(full_logits(dense, prompt), want)
    assert packed.weight_bytes() < 0.6 * unpacked.weight_bytes() == 0.6 * dense.weight_bytes()
    assert load_decoder(path, torch.float32, quantization="fp8").blocks[0].mlp.down.weight.dtype == torch.float8_e4m3fn


def test_parts_of_different_types_stand_side_by_side(tmp_path, monkeypatch):
    """As in Q4_K_M files, where values and some others have more bits; a type that is not kept is unpacked at load."""
    path = tmp_path / "model.gguf"
    kinds = {"attn_v": "Q8_0", "attn_output": "Q5_0"}
    write_gguf(open_checkpoint(tiny_checkpoint("qwen2", tmp_path)), path, lambda name: kinds.get(name.split(".")[-2], "Q4_0"))
    unpacked = full_logits(load_decoder(path, torch.float32), [1, 2, 3, 4])
    as_on_a_gpu(monkeypatch)
    packed = load_decoder(path, torch.float32)
    qkv = packed.blocks[1].attention.qkv
    assert [(part.method.kind.name, len(part.sources)) for part in qkv.parts] == [("Q4_0", 2), ("Q8_0", 1)]
    assert isinstance(packed.blocks[1].attention.out.method, DenseMethod)
    assert (full_logits(packed, [1, 2, 3, 4]) - unpacked).abs().max() < 1e-4 * unpacked.std()
