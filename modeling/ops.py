"""The one place that chooses an implementation for the heavy operations on memory vectors.

Every operation has a plain PyTorch implementation, which is its specification. Axis letters: B batch, T
tokens, H query heads, G key/value heads, D head dim, W = G * D, C chunks, N documents.
"""

import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F

from .code_products import code_scores as plain_code_scores
from .code_products import code_sums as plain_code_sums
from .code_products_compiled import centroid_scores as compiled_centroid_scores
from .code_products_compiled import centroid_sums as compiled_centroid_sums
from .code_products_compiled import serves as compiled_serves

logger = logging.getLogger(__name__)

_TILE_ELEMENTS = (
    1 << 23
)  # scores held at once while routing: 32 MB in float32, whatever the number of heads or chunks
OPERATIONS = ("pool_chunks", "document_scores", "code_scores", "code_sums")
_overrides: dict[str, Callable] = {}

# Compiling takes some 10 s once per process and then saves about half a nanosecond per number of the cache
# that is read, so it pays from here on. Nothing shorter ever waits for a compiler.
COMPILE_AFTER = 2 * 10**10
_compiled: dict[str, Any] = {"choice": None, "read": 0, "failure": None}


def backend(device: torch.device | str = "cpu") -> tuple[str, str]:
    """Name of the implementation that runs on `device`, and why."""
    if _overrides:
        return "override", f"replaced by ops.override: {', '.join(sorted(_overrides))}"
    kind = torch.device(device).type
    if kind != "cpu":
        return "torch", f"plain PyTorch is the only implementation installed for {kind}"
    if _compiled["choice"] is False:
        return "torch", "plain PyTorch, as ops.use_compiled(False) says"
    if _compiled["failure"]:
        return "torch", f"plain PyTorch, because torch.compile failed: {_compiled['failure']}"
    if _compiled["choice"] is None and _compiled["read"] < COMPILE_AFTER:
        share = _compiled["read"] / COMPILE_AFTER
        return "torch", (
            f"plain PyTorch until {share:.0%} of the work that pays for compiling is 100%; "
            "ops.use_compiled(True) compiles at once"
        )
    return "compiled", "products with codes run as C++ from torch.compile, everything else as plain PyTorch"


def use_compiled(choice: bool | None) -> None:
    """Chooses how decode steps on a CPU read a TurboQuantCache.

    True compiles at the next step (about 10 s once per process, less when PyTorch finds its own compiled
    files again), False never, and None, the default, once a process has read so much that it pays. Without a
    C++ compiler plain PyTorch goes on and the log says why. Results agree to within float32 rounding.
    """
    _compiled.update(choice=choice, failure=None)


