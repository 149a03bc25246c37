"""Centroid lookup as PTX: four bytes of codes become pairs of 16 bit numbers by byte permutations.

`prmt.b32` reads four of eight bytes by four selectors of three bits, so it is a table of eight bytes. Codes
of 1 and 2 bits select both bytes of a centroid at once, 3 bits select low and high bytes apart, and 4 bits
use that the codebook is symmetric: three bits select the magnitude and the fourth is the sign. That is about
two instructions per centroid, against a memory access for each in a table.

Of a byte with K codes (of the byte triple with 8 codes of 3 bits) the codes 2i and 2i + 1 become the word i
of the result, so that channels lie side by side without another permutation.
"""

import struct
from collections.abc import Sequence
from functools import cache

import torch

from .launch import capability
from .registration import interpreted

TABLE_WORDS = 4


def assembly_for(bits: int, device: torch.device) -> str:
    """`lookup_assembly` where it can run: on NVIDIA devices from Ampere on, not in the interpreter."""
    return "" if interpreted() or capability(device) < (8, 0) else lookup_assembly(bits)


@cache
def byte_tables(centroids: Sequence[float], dtype: torch.dtype) -> tuple[int, ...]:
    """The TABLE_WORDS operands that `lookup_assembly` reads ascending symmetric `centroids` from, as int32.

    `dtype` is float16 or bfloat16.

    They are passed at run time, because constants would be moved to registers again for each of their uses.
    """
    halves = [int(number) & 0xFFFF for number in torch.tensor(centroids, dtype=dtype).view(torch.int16)]
    if len(halves) > 16:
        return (0,) * TABLE_WORDS
    if len(halves) == 16:
        halves = halves[8:]
    halves += [0] * (8 - len(halves))
    low, high = bytes(half & 255 for half in halves), bytes(half >> 8 for half in halves)
    return struct.unpack("<4i", low + high)


@cache
def lookup_assembly(bits: int) -> str:
    """PTX for `load_centroids` with codes of 1 to 4 bits; "" for more.

    The operands are those of `tl.inline_asm_elementwise` with pack=4: four registers for every word of the
    result, one register for every tile of bytes, and four equal registers for each word of `byte_tables`.
    """
    if bits > 4:
        return ""
    tiles = 3 if bits == 3 else 1
    first = 4 * (8 if bits == 3 else 8 // bits) // 2
    low0, low1, high0, high1 = (f"${first + tiles + 4 * i}" for i in range(TABLE_WORDS))
    codes = [f"${first + i}" for i in range(tiles)]
    if bits == 4:
        lines = _four_bits(*codes, low0, low1, high0, high1)
    elif bits == 3:
        lines = _three_bits(*codes, low0, low1, high0, high1)
    else:
        lines = _few_bits(bits, *codes, low0, high0)
    return "{\n" + "\n".join(lines) + "\n}"


def _few_bits(bits: int, codes: str, low: str, high: str) -> list[str]:
    """1 or 2 bits: a byte x * 17 + 64 holds the selectors of the low and the high byte of centroid x."""
    mask = "0x03030303" if bits == 2 else "0x01010101"
    lines = [".reg .b32 even, odd, select;"]
    for word in range(4 // bits):
        lines += [
            f"shr.u32 even, {codes}, {2 * word * bits};",
            f"shr.u32 odd, {codes}, {(2 * word + 1) * bits};",
            f"and.b32 even, even, {mask};",
            f"and.b32 odd, odd, {mask};",
        ]
        for pair, order in enumerate(("0x5140", "0x7362")):
            lines += [
                f"prmt.b32 select, even, odd, {order};",
                "mad.lo.u32 select, select, 17, 0x40404040;",
                f"prmt.b32 ${4 * word + 2 * pair}, {low}, {high}, select;",
                "shr.u32 select, select, 16;",
                f"prmt.b32 ${4 * word + 2 * pair + 1}, {low}, {high}, select;",
            ]
    return lines


def _three_bits(codes0: str, codes1: str, codes2: str, *tables: str) -> list[str]:
    """Two planes: the low bits of channels lie in two tiles, the high bits in the third."""
    lines = [".reg .b32 low, high, select, x, y;"]
    for word in range(4):
        half, place = divmod(word, 2)
        shift = 4 * place + half - 2  # brings the first high bit to bit 2 of its nibble, the second to bit 4
        lines += [
            f"shr.u32 low, {(codes0, codes1)[half]}, {4 * place};",
            "and.b32 select, low, 0x03030303;",
            "shl.b32 low, low, 2;",
            "lop3.b32 select, select, low, 0x30303030, 0xf8;",  # a | (b & c)
            f"{'shr.u32' if shift >= 0 else 'shl.b32'} high, {codes2}, {abs(shift)};",
            "lop3.b32 select, select, high, 0x04040404, 0xf8;",
            "shl.b32 high, high, 2;",
            "lop3.b32 select, select, high, 0x40404040, 0xf8;",
            *_pairs(4 * word, *tables),
        ]
    return lines


def _four_bits(codes: str, *tables: str) -> list[str]:
    """Codes 8-15 are the magnitudes upwards, 7-0 their negatives: a negative code selects 7 - code."""
    return [
        ".reg .b32 select, sign, up, x, y;",
        f"and.b32 x, {codes}, 0x88888888;",
        "shr.u32 y, x, 3;",
        "sub.u32 x, x, y;",  # 7 in every positive nibble
        f"lop3.b32 select, {codes}, x, 0x77777777, 0x82;",  # (a ^ b ^ c) & c
        f"shl.b32 up, {codes}, 4;",
        # Selectors from 8 on repeat the sign bit of a byte: one byte of ones for every positive code.
        *_pairs(0, *tables, signs=(f"prmt.b32 sign, up, {codes}, 0x{order};" for order in ("d9c8", "fbea"))),
    ]


def _pairs(first: int, low0: str, low1: str, high0: str, high1: str, signs: Sequence[str] = ()) -> list[str]:
    """Four words from the eight selectors in `select`, each the centroids of neighbouring selectors."""
    signs, lines = list(signs), []
    for pair in range(2):
        lines += [
            f"prmt.b32 x, {low0}, {low1}, select;",
            f"prmt.b32 y, {high0}, {high1}, select;",
        ]
        if signs:
            lines += [signs[pair], "lop3.b32 y, y, sign, 0x80808080, 0xf2;"]  # a | (~b & c)
        lines += [
            f"prmt.b32 ${first + 2 * pair}, x, y, 0x5140;",
            f"prmt.b32 ${first + 2 * pair + 1}, x, y, 0x7362;",
            "shr.u32 select, select, 16;",
        ]
    return lines[:-1]
