"""The one place that chooses an implementation for the heavy operations on memory vectors.

Every operation has a plain PyTorch implementation, which is its specification. Axis letters: B batch, T
tokens, H query heads, G key/value heads, D head dim, W = G * D, C chunks, N documents.
"""

import logging
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from .code_products import code_scores as plain_code_scores
from .code_products import code_sums as plain_code_sums
from .code_products_compiled import centroid_scores as compiled_centroid_scores
from .code_products_compiled import centroid_sums as compiled_centroid_sums
from .code_products_compiled import serves as compiled_serves
from .kernel_attention import kernel_attention, unserved
from .kernel_memory import (
    dense_rows,
    kernel_document_scores,
    kernel_memory_prefix,
    kernel_pool_chunks,
    unserved_gathering,
    unserved_routing,
)
from .packed_states import LayerView
from .routing_products import document_scores as plain_document_scores
from .routing_products import pool_chunks as plain_pool_chunks

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
OPERATIONS = ("pool_chunks", "document_scores", "code_scores", "code_sums")
_overrides: dict[str, Callable] = {}

_kernels: dict[str, Any] = {"choice": None, "loaded": None, "failure": None}

# Compiling takes some 10 s once per process and then saves about half a nanosecond per number of the cache
# that is read, so it pays from here on. Nothing shorter ever waits for a compiler.
COMPILE_AFTER = 2 * 10**10
_compiled: dict[str, Any] = {"choice": None, "read": 0, "failure": None}


def backend(device: torch.device | str = "cpu") -> tuple[str, str]:
    """Name of the implementation that runs on `device`, and why."""
    if _overrides:
        return "override", f"replaced by ops.override: {', '.join(sorted(_overrides))}"
    device = torch.device(device)
    if (kernels := kernels_for(device)) is not None:
        return "triton", f"Triton kernels: {', '.join(kernels.available)}; everything else as plain PyTorch"
    if device.type != "cpu":
        return "torch", f"plain PyTorch, because {_why_no_kernels(device)}"
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


def use_kernels(choice: bool | None) -> None:
    """Chooses whether Triton kernels run.

    None, the default: on CUDA devices, where triton is installed. False: nowhere. True: everywhere, which on
    a CPU needs Triton's interpreter (TRITON_INTERPRET=1) and is for tests. A kernel that fails is reported
    once, and plain PyTorch goes on for the rest of the process.
    """
    _kernels.update(choice=choice, failure=None, loaded=None)


def kernels_for(device: torch.device) -> Any | None:
    """The kernels that run on `device`, or None; `backend` tells why."""
    wanted = device.type == "cuda" if _kernels["choice"] is None else _kernels["choice"]
    if not wanted or _kernels["failure"]:
        return None
    if _kernels["loaded"] is None:
        try:
            from .triton_ops import kernels

            _kernels["loaded"] = kernels
        except Exception as error:  # triton is absent, or one that these kernels cannot be built with
            _note_failure(error)
    return _kernels["loaded"]


def with_kernels(device: torch.device, run: Callable[[Any], Result]) -> Result | None:
    """run(kernels), or None where there are none for the device or they fail."""
    kernels = kernels_for(device)
    if kernels is None:
        return None
    try:
        return run(kernels)
    except torch.OutOfMemoryError:  # says nothing about the kernels
        raise
    except Exception as error:  # a compiler, a driver or a launch: the plain product is right
        _note_failure(error)
        return None


def _note_failure(error: Exception) -> None:
    lines = str(error).strip().splitlines() or [""]
    _kernels.update(failure=f"{type(error).__name__}: {lines[0]}", loaded=None)
    logger.warning("plain PyTorch goes on without Triton kernels, because of %s", _kernels["failure"])


def _why_no_kernels(device: torch.device) -> str:
    if _kernels["failure"]:
        return f"the Triton kernels failed: {_kernels['failure']}"
    if _kernels["choice"] is False:
        return "ops.use_kernels(False) says so"
    return f"there are no kernels for {device.type} devices"


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
    if run := _overrides.get("pool_chunks"):
        return run(states, lengths, chunk_size)
    pooled = None
    if lengths.device.type == "cpu" and not _differentiated(states):
        pooled = with_kernels(states.device, lambda k: kernel_pool_chunks(k, states, lengths, chunk_size))
    return plain_pool_chunks(states, lengths, chunk_size) if pooled is None else pooled


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
        keys: vector storage of C rows [W] (`memory_bank.DenseVectors`, `packed_vectors.PackedRows`), the
            router keys of all chunks in document order.
        chunk_counts: [N] router chunks of each document (0 for an empty document, whose score is -inf).

    Returns:
        [B, N] float32.
    """
    arguments = (
        queries,
        question_mask,
        keys,
        chunk_counts,
        head_reduction,
        query_reduction,
        chunk_reduction,
    )
    if run := _overrides.get("document_scores"):
        return run(*arguments)
    scores = None
    here = keys.device == queries.device  # else where the keys are, and in plain PyTorch
    if here and not _differentiated(queries) and not unserved_routing(keys, head_reduction, query_reduction):
        scores = with_kernels(queries.device, lambda kernels: kernel_document_scores(kernels, *arguments))
    return plain_document_scores(*arguments) if scores is None else scores


def memory_prefix(keys, values, rows: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [B, G, P, D] of rows of a bank; zeros where a row is negative.

    Args:
        keys, values: vector storages of C rows [W] (`memory_bank.DenseVectors`, `packed_vectors.PackedRows`),
            pooled keys and values.
        rows: [B, P] int64. heads: G.
    """
    prefix, arguments = None, (keys, values, rows, heads)
    if not unserved_gathering(keys, values) and not _differentiated(*(dense_rows(keys, values) or ())):
        prefix = with_kernels(rows.device, lambda kernels: kernel_memory_prefix(kernels, *arguments))
    if prefix is not None:
        return prefix
    absent, index = (rows < 0)[..., None], rows.clamp_min(0).flatten()
    taken = (states.take(index).view(*rows.shape, states.width) for states in (keys, values))
    return tuple(
        own.masked_fill(absent, 0).unflatten(-1, (heads, own.shape[-1] // heads)).transpose(1, 2)
        for own in taken
    )


def packed_attention(
    query: torch.Tensor,
    view: LayerView,
    mask: torch.Tensor | None,
    causal: bool,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor | None:
    """Attention [B, Q, H, D] on packed keys and values in one operation, where there is one; else None.

    Arguments as of `attention_turboquant.turboquant_attention`.
    """
    if kernels_for(query.device) is None or _differentiated(query, view.keys, view.values):
        return None
    if _overrides or unserved(view, mask, causal, sinks):
        return None
    return with_kernels(
        query.device, lambda kernels: kernel_attention(kernels, query, view, mask, scaling, softcap)
    )


def _differentiated(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


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
