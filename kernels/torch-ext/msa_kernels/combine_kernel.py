"""Merging the splits of attention, and the way back from the values' rotated basis; see `attention.py`."""

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=("packed_splits", "head_count"), do_not_specialize_on_alignment=("query_tokens",)
)
def combine_splits_kernel(
    out_ptr, heads_ptr, sums_ptr, tops_ptr, totals_ptr, decode_ptr, gain_ptr, channels_ptr,
    query_tokens, share, head_count, packed_splits, gain_stride_b, decode_stride_h,
    out_stride_b, out_stride_q, out_stride_h,
    HEAD_DIM: tl.constexpr, SUM_WIDTH: tl.constexpr, JOINED: tl.constexpr, JOINED2: tl.constexpr,
    GAIN: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Merges the splits and writes COLUMNS channels of ROWS rows of the output."""
    row_block, column_block, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, place = pair // head_count, pair % head_count
    rows = share * query_tokens
    row = row_block * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    column_ok = column < HEAD_DIM
    pairs = tl.num_programs(2)

    dense_row = (tl.cast(packed_splits, tl.int64) * pairs + pair) * rows + row
    top = tl.load(tops_ptr + dense_row, mask=row_ok, other=0.0)
    for split in range(0, packed_splits):
        own = tl.load(
            tops_ptr + (tl.cast(split, tl.int64) * pairs + pair) * rows + row, mask=row_ok, other=0.0
        )
        top = tl.maximum(top, own)
    top = tl.where(top == float("-inf"), 0.0, top)

    total = tl.zeros((ROWS,), tl.float32)
    rotated = tl.zeros((ROWS, JOINED), tl.float32)
    UNROLL: tl.constexpr = 4 if JOINED + JOINED2 <= 256 else 2  # loads under way at once
    if JOINED2 > 0:
        rotated2 = tl.zeros((ROWS, JOINED2), tl.float32)
    for split in tl.range(0, packed_splits, loop_unroll_factor=UNROLL):
        split_row = (tl.cast(split, tl.int64) * pairs + pair) * rows + row
        part = tl.exp2(tl.load(tops_ptr + split_row, mask=row_ok, other=0.0) - top)
        total += part * tl.load(totals_ptr + split_row, mask=row_ok, other=0.0)
        own_ptr = sums_ptr + split_row[:, None] * SUM_WIDTH
        own = tl.load(own_ptr + tl.arange(0, JOINED)[None, :], mask=row_ok[:, None], other=0.0)
        rotated += part[:, None] * own
        if JOINED2 > 0:
            own = tl.load(own_ptr + JOINED + tl.arange(0, JOINED2)[None, :], mask=row_ok[:, None], other=0.0)
            rotated2 += part[:, None] * own

    part = tl.exp2(tl.load(tops_ptr + dense_row, mask=row_ok, other=0.0) - top)
    total += part * tl.load(totals_ptr + dense_row, mask=row_ok, other=0.0)
    result = part[:, None] * tl.load(
        sums_ptr + dense_row[:, None] * SUM_WIDTH + column[None, :],
        mask=row_ok[:, None] & column_ok[None, :],
        other=0.0,
    )
    if packed_splits > 0:
        value_place = tl.load(heads_ptr + 3 * place + 2)
        columns_ptr = decode_ptr + value_place * decode_stride_h + column[None, :]
        gain = 1.0
        if GAIN:
            gain = tl.load(gain_ptr + batch * gain_stride_b + value_place)
        channel = tl.load(channels_ptr + tl.arange(0, JOINED))[:, None]
        there = (channel >= 0) & column_ok[None, :]
        matrix = gain * tl.load(columns_ptr + channel * HEAD_DIM, mask=there, other=0.0)
        result = tl.dot(rotated, matrix, result, input_precision=PRECISION)
        if JOINED2 > 0:
            channel = tl.load(channels_ptr + JOINED + tl.arange(0, JOINED2))[:, None]
            there = (channel >= 0) & column_ok[None, :]
            matrix = gain * tl.load(columns_ptr + channel * HEAD_DIM, mask=there, other=0.0)
            result = tl.dot(rotated2, matrix, result, input_precision=PRECISION)
    # A row that may see nothing is padding, and gets zeros.
    result = tl.where(total[:, None] > 0, result / tl.maximum(total, 1e-30)[:, None], 0.0)
    head = tl.load(heads_ptr + 3 * place)
    target = (
        batch.to(tl.int64) * out_stride_b
        + (row % query_tokens).to(tl.int64) * out_stride_q
        + (head * share + row // query_tokens).to(tl.int64) * out_stride_h
    )
    tl.store(
        out_ptr + target[:, None] + column[None, :],
        result.to(out_ptr.dtype.element_ty),
        mask=row_ok[:, None] & column_ok[None, :],
    )
