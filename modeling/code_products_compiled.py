"""The products with centroids as C++ that torch.compile writes, for the few query rows of a decode step.

Codes become centroids in registers, once for all query rows of a head, and meet the dot product there:
nothing of the size of the cache is ever written. A codebook is odd around its middle, so an odd polynomial
through its 2^bits centroids gives them exactly, in instructions that vectorise, unlike a table. Axis letters:
B batch, G key/value heads, S = B * G, R query rows of a head, P packed tokens, D head dim, W width of a part,
N bytes of its codes.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch.nn import functional as F

from .bit_packing import PLANES, packed_bytes
from .code_products import plain_centroid_sums
from .codebooks import codebook
from .turboquant import PackedVectors, VectorQuantizer

ROWS = (1, 2, 3, 4, 6, 8, 12, 16)  # numbers of query rows that kernels are made for; others are rounded up
SPAN = 64  # tokens that one partial sum is taken over: a default cache's block, so that no rest remains
FEWEST_TOKENS = 512
OPTIONS = {"cpp.enable_floating_point_contract_flag": "fast"}  # fused multiply-add: a third faster
MOST_BITS = 4  # beyond, a polynomial has too many terms to be exact in float32, and to be fast


def serves(states: torch.Tensor, packed: PackedVectors) -> bool:
    """Whether these functions take products of states [B, G, R, ...] with vectors [B, G, P, D]."""
    return (
        states.device.type == "cpu"
        and states.dtype == torch.float32
        and not states.requires_grad
        and states.shape[2] <= ROWS[-1]
        and packed.shape[2] >= FEWEST_TOKENS
        and isinstance(packed.quantizer, VectorQuantizer)
        and all(width % 8 == 0 and bits <= MOST_BITS for width, bits in packed.quantizer.parts)
    )


def centroid_scores(queries: torch.Tensor, codes: torch.Tensor, bits: int) -> torch.Tensor:
    """<q, centroids>: queries [B, G, R, W], codes [B, G, P, N] -> [B, G, R, P]."""
    batch, heads, rows, width = queries.shape
    scores = _run("scores", bits, width, _padded(queries).flatten(0, 1), _twice(codes.flatten(0, 1)))
    return scores[:, :rows].unflatten(0, (batch, heads))


def centroid_sums(weights: torch.Tensor, codes: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """sum of w * centroids: weights [B, G, R, P], codes [B, G, P, N] -> [B, G, R, W]."""
    batch, heads, rows, tokens = weights.shape
    whole = tokens // SPAN * SPAN
    spans = _padded(weights)[..., :whole].contiguous().flatten(0, 1).unflatten(-1, (-1, SPAN))
    codes_of_spans = _twice(codes[:, :, :whole].flatten(0, 1).unflatten(1, (-1, SPAN)))
    sums = _run("sums", bits, width, spans, codes_of_spans)[:, :rows].unflatten(0, (batch, heads))
    if whole < tokens:
        sums += plain_centroid_sums(weights[..., whole:], codes[:, :, whole:], bits, width)
    return sums


def _rounded(rows: int) -> int:
    return next(size for size in ROWS if size >= rows)


def _padded(rows: torch.Tensor) -> torch.Tensor:
    """[B, G, R, X] with rows of zeros up to a number that kernels are made for."""
    missing = _rounded(rows.shape[2]) - rows.shape[2]
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


def _twice(codes: torch.Tensor) -> torch.Tensor:
    """Codes [..., N] as [..., 2, N] without a copy.

    torch.compile tells full buffers from those with room for more tokens, and would compile for each anew;
    with this axis neither is contiguous. The kernels drop it before they compute anything.
    """
    return codes.unsqueeze(-2).expand(*codes.shape[:-1], 2, codes.shape[-1])


def _run(kind: str, bits: int, width: int, states: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The compiled product `kind` of states [S, R, ...] and codes [S, ...]."""
    # Everything that torch.compile would compile anew for, except the numbers of heads and tokens.
    modes = (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_num_threads(),
    )
    heads, rows = states.shape[:2]
    inference = states.is_inference(), codes.is_inference()
    return _kernel(kind, bits, width, rows, heads > 1, inference, modes)(states, codes)


