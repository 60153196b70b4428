"""Models with quantised weights: their logits are those of the weights stood for, and what is not supported is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import add_at_once, finish, full_logits, load_decoder, make_requests, random_prompts, running
from models import load_reference, tiny_checkpoint
from quantized_models import SHAPE, awq_pair, compressed_pair, gptq_pair
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig
from engine.engine import Engine
from engine.layers.linear import Joined, Linear
from engine.models.quantization import Quantization
from engine.models.spec import ModelError
from engine.request import SamplingParams
from engine.weights import open_checkpoint

PROMPT = random_prompts(1, seed=2, shortest=60, longest=60)[0]
INTEGER = {
    "awq-32": lambda folder: awq_pair(folder),
    "awq-128": lambda folder: awq_pair(folder, group=128),
    "awq-bias": lambda folder: awq_pair(folder, family="qwen2"),
    "awq-skip": lambda folder: awq_pair(folder, skip=["model.layers.1", "v_proj"]),
    "awq-skip-first": lambda folder: awq_pair(folder, skip=["model.layers.0"]),
    "gptq-sym": lambda folder: gptq_pair(folder),
    "gptq-128": lambda folder: gptq_pair(folder, group=128, symmetric=False),
    "gptq-ordered": lambda folder: gptq_pair(folder, symmetric=False, ordered=True),
    "gptq-8": lambda folder: gptq_pair(folder, bits=8, group=-1),
    "gptq-v2": lambda folder: gptq_pair(folder, symmetric=False, v2=True),
    "gptq-8-ordered": lambda folder: gptq_pair(folder, bits=8, symmetric=False, ordered=True, family="qwen3"),
}


def reference_logits(model: Path) -> torch.Tensor:
    with torch.inference_mode():
        return load_reference(model)(torch.tensor([PROMPT])).logits[0]


@pytest.mark.parametrize("case", INTEGER)
def test_logits_are_those_of_the_weights_stood_for(case: str, tmp_path: Path) -> None:
    """Prefill and decode in float32, against transformers on the plain twin."""
    quantized, plain = INTEGER[case](tmp_path)
    decoder, want = load_decoder(quantized, torch.float32), reference_logits(plain)
    for decode in (0, 20):
        assert (full_logits(decoder, PROMPT, decode) - want).abs().max() < 1e-4 * want.std()


@pytest.mark.parametrize("case", ["awq-32", "gptq-ordered", "gptq-8"])
def test_every_layer(case: str, tmp_path: Path) -> None:
    """Each linear layer's product against float64, parts merged as they are."""
    quantized, plain = INTEGER[case](tmp_path)
    weights, layers = load_file(plain / "model.safetensors"), 0
    for layer in load_decoder(quantized, torch.float32).modules():
        if isinstance(layer, Linear):
            weight = torch.cat([weights[f"{source}.weight"] for source, _ in layer.sources])
            x = torch.randn(7, layer.in_features, generator=torch.Generator().manual_seed(layers))
            want = x.double() @ weight.double().t()
            assert (layer(x).double() - want).abs().max() < 1e-5 * want.std()
            layers += 1
    assert layers == 8


