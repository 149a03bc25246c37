"""TurboQuant codes and scales of keys and values, in one launch, written where the cache keeps them.

The twin is `VectorQuantizer.encode` for one part (modeling/turboquant.py), behind the division by a gain and
the subtraction of a mean. Axis letters: B batch, G key/value heads, h of them that are coded alike, T tokens,
D head dim, M groups of tokens with one mean each, N bytes of a vector's codes, R codes in a byte,
J = R * next power of 2 of D / R, the columns of a tile: run r of D / R channels lies at r * J / R, so that
the codes of one byte are J / R columns apart and, on tensor cores, in one thread.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import launch_parameters, processors
from .registration import interpreted, operator

SCALE_RULES = ("least_squares", "unbiased", "matched_norm")
MOST_ENCODED_BITS = 4
MOST_ENCODED_DIM = 256
_TIE = tl.constexpr(2.0**-20)  # of a typical coordinate: what float32 cannot tell from 0 counts as 0
_LARGEST_SCALE = tl.constexpr(2.0**120)


class Coding(NamedTuple):
    """One kind of states, how they are coded, and where their codes go.

    Args:
        states: [B, G, T, D] float32, bfloat16 or float16, D a multiple of 8 up to 256, last axis contiguous.
        matrix, factor: of `matrix_parts` for these bits and the dtype of `states`.
        centroids: float32 [2**bits], ascending and symmetric, bits 1-4.
        codes: uint8 [B, h, room, N]; scales: [B, h, room, 1], uint8 (levels) or bfloat16. Both are written
            from the launch's position on, and need room for T tokens there.
        rule: of SCALE_RULES. search: how many stretches are tried, see `VectorQuantizer.code_search`.
        gains: float32 with B * h numbers; vectors are divided by them, powers of 2. None for 1.
        heads: int32 [h], which heads of `states` are stored; None for all G.
    """

    states: torch.Tensor
    matrix: torch.Tensor
    factor: float
    centroids: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    rule: str = "least_squares"
    search: int = 1
    gains: torch.Tensor | None = None
    heads: torch.Tensor | None = None


def matrix_parts(encode: torch.Tensor, bits: int, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """A matrix as `Coding` wants it: parts [P, 1 or h, J, J], whose sum over P times the factor is `encode`,
    its columns arranged as tiles have them for `bits`, with zeros as padding.

    Sixteen-bit states multiply a matrix of their own type, which tensor cores do exactly, so that only the
    split rounds: to 2^-17 of the largest entry in bfloat16. A scaled Hadamard matrix is exact in one part.
    Entries are small enough that no product of finite states overflows float32.

    Args:
        encode: [D, D] or [h, D, D] float64, states @ encode. dtype: of the states.
    """
    dim, codes = encode.shape[-1], 8 if bits == 3 else 8 // bits
    largest = encode.abs().amax().item()
    spare = 1 if dtype == torch.float16 else triton.next_power_of_2(dim)
    rest, parts = encode.reshape(-1, dim, dim) / (largest * spare), []
    for _ in range(1 if dtype == torch.float32 else 2):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].double()
    if len(parts) == 2 and not parts[1].any():
        del parts[1]
    run = dim // codes
    shape = (len(parts), rest.shape[0], triton.next_power_of_2(dim), codes, triton.next_power_of_2(run))
    arranged = torch.zeros(shape, dtype=dtype, device=encode.device)
    arranged[:, :, :dim, :, :run] = torch.stack(parts).unflatten(-1, (codes, run))
    return arranged.flatten(-2), largest * spare


def serves_encoding(width: int, bits: int, states: torch.Tensor) -> bool:
    """Whether `encode` takes states [..., D], on their device, for codes of `width` channels in `bits`."""
    return (
        (states.is_cuda or interpreted())
        and states.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and states.stride(-1) == 1
        and width == states.shape[-1]
        and width % 8 == 0
        and 16 <= width <= MOST_ENCODED_DIM
        and 1 <= bits <= MOST_ENCODED_BITS
    )


def encode(
    codings: Sequence[Coding],
    position: int,
    means: torch.Tensor | None = None,
    mean_group: int = 0,
    level_limits: torch.Tensor | None = None,
) -> None:
    """Codes of one or two kinds of states, written from token `position` of their buffers on, in one launch.

    The bytes of a vector depend on it and its mean alone, not on what is coded with it.

    Args:
        codings: keys and values, or one of them; same B and T.
        means: bfloat16 [B, G, M, D] of the first coding's heads, taken from its states; None for 0. The state
            at token t of the buffers, counted from their beginning, has mean t // mean_group.
        level_limits: float32 [255], ascending, between the levels of scales in 8 bits.
    """
    encode_states(
        [coding.states for coding in codings],
        [coding.matrix for coding in codings],
        [coding.factor for coding in codings],
        [coding.centroids for coding in codings],
        [coding.codes for coding in codings],
        [coding.scales for coding in codings],
        [SCALE_RULES.index(coding.rule) for coding in codings],
        [coding.search for coding in codings],
        [coding.gains for coding in codings],
        [coding.heads for coding in codings],
        position,
        means,
        mean_group,
        level_limits,
    )


@operator(mutates=("codes", "scales"))
def encode_states(
    states: Sequence[torch.Tensor],
    matrices: Sequence[torch.Tensor],
    factors: Sequence[float],
    centroids: Sequence[torch.Tensor],
    codes: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    rules: Sequence[int],
    searches: Sequence[int],
    gains: Sequence[torch.Tensor | None],
    heads: Sequence[torch.Tensor | None],
    position: int,
    means: torch.Tensor | None,
    mean_group: int,
    level_limits: torch.Tensor | None,
) -> None:
    """`encode`, with one list for each field of its codings; rules are indices in SCALE_RULES."""
    batch, _, tokens, dim = states[0].shape
    _check_encoding(states, matrices, codes, scales, position)
    if means is not None and (mean_group < 1 or means.shape[2] * mean_group < position + tokens):
        raise ValueError(
            f"means of {mean_group} tokens must reach token {position + tokens}; got {means.shape[2]}"
        )
    if level_limits is None and any(stored.dtype == torch.uint8 for stored in scales):
        raise ValueError("scales in 8 bits need level_limits; got None")
    if not tokens:
        return
    streams, options = [], []
    for i, kind in enumerate(states):
        bits = codes[i].shape[-1] * 8 // dim
        levels = scales[i].dtype == torch.uint8
        stored = scales[i] if levels else scales[i].view(torch.int16)
        matrix = matrices[i]
        search = 1 if bits == 1 else searches[i]  # of one bit, every stretch has the same codes
        streams.append((
            kind, *kind.stride()[:3], codes[i], *codes[i].stride()[:3], stored, *stored.stride()[:3],
            matrix, matrix.stride(0), 0 if matrix.shape[1] == 1 else matrix.stride(1), factors[i],
            centroids[i], gains[i], heads[i], codes[i].shape[1], stretch_table(search, kind.device),
        ))  # fmt: skip
        options.append((bits, rules[i], levels, matrix.shape[0], search))
    size = triton.next_power_of_2(dim)
    # What keeps more in registers gets more threads for a number.
    crowded = states[0].dtype == torch.float32 or max(search for *_, search in options) > 1
    wide = size > (64 if crowded else 128)
    block = launch_parameters("encode_wide" if wide else "encode", states[0].device)
    rows, most = block.pop("ROWS"), block.pop("TILES")
    rows = rows // 2 if crowded and size > 128 else rows
    programs = batch * max(stored.shape[1] for stored in codes) * len(states)
    group = mean_group if means is not None else tokens
    tiles = triton.cdiv(min(group, tokens), rows)
    busy = triton.cdiv(tokens, rows) * programs // (2 * processors(states[0].device))
    span = rows * max(1, min(tiles, most, busy))
    first = position // group if means is not None else 0
    count = (position + tokens - 1) // group + 1 - first if means is not None else 1
    grid = (count * triton.cdiv(group, span), programs // len(states), len(states))
    _encode_kernel[grid](
        streams[0], streams[-1], means, *(means.stride()[:3] if means is not None else (0, 0, 0)),
        level_limits, batch, position, tokens, group, span,
        DIM=dim, FIRST=options[0], SECOND=options[1] if len(options) > 1 else None, ROWS=rows,
        DEPTH=_depth(matrices), FLOAT32=interpreted() or states[0].dtype == torch.float32,
        PRECISION="ieee" if interpreted() or states[0].dtype != torch.float32 else "tf32x3",
        INTERPRETED=interpreted(), **block,
    )  # fmt: skip


def _check_encoding(states, matrices, codes, scales, position: int) -> None:
    batch, _, tokens, dim = states[0].shape
    for i, kind in enumerate(states):
        if (kind.shape[0], *kind.shape[2:]) != (batch, tokens, dim) or kind.stride(-1) != 1:
            raise ValueError(
                "states must agree in batch, tokens and head dim and be contiguous in it; got "
                f"{[tuple(other.shape) for other in states]} with strides {kind.stride()}"
            )
        if dim % 8 or not 16 <= dim <= MOST_ENCODED_DIM:
            raise ValueError(f"head dim must be a multiple of 8 from 16 to {MOST_ENCODED_DIM}; got {dim}")
        size = triton.next_power_of_2(dim)
        right = matrices[i].dtype == kind.dtype and matrices[i].shape[2:] == (size, size)
        if not right or not matrices[i].is_contiguous():
            raise ValueError(f"matrices must be those of matrix_parts for {kind.dtype}")
        if codes[i].shape[-1] not in [dim * bits // 8 for bits in range(1, MOST_ENCODED_BITS + 1)]:
            raise ValueError(f"codes must have 1 to {MOST_ENCODED_BITS} bits; got {codes[i].shape[-1]} bytes")
        for name, stored in (("codes", codes[i]), ("scales", scales[i])):
            if stored.shape[2] < position + tokens or stored.stride(-1) != 1:
                raise ValueError(
                    f"{name} must have room for {position + tokens} tokens, last axis contiguous; got "
                    f"{tuple(stored.shape)} with strides {stored.stride()}"
                )


@cache
def stretch_table(count: int, device: torch.device) -> torch.Tensor:
    """`count` factors between 0.76 and 1.24, float32, the one nearest to 1 first, as the twin tries them."""
    factors = torch.linspace(0.76, 1.24, count).tolist() if count > 1 else [1.0]
    return torch.tensor(sorted(factors, key=lambda factor: abs(factor - 1)), device=device)


def _depth(matrices: Sequence[torch.Tensor]) -> int:
    """Rows of a matrix that a program holds at once: all, where they leave room in shared memory and, in
    float32, in registers."""
    bytes_ = max(matrix[:, 0].nbytes for matrix in matrices)
    fits = bytes_ <= (16384 if matrices[0].dtype == torch.float32 else 65536)
    return matrices[0].shape[-1] if fits else 32


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
def _encode_kernel(
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
