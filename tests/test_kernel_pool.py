"""Ragged chunk means against the plain implementation."""

import pytest
import torch
from kernel_cases import DEVICE, HEAD_DIMS, LENGTHS, poisoned, rms_ratio

from msa_hf.kernels.pool import pool_chunks
from msa_hf.modeling import routing_products

FULL_PRECISION = 1e-6
HALF_PRECISION = 1e-3
BRAIN_PRECISION = 8e-3  # an interpreter cuts bits off where a GPU rounds
TOLERANCE = {
    torch.float32: FULL_PRECISION,
    torch.float16: HALF_PRECISION,
    torch.bfloat16: BRAIN_PRECISION,
}


def pooled(states: list[torch.Tensor], lengths: list[int], sizes: list[int]) -> list[torch.Tensor]:
    totals = [sum(-(-length // size) for length in lengths) for size in sizes]
    with poisoned():
        return pool_chunks(states, torch.tensor(lengths, device=DEVICE), sizes, totals)


def plain(states: torch.Tensor, lengths: list[int], size: int) -> torch.Tensor:
    return routing_products.pool_chunks(states.flatten(2), torch.tensor(lengths), size)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_three_tensors_of_different_shapes(dtype, dim):
    lengths, sizes = [70, 0, 129, 1], [64, 64, 16]
    keys, values = torch.randn(2, 4, 2, 129, dim, device=DEVICE).to(dtype).transpose(2, 3)
    router = torch.randn(4, 129, 3 * dim, device=DEVICE).to(dtype)
    states = [keys, values, router]
    assert not keys.is_contiguous()
    for ours, own, size in zip(pooled(states, lengths, sizes), states, sizes):
        assert ours.dtype == dtype
        assert rms_ratio(ours, plain(own, lengths, size)) < TOLERANCE[dtype]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("size", (1, 48, 100))
def test_lengths(length, size):
    tokens = min(length + 3, 1000)
    if tokens // size > 200:
        tokens = length = 30
    states = torch.randn(1, tokens, 40, device=DEVICE)
    (ours,) = pooled([states], [length], [size])
    assert rms_ratio(ours, plain(states, [length], size)) < FULL_PRECISION


def test_what_lies_beyond_a_row_does_not_count():
    states = torch.randn(2, 20, 2, 8, device=DEVICE)
    states[0, 13:] = torch.nan
    ours, again = pooled([states, states], [13, 20], [8, 8])
    assert rms_ratio(ours, plain(states, [13, 20], 8)) < FULL_PRECISION
    assert torch.equal(ours, again)


def test_nothing_to_pool():
    (ours,) = pooled([torch.randn(2, 5, 8, device=DEVICE)], [0, 0], [4])
    assert ours.shape == (0, 8)


def test_other_layouts_are_refused():
    states = torch.randn(2, 8, 5, device=DEVICE).mT
    with pytest.raises(ValueError, match="side by side"):
        pooled([states], [1, 1], [4])
    with pytest.raises(ValueError, match="1 to 3"):
        pooled([states.contiguous()] * 4, [1, 1], [4] * 4)


def test_pooling_compiles():
    states, lengths = torch.randn(2, 9, 8, device=DEVICE), torch.tensor([9, 3], device=DEVICE)

    def both(states):
        first, second = pool_chunks([states, states], lengths, [4, 2], [4, 7])
        return first.sum() + second.sum()

    assert torch.equal(torch.compile(both, fullgraph=True, backend="eager")(states), both(states))
