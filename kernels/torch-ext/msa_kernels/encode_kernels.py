"""The kernel of `encode_states` (encode.py): states to codes and scales, a tile of tokens at a time.

Axis letters: T tokens, D head dim, R codes in a byte, J = R * next power of 2 of D / R, the columns of a
tile: run r of D / R channels lies at r * J / R, so that the codes of one byte are J / R columns apart and, on
tensor cores, in one thread.
"""

import triton
import triton.language as tl

_TIE = tl.constexpr(2.0**-20)  # of a typical coordinate: what float32 cannot tell from 0 counts as 0
_LARGEST_SCALE = tl.constexpr(2.0**120)


@triton.jit
def _matrix_tile(matrix_ptr, start, SIZE: tl.constexpr, DEPTH: tl.constexpr, TYPE: tl.constexpr):
    """[DEPTH, J]: rows from `start` on of a matrix [J, J], J = SIZE."""
    place = (start + tl.arange(0, DEPTH))[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    return tl.load(matrix_ptr + place).to(TYPE)


@triton.jit
def _rotated(
    row_ptr, row_ok, matrix_ptr, part_stride, high, rest, DIM: tl.constexpr, DEPTH: tl.constexpr,
    PARTS: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows [T, D] at `row_ptr` times a matrix: float32 [T, J]. Tiles of the matrix come as high and rest
    where DEPTH holds all of it."""
    SIZE: tl.constexpr = triton.next_power_of_2(DIM)
    channel = tl.arange(0, DEPTH)
    result = tl.zeros((row_ptr.shape[0], high.shape[1]), tl.float32)
    for start in tl.static_range(0, SIZE, DEPTH):
        ok = row_ok[:, None]
        if SIZE != DIM:
            ok = ok & (start + channel < DIM)[None, :]
        states = tl.load(row_ptr[:, None] + (start + channel)[None, :], mask=ok, other=0.0)
        if states.dtype == tl.bfloat16 and TYPE == tl.float16:  # a mean may be rounded up, beyond float16
            states = tl.clamp(states.to(tl.float32), -65504.0, 65504.0)
        states = states.to(TYPE)
        if DEPTH < SIZE:
            high = _matrix_tile(matrix_ptr, start, SIZE, DEPTH, TYPE)
            if PARTS == 2:
                rest = _matrix_tile(matrix_ptr + part_stride, start, SIZE, DEPTH, TYPE)
        result = tl.dot(states, high, result, input_precision=PRECISION)
        if PARTS == 2:
            result = tl.dot(states, rest, result, input_precision=PRECISION)
    return result


@triton.jit
def _beside(size, spread, middle, gap, rank):
    """The nearer of the centroids on both sides of their middle, behind its rank, signed like `spread`; that
    of the lower one is `rank`."""
    above = tl.where(size > middle, 1.0, 0.0)  # a number, because predicate registers are few
    centroid = above * gap + (middle - 0.5 * gap)
    rank += above
    return tl.where(spread > _TIE, rank, -rank), centroid


@triton.jit
def _nearest_of_two(size, spread, t0, g0):
    return _beside(size, spread, t0, g0, size * 0.0 + 0.5)


@triton.jit
def _nearest_of_four(size, spread, t0, t1, t2, g0, g1):
    upper = size > t1
    rank = tl.where(upper, 2.5, 0.5)
    return _beside(size, spread, tl.where(upper, t2, t0), tl.where(upper, g1, g0), rank)


@triton.jit
def _nearest_of_eight(size, spread, t0, t1, t2, t3, t4, t5, t6, g0, g1, g2, g3):
    top = size > t3
    upper = size > tl.where(top, t5, t1)
    middle = tl.where(top, tl.where(upper, t6, t4), tl.where(upper, t2, t0))
    gap = tl.where(top, tl.where(upper, g3, g2), tl.where(upper, g1, g0))
    rank = tl.where(upper, 2.5, 0.5)
    return _beside(size, spread, middle, gap, tl.where(top, rank + 4.0, rank))


@triton.jit
def _middle(table_ptr, INDEX: tl.constexpr):
    """Between centroids INDEX and INDEX + 1, and their distance."""
    low = tl.load(table_ptr + INDEX)
    high = tl.load(table_ptr + INDEX + 1)
    return (low + high) * 0.5, high - low


@triton.jit
def _nearest(spread, size, table_ptr, BITS: tl.constexpr, INTERPRETED: tl.constexpr):
    """The nearest to sizes >= 0 of the positive centroids, which ascend from `table_ptr`, behind its rank
    among them with the sign of `spread`: 0.5 or -0.5 for the first, 1.5 or -1.5 for the second. Float32."""
    # One number after the other: comparisons of a whole tile would not fit into predicate registers.
    if BITS == 1:
        return tl.where(spread > _TIE, 0.5, -0.5), tl.zeros(size.shape, tl.float32) + tl.load(table_ptr)
    t0, g0 = _middle(table_ptr, 0)
    if BITS == 2:
        if INTERPRETED:
            return _nearest_of_two(size, spread, t0, g0)
        return tl.map_elementwise(_nearest_of_two, size, spread, t0, g0)
    t1, _ = _middle(table_ptr, 1)
    t2, g1 = _middle(table_ptr, 2)
    if BITS == 3:
        if INTERPRETED:
            return _nearest_of_four(size, spread, t0, t1, t2, g0, g1)
        return tl.map_elementwise(_nearest_of_four, size, spread, t0, t1, t2, g0, g1)
    t3, _ = _middle(table_ptr, 3)
    t4, g2 = _middle(table_ptr, 4)
    t5, _ = _middle(table_ptr, 5)
    t6, g3 = _middle(table_ptr, 6)
    if INTERPRETED:
        return _nearest_of_eight(size, spread, t0, t1, t2, t3, t4, t5, t6, g0, g1, g2, g3)
    return tl.map_elementwise(
        _nearest_of_eight, size, spread, t0, t1, t2, t3, t4, t5, t6, g0, g1, g2, g3
    )  # fmt: skip


@triton.jit
def _coded(
    spread, size, table_ptr, DIM: tl.constexpr, BITS: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """Of vectors [T, J] of length sqrt(D), 0 in padding: signed ranks of the centroids nearest to `size`,
    <vector, centroids> and ||centroids||^2 [T]."""
    rank, centroid = _nearest(spread, size, table_ptr, BITS, INTERPRETED)
    product = tl.sum(tl.abs(spread) * centroid, axis=1)
    first = tl.load(table_ptr)  # what padding holds
    square = tl.sum(centroid * centroid, axis=1) - (spread.shape[1] - DIM) * first * first
    return rank, product, square


@triton.jit
def _store_plane(
    row_ptr, row_ok, codes, OFFSET: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    RUN: tl.constexpr,
):  # fmt: skip
    """Stores a plane of codes [T, J] of WIDTH bits, float32, from which OFFSET was taken. Of its
    J / 8 * WIDTH columns of bytes, every COLUMNS hold RUN channels and padding."""
    ROWS: tl.constexpr = codes.shape[0]
    CODES: tl.constexpr = 8 // WIDTH
    runs = tl.reshape(codes, (ROWS, CODES, codes.shape[1] // CODES))
    weight = (1 << (tl.arange(0, CODES) * WIDTH)).to(tl.float32)
    number = tl.sum(runs * weight[None, :, None], axis=1) + OFFSET * 255 / ((1 << WIDTH) - 1)
    number += 8388608.0  # 2^23, which has the byte in its lowest bits: cheaper than a conversion
    column = tl.arange(0, codes.shape[1] // CODES)
    place = column % COLUMNS
    offset = column if COLUMNS == RUN else column // COLUMNS * RUN + place
    byte = number.to(tl.int32, bitcast=True).to(tl.uint8)
    tl.store(row_ptr[:, None] + offset[None, :], byte, mask=row_ok[:, None] & (place < RUN)[None, :])


@triton.jit
def _store_codes(row_ptr, row_ok, rank, DIM: tl.constexpr, BITS: tl.constexpr, RUN: tl.constexpr):
    """Stores signed ranks [T, J] of `_nearest` as the planes of modeling/bit_packing.py."""
    COLUMNS: tl.constexpr = triton.next_power_of_2(RUN)
    if BITS == 3:  # the sign is the third bit
        _store_plane(row_ptr, row_ok, tl.where(rank > 0, rank - 0.5, rank + 3.5), 0, 2, COLUMNS, RUN)
        _store_plane(row_ptr + DIM // 4, row_ok, tl.where(rank > 0, 1.0, 0.0), 0, 1, COLUMNS, RUN)
    else:
        _store_plane(row_ptr, row_ok, rank, (1 << (BITS - 1)) - 0.5, BITS, COLUMNS, RUN)


@triton.jit
def _store_scales(row_ptr, row_ok, scale, nonzero, limits_ptr, LEVELS: tl.constexpr):
    """Scales [T] as the nearest level, 0 for zero vectors only, or rounded to bfloat16."""
    if LEVELS:
        level = tl.where(nonzero, 1, 0)  # limits_ptr[0] is 0
        for bit in tl.static_range(7, -1, -1):
            higher = level + (1 << bit) if bit else level + 1
            fits = nonzero & (higher <= 255)
            limit = tl.load(limits_ptr + higher - 1, mask=fits, other=float("inf"))
            level = tl.where(limit < scale, higher, level)
        tl.store(row_ptr, level.to(tl.uint8), mask=row_ok)
    else:
        number = tl.minimum(scale, _LARGEST_SCALE).to(tl.int32, bitcast=True)
        rounded = (number + 0x7FFF + ((number >> 16) & 1)) >> 16  # to nearest even, in the interpreter too
        tl.store(row_ptr, rounded.to(tl.int16), mask=row_ok)


@triton.jit
def _encode_tile(
    turned, floor, table_ptr, stretch_ptr, limits_ptr, factor, codes_ptr, scales_ptr, row_ok,
    DIM: tl.constexpr, BITS: tl.constexpr, RULE: tl.constexpr, LEVELS: tl.constexpr, SEARCH: tl.constexpr,
    RUN: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Codes and stores rotated vectors [T, J]; `factor` is left to be multiplied to their scales.
    What has no coordinate above `floor` is 0."""
    largest = tl.max(tl.abs(turned), axis=1)
    exponent = tl.minimum(tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 1), 253)
    unit = (exponent << 23).to(tl.float32, bitcast=True)  # the power of 2 below the largest coordinate
    turned = turned * ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
    square = tl.sum(turned * turned, axis=1)
    nonzero = largest > floor
    length = tl.sqrt(tl.where(nonzero, square, 1.0))
    ROOT: tl.constexpr = DIM**0.5
    spread = turned * (ROOT / length)[:, None]

    size = tl.abs(spread)
    if SEARCH > 1:
        best = tl.zeros(square.shape, tl.float32) - 1.0
        stretch = best
        for i in range(SEARCH):
            tried = tl.load(stretch_ptr + i)
            _, product, norm = _coded(spread, size * tried, table_ptr, DIM, BITS, INTERPRETED)
            cosine = product / tl.sqrt(norm)
            stretch = tl.where(cosine > best, tried, stretch)
            best = tl.maximum(cosine, best)
        size = size * stretch[:, None]
    rank, product, norm = _coded(spread, size, table_ptr, DIM, BITS, INTERPRETED)
    _store_codes(codes_ptr, row_ok, rank, DIM, BITS, RUN)

    product = tl.where(nonzero, product, 1.0)
    if RULE == 0:
        ratio = product / norm
    elif RULE == 1:
        ratio = DIM / product
    else:
        ratio = ROOT / tl.sqrt(norm)
    scale = ratio * (length / ROOT) * factor * unit
    _store_scales(scales_ptr, row_ok, tl.where(nonzero, scale, 0.0), nonzero, limits_ptr, LEVELS)


@triton.jit
def _encode_stream(
    stream, means_ptr, mean_strides, limits_ptr, batch, position, group, begin, end,
    DIM: tl.constexpr, OPTIONS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, TYPE: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Tokens from `begin` to `end` of one head, counted from the beginning of the buffers."""
    BITS: tl.constexpr = OPTIONS[0]
    LEVELS: tl.constexpr = OPTIONS[2]
    PARTS: tl.constexpr = OPTIONS[3]
    RUN: tl.constexpr = DIM // (8 if BITS == 3 else 8 // BITS)
    SIZE: tl.constexpr = triton.next_power_of_2(DIM)
    (
        states_ptr, state_batch, state_head, state_token, codes_ptr, code_batch, code_head, code_token,
        scales_ptr, scale_batch, scale_head, scale_token, matrix_ptr, part_stride, matrix_head, factor,
        table_ptr, gains_ptr, heads_ptr, heads, stretch_ptr,
    ) = stream  # fmt: skip
    b = tl.program_id(1) // heads
    stored = tl.program_id(1) % heads
    if b < batch:
        head = stored
        if heads_ptr is not None:
            head = tl.load(heads_ptr + stored)
        if gains_ptr is not None:
            factor = factor / tl.load(gains_ptr + b * heads + stored)
        states_ptr += b.to(tl.int64) * state_batch + head.to(tl.int64) * state_head
        codes_ptr += b.to(tl.int64) * code_batch + stored.to(tl.int64) * code_head
        scales_ptr += b.to(tl.int64) * scale_batch + stored.to(tl.int64) * scale_head
        matrix_ptr += stored * matrix_head
        high = _matrix_tile(matrix_ptr, 0, SIZE, DEPTH, TYPE)
        rest = high
        if PARTS == 2:
            rest = _matrix_tile(matrix_ptr + part_stride, 0, SIZE, DEPTH, TYPE)
        row = tl.arange(0, ROWS)
        mean = tl.zeros((high.shape[1],), tl.float32)
        floor = 0.0
        if means_ptr is not None:
            # As many equal rows as a tile has: the instructions that turn the states, so the same rounding.
            means_ptr += b.to(tl.int64) * mean_strides[0] + head.to(tl.int64) * mean_strides[1]
            mean_ptr = means_ptr + (group * mean_strides[2] + row * 0)
            turned = _rotated(
                mean_ptr, row >= 0, matrix_ptr, part_stride, high, rest,
                DIM, DEPTH, PARTS, TYPE, PRECISION,
            )  # fmt: skip
            mean = tl.max(turned, axis=0)
            floor = tl.max(tl.abs(mean), axis=0) * _TIE
        for start in range(begin, end, ROWS):
            ok = start + row < end
            token = (start + row).to(tl.int64)
            turned = _rotated(
                states_ptr + (token - position) * state_token, ok, matrix_ptr, part_stride, high, rest,
                DIM, DEPTH, PARTS, TYPE, PRECISION,
            )  # fmt: skip
            if means_ptr is not None:
                turned = turned - mean[None, :]
            _encode_tile(
                turned, floor, table_ptr + (1 << (BITS - 1)), stretch_ptr, limits_ptr, factor,
                codes_ptr + token * code_token, scales_ptr + token * scale_token, ok,
                DIM, BITS, OPTIONS[1], LEVELS, OPTIONS[4], RUN, INTERPRETED,
            )  # fmt: skip


@triton.jit
def encode_kernel(
    first, second,  # what `encode_states` puts together for each kind
    means_ptr, mean_batch, mean_head, mean_row, limits_ptr, batch, position, tokens, group, span,
    DIM: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    FLOAT32: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A program codes up to `span` tokens with one mean, of one head of one kind."""
    pieces = tl.cdiv(group, span)
    number = tl.program_id(0) // pieces
    if means_ptr is not None:
        number += position // group
        origin = number * group
    else:
        origin = position
    begin = origin + tl.program_id(0) % pieces * span
    end = tl.minimum(tl.minimum(begin + span, origin + group), position + tokens)
    begin = tl.maximum(begin, position)
    TYPE: tl.constexpr = tl.float32 if FLOAT32 else first[0].dtype.element_ty
    if begin < end:
        if SECOND is None or tl.program_id(2) == 0:
            _encode_stream(
                first, means_ptr, (mean_batch, mean_head, mean_row), limits_ptr, batch, position, number,
                begin, end, DIM, FIRST, ROWS, DEPTH, TYPE, PRECISION, INTERPRETED,
            )  # fmt: skip
        else:
            _encode_stream(
                second, None, (0, 0, 0), limits_ptr, batch, position, number,
                begin, end, DIM, SECOND, ROWS, DEPTH, TYPE, PRECISION, INTERPRETED,
            )  # fmt: skip
