"""Lloyd-Max codebooks for the coordinates of a random unit vector.

A coordinate t of a vector drawn from the unit sphere in `dim` dimensions has density proportional to
(1 - t^2)^((dim - 3) / 2). TurboQuant (arXiv 2504.19874, section 3.1) codes every coordinate of a randomly
rotated vector with the optimal scalar quantiser of this density. Values here are multiplied by sqrt(dim), so
that they have variance 1; the codebook tends to that of the normal distribution for large dim.
"""

from functools import cache

import torch

from .bit_packing import MOST_BITS

_GRID = 1 << 18


@cache
def codebook(dim: int, bits: int) -> torch.Tensor:
    """The 2**bits centroids for coordinates of sqrt(dim) * unit vector, float32, ascending, symmetric.

    Raises ValueError for bits outside 1-6 or dim below 2.
    """
    return _solve(dim, bits)[0].float()


@cache
def boundaries(dim: int, bits: int) -> torch.Tensor:
    """The 2**bits - 1 decision boundaries, float64: midpoints of neighbouring centroids of `codebook`."""
    centroids = codebook(dim, bits).double()
    return (centroids[1:] + centroids[:-1]) / 2


@cache
def distortion(dim: int, bits: int) -> float:
    """E||u - u~||^2 of a random unit vector u coded with `codebook(dim, bits)`, by quadrature."""
    return _solve(dim, bits)[1]


@cache
def _solve(dim: int, bits: int) -> tuple[torch.Tensor, float]:
    if not 1 <= bits <= MOST_BITS:
        raise ValueError(f"bits must be 1 to {MOST_BITS}; got {bits}")
    if dim < 2:
        raise ValueError(f"dim must be at least 2; got {dim}")
    # With t = sin(a) the density is cos(a)^(dim - 2), smooth for every dim >= 2. Cell probabilities and first
    # moments are differences of cumulative sums on a fine grid of midpoints.
    edges = torch.linspace(-torch.pi / 2, torch.pi / 2, _GRID + 1, dtype=torch.float64)
    angle = (edges[1:] + edges[:-1]) / 2
    weight = torch.cos(angle) ** (dim - 2)
    weight = weight / weight.sum()
    value = torch.sin(angle) * dim**0.5
    zero = torch.zeros(1, dtype=torch.float64)
    mass = torch.cat([zero, weight.cumsum(0)])
    moment = torch.cat([zero, (weight * value).cumsum(0)])
    place = edges.sin() * dim**0.5

    def cumulative(table: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        index = torch.searchsorted(place, at).clamp(1, _GRID)
        left, right = place[index - 1], place[index]
        return torch.lerp(table[index - 1], table[index], (at - left) / (right - left))

    # Start where the quantiser for many levels has its points: quantiles of the cube root of the density.
    levels, width = 2**bits, place.diff()
    companded = ((weight / width) ** (1 / 3) * width).cumsum(0)
    quantiles = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels
    centroids = value[torch.searchsorted(companded, quantiles * companded[-1]).clamp(max=_GRID - 1)]
    for _ in range(1_000):
        middle = (centroids[1:] + centroids[:-1]) / 2
        cells = torch.cat([place[:1], middle, place[-1:]])
        probability = cumulative(mass, cells).diff().clamp_min(1e-300)
        means = cumulative(moment, cells).diff() / probability
        # A mean follows both boundaries of its cell, and a boundary follows the centroids beside it.
        index = torch.searchsorted(place, middle).clamp(1, _GRID) - 1
        density = (weight / width)[index]
        above = density * (middle - means[:-1]) / probability[:-1] / 2
        below = density * (means[1:] - middle) / probability[1:] / 2
        slope = torch.diag(above, 1) + torch.diag(below, -1)
        slope += torch.diag(torch.cat([above, zero]) + torch.cat([zero, below]))
        rest = torch.eye(levels, dtype=torch.float64) - slope
        updated = centroids + torch.linalg.solve(rest, means - centroids)
        if not (updated.diff() > 0).all() or updated.abs().max() > place[-1]:
            updated = means  # Newton's step goes too far: one of Lloyd's
        updated = (updated - updated.flip(0)) / 2
        done = (updated - centroids).abs().max() < 1e-11
        centroids = updated
        if done:
            break
    nearest = centroids[torch.bucketize(value, (centroids[1:] + centroids[:-1]) / 2)]
    return centroids, float((weight * (value - nearest) ** 2).sum())
