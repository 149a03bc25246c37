"""The linear transform in which a head's keys or values are cheapest to code.

A code of y = x E with a few bits adds noise of a size proportional to |x E|, in every direction of E's basis
alike; read back with E^-1 and met by the gradient g it costs |x E|^2 |g E^-T|^2, on average over tokens. With
P = E E' that is (x' P x)(g' P^-1 g). Where its mean is smallest, P S P = M holds with S = E[x x' (g' P^-1 g)]
and M = E[g g' (x' P x)], which is iterated here; E is the root of P in whose basis both are diagonal, so that
its coordinates, sorted by their energy, are those of transform coding.

Axis letters: S random directions, G key/value heads, n tokens, D head dim.
"""

import torch


def fit_transform(
    vectors: torch.Tensor, gradients: torch.Tensor, shrinkage: float = 0.1, steps: int = 3
) -> torch.Tensor:
    """Matrices E [G, D, D] float64, x -> x @ E, the coordinates with the most energy first.

    Args:
        vectors: [G, n, D]. gradients: [S, G, n, D].
        shrinkage: how much of a head's mean variance is added to every direction of S and M: few tokens tell
            little about rare directions.
    """
    dim = vectors.shape[-1]
    metric = torch.eye(dim, dtype=torch.float64, device=vectors.device).expand(vectors.shape[0], dim, dim)
    for step in range(steps):
        inverse = torch.linalg.inv(metric)
        weight = sum(_quadratic(own, inverse) for own in gradients) / len(gradients)
        energy = _quadratic(vectors, metric)
        spread = _shrunk((vectors * weight[..., None]).mT @ vectors, shrinkage)
        need = _shrunk(sum((own * energy[..., None]).mT @ own for own in gradients), shrinkage)
        encode = _balanced(spread, need)
        target = encode @ encode.mT
        metric = target if step == 0 else _geometric_mean(metric, target)
        metric = metric / _mean_diagonal(metric)
    return encode


def _quadratic(vectors: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """x' M x: vectors [G, n, D], matrix [G, D, D] -> [G, n]."""
    return ((vectors @ matrix.to(vectors.dtype)) * vectors).sum(dim=-1)


def _shrunk(matrix: torch.Tensor, share: float) -> torch.Tensor:
    matrix = matrix.double()
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    matrix = matrix + 1e-200 * identity  # for a head that nothing depends on
    return matrix / _mean_diagonal(matrix) + share * identity


def _balanced(spread: torch.Tensor, need: torch.Tensor) -> torch.Tensor:
    """E with E' S E = E^-1 M E^-T, diagonal and descending: S^(-1/2) U L^(1/2) with S^(1/2) M S^(1/2) = U L^2
    U'."""
    root = matrix_power(spread, 0.5)
    squares, basis = torch.linalg.eigh(root @ need @ root)
    size = squares.flip(-1).clamp_min(1e-30) ** 0.25
    return matrix_power(spread, -0.5) @ basis.flip(-1) * size[..., None, :]


def _geometric_mean(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The middle of the geodesic between two positive definite matrices."""
    root, back = matrix_power(one, 0.5), matrix_power(one, -0.5)
    return root @ matrix_power(back @ other @ back, 0.5) @ root


def matrix_power(matrix: torch.Tensor, exponent: float) -> torch.Tensor:
    """A real power of symmetric positive matrices [..., D, D]."""
    values, basis = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return (basis * values.clamp_min(1e-30)[..., None, :] ** exponent) @ basis.mT


def _mean_diagonal(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
