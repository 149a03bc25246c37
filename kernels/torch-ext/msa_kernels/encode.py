"""TurboQuant codes and scales of keys and values, in one launch, written where the cache keeps them.

The twin is `VectorQuantizer.encode` for one part (modeling/turboquant.py), behind the division by a gain and
the subtraction of a mean. Axis letters: B batch, G key/value heads, h of them that are coded alike, T tokens,
D head dim, M groups of tokens with one mean each, N bytes of a vector's codes, R codes in a byte,
J = R * next power of 2 of D / R, the columns of a tile (encode_kernels.py says which).
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton

from .encode_kernels import encode_kernel
from .launch import launch_parameters, processors
from .registration import interpreted, operator

SCALE_RULES = ("least_squares", "unbiased", "matched_norm")
MOST_ENCODED_BITS = 4
MOST_ENCODED_DIM = 256


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
    if crowded and size > 128:
        rows //= 2
    if wide and any(own[0] == 3 for own in options):
        rows //= 2
    programs = batch * max(stored.shape[1] for stored in codes) * len(states)
    group = mean_group if means is not None else tokens
    tiles = triton.cdiv(min(group, tokens), rows)
    busy = triton.cdiv(tokens, rows) * programs // (2 * processors(states[0].device))
    span = rows * max(1, min(tiles, most, busy))
    first = position // group if means is not None else 0
    count = (position + tokens - 1) // group + 1 - first if means is not None else 1
    grid = (count * triton.cdiv(group, span), programs // len(states), len(states))
    encode_kernel[grid](
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
