"""Random orthogonal matrices: signed Walsh-Hadamard for any even dimension, and Haar.

Vectors are rows: y = x @ rotation. Matrices are made on first use and kept; nothing is built in a model's
constructor, because Transformers builds models on the meta device. Random bits come from Python's generator,
whose sequence is the same on every platform and release, so a saved cache is read with the rotation that
wrote it.
"""

import random
from functools import lru_cache

import torch


def walsh_hadamard(size: int) -> torch.Tensor:
    """The orthonormal Walsh-Hadamard matrix [size, size], float64; size is a power of 2."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


@lru_cache(maxsize=64)
def signed_hadamard(dim: int, seed: int = 0) -> torch.Tensor:
    """Random signs times Walsh-Hadamard, [dim, dim] float64, orthogonal.

    Where dim is not a power of 2 the Hadamard is block-diagonal over the powers of 2 in dim (80 = 64 + 16)
    and applied twice with new signs, the second time over reversed coordinates, so that the blocks mix.

    Raises ValueError if dim is odd or below 2.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"the dimension of a Hadamard rotation must be even and positive; got {dim}")
    generator = random.Random(seed)
    blocks = [1 << bit for bit in range(dim.bit_length() - 1, 0, -1) if dim >> bit & 1]
    hadamard = torch.block_diag(*(walsh_hadamard(size) for size in blocks))
    rotation = _signs(dim, generator)[:, None] * hadamard
    if len(blocks) > 1:
        rotation = rotation.flip(1) @ (_signs(dim, generator)[:, None] * hadamard)
    return rotation


@lru_cache(maxsize=64)
def haar(dim: int, seed: int = 0) -> torch.Tensor:
    """A Haar-random orthogonal matrix [dim, dim] float64: Q of a Gaussian's QR, signed by R's diagonal."""
    generator = random.Random(seed)
    gaussian = [generator.gauss(0.0, 1.0) for _ in range(dim * dim)]
    q, r = torch.linalg.qr(torch.tensor(gaussian, dtype=torch.float64).view(dim, dim))
    return q * r.diagonal().sign()


def _signs(dim: int, generator: random.Random) -> torch.Tensor:
    bits = generator.getrandbits(dim)
    return torch.tensor([1.0 - 2.0 * (bits >> i & 1) for i in range(dim)], dtype=torch.float64)