@cache
def _kernel(kind: str, bits: int, width: int, rows: int, several: bool, inference: tuple, modes: tuple):
    """The product, compiled on a sample for any number of tokens and, if `several`, of heads."""
    make = {"scores": _scores, "sums": _sums}[kind]
    function = make(bits, width, rows, polynomial(width, bits))
    # torch.compile counts recompilations by code object, and closures share theirs.
    function.__code__ = function.__code__.replace(co_name=f"code_{kind}_{bits}_{width}_{rows}")
    kernel = torch.compile(function, fullgraph=True, options=OPTIONS)
    heads, size, tokens = 1 + several, packed_bytes(width, bits), (100,) if kind == "scores" else (5, SPAN)
    with torch.inference_mode(inference[0]):
        states = torch.zeros(heads, rows, *((width,) if kind == "scores" else tokens))
    with torch.inference_mode(inference[1]):
        room = torch.zeros(heads, 2 * tokens[0], *tokens[1:], size, dtype=torch.uint8)
        codes = _twice(room[:, : tokens[0]])
    torch._dynamo.mark_dynamic(codes, 1)
    if kind == "sums":
        torch._dynamo.mark_dynamic(states, 2)
    for tensor in (states, codes) if several else ():
        torch._dynamo.mark_dynamic(tensor, 0)
    kernel(states, codes)
    return kernel


def _scores(bits: int, width: int, rows: int, factors: tuple[float, ...]) -> Callable:
    def scores(queries: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """[S, R, W], [S, P, 2, N] -> [S, R, P]"""
        pieces = _centroids(codes, bits, width, factors)
        parts = queries.split([piece.shape[-1] for piece in pieces], dim=-1)
        products = [
            sum(piece * part[:, row, None] for piece, part in zip(pieces, parts)).sum(dim=-1)
            for row in range(rows)
        ]
        return torch.stack(products, dim=1)

    return scores


def _sums(bits: int, width: int, rows: int, factors: tuple[float, ...]) -> Callable:
    def sums(weights: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """[S, R, P / SPAN, SPAN], [S, P / SPAN, SPAN, 2, N] -> [S, R, W]"""
        pieces = _centroids(codes, bits, width, factors)
        spans = [
            torch.cat([(weights[:, row, :, :, None] * piece).sum(dim=2) for piece in pieces], dim=-1)
            for row in range(rows)
        ]
        return torch.stack(spans, dim=1).sum(dim=2)

    return sums


def _centroids(codes: torch.Tensor, bits: int, width: int, factors: tuple) -> list[torch.Tensor]:
    """The centroids of codes [..., 2, N] in pieces [..., w] that follow each other; see `bit_packing`."""
    pieces, start, low = None, 0, 0
    for plane in PLANES[bits]:
        size = width * plane // 8
        own = codes[..., start : start + size].int()  # shifts of bytes do not vectorise well
        own = [(own >> shift) & (2**plane - 1) for shift in range(0, 8, plane)]
        if pieces is None:
            pieces = own
        else:
            pieces = [part for piece in pieces for part in piece.chunk(len(own) // len(pieces), dim=-1)]
            pieces = [piece | (high << low) for piece, high in zip(pieces, own)]
        start, low = start + size, low + plane
    middle, centroids = (2**bits - 1) / 2, []
    for piece in pieces:
        place = piece.float() - middle
        square, value = place * place, factors[-1]
        for factor in factors[-2::-1]:
            value = value * square + factor
        centroids.append((value * place).select(-2, 0))
    return centroids


def polynomial(width: int, bits: int) -> tuple[float, ...]:
    """Factors of x, x^3, x^5, ... of the polynomial through the centroids, x the distance from the middle
    code."""
    upper = codebook(width, bits).double()[2 ** (bits - 1) :]
    place = torch.arange(2 ** (bits - 1), dtype=torch.float64) + 0.5
    powers = place[:, None] ** torch.arange(1, 2**bits, 2)
    return tuple(torch.linalg.solve(powers, upper).tolist())
