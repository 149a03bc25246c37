"""Pooling, routing and gathering as the Triton kernels take them.

`routing_products` and `ops.memory_prefix` have the twins. Axis letters as in the former, and P memory vectors
of a prefix.
"""

from functools import lru_cache
from typing import Any

import torch

from .codebooks import codebook
from .kernel_attention import scale_levels
from .packed_vectors import PackedRows


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
    if isinstance(keys, PackedRows):
        if keys.coder.means is not None:
            return "these router keys are coded without their mean"
        if not _codes_served(keys):
            return "head_dim must be a multiple of 8 from 16 to 256"
    elif dense_rows(keys) is None:
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
    if isinstance(keys, PackedRows):
        chunk_scores = _packed_scores(kernels, folded, question_mask, keys)
    else:
        chunk_scores = kernels.route_scores(folded.to(keys.dtype), question_mask, keys.data)
    reduce = kernels.document_maxima if chunk_reduction == "max" else kernels.document_means
    return reduce(chunk_scores, offsets)


def unserved_gathering(keys: Any, values: Any) -> str:
    """Why the kernels cannot gather rows of these keys and values; empty if they can."""
    if dense_rows(keys, values) is not None:
        return ""
    if not (isinstance(keys, PackedRows) and isinstance(values, PackedRows)):
        return "keys and values are not both dense or both packed"
    if keys.dtype != values.dtype:
        return "keys and values are read in different types"
    return "" if _codes_served(keys) else "head_dim must be a multiple of 8 from 16 to 256"


def kernel_memory_prefix(
    kernels: Any, keys: Any, values: Any, rows: torch.Tensor, heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [B, G, P, D] of rows [B, P], where `unserved_gathering` has nothing against it."""
    if not isinstance(keys, PackedRows):
        return kernels.gather_dense(keys.data, values.data, rows, heads)
    codes, means = [], (keys.coder.means, values.coder.means)
    for storage in (keys, values):
        decode = storage.coder.transform.to(rows.device).decode
        codes += [storage.packed.codes, storage.packed.scales, _centroids(storage), decode]
        codes.append(storage.coder.gains)
    exact = any(mean is not None for mean in means)  # a mean is added before anything is rounded
    dtype = torch.float32 if exact else keys.dtype
    prefix = kernels.gather_packed(*codes, scale_levels(rows.device), rows, dtype)
    present = (rows >= 0)[:, None, :, None]
    return tuple(
        (states if mean is None else states + present * mean[:, None]).to(keys.dtype)
        for states, mean in zip(prefix, means)
    )


def _packed_scores(kernels: Any, folded: torch.Tensor, question_mask: torch.Tensor, keys: PackedRows):
    """Chunk scores [B, C] of folded queries [B, T, W]: <q, gain * c @ decode> is <gain * q @ decode.T, c>."""
    coder = keys.coder
    rotated = keys.rotate(folded.unflatten(-1, (coder.heads, coder.dim)))
    if coder.gains is not None:
        rotated = rotated * coder.gains[:, None]
    codes, levels = keys.packed, scale_levels(folded.device)
    return kernels.route_scores(
        rotated.flatten(2), question_mask, codes.codes, codes.scales, _centroids(keys), levels
    )


def _codes_served(storage: PackedRows) -> bool:
    return storage.coder.dim % 8 == 0 and 16 <= storage.coder.dim <= 256


def _centroids(storage: PackedRows) -> tuple[float, ...]:
    return _codebook(storage.coder.dim, storage.coder.packing.bits)


@lru_cache(maxsize=64)
def _codebook(dim: int, bits: int) -> tuple[float, ...]:
    return tuple(codebook(dim, bits).tolist())
