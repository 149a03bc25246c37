"""Rows of a memory bank as a padded prefix, against indexing and decoding in plain PyTorch."""

import pytest
import torch
from kernel_cases import DEVICE, HEAD_DIMS, WIDTHS, poisoned, rms_ratio

from msa_hf.kernels.gather import gather_dense, gather_packed
from msa_hf.modeling.codebooks import codebook
from msa_hf.modeling.turboquant import (
    PackedVectors,
    Transform,
    VectorQuantizer,
    dequantize,
    quantize,
    scale_table,
)

HALF_PRECISION = 1e-3  # centroids in float16, matrices in TensorFloat-32
BRAIN_PRECISION = 1e-2  # also covers an interpreter that cuts bits off where a GPU rounds

CHUNKS, HEADS = 37, 2
ROWS = torch.tensor([[3, 0, 36, 3, 17], [5, -1, 1, -1, -1], [-1, -1, -1, -1, -1]], device=DEVICE)


def padded(vectors: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[B, G, P, D] of vectors [C, G, D], zeros where a row is negative."""
    chosen = vectors[rows.clamp(min=0)].masked_fill((rows < 0)[..., None, None], 0)
    return chosen.transpose(1, 2)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_dense_rows_are_copied(dtype, dim):
    vectors = torch.randn(2, CHUNKS, HEADS * dim, device=DEVICE).to(dtype)
    rows = torch.randint(-1, CHUNKS, (3, 67), device=DEVICE)
    with poisoned():
        ours = gather_dense(vectors[0], vectors[1], rows, HEADS)
    for got, data in zip(ours, vectors):
        assert torch.equal(got, padded(data.unflatten(1, (HEADS, dim)), rows))


def test_rows_of_a_wider_tensor():
    both = torch.randn(CHUNKS, 2, HEADS * 64, device=DEVICE)
    keys, values = gather_dense(both[:, 0], both[:, 1], ROWS.t().contiguous().t(), HEADS)
    assert torch.equal(keys, padded(both[:, 0].unflatten(1, (HEADS, 64)), ROWS))
    assert torch.equal(values, padded(both[:, 1].unflatten(1, (HEADS, 64)), ROWS))
    assert gather_dense(both[:, 0], both[:, 1], ROWS[:, :0], HEADS)[0].shape == (3, HEADS, 0, 64)


def packed_rows(dim: int, bits: int, scale_bits: int, transform: Transform) -> PackedVectors:
    vectors = torch.randn(CHUNKS, HEADS, dim, device=DEVICE)
    return quantize(vectors, VectorQuantizer(((dim, bits),), scale_bits=scale_bits), transform)


def arguments(packed: PackedVectors, transform: Transform, gain: torch.Tensor | None) -> tuple:
    centroids = codebook(*packed.quantizer.parts[0]).tolist()
    return packed.codes, packed.scales, centroids, transform.to(DEVICE).decode, gain


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_packed_rows_are_decoded(bits, dim, dtype):
    kind = "haar" if dim == 96 else "hadamard"
    rotation, other = (Transform.rotation(kind, (dim,), seed) for seed in (0, 7))
    keys, values = packed_rows(dim, bits, 8, rotation), packed_rows(dim, 5 - bits, 16, other)
    gain = torch.tensor([4.0, 0.5], device=DEVICE)
    levels = scale_table().float().to(DEVICE)
    with poisoned():
        ours = gather_packed(
            *arguments(keys, rotation, gain), *arguments(values, other, None), levels, ROWS, dtype
        )
    wanted = dequantize(keys, rotation) * gain[:, None], dequantize(values, other)
    for got, vectors in zip(ours, wanted):
        assert got.dtype == dtype
        assert rms_ratio(got, padded(vectors, ROWS)) < (
            HALF_PRECISION if dtype == torch.float32 else BRAIN_PRECISION
        )
        assert not got[2].any()


def test_a_matrix_per_head():
    single = [Transform.rotation("haar", (64,), seed) for seed in range(HEADS)]
    transform = Transform(torch.stack([each.encode for each in single]))
    vectors = torch.randn(HEADS, CHUNKS, 64, device=DEVICE)
    packed = quantize(vectors, VectorQuantizer(((64, 4),)), transform)
    rows = packed.map(lambda tensor: tensor.transpose(0, 1).contiguous())
    ours = gather_packed(
        *arguments(rows, transform, None), *arguments(rows, transform, None), None, ROWS, torch.float32
    )
    wanted = padded(dequantize(packed, transform).transpose(0, 1), ROWS)
    assert rms_ratio(ours[0], wanted) < HALF_PRECISION
    assert torch.equal(ours[0], ours[1])


def test_rows_of_another_layout_are_refused():
    data = torch.zeros(CHUNKS, 12, device=DEVICE)
    with pytest.raises(ValueError, match="divisible by 5"):
        gather_dense(data, data, ROWS, 5)
    with pytest.raises(ValueError, match="side by side"):
        gather_dense(data.t(), data.t(), ROWS, 1)
    transform = Transform.rotation("hadamard", (64,))
    packed = packed_rows(64, 4, 16, transform)
    strided = packed.map(lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1))
    with pytest.raises(ValueError, match="keys must"):
        gather_packed(
            *arguments(strided, transform, None),
            *arguments(packed, transform, None),
            None,
            ROWS,
            torch.float32,
        )


def test_gathering_compiles():
    transform = Transform.rotation("hadamard", (64,))
    packed = packed_rows(64, 4, 16, transform)
    operands = (*arguments(packed, transform, None), *arguments(packed, transform, None))
    dense = torch.randn(CHUNKS, HEADS * 64, device=DEVICE)

    def both(rows):
        return (
            gather_packed(*operands, None, rows, torch.float32)[1]
            + gather_dense(dense, dense, rows, HEADS)[0]
        )

    assert torch.equal(torch.compile(both, fullgraph=True, backend="eager")(ROWS), both(ROWS))
