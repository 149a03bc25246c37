"""Keys and values that leave the window, as the Triton kernels take them:
`kernels/torch-ext/msa_kernels/encode.py`.

The twin is `PackedHeads.append`. Axis letters: B batch, G key/value heads, T tokens, D head dim, M groups of
tokens with a mean of their own.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import zip_longest
from typing import Any

import torch

from .codebooks import codebook
from .packed_heads import PackedHeads
from .turboquant import Transform, VectorQuantizer, scale_table


def unserved_encoding(
    keys: torch.Tensor,
    values: torch.Tensor,
    packed_keys: Sequence[PackedHeads],
    packed_values: Sequence[PackedHeads],
) -> str:
    """Why the kernels cannot code keys and values [B, G, T, D] for these heads; empty if they can."""
    if keys.shape[-1] != values.shape[-1] or keys.dtype != values.dtype:
        return "keys and values differ in length or precision"
    if keys.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"states must have 16 or 32 bits; they are {keys.dtype}"
    for coding in (part.coding for part in (*packed_keys, *packed_values)):
        quantizer = coding.quantizer
        if not isinstance(quantizer, VectorQuantizer) or len(quantizer.parts) > 1 or coding.sort_channels:
            return "these codes have several parts, sorted channels or another form"
        [(dim, bits)] = quantizer.parts
        if dim % 8 or not 16 <= dim <= 256:
            return f"head_dim must be a multiple of 8 from 16 to 256; it is {dim}"
        if bits > 4:
            return f"codes must have 1 to 4 bits; they have {bits}"
    return ""


def kernel_encoding(
    kernels: Any,
    keys: torch.Tensor,
    values: torch.Tensor,
    packed_keys: Sequence[PackedHeads],
    packed_values: Sequence[PackedHeads],
    means: torch.Tensor | None,
    mean_group: int,
    expected: int,
) -> int:
    """Codes keys and values [B, G, T, D] that `unserved_encoding` has nothing against, behind the tokens that
    are packed; returns how many are packed then. If it raises, nothing was appended.

    Args:
        kernels: the package with `encode`.
        means: bfloat16 [B, G, M, D], taken from the keys of each group of `mean_group` tokens, counted from
            the first packed one; None for nothing.
        expected: how many tokens will be packed at least.
    """
    parts = (*packed_keys, *packed_values)
    position = parts[0].codes.length
    try:
        for part in parts:
            part.extend(keys, expected)
        for key, value in zip_longest(packed_keys, packed_values):
            pair = ((key, keys), (value, values))
            kernels.encode(
                [_coding(kernels, part, states) for part, states in pair if part is not None],
                position,
                None if key is None else means,
                mean_group,
                _level_limits(keys.device),
            )
    except BaseException:
        for part in parts:
            for stored in part.storage():
                stored.crop(position)
        raise
    return position + keys.shape[2]


def _coding(kernels: Any, part: PackedHeads, states: torch.Tensor) -> Any:
    """How the kernels are to code these heads of states [B, G, T, D], and where to write."""
    quantizer, device = part.coding.quantizer, states.device
    [(dim, bits)] = quantizer.parts
    return kernels.Coding(
        states,
        *_matrix(kernels, part.coding.transform.to(device), bits, states.dtype),
        _centroids(dim, bits, device),
        part.codes.buffer,
        part.scales.buffer,
        quantizer.scale_rule,
        quantizer.code_search,
        None if part.gain is None else part.gain.reshape(-1),
        None if part.heads is None else _head_numbers(part.coding.heads, device),
    )


def _matrix(kernels: Any, transform: Transform, bits: int, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """`kernels.matrix_parts`, kept with the transform, which layers and caches share."""
    if (bits, dtype) not in transform.prepared:
        transform.prepared[bits, dtype] = kernels.matrix_parts(transform.encode, bits, dtype)
    return transform.prepared[bits, dtype]


@lru_cache(maxsize=64)
def _centroids(dim: int, bits: int, device: torch.device) -> torch.Tensor:
    return codebook(dim, bits).to(device)


@lru_cache(maxsize=256)
def _head_numbers(heads: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(heads, dtype=torch.int32, device=device)


@lru_cache(maxsize=16)
def _level_limits(device: torch.device) -> torch.Tensor:
    """float32 [255]: between the levels of `turboquant.scale_table`."""
    table = scale_table()
    return (table[1:] * table[:-1]).sqrt().float().to(device)