@pytest.mark.parametrize("case", ["awq-32", "gptq-ordered", "gptq-8-ordered"])
def test_weights_are_unpacked_too_where_there_is_room(case: str, tmp_path: Path) -> None:
    quantized, plain = INTEGER[case](tmp_path)
    decoder, weights = load_decoder(quantized, torch.float32), load_file(plain / "model.safetensors")
    kept, whole = decoder.weight_bytes(), 4 * sum(inputs * outputs for _, inputs, outputs in decoder.spec.linears())
    decoder.unpack(0)
    assert decoder.unpacked_bytes() == 0
    decoder.unpack(whole // 2)
    assert 0.3 * whole < decoder.unpacked_bytes() <= 0.5 * whole
    decoder.unpack(whole)
    assert decoder.unpacked_bytes() == whole and decoder.weight_bytes() == kept
    for layer in decoder.modules():
        if isinstance(layer, Linear):
            torch.testing.assert_close(layer.unpacked, torch.cat([weights[f"{source}.weight"] for source, _ in layer.sources]))
    assert (full_logits(decoder, PROMPT, 20) - reference_logits(plain)).abs().max() < 1e-4 * reference_logits(plain).std()
    dense = load_decoder(plain, torch.float32)
    dense.unpack(1 << 40)
    assert dense.unpacked_bytes() == 0          # nothing is packed


_INT4 = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 32}
_FLOAT8 = {"type": "float", "num_bits": 8, "symmetric": True}
# weights and input_activations, as compressed-tensors' QuantizationArgs take them
COMPRESSED: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "int4": ({**_INT4, "symmetric": True}, None),
    "int4-asymmetric": ({**_INT4, "symmetric": False}, None),
    "int8-channel": ({"type": "int", "num_bits": 8, "symmetric": True, "strategy": "channel"}, None),
    "fp8-token": ({**_FLOAT8, "strategy": "channel"}, {**_FLOAT8, "strategy": "token", "dynamic": True}),
    "fp8-static": ({**_FLOAT8, "strategy": "tensor"}, {**_FLOAT8, "strategy": "tensor", "dynamic": False}),
    "fp8-block": ({**_FLOAT8, "strategy": "block", "block_structure": [128, 128]},
                  {**_FLOAT8, "strategy": "group", "group_size": 128, "dynamic": True}),
}


@pytest.mark.parametrize("case", COMPRESSED)
def test_compressed_tensors(case: str, tmp_path: Path) -> None:
    """Packed by compressed-tensors; the logits are transformers' on the same folder, which quantises the inputs as well."""
    quantized, plain = compressed_pair(tmp_path, *COMPRESSED[case])
    # transformers 5.24 does not load packed zero points: the unpacked weights will do, since the inputs stay plain there.
    want = reference_logits(plain if case == "int4-asymmetric" else quantized)
    apart = ((full_logits(load_decoder(quantized, torch.float32), PROMPT) - want).abs().amax(-1) / want.std())
    # A last bit of an input may be what it is rounded up or down by: few positions may differ, and those a little.
    assert (apart < 1e-4).float().mean() > (0.9 if case in ("fp8-token", "fp8-block") else 0.999)
    assert apart.max() < 0.3


def as_fp8(folder: Path, config: dict[str, Any], scale: str = "weight_scale") -> Path:
    """The same tensors under the older form of config, quant_method fp8."""
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": {"quant_method": "fp8", **config}}))
    tensors = load_file(folder / "model.safetensors")
    save_file({name.replace("weight_scale", scale): tensor for name, tensor in tensors.items()}, folder / "model.safetensors",
              {"format": "pt"})
    return folder


@pytest.mark.parametrize(("case", "config", "scale"), [
    ("fp8-static", {"activation_scheme": "static", "ignored_layers": ["lm_head"]}, "weight_scale"),
    ("fp8-block", {"activation_scheme": "dynamic", "weight_block_size": [128, 128]}, "weight_scale_inv"),
])
def test_fp8_checkpoints(case: str, config: dict[str, Any], scale: str, tmp_path: Path) -> None:
    quantized, _ = compressed_pair(tmp_path, *COMPRESSED[case])
    want = full_logits(load_decoder(quantized, torch.float32), PROMPT)
    as_fp8(quantized, config, scale)
    assert open_checkpoint(quantized).spec.quantization.method == "fp8"
    assert torch.equal(full_logits(load_decoder(quantized, torch.float32), PROMPT), want)


def test_block_scales_are_those_of_transformers(tmp_path: Path) -> None:
    """transformers unpacks such checkpoints where there is no GPU."""
    quantized, _ = compressed_pair(tmp_path, *COMPRESSED["fp8-block"])
    as_fp8(quantized, {"activation_scheme": "dynamic", "weight_block_size": [128, 128]}, "weight_scale_inv")
    want = load_reference(quantized).state_dict()
    for layer in load_decoder(quantized, torch.float32).modules():
        if isinstance(layer, Linear):
            blocks = layer.weight_scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
            weight = torch.cat([want[f"{source}.weight"].float() for source, _ in layer.sources])
            torch.testing.assert_close(layer.weight.float() * blocks, weight, rtol=1e-2, atol=0)      # theirs are bfloat16


