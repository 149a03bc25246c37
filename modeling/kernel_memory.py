"""Pooling and routing of a memory as the Triton kernels take them; `routing_products` has the twins.

Axis letters as there.
"""

from typing import Any

import torch


def kernel_pool_chunks(
    kernels: Any, states: torch.Tensor, lengths: torch.Tensor, chunk_size: int
) -> torch.Tensor:
    """`routing_products.pool_chunks` for lengths [B] on the CPU."""
    total = int((-(-lengths // chunk_size)).sum())
    return kernels.pool_chunks([states], lengths.to(states.device), [chunk_size], [total])[0]


def dense_rows(*storages: Any) -> tuple[torch.Tensor, ...] | None:
    """The tensors [C, W] of vector storages that are kept as one each; None if one is not."""
    tensors = tuple(getattr(storage, "data", None) for storage in storages)
    return tensors if all(isinstance(tensor, torch.Tensor) for tensor in tensors) else None


def unserved_routing(keys: Any, head_reduction: str, query_reduction: str) -> str:
    """Why the kernels cannot score documents this way; empty if they can."""
    if dense_rows(keys) is None:
        return "these router keys are not one tensor"
    if head_reduction != "mean":
        return "only a mean over heads folds into one product"
    return "" if query_reduction in ("max", "mean", "last") else f"no kernel reduces by {query_reduction!r}"


def kernel_document_scores(
    kernels: Any,
    queries: torch.Tensor,
    question_mask: torch.Tensor,
    keys: Any,
    chunk_counts: torch.Tensor,
    head_reduction: str,
    query_reduction: str,
    chunk_reduction: str,
) -> torch.Tensor:
    """`routing_products.document_scores` for the cases that `unserved_routing` has nothing against."""
    batch, heads, tokens, dim = queries.shape
    question_mask = question_mask.to(queries.device, torch.bool)
    folded = queries.unflatten(1, (keys.width // dim, -1)).sum(2).div(heads).transpose(1, 2).flatten(2)
    if query_reduction == "last":
        last = (question_mask * torch.arange(1, tokens + 1, device=queries.device)).argmax(1)
        folded = folded[torch.arange(batch, device=queries.device), last][:, None]
        question_mask = question_mask.new_ones(batch, 1)
    elif query_reduction == "mean":
        weights = question_mask.to(folded.dtype) / question_mask.sum(1, keepdim=True)
        folded = (folded * weights[..., None]).sum(1, keepdim=True)
        question_mask = question_mask.new_ones(batch, 1)
    offsets = torch.nn.functional.pad(chunk_counts.to(queries.device).cumsum(0), (1, 0))
    chunk_scores = kernels.route_scores(folded.to(keys.dtype), question_mask, keys.data)
    reduce = kernels.document_maxima if chunk_reduction == "max" else kernels.document_means
    return reduce(chunk_scores, offsets)
