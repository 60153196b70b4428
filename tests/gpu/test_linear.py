"""Products with dense weights, compiled, against float64; overlapping launches give what launches one by one give."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kernel_cases import check_linear, randn

if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)

from kernels import chain, dense_few, dense_row, gemm_many, ops, ref
from kernels.gemm_skinny import Tile, product
from kernels.hopper import processors
from kernels.split_k import counters

HOPPER = pytest.mark.skipif(torch.cuda.get_device_capability()[0] != 9, reason="these kernels are for Hopper")
WHOLE_HOPPER = pytest.mark.skipif(processors(torch.device("cuda")) != 132, reason="the shapes are for 132 multiprocessors")


def run(tile, x, weight, bias, activation, out):
    return product(x, weight, bias, tile, activation, out)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m, features, depth, tile", [
    (1, 4096, 4096, Tile(8, 512, 1, 4, 1, vector=True)),
    (1, 1000, 576, Tile(32, 64, 3, 4, 4, vector=True)),
    (1, 4096, 4096, Tile(16, 256, 1, 4, 6)),
    (3, 960, 576, Tile(16, 64, 1, 4, 8)),
    (16, 4096, 14336, Tile(64, 64, 4, 4, 8)),
    (30, 1530, 1536, Tile(32, 128, 2, 4, 5)),
    (50, 6144, 4096, Tile(64, 64, 2, 4, 5)),
    (128, 3000, 2048, Tile(128, 64, 2, 8, 3)),
])
@pytest.mark.parametrize("activation, bias", [("", False), ("", True), ("silu", True), ("gelu_tanh", False)])
def test_product(dtype, m, features, depth, tile, activation, bias):
    like = torch.empty(0, dtype=dtype, device="cuda")
    check_linear(partial(run, tile), like, m, features, depth, activation, bias)
    assert not counters(like.device).any()


FEW = [partial(dense_few.product, tile=dense_few.Tile(*tile)) for tile in ((1, 16, 32, 1), (8, 16, 128, 1), (16, 16, 64, 1),
                                                                           (16, 32, 64, 2), (4, 64, 64, 3), (4, 16, 256, 2))]
ROW = [partial(dense_row.product, tile=dense_row.Tile(*tile)) for tile in ((4, 4, 2), (8, 4, 2), (16, 8, 1, 64), (1, 2, 3))]


@HOPPER
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("call", FEW + ROW, ids=lambda call: "-".join(map(str, call.keywords["tile"])))
@pytest.mark.parametrize("activation, bias", [("", False), ("", True), ("silu", True), ("gelu_tanh", False)])
def test_few_rows_from_registers(dtype, call, activation, bias):
    def run(x, weight, bias, activation, out):
        return call(x, weight, bias, activation=activation, out=out)

    like = torch.empty(0, dtype=dtype, device="cuda")
    one, few = ((1, 1152, 768), (1, 4096, 14336)), ((1, 1152, 1536), (3, 4096, 4096), (8, 640, 768))
    for m, features, depth in one if call in ROW else few:
        check_linear(run, like, m, features, depth, activation, bias)


@pytest.mark.parametrize("m", [1, 7, 16, 56, 100, 128])
@pytest.mark.parametrize("features, depth", [(6144, 4096), (4096, 14336), (3072, 576), (576, 1536), (17920, 1536), (2048, 1536)])
def test_ops_as_the_rule_has_them(m, features, depth):
    like = torch.empty(0, dtype=torch.bfloat16, device="cuda")
    x, weight = randn(m, depth, like=like), randn(features, depth, like=like) / depth**0.5
    got, want = ops.gated_linear(x, weight, None, "silu"), ref.gated_linear(x, weight, None, "silu")
    assert float((got.double() - want.double()).norm() / want.double().norm()) < 6e-3
    got, want = ops.linear(x, weight), x.double() @ weight.double().T
    assert float((got.double() - want).norm() / want.norm()) < 3e-3


def run_gated(x, weight, bias, activation, out):
    """Into the first rows of a longer output, whose others hold NaN and keep it."""
    longer = out.new_full((out.shape[0] + 128, out.shape[1]), float("nan"))
    gemm_many.gated_product(x, weight, activation, longer[: out.shape[0]])
    assert longer[out.shape[0] :].isnan().all()
    return out.copy_(longer[: out.shape[0]])


@HOPPER
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m, features, depth", [(1, 256, 256), (129, 512, 256), (1000, 2048, 768), (4100, 5120, 1280)])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_many_gated_rows(dtype, m, features, depth, activation):
    """Fewer tiles than multiprocessors, and more; an odd number of turns of the ring for each."""
    check_linear(run_gated, torch.empty(0, dtype=dtype, device="cuda"), m, features, depth, activation)


@HOPPER
def test_which_gated_rows_are_many():
    def takes(m=gemm_many.LEAST_GATED, features=512, depth=512, dtype=torch.bfloat16, of_weight=torch.bfloat16, stride=512, at=0):
        x = torch.empty(m * stride + at, dtype=dtype, device="cuda")[at:].as_strided((m, depth), (stride, 1))
        return gemm_many.takes_gated(x, torch.empty(features, depth, dtype=of_weight, device="cuda"))

    assert takes() and takes(dtype=torch.float16, of_weight=torch.float16) and takes(stride=520) and takes(at=8)
    assert not takes(m=gemm_many.LEAST_GATED - 1)
    assert not takes(features=384) and not takes(depth=384)
    assert not takes(dtype=torch.float32, of_weight=torch.float32) and not takes(of_weight=torch.float16)
    assert not takes(stride=516) and not takes(at=4)


@HOPPER
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m, features, depth", [(1, 256, 256), (129, 512, 256), (1000, 2048, 768), (4100, 5120, 1280)])
def test_many_rows_are_added_where_they_belong(dtype, m, features, depth):
    """To the first rows and columns of a residual that has more; rounded as two kernels would."""
    like = torch.empty(0, dtype=dtype, device="cuda")
    x, weight = randn(m, depth + 64, like=like)[:, :depth], randn(features, depth, like=like) / depth**0.5
    longer = randn(m + 128, features + 64, like=like)
    before, residual = longer.clone(), longer[:m, :features]
    gemm_many.add_product(x, weight, residual)
    product = x.double() @ weight.double().T
    want = before[:m, :features].double() + product
    assert float((residual.double() - want).norm() / want.norm()) < 3e-3
    separate = before[:m, :features] + product.to(dtype)
    assert float((residual != separate).float().mean()) < 1e-2      # where float32 sums round otherwise
    longer[:m, :features] = before[:m, :features]
    assert torch.equal(longer, before)


@HOPPER
def test_which_rows_are_added(monkeypatch):
    monkeypatch.setattr(gemm_many, "processors", lambda device: 132)

    def takes(m=1 << 14, features=4096, depth=512, dtype=torch.bfloat16, stride=4096):
        x, weight = (torch.empty(n, depth, dtype=torch.bfloat16, device="cuda") for n in (m, features))
        return gemm_many.takes_added(x, weight, torch.empty(m, stride, dtype=dtype, device="cuda")[:, :features])

    assert takes() and takes(stride=4104) and takes(m=gemm_many.LEAST_ADDED)
    assert not takes(m=gemm_many.LEAST_ADDED - 1)
    assert not takes(m=4352)            # 34 x 16 tiles: four for each multiprocessor, and 16 more
    assert not takes(features=4000) and not takes(depth=384)
    assert not takes(dtype=torch.float16) and not takes(stride=4100)


@HOPPER
@pytest.mark.parametrize("m, added", [(1 << 14, True), (1 << 10, False)])
def test_onto_the_residual_as_the_rule_has_it(m, added):
    like = torch.empty(0, dtype=torch.bfloat16, device="cuda")
    x, weight = randn(m, 512, like=like), randn(4096, 512, like=like) / 512**0.5
    residual = randn(m, 4096, like=like)
    want = residual.double() + x.double() @ weight.double().T
    left = ops.linear_onto(x, weight, None, residual)
    assert (left is None) == added
    got = residual if left is None else residual + left
    assert float((got.double() - want).norm() / want.norm()) < 3e-3
    assert ops.linear_onto(x, weight, randn(4096, like=like), residual) is not None


@HOPPER
@pytest.mark.parametrize("m, features, depth", [(4500, 2048, 512), (4500, 2048, 192), (4500, 1000, 512), (300, 2048, 512)])
def test_gated_rows_as_the_rule_has_them(m, features, depth):
    like = torch.empty(0, dtype=torch.bfloat16, device="cuda")
    x, weight = randn(m, depth, like=like), randn(features, depth, like=like) / depth**0.5
    got, want = ops.gated_linear(x, weight, None, "silu"), ref.gated_linear(x, weight, None, "silu")
    assert float((got.double() - want.double()).norm() / want.double().norm()) < 6e-3


@HOPPER
def test_many_gated_rows_in_a_graph():
    """The descriptors that TMA reads are kept with the graph."""
    like = torch.empty(0, dtype=torch.bfloat16, device="cuda")
    weight, inputs = randn(2048, 512, like=like) / 22, [randn(900, 512, like=like) for _ in range(3)]
    want = [gemm_many.gated_product(x, weight, "silu") for x in inputs]
    x, graph = inputs[0].clone(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = gemm_many.gated_product(x, weight, "silu")
    for of, y in zip(inputs, want, strict=True):
        x.copy_(of)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, y)


@pytest.mark.parametrize("m", [1, 16, 64])
def test_overlapping_launches_change_nothing(m):
    """A chain in a graph whose every kernel reads what the one before has just written, into memory used again and again."""
    like = torch.empty(0, dtype=torch.bfloat16, device="cuda")
    weights = [(randn(1536, 576, like=like) / 24, randn(576, 768, like=like) / 28) for _ in range(40)]
    scale, first, start = randn(576, like=like), randn(m, 576, like=like), randn(m, 576, like=like)
    wide, narrow = Tile(16, 64, 3, 4, 3), Tile(16, 64, 2, 4, 6)
    if m == 64:
        wide = narrow = Tile(64, 64, 1, 4, 3)

    def chain(overlap):
        x, residual = first, start.clone()
        for up, down in weights:
            h = ops.add_rms_norm(x, residual, scale, 1e-5)
            x = product(product(h, up, None, wide, "silu", None, overlap), down, None, narrow, "", None, overlap)
        return torch.cat([x, residual])

    alone = chain(False)
    chain(True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(True)
    for _ in range(50):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, alone)


@WHOLE_HOPPER
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [9, 16, 33, 50, 64])
@pytest.mark.parametrize("hidden, inner, heads, qkv, activation, plus_one", [
    (4096, 14336, 4096, 6144, "silu", False),       # Mistral-7B, Llama-3-8B
    (4096, 12288, 4096, 6144, "silu", False),       # Qwen3-8B
    (3072, 8192, 3072, 5120, "gelu_tanh", True),    # Llama-3.2-3B, but for the activation and the norm
    (4096, 12288, 4096, 3048, "silu", False),       # of whose last product there is nothing for the last program
    (4096, 14336, 4096, 0, "silu", False),
])
def test_between_attentions(dtype, rows, hidden, inner, heads, qkv, activation, plus_one):
    """As near to float64 as one product after the other, and the same bits every time."""
    def draw(*shape):
        return (torch.randn(*shape, device="cuda") / shape[-1] ** 0.5).to(dtype)

    h, residual = draw(rows, heads) * heads**0.5, draw(rows, hidden) * hidden**0.5
    o, gate_up, down = draw(hidden, heads), draw(2 * inner, hidden), draw(hidden, inner)
    mlp_norm, norm = 1 + draw(hidden), 1 + draw(hidden)
    into = draw(qkv, hidden) if qkv else None

    def error(got, want):
        return float((got.double() - want).norm() / want.norm())

    exact = residual.double()
    want = ref.between(h.double(), exact, o.double(), mlp_norm.double(), gate_up.double(), down.double(), norm.double(),
                       None if into is None else into.double(), 1e-5, plus_one, activation)
    beside = residual.clone()
    one_by_one = ref.between(h, beside, o, mlp_norm, gate_up, down, norm, into, 1e-5, plus_one, activation)
    results = []
    for _ in range(8):
        after = residual.clone()
        y = ops.between(h, after, o, mlp_norm, gate_up, down, norm, into, 1e-5, plus_one, activation)
        assert y is not None
        results.append((y, after))
    y, after = results[0]
    assert error(y, want) < 1.05 * error(one_by_one, want) and error(after, exact) < 1.05 * error(beside, exact)
    assert all(torch.equal(y, again) and torch.equal(after, left) for again, left in results[1:])
    assert not counters(h.device).any()


@WHOLE_HOPPER
def test_between_attentions_of_other_layers():
    """Of too many or few rows, of small weights, or such as cannot be cut, nothing is done."""
    def between(rows, hidden, inner, dtype=torch.bfloat16):
        h, residual = (torch.ones(rows, hidden, dtype=dtype, device="cuda") for _ in range(2))
        shapes = (hidden, hidden), (2 * inner, hidden), (hidden, inner)
        weights = [torch.ones(shape, dtype=dtype, device="cuda") for shape in shapes]
        norm = torch.ones(hidden, dtype=dtype, device="cuda")
        after = ops.between(h, residual, weights[0], norm, *weights[1:], norm, None, 1e-5, False, "silu")
        assert after is not None or bool((residual == 1).all())
        return after is not None

    assert between(chain.LEAST_ROWS, 4096, 8192) and between(chain.MOST_ROWS, 4096, 8192)
    assert not between(chain.LEAST_ROWS - 1, 4096, 8192) and not between(chain.MOST_ROWS + 1, 4096, 8192)
    assert not between(16, 576, 1536) and not between(16, 4096, 11008) and not between(16, 4096, 8192, torch.float32)
