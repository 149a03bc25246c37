"""TurboQuant codes and scales of keys and values, in one launch, written where the cache keeps them.

The twin is `VectorQuantizer.encode` for one part (modeling/turboquant.py), behind the division by a gain and
the subtraction of a mean. Axis letters: B batch, G key/value heads, h of them that are coded alike, T tokens,
D head dim, M groups of tokens with one mean each, N bytes of a vector's codes, R codes in a byte,
J = R * next power of 2 of D / R, the columns of a tile: run r of D / R channels lies at r * J / R, so that the
codes of one byte are J / R columns apart and, on tensor cores, in one thread.
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
        matrix, factor: of `matrix_parts` for the dtype of `states`.
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


def matrix_parts(encode: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """A matrix for `Coding`: [P, D, D] or [P, h, D, D] whose sum over P, times the factor, is `encode`.

    Sixteen-bit states multiply a matrix of their own type, which tensor cores do exactly, so that only the
    split rounds: to 2^-17 of the largest entry in bfloat16. A scaled Hadamard matrix is exact in one part.
    Entries are small enough that no product of finite states overflows float32.

    Args:
        encode: [D, D] or [h, D, D] float64, states @ encode. dtype: of the states.
    """
    largest = encode.abs().amax().item()
    spare = 1 if dtype == torch.float16 else 2 ** (encode.shape[-1] - 1).bit_length()
    rest, parts = encode / (largest * spare), []
    for _ in range(1 if dtype == torch.float32 else 2):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].double()
    if len(parts) == 2 and not parts[1].any():
        del parts[1]
    return torch.stack(parts).contiguous(), largest * spare


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
        matrix = matrices[i].view(matrices[i].shape[0], -1, dim, dim)
        search = 1 if bits == 1 else searches[i]  # of one bit, every stretch has the same codes
        streams.append((
            kind, *kind.stride()[:3], codes[i], *codes[i].stride()[:3], stored, *stored.stride()[:3],
            matrix, matrix.stride(0), 0 if matrix.shape[1] == 1 else dim * dim, factors[i], centroids[i],
            gains[i], heads[i], codes[i].shape[1], _stretch_table(search, kind.device),
        ))  # fmt: skip
        options.append((bits, rules[i], levels, matrix.shape[0], search))
    block = launch_parameters("encode", states[0].device)
    rows, most = block.pop("ROWS"), block.pop("TILES")
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
        DIM=dim, FIRST=options[0], SECOND=options[-1], ROWS=rows,
        DEPTH=_depth(dim, matrices), FLOAT32=interpreted() or states[0].dtype == torch.float32,
        PRECISION="ieee" if interpreted() or states[0].dtype != torch.float32 else "tf32x3", **block,
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
        if matrices[i].dtype != kind.dtype or not matrices[i].is_contiguous():
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
def _stretch_table(count: int, device: torch.device) -> torch.Tensor:
    """`count` factors between 0.76 and 1.24, float32, the one nearest to 1 first, as the twin tries them."""
    factors = torch.linspace(0.76, 1.24, count).tolist() if count > 1 else [1.0]
    return torch.tensor(sorted(factors, key=lambda factor: abs(factor - 1)), device=device)


def _depth(dim: int, matrices: Sequence[torch.Tensor]) -> int:
    """Rows of a matrix that a program holds at once: all, where its parts leave room in shared memory."""
    rows = triton.next_power_of_2(dim)
    size = max(matrix.shape[0] for matrix in matrices) * rows * rows * matrices[0].element_size()
    return rows if size <= 65536 else 64


@triton.jit
def _matrix_tile(
    matrix_ptr, start, DIM: tl.constexpr, DEPTH: tl.constexpr, RUN: tl.constexpr, TYPE: tl.constexpr
):
    """[DEPTH, J]: rows from `start` on of a matrix [D, D], its columns as runs, 0 where there are none."""
    RUNS: tl.constexpr = DIM // RUN
    PADDED: tl.constexpr = triton.next_power_of_2(RUN)
    row = start + tl.arange(0, DEPTH)
    column = tl.arange(0, PADDED * RUNS)
    if PADDED == RUN and DIM % DEPTH == 0:
        return tl.load(matrix_ptr + row[:, None] * DIM + column[None, :]).to(TYPE)
    else:
        place = column % PADDED
        ok = (row < DIM)[:, None] & (place < RUN)[None, :]
        channel = column // PADDED * RUN + place
        return tl.load(matrix_ptr + row[:, None] * DIM + channel[None, :], mask=ok, other=0.0).to(TYPE)


@triton.jit
def _rotated(
    row_ptr, row_ok, matrix_ptr, part_stride, high, rest, DIM: tl.constexpr, DEPTH: tl.constexpr,
    RUN: tl.constexpr, PARTS: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
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
        states = tl.load(row_ptr[:, None] + (start + channel)[None, :], mask=ok, other=0.0).to(TYPE)
        if DEPTH < SIZE:
            high = _matrix_tile(matrix_ptr, start, DIM, DEPTH, RUN, TYPE)
            if PARTS == 2:
                rest = _matrix_tile(matrix_ptr + part_stride, start, DIM, DEPTH, RUN, TYPE)
        result = tl.dot(states, high, result, input_precision=PRECISION)
        if PARTS == 2:
            result = tl.dot(states, rest, result, input_precision=PRECISION)
    return result


@triton.jit
def _nearest(size, table_ptr, BITS: tl.constexpr):
    """Of sizes >= 0: the index among the positive centroids, ascending from `table_ptr`, and the centroid."""
    c0 = tl.load(table_ptr)
    if BITS == 1:
        return tl.zeros(size.shape, tl.int32), tl.zeros(size.shape, tl.float32) + c0
    c1 = tl.load(table_ptr + 1)
    if BITS == 2:
        above = size > (c0 + c1) * 0.5
        return above.to(tl.int32), tl.where(above, c1, c0)
    c2 = tl.load(table_ptr + 2)
    c3 = tl.load(table_ptr + 3)
    if BITS == 3:
        upper = size > (c1 + c2) * 0.5
        above = size > tl.where(upper, (c2 + c3) * 0.5, (c0 + c1) * 0.5)
        index = tl.where(upper, 2, 0) + above.to(tl.int32)
    else:
        c4 = tl.load(table_ptr + 4)
        c5 = tl.load(table_ptr + 5)
        c6 = tl.load(table_ptr + 6)
        c7 = tl.load(table_ptr + 7)
        top = size > (c3 + c4) * 0.5
        upper = size > tl.where(top, (c5 + c6) * 0.5, (c1 + c2) * 0.5)
        over = tl.where(upper, (c6 + c7) * 0.5, (c4 + c5) * 0.5)
        under = tl.where(upper, (c2 + c3) * 0.5, (c0 + c1) * 0.5)
        above = size > tl.where(top, over, under)
        index = tl.where(top, 4, 0) + tl.where(upper, 2, 0) + above.to(tl.int32)
    return index, tl.load(table_ptr + index)


@triton.jit
def _coded(spread, table_ptr, stretch, DIM: tl.constexpr, BITS: tl.constexpr):
    """Of vectors [T, J] of length sqrt(D), 0 in padding, times a stretch [T]: indices of the nearest positive
    centroids, <vector, centroids> and ||centroids||^2 [T]."""
    size = tl.abs(spread)
    index, centroid = _nearest(size * stretch[:, None], table_ptr, BITS)
    product = tl.sum(size * centroid, axis=1)
    first = tl.load(table_ptr)  # what padding holds
    square = tl.sum(centroid * centroid, axis=1) - (spread.shape[1] - DIM) * first * first
    return index, product, square


@triton.jit
def _store_codes(row_ptr, row_ok, code, DIM: tl.constexpr, BITS: tl.constexpr, RUN: tl.constexpr):
    """Codes [T, J] as the planes of modeling/bit_packing.py."""
    ROWS: tl.constexpr = code.shape[0]
    RUNS: tl.constexpr = DIM // RUN
    PADDED: tl.constexpr = triton.next_power_of_2(RUN)
    place = tl.arange(0, PADDED)
    ok = row_ok[:, None] & (place < RUN)[None, :]
    if BITS == 3:
        runs = tl.reshape(code, (ROWS, 4, 2, PADDED))
        shift = (tl.arange(0, 4) * 2)[None, :, None, None]
        low = tl.sum((runs & 3) << shift, axis=1)
        half = tl.arange(0, 2) * RUN
        low_ptr = row_ptr[:, None, None] + half[None, :, None] + place[None, None, :]
        tl.store(low_ptr, low.to(tl.uint8), mask=tl.broadcast_to(ok[:, None, :], (ROWS, 2, PADDED)))
        runs = tl.reshape(code, (ROWS, 8, PADDED))
        high = tl.sum((runs >> 2) << tl.arange(0, 8)[None, :, None], axis=1)
        tl.store(row_ptr[:, None] + 2 * RUN + place[None, :], high.to(tl.uint8), mask=ok)
    else:
        runs = tl.reshape(code, (ROWS, RUNS, PADDED))
        planes = tl.sum(runs << (tl.arange(0, RUNS) * BITS)[None, :, None], axis=1)
        tl.store(row_ptr[:, None] + place[None, :], planes.to(tl.uint8), mask=ok)


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
    turned, table_ptr, stretch_ptr, limits_ptr, factor, codes_ptr, scales_ptr, row_ok,
    DIM: tl.constexpr, BITS: tl.constexpr, RULE: tl.constexpr, LEVELS: tl.constexpr, SEARCH: tl.constexpr,
    RUN: tl.constexpr,
):  # fmt: skip
    """Codes and stores rotated vectors [T, J]; `factor` is what their scales are still to be multiplied by."""
    largest = tl.max(tl.abs(turned), axis=1)
    exponent = tl.minimum(tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 1), 253)
    unit = (exponent << 23).to(tl.float32, bitcast=True)  # the power of 2 below the largest coordinate
    turned = turned * ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
    square = tl.sum(turned * turned, axis=1)
    nonzero = square > 0
    length = tl.sqrt(tl.where(nonzero, square, 1.0))
    ROOT: tl.constexpr = DIM**0.5
    spread = turned * (ROOT / length)[:, None]

    stretch = tl.zeros(square.shape, tl.float32) + 1.0
    if SEARCH > 1:
        best = tl.zeros(square.shape, tl.float32) - 1.0
        for i in range(SEARCH):
            tried = tl.load(stretch_ptr + i)
            _, product, norm = _coded(spread, table_ptr, stretch * 0.0 + tried, DIM, BITS)
            cosine = product / tl.sqrt(norm)
            stretch = tl.where(cosine > best, tried, stretch)
            best = tl.maximum(cosine, best)
    index, product, norm = _coded(spread, table_ptr, stretch, DIM, BITS)
    HALF: tl.constexpr = 1 << (BITS - 1)
    code = tl.where(spread > _TIE, HALF + index, HALF - 1 - index)
    _store_codes(codes_ptr, row_ok, code, DIM, BITS, RUN)

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
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Tokens from `begin` to `end` of one head, counted from the beginning of the buffers."""
    BITS: tl.constexpr = OPTIONS[0]
    LEVELS: tl.constexpr = OPTIONS[2]
    PARTS: tl.constexpr = OPTIONS[3]
    RUN: tl.constexpr = DIM // (8 if BITS == 3 else 8 // BITS)
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
        high = _matrix_tile(matrix_ptr, 0, DIM, DEPTH, RUN, TYPE)
        rest = high
        if PARTS == 2:
            rest = _matrix_tile(matrix_ptr + part_stride, 0, DIM, DEPTH, RUN, TYPE)
        row = tl.arange(0, ROWS)
        mean = tl.zeros((high.shape[1],), tl.float32)
        if means_ptr is not None:
            # As many equal rows as a tile has: the same instructions, so that what equals its mean gives 0.
            means_ptr += b.to(tl.int64) * mean_strides[0] + head.to(tl.int64) * mean_strides[1]
            mean_ptr = means_ptr + (group * mean_strides[2] + row * 0)
            turned = _rotated(
                mean_ptr,
                row >= 0,
                matrix_ptr,
                part_stride,
                high,
                rest,
                DIM,
                DEPTH,
                RUN,
                PARTS,
                TYPE,
                PRECISION,
            )
            mean = tl.max(turned, axis=0)
        for start in range(begin, end, ROWS):
            ok = start + row < end
            token = (start + row).to(tl.int64)
            turned = _rotated(
                states_ptr + (token - position) * state_token, ok, matrix_ptr, part_stride, high, rest,
                DIM, DEPTH, RUN, PARTS, TYPE, PRECISION,
            )  # fmt: skip
            if means_ptr is not None:
                turned = turned - mean[None, :]
            _encode_tile(
                turned, table_ptr + (1 << (BITS - 1)), stretch_ptr, limits_ptr, factor,
                codes_ptr + token * code_token, scales_ptr + token * scale_token, ok,
                DIM, BITS, OPTIONS[1], LEVELS, OPTIONS[4], RUN,
            )  # fmt: skip


@triton.jit
def _encode_kernel(
    first, second,  # what `encode_states` puts together for each kind
    means_ptr, mean_batch, mean_head, mean_row, limits_ptr, batch, position, tokens, group, span,
    DIM: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    FLOAT32: tl.constexpr, PRECISION: tl.constexpr,
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
        if tl.program_id(2) == 0:
            _encode_stream(
                first, means_ptr, (mean_batch, mean_head, mean_row), limits_ptr, batch, position, number,
                begin, end, DIM, FIRST, ROWS, DEPTH, TYPE, PRECISION,
            )  # fmt: skip
        else:
            _encode_stream(
                second, None, (0, 0, 0), limits_ptr, batch, position, number,
                begin, end, DIM, SECOND, ROWS, DEPTH, TYPE, PRECISION,
            )  # fmt: skip