@contextmanager
def override(**implementations: Callable):
    """Within the block, the named OPERATIONS run `implementations` instead."""
    unknown = set(implementations) - set(OPERATIONS)
    if unknown:
        raise ValueError(f"override knows {', '.join(OPERATIONS)}; got {sorted(unknown)}")
    before = dict(_overrides)
    _overrides.update(implementations)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def pool_chunks(states: torch.Tensor, lengths: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """Means over consecutive chunks of each row's first `lengths` tokens, accumulated in float32 (paper
    section 3.2).

    Args:
        states: [B, T, W].
        lengths: [B], tokens that count in each row; the last chunk of a row is averaged over its real length.

    Returns:
        [sum over rows of ceil(length / chunk_size), W] in the dtype of `states`, row after row.
    """
    return _overrides.get("pool_chunks", _pool_chunks)(states, lengths, chunk_size)


def document_scores(
    queries: torch.Tensor,
    question_mask: torch.Tensor,
    keys,
    chunk_counts: torch.Tensor,
    *,
    head_reduction: str = "mean",
    query_reduction: str = "max",
    chunk_reduction: str = "max",
) -> torch.Tensor:
    """Score of every document for every question (paper section 3.2).

    Because the mean over heads is linear, it becomes ONE dot product of length W per question token and
    chunk.

    Args:
        queries: [B, H, T, D] router queries, already normalised and scaled as the checkpoint wants it.
        question_mask: [B, T] bool, tokens that route; at least one per row.
        keys: vector storage of C rows [W] (see `memory_bank.DenseVectors`), the router keys of all chunks in
            document order.
        chunk_counts: [N] router chunks of each document (0 for an empty document, whose score is -inf).

    Returns:
        [B, N] float32.
    """
    run = _overrides.get("document_scores", _document_scores)
    return run(queries, question_mask, keys, chunk_counts, head_reduction, query_reduction, chunk_reduction)


def code_scores(queries: torch.Tensor, packed) -> torch.Tensor:
    """Scores of packed keys: rotated queries [B, G, R, D] float32 -> [B, G, R, P]; see `code_products`."""
    run = _overrides.get("code_scores")
    return run(queries, packed) if run else _code_product(0, queries, packed)


def code_sums(weights: torch.Tensor, packed) -> torch.Tensor:
    """Sums of packed values: weights [B, G, R, P] float32 -> rotated [B, G, R, D]; see `code_products`."""
    run = _overrides.get("code_sums")
    return run(weights, packed) if run else _code_product(1, weights, packed)


_CODE_PRODUCTS = (
    (plain_code_scores, compiled_centroid_scores),
    (plain_code_sums, compiled_centroid_sums),
)


def _code_product(kind: int, states: torch.Tensor, packed) -> torch.Tensor:
    plain, compiled = _CODE_PRODUCTS[kind]
    if _compiled["choice"] is False or _compiled["failure"] or not compiled_serves(states, packed):
        return plain(states, packed)
    if _compiled["choice"] is None and _compiled["read"] < COMPILE_AFTER:
        _compiled["read"] += packed.shape.numel()
        return plain(states, packed)
    try:
        return plain(states, packed, compiled)
    except Exception as error:  # whatever a compiler or its absence may raise, the plain product is right
        _compiled["failure"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        logger.warning("decode steps go on in plain PyTorch, because %s", _compiled["failure"])
        return plain(states, packed)


def _pool_chunks(states, lengths, chunk_size):
    rows, tokens, width = states.shape
    chunks = -(-tokens // chunk_size)
    lengths = lengths.to(states.device)
    counts = (lengths[:, None] - chunk_size * torch.arange(chunks, device=states.device)).clamp(0, chunk_size)
    valid = torch.arange(tokens, device=states.device) < lengths[:, None]
    sums = states.float().masked_fill(~valid[..., None], 0.0)
    sums = F.pad(sums, (0, 0, 0, chunks * chunk_size - tokens)).view(rows, chunks, chunk_size, width).sum(2)
    return (sums / counts.clamp(min=1)[..., None])[counts > 0].to(states.dtype)


def _document_scores(
    queries, question_mask, keys, chunk_counts, head_reduction, query_reduction, chunk_reduction
):
    batch, heads, tokens, head_dim = queries.shape
    groups = keys.width // head_dim
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
    budget = max(1, _TILE_ELEMENTS // (batch * folded.shape[2]))
    reductions = (head_reduction, query_reduction, chunk_reduction)
    scores = []
    for start, stop in _document_tiles(offsets, budget):
        tile = keys.slice(offsets[start], offsets[stop])
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
        best = _segment(similarity.flatten(1), chunk_counts, "max").unflatten(1, (batch, tokens))
        total = best.masked_fill(outside, 0.0).sum(2) / question_mask.sum(1)
        return total.t()
    if query_reduction == "mean":
        chunk_scores = similarity.masked_fill(outside, 0.0).sum(2) / question_mask.sum(1)
    else:
        chunk_scores = similarity.masked_fill(outside, -torch.inf).amax(2)
    return _segment(chunk_scores, chunk_counts, chunk_reduction).t()


def _segment(values: torch.Tensor, lengths: torch.Tensor, reduction: str) -> torch.Tensor:
    """[c, X] -> [n, X]: max or mean over consecutive segments; -inf for an empty segment."""
    owners = torch.repeat_interleave(torch.arange(len(lengths), device=values.device), lengths)
    index = owners[:, None].expand_as(values)
    if reduction == "max":
        empty = values.new_full((len(lengths), values.shape[1]), -torch.inf)
        return empty.scatter_reduce(0, index, values, "amax")  # parallel on a CPU, unlike segment_reduce
    sums = values.new_zeros(len(lengths), values.shape[1]).scatter_add(0, index, values)
    return (sums / lengths.clamp(min=1)[:, None]).masked_fill((lengths == 0)[:, None], -torch.inf)
