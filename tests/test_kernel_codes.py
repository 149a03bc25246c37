"""Centroids read by the kernels against unpacking and looking up in plain PyTorch."""

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import DEVICE, HEAD_DIMS

from msa_hf.kernels.codes import PLANES, channel_table, load_centroids
from msa_hf.modeling import bit_packing
from msa_hf.modeling.codebooks import codebook


@triton.jit
def read_kernel(
    codes_ptr, table_ptr, out_ptr, rows, BYTES: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr
):
    PADDED: tl.constexpr = triton.next_power_of_2(WIDTH)
    row = tl.arange(0, 16)
    ok = row < rows
    tile = load_centroids(codes_ptr + row * BYTES, ok, table_ptr, 0, 0, 0, 0, WIDTH, BITS, tl.float32, "")
    tl.store(out_ptr + row[:, None] * PADDED + tl.arange(0, PADDED)[None, :], tile, mask=ok[:, None])


@pytest.mark.parametrize("bits", PLANES)
@pytest.mark.parametrize("width", (16, 48, 80, *HEAD_DIMS))
def test_centroids_are_those_of_the_codes(width, bits):
    rows, padded = 13, triton.next_power_of_2(width)
    codes = torch.randint(0, 2**bits, (rows, width), dtype=torch.uint8, device=DEVICE)
    table = codebook(width, bits).to(DEVICE)
    packed = bit_packing.pack(codes, bits)
    out = torch.full((rows, padded), torch.nan, device=DEVICE)
    read_kernel[(1,)](packed, table, out, rows, packed.shape[1], width, bits)
    channels = channel_table(width, bits, DEVICE).long()
    assert sorted(channels.tolist()) == sorted([*range(width), *[-1] * (padded - width)])
    real = channels >= 0
    assert torch.equal(out[:, real], table[codes.int()][:, channels[real]])
    assert out.isfinite().all()


def test_planes_are_those_that_packing_writes():
    assert PLANES == bit_packing.PLANES
