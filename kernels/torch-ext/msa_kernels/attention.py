"""Attention on packed keys and values: decode steps, and prompts against a packed prefix.

The packed tokens are divided among programs ("splits"), the exact and recent tokens are one more split, and
`combine_splits_kernel` merges them by their log-sum-exp and takes the packed sums back from the values'
rotated basis. Queries are rotated inside the kernel; nothing that is packed is ever decoded to memory. The
specification is modeling/attention_turboquant.py.

Axis letters: B batch, H query heads, G key/value heads, S = H / G, Q query tokens, R = S * Q rows of a
key/value head, P packed tokens, L recent tokens, T = P + L, E exact tokens, M groups with a mean, D head dim,
N bytes of a vector's codes, J = next power of 2 of D, h heads that are coded alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import triton.language as tl

from .attention_kernels import attend_splits_kernel
from .codes import centroid_table, check_packed, joined_channels
from .combine_kernel import combine_splits_kernel
from .launch import ceil_div, launch_parameters, power_of_2, processors
from .lookup import assembly_for, byte_tables, lookup_assembly
from .registration import TRITON_TYPES, interpreted, operator

PROGRAMS_PER_PROCESSOR = 2
LEAST_ASSEMBLED = 32  # channels


@operator(mutates=("out",))
def decode_attention(
    out: torch.Tensor,
    query: torch.Tensor,
    heads: torch.Tensor,
    key_codes: torch.Tensor,
    key_scales: torch.Tensor,
    key_centroids: Sequence[float],
    key_decode: torch.Tensor,
    key_gain: torch.Tensor | None,
    value_codes: torch.Tensor,
    value_scales: torch.Tensor,
    value_centroids: Sequence[float],
    value_decode: torch.Tensor,
    value_gain: torch.Tensor | None,
    levels: torch.Tensor | None,
    means: torch.Tensor | None,
    mean_group: int,
    exact_keys: torch.Tensor | None,
    exact_values: torch.Tensor | None,
    exact_positions: torch.Tensor | None,
    recent_keys: torch.Tensor,
    recent_values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float,
    window: int,
    key_parts: Sequence[int] | None = None,
    value_parts: Sequence[int] | None = None,
) -> None:
    """Writes attention of the last Q tokens, few rows per key/value head, to `out` [B, Q, H, D].

    Args:
        query: [B, H, Q, D] bfloat16, float16 or float32, contiguous in D.
        heads: int32 [h, 3], the key/value heads that are computed: the head, its place among the key codes
            and its place among the value codes. Other heads of `out` stay as they are.
        key_codes, value_codes: uint8 [B, hk, P, N], codes of one or two parts of the channels as
            modeling/bit_packing.py packs them; key_scales, value_scales: [B, hk, P, 1 or 2], uint8 levels or
            bfloat16.
        key_centroids, value_centroids: 2**bits ascending numbers for 1 to 6 bits, part after part.
        key_decode, value_decode: float32 [D, D] or [hk, D, D]; a vector is scale * centroids @ decode.
        key_gain, value_gain: float32 [B, hk] factors of the vectors.
        levels: float32 [256], what 8 bit scales mean.
        means: [B, G, M, D], added to the keys of each group of `mean_group` tokens.
        exact_keys, exact_values: [B, G, E, D], packed tokens that are read from here; exact_positions: int32
            [B, G, E], -1 for none.
        recent_keys, recent_values: [B, G, L, D], the newest tokens, with those of the query at the end.
        mask: bool [B, T], tokens that may be seen at all. Causality is applied within the query's tokens.
        softcap: logit soft-capping, 0 for none. window: tokens that a query sees at most, 0 for all.
        key_parts, value_parts: channels and bits of each part; None for one part of all D channels.

    Raises:
        ValueError: naming the argument whose shape or layout cannot be read.
    """
    _attend(
        "decode_attention",
        out,
        query,
        heads,
        key_codes,
        key_scales,
        key_centroids,
        key_decode,
        key_gain,
        value_codes,
        value_scales,
        value_centroids,
        value_decode,
        value_gain,
        levels,
        means,
        mean_group,
        exact_keys,
        exact_values,
        exact_positions,
        recent_keys,
        recent_values,
        mask,
        scaling,
        softcap,
        window,
        key_parts,
        value_parts,
    )


@operator(mutates=("out",))
def prefill_attention(
    out: torch.Tensor,
    query: torch.Tensor,
    heads: torch.Tensor,
    key_codes: torch.Tensor,
    key_scales: torch.Tensor,
    key_centroids: Sequence[float],
    key_decode: torch.Tensor,
    key_gain: torch.Tensor | None,
    value_codes: torch.Tensor,
    value_scales: torch.Tensor,
    value_centroids: Sequence[float],
    value_decode: torch.Tensor,
    value_gain: torch.Tensor | None,
    levels: torch.Tensor | None,
    means: torch.Tensor | None,
    mean_group: int,
    exact_keys: torch.Tensor | None,
    exact_values: torch.Tensor | None,
    exact_positions: torch.Tensor | None,
    recent_keys: torch.Tensor,
    recent_values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float,
    window: int,
    key_parts: Sequence[int] | None = None,
    value_parts: Sequence[int] | None = None,
) -> None:
    """`decode_attention` for prompts: many rows per key/value head, whose tiles share what is unpacked."""
    _attend(
        "prefill_attention",
        out,
        query,
        heads,
        key_codes,
        key_scales,
        key_centroids,
        key_decode,
        key_gain,
        value_codes,
        value_scales,
        value_centroids,
        value_decode,
        value_gain,
        levels,
        means,
        mean_group,
        exact_keys,
        exact_values,
        exact_positions,
        recent_keys,
        recent_values,
        mask,
        scaling,
        softcap,
        window,
        key_parts,
        value_parts,
    )


def _attend(
    kernel: str,
    out: torch.Tensor,
    query: torch.Tensor,
    heads: torch.Tensor,
    key_codes: torch.Tensor,
    key_scales: torch.Tensor,
    key_centroids: Sequence[float],
    key_decode: torch.Tensor,
    key_gain: torch.Tensor | None,
    value_codes: torch.Tensor,
    value_scales: torch.Tensor,
    value_centroids: Sequence[float],
    value_decode: torch.Tensor,
    value_gain: torch.Tensor | None,
    levels: torch.Tensor | None,
    means: torch.Tensor | None,
    mean_group: int,
    exact_keys: torch.Tensor | None,
    exact_values: torch.Tensor | None,
    exact_positions: torch.Tensor | None,
    recent_keys: torch.Tensor,
    recent_values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float,
    window: int,
    key_parts: Sequence[int] | None = None,
    value_parts: Sequence[int] | None = None,
) -> None:
    batch, _, query_tokens, dim = query.shape
    groups, recent = recent_keys.shape[1], recent_keys.shape[2]
    share, packed, count = query.shape[1] // groups, key_codes.shape[2], heads.shape[0]
    device, interpreting = query.device, interpreted()
    check_packed("key_codes", key_codes, key_scales, key_centroids, dim, device, key_parts)
    check_packed("value_codes", value_codes, value_scales, value_centroids, dim, device, value_parts)
    # Rotated queries are scaled to 1 and take half precision; weights times scales may have any size.
    keys = _CodedParts.of(key_centroids, key_parts, dim, device, torch.float16)
    values = _CodedParts.of(value_centroids, value_parts, dim, device, torch.bfloat16)
    padded, rows = power_of_2(dim), share * query_tokens
    sum_width = max(padded, values.joined)
    settings = launch_parameters(kernel, device)
    block, tokens = settings.pop("ROWS"), settings.pop("TOKENS")
    if padded > 128:  # the table is for head dims up to 128 and codes of one part
        block, tokens = max(8, block * 128 // padded), max(16, tokens * 128 // padded)
    if max(keys.count, values.count) > 1:
        least = 16 if kernel == "decode_attention" else 8
        block, tokens = max(min(block, least), block // 2), max(16, tokens // 2)
    block = min(block, max(8, power_of_2(rows)))
    if means is not None:
        tokens = min(tokens, mean_group & -mean_group)  # a tile lies within one group
    blocks = ceil_div(rows, block)
    split_tokens, splits = _divided(packed, means, mean_group, tokens, batch * count * blocks, device)
    sums = torch.empty(splits + 1, batch * count, rows, sum_width, dtype=torch.float32, device=device)
    tops = torch.empty(sums.shape[:-1], dtype=torch.float32, device=device)
    totals = torch.empty_like(tops)
    # What is not there is never read; a pointer to something stands in for it.
    absent = query
    if mask is not None:
        mask = mask.view(torch.uint8)
    attend_splits_kernel[(splits + 1, blocks, batch * count)](
        query, heads,
        key_codes, key_scales, key_decode, absent if key_gain is None else key_gain,
        keys.table, keys.words, keys.channels,
        value_codes, value_scales, values.table, values.words,
        absent if levels is None else levels, absent if means is None else means,
        *(absent if exact is None else exact for exact in (exact_keys, exact_values, exact_positions)),
        recent_keys, recent_values, absent if mask is None else mask,
        sums, tops, totals,
        packed, recent, query_tokens, share, count, split_tokens, splits, groups,
        *query.stride()[:3], *key_codes.stride()[:2], *key_scales.stride()[:2],
        *value_codes.stride()[:2], *value_scales.stride()[:2],
        0 if key_gain is None else key_gain.stride(0), key_decode.stride(0) if key_decode.dim() == 3 else 0,
        *((0, 0) if means is None else means.stride()[:2]),
        *recent_keys.stride()[:3], 0 if mask is None else mask.stride(0),
        scaling, softcap, window,
        HEAD_DIM=dim, PADDED=padded, SUM_WIDTH=sum_width,
        **keys.constants("KEY"), **values.constants("VALUE"),
        KEY_BYTES=key_codes.shape[3], VALUE_BYTES=value_codes.shape[3],
        KEY_LEVELS=key_scales.dtype == torch.uint8, VALUE_LEVELS=value_scales.dtype == torch.uint8,
        GAIN=key_gain is not None, MEAN_GROUP=0 if means is None else mean_group,
        EXACT=0 if exact_keys is None else exact_keys.shape[2], MASK=mask is not None,
        SOFTCAP=softcap > 0, WINDOW=window > 0,
        TYPE=tl.float32 if interpreting else TRITON_TYPES[query.dtype],
        KEY_TYPE=tl.float32 if interpreting else tl.float16,
        VALUE_TYPE=tl.float32 if interpreting else tl.bfloat16,
        PRECISION="ieee", ROTATE_PRECISION="ieee" if interpreting else "tf32",
        TOKENS_FIRST=block < 64, ROWS=block, TOKENS=tokens, DENSE_TOKENS=min(tokens, 64),
        CHANNELS=16 if interpreting else 32,
        **settings,
    )  # fmt: skip
    merging = launch_parameters("combine_splits", device)
    merge_block, columns = merging.pop("ROWS"), min(padded, merging.pop("COLUMNS"))
    combine_splits_kernel[(ceil_div(rows, merge_block), ceil_div(dim, columns), batch * count)](
        out, heads, sums, tops, totals, value_decode, absent if value_gain is None else value_gain,
        values.channels,
        query_tokens, share, count, splits,
        0 if value_gain is None else value_gain.stride(0),
        value_decode.stride(0) if value_decode.dim() == 3 else 0, *out.stride()[:3],
        HEAD_DIM=dim, SUM_WIDTH=sum_width, JOINED=values.widths[0][2], JOINED2=values.widths[1][2],
        GAIN=value_gain is not None, PRECISION="ieee" if interpreting else "tf32",
        ROWS=merge_block, COLUMNS=columns,
        **merging,
    )  # fmt: skip


@dataclass(frozen=True)
class _CodedParts:
    """What the kernels read codes of one or two parts with.

    Args:
        table: centroids of the parts one after the other; words: their `byte_tables`, int32; channels: their
            `joined_channels`, counted from the first of all, int32 [J + J].
        widths: (channels, bits, J, assembly) of two parts; zeros for one that does not exist.
    """

    table: torch.Tensor
    words: torch.Tensor
    channels: torch.Tensor
    widths: tuple[tuple[int, int, int, str], ...]

    @property
    def count(self) -> int:
        return sum(width > 0 for width, _, _, _ in self.widths)

    @property
    def joined(self) -> int:
        return sum(joined for _, _, joined, _ in self.widths)

    @classmethod
    def of(cls, centroids, parts, dim: int, device: torch.device, dtype: torch.dtype) -> "_CodedParts":
        parts = parts or (dim, len(centroids).bit_length() - 1)
        if len(parts) > 4:
            raise ValueError(f"codes have at most two parts; got {len(parts) // 2}")
        return cls.cached(tuple(centroids), tuple(parts), device, dtype, assembly_for(4, device) != "")

    @classmethod
    @cache
    def cached(cls, centroids, parts, device, dtype, assembled: bool) -> "_CodedParts":
        words, channels, widths, first, channel = [], [], [], 0, 0
        for width, bits in zip(parts[::2], parts[1::2]):
            words += byte_tables(centroids[first : first + 2**bits], dtype)
            order = joined_channels(width, bits)
            channels += [place + channel if place >= 0 else -1 for place in order]
            # Four bytes at a time are more than a thread has of a narrow part.
            assembly = lookup_assembly(bits) if assembled and width >= LEAST_ASSEMBLED else ""
            widths.append((width, bits, len(order), assembly))
            first, channel = first + 2**bits, channel + width
        widths += [(0, 0, 0, "")] * (2 - len(widths))
        whole = (torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in (words, channels))
        return cls(centroid_table(centroids, device), *whole, tuple(widths))

    def constants(self, prefix: str) -> dict:
        names = ("WIDTH", "BITS", "JOINED", "ASSEMBLY")
        return {
            f"{prefix}_{name}{number}": value
            for number, part in zip(("", "2"), self.widths)
            for name, value in zip(names, part)
        }


def _divided(packed, means, mean_group: int, tokens: int, others: int, device) -> tuple[int, int]:
    """Tokens of a split and number of splits: enough programs for every processor, whole groups in each."""
    if not packed:
        return tokens, 0
    unit = tokens if means is None else mean_group
    wanted = max(1, PROGRAMS_PER_PROCESSOR * processors(device) // others)
    split_tokens = ceil_div(ceil_div(packed, wanted), unit) * unit
    return split_tokens, ceil_div(packed, split_tokens)
