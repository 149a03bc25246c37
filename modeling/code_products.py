"""The two products of attention on codes, in plain PyTorch: the specification of every faster implementation.

Both decode one tile of tokens at a time; no decoded copy of the whole cache exists at any moment. Axis
letters: B batch, G key/value heads, R query rows of a head (query heads of the group times query tokens), P
    packed
tokens, D head dim.
"""

import torch

from .turboquant import PackedVectors

TILE_TOKENS = 512


def code_scores(queries: torch.Tensor, packed: PackedVectors) -> torch.Tensor:
    """<q, scale * centroids> of all packed keys: queries [B, G, R, D] in the rotated basis -> [B, G, R,
    P]."""
    batch, heads, rows, _ = queries.shape
    tokens = packed.shape[2]
    scores = queries.new_empty(batch, heads, rows, tokens)
    for start in range(0, tokens, TILE_TOKENS):
        tile = packed[:, :, start : start + TILE_TOKENS].decode(queries.dtype)
        scores[..., start : start + TILE_TOKENS] = queries @ tile.mT
    return scores


def code_sums(weights: torch.Tensor, packed: PackedVectors) -> torch.Tensor:
    """Weighted sums of all packed values: weights [B, G, R, P] -> [B, G, R, D] in the rotated basis."""
    batch, heads, rows, tokens = weights.shape
    sums = weights.new_zeros(batch, heads, rows, packed.shape[-1])
    for start in range(0, tokens, TILE_TOKENS):
        tile = packed[:, :, start : start + TILE_TOKENS].decode(weights.dtype)
        sums += weights[..., start : start + TILE_TOKENS] @ tile
    return sums
