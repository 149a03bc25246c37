"""The two products of attention on codes, in plain PyTorch: the specification of every faster implementation.

A packed vector is scale * centroids for each part of its coordinates, so the scales are applied to scores and
weights, and only centroids are looked up, one tile of tokens at a time: no decoded copy of the whole cache
exists at any moment. Axis letters: B batch, G key/value heads, R query rows of a head (query heads of the
group times query tokens), P packed tokens, D head dim, W width of a part, N bytes of its codes.
"""

from collections.abc import Callable, Iterator

import torch

from .bit_packing import packed_bytes, unpack
from .codebooks import codebook
from .turboquant import PackedVectors, VectorQuantizer, read_scale

TILE_ELEMENTS = 1 << 18  # 1 MB of float32 centroids, which stays in a core's cache
TILE_TOKENS = 512  # at least, so that large batches do not fall apart into small products


def code_scores(
    queries: torch.Tensor, packed: PackedVectors, centroid_scores: Callable | None = None
) -> torch.Tensor:
    """<q, scale * centroids> of all packed keys: queries [B, G, R, D] in the rotated basis -> [B, G, R, P].

    `centroid_scores` replaces the function of this file.
    """
    if not isinstance(packed.quantizer, VectorQuantizer):
        tiles = [queries @ packed[:, :, tile].decode(queries.dtype).mT for tile in _tiles(*packed.shape)]
        return torch.cat(tiles, dim=-1)
    product, scores = centroid_scores or plain_centroid_scores, None
    for channels, codes, scales, bits in _parts(packed, queries.dtype):
        own = product(queries[..., channels], codes, bits).mul_(scales)
        scores = own if scores is None else scores.add_(own)
    return scores


def code_sums(
    weights: torch.Tensor, packed: PackedVectors, centroid_sums: Callable | None = None
) -> torch.Tensor:
    """Weighted sums of all packed values: weights [B, G, R, P] -> [B, G, R, D] in the rotated basis.

    `centroid_sums` replaces the function of this file.
    """
    if not isinstance(packed.quantizer, VectorQuantizer):
        tiles = _tiles(*packed.shape)
        return sum(weights[..., tile] @ packed[:, :, tile].decode(weights.dtype) for tile in tiles)
    product = centroid_sums or plain_centroid_sums
    sums = [
        product(weights * scales, codes, bits, channels.stop - channels.start)
        for channels, codes, scales, bits in _parts(packed, weights.dtype)
    ]
    return sums[0] if len(sums) == 1 else torch.cat(sums, dim=-1)


def plain_centroid_scores(queries: torch.Tensor, codes: torch.Tensor, bits: int) -> torch.Tensor:
    """<q, centroids>: queries [B, G, R, W], codes [B, G, P, N] -> [B, G, R, P]."""
    width = queries.shape[-1]
    scores = queries.new_empty(*queries.shape[:3], codes.shape[2])
    for tile in _tiles(*codes.shape[:3], width):
        centroids = _centroids(codes[:, :, tile], bits, width, queries.dtype)
        scores[..., tile] = queries @ centroids.mT
    return scores


def plain_centroid_sums(weights: torch.Tensor, codes: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """sum of w * centroids: weights [B, G, R, P], codes [B, G, P, N] -> [B, G, R, W]."""
    sums = weights.new_zeros(*weights.shape[:3], width)
    for tile in _tiles(*codes.shape[:3], width):
        sums += weights[..., tile] @ _centroids(codes[:, :, tile], bits, width, weights.dtype)
    return sums


def _centroids(codes: torch.Tensor, bits: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """[..., W] of codes [..., N]. A flat index_select is several times faster than indexing with [...]."""
    table = codebook(width, bits).to(device=codes.device, dtype=dtype)
    index = unpack(codes, bits, width).int()
    return table.index_select(0, index.view(-1)).view(index.shape)


def _parts(packed: PackedVectors, dtype: torch.dtype) -> Iterator[tuple]:
    """(channels, codes [B, G, P, N], scales [B, G, 1, P], bits) of each part of the coordinates."""
    scales = read_scale(packed.scales, dtype).mT
    channel = byte = 0
    for part, (width, bits) in enumerate(packed.quantizer.parts):
        size = packed_bytes(width, bits)
        codes = packed.codes[..., byte : byte + size]
        yield slice(channel, channel + width), codes, scales[:, :, part : part + 1], bits
        channel, byte = channel + width, byte + size


def _tiles(batch: int, heads: int, tokens: int, dim: int) -> Iterator[slice]:
    size = max(TILE_TOKENS, TILE_ELEMENTS // (batch * heads * dim))
    return (slice(start, min(tokens, start + size)) for start in range(0, tokens, size))
