"""Routing kernels against the plain formulas: scores of chunks, of documents, and the best documents."""

import pytest
import torch
from kernel_cases import DEVICE, HEAD_DIMS, WIDTHS, poisoned, rms_ratio

from msa_hf.kernels.route import route_scores
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
    with pytest.raises(ValueError, match="one scale each"):
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
