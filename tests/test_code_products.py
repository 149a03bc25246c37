"""Scores and sums over codes: plain against loops over numbers, compiled against plain."""

import pytest
import torch
from torch._dynamo.utils import counters

from msa_hf.modeling import code_products, code_products_compiled, ops
from msa_hf.modeling.bit_packing import pack, unpack
from msa_hf.modeling.code_products import code_scores, code_sums, plain_centroid_scores, plain_centroid_sums
from msa_hf.modeling.codebooks import codebook
from msa_hf.modeling.turboquant import VectorQuantizer
from msa_hf.modeling.turboquant_paper import PolarQuantizer, ProdQuantizer

CLOSE = 1e-5  # of the largest number


def assert_close(actual, expected):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert (actual - expected).abs().max() <= CLOSE * expected.abs().max()


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_codes(heads, tokens, width, bits):
    codes = torch.randint(0, 2**bits, (1, heads, tokens, width), generator=torch.Generator().manual_seed(1))
    return pack(codes.to(torch.uint8), bits)


def compiler():
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        return get_cpp_compiler()
    except Exception:
        return None


needs_compiler = pytest.mark.skipif(compiler() is None, reason="torch.compile finds no C++ compiler here")


@pytest.fixture
def compiled():
    ops.use_compiled(True)
    yield
    ops.use_compiled(None)


QUANTIZERS = [
    *(VectorQuantizer(((width, bits),)) for width in (6, 64, 80) for bits in (1, 2, 3, 4)),
    VectorQuantizer(((16, 4), (48, 3)), "unbiased", 8),
    ProdQuantizer(((64, 3),), 0),
    PolarQuantizer(((64, 3),)),
]


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: f"{type(q).__name__}{q.parts}")
def test_products_equal_loops_over_tokens(quantizer, monkeypatch):
    monkeypatch.setattr(code_products, "TILE_TOKENS", 5)
    monkeypatch.setattr(code_products, "TILE_ELEMENTS", 1)
    for tokens in (1, 13):
        packed = quantizer.encode(random(2, 3, tokens, quantizer.dim).double())
        queries, weights = random(2, 3, 2, quantizer.dim, seed=1), random(2, 3, 2, tokens, seed=2)
        scores, sums = torch.zeros(2, 3, 2, tokens), torch.zeros(2, 3, 2, quantizer.dim)
        for batch, head, row, token in torch.cartesian_prod(*map(torch.arange, (2, 3, 2, tokens))).tolist():
            vector = packed[batch, head, token].decode()
            scores[batch, head, row, token] = (queries[batch, head, row] * vector).sum()
            sums[batch, head, row] += weights[batch, head, row, token] * vector
        assert_close(code_scores(queries, packed), scores)
        assert_close(code_sums(weights, packed), sums)


def test_no_tile_is_larger_than_promised(monkeypatch):
    decoded = []
    original = code_products._centroids
    monkeypatch.setattr(
        code_products,
        "_centroids",
        lambda codes, *rest: decoded.append(original(codes, *rest)) or decoded[-1],
    )
    codes = random_codes(3, 4000, 64, 4)
    plain_centroid_scores(random(1, 3, 2, 64), codes, 4)
    plain_centroid_sums(random(1, 3, 2, 4000), codes, 4, 64)
    assert max(tile.numel() for tile in decoded) <= 1 << 18 < 3 * 4000 * 64


