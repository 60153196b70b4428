"""The torch twins by themselves: the noise's statistics, sampling, penalties and log-probabilities, quantised products."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import chi_square_holds, kept64, sampling_table

from kernels import ops, ref


def noise(seeds: torch.Tensor, positions: torch.Tensor, width: int) -> torch.Tensor:
    key = ref.noise_key(seeds.int(), torch.zeros_like(seeds).int(), positions.int())
    return ref.uniform(key[:, None], torch.arange(width, dtype=torch.int32))


def test_hash_is_a_bijection():
    x = torch.arange(-(2**19), 2**19, dtype=torch.int32)
    assert ref.hash32(x).unique().numel() == x.numel()


@pytest.mark.parametrize("axis", ["columns", "positions", "seeds"])
def test_noise_is_uniform_and_neighbours_are_unrelated(axis):
    zeros, steps = torch.zeros(64), torch.arange(64)
    u = noise(steps if axis == "seeds" else zeros, zeros if axis == "seeds" else steps, 20000)
    assert float(u.min()) > 0
    assert float(u.max()) < 1
    n = u.numel()
    cells = torch.full((256,), 1 / 256, dtype=torch.float64)
    assert chi_square_holds(torch.bincount((u.flatten() * 256).long(), minlength=256), cells)
    low_bits = (u.double() * 2**23).long().flatten() % 256
    assert chi_square_holds(torch.bincount(low_bits, minlength=256), cells)
    # Every (seed, position) by itself: a bad key would show as one bad row.
    per_row = torch.stack([torch.bincount((row * 16).long(), minlength=16) for row in u])
    assert all(chi_square_holds(row, torch.full((16,), 1 / 16, dtype=torch.float64)) for row in per_row)
    x = (u.double() - 0.5) * 12**0.5
    for a, b in ((x[:, :-1], x[:, 1:]), (x[:, :-2], x[:, 2:])) if axis == "columns" else ((x[:-1], x[1:]), (x[:-2], x[2:])):
        assert abs(float((a * b).mean())) < 5 / n**0.5
        pairs = ((a * 0.2886751 + 0.5) * 16).long() * 16 + ((b * 0.2886751 + 0.5) * 16).long()
        assert chi_square_holds(torch.bincount(pairs.flatten(), minlength=256), cells)


def test_noise_of_keys_a_column_apart_is_not_the_same_noise_shifted():
    column = torch.arange(5000, dtype=torch.int32)
    a = ref.uniform(torch.tensor(1234, dtype=torch.int32), column)
    b = ref.uniform(torch.tensor(1234, dtype=torch.int32) + ref.GOLDEN, column)
    assert not bool((a[1:] == b[:-1]).any())


@pytest.mark.parametrize("setting", [(1.0, 0, 1.0, 0.0), (0.5, 0, 1.0, 0.0), (2.0, 12, 1.0, 0.0), (1.0, 0, 0.8, 0.0),
                                     (1.5, 20, 0.9, 0.01)])
def test_frequencies_follow_the_filtered_softmax(setting):
    temperature, top_k, top_p, min_p = setting
    n, width = 2000, 40
    logits = torch.randn(width, generator=torch.Generator().manual_seed(3)) * 2
    logits[7] = ref.NEG_INF
    table = sampling_table([setting], [42])
    tokens = ref.sample(logits.expand(n, -1), table, torch.zeros(n, dtype=torch.int32), torch.arange(n, dtype=torch.int32))
    x = logits.double() / temperature
    probs = torch.softmax(x.masked_fill(~kept64(x, top_k, top_p, min_p), ref.NEG_INF), 0)
    assert chi_square_holds(torch.bincount(tokens.long(), minlength=width), probs)


def test_seeds_give_independent_tokens_of_the_same_distribution():
    n, width = 2000, 8
    logits = torch.linspace(0, 2, width)
    table = sampling_table([(1.0, 0, 1.0, 0.0)] * n, [i + (i << 40) for i in range(n)])
    rows = torch.arange(n, dtype=torch.int32)
    tokens = ref.sample(logits.expand(n, -1), table, rows, torch.full_like(rows, 9)).long()
    probs = torch.softmax(logits.double(), 0)
    assert chi_square_holds(torch.bincount(tokens, minlength=width), probs)
    pairs = torch.bincount(tokens[:-1] * width + tokens[1:], minlength=width * width)
    assert chi_square_holds(pairs, torch.outer(probs, probs).flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_penalties(dtype):
    g = torch.Generator().manual_seed(0)
    n, width, length = 70, 90, 40       # more than one part of 64 rows
    logits = torch.randn(n + 2, width, generator=g).to(dtype)
    logits[:, 3] = ref.NEG_INF
    tokens = torch.randint(0, width, (n + 5, length), generator=g, dtype=torch.int32)
    tokens[:, 5] = width + 7            # an id that the head does not have
    index, rows = torch.randperm(n + 2, generator=g)[:n].int(), torch.randperm(n + 5, generator=g)[:n].int()
    total = torch.randint(1, length + 1, (n,), generator=g, dtype=torch.int32)
    prompt = (total * torch.rand(n, generator=g)).int()
    repetition, presence, frequency = (torch.rand(n, generator=g) + 0.5 for _ in range(3))
    want = logits.clone()
    for i in range(n):
        history = tokens[rows[i], : total[i]].tolist()
        output = history[prompt[i] :]
        for token in {t for t in history if t < width}:
            x = float(logits[index[i], token])
            x = x / float(repetition[i]) if x > 0 else x * float(repetition[i])
            want[index[i], token] = x - float(frequency[i]) * output.count(token) - float(presence[i]) * (token in output)
    ops.apply_penalties(logits, index, tokens, rows, prompt, total, repetition, presence, frequency)
    torch.testing.assert_close(logits, want)


@pytest.mark.parametrize("k", [0, 1, 5])
def test_logprobs(k):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 400, generator=g) * 5
    logits[:, 50:60] = ref.NEG_INF
    tokens = torch.randint(60, 400, (6,), generator=g, dtype=torch.int32)
    chosen, values, ids = ops.logprobs(logits, tokens, k)
    want = torch.log_softmax(logits.double(), -1)
    torch.testing.assert_close(chosen.double(), want[torch.arange(6), tokens.long()], rtol=1e-5, atol=1e-5)
    top = want.topk(k)
    torch.testing.assert_close(values.double(), top.values, rtol=1e-5, atol=1e-5)
    assert torch.equal(ids.long(), top.indices)
    assert chosen.dtype == values.dtype == torch.float32
    assert ids.dtype == torch.int32


def test_packed_nibbles():
    """Neighbours lie 16 bits apart: what the kernels unpack as a pair of halves."""
    codes = torch.arange(16, dtype=torch.uint8).view(1, 16)
    assert [f"{word & 0xFFFFFFFF:08x}" for word in ref.w4_pack(codes)[0].tolist()] == ["75316420", "fdb9eca8"]
    codes = torch.randint(0, 16, (5, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ref.w4_unpack(ref.w4_pack(codes)), codes)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 128])
def test_integer_products(bits, group):
    gen = torch.Generator().manual_seed(bits + group)
    codes = torch.randint(0, 1 << bits, (24, 128), dtype=torch.uint8, generator=gen)
    scales, bias = torch.rand(24, 128 // group, generator=gen), torch.randn(24, generator=gen)
    zeros = torch.randint(0, 1 << bits, scales.shape, generator=gen).float()
    perm, x = torch.randperm(128, generator=gen).int(), torch.randn(7, 128, generator=gen)
    matmul, weight = (ref.w4_matmul, ref.w4_pack(codes)) if bits == 4 else (ref.w8_matmul, codes)
    column = torch.arange(128) // group
    for given in (zeros, None):
        zero = zeros if given is not None else torch.full_like(zeros, 1 << (bits - 1))
        dense = torch.empty(24, 128, dtype=torch.float64)
        dense[:, perm.long()] = (codes.double() - zero.double()[:, column]) * scales.double()[:, column]
        want = x.double() @ dense.t() + bias.double()
        torch.testing.assert_close(matmul(x, weight, scales, given, group, bias, perm).double(), want, rtol=1e-5, atol=1e-4)
        plain = matmul(x[:, perm.long()], weight, scales, given, group, bias)
        torch.testing.assert_close(plain.double(), want, rtol=1e-5, atol=1e-4)


def test_fp8_products():
    """Against float64 on what the quantised values stand for, and near the unquantised product."""
    gen = torch.Generator().manual_seed(0)
    x, weight = torch.randn(9, 256, generator=gen), torch.randn(128, 256, generator=gen) * 0.02
    bias = torch.randn(128, generator=gen)
    x[3] = 0
    x[4] *= 1e4                             # outliers of a token are its own
    quantized, scale = ref.fp8_quantize(weight)
    assert quantized.dtype == torch.float8_e4m3fn and quantized.float().abs().amax(-1).eq(448).all()
    for input_scale in (None, torch.tensor([0.01])):
        tokens, token_scale = ref.fp8_quantize(x, input_scale)
        want = (tokens.double() * token_scale.double()) @ (quantized.double() * scale.double()).t() + bias.double()
        got = ref.fp8_matmul(x, quantized, scale.flatten(), input_scale, bias)
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    exact = x.double() @ weight.double().t()
    apart = ref.fp8_matmul(x, quantized, scale.flatten()).double() - exact
    assert (apart.norm(dim=-1) <= 0.05 * exact.norm(dim=-1)).all()
    # What is beyond the range of a fixed scale is cut off, not infinite.
    assert ref.fp8_matmul(x * 1e3, quantized, scale.flatten(), torch.tensor([0.01])).isfinite().all()


def test_fp8_blocks():
    gen = torch.Generator().manual_seed(1)
    x, weight = torch.randn(5, 256, generator=gen), torch.randn(384, 256, generator=gen) * 0.02
    x[:, 128:] *= 1e3
    weight[128:256] *= 50
    blocks = weight.view(3, 128, 2, 128).abs().amax((1, 3)) / ref.E4M3_MAX
    spread = blocks.repeat_interleave(128, 0).repeat_interleave(128, 1)
    quantized = (weight / spread).to(torch.float8_e4m3fn)
    halves = [ref.fp8_quantize(half) for half in x.split(128, -1)]
    inputs = torch.cat([value.double() * scale.double() for value, scale in halves], -1)
    want = inputs @ (quantized.double() * spread.double()).t()
    torch.testing.assert_close(ref.fp8_block_matmul(x, quantized, blocks).double(), want, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("window", [0, 6])
def test_keys_and_values_that_no_query_sees_may_be_no_numbers(window):
    """Pages are not emptied for the next row, and a page's end is another's beginning."""
    q, caches = torch.randn(2, 4, 16), torch.randn(2, 9, 2, 4, 16)
    table, positions = torch.arange(1, 9).view(2, 4), torch.tensor([5, 9])

    def attention(k, v):
        return ref.decode_attention(q, k, v, table, torch.arange(2), positions, 0.25, window, 0.0, 16)

    want = attention(*caches)
    for row, position in enumerate(positions.tolist()):
        for at in {*range(16)} - {*range(max(0, position + 1 - (window or 16)), position + 1)}:
            caches[:, table[row, at // 4], :, at % 4] = float("nan")
    assert torch.equal(attention(*caches), want)