def test_fp8_made_at_load(tmp_path: Path) -> None:
    """From weights that lie on the grid of a checkpoint's FP8 come the same weights."""
    quantized, plain = compressed_pair(tmp_path, *COMPRESSED["fp8-token"])
    stored, made = load_decoder(quantized, torch.float32), load_decoder(plain, torch.float32, quantization="fp8")
    for a, b in zip(stored.modules(), made.modules(), strict=True):
        if isinstance(a, Linear):
            assert b.weight.dtype == torch.float8_e4m3fn
            assert torch.equal(a.weight.float(), b.weight.float())
            torch.testing.assert_close(a.weight_scale, b.weight_scale)
    with running(plain, quantization="fp8") as engine:
        done = finish(engine, make_requests([PROMPT], SamplingParams(max_tokens=4, ignore_eos=True)))
        assert done[0].tokens.size == 4


def test_plain_layers_between_fp8_ones_may_be_added_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized, _ = compressed_pair(tmp_path, *COMPRESSED["fp8-token"], skip=["o_proj", "down_proj"])
    decoder = load_decoder(quantized, torch.float32)
    want, added = full_logits(decoder, PROMPT, 2), add_at_once(monkeypatch)
    assert torch.equal(full_logits(decoder, PROMPT, 2), want)
    assert len(added) == 2 * len(decoder.blocks) * 3        # o and down, in three steps


def test_parts_that_differ_stand_side_by_side(tmp_path: Path) -> None:
    quantized, _ = awq_pair(tmp_path, skip=["v_proj", "model.layers.1"])
    blocks = load_decoder(quantized, torch.float32).blocks
    assert isinstance(blocks[0].attention.qkv, Joined)
    assert [[source.rpartition(".")[2] for source, _ in part.sources] for part in blocks[0].attention.qkv.parts] == [
        ["q_proj", "k_proj"], ["v_proj"]]
    assert isinstance(blocks[1].attention.qkv, Linear) and hasattr(blocks[1].attention.qkv, "weight")


@pytest.mark.parametrize("case", ["awq", "gptq", *COMPRESSED])
def test_blocks_stored_alike_are_of_one_kind(case: str, tmp_path: Path) -> None:
    """One of those runs, the only one that is kept plain, the one that makes what that begins with, and the last."""
    skip = {} if case == "gptq" else {"skip": ["model.layers.2."]}
    make = {"awq": awq_pair, "gptq": gptq_pair}.get(case)
    quantized, _ = make(tmp_path, num_hidden_layers=5, **skip) if make else compressed_pair(
        tmp_path, *COMPRESSED[case], num_hidden_layers=5, **skip)
    decoder = load_decoder(quantized, torch.float32)
    with decoder.one_block_of_each_kind():
        assert list(decoder._running) == ([0, 4] if case == "gptq" else [0, 1, 2, 4])
    if any(isinstance(layer, Linear) and layer.method.packs for layer in decoder.modules()):
        decoder.blocks[3].mlp.down.keep_unpacked()
        with decoder.one_block_of_each_kind():
            assert 3 in decoder._running, "products of an unpacked weight are others"
    assert list(decoder._running) == [0, 1, 2, 3, 4]


def test_the_engine_runs_them_and_says_what_they_take(tmp_path: Path) -> None:
    said: list[str] = []
    quantized, plain = awq_pair(tmp_path, group=128)
    tokens, taken = {}, {}
    for model in (quantized, plain):
        with running(model) as engine:
            done = finish(engine, make_requests([PROMPT], SamplingParams(max_tokens=8, ignore_eos=True)))
            tokens[model], taken[model] = done[0].tokens.tolist(), engine.weight_bytes
    assert tokens[quantized] == tokens[plain]
    spec = open_checkpoint(plain).spec
    weights = sum(inputs * outputs for _, inputs, outputs in spec.linears())
    kept = weights // 2 + weights // 128 * 5            # codes; float32 scales, zero points of a byte
    assert taken[plain] - taken[quantized] == weights * 4 - kept
    Engine(open_checkpoint(quantized), EngineConfig(device="cpu", max_model_len=64), progress=said.append).close()
    assert f"weights {taken[quantized] / 2**30:.2f} GiB" in said


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def compressed(weights: dict[str, Any], inputs: dict[str, Any] | None = None, stored: str = "pack-quantized",
               **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": stored, "config_groups": {"group_0": group}, "ignore": ["lm_head"],
            **more}


