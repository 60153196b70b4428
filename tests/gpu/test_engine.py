"""The engine on the GPU: the same rows give the same tokens however they run, and bf16 is no worse than transformers' own."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import finish, full_logits, load_decoder, make_requests, mixed_requests, random_prompts, running, tokens_of
from models import TURN_END, VOCAB, load_reference, tiny_checkpoint, tiny_tokenizer
from transformers import AutoModelForCausalLM

from engine.layers.attention import StepInputs
from engine.request import SamplingParams
from kernels import ops
from kernels.hopper import processors

if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)

CUDA = {"device": "cuda", "kv_pages": 600, "max_rows": 32}
TIE = 1e-4
FAMILIES = ["llama", "mistral", "qwen3", "gemma3"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models with a head size that real ones have."""
    return {family: tiny_checkpoint(family, tmp_path_factory.mktemp(family), head_dim=64) for family in FAMILIES}


@pytest.fixture(scope="module", params=["llama", "mistral"])
def alone(request: pytest.FixtureRequest, folders: dict[str, Path]) -> tuple[Path, dict[Hashable, list[int]]]:
    """A model, and what each request gives when it runs by itself, one step at a time, nothing shared, no graphs."""
    model, tokens = folders[request.param], {}
    with running(model, **CUDA, depth=1, prefix_sharing=False, cuda_graphs=False) as engine:
        for one in mixed_requests():
            tokens |= tokens_of(finish(engine, [one]))
    assert len({tuple(row) for row in tokens.values()}) == len(tokens)
    return model, tokens


@pytest.mark.parametrize("config", [
    {"depth": 1}, {"depth": 2}, {"depth": 1, "cuda_graphs": False}, {"depth": 2, "cuda_graphs": False},
    {"prefix_sharing": False}, {"max_rows": 3}, {"page_size": 32}, {"max_step_tokens": 8, "max_rows": 8},
    {"max_step_tokens": 4096},
], ids=lambda config: "-".join(f"{key}={value}" for key, value in config.items()))
def test_batched_rows_give_the_same_tokens(alone: tuple[Path, dict], config: dict) -> None:
    model, want = alone
    requests = mixed_requests()
    random.Random(5).shuffle(requests)
    with running(model, **CUDA | config) as engine:
        assert tokens_of(finish(engine, requests)) == want


@pytest.mark.parametrize("depth", [1, 2])
def test_preempted_rows_give_the_same_tokens(alone: tuple[Path, dict], depth: int) -> None:
    model, want = alone
    with running(model, **CUDA | {"max_model_len": 160, "kv_pages": 11, "max_rows": 8}, depth=depth) as engine:
        # Enough short rows first, so that the forecast lets in more than the pool can hold when the long ones come.
        finish(engine, make_requests([[1, 2, 3]] * 80, SamplingParams(max_tokens=1)))
        assert tokens_of(finish(engine, mixed_requests())) == want
        assert engine.stats().preemptions > 0


@pytest.mark.parametrize("depth", [1, 2])
def test_running_out_of_memory_in_mid_forward_gives_the_same_tokens(alone: tuple[Path, dict], depth: int) -> None:
    """Steps of more than 300 tokens meet an allocation that the device cannot serve, half of their layers done."""
    model, want = alone

    def allocate(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[1].shape[0] > 300:
            torch.empty(1 << 45, dtype=torch.uint8, device="cuda")

    with running(model, **CUDA | {"max_step_tokens": 4096}, depth=depth) as engine:
        engine._runner.model.blocks[1].attention.register_forward_pre_hook(allocate)
        assert tokens_of(finish(engine, mixed_requests())) == want
        assert engine._scheduler.max_step_tokens < 4096


def test_a_prefix_found_gives_the_same_tokens(alone: tuple[Path, dict]) -> None:
    model, want = alone
    with running(model, **CUDA) as engine:
        first, again = finish(engine, mixed_requests()), finish(engine, mixed_requests())
        assert tokens_of(first) == tokens_of(again) == want
        assert sum(c.cached_tokens for c in again.values()) >= 7 * 48


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(family: str, folders: dict[str, Path]) -> None:
    """Every token is the likeliest under transformers' float32 logits on the CPU, for the same tokens before it."""
    prompts = random_prompts(40, seed=1, shortest=20, longest=60, shared=40)
    with running(folders[family], **CUDA) as engine:
        outputs = tokens_of(finish(engine, make_requests(prompts, SamplingParams(max_tokens=48, ignore_eos=True))))
    reference = load_reference(folders[family])
    for i, prompt in enumerate(prompts):
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + outputs[i][:-1]]), logits_to_keep=48).logits[0]
        chosen = logits.gather(1, torch.tensor(outputs[i])[:, None]).squeeze(1)
        assert float((logits.amax(-1) - chosen).max()) < TIE


