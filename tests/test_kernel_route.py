"""Routing kernels against the plain formulas: scores of chunks, of documents, and the best documents."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, HEAD_DIMS, WIDTHS, poisoned, rms_ratio

from msa_hf.kernels.route import document_maxima, document_means, route_scores
from msa_hf.kernels.top_documents import top_documents
from msa_hf.modeling import routing_products
from msa_hf.modeling.codebooks import codebook
from msa_hf.modeling.turboquant import Transform, VectorQuantizer, dequantize, quantize, scale_table

HALF_PRECISION = 2e-3  # queries and centroids in float16
FULL_PRECISION = 1e-5  # float32 keys; on a GPU three products in TensorFloat-32
BRAIN_PRECISION = 1e-2  # keys and queries in bfloat16


def questions(batch: int, tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries of very different sizes, and masks that differ by row, with at least one token each."""
    sizes = 10.0 ** torch.linspace(-6, 6, batch * tokens).view(batch, tokens, 1)
    mask = torch.rand(batch, tokens) < 0.6
    mask[torch.arange(batch), torch.arange(batch) % tokens] = True
    return (torch.randn(batch, tokens, width) * sizes).to(DEVICE), mask.to(DEVICE)


def best_token(folded: torch.Tensor, mask: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    products = torch.einsum("btw,cw->btc", folded.double(), keys.double())
    return products.masked_fill(~mask[..., None], -torch.inf).amax(1)


def row_ratios(ours: torch.Tensor, oracle: torch.Tensor) -> float:
    """The largest RMS ratio of a question: their sizes differ too much for one ratio."""
    return max(rms_ratio(mine, wanted) for mine, wanted in zip(ours, oracle))


def packed_keys(chunks: int, heads: int, dim: int, bits: int, scale_bits: int):
    transform = Transform.rotation("hadamard" if dim % 64 == 0 and dim != 192 else "haar", (dim,))
    vectors = torch.randn(chunks, heads, dim, device=DEVICE) / dim**0.5
    return quantize(vectors, VectorQuantizer(((dim, bits),), scale_bits=scale_bits), transform), transform


def route_packed(folded, mask, packed):
    dim, bits = packed.quantizer.parts[0]
    levels = scale_table().float().to(DEVICE) if packed.scales.dtype == torch.uint8 else None
    return route_scores(folded, mask, packed.codes, packed.scales, codebook(dim, bits).tolist(), levels)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize(
    ("batch", "tokens", "chunks", "scale_bits"), ((1, 1, 1, 8), (3, 5, 131, 8), (1, 33, 77, 16))
)
def test_packed_scores(dim, bits, batch, tokens, chunks, scale_bits):
    heads = 2
    packed, transform = packed_keys(chunks, heads, dim, bits, scale_bits)
    folded, mask = questions(batch, tokens, heads * dim)
    rotated = (folded.unflatten(2, (heads, dim)) @ transform.to(DEVICE).decode.mT).flatten(2)
    with poisoned():
        scores = route_packed(rotated, mask, packed)
    keys = dequantize(packed, transform).flatten(1)
    assert row_ratios(scores, best_token(folded, mask, keys)) < HALF_PRECISION


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("width", (64, 200, 512))
@pytest.mark.parametrize(("batch", "tokens", "chunks"), ((1, 1, 63), (3, 5, 129), (3, 33, 1), (2, 140, 77)))
def test_dense_scores(dtype, width, batch, tokens, chunks):
    folded, mask = questions(batch, tokens, width)
    keys = torch.randn(chunks, width, device=DEVICE).to(dtype)
    with poisoned():
        scores = route_scores(folded, mask, keys)
    tolerance = {
        torch.float32: FULL_PRECISION,
        torch.float16: HALF_PRECISION,
        torch.bfloat16: BRAIN_PRECISION,
    }[dtype]
    assert row_ratios(scores, best_token(folded, mask, keys)) < tolerance


def test_strided_questions_without_tokens_and_memories_without_chunks():
    folded, mask = questions(2, 5, 64)
    mask[1] = False
    keys = torch.randn(9, 64, device=DEVICE)
    strided = folded.mT.contiguous().mT
    scores = route_scores(strided, mask, keys)
    assert rms_ratio(scores[0], best_token(folded, mask, keys)[0]) < FULL_PRECISION
    assert (scores[1] == -torch.inf).all()
    assert route_scores(folded, mask, keys[:0]).shape == (2, 0)


def test_packed_keys_of_another_layout_are_refused():
    packed, _ = packed_keys(4, 2, 64, 4, 8)
    folded, mask = questions(1, 3, 128)
    with pytest.raises(ValueError, match="must be uint8 with"):
        route_scores(folded, mask, packed.codes, packed.scales, codebook(64, 3).tolist())
    with pytest.raises(ValueError, match="a scale for each part"):
        route_scores(folded, mask, packed.codes, packed.scales[:2], codebook(64, 4).tolist())


def test_routing_compiles():
    packed, _ = packed_keys(20, 2, 64, 4, 8)
    folded, mask = questions(2, 3, 128)
    centroids, levels = codebook(64, 4).tolist(), scale_table().float().to(DEVICE)

    def route(folded, mask, codes, scales):
        return route_scores(folded, mask, codes, scales, centroids, levels) + 1

    compiled = torch.compile(route, fullgraph=True, backend="eager")
    ours = compiled(folded, mask, packed.codes, packed.scales)
    assert torch.equal(ours, route(folded, mask, packed.codes, packed.scales))


def tied_scores(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Few different numbers, among them both zeros and -inf."""
    numbers = torch.tensor([-torch.inf, -1e30, -2.5, -0.0, 0.0, 1e-40, 0.5, 3e30])
    return numbers[torch.randint(0, len(numbers), shape, generator=generator)].to(DEVICE)


def plain_documents(scores: torch.Tensor, counts: torch.Tensor, reduction: str) -> torch.Tensor:
    return routing_products.segment_scores(scores.t(), counts.to(DEVICE), reduction).t()


def first_chunks(counts: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(DEVICE)


@pytest.mark.parametrize("batch", (1, 3))
@pytest.mark.parametrize("counts", ([5], [0, 3, 0, 0, 4, 0], [1] * 300, [2000, 1, 0, 700, 16, 16, 3], [0, 0]))
def test_scores_of_documents(batch, counts):
    counts = torch.tensor(counts)
    scores = torch.randn(batch, int(counts.sum()), device=DEVICE)
    with poisoned():
        best, mean = (reduce(scores, first_chunks(counts)) for reduce in (document_maxima, document_means))
    assert torch.equal(best, plain_documents(scores, counts, "max"))
    torch.testing.assert_close(mean, plain_documents(scores, counts, "mean"), rtol=1e-5, atol=1e-6)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.integers(1, 80), st.integers(0, 2**31))
def test_best_documents_of_any_memory(counts, k, seed):
    counts = torch.tensor(counts)
    scores = tied_scores(torch.Generator().manual_seed(seed), 2, int(counts.sum()))
    documents = document_maxima(scores, first_chunks(counts))
    assert torch.equal(documents, plain_documents(scores, counts, "max"))
    check_best(documents, k)


def check_best(scores: torch.Tensor, k: int) -> None:
    with poisoned():
        values, indices = top_documents(scores, k)
    ordered, found = scores.sort(dim=1, descending=True, stable=True), min(k, scores.shape[1])
    assert torch.equal(indices[:, :found], ordered.indices[:, :k])
    assert torch.equal(values[:, :found], ordered.values[:, :k])
    assert (indices[:, found:] == -1).all() and (values[:, found:] == -torch.inf).all()
    assert values.shape == indices.shape == (len(scores), k)


THREE_PASSES = ((30_000, 700),) if DEVICE.type == "cuda" else ((600, 20),)


@pytest.mark.parametrize(
    ("documents", "k"), (*THREE_PASSES, (1, 1), (5, 16), (129, 1), (300, 16), (3000, 2000), (0, 3), (7, 0))
)
def test_best_documents(documents, k):
    generator = torch.Generator().manual_seed(documents)
    check_best(torch.randn(2, documents, generator=generator).to(DEVICE), k)
    check_best(tied_scores(generator, 1, documents), k)


def test_document_operators_compile():
    counts = torch.tensor([3, 0, 2])
    scores, offsets = torch.randn(2, 5, device=DEVICE), first_chunks(counts)

    def choose(scores):
        values, indices = top_documents(document_maxima(scores, offsets), 2)
        return values + 1, indices + document_means(scores, offsets).argmax(1, keepdim=True)

    ours = torch.compile(choose, fullgraph=True, backend="eager")(scores)
    assert all(torch.equal(got, wanted) for got, wanted in zip(ours, choose(scores)))
