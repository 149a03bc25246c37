"""Packed codes to centroids, the step that all kernels share.

A part of W channels in b bits is stored as planes (modeling/bit_packing.py says how and writes them). Bytes
are loaded once, as they lie; every plane gives tiles of W * b / 8 channels, which are interleaved in
registers. A tile of centroids therefore has its channels in the order of `joined_channels`, and whoever
multiplies with it loads the other operand in that order. Axis letters: N rows, W channels of a part,
J = next power of 2 of W, at least 16.
"""

from functools import cache

import torch
import triton
import triton.language as tl

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2)}
LEAST_JOINED: tl.constexpr = tl.constexpr(16)  # what a tensor core contracts at least
CODES_PER_BYTE = {1: 8, 2: 4, 3: 8, 4: 2}  # 3 bits: per byte of the plane of high bits


def code_bytes(width: int, bits: int) -> int:
    """Bytes of the codes of a vector of `width` channels."""
    return (width * bits + 7) // 8


def joined_width(width: int) -> int:
    """J of a part of `width` channels."""
    return max(LEAST_JOINED.value, triton.next_power_of_2(width))


@cache
def joined_channels(width: int, bits: int) -> tuple[int, ...]:
    """The channel at each of the J places of a tile of `load_centroids`, -1 for padding."""
    if bits > 4:
        return tuple(i if i < width else -1 for i in range(joined_width(width)))
    tiles = CODES_PER_BYTE[bits]
    size = width // tiles
    order = []
    for i in range(joined_width(width) // tiles):
        for place in range(tiles):
            # Three bits take the low bits of half a tile after the other: its number counts halves last.
            number = place % 4 * 2 + place // 4 if bits == 3 else place
            order.append(number * size + i if i < size else -1)
    return tuple(order)


@cache
def channel_table(width: int, bits: int, device: torch.device) -> torch.Tensor:
    """`joined_channels` as int32 [J] on a device."""
    return torch.tensor(joined_channels(width, bits), dtype=torch.int32, device=device)


@cache
def centroid_table(centroids: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """A codebook as float32 [2**bits] on a device."""
    return torch.tensor(centroids, dtype=torch.float32, device=device)


def check_packed(name, codes, scales, centroids, dim: int, device: torch.device, parts=None) -> None:
    """Raises ValueError unless codes [..., n, N] and scales [..., n, S] can be read by `load_centroids`.

    `parts` are the width and bits of each part of the channels, (dim, bits of `centroids`) by default;
    `centroids` are those of the parts one after the other.
    """
    parts = parts or (dim, len(centroids).bit_length() - 1)
    widths, bits = parts[::2], parts[1::2]
    if any(own not in PLANES for own in bits) or len(centroids) != sum(2**own for own in bits):
        raise ValueError(
            f"{name} must have 2 to 64 centroids in each part, a power of 2; got {len(centroids)} for "
            f"{bits} bits"
        )
    if any(width % 8 or width <= 0 for width in widths) or sum(widths) != dim:
        raise ValueError(f"{name} must have multiples of 8 channels, {dim} together; got {widths}")
    size = sum(code_bytes(width, own) for width, own in zip(widths, bits))
    if codes.dtype != torch.uint8 or codes.shape[-1] != size:
        raise ValueError(
            f"{name} must be uint8 with {size} bytes for {widths} channels of {bits} bits; got "
            f"{codes.dtype} with {codes.shape[-1]}"
        )
    if codes.stride()[-2:] != (size, 1) or scales.shape != (*codes.shape[:-1], len(bits)):
        raise ValueError(
            f"{name} must lie token after token, with a scale for each part; got strides {codes.stride()} "
            f"and scales {tuple(scales.shape)}"
        )
    if scales.stride()[-2:] != (len(bits), 1) and not (scales.stride(-2) == len(bits) == 1):
        raise ValueError(f"the scales of {name} must lie side by side; got strides {scales.stride()}")
    if codes.device != device or scales.device != device:
        raise ValueError(f"{name} must be on {device}; got {codes.device} and {scales.device}")


@triton.jit
def _shifted(codes, table_ptr, SHIFT: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr):
    index = (codes >> SHIFT) & ((1 << WIDTH) - 1)
    return tl.load(table_ptr + index.to(tl.int32)).to(TYPE)


@triton.jit
def _joined(first, second):
    """[N, 2 K]: the columns of two tiles [N, K] in turn."""
    joined = tl.join(first, second)
    return tl.reshape(joined, (joined.shape[0], joined.shape[1] * 2))


@triton.jit
def _joined_four(a, b, c, d):
    return _joined(_joined(a, c), _joined(b, d))


@triton.jit
def _halves(words, TYPE: tl.constexpr):
    """16 bit TYPE [N, 2 K] of int32 [N, K], the low half of each word first."""
    low = (words & 0xFFFF).to(tl.int16).to(TYPE, bitcast=True)
    high = (words >> 16).to(tl.int16).to(TYPE, bitcast=True)
    return _joined(low, high)


@triton.jit
def _load_bytes(row_ptr, row_ok, START: tl.constexpr, SIZE: tl.constexpr, CODES: tl.constexpr):
    """uint8 [N, next power of 2 of SIZE]: SIZE bytes of every row from START on, 0 where there are none.

    At least as many as hold LEAST_JOINED codes, CODES in a byte.
    """
    LEAST: tl.constexpr = LEAST_JOINED // CODES
    NEXT: tl.constexpr = triton.next_power_of_2(SIZE)
    PADDED: tl.constexpr = NEXT if NEXT > LEAST else LEAST
    place = tl.arange(0, PADDED)
    ok = row_ok[:, None] & (place < SIZE)[None, :] if PADDED != SIZE else row_ok[:, None]
    return tl.load(row_ptr[:, None] + (START + place)[None, :], mask=ok, other=0)


@triton.jit
def load_centroids(
    row_ptr,  # [N] pointers to uint8, the first code byte of each row
    row_ok,  # [N] bool, rows that exist; the others read as code 0
    table_ptr,  # [2**BITS] centroids, float32
    word0, word1, word2, word3,  # `lookup.byte_tables` of the centroids in TYPE
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    TYPE: tl.constexpr,
    ASSEMBLY: tl.constexpr,  # of `lookup_assembly`; "" looks centroids up in memory
):  # fmt: skip
    """Centroids [N, J] in TYPE, channels as `joined_channels` says. Padding channels hold some centroid."""
    if BITS == 4:
        codes = _load_bytes(row_ptr, row_ok, 0, WIDTH // 2, 2)
        if ASSEMBLY == "":
            return _joined(_shifted(codes, table_ptr, 0, 4, TYPE), _shifted(codes, table_ptr, 4, 4, TYPE))
        else:
            words = tl.inline_asm_elementwise(
                ASSEMBLY, "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
                [codes, word0, word1, word2, word3], dtype=tl.int32, is_pure=True, pack=4,
            )  # fmt: skip
            return _halves(words, TYPE)
    elif BITS == 2:
        codes = _load_bytes(row_ptr, row_ok, 0, WIDTH // 4, 4)
        if ASSEMBLY == "":
            return _joined_four(
                _shifted(codes, table_ptr, 0, 2, TYPE),
                _shifted(codes, table_ptr, 2, 2, TYPE),
                _shifted(codes, table_ptr, 4, 2, TYPE),
                _shifted(codes, table_ptr, 6, 2, TYPE),
            )
        else:
            a, b = tl.inline_asm_elementwise(
                ASSEMBLY, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
                [codes, word0, word1, word2, word3], dtype=(tl.int32, tl.int32), is_pure=True, pack=4,
            )  # fmt: skip
            return _halves(_joined(a, b), TYPE)
    elif BITS == 1:
        codes = _load_bytes(row_ptr, row_ok, 0, WIDTH // 8, 8)
        if ASSEMBLY == "":
            even = _joined_four(
                _shifted(codes, table_ptr, 0, 1, TYPE),
                _shifted(codes, table_ptr, 2, 1, TYPE),
                _shifted(codes, table_ptr, 4, 1, TYPE),
                _shifted(codes, table_ptr, 6, 1, TYPE),
            )
            odd = _joined_four(
                _shifted(codes, table_ptr, 1, 1, TYPE),
                _shifted(codes, table_ptr, 3, 1, TYPE),
                _shifted(codes, table_ptr, 5, 1, TYPE),
                _shifted(codes, table_ptr, 7, 1, TYPE),
            )
            return _joined(even, odd)
        else:
            a, b, c, d = tl.inline_asm_elementwise(
                ASSEMBLY,
                "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
                [codes, word0, word1, word2, word3],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=4,
            )  # fmt: skip
            return _halves(_joined_four(a, b, c, d), TYPE)
    elif BITS == 3:
        SIZE: tl.constexpr = WIDTH // 8
        low0 = _load_bytes(row_ptr, row_ok, 0, SIZE, 8)
        low1 = _load_bytes(row_ptr, row_ok, SIZE, SIZE, 8)
        high = _load_bytes(row_ptr, row_ok, 2 * SIZE, SIZE, 8)
        if ASSEMBLY == "":
            even = _joined_four(
                _three_bit_tile(low0, high, table_ptr, 0, 0, TYPE),
                _three_bit_tile(low0, high, table_ptr, 2, 0, TYPE),
                _three_bit_tile(low1, high, table_ptr, 0, 1, TYPE),
                _three_bit_tile(low1, high, table_ptr, 2, 1, TYPE),
            )
            odd = _joined_four(
                _three_bit_tile(low0, high, table_ptr, 1, 0, TYPE),
                _three_bit_tile(low0, high, table_ptr, 3, 0, TYPE),
                _three_bit_tile(low1, high, table_ptr, 1, 1, TYPE),
                _three_bit_tile(low1, high, table_ptr, 3, 1, TYPE),
            )
            return _joined(even, odd)
        else:
            a, b, c, d = tl.inline_asm_elementwise(
                ASSEMBLY,
                "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
                [low0, low1, high, word0, word1, word2, word3],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=4,
            )  # fmt: skip
            return _halves(_joined_four(a, b, c, d), TYPE)
    else:  # 5 and 6 bits: every channel loads its bytes by itself
        NEXT: tl.constexpr = triton.next_power_of_2(WIDTH)
        channel = tl.arange(0, NEXT if NEXT > LEAST_JOINED else LEAST_JOINED)
        ok = row_ok[:, None] & (channel < WIDTH)[None, :]
        HALF: tl.constexpr = WIDTH // 2
        HIGH: tl.constexpr = WIDTH * (BITS - 4) // 8
        low_ptr = row_ptr[:, None] + (channel % HALF)[None, :]
        low = tl.load(low_ptr, mask=ok, other=0).to(tl.int32) >> (channel // HALF * 4)[None, :]
        high_ptr = row_ptr[:, None] + (HALF + channel % HIGH)[None, :]
        high = tl.load(high_ptr, mask=ok, other=0).to(tl.int32) >> (channel // HIGH * (BITS - 4))[None, :]
        index = (low & 15) | ((high & ((1 << (BITS - 4)) - 1)) << 4)
        return tl.load(table_ptr + index).to(TYPE)


@triton.jit
def _three_bit_tile(low, high, table_ptr, A: tl.constexpr, B: tl.constexpr, TYPE: tl.constexpr):
    index = ((low >> (2 * A)) & 3) | (((high >> (2 * A + B)) & 1) << 2)
    return tl.load(table_ptr + index.to(tl.int32)).to(TYPE)


@triton.jit
def load_scales(scale_ptr, ok, level_ptr, LEVELS: tl.constexpr):
    """Scales in float32, 0 where not ok: levels through their table `level_ptr` [256], or 16 bit numbers."""
    stored = tl.load(scale_ptr, mask=ok, other=0)
    if LEVELS:
        return tl.load(level_ptr + stored.to(tl.int32), mask=ok, other=0.0)
    return stored.to(tl.float32)
