"""The kernel of attention on packed keys and values; `attention.py` says what surrounds it.

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
def _words(words_ptr):
    """The four words of `lookup.byte_tables`."""
    return tl.load(words_ptr), tl.load(words_ptr + 1), tl.load(words_ptr + 2), tl.load(words_ptr + 3)


@triton.jit
def _split_row(split, pair, row, rows):
    """Places of this split's rows among those of all, int64 [R]."""
    return (split.to(tl.int64) * tl.num_programs(2) + pair) * rows + row


@triton.jit
def _store_sums(row_ptr, row_ok, sums, WIDTH: tl.constexpr, TOKENS_FIRST: tl.constexpr):
    """Writes sums of R rows [WIDTH] behind their pointers [R]."""
    target = _by_row(row_ptr, TOKENS_FIRST) + _by_other(tl.arange(0, WIDTH), TOKENS_FIRST)
    tl.store(target, sums, mask=_by_row(row_ok, TOKENS_FIRST))


@triton.jit
def _rotated_query(
    query_rows_ptr, row_ok, decode_ptr, channels_ptr,
    HEAD_DIM: tl.constexpr, JOINED: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    TOKENS_FIRST: tl.constexpr, PRECISION: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Queries in the basis of a part's codes, with a maximum of 1 in each row, and the factors [R] back.

    So half precision neither overflows nor underflows.
    """
    code_channel = tl.load(channels_ptr + tl.arange(0, JOINED))
    code_ok = code_channel >= 0
    rotated = _zeros(ROWS, JOINED, TOKENS_FIRST)
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
        rotated = _product(matrix, part, rotated, TOKENS_FIRST, PRECISION)
    largest = tl.maximum(tl.max(tl.abs(rotated), axis=0 if TOKENS_FIRST else 1), 1e-30)
    return (rotated / _by_row(largest, TOKENS_FIRST)).to(TYPE), largest


@triton.jit
def _mean_scores(
    query_rows_ptr, row_ok, means_ptr, first_group, group_count,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    TOKENS_FIRST: tl.constexpr, PRECISION: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Products of queries with the means of GROUPS_AT_ONCE groups."""
    group = first_group + tl.arange(0, GROUPS_AT_ONCE)
    group_ok = group < group_count
    scores = _zeros(ROWS, GROUPS_AT_ONCE, TOKENS_FIRST)
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
            scores = _product(means, part, scores, TOKENS_FIRST, PRECISION)
        else:
            scores = _product(means.to(tl.float32), part.to(tl.float32), scores, TOKENS_FIRST, "ieee")
    return scores


# What changes from step to step is not specialised on, or generation would stop for a compiler now and then.
@triton.jit(
    do_not_specialize=(
        "packed", "recent", "split_tokens", "packed_splits", "head_count", "window", "mask_stride_b",
        "key_scales_stride_b", "key_scales_stride_h", "value_scales_stride_b", "value_scales_stride_h",
    ),
    do_not_specialize_on_alignment=("query_tokens",),
)  # fmt: skip
def attend_splits_kernel(
    query_ptr, heads_ptr,
    key_codes_ptr, key_scales_ptr, key_decode_ptr, key_gain_ptr,
    key_table_ptr, key_words_ptr, key_channels_ptr,
    value_codes_ptr, value_scales_ptr, value_table_ptr, value_words_ptr,
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
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, SUM_WIDTH: tl.constexpr,
    # Of each part of the keys: channels, bits, J, assembly; a second part without channels does not exist.
    KEY_WIDTH: tl.constexpr, KEY_BITS: tl.constexpr, KEY_JOINED: tl.constexpr, KEY_ASSEMBLY: tl.constexpr,
    KEY_WIDTH2: tl.constexpr, KEY_BITS2: tl.constexpr, KEY_JOINED2: tl.constexpr, KEY_ASSEMBLY2: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, VALUE_BITS: tl.constexpr, VALUE_JOINED: tl.constexpr,
    VALUE_ASSEMBLY: tl.constexpr,
    VALUE_WIDTH2: tl.constexpr, VALUE_BITS2: tl.constexpr, VALUE_JOINED2: tl.constexpr,
    VALUE_ASSEMBLY2: tl.constexpr,
    KEY_BYTES: tl.constexpr, VALUE_BYTES: tl.constexpr,
    KEY_LEVELS: tl.constexpr, VALUE_LEVELS: tl.constexpr, GAIN: tl.constexpr,
    MEAN_GROUP: tl.constexpr, EXACT: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
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

    if split < packed_splits:
        PARTS: tl.constexpr = 1 if KEY_WIDTH2 == 0 else 2
        VALUE_PARTS: tl.constexpr = 1 if VALUE_WIDTH2 == 0 else 2
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
        key_word0, key_word1, key_word2, key_word3 = _words(key_words_ptr)
        value_word0, value_word1, value_word2, value_word3 = _words(value_words_ptr)
        unit = scaling if SOFTCAP else scaling * LOG2E
        gain = unit
        if GAIN:
            gain *= tl.load(key_gain_ptr + batch * key_gain_stride_b + key_place)
        rotated, factor = _rotated_query(
            query_rows_ptr, row_ok, decode_ptr, key_channels_ptr,
            HEAD_DIM, KEY_JOINED, ROWS, CHANNELS, TOKENS_FIRST, ROTATE_PRECISION, KEY_TYPE,
        )  # fmt: skip
        factor *= gain
        if KEY_WIDTH2 > 0:
            late_key0, late_key1, late_key2, late_key3 = _words(key_words_ptr + 4)
            rotated2, factor2 = _rotated_query(
                query_rows_ptr, row_ok, decode_ptr, key_channels_ptr + KEY_JOINED,
                HEAD_DIM, KEY_JOINED2, ROWS, CHANNELS, TOKENS_FIRST, ROTATE_PRECISION, KEY_TYPE,
            )  # fmt: skip
            factor2 *= gain
        sums = _zeros(ROWS, VALUE_JOINED, TOKENS_FIRST)
        if VALUE_WIDTH2 > 0:
            late_value0, late_value1, late_value2, late_value3 = _words(value_words_ptr + 4)
            sums2 = _zeros(ROWS, VALUE_JOINED2, TOKENS_FIRST)
        if MEAN_GROUP > 0:
            means_ptr += batch.to(tl.int64) * means_stride_b + head.to(tl.int64) * means_stride_g

        first = split * tl.multiple_of(split_tokens, 16)
        last = tl.minimum(packed, first + split_tokens)
        span = last - first
        if MEAN_GROUP > 0:
            span = GROUPS_AT_ONCE * MEAN_GROUP
        totals = _zeros(ROWS, TOKENS if TOKENS_FIRST else 1, TOKENS_FIRST)
        for begin in range(first, last, span):
            end = tl.minimum(last, begin + span)
            if MEAN_GROUP > 0:
                offsets = unit * _mean_scores(
                    query_rows_ptr, row_ok, means_ptr, begin // MEAN_GROUP, tl.cdiv(packed, MEAN_GROUP),
                    HEAD_DIM, ROWS, CHANNELS, TOKENS_FIRST, PRECISION, TYPE,
                )  # fmt: skip
            for tile in range(begin, end, TOKENS):
                token = tile + tl.arange(0, TOKENS)
                token_ok = token < end
                row_ptr = key_codes_ptr + token.to(tl.int64) * KEY_BYTES
                keys = load_centroids(
                    row_ptr, token_ok, key_table_ptr, key_word0, key_word1, key_word2, key_word3,
                    KEY_WIDTH, KEY_BITS, KEY_TYPE, KEY_ASSEMBLY,
                )  # fmt: skip
                scales = load_scales(key_scales_ptr + token * PARTS, token_ok, levels_ptr, KEY_LEVELS)
                scores = _product(keys, rotated, _zeros(ROWS, TOKENS, TOKENS_FIRST), TOKENS_FIRST, PRECISION)
                scores = scores * _by_other(scales, TOKENS_FIRST) * _by_row(factor, TOKENS_FIRST)
                if KEY_WIDTH2 > 0:
                    keys2 = load_centroids(
                        row_ptr + KEY_WIDTH * KEY_BITS // 8, token_ok, key_table_ptr + (1 << KEY_BITS),
                        late_key0, late_key1, late_key2, late_key3,
                        KEY_WIDTH2, KEY_BITS2, KEY_TYPE, KEY_ASSEMBLY2,
                    )  # fmt: skip
                    scales = load_scales(key_scales_ptr + token * 2 + 1, token_ok, levels_ptr, KEY_LEVELS)
                    own = _product(
                        keys2, rotated2, _zeros(ROWS, TOKENS, TOKENS_FIRST), TOKENS_FIRST, PRECISION
                    )
                    scores += own * _by_other(scales, TOKENS_FIRST) * _by_row(factor2, TOKENS_FIRST)
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
                row_ptr = value_codes_ptr + token.to(tl.int64) * VALUE_BYTES
                values = load_centroids(
                    row_ptr, token_ok, value_table_ptr, value_word0, value_word1, value_word2, value_word3,
                    VALUE_WIDTH, VALUE_BITS, VALUE_TYPE, VALUE_ASSEMBLY,
                )  # fmt: skip
                scales = load_scales(
                    value_scales_ptr + token * VALUE_PARTS, token_ok, levels_ptr, VALUE_LEVELS
                )
                scaled = (weights * _by_other(scales, TOKENS_FIRST)).to(VALUE_TYPE)
                sums = _product(tl.trans(values), scaled, sums * keep, TOKENS_FIRST, PRECISION)
                if VALUE_WIDTH2 > 0:
                    values2 = load_centroids(
                        row_ptr + VALUE_WIDTH * VALUE_BITS // 8, token_ok,
                        value_table_ptr + (1 << VALUE_BITS),
                        late_value0, late_value1, late_value2, late_value3,
                        VALUE_WIDTH2, VALUE_BITS2, VALUE_TYPE, VALUE_ASSEMBLY2,
                    )  # fmt: skip
                    scales = load_scales(value_scales_ptr + token * 2 + 1, token_ok, levels_ptr, VALUE_LEVELS)
                    scaled = (weights * _by_other(scales, TOKENS_FIRST)).to(VALUE_TYPE)
                    sums2 = _product(tl.trans(values2), scaled, sums2 * keep, TOKENS_FIRST, PRECISION)
        total = tl.sum(totals, axis=0 if TOKENS_FIRST else 1)
        target_ptr = sums_ptr + _split_row(split, pair, row, share * query_tokens) * SUM_WIDTH
        _store_sums(target_ptr, row_ok, sums, VALUE_JOINED, TOKENS_FIRST)
        if VALUE_WIDTH2 > 0:
            _store_sums(target_ptr + VALUE_JOINED, row_ok, sums2, VALUE_JOINED2, TOKENS_FIRST)
    else:
        channel = tl.arange(0, PADDED)
        query = tl.load(
            _by_row(query_rows_ptr, TOKENS_FIRST) + _by_other(channel, TOKENS_FIRST),
            mask=_by_row(row_ok, TOKENS_FIRST) & _by_other(channel < HEAD_DIM, TOKENS_FIRST),
            other=0.0,
        ).to(TYPE)
        dense_sums = _zeros(ROWS, PADDED, TOKENS_FIRST)
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
            top, total, dense_sums = _dense_step(
                query, recent_keys_ptr + offset, recent_values_ptr + offset, token_ok, allowed,
                scaling, softcap, top, total, dense_sums,
                HEAD_DIM, PADDED, TYPE, PRECISION, SOFTCAP, TOKENS_FIRST,
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
            top, total, dense_sums = _dense_step(
                query, exact_keys_ptr + offset, exact_values_ptr + offset, exists, allowed,
                scaling, softcap, top, total, dense_sums,
                HEAD_DIM, PADDED, TYPE, PRECISION, SOFTCAP, TOKENS_FIRST,
            )  # fmt: skip
        target_ptr = sums_ptr + _split_row(split, pair, row, share * query_tokens) * SUM_WIDTH
        _store_sums(target_ptr, row_ok, dense_sums, PADDED, TOKENS_FIRST)

    out_row = _split_row(split, pair, row, share * query_tokens)
    tl.store(tops_ptr + out_row, top, mask=row_ok)
    tl.store(totals_ptr + out_row, total, mask=row_ok)
