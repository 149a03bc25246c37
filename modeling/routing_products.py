"""Pooling and routing in plain PyTorch: the specification of every faster implementation.

Axis letters: B batch, T tokens, H query heads, G key/value heads, D head dim, W = G * D, C chunks, N
documents, S queries of a token after summing over heads.
"""

from bisect import bisect_right
from collections.abc import Iterator

import torch
from torch.nn import functional as F

# Scores held at once while routing: 32 MB in float32, whatever the number of heads or chunks.
TILE_ELEMENTS = 1 << 23


def pool_chunks(states, lengths, chunk_size):
    rows, tokens, width = states.shape
    chunks = -(-tokens // chunk_size)
    lengths = lengths.to(states.device)
    counts = (lengths[:, None] - chunk_size * torch.arange(chunks, device=states.device)).clamp(0, chunk_size)
    valid = torch.arange(tokens, device=states.device) < lengths[:, None]
    sums = states.float().masked_fill(~valid[..., None], 0.0)
    sums = F.pad(sums, (0, 0, 0, chunks * chunk_size - tokens)).view(rows, chunks, chunk_size, width).sum(2)
    return (sums / counts.clamp(min=1)[..., None])[counts > 0].to(states.dtype)


def document_scores(
    queries, question_mask, keys, chunk_counts, head_reduction, query_reduction, chunk_reduction
):
    batch, heads, tokens, head_dim = queries.shape
    groups = keys.width // head_dim
    queries = keys.rotate(queries.to(keys.device))
    question_mask = question_mask.to(queries.device, torch.bool)
    if query_reduction == "last":
        last = (question_mask * torch.arange(1, tokens + 1, device=queries.device)).argmax(1)
        queries = queries[torch.arange(batch, device=queries.device), :, last][:, :, None]
        question_mask = question_mask.new_ones(batch, 1)
    # [B, H, T, D] -> [S, B, T, W]: S = 1 summed query per token if the mean over heads folds, else one per
    # head of a group.
    grouped = queries.unflatten(1, (groups, heads // groups))
    if head_reduction == "mean":
        folded = grouped.sum(2, keepdim=True).div(heads).permute(2, 0, 3, 1, 4).flatten(3)
    else:
        folded = grouped.permute(2, 0, 3, 1, 4)  # [H / G, B, T, G, D]
    if query_reduction == "mean" and head_reduction == "mean":
        weights = question_mask.to(folded.dtype) / question_mask.sum(1, keepdim=True)
        folded, question_mask = (
            (folded * weights[..., None]).sum(2, keepdim=True),
            question_mask[:, :1] | True,
        )
    folded = folded.to(keys.dtype)
    chunk_counts = chunk_counts.to(queries.device)
    offsets = F.pad(chunk_counts.cumsum(0), (1, 0)).tolist()
    budget = min(keys.tile_rows, max(1, TILE_ELEMENTS // (batch * folded.shape[2])))
    reductions = (head_reduction, query_reduction, chunk_reduction)
    scores = []
    for start, stop in _document_tiles(offsets, budget):
        tile = keys.rotated_slice(offsets[start], offsets[stop])
        scores.append(_tile_scores(folded, question_mask, tile, chunk_counts[start:stop], *reductions))
    return torch.cat(scores, 1) if scores else queries.new_zeros(batch, 0, dtype=torch.float32)


def _document_tiles(offsets: list[int], budget: int) -> Iterator[tuple[int, int]]:
    """Ranges of whole documents with at most `budget` chunks together (a longer document is a tile alone)."""
    start, documents = 0, len(offsets) - 1
    while start < documents:
        stop = max(start + 1, bisect_right(offsets, offsets[start] + budget) - 1)
        yield start, stop
        start = stop


def _tile_scores(folded, question_mask, keys, chunk_counts, head_reduction, query_reduction, chunk_reduction):
    """[B, n] scores of the n documents whose chunks are `keys` [c, W]; see `document_scores`."""
    batch, tokens = question_mask.shape
    outside = ~question_mask
    if head_reduction == "mean":
        similarity = (keys @ folded[0].flatten(0, 1).t()).float().unflatten(1, (batch, tokens))  # [c, B, T]
    else:
        by_head = keys.unflatten(1, folded.shape[3:])  # [c, G, D]
        similarity = torch.full((len(keys), batch, tokens), -torch.inf, device=keys.device)
        for group in range(folded.shape[3]):
            for member in folded[:, :, :, group]:
                head = (by_head[:, group] @ member.flatten(0, 1).t()).float().unflatten(1, (batch, tokens))
                similarity = torch.maximum(similarity, head)
    if query_reduction == "maxsim":
        best = segment_scores(similarity.flatten(1), chunk_counts, "max").unflatten(1, (batch, tokens))
        total = best.masked_fill(outside, 0.0).sum(2) / question_mask.sum(1)
        return total.t()
    if query_reduction == "mean":
        chunk_scores = similarity.masked_fill(outside, 0.0).sum(2) / question_mask.sum(1)
    else:
        chunk_scores = similarity.masked_fill(outside, -torch.inf).amax(2)
    return segment_scores(chunk_scores, chunk_counts, chunk_reduction).t()


def segment_scores(values: torch.Tensor, lengths: torch.Tensor, reduction: str) -> torch.Tensor:
    """[c, X] -> [n, X]: max or mean over consecutive segments; -inf for an empty segment."""
    owners = torch.repeat_interleave(torch.arange(len(lengths), device=values.device), lengths)
    index = owners[:, None].expand_as(values)
    if reduction == "max":
        empty = values.new_full((len(lengths), values.shape[1]), -torch.inf)
        return empty.scatter_reduce(0, index, values, "amax")  # parallel on a CPU, unlike segment_reduce
    sums = values.new_zeros(len(lengths), values.shape[1]).scatter_add(0, index, values)
    return (sums / lengths.clamp(min=1)[:, None]).masked_fill((lengths == 0)[:, None], -torch.inf)
