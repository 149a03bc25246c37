"""The k best documents of every question: blocks keep their k best, and blocks of these, until one is left.

A score and its place become one whole number of 64 bits that sorts like (score, lower place first), so that
equal scores do not depend on the order in which a sort meets them. Axis letters: B questions, N documents, K
next power of 2 of the k documents wanted, M numbers to choose from.
"""

import torch
import triton
import triton.language as tl

from .launch import launch_parameters
from .registration import operator

MOST_KEPT = 1024  # for more documents a full sort is as good
NOTHING: tl.constexpr = tl.constexpr(-(2**63))


@triton.jit
def _sortable(scores, place):
    """int64 that sorts like scores, and among equal ones (0 equals -0) like descending places below 2^32."""
    bits = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return (ordered << 32) | (0xFFFFFFFF - place.to(tl.int64))


@triton.jit
def top_documents_kernel(
    scores_ptr,  # [B, N]
    source_ptr,  # [B, M] numbers of `_sortable`, not read in the first pass
    kept_ptr,  # [B, blocks, KEEP], not written in the last pass
    value_ptr,  # [B, wanted], written in the last pass
    index_ptr,  # [B, wanted] int64, likewise
    documents,
    numbers,
    wanted,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block, question = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = block * BLOCK + tl.arange(0, BLOCK)
    if FIRST:
        scores = tl.load(scores_ptr + question * documents + place, mask=place < documents, other=0.0)
        candidates = tl.where(place < documents, _sortable(scores, place), NOTHING)
    else:
        candidates = tl.load(source_ptr + question * numbers + place, mask=place < numbers, other=NOTHING)
    best = tl.topk(candidates, KEEP)
    rank = tl.arange(0, KEEP)
    if LAST:
        real = best != NOTHING
        index = 0xFFFFFFFF - (best & 0xFFFFFFFF)
        value = tl.load(scores_ptr + question * documents + index, mask=real, other=-float("inf"))
        tl.store(value_ptr + question * wanted + rank, value, mask=rank < wanted)
        tl.store(index_ptr + question * wanted + rank, tl.where(real, index, -1), mask=rank < wanted)
    else:
        tl.store(kept_ptr + (question * tl.num_programs(0) + block) * KEEP + rank, best)


def _empty_top(scores, k):
    shape = (scores.shape[0], k)
    return scores.new_empty(shape), scores.new_empty(shape, dtype=torch.int64)


@operator(fake=_empty_top)
def top_documents(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of scores [B, N] float32, in descending order: values [B, k] and indices [B, k] int64.

    Of equal scores the lower index comes first. Places beyond the N documents hold -inf and -1; -inf, the
    score of an empty document, comes after every finite score.
    """
    scores, (questions, documents) = scores.contiguous(), scores.shape
    values = torch.full((questions, k), -torch.inf, dtype=torch.float32, device=scores.device)
    indices = torch.full((questions, k), -1, dtype=torch.int64, device=scores.device)
    if not values.numel() or not documents:
        return values, indices
    if k > MOST_KEPT:
        ordered = scores.sort(dim=1, descending=True, stable=True)
        values[:, :documents], indices[:, :documents] = ordered.values[:, :k], ordered.indices[:, :k]
        return values, indices
    keep = max(2, triton.next_power_of_2(k))
    settings = launch_parameters("top_documents", scores.device)
    most = max(settings.pop("BLOCK"), 2 * keep)
    source, numbers = scores, documents
    while True:
        block = max(keep, min(most, triton.next_power_of_2(numbers)))
        blocks = triton.cdiv(numbers, block)
        last = blocks == 1
        kept = (
            source if last else torch.empty(questions, blocks * keep, dtype=torch.int64, device=scores.device)
        )
        top_documents_kernel[(blocks, questions)](
            scores, source, kept, values, indices, documents, numbers, k,
            FIRST=source is scores, LAST=last, KEEP=keep, BLOCK=block,
            **settings,
        )  # fmt: skip
        if last:
            return values, indices
        source, numbers = kept, blocks * keep