@pytest.mark.parametrize("by_automaton", [True, False])
def test_guided_rows(folders: dict[str, Path], by_automaton: bool) -> None:
    pytest.importorskip("llguidance")
    from engine.guided.llg import LLGuidanceBackend

    backend = LLGuidanceBackend(tiny_tokenizer(), VOCAB, [TURN_END])
    note = {"type": "string", "maxLength": 20} if by_automaton else {"type": "string", "pattern": "^[a-z]{1,20}$"}
    grammar = backend.compile_schema({
        "type": "object", "properties": {"label": {"enum": ["billing", "delivery"]}, "note": note},
        "required": ["label", "note"], "additionalProperties": False})
    assert (grammar.automaton is not None) == by_automaton
    results = []
    for config in ({"depth": 1, "cuda_graphs": False}, {"depth": 2}):
        params = [SamplingParams(max_tokens=90, temperature=1.0, seed=i) for i in range(20)]
        requests = make_requests(random_prompts(20, seed=2, longest=40), params)
        for request in requests[::2]:
            request.grammar = grammar
        with running(folders["llama"], **CUDA | config, guided=backend) as engine:
            done = finish(engine, requests)
        for i in range(0, 20, 2):
            assert list(grammar.check(bytes(done[i].tokens.tolist()).decode())) == ["label", "note"]
        results.append({i: (c.tokens.tolist(), c.finish_reason, c.forced_tokens) for i, c in done.items()})
    assert results[0] == results[1]


def test_aborts_leave_no_trace(folders: dict[str, Path]) -> None:
    prompts, params = random_prompts(30, seed=4), SamplingParams(max_tokens=30, ignore_eos=True)
    with running(folders["llama"], **CUDA) as engine:
        want = tokens_of(finish(engine, make_requests(prompts, params)))
        for request in make_requests(prompts, params):
            engine.submit(request)
        for _ in range(7):
            engine.step()
        engine.abort()
        assert len(engine.step()) == 30
        assert engine.stats().kv_pages_used == 0
        assert tokens_of(finish(engine, make_requests(prompts, params))) == want


def test_the_pool_takes_the_memory_it_may(folders: dict[str, Path]) -> None:
    """Sized by a step of the worst kind; it holds what it was sized for."""
    config = {"device": "cuda", "dtype": "bfloat16", "gpu_memory": 0.3, "max_rows": 64, "max_step_tokens": 4096,
              "max_model_len": 512}
    with running(folders["llama"], **config) as engine:
        assert engine.stats().kv_pages_total == 64 * 32, "no more than the rows can use"
        prompts = [np.random.default_rng(i).integers(0, 256, size=400).tolist() for i in range(64)]
        done = finish(engine, make_requests(prompts, SamplingParams(max_tokens=100, ignore_eos=True)))
        assert all(c.tokens.size == 100 for c in done.values())
        free, total = torch.cuda.mem_get_info()
        assert total - free < 0.35 * total
        assert engine.stats().preemptions == 0
    with pytest.raises(ValueError, match=r"engine\.max_model_len=512 tokens needs .* GiB"), running(
            folders["llama"], **config | {"gpu_memory": 0.05, "kv_pages": 8}):
        pass


