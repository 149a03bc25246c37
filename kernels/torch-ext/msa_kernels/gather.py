"""Chosen rows of a memory bank as a padded prefix of keys and values, in one launch.

Axis letters: B samples, P places of the prefix, G key/value heads, D head dim, W = G * D, C chunks of the
bank, N bytes of a vector's codes, J = next power of 2 of D.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .codes import centroid_table, channel_table, check_packed, load_centroids, load_scales
from .launch import launch_parameters
from .lookup import assembly_for, byte_tables
from .registration import interpreted, operator


@triton.jit
def gather_dense_kernel(
    keys_ptr,  # [C, W]
    values_ptr,  # [C, W]
    rows_ptr,  # [B, P] int64
    key_out_ptr,  # [B, G, P, D]
    value_out_ptr,
    places,
    heads,
    key_stride,
    value_stride,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copies whole numbers of the elements' size, so that no bit changes. Grid: (P blocks, B * G, 2)."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    unit = tl.program_id(1)
    row = tl.load(rows_ptr + (unit // heads).to(tl.int64) * places + place, mask=place < places, other=-1)
    channel = tl.arange(0, triton.next_power_of_2(DIM))
    inside = (channel < DIM)[None, :]
    source = unit % heads * DIM + channel
    target = (unit.to(tl.int64) * places + place)[:, None] * DIM + channel[None, :]
    kept, written = (row >= 0)[:, None] & inside, (place < places)[:, None] & inside
    if tl.program_id(2) == 0:
        data = tl.load(keys_ptr + row[:, None] * key_stride + source[None, :], mask=kept, other=0)
        tl.store(key_out_ptr + target, data, mask=written)
    else:
        data = tl.load(values_ptr + row[:, None] * value_stride + source[None, :], mask=kept, other=0)
        tl.store(value_out_ptr + target, data, mask=written)


@triton.jit
def _decode_rows(
    codes_ptr, scales_ptr, table_ptr, word0, word1, word2, word3, level_ptr, decode_ptr, channel_ptr,
    gain_ptr, out_ptr, row, place, places, unit, heads, decode_stride,
    DIM: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr, GAIN: tl.constexpr, ASSEMBLY: tl.constexpr,
    CODE_TYPE: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """scale * gain * (centroids @ decode) of the rows of one head, COLUMNS channels at a time."""
    JOINED: tl.constexpr = triton.next_power_of_2(DIM)
    head = unit % heads
    real = row >= 0
    vector = row * heads + head
    codes = codes_ptr + vector * (DIM * BITS // 8)
    centroids = load_centroids(
        codes, real, table_ptr, word0, word1, word2, word3, DIM, BITS, CODE_TYPE, ASSEMBLY
    ).to(tl.float32)
    scale = load_scales(scales_ptr + vector, real, level_ptr, LEVELS)
    if GAIN:
        scale *= tl.load(gain_ptr + head)
    channel = tl.load(channel_ptr + tl.arange(0, JOINED))
    matrix = decode_ptr + head * decode_stride + channel * DIM
    target = out_ptr + (unit.to(tl.int64) * places + place) * DIM
    for start in range(0, DIM, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        ok = (channel >= 0)[:, None] & (column < DIM)[None, :]
        decode = tl.load(matrix[:, None] + column[None, :], mask=ok, other=0.0)
        vectors = tl.dot(centroids, decode, input_precision=PRECISION) * scale[:, None]
        tl.store(
            target[:, None] + column[None, :],
            vectors,
            mask=(place < places)[:, None] & (column < DIM)[None, :],
        )


@triton.jit
def gather_packed_kernel(
    key_codes_ptr, key_scales_ptr, key_table_ptr, key_word0, key_word1, key_word2, key_word3, key_level_ptr,
    key_decode_ptr, key_channel_ptr, key_gain_ptr, key_out_ptr,
    value_codes_ptr, value_scales_ptr, value_table_ptr, value_word0, value_word1, value_word2, value_word3,
    value_level_ptr, value_decode_ptr, value_channel_ptr, value_gain_ptr, value_out_ptr,
    rows_ptr, places, heads, key_decode_stride, value_decode_stride,
    DIM: tl.constexpr,
    KEY_BITS: tl.constexpr, KEY_LEVELS: tl.constexpr, KEY_GAIN: tl.constexpr, KEY_ASSEMBLY: tl.constexpr,
    VALUE_BITS: tl.constexpr, VALUE_LEVELS: tl.constexpr, VALUE_GAIN: tl.constexpr,
    VALUE_ASSEMBLY: tl.constexpr,
    CODE_TYPE: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Codes [C, G, N] and scales [C, G] to vectors [B, G, P, D]. Grid: (P blocks, B * G, 2)."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    unit = tl.program_id(1)
    row = tl.load(rows_ptr + (unit // heads).to(tl.int64) * places + place, mask=place < places, other=-1)
    if tl.program_id(2) == 0:
        _decode_rows(
            key_codes_ptr, key_scales_ptr, key_table_ptr, key_word0, key_word1, key_word2, key_word3,
            key_level_ptr, key_decode_ptr, key_channel_ptr, key_gain_ptr, key_out_ptr,
            row, place, places, unit, heads, key_decode_stride,
            DIM, KEY_BITS, KEY_LEVELS, KEY_GAIN, KEY_ASSEMBLY, CODE_TYPE, PRECISION, BLOCK, COLUMNS,
        )  # fmt: skip
    else:
        _decode_rows(
            value_codes_ptr, value_scales_ptr, value_table_ptr,
            value_word0, value_word1, value_word2, value_word3,
            value_level_ptr, value_decode_ptr, value_channel_ptr, value_gain_ptr, value_out_ptr,
            row, place, places, unit, heads, value_decode_stride,
            DIM, VALUE_BITS, VALUE_LEVELS, VALUE_GAIN, VALUE_ASSEMBLY, CODE_TYPE, PRECISION, BLOCK, COLUMNS,
        )  # fmt: skip


def _empty_dense_prefix(keys, values, rows, heads):
    shape = (rows.shape[0], heads, rows.shape[1], keys.shape[1] // heads)
    return keys.new_empty(shape), values.new_empty(shape)


@operator(fake=_empty_dense_prefix)
def gather_dense(
    keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor, heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of keys and values [C, W], of one type and on one device, as K and V [B, G, P, D] of that type.

    Args:
        rows: [B, P] int64; zeros stand where a row is negative.
        heads: G, by which W is divisible.

    Raises:
        ValueError: if keys and values differ in shape or type, or their channels do not lie side by side.
    """
    if keys.shape != values.shape or keys.dtype != values.dtype or keys.shape[1] % heads:
        raise ValueError(
            f"keys and values must be alike, W divisible by {heads}; got {keys.shape}, {values.shape}"
        )
    if keys.stride(1) != 1 or values.stride(1) != 1:
        raise ValueError(f"channels must lie side by side; got strides {keys.stride()}, {values.stride()}")
    rows, dim = rows.contiguous(), keys.shape[1] // heads
    shape = (rows.shape[0], heads, rows.shape[1], dim)
    out = tuple(torch.empty(shape, dtype=keys.dtype, device=keys.device) for _ in range(2))
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[keys.element_size()]
    if out[0].numel():
        settings = launch_parameters("gather_dense", keys.device)
        grid = (triton.cdiv(rows.shape[1], settings["BLOCK"]), rows.shape[0] * heads, 2)
        gather_dense_kernel[grid](
            keys.view(whole), values.view(whole), rows, out[0].view(whole), out[1].view(whole),
            rows.shape[1], heads, keys.stride(0), values.stride(0), DIM=dim,
            **settings,
        )  # fmt: skip
    return out


