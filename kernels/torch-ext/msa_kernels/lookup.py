"""Centroid lookup as PTX: four bytes of codes become pairs of 16 bit numbers by byte permutations.

`prmt.b32` reads four of eight bytes by four selectors of three bits, so it is a table of eight bytes. Codes
of 1 and 2 bits select both bytes of a centroid at once, 3 bits select low and high bytes apart, and 4 bits
use that the codebook is symmetric: three bits select the magnitude and the fourth is the sign. That is 1.5 to
3 instructions per centroid, against a memory access for each in a table.
"""

import struct
from collections.abc import Sequence
from functools import cache

import torch

from .launch import capability
from .registration import interpreted


def assembly_for(centroids: tuple[float, ...], device: torch.device) -> str:
    """`lookup_assembly` where it can run: on NVIDIA devices from Ampere on, not in the interpreter."""
    return "" if interpreted() or capability(device) < (8, 0) else lookup_assembly(centroids)


@cache
def lookup_assembly(centroids: Sequence[float]) -> str:
    """PTX for `load_centroids` with 2, 4, 8 or 16 ascending symmetric `centroids`, as float16; "" for more.

    The operands are those of `tl.inline_asm_elementwise` with pack=4: first two registers for every tile of
    the result, then one register for every tile of bytes.
    """
    if len(centroids) > 16:
        return ""
    halves = [struct.unpack("<H", struct.pack("<e", centroid))[0] for centroid in centroids]
    body = {2: _few_bits, 4: _few_bits, 8: _three_bit_lookup, 16: _four_bit_lookup}[len(centroids)]
    return "{\n" + "\n".join(body(halves)) + "\n}"


def _word(numbers: Sequence[int]) -> str:
    """Four bytes as one constant, the first byte lowest."""
    return f"0x{sum(number << (8 * i) for i, number in enumerate(numbers)):08x}"


def _few_bits(halves: list[int]) -> list[str]:
    """1 or 2 bits: a byte x * 17 + 64 holds the selectors of the low and the high byte of centroid x."""
    padded = halves + [0] * (4 - len(halves))
    bits = len(halves).bit_length() - 1
    tiles = 8 // bits
    mask = "0x03030303" if bits == 2 else "0x01010101"
    lines = [
        ".reg .b32 low, high, x;",
        f"mov.b32 low, {_word([half & 255 for half in padded])};",
        f"mov.b32 high, {_word([half >> 8 for half in padded])};",
    ]
    for tile in range(tiles):
        lines += [
            f"shr.u32 x, ${2 * tiles}, {tile * bits};",
            f"and.b32 x, x, {mask};",
            "mad.lo.u32 x, x, 17, 0x40404040;",
            f"prmt.b32 ${2 * tile}, low, high, x;",
            "shr.u32 x, x, 16;",
            f"prmt.b32 ${2 * tile + 1}, low, high, x;",
        ]
    return lines


def _three_bit_lookup(halves: list[int]) -> list[str]:
    """Low two bits and high bit come from two planes; four codes are pushed together into four selectors."""
    lines = [".reg .b32 low0, low1, high0, high1, x, y;", *_byte_tables(halves)]
    for tile in range(8):
        half, place = divmod(tile, 4)
        shift = 2 * place + half - 2  # of the high bit, to bit 2 of its byte
        lines += [
            f"shr.u32 x, ${16 + half}, {2 * place};",
            "and.b32 x, x, 0x03030303;",
            f"{'shr.u32' if shift >= 0 else 'shl.b32'} y, $18, {abs(shift)};",
            "lop3.b32 x, x, y, 0x04040404, 0xf8;",  # x | (y & c)
            "shr.u32 y, x, 4;",
            "or.b32 x, x, y;",
            "prmt.b32 x, x, x, 0x4420;",
            "prmt.b32 y, low0, low1, x;",
            "prmt.b32 x, high0, high1, x;",
            f"prmt.b32 ${2 * tile}, y, x, 0x5140;",
            f"prmt.b32 ${2 * tile + 1}, y, x, 0x7362;",
        ]
    return lines


def _four_bit_lookup(halves: list[int]) -> list[str]:
    """Codes 8-15 are the magnitudes upwards, 7-0 their negatives: a negative code selects 7 - code."""
    lines = [
        ".reg .b32 low0, low1, high0, high1, select, sign, up, x, y;",
        *_byte_tables(halves[8:]),
        "and.b32 x, $4, 0x88888888;",
        "shr.u32 y, x, 3;",
        "sub.u32 x, x, y;",  # 7 in every positive nibble
        "lop3.b32 select, $4, x, 0x77777777, 0x82;",  # (a ^ b ^ c) & c
        "shl.b32 up, $4, 4;",
    ]
    # Selectors from 8 on repeat the sign bit of a byte: one byte of ones for every positive code.
    for pair, signs in enumerate(("0xd9c8", "0xfbea")):
        lines += [
            f"prmt.b32 sign, up, $4, {signs};",
            "prmt.b32 y, low0, low1, select;",
            "prmt.b32 x, high0, high1, select;",
            "lop3.b32 x, x, sign, 0x80808080, 0xf2;",  # a | (~b & c)
            f"prmt.b32 ${pair}, y, x, 0x6240;",
            f"prmt.b32 ${2 + pair}, y, x, 0x7351;",
            "shr.u32 select, select, 16;",
        ]
    return lines[:-1]


def _byte_tables(halves: list[int]) -> list[str]:
    return [
        f"mov.b32 {name}{i}, {_word([(half >> shift) & 255 for half in halves[4 * i : 4 * i + 4]])};"
        for name, shift in (("low", 0), ("high", 8))
        for i in range(2)
    ]