# --- bf16 ---


def largest_differences(model: Path, sequences: list[list[int]], decode: int) -> tuple[float, float]:
    """Largest difference of a logit from transformers' in float32: of our bf16 forward pass, and of transformers' own."""
    exact = load_reference(model).cuda()
    half = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).cuda().eval()
    decoder = load_decoder(model, torch.bfloat16, "cuda")
    ours = theirs = 0.0
    for tokens in sequences:
        ids = torch.tensor([tokens], device="cuda")
        with torch.inference_mode():
            want, reference = exact(ids).logits[0].float().cpu(), half(ids).logits[0].float().cpu()
        got = full_logits(decoder, tokens, decode)
        ours, theirs = max(ours, float((got - want).abs().max())), max(theirs, float((reference - want).abs().max()))
    exact.cpu()
    return ours, theirs


@pytest.mark.parametrize("decode", [0, 64], ids=["prefill", "decode"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_logits_are_as_near_as_those_of_transformers(family: str, decode: int, folders: dict[str, Path]) -> None:
    ours, theirs = largest_differences(folders[family], random_prompts(8, seed=5, shortest=100, longest=200), decode)
    assert 0 < ours <= 2 * theirs


@pytest.mark.skipif(processors(torch.device("cuda")) != 132, reason="the shapes are for 132 multiprocessors")
@torch.inference_mode()
def test_decode_rows_whose_products_are_made_in_one_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As near to float32 as one product after the other; replayed from a graph, the same bits."""
    model = tiny_checkpoint("mistral", tmp_path, hidden_size=2048, intermediate_size=8192, num_hidden_layers=2,
                            num_attention_heads=24, num_key_value_heads=4, head_dim=128)
    rows, page, pages, position = 20, 16, 3, 40
    index = torch.arange(rows, dtype=torch.int32, device="cuda")
    table = torch.arange(1, rows * pages + 1, dtype=torch.int32, device="cuda").view(rows, pages)
    slots = table[:, position // page] * page + position % page
    step = StepInputs(index + 3, torch.full_like(index, position), slots, table, index, rows, position + 1)
    seen = []

    def observed(*args: Any) -> torch.Tensor | None:
        after = between(*args)
        seen.append(after is not None)
        return after

    def hidden(dtype: torch.dtype) -> Callable[[], torch.Tensor]:
        decoder = load_decoder(model, dtype, "cuda")
        cache = decoder.make_cache(rows * pages + 1, page)
        cache.storage.normal_(generator=torch.Generator("cuda").manual_seed(1))
        return lambda: decoder(step, cache.layers)

    between = ops.between
    monkeypatch.setattr(ops, "between", observed)
    want, forward = hidden(torch.float32)(), hidden(torch.bfloat16)
    at_once = forward()
    assert seen == [False, False, True, True]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        replayed = forward()
    for _ in range(3):
        replayed.fill_(float("nan"))
        graph.replay()
        assert torch.equal(replayed, at_once)
    monkeypatch.setattr(ops, "between", lambda *args: None)
    one_by_one = forward()
    assert (at_once - want).norm() < 1.1 * (one_by_one - want).norm()
    assert (one_by_one - want).norm() < 0.1 * want.norm()


@pytest.mark.skipif("GRISTMILL_MODEL" not in os.environ, reason="GRISTMILL_MODEL names no model")
@pytest.mark.parametrize("decode", [0, 16], ids=["prefill", "decode"])
def test_bf16_logits_of_a_real_model(decode: int) -> None:
    """GRISTMILL_MODEL: a folder of config.json and *.safetensors."""
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 10_000, size=size).tolist() for size in (64, 200, 400)]
    ours, theirs = largest_differences(Path(os.environ["GRISTMILL_MODEL"]), sequences, decode)
    print(f"largest difference from float32: ours {ours:.4f}, transformers' {theirs:.4f}")
    assert 0 < ours <= 2 * theirs
