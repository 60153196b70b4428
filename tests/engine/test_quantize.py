"""Making quantised models: the methods against plain rounding and a slow reference, and what is written against its formats."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from engine_cases import full_logits, load_decoder, random_prompts
from models import TINY_FAMILIES, tiny_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.layers.linear import DenseMethod
from engine.models.decoder import Block
from engine.models.spec import ModelError, ModelSpec
from engine.prefill import batches, prefill_cache, prefill_pages, prefill_step
from engine.quantize import folder as folders
from engine.quantize import methods
from engine.quantize import stats as stats_module
from engine.quantize.awq import search_clip, search_scale
from engine.quantize.calibrate import Calibration
from engine.quantize.gptq import gptq
from engine.quantize.integers import IntegerGrid, round_to_nearest
from engine.quantize.methods import Awq, Fp8, Gptq, RoundToNearest, group_size_for
from engine.quantize.model import check, quantize, running_dtype, stored_dtype
from engine.quantize.stats import InputStats, output_error
from engine.weights import open_checkpoint

CPU = torch.device("cpu")
METHODS = {"rtn": RoundToNearest(32), "awq": Awq(32, steps=6), "awq-gptq": Awq(32, steps=6, damping=0.01),
           "gptq": Gptq(32, 4, True, "static", 0.01),
           "gptq-desc": Gptq(32, 4, False, "full", 0.01), "gptq-rows": Gptq(-1, 8, True, "none", 0.01), "fp8": Fp8(False),
           "fp8-static": Fp8(True)}


def layer(outputs: int = 48, inputs: int = 128, tokens: int = 600) -> tuple[Tensor, Tensor]:
    """Weights [N, K], and inputs [T, K] that hang together and of which a few channels are large."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(inputs, inputs, generator=generator) * 0.3 + torch.eye(inputs)
    x = torch.randn(tokens, inputs, generator=generator) @ mix
    x[:, torch.randperm(inputs, generator=generator)[:4]] *= 25
    return torch.randn(outputs, inputs, generator=generator) * 0.05, x


def stats_of(x: Tensor) -> InputStats:
    stats = InputStats(x.shape[1], CPU)
    for part in x.split(250):
        stats.add(part)
    return stats


def error(w: Tensor, q: Tensor, x: Tensor) -> float:
    return float(((w - q).double() @ x.double().T).pow(2).sum())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_stays_within_half_a_step(bits: int, symmetric: bool) -> None:
    weight, _ = layer()
    weight[3] = 0
    stored = round_to_nearest(weight, IntegerGrid(bits, 32, symmetric))
    step = stored.scales.float()[:, stored.groups]
    # The zero point is rounded and the scale is float16's, so that the ends of a range may lie a step beyond the last code.
    inside = (stored.codes > 0) & (stored.codes < 2**bits - 1)
    slack = torch.where(inside, 0.501, 1.1)
    assert bool(((weight - stored.dequantize()).abs() <= slack * step + 1e-7).all())
    assert stored.dequantize()[3].abs().max() == 0
    assert int(stored.codes.max()) == 2**bits - 1
    assert torch.equal(stored.dequantize(), IntegerGrid(bits, 32, symmetric).rounded(weight))


@pytest.mark.parametrize("group", [32, 128])
def test_awq_beats_rounding_where_inputs_have_outliers(group: int) -> None:
    weight, x = layer()
    grid, stats = IntegerGrid(4, group), stats_of(x)
    plain = error(weight, grid.rounded(weight), x)
    scale = search_scale(weight, stats, grid, 20)
    scaled = grid.rounded(weight * scale) / scale
    assert error(weight, scaled, x) < 0.5 * plain
    hessian = stats.hessian / scale / scale[:, None]
    clipped = grid.rounded(search_clip(weight * scale, hessian, grid)) / scale
    assert error(weight, clipped, x) < error(weight, scaled, x)


