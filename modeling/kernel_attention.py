"""A TurboQuant layer as the Triton kernels take it: `kernels/torch-ext/msa_kernels/attention.py`.

Axis letters: B batch, H query heads, G key/value heads, Q query tokens, T tokens, D head dim.
"""

from functools import lru_cache
from typing import Any

import torch

from .codebooks import codebook
from .packed_states import HeadCodes, LayerView
from .turboquant import VectorQuantizer, scale_table

DECODE_ROWS = 16  # rows per key/value head up to which a step counts as decoding


def unserved(view: LayerView, mask: torch.Tensor | None, causal: bool, sinks: torch.Tensor | None) -> str:
    """Why the kernels cannot do this step; empty if they can."""
    if not causal or (mask is not None and (mask.dim() != 2 or mask.dtype != torch.bool)):
        return "the mask is more than padding and causality"
    if sinks is not None:
        return "the model has attention sink logits"
    if view.means is not None and view.mean_group & -view.mean_group < 16:
        return f"mean_group must be a multiple of 16; it is {view.mean_group}"
    for part in (*view.key_codes, *view.value_codes):
        quantizer = part.packed.quantizer
        if not isinstance(quantizer, VectorQuantizer) or len(quantizer.parts) > 2 or part.order is not None:
            return "these codes have more than two parts, sorted channels or another form"
        if any(width % 8 for width, _ in quantizer.parts) or not 16 <= quantizer.dim <= 256:
            return f"head_dim must be 16 to 256, parts multiples of 8; they are {quantizer.parts}"
    if view.keys.shape[-1] != view.values.shape[-1]:
        return "keys and values differ in length"
    return ""


def kernel_attention(
    kernels: Any,
    query: torch.Tensor,
    view: LayerView,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention [B, Q, H, D] of query [B, H, Q, D] on a layer that `unserved` has nothing against.

    Args:
        kernels: the package with `decode_attention` and `prefill_attention`.
        mask: [B, T] bool of real tokens, None for all.
    """
    batch, heads, tokens, dim = query.shape
    out = torch.empty(batch, tokens, heads, dim, dtype=query.dtype, device=query.device)
    rows = heads // view.keys.shape[1] * tokens
    attend = kernels.decode_attention if rows <= DECODE_ROWS else kernels.prefill_attention
    exact = (None, None, None)
    if view.exact is not None:
        exact = (view.exact.keys, view.exact.values, view.exact.positions)
    levels = scale_levels(query.device)
    if query.stride(-1) != 1:
        query = query.contiguous()
    for keys, values, table in _head_groups(view):
        attend(
            out,
            query,
            table,
            *_codes(keys),
            *_codes(values),
            levels,
            view.means,
            view.mean_group,
            *exact,
            view.keys,
            view.values,
            mask,
            scaling,
            softcap or 0.0,
            0,
            _parts(keys),
            _parts(values),
        )
    return out


def _codes(part: HeadCodes) -> tuple:
    """codes, scales, centroids, decode and gain as the kernels take them."""
    packed, transform = part.packed, part.transform.to(part.packed.codes.device)
    gain = None if part.gain is None else part.gain[:, :, 0, 0]
    return packed.codes, packed.scales, _centroids(packed.quantizer.parts), transform.decode, gain


def _parts(part: HeadCodes) -> list[int]:
    """Channels and bits of each part."""
    return [number for own in part.packed.quantizer.parts for number in own]


def _head_groups(view: LayerView):
    """(key codes, value codes, int32 table [h, 3]) of every set of heads that are coded alike."""
    groups, device = view.keys.shape[1], view.keys.device
    for keys in view.key_codes:
        for values in view.value_codes:
            table = _head_table(keys.head_numbers, values.head_numbers, groups, device)
            if table is not None:
                yield keys, values, table


@lru_cache(maxsize=256)
def _head_table(keys: tuple | None, values: tuple | None, groups: int, device) -> torch.Tensor | None:
    keys, values = keys or tuple(range(groups)), values or tuple(range(groups))
    rows = [(head, keys.index(head), values.index(head)) for head in keys if head in values]
    return torch.tensor(rows, dtype=torch.int32, device=device) if rows else None


@lru_cache(maxsize=64)
def _centroids(parts: tuple[tuple[int, int], ...]) -> tuple[float, ...]:
    return tuple(number for part in parts for number in codebook(*part).tolist())


@lru_cache(maxsize=16)
def scale_levels(device: torch.device) -> torch.Tensor:
    """`turboquant.scale_table` as float32 [256] on a device."""
    return scale_table().to(device, torch.float32)
