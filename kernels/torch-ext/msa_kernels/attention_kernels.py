"""The two kernels of attention on packed keys and values; `attention.py` says how they work together.

Tensor cores want many rows in a product's first operand. A decode step has few query rows, so tokens come
first (TOKENS_FIRST: scores [N, R], sums [D, R]) and keys are unpacked in the registers where the product
reads them; a prompt has many, and they come first (scores [R, N], sums [R, D]). The small functions below are
all that knows the difference. R rows, X anything else: tokens, channels or groups.
"""

import triton
import triton.language as tl

from .codes import load_centroids, load_scales

GROUPS_AT_ONCE: tl.constexpr = tl.constexpr(16)  # group means that a program holds the scores of
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _by_row(x, TOKENS_FIRST: tl.constexpr):
    """[R] along the axis of rows of a matrix."""
    return x[None, :] if TOKENS_FIRST else x[:, None]


@triton.jit
def _by_other(x, TOKENS_FIRST: tl.constexpr):
    """[X] along the other axis."""
    return x[:, None] if TOKENS_FIRST else x[None, :]


@triton.jit
def _zeros(ROWS: tl.constexpr, OTHERS: tl.constexpr, TOKENS_FIRST: tl.constexpr):
    if TOKENS_FIRST:
        return tl.zeros((OTHERS, ROWS), tl.float32)
    else:
        return tl.zeros((ROWS, OTHERS), tl.float32)