def test_tokens_of_massive_size_do_not_outweigh_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = layer()
    massive = x.clone()
    massive[::200] = 0
    massive[::200, 7] = 1e5
    grid, others = IntegerGrid(4, 32), torch.ones(len(x), dtype=torch.bool)
    others[::200] = False

    def error_of_others() -> float:
        scale = search_scale(weight, stats_of(massive), grid, 20)
        return error(weight, grid.rounded(weight * scale) / scale, x[others])

    found = error_of_others()
    monkeypatch.setattr(stats_module, "LARGEST", float("inf"))
    assert found < 0.5 * error_of_others()


@pytest.mark.parametrize(("order", "most"), [("none", 0.6), ("static", 0.3), ("full", 0.3)])
@pytest.mark.parametrize("group", [32, -1])
def test_gptq_beats_rounding(order: str, most: float, group: int) -> None:
    weight, x = layer()
    grid = IntegerGrid(4, group, symmetric=True)
    stored = gptq(weight, stats_of(x).hessian, grid, order, 0.01)
    assert error(weight, stored.dequantize(), x) < most * error(weight, grid.rounded(weight), x)
    size = 128 if group == -1 else group
    assert torch.equal(stored.groups.bincount(), torch.full((128 // size,), size))
    assert (order == "full" and group == 32) != torch.equal(stored.groups, torch.arange(128) // size)


def test_gptq_is_the_papers_recursion() -> None:
    """Columns one after another, the inverse downdated after each (arXiv 2210.17323, equations 2 and 3), in float64."""
    weight, x = layer(inputs=160)        # more than one block of columns
    grid, hessian = IntegerGrid(4, 32), stats_of(x).hessian
    stored = gptq(weight, hessian, grid, "none", 0.02)

    w, h = weight.double(), hessian.double()
    inverse = torch.linalg.inv(h + 0.02 * h.diagonal().mean() * torch.eye(160))
    wanted = torch.empty_like(w)
    for i in range(160):
        if i % 32 == 0:
            scale, zero = grid.fit(w[:, i:i + 32].float())
        wanted[:, i:i + 1] = (grid.codes(w[:, i:i + 1].float(), scale, zero) - zero) * scale
        w -= torch.outer((w[:, i] - wanted[:, i]) / inverse[i, i], inverse[i])
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    # A code on the border of two may fall to either side, and then changes what follows in its row.
    same = (stored.dequantize() == wanted.float()).all(1)
    assert same.float().mean() > 0.9


def test_gptq_says_that_the_damping_is_too_small() -> None:
    with pytest.raises(ModelError, match=r"gptq\.damping=0\.01 is too small"):
        gptq(torch.ones(4, 32), torch.zeros(32, 32), IntegerGrid(4, 32), "none", 0.01)


# --- blocks ---


def make_block(checkpoint: Any, index: int) -> Block:
    block = Block(checkpoint.spec, index, lambda name: DenseMethod(), torch.float32)
    for module in block.modules():
        if hasattr(module, "load"):
            module.load(checkpoint)
    return block


def calibration_of(checkpoint: Any, sequences: list[np.ndarray]) -> Calibration:
    from engine.layers.embedding import Embedding

    spec = checkpoint.spec
    embedding = Embedding(spec.vocab_size, spec.hidden_size, "model.embed_tokens", scale=spec.embed_scale, dtype=torch.float32)
    embedding.load(checkpoint)
    return Calibration(spec, sequences, embedding)


def sequences_of(seed: int = 0, count: int = 8) -> list[np.ndarray]:
    return [np.array(row, dtype=np.int32) for row in random_prompts(count, seed, shortest=1, longest=70)]


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen3", "gemma3"])
def test_calibration_runs_the_model(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hidden states behind the last block are the Decoder's, block by block and in several steps."""
    monkeypatch.setattr("engine.quantize.calibrate._STEP_TOKENS", 150)
    path = tiny_checkpoint(family, tmp_path)
    checkpoint, sequences = open_checkpoint(path), sequences_of()
    calibration = calibration_of(checkpoint, sequences)
    for index in range(checkpoint.spec.num_layers):
        calibration.advance(make_block(checkpoint, index), index)
    decoder = load_decoder(path, torch.float32)
    got = torch.cat([decoder.logits(decoder.norm(hidden)) for hidden in calibration._hidden])
    want = torch.cat([full_logits(decoder, sequence.tolist()) for sequence in sequences])
    assert (got - want).abs().max() < 1e-3 * want.std()


@pytest.mark.parametrize("family", ["llama-bias", "qwen2", "gemma3"])
def test_awq_scales_change_nothing_but_the_rounding(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without rounding, a block with scales folded in computes what it did before."""
    class Kept:
        def __init__(self, weight: Tensor, grid: IntegerGrid) -> None:
            self.weight = weight

        def dequantize(self) -> Tensor:
            return self.weight

    monkeypatch.setattr(methods, "round_to_nearest", Kept)
    checkpoint = open_checkpoint(tiny_checkpoint(family, tmp_path))
    calibration, other = (calibration_of(checkpoint, sequences_of()) for _ in range(2))
    block, plain = make_block(checkpoint, 0), make_block(checkpoint, 0)
    Awq(32, clip=False).round_block(block, lambda layers, make: calibration.gather(block, 0, layers, make))
    for name in ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down"):
        assert not torch.allclose(block.get_submodule(name).weight, plain.get_submodule(name).weight, rtol=0.01), name
    calibration.advance(block, 0)
    other.advance(plain, 0)
    for got, want in zip(calibration._hidden, other._hidden, strict=True):
        assert (got - want).abs().max() < 1e-4 * want.abs().max()


def test_awq_and_gptq_beat_rounding_in_a_model(tmp_path: Path) -> None:
    """The error of each layer's output for its own inputs, one channel of which is large in front of q, k and v."""
    checkpoint, errors = open_checkpoint(tiny_checkpoint("llama", tmp_path)), {}
    for name in ("rtn", "awq", "awq-gptq", "gptq"):
        calibration, block = calibration_of(checkpoint, sequences_of()), make_block(checkpoint, 0)
        block.input_norm.weight[5] = 20.0
        layers = methods.linears(block)
        before = [(linear.weight.clone(), calibration.gather(block, 0, [linear], InputStats)[0].hessian) for linear in layers]
        rounded = METHODS[name].round_block(block, lambda layers, make, c=calibration, b=block: c.gather(b, 0, layers, make))
        errors[name] = torch.tensor([output_error(linear.weight - weight, hessian) / output_error(weight, hessian)
                                     if item.error is None else item.error
                                     for linear, (weight, hessian), item in zip(layers, before, rounded, strict=True)])
    assert bool((errors["awq"] < errors["rtn"]).all()) and errors["awq"][0] < 0.5 * errors["rtn"][0]
    assert bool((errors["awq-gptq"] < errors["awq"]).all())
    assert errors["gptq"].sum() < 0.5 * errors["rtn"].sum()


# --- what is written ---


def unpack(words: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """int32 [A, B] -> int64 [A, B * 32 / bits], lowest bits first; order: where in a word each neighbour stands."""
    fields = (words.long()[..., None] >> torch.arange(0, 32, bits)) & (2**bits - 1)
    return (fields if order is None else fields[..., list(order)]).flatten(1)


def read_awq(t: dict[str, Tensor], name: str, size: int) -> Tensor:
    # autoawq's AWQ_REVERSE_ORDER
    order = (0, 4, 1, 5, 2, 6, 3, 7)
    codes, zeros = unpack(t[f"{name}.qweight"], 4, order), unpack(t[f"{name}.qzeros"], 4, order)
    scales = t[f"{name}.scales"]
    assert scales.dtype == torch.float16
    return ((codes - zeros.repeat_interleave(size, 0)) * scales.float().repeat_interleave(size, 0)).T


def read_gptq(t: dict[str, Tensor], name: str, bits: int) -> Tensor:
    codes = unpack(t[f"{name}.qweight"].T, bits)
    zeros = unpack(t[f"{name}.qzeros"], bits) + 1
    index, scales = t[f"{name}.g_idx"].long(), t[f"{name}.scales"]
    assert (t[f"{name}.g_idx"].dtype, scales.dtype) == (torch.int32, torch.float16)
    return (codes - zeros[index].T) * scales.float()[index].T


def read_fp8(t: dict[str, Tensor], name: str) -> Tensor:
    weight, scale = t[f"{name}.weight"], t[f"{name}.weight_scale"]
    assert (weight.dtype, scale.shape) == (torch.float8_e4m3fn, (weight.shape[0], 1))
    return weight.float() * scale


class Recorder:
    """A method that remembers what it put in place of each named layer's weights."""

    def __init__(self, method: Any) -> None:
        self._method, self.weights = method, {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def round_block(self, block: Block, gather: Any) -> Any:
        rounded = self._method.round_block(block, gather)
        for item in rounded:
            parts = item.linear.weight.clone().split([width for _, width in item.linear.sources])
            self.weights |= {source: part for (source, _), part in zip(item.linear.sources, parts, strict=True)}
        return rounded


def write(path: Path, name: str, out: Path, dtype: str | None = None) -> tuple[Recorder, dict[str, Tensor]]:
    out.mkdir()
    recorder = Recorder(METHODS[name])
    quantize(open_checkpoint(path), recorder, sequences_of(), out, CPU, dtype)
    return recorder, load_file(out / "model.safetensors")


@pytest.mark.parametrize("name", METHODS)
def test_files_hold_the_weights_that_the_blocks_had(name: str, tmp_path: Path) -> None:
    """Unpacked by another reading of the formats, they are what the calibration ran with."""
    path = tiny_checkpoint("qwen2", tmp_path, num_hidden_layers=2)
    recorder, tensors = write(path, name, tmp_path / "out")
    original = load_file(path / "model.safetensors")
    assert len(recorder.weights) == 2 * 7
    for layer_name, weight in recorder.weights.items():
        if name.startswith("fp8"):
            read = read_fp8(tensors, layer_name)
        elif name.startswith("gptq"):
            read = read_gptq(tensors, layer_name, 8 if "rows" in name else 4)
        else:
            read = read_awq(tensors, layer_name, 32)
        assert torch.equal(read, weight), layer_name
        if not name.startswith("awq"):
            plain = original[f"{layer_name}.weight"]
            assert (read - plain).norm() < (0.04 if name.startswith("fp8") or "rows" in name else 0.2) * plain.norm()
    if name == "fp8-static":
        peaks = [value for key, value in tensors.items() if key.endswith("input_scale")]
        assert len(peaks) == 2 * 7 and all(peak.shape == (1,) and 0 < float(peak) < 1 for peak in peaks)
    half = torch.float32 if name.startswith("fp8") else torch.float16
    assert {tensors[key].dtype for key in tensors if key.endswith(("norm.weight", "proj.bias")) or "embed" in key} == {half}
    assert len(recorder.weights) == len({key.rpartition(".")[0] for key in tensors if "proj" in key})


@pytest.mark.parametrize(("family", "name"), [
    ("llama-bias", "awq"), ("llama-bias", "gptq-desc"), ("qwen3", "gptq"), ("mistral", "gptq-rows"), ("gemma3", "awq")])
def test_the_engine_loads_integers(family: str, name: str, tmp_path: Path) -> None:
    """Logits of the quantised model against transformers' for the same model with the weights unpacked, plain."""
    path = tiny_checkpoint(family, tmp_path, num_hidden_layers=2, **({"layer_types": None} if family == "gemma3" else {}))
    recorder, tensors = write(path, name, tmp_path / "out", "float32")
    reference = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    plain = {key: value for key, value in tensors.items() if key in reference.state_dict() and value.dtype == torch.float32}
    plain |= {f"{key}.weight": weight for key, weight in recorder.weights.items()}
    missing, unexpected = reference.load_state_dict(plain, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    prompt = random_prompts(1, seed=4, shortest=60, longest=60)[0]
    with torch.inference_mode():
        want = reference(torch.tensor([prompt])).logits[0]
    got = full_logits(load_decoder(tmp_path / "out", torch.float32), prompt)
    assert (got - want).norm() < 1e-4 * want.norm()


@pytest.mark.parametrize(("family", "name"), [("llama-bias", "fp8"), ("gemma3", "fp8-static")])
def test_fp8_is_the_same_in_transformers_and_here(family: str, name: str, tmp_path: Path) -> None:
    """transformers runs the folder through compressed-tensors, inputs rounded to FP8 as well."""
    path = tiny_checkpoint(family, tmp_path)
    recorder, _ = write(path, name, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    prompt = random_prompts(1, seed=4, shortest=40, longest=40)[0]
    with torch.inference_mode():
        want = model(torch.tensor([prompt])).logits[0]
    for layer_name, weight in recorder.weights.items():     # unpacked by its first pass
        assert torch.equal(model.get_submodule(layer_name).weight.float(), weight)
    got = full_logits(load_decoder(tmp_path / "out", torch.float32), prompt)
    assert (got - want).norm() < 0.01 * want.norm()      # an input on the border of two codes may fall to either side
    assert (got - full_logits(load_decoder(path, torch.float32), prompt)).norm() > 0.05 * want.norm()


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_configs_say_the_same_to_transformers_and_to_us(family: str, tmp_path: Path) -> None:
    path = tiny_checkpoint(family, tmp_path)
    write(path, "rtn", tmp_path / "out")
    before, after = (open_checkpoint(folder).spec for folder in (path, tmp_path / "out"))
    fields = {name: getattr(after, name) for name in ModelSpec.__slots__}
    assert fields.pop("dtype") == ("bfloat16" if family == "gemma3" else "float16")
    assert fields.pop("quantization") is not None
    assert fields == {name: getattr(before, name) for name in fields}
    config = json.loads((tmp_path / "out/config.json").read_text())
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert theirs.to_diff_dict()["quantization_config"]["bits"] == 4
    assert [type(theirs).__name__[:-6]] == [name.removesuffix("ForCausalLM") + ("Text" if family == "gemma3" else "")
                                            for name in config["architectures"]]


def test_a_null_in_a_config_is_not_the_default(tmp_path: Path) -> None:
    """Mistral's later releases have no window; without the key it would be 4096."""
    write(tiny_checkpoint("mistral", tmp_path, sliding_window=None), "rtn", tmp_path / "out")
    assert {layer.window for layer in open_checkpoint(tmp_path / "out").spec.layers} == {0}
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").sliding_window is None


def test_large_models_are_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_checkpoint("llama", tmp_path)
    _, whole = write(path, "rtn", tmp_path / "whole")
    monkeypatch.setattr(folders, "_SHARD_BYTES", 40_000)
    (tmp_path / "out").mkdir()
    quantize(open_checkpoint(path), METHODS["rtn"], [], tmp_path / "out", CPU)
    shards = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    read = open_checkpoint(tmp_path / "out")
    assert read.names() == set(whole)
    assert all(torch.equal(read.tensor(key), value) for key, value in whole.items())


def test_gemma_is_neither_run_nor_stored_in_float16(tmp_path: Path) -> None:
    """Whose range its hidden states leave, whatever its weights came in."""
    spec = replace(open_checkpoint(tiny_checkpoint("gemma3", tmp_path)).spec, dtype="float16")
    assert running_dtype(spec, torch.device("cuda")) == torch.bfloat16
    assert {stored_dtype(spec, METHODS[name]) for name in ("fp8", "awq", "gptq")} == {"bfloat16"}
    with pytest.raises(ModelError, match=r"dtype=float16: gemma3's hidden states leave its range"):
        check(spec, METHODS["awq"], "float16")


@pytest.mark.parametrize(("name", "tensor", "value", "named"), [
    ("rtn", "self_attn.k_proj.bias", 7e4, "self_attn.k_proj.bias"),
    ("rtn", "input_layernorm.weight", 7e4, "input_layernorm.weight"),
    ("rtn", "mlp.up_proj.weight", float("nan"), "mlp.up_proj.scales"),
    ("fp8", "mlp.down_proj.weight", float("inf"), "mlp.down_proj.weight_scale")])
def test_what_is_not_finite_is_not_written(name: str, tensor: str, value: float, named: str, tmp_path: Path) -> None:
    path = tiny_checkpoint("qwen2", tmp_path, num_hidden_layers=1)
    tensors = load_file(path / "model.safetensors")
    tensors[f"model.layers.0.{tensor}"].view(-1)[0] = value
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"^tensor model.layers.0.{named} would be written .* set dtype=bfloat16"):
        write(path, name, tmp_path / "out")
    if value == 7e4:
        write(path, name, tmp_path / "wider", "bfloat16")


def test_what_cannot_be_quantized_is_one_line(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path)
    checkpoint = open_checkpoint(path)
    write(path, "rtn", tmp_path / "out")
    for method, source, says in (
            (METHODS["rtn"], tmp_path / "out", r"is quantised already \(awq\)"),
            (METHODS["awq"], path, "needs calibration data"),
            (RoundToNearest(128), path, "multiples of 128 and 8")):
        with pytest.raises(ModelError, match=says) as raised:
            quantize(open_checkpoint(source), method, [], tmp_path, CPU)
        assert "\n" not in str(raised.value)
    with pytest.raises(ModelError, match=r"group_size=128 does not divide the 64 inputs of model\.layers.*: set group_size=32"):
        group_size_for(checkpoint.spec, 128)
    assert (group_size_for(checkpoint.spec, None), group_size_for(checkpoint.spec, -1)) == (32, -1)


def test_one_step_of_many_sequences_is_each_alone(tmp_path: Path) -> None:
    path = tiny_checkpoint("mistral", tmp_path)
    decoder, sequences = load_decoder(path, torch.float32), sequences_of(3)
    spec = decoder.spec
    for batch in batches(sequences, 200):
        caches = [prefill_cache(spec, prefill_pages(batch, 16) + 4, torch.float32, CPU) for _ in range(spec.num_layers)]
        for cache in caches:
            cache.k, cache.v = (t.view(-1, spec.num_kv_heads, 16, spec.head_dim) for t in (cache.k, cache.v))
        got = decoder.logits(decoder(prefill_step(batch, CPU, 16, first_page=3), caches))
        want = torch.cat([full_logits(decoder, sequence.tolist()) for sequence in batch])
        assert (got - want).abs().max() < 1e-3 * want.std()
    assert [len(batch) for batch in batches([np.zeros(n) for n in (3, 3, 9, 1, 2)], 6)] == [2, 1, 2]


def test_rope_factors_of_gguf_files_become_a_config() -> None:
    """What a GGUF file of Llama 3.1 or 3.2 says as divisors is Hugging Face's llama3 rule again; others are refused."""
    shape = {"model_type": "llama", "vocab_size": 300, "hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 1,
             "num_attention_heads": 2, "max_position_embeddings": 131_072, "rope_theta": 500_000.0, "num_local_experts": 0}
    rule = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}
    plain, wanted = (ModelSpec.from_hf({**shape, "rope_scaling": scaling}).layers[0].rope.inv_freq() for scaling in (None, rule))
    factors = (plain / wanted).tolist()

    def converted(factors: list[float]) -> dict[str, Any]:
        config = {**shape, "rope_scaling": {"rope_type": "factors", "factors": factors}}
        return folders.hf_config(SimpleNamespace(config=config, spec=ModelSpec.from_hf(config), path=Path("model.gguf")))

    config = converted(factors)
    assert torch.allclose(ModelSpec.from_hf(config).layers[0].rope.inv_freq(), wanted, rtol=1e-5)
    assert config["architectures"] == ["LlamaForCausalLM"] and "num_local_experts" not in config
    with pytest.raises(ModelError, match=r"model\.gguf: its rope factors are not Llama 3\.1's"):
        converted([*factors[:-1], 3.0])