@pytest.mark.parametrize("width", [64, 80, 96, 128, 576])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_polynomial_is_the_codebook(width, bits):
    """Read from every code at every place, by the very function that is compiled."""
    index = (torch.arange(16 * width).view(16, width) + torch.arange(16)[:, None]) % 2**bits
    codes = pack(index.to(torch.uint8), bits)
    factors = code_products_compiled.polynomial(width, bits)
    pieces = code_products_compiled._centroids(code_products_compiled._twice(codes), bits, width, factors)
    expected = codebook(width, bits)[unpack(codes, bits, width).long()]
    torch.testing.assert_close(torch.cat(pieces, dim=-1), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("width", [64, 80, 96, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [1, 3, 5, 16])
def test_kernels_before_compilation_equal_plain(width, bits, rows, monkeypatch):
    """Layout, padding of rows, whole spans and the rest: what torch.compile is given, run as it stands."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    code_products_compiled._kernel.cache_clear()
    for tokens in (1, 63, 129, 1000):
        codes = random_codes(3, tokens + 7, width, bits)[:, :, :tokens]
        queries, weights = random(1, 3, rows, width), random(1, 3, rows, tokens, seed=3)
        assert_close(
            code_products_compiled.centroid_scores(queries, codes, bits),
            plain_centroid_scores(queries, codes, bits),
        )
        assert_close(
            code_products_compiled.centroid_sums(weights, codes, bits, width),
            plain_centroid_sums(weights, codes, bits, width),
        )
    code_products_compiled._kernel.cache_clear()


def test_wide_codes_stay_plain():
    """A polynomial through 32 centroids is neither exact in float32 nor fast."""
    quantizer = VectorQuantizer(((64, 4),))
    packed = quantizer.encode(random(1, 1, 600, 64).double())
    assert code_products_compiled.serves(random(1, 1, 1, 64), packed)
    object.__setattr__(quantizer, "parts", ((64, 5),))
    assert not code_products_compiled.serves(random(1, 1, 1, 64), packed)


@needs_compiler
@torch.no_grad()
def test_compiled_equals_plain_and_is_compiled_once(compiled):
    """Whatever the numbers of tokens and heads and the room of the buffer: one compilation per product."""
    quantizer = VectorQuantizer(((64, 4),))
    counters.clear()
    for heads, tokens, room in ((3, 512, 0), (3, 1000, 24), (2, 2048, 0), (6, 4500, 100), (3, 513, 1)):
        packed = quantizer.encode(random(1, heads, tokens + room, 64).double())[:, :, :tokens]
        queries, weights = random(1, heads, 3, 64, seed=4), random(1, heads, 3, tokens, seed=5)
        assert_close(ops.code_scores(queries, packed), code_scores(queries, packed))
        assert_close(ops.code_sums(weights, packed), code_sums(weights, packed))
    assert ops.backend()[0] == "compiled", ops.backend()[1]
    assert counters["stats"]["unique_graphs"] == 2


def test_short_work_is_never_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    packed = VectorQuantizer(((64, 2),)).encode(random(1, 1, 600, 64).double())
    ops.code_scores(random(1, 1, 1, 64), packed)
    assert ops.backend()[0] == "torch" and "use_compiled" in ops.backend()[1]


def test_work_that_pays_is_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    code_products_compiled._kernel.cache_clear()
    packed = VectorQuantizer(((64, 2),)).encode(random(1, 1, 600, 64).double())
    monkeypatch.setattr(ops, "COMPILE_AFTER", ops._compiled["read"] + 1)
    ops.code_scores(random(1, 1, 1, 64), packed)
    assert ops.backend()[0] == "compiled"
    ops.code_scores(random(1, 1, 1, 64), packed)
    assert code_products_compiled._kernel.cache_info().misses == 1
    code_products_compiled._kernel.cache_clear()


def test_a_missing_compiler_is_logged_once_and_plain_goes_on(compiled, monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    code_products_compiled._kernel.cache_clear()
    packed = VectorQuantizer(((64, 2),)).encode(random(1, 1, 600, 64).double())
    queries = random(1, 1, 1, 64)
    for _ in range(2):
        torch.testing.assert_close(ops.code_scores(queries, packed), code_scores(queries, packed))
    assert len([record for record in caplog.records if "no C++ compiler" in record.message]) == 1
    assert ops.backend() == (
        "torch",
        "plain PyTorch, because torch.compile failed: RuntimeError: no C++ compiler",
    )
    ops.use_compiled(False)
    assert "use_compiled(False)" in ops.backend()[1]