@pytest.mark.parametrize(("config", "says"), [
    ({"quant_method": "bitsandbytes"}, "quant_method='bitsandbytes' is not supported; supported: awq, gptq"),
    ({**AWQ, "bits": 3}, "bits=3 is not supported; supported: 4"),
    ({**AWQ, "version": "GEMV"}, "version='gemv' is not supported; supported: gemm"),
    ({**AWQ, "zero_point": False}, "zero_point=False"),
    ({**AWQ, "group_size": 16}, "group_size=16 is not supported; supported: -1, 32, 64, 128"),
    ({**AWQ, "group_size": 64}, r"down_proj has 96 inputs .* need multiples of 64"),
    ({**GPTQ, "bits": 3}, "bits=3 is not supported; supported: 4, 8"),
    ({**GPTQ, "group_size": 1024}, "group_size=1024"),
    ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format='marlin' is not supported; supported: gptq, gptq_v2"),
    ({**GPTQ, "format": "bitblas"}, "format='bitblas' is not supported; supported: gptq, gptq_v2"),
    ({**GPTQ, "lm_head": True}, "lm_head=True"),
    ({**GPTQ, "dynamic": {"+:.*down_proj": {"bits": 8}}}, r"dynamic sets '\+:\.\*down_proj' apart"),
    ({**FP8, "fmt": "e5m2"}, "fmt='e5m2'"),
    ({**FP8, "weight_block_size": [64, 64]}, r"weight_block_size=\[64, 64\] is not supported; supported: \[128, 128\]"),
    ({**FP8, "weight_block_size": [128, 128], "activation_scheme": "static"}, "activation_scheme='static'"),
    ({**FP8, "weight_block_size": [128, 128]}, "q_proj has 64 inputs and 64 outputs"),
    (compressed({**_INT4, "num_bits": 3}), "config_groups.group_0: int3 weights by group in format pack-quantized with plain"),
    (compressed({**_INT4, "group_size": 48}), "group_size=48"),
    (compressed({**_FLOAT8, "strategy": "channel"}, None, "naive-quantized"), "float8 weights by channel .* with plain inputs"),
    (compressed({"num_bits": 8, "strategy": "channel"}, {"num_bits": 8, "strategy": "token", "dynamic": True}, "int-quantized"),
     "int8 weights by channel in format int-quantized with int8 token dynamic inputs"),
    (compressed(_INT4, ignore=[]), "the LM head is quantised"),
    (compressed(_INT4, ignore=["lm_head", "re:*.mlp"]), r"ignore holds '\*\.mlp', which is no regular expression: nothing"),
    (compressed(_INT4, config_groups={"W4A16": ["Linear"]}), r"config_groups\.W4A16=\['Linear'\] is not supported"),
    ({"quant_method": "gguf"}, "quant_method='gguf' is not supported in a config.json: give the .gguf file"),
    (compressed(_INT4, transform_config={"config_groups": {"R1": {}}}), "transform_config"),
    (compressed(_INT4, sparsity_config={"format": "sparse-24-bitmask"}), "format='sparse-24-bitmask'"),
])
def test_variants_that_are_refused(config: dict[str, Any], says: str, tmp_path: Path) -> None:
    """From config.json alone: the folder's weights are not even looked at."""
    folder = tiny_checkpoint("llama", tmp_path)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": config}))
    with pytest.raises(ModelError, match=says) as error:
        open_checkpoint(folder)
    assert "\n" not in str(error.value)


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path: Path) -> None:
    plain = tiny_checkpoint("llama", tmp_path, **SHAPE)
    settings = json.loads((plain / "config.json").read_text())
    for config, says in ((AWQ, r"no tensor .*q_proj\.qweight"), (FP8, r"q_proj\.weight is stored as torch\.float32")):
        (plain / "config.json").write_text(json.dumps(settings | {"quantization_config": config}))
        with pytest.raises(ValueError, match=says):
            load_decoder(plain, torch.float32)
    quantized, _ = compressed_pair(tmp_path / "fp8", *COMPRESSED["fp8-token"])
    settings = json.loads((quantized / "config.json").read_text())
    del settings["quantization_config"]
    (quantized / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"q_proj\.weight is stored as torch\.float8_e4m3fn"):
        load_decoder(quantized, torch.float32)