@triton.jit
def _product(others, rows, sums, TOKENS_FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """sums + the products of each of `others` [X, K] with each row of `rows` [K, R] or [R, K]."""
    if TOKENS_FIRST:
        return tl.dot(others, rows, sums, input_precision=PRECISION)
    else:
        return tl.dot(rows, tl.trans(others), sums, input_precision=PRECISION)


@triton.jit
def _softmax_step(scores, top, TOKENS_FIRST: tl.constexpr):
    """Online softmax in base 2: weights like scores, new maxima [R], factor [R] of what is summed so far."""
    new_top = tl.maximum(top, tl.max(scores, axis=0 if TOKENS_FIRST else 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    return tl.exp2(scores - _by_row(base, TOKENS_FIRST)), new_top, tl.exp2(top - base)


@triton.jit
def _in_base_two(scores, softcap, SOFTCAP: tl.constexpr):
    """Scores times log2(e), after softcap * tanh(scores / softcap) where there is a cap."""
    if SOFTCAP:
        scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
    return scores * LOG2E


@triton.jit
def _dense_step(
    query, keys_ptr, values_ptr, key_ok, allowed, scaling, softcap, top, total, sums,
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    SOFTCAP: tl.constexpr, TOKENS_FIRST: tl.constexpr,
):  # fmt: skip
    """One tile of dense tokens: row pointers [N] of keys and values, and what each row may see."""
    channel = tl.arange(0, PADDED)
    inside = key_ok[:, None] & (channel < HEAD_DIM)[None, :]
    keys = tl.load(keys_ptr[:, None] + channel[None, :], mask=inside, other=0.0).to(TYPE)
    scores = _zeros(
        allowed.shape[1 if TOKENS_FIRST else 0], allowed.shape[0 if TOKENS_FIRST else 1], TOKENS_FIRST
    )
    scores = _product(keys, query, scores, TOKENS_FIRST, PRECISION) * scaling
    scores = tl.where(allowed, _in_base_two(scores, softcap, SOFTCAP), float("-inf"))
    weights, top, keep = _softmax_step(scores, top, TOKENS_FIRST)
    total = total * keep + tl.sum(weights, axis=0 if TOKENS_FIRST else 1)
    values = tl.load(values_ptr[:, None] + channel[None, :], mask=inside, other=0.0).to(TYPE)
    sums *= _by_row(keep, TOKENS_FIRST)
    sums = _product(tl.trans(values), weights.to(TYPE), sums, TOKENS_FIRST, PRECISION)
    return top, total, sums


@triton.jit
def attend_splits_kernel(
    query_ptr, heads_ptr,
    key_codes_ptr, key_scales_ptr, key_decode_ptr, key_gain_ptr, key_table_ptr, key_channels_ptr,
    value_codes_ptr, value_scales_ptr, value_table_ptr,
    key_word0, key_word1, key_word2, key_word3, value_word0, value_word1, value_word2, value_word3,
    levels_ptr, means_ptr, exact_keys_ptr, exact_values_ptr, exact_positions_ptr,
    recent_keys_ptr, recent_values_ptr, mask_ptr,
    sums_ptr, tops_ptr, totals_ptr,
    packed, recent, query_tokens, share, head_count, split_tokens, packed_splits, groups,
    query_stride_b, query_stride_h, query_stride_q,
    key_codes_stride_b, key_codes_stride_h, key_scales_stride_b, key_scales_stride_h,
    value_codes_stride_b, value_codes_stride_h, value_scales_stride_b, value_scales_stride_h,
    key_gain_stride_b, decode_stride_h, means_stride_b, means_stride_g,
    recent_stride_b, recent_stride_g, recent_stride_t, mask_stride_b,
    scaling, softcap, window,
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
    KEY_BYTES: tl.constexpr, VALUE_BYTES: tl.constexpr,
    KEY_LEVELS: tl.constexpr, VALUE_LEVELS: tl.constexpr, GAIN: tl.constexpr,
    MEAN_GROUP: tl.constexpr, EXACT: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, KEY_ASSEMBLY: tl.constexpr, VALUE_ASSEMBLY: tl.constexpr,
    TYPE: tl.constexpr, KEY_TYPE: tl.constexpr, VALUE_TYPE: tl.constexpr,
    PRECISION: tl.constexpr, ROTATE_PRECISION: tl.constexpr,
    TOKENS_FIRST: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, DENSE_TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """One split's sums [splits, B * h, R, J], maxima and totals for ROWS rows of one head of one sample."""
    split, row_block, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, place = pair // head_count, pair % head_count
    head = tl.load(heads_ptr + 3 * place)
    row = row_block * ROWS + tl.arange(0, ROWS)
    row_ok = row < share * query_tokens
    query_token = row % query_tokens
    query_position = packed + recent - query_tokens + query_token
    query_rows_ptr = (
        query_ptr
        + batch.to(tl.int64) * query_stride_b
        + (head * share + row // query_tokens).to(tl.int64) * query_stride_h
        + query_token.to(tl.int64) * query_stride_q
    )
    mask_row_ptr = mask_ptr + batch.to(tl.int64) * mask_stride_b
    exact_row = (batch * groups + head).to(tl.int64) * EXACT
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = _zeros(ROWS, PADDED, TOKENS_FIRST)

    if split < packed_splits:
        key_place = tl.load(heads_ptr + 3 * place + 1)
        value_place = tl.load(heads_ptr + 3 * place + 2)
        key_codes_ptr += batch.to(tl.int64) * key_codes_stride_b + key_place.to(tl.int64) * key_codes_stride_h
        key_scales_ptr += (
            batch.to(tl.int64) * key_scales_stride_b + key_place.to(tl.int64) * key_scales_stride_h
        )
        value_codes_ptr += (
            batch.to(tl.int64) * value_codes_stride_b + value_place.to(tl.int64) * value_codes_stride_h
        )
        value_scales_ptr += (
            batch.to(tl.int64) * value_scales_stride_b + value_place.to(tl.int64) * value_scales_stride_h
        )
        decode_ptr = key_decode_ptr + key_place * decode_stride_h
        code_channel = tl.load(key_channels_ptr + tl.arange(0, PADDED))
        code_ok = code_channel >= 0
        rotated = _zeros(ROWS, PADDED, TOKENS_FIRST)
        for start in range(0, HEAD_DIM, CHANNELS):
            channel = start + tl.arange(0, CHANNELS)
            inside = channel < HEAD_DIM
            part = tl.load(
                _by_row(query_rows_ptr, TOKENS_FIRST) + _by_other(channel, TOKENS_FIRST),
                mask=_by_row(row_ok, TOKENS_FIRST) & _by_other(inside, TOKENS_FIRST),
                other=0.0,
            ).to(tl.float32)
            matrix = tl.load(
                decode_ptr + code_channel[:, None] * HEAD_DIM + channel[None, :],
                mask=code_ok[:, None] & inside[None, :],
                other=0.0,
            )
            rotated = _product(matrix, part, rotated, TOKENS_FIRST, ROTATE_PRECISION)
        # Rows are brought to a maximum of 1, so that half precision neither overflows nor underflows.
        largest = tl.maximum(tl.max(tl.abs(rotated), axis=0 if TOKENS_FIRST else 1), 1e-30)
        rotated = (rotated / _by_row(largest, TOKENS_FIRST)).to(KEY_TYPE)
        unit = scaling if SOFTCAP else scaling * LOG2E
        factor = largest * unit
        if GAIN:
            factor *= tl.load(key_gain_ptr + batch * key_gain_stride_b + key_place)

        first = split * split_tokens
        last = tl.minimum(packed, first + split_tokens)
        totals = _zeros(ROWS, TOKENS if TOKENS_FIRST else 1, TOKENS_FIRST)
        span = last - first
        if MEAN_GROUP > 0:
            span = GROUPS_AT_ONCE * MEAN_GROUP
            means_ptr += batch.to(tl.int64) * means_stride_b + head.to(tl.int64) * means_stride_g
        for begin in range(first, last, span):
            end = tl.minimum(last, begin + span)
            if MEAN_GROUP > 0:
                group = begin // MEAN_GROUP + tl.arange(0, GROUPS_AT_ONCE)
                group_ok = group * MEAN_GROUP < packed
                offsets = _zeros(ROWS, GROUPS_AT_ONCE, TOKENS_FIRST)
                for start in range(0, HEAD_DIM, CHANNELS):
                    channel = start + tl.arange(0, CHANNELS)
                    inside = channel < HEAD_DIM
                    part = tl.load(
                        _by_row(query_rows_ptr, TOKENS_FIRST) + _by_other(channel, TOKENS_FIRST),
                        mask=_by_row(row_ok, TOKENS_FIRST) & _by_other(inside, TOKENS_FIRST),
                        other=0.0,
                    )
                    means = tl.load(
                        means_ptr + group[:, None] * HEAD_DIM + channel[None, :],
                        mask=group_ok[:, None] & inside[None, :],
                        other=0.0,
                    )
                    if TYPE == tl.bfloat16:  # products of bfloat16 are exact in float32
                        offsets = _product(means, part, offsets, TOKENS_FIRST, PRECISION)
                    else:
                        offsets = _product(
                            means.to(tl.float32), part.to(tl.float32), offsets, TOKENS_FIRST, "ieee"
                        )
                offsets *= unit
            for tile in range(begin, end, TOKENS):
                token = tile + tl.arange(0, TOKENS)
                token_ok = token < end
                keys = load_centroids(
                    key_codes_ptr + token.to(tl.int64) * KEY_BYTES, token_ok, key_table_ptr,
                    key_word0, key_word1, key_word2, key_word3,
                    HEAD_DIM, KEY_BITS, KEY_TYPE, KEY_ASSEMBLY,
                )  # fmt: skip
                key_scales = load_scales(key_scales_ptr + token, token_ok, levels_ptr, KEY_LEVELS)
                scores = _product(keys, rotated, _zeros(ROWS, TOKENS, TOKENS_FIRST), TOKENS_FIRST, PRECISION)
                scores = scores * _by_other(key_scales, TOKENS_FIRST) * _by_row(factor, TOKENS_FIRST)
                if MEAN_GROUP > 0:
                    chosen = tl.arange(0, GROUPS_AT_ONCE) == (tile // MEAN_GROUP - begin // MEAN_GROUP)
                    own = tl.where(_by_other(chosen, TOKENS_FIRST), offsets, 0.0)
                    scores += _by_row(tl.sum(own, axis=0 if TOKENS_FIRST else 1), TOKENS_FIRST)
                if SOFTCAP:
                    scores = _in_base_two(scores, softcap, SOFTCAP)
                visible = token_ok
                for i in tl.static_range(EXACT):  # exact tokens are read from where they are exact
                    visible &= token != tl.load(exact_positions_ptr + exact_row + i)
                if MASK:
                    visible &= tl.load(mask_row_ptr + token, mask=token_ok, other=0) != 0
                allowed = _by_other(visible, TOKENS_FIRST)
                if WINDOW:
                    oldest = _by_row(query_position - window, TOKENS_FIRST)
                    allowed = allowed & (_by_other(token, TOKENS_FIRST) > oldest)
                scores = tl.where(allowed, scores, float("-inf"))
                weights, top, keep = _softmax_step(scores, top, TOKENS_FIRST)
                keep = _by_row(keep, TOKENS_FIRST)
                if TOKENS_FIRST:  # added up over the tokens once, at the end
                    totals = totals * keep + weights
                else:
                    totals = totals * keep + tl.sum(weights, axis=1)[:, None]
                value_scales = load_scales(value_scales_ptr + token, token_ok, levels_ptr, VALUE_LEVELS)
                values = load_centroids(
                    value_codes_ptr + token.to(tl.int64) * VALUE_BYTES, token_ok, value_table_ptr,
                    value_word0, value_word1, value_word2, value_word3,
                    HEAD_DIM, VALUE_BITS, VALUE_TYPE, VALUE_ASSEMBLY,
                )  # fmt: skip
                weights = (weights * _by_other(value_scales, TOKENS_FIRST)).to(VALUE_TYPE)
                sums = _product(tl.trans(values), weights, sums * keep, TOKENS_FIRST, PRECISION)
        total = tl.sum(totals, axis=0 if TOKENS_FIRST else 1)
    else:
        channel = tl.arange(0, PADDED)
        query = tl.load(
            _by_row(query_rows_ptr, TOKENS_FIRST) + _by_other(channel, TOKENS_FIRST),
            mask=_by_row(row_ok, TOKENS_FIRST) & _by_other(channel < HEAD_DIM, TOKENS_FIRST),
            other=0.0,
        ).to(TYPE)
        base = batch.to(tl.int64) * recent_stride_b + head.to(tl.int64) * recent_stride_g
        stop = recent
        if query_tokens > 1:  # no row of this block sees what comes after its last token
            newest = tl.max(tl.where(row_ok, query_token, 0), axis=0)
            stop = recent - query_tokens + newest + 1
        for tile in range(0, stop, DENSE_TOKENS):
            token = tile + tl.arange(0, DENSE_TOKENS)
            token_ok = token < recent
            position = packed + token
            visible = token_ok
            if MASK:
                visible &= tl.load(mask_row_ptr + position, mask=token_ok, other=0) != 0
            allowed = _by_other(visible, TOKENS_FIRST)
            allowed = allowed & (_by_other(position, TOKENS_FIRST) <= _by_row(query_position, TOKENS_FIRST))
            if WINDOW:
                oldest = _by_row(query_position - window, TOKENS_FIRST)
                allowed = allowed & (_by_other(position, TOKENS_FIRST) > oldest)
            offset = base + token.to(tl.int64) * recent_stride_t
            top, total, sums = _dense_step(
                query, recent_keys_ptr + offset, recent_values_ptr + offset, token_ok, allowed,
                scaling, softcap, top, total, sums, HEAD_DIM, PADDED, TYPE, PRECISION, SOFTCAP, TOKENS_FIRST,
            )  # fmt: skip
        if EXACT > 0:
            number = tl.arange(0, 16 if EXACT <= 16 else triton.next_power_of_2(EXACT))
            exists = number < EXACT
            position = tl.load(exact_positions_ptr + exact_row + number, mask=exists, other=-1)
            exists &= position >= 0
            visible = exists
            if MASK:
                visible &= tl.load(mask_row_ptr + position, mask=exists, other=0) != 0
            allowed = _by_other(visible, TOKENS_FIRST) & _by_row(row_ok, TOKENS_FIRST)
            if WINDOW:
                oldest = _by_row(query_position - window, TOKENS_FIRST)
                allowed = allowed & (_by_other(position, TOKENS_FIRST) > oldest)
            offset = (exact_row + number) * HEAD_DIM
            top, total, sums = _dense_step(
                query, exact_keys_ptr + offset, exact_values_ptr + offset, exists, allowed,
                scaling, softcap, top, total, sums, HEAD_DIM, PADDED, TYPE, PRECISION, SOFTCAP, TOKENS_FIRST,
            )  # fmt: skip

    pairs = tl.num_programs(2)
    out_row = (split.to(tl.int64) * pairs + pair) * (share * query_tokens) + row
    target = _by_row(out_row * PADDED, TOKENS_FIRST) + _by_other(tl.arange(0, PADDED), TOKENS_FIRST)
    tl.store(sums_ptr + target, sums, mask=_by_row(row_ok, TOKENS_FIRST))
    tl.store(tops_ptr + out_row, top, mask=row_ok)
    tl.store(totals_ptr + out_row, total, mask=row_ok)


@triton.jit
def combine_splits_kernel(
    out_ptr, heads_ptr, sums_ptr, tops_ptr, totals_ptr, decode_ptr, gain_ptr, channels_ptr,
    query_tokens, share, head_count, packed_splits, gain_stride_b, decode_stride_h,
    out_stride_b, out_stride_q, out_stride_h,
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, GAIN: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
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

    top = tl.load(
        tops_ptr + (tl.cast(packed_splits, tl.int64) * pairs + pair) * rows + row, mask=row_ok, other=0.0
    )
    for split in range(0, packed_splits):
        own = tl.load(
            tops_ptr + (tl.cast(split, tl.int64) * pairs + pair) * rows + row, mask=row_ok, other=0.0
        )
        top = tl.maximum(top, own)
    top = tl.where(top == float("-inf"), 0.0, top)

    inner = tl.arange(0, PADDED)
    total = tl.zeros((ROWS,), tl.float32)
    rotated = tl.zeros((ROWS, PADDED), tl.float32)
    for split in tl.range(0, packed_splits, loop_unroll_factor=4):
        out_row = (tl.cast(split, tl.int64) * pairs + pair) * rows + row
        share_of = tl.exp2(tl.load(tops_ptr + out_row, mask=row_ok, other=0.0) - top)
        total += share_of * tl.load(totals_ptr + out_row, mask=row_ok, other=0.0)
        own = tl.load(sums_ptr + out_row[:, None] * PADDED + inner[None, :], mask=row_ok[:, None], other=0.0)
        rotated += share_of[:, None] * own

    out_row = (tl.cast(packed_splits, tl.int64) * pairs + pair) * rows + row
    share_of = tl.exp2(tl.load(tops_ptr + out_row, mask=row_ok, other=0.0) - top)
    total += share_of * tl.load(totals_ptr + out_row, mask=row_ok, other=0.0)
    result = share_of[:, None] * tl.load(
        sums_ptr + out_row[:, None] * PADDED + column[None, :],
        mask=row_ok[:, None] & column_ok[None, :],
        other=0.0,
    )
    if packed_splits > 0:
        value_place = tl.load(heads_ptr + 3 * place + 2)
        channel = tl.load(channels_ptr + inner)
        matrix = tl.load(
            decode_ptr + value_place * decode_stride_h + channel[:, None] * HEAD_DIM + column[None, :],
            mask=(channel >= 0)[:, None] & column_ok[None, :],
            other=0.0,
        )
        if GAIN:
            matrix *= tl.load(gain_ptr + batch * gain_stride_b + value_place)
        result = tl.dot(rotated, matrix, result, input_precision=PRECISION)
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
