"""Bit packing against a twin that places one code after the other, in Python numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msa_hf.modeling.bit_packing import pack, packed_bytes, unpack

WIDTHS = (1, 2, 3, 4, 5, 6)
# (lowest bit, bits) of each plane
PLANES = {
    1: [(0, 1)],
    2: [(0, 2)],
    3: [(0, 2), (2, 1)],
    4: [(0, 4)],
    5: [(0, 4), (4, 1)],
    6: [(0, 4), (4, 2)],
}


@st.composite
def code_rows(draw, longest=70):
    bits = draw(st.sampled_from(WIDTHS))
    return bits, draw(st.lists(st.integers(0, 2**bits - 1), max_size=longest))


def naive_pack(codes, bits):
    """The documented layout, code by code: planes of the first multiple of 8 codes, then one number."""
    body, packed = len(codes) // 8 * 8, []
    for low, width in PLANES[bits]:
        plane = [0] * (body * width // 8)
        for i, code in enumerate(codes[:body]):
            byte, place = i % len(plane), i // len(plane)
            plane[byte] |= (code >> low) % 2**width << place * width
        packed += plane
    number = sum(code << j * bits for j, code in enumerate(codes[body:]))
    return packed + list(number.to_bytes(((len(codes) - body) * bits + 7) // 8, "little"))


@settings(max_examples=150, deadline=None)
@given(code_rows())
def test_layout_size_and_way_back(row):
    bits, codes = row
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == naive_pack(codes, bits)
    assert packed.shape == (packed_bytes(len(codes), bits),) == (-(-len(codes) * bits // 8),)
    assert unpack(packed, bits, len(codes)).tolist() == codes


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(WIDTHS),
    count=st.integers(0, 40),
    shape=st.lists(st.integers(0, 3), max_size=3),
    seed=st.integers(0, 99),
)
def test_leading_axes_and_strides_do_not_matter(bits, count, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (*shape, count), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (*shape, packed_bytes(count, bits))
    assert torch.equal(unpack(packed, bits, count), codes)
    rows = math.prod(shape)
    for row, expected in zip(packed.reshape(rows, packed_bytes(count, bits)), codes.reshape(rows, count)):
        assert row.tolist() == naive_pack(expected.tolist(), bits)
    spaced = codes.repeat_interleave(2, dim=-1)[..., ::2]
    assert torch.equal(pack(spaced, bits), packed)
    wide = torch.stack([packed, 255 - packed], dim=-1)[..., 0]
    assert torch.equal(unpack(wide, bits, count), codes)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("count", [1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 80, 96, 112, 129, 576])
def test_every_value_in_every_place(bits, count):
    for value in range(2**bits):
        codes = torch.arange(count) % 2**bits ^ value
        assert torch.equal(unpack(pack(codes.to(torch.uint8), bits), bits, count), codes.to(torch.uint8))


def test_one_byte_by_hand():
    """8 codes of 3 bits: two bytes of low bits (of codes 0, 2, 4, 6 and 1, 3, 5, 7) and one of high bits."""
    codes = torch.tensor([7, 0, 2, 1, 4, 3, 5, 6], dtype=torch.uint8)
    assert pack(codes, 3).tolist() == [0b01_00_10_11, 0b10_11_01_00, 0b11010001]
    assert pack(torch.tensor([5, 2, 7], dtype=torch.uint8), 3).tolist() == [0b11_010_101, 0b1]