@pytest.mark.parametrize("prefix", ["language_model.model", "model.language_model"])
def test_a_multimodal_config_names_layers_as_its_checkpoint_does(prefix: str, tmp_path: Path) -> None:
    """Or as the other of the two kinds of checkpoint does: transformers renames on loading."""
    skip = ["layers.0.mlp.up_proj", "layers.1.mlp"]
    quantized, _ = compressed_pair(tmp_path, *COMPRESSED["int4"], family="gemma3", layer_types=None, skip=skip)
    settings = json.loads((quantized / "config.json").read_text())
    stored = settings.pop("quantization_config")

    def logits(*ignore: str, **config: Any) -> torch.Tensor:
        (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": {**stored, "ignore": ignore}}))
        return full_logits(load_decoder(quantized, torch.float32), PROMPT)

    want = logits("lm_head", "model.layers.0.mlp.up_proj", r"re:.*layers\.1\.mlp", **settings)
    tensors = load_file(quantized / "model.safetensors")
    save_file({name.replace("model", prefix, 1): tensor for name, tensor in tensors.items()}, quantized / "model.safetensors")
    for names in ("language_model.model", "model.language_model"):
        ignore = ("language_model.lm_head", f"{names}.layers.0.mlp.up_proj", rf"re:{names}\.layers\.1\.mlp", "re:vision_tower.*")
        assert torch.equal(logits(*ignore, model_type="gemma3", text_config=settings), want)


def test_fp8_is_not_made_from_other_quantized_weights(tmp_path: Path) -> None:
    quantized, _ = awq_pair(tmp_path)
    with pytest.raises(ModelError, match=r"engine\.quantization=fp8 needs plain weights, and the model's are awq"):
        load_decoder(quantized, torch.float32, quantization="fp8")


def _change(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_what_would_be_lost_is_refused(tmp_path: Path) -> None:
    layer = "model.layers.0.self_attn"

    def other_order(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{layer}.k_proj.g_idx"] = tensors[f"{layer}.k_proj.g_idx"].flip(0)

    def uneven(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{layer}.o_proj.g_idx"][0] = 3 - tensors[f"{layer}.o_proj.g_idx"][0]

    def bias(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{layer}.o_proj.bias"] = torch.ones(SHAPE["hidden_size"])

    for change, says in ((other_order, "their g_idx differ"), (uneven, "does not put 32 inputs into each of 4 groups"),
                         (bias, r"o_proj\.bias is not zero")):
        quantized, _ = gptq_pair(tmp_path / change.__name__, ordered=True)
        _change(quantized, change)
        with pytest.raises(ModelError, match=says):
            load_decoder(quantized, torch.float32)
    # Zero biases, which older writers always add, are nothing to lose.
    _change(quantized, lambda tensors: tensors[f"{layer}.o_proj.bias"].zero_())
    load_decoder(quantized, torch.float32)


def test_tensors_that_the_config_denies_are_refused_where_they_count(tmp_path: Path) -> None:
    first, last = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj"
    quantized, plain = compressed_pair(tmp_path, *COMPRESSED["int4-asymmetric"])
    settings = json.loads((quantized / "config.json").read_text())
    settings["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = True
    (quantized / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=f"{first}.weight_zero_point is not zero, but the model's config says"):
        load_decoder(quantized, torch.float32)
    dynamic, _ = compressed_pair(tmp_path / "fp8", *COMPRESSED["fp8-token"])
    # What older writers left behind, and scales that are for other ways to run the model, are nothing to lose.
    harmless = {"weight_zero_point": torch.zeros(128, 1, dtype=torch.int8), "input_scale": torch.ones(1)}
    _change(dynamic, lambda tensors: tensors.update({f"{last}.{name}": tensor for name, tensor in harmless.items()}))
    load_decoder(dynamic, torch.float32)
    for folder in (plain, dynamic):
        _change(folder, lambda tensors: tensors.update({f"{last}.weight_scale_inv": torch.ones(1)}))
    load_decoder(plain, torch.float32)
    with pytest.raises(ModelError, match=f"{last}.weight_scale_inv is not zero"):
        load_decoder(dynamic, torch.float32)


def test_column_order_counts_even_where_the_config_denies_it(tmp_path: Path) -> None:
    quantized, plain = gptq_pair(tmp_path, ordered=True)
    settings = json.loads((quantized / "config.json").read_text())
    settings["quantization_config"]["desc_act"] = False
    (quantized / "config.json").write_text(json.dumps(settings))
    want = reference_logits(plain)
    assert (full_logits(load_decoder(quantized, torch.float32), PROMPT) - want).abs().max() < 1e-4 * want.std()

    compressed, _ = compressed_pair(tmp_path / "compressed", *COMPRESSED["int4"])
    for groups, kept in ((torch.arange(128) // 32, None), (torch.arange(128) % 4, torch.arange(128).view(-1, 4).t().flatten())):
        _change(compressed, lambda tensors, g=groups: tensors.update({"model.layers.0.self_attn.o_proj.weight_g_idx": g.int()}))
        perm = load_decoder(compressed, torch.float32).blocks[0].attention.out.perm
        assert perm is None if kept is None else torch.equal(perm, kept.int())


def test_which_layers_a_config_means() -> None:
    """Names are compared by their parts; compressed-tensors' name before expressions before classes."""
    def plain(config: dict[str, Any]) -> list[str]:
        names = ["model.layers.1.mlp.gate_proj", "model.layers.10.mlp.gate_proj", "model.layers.1.self_attn.q_proj", "lm_head"]
        return [name for name in names if Quantization.read(config).scheme(name) is None]

    assert plain({**AWQ, "modules_to_not_convert": ["model.layers.1", "gate"]}) == [
        "model.layers.1.mlp.gate_proj", "model.layers.1.self_attn.q_proj", "lm_head"]
    assert plain({**AWQ, "modules_to_not_convert": ["model.layers.1.", "lm_head"]}) == [
        "model.layers.1.mlp.gate_proj", "model.layers.1.self_attn.q_proj", "lm_head"]
    assert plain({**AWQ, "modules_to_not_convert": ["layers.1.mlp"]}) == ["model.layers.1.mlp.gate_proj", "lm_head"]
    assert plain({**AWQ, "modules_to_not_convert": ["self_attn"]}) == ["model.layers.1.self_attn.q_proj", "lm_head"]
    assert plain({**FP8, "ignored_layers": ["model.layers.10.mlp.gate_proj"]}) == ["model.layers.10.mlp.gate_proj", "lm_head"]
    assert plain({**GPTQ, "dynamic": {"-:.*q_proj": {}}}) == ["model.layers.1.self_attn.q_proj", "lm_head"]
    for listed in ([["self_attn.q_proj"]], ["self_attn.q_proj"]):
        assert plain({**GPTQ, "modules_in_block_to_quantize": listed}) == [
            "model.layers.1.mlp.gate_proj", "model.layers.10.mlp.gate_proj", "lm_head"]
    config = compressed(_INT4, ignore=["lm_head", r"re:.*layers\.1\.mlp"])
    assert plain(config) == ["model.layers.1.mlp.gate_proj", "lm_head"]
    wider = {"a": {"targets": ["re:.*q_proj"], "weights": {**_INT4, "num_bits": 8}},
             "b": {"targets": ["model.layers.1.self_attn.q_proj"], "weights": {**_INT4, "group_size": 64}}}
    for groups in ({**wider, **config["config_groups"]}, {**config["config_groups"], **wider}):
        found = Quantization.read({**config, "config_groups": groups})
        schemes = [found.scheme(f"model.layers.{name}") for name in ("0.self_attn.q_proj", "0.mlp.up_proj", "1.self_attn.q_proj")]
        assert [(scheme.bits, scheme.group) for scheme in schemes] == [(8, 32), (4, 32), (4, 64)]
    ordered = [Quantization.read(compressed({**_INT4, "actorder": order})).scheme("model.layers.0.mlp.up_proj").ordered
               for order in ("group", True, "static", False, None)]
    assert ordered == [True, True, False, False, False]