def _empty_packed_prefix(
    key_codes, key_scales, key_centroids, key_decode, key_gain,
    value_codes, value_scales, value_centroids, value_decode, value_gain, levels, rows, dtype,
):  # fmt: skip
    shape = (rows.shape[0], key_codes.shape[1], rows.shape[1], key_decode.shape[-1])
    return tuple(torch.empty(shape, dtype=dtype, device=rows.device) for _ in range(2))


@operator(fake=_empty_packed_prefix)
def gather_packed(
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
    rows: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of packed keys and values as K and V [B, G, P, D] in `dtype`, to about 11 bits of precision.

    Args:
        key_codes, value_codes: contiguous uint8 [C, G, N]; keys and values may differ in bits (1 to 4).
        key_scales, value_scales: contiguous [C, G, 1], 16 bit numbers or uint8 levels.
        key_centroids, value_centroids: 2 to 16 numbers, ascending and symmetric.
        key_decode, value_decode: float32 [D, D] or [G, D, D], from the basis of the codes to the model's.
        key_gain, value_gain: float32 [G], what the vectors were divided by before; None for 1.
        levels: float32 [256], the meaning of 8 bit scales.
        rows: [B, P] int64; zeros stand where a row is negative.

    Raises:
        ValueError: for another layout.
    """
    shape = (rows.shape[0], key_codes.shape[1], rows.shape[1], key_decode.shape[-1])
    out = tuple(torch.empty(shape, dtype=dtype, device=rows.device) for _ in range(2))
    pointers, constants, strides = zip(
        _packed_rows("keys", key_codes, key_scales, key_centroids, key_decode, key_gain, levels),
        _packed_rows("values", value_codes, value_scales, value_centroids, value_decode, value_gain, levels),
    )
    if not out[0].numel():
        return out
    heads, dim, rows = key_codes.shape[1], key_decode.shape[-1], rows.contiguous()
    settings = launch_parameters("gather_packed", rows.device)
    settings["BLOCK"] //= max(1, dim // 128)
    settings["COLUMNS"] = min(settings["COLUMNS"], triton.next_power_of_2(dim))
    grid = (triton.cdiv(rows.shape[1], settings["BLOCK"]), rows.shape[0] * heads, 2)
    gather_packed_kernel[grid](
        *pointers[0], out[0], *pointers[1], out[1], rows, rows.shape[1], heads, *strides,
        dim, *constants[0], *constants[1],
        CODE_TYPE=tl.float32 if interpreted() else tl.float16,
        PRECISION="ieee" if interpreted() else "tf32",
        **settings,
    )  # fmt: skip
    return out


def _packed_rows(name, codes, scales, centroids, decode, gain, levels):
    """Pointers, constants and the stride of `decode` over heads, as `gather_packed_kernel` takes them."""
    dim, device = decode.shape[-1], codes.device
    check_packed(name, codes, scales, centroids, dim, device)
    bits = len(centroids).bit_length() - 1
    if bits > 4 or not (codes.is_contiguous() and scales.is_contiguous() and decode.is_contiguous()):
        raise ValueError(
            f"{name} must have 1 to 4 bits and contiguous codes, scales and decode; got {bits} bits"
        )
    # What is not there is never read; a pointer to something stands in for it.
    pointers = (
        codes, scales, centroid_table(tuple(centroids), device),
        *byte_tables(tuple(centroids), torch.float16),
        decode if levels is None else levels, decode, channel_table(dim, bits, device),
        decode if gain is None else gain,
    )  # fmt: skip
    constants = (bits, scales.dtype == torch.uint8, gain is not None, assembly_for(bits, device))
    return pointers, constants, dim * dim if decode.dim() == 3 else 0
