"""Ragged means over consecutive chunks of tokens: keys, values and router keys of a layer in one launch.

Axis letters: B rows of a batch, T tokens, G key/value heads, D head dim, W = G * D, C chunks of all rows.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .launch import launch_parameters
from .registration import operator

MOST_STATES = 3


@triton.jit
def _pool_tile(
    states_ptr, out_ptr, lengths_ptr, row, chunk, rows, chunk_size, width, head_dim,
    row_stride, token_stride, head_stride,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The mean of one chunk of one row, COLUMNS of its channels."""
    other = tl.arange(0, ROWS)
    lengths = tl.load(lengths_ptr + other, mask=other < rows, other=0)
    before = tl.sum(tl.where(other < row, (lengths + chunk_size - 1) // chunk_size, 0), axis=0)
    length = tl.sum(tl.where(other == row, lengths, 0), axis=0)
    first = chunk * chunk_size
    count = tl.minimum(length - first, chunk_size)
    if count > 0:
        channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = channel < width
        source = states_ptr + row * row_stride + channel // head_dim * head_stride + channel % head_dim
        token = tl.arange(0, TOKENS)
        sums = tl.zeros((TOKENS, COLUMNS), tl.float32)
        for start in range(0, count, TOKENS):
            ok = (start + token < count)[:, None] & inside[None, :]
            offset = (first + start + token) * token_stride
            sums += tl.load(source[None, :] + offset[:, None], mask=ok, other=0.0).to(tl.float32)
        mean = tl.sum(sums, axis=0) / count.to(tl.float32)
        tl.store(out_ptr + (before + chunk) * width + channel, mean, mask=inside)


@triton.jit
def pool_chunks_kernel(
    states0_ptr, states1_ptr, states2_ptr, out0_ptr, out1_ptr, out2_ptr,
    lengths_ptr,  # [B] int64
    rows, size0, size1, size2, width0, width1, width2,
    row_stride0, token_stride0, head_stride0,
    row_stride1, token_stride1, head_stride1,
    row_stride2, token_stride2, head_stride2,
    DIM0: tl.constexpr, DIM1: tl.constexpr, DIM2: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """States [B, T, G, D] to means [C, W]. Grid: (B * most chunks of a row, tiles of W, tensors)."""
    row = (tl.program_id(0) % rows).to(tl.int64)
    chunk = (tl.program_id(0) // rows).to(tl.int64)
    which = tl.program_id(2)
    if which == 0:
        _pool_tile(
            states0_ptr, out0_ptr, lengths_ptr, row, chunk, rows, size0, width0, DIM0,
            row_stride0, token_stride0, head_stride0, ROWS, TOKENS, COLUMNS,
        )  # fmt: skip
    elif which == 1:
        _pool_tile(
            states1_ptr, out1_ptr, lengths_ptr, row, chunk, rows, size1, width1, DIM1,
            row_stride1, token_stride1, head_stride1, ROWS, TOKENS, COLUMNS,
        )  # fmt: skip
    else:
        _pool_tile(
            states2_ptr, out2_ptr, lengths_ptr, row, chunk, rows, size2, width2, DIM2,
            row_stride2, token_stride2, head_stride2, ROWS, TOKENS, COLUMNS,
        )  # fmt: skip


def _empty_means(states, lengths, chunk_sizes, totals):
    return [own.new_empty(total, own[0, 0].numel()) for own, total in zip(states, totals)]


@operator(fake=_empty_means)
def pool_chunks(
    states: Sequence[torch.Tensor],
    lengths: torch.Tensor,
    chunk_sizes: Sequence[int],
    totals: Sequence[int],
) -> list[torch.Tensor]:
    """Means over consecutive chunks of each row's first `lengths` tokens, accumulated in float32.

    Args:
        states: one to three tensors [B, T, W] or [B, T, G, D] of any strides but 1 for the last axis: keys
            [B, G, T, D] need no copy, only `transpose(1, 2)`.
        lengths: [B] int64 on the same device, tokens that count in each row, at most T.
        chunk_sizes: tokens of a chunk, for each tensor; the last chunk of a row is averaged over its length.
        totals: for each tensor the sum over rows of ceil(length / chunk size), which the caller knows without
            waiting for the device.

    Returns:
        For each tensor [total, W] in its dtype, row after row.

    Raises:
        ValueError: for more tensors, or channels that do not lie side by side.
    """
    if not 1 <= len(states) <= MOST_STATES or len(states) != len(chunk_sizes) or len(states) != len(totals):
        raise ValueError(
            f"states, chunk_sizes and totals must be alike, 1 to {MOST_STATES}; got {len(states)}"
        )
    heads = [own if own.dim() == 4 else own[:, :, None] for own in states]
    if any(own.stride(3) != 1 for own in heads):
        raise ValueError(f"channels must lie side by side; got strides {[own.stride() for own in states]}")
    out = [
        torch.empty(total, own.shape[2] * own.shape[3], dtype=own.dtype, device=own.device)
        for own, total in zip(heads, totals)
    ]
    rows = len(lengths)
    most = max(-(-own.shape[1] // size) for own, size in zip(heads, chunk_sizes))
    if rows * most and sum(totals):
        settings = launch_parameters("pool_chunks", lengths.device)
        widest = max(means.shape[1] for means in out)
        unused = [0] * (MOST_STATES - len(states))  # a grid without them never reaches these places
        index = [*range(len(states)), *unused]
        grid = (rows * most, triton.cdiv(widest, settings["COLUMNS"]), len(states))
        pool_chunks_kernel[grid](
            *(heads[i] for i in index), *(out[i] for i in index), lengths.long().contiguous(), rows,
            *(chunk_sizes[i] for i in index), *(out[i].shape[1] for i in index),
            *(stride for i in index for stride in heads[i].stride()[:3]),
            *(heads[i].shape[3] for i in index), ROWS=triton.next_power_of_2(rows),
            **settings,
        )  # fmt: skip
    return out
