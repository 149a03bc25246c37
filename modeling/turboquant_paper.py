"""Two quantisers for replaying the papers: TurboQuant's "prod" form with QJL, and PolarQuant's angles.

Axis letters: D dimension of the vectors, W width of a part, N bytes of a vector's codes, S scales of a
vector, A angles of one level.

Both stand in for `VectorQuantizer`: they code vectors that were rotated before, and decode in the rotated
basis. Neither beats it: "prod" is 2.8 to 5.7 times worse in inner products than as many bits with the
unbiased scale, and PolarQuant spends bits on radii.
"""

import math
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache, lru_cache

import torch

from .bit_packing import pack, packed_bytes, unpack
from .codebooks import boundaries, codebook
from .turboquant import LARGEST_SCALE, PackedVectors, settle

# PolarQuant: nominal bits -> bits of a level 1 angle, bits of any other angle, levels at most. Four is what
# the paper runs (section 4). Below that, a radius of 16 bits for every 16 coordinates is too dear: seven
# levels share one among 128.
POLAR_BITS = {1: (1, 1, 7), 2: (2, 1, 7), 3: (3, 2, 7), 4: (4, 2, 4)}
_GRID = 1 << 16


@dataclass(frozen=True)
class _PartQuantizer(ABC):
    """What both forms share: parts of a vector that are coded one by one, with bfloat16 scales."""

    parts: tuple[tuple[int, int], ...]

    def __post_init__(self):
        object.__setattr__(self, "parts", tuple((int(width), int(bits)) for width, bits in self.parts))
        for width, bits in self.parts:
            if not 1 <= bits <= 4:
                raise ValueError(f"bits must be 1, 2, 3 or 4; got {bits}")
            if width < 2 or width % 2:
                raise ValueError(f"the width of a part must be even and positive; got {width}")

    @property
    def dim(self) -> int:
        return sum(width for width, _ in self.parts)

    @property
    def code_bytes(self) -> int:
        return sum(self._part_sizes(width, bits)[0] for width, bits in self.parts)

    @property
    def scale_count(self) -> int:
        return sum(self._part_sizes(width, bits)[1] for width, bits in self.parts)

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.bfloat16

    @property
    def vector_bytes(self) -> int:
        return self.code_bytes + 2 * self.scale_count

    @property
    def bits_per_element(self) -> float:
        return 8 * self.vector_bytes / self.dim

    def encode(self, rotated: torch.Tensor) -> PackedVectors:
        """Codes of rotated vectors [..., D], worked out in float64. Finite for every finite input."""
        codes, scales, start = [], [], 0
        for width, bits in self.parts:
            part = rotated[..., start : start + width].double()
            size = part.abs().amax(dim=-1, keepdim=True)
            part = settle(part / size.clamp_min(1e-300)) * size
            part_codes, part_scales = self._encode_part(part, bits)
            codes.append(part_codes)
            scales.append(part_scales.clamp(max=LARGEST_SCALE).bfloat16())
            start += width
        return PackedVectors(torch.cat(codes, dim=-1), torch.cat(scales, dim=-1), self)

    def decode(self, packed: PackedVectors, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The vectors [..., D] in the rotated basis."""
        decoded, byte, scale = [], 0, 0
        for width, bits in self.parts:
            size, count = self._part_sizes(width, bits)
            codes = packed.codes[..., byte : byte + size]
            scales = packed.scales[..., scale : scale + count].to(dtype)
            decoded.append(self._decode_part(codes, scales, width, bits))
            byte, scale = byte + size, scale + count
        return decoded[0] if len(decoded) == 1 else torch.cat(decoded, dim=-1)

    @abstractmethod
    def _part_sizes(self, width: int, bits: int) -> tuple[int, int]:
        """(bytes of codes, number of scales) of one part."""

    @abstractmethod
    def _encode_part(self, part: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes [..., N], scales [..., S] float64) of a part [..., W] float64."""

    @abstractmethod
    def _decode_part(self, codes: torch.Tensor, scales: torch.Tensor, width: int, bits: int) -> torch.Tensor:
        """The part [..., W], in the precision of `scales`."""


@dataclass(frozen=True)
class ProdQuantizer(_PartQuantizer):
    """TurboQuant's inner-product form (arXiv 2504.19874, algorithm 2).

    A code of one bit less leaves a residual r; QJL (arXiv 2406.03482) keeps ||r|| and the signs of S r, with
    S Gaussian [W, W]. The residual is read as sqrt(pi/2) / W * ||r|| * sign(S r) @ S, whose mean over S is r,
    so that scores are unbiased; they are linear in the query, so decoding gives a vector. Two scales per
    part, ||x|| / sqrt(W) and ||r||; one at 1 bit, where the residual is the vector.

    Args:
        parts: (width, bits) of consecutive runs of coordinates, the sign of QJL included in the bits.
        seed: of S.

    Raises:
        ValueError: for odd widths or bits outside 1-4.
    """

    seed: int = 0

    def _part_sizes(self, width, bits):
        if bits == 1:
            return packed_bytes(width, 1), 1
        return packed_bytes(width, bits - 1) + packed_bytes(width, 1), 2

    def _encode_part(self, part, bits):
        width = part.shape[-1]
        codes, scales, residual = [], [], part
        if bits > 1:
            length = part.norm(dim=-1, keepdim=True)
            spread = part * (width**0.5 / length.clamp_min(1e-300))
            index = torch.bucketize(spread, boundaries(width, bits - 1).to(part.device)).to(torch.uint8)
            codes.append(pack(index, bits - 1))
            scales.append((length / width**0.5).clamp(max=LARGEST_SCALE))
            # What is stored is what is subtracted, so that the residual holds the rounding of the scale too.
            residual = part - _centroids(index, width, bits - 1, scales[0].bfloat16().double())
        signs = residual @ gaussian(width, self.seed).to(part.device).mT > 0
        codes.append(pack(signs.to(torch.uint8), 1))
        scales.append(residual.norm(dim=-1, keepdim=True))
        return torch.cat(codes, dim=-1), torch.cat(scales, dim=-1)

    def _decode_part(self, codes, scales, width, bits):
        size = packed_bytes(width, bits - 1) if bits > 1 else 0
        signs = unpack(codes[..., size:], 1, width).to(scales.dtype) * 2 - 1
        sketch = gaussian(width, self.seed).to(device=codes.device, dtype=scales.dtype)
        residual = (signs @ sketch) * (math.sqrt(math.pi / 2) / width) * scales[..., -1:]
        if bits == 1:
            return residual
        return residual + _centroids(
            unpack(codes[..., :size], bits - 1, width), width, bits - 1, scales[..., :1]
        )


def _centroids(index: torch.Tensor, width: int, bits: int, scale: torch.Tensor) -> torch.Tensor:
    table = codebook(width, bits).to(device=index.device, dtype=scale.dtype)
    return table[index.int()] * scale


@lru_cache(maxsize=64)
def gaussian(dim: int, seed: int = 0) -> torch.Tensor:
    """QJL's S [dim, dim] float64, independent standard normal numbers; not those of a Haar rotation."""
    generator = random.Random(f"qjl {seed}")
    return torch.tensor([generator.gauss(0.0, 1.0) for _ in range(dim * dim)], dtype=torch.float64).view(
        dim, dim
    )


@dataclass(frozen=True)
class PolarQuantizer(_PartQuantizer):
    """PolarQuant (arXiv 2502.02617, section 3): angles of a recursive polar transform, and the last radii.

    Neighbouring coordinates become an angle in [0, 2 pi) and a radius, neighbouring radii an angle in
    [0, pi / 2] and a radius, and so on for as many levels as `POLAR_BITS` says and the width can be halved.
    The last radii are the scales. A level 1 angle is uniform and coded so; the others have a known density
    and the codebook with the lowest squared error of the angle. As in the paper, nothing corrects the radii
    for what the angles lose.

    Nominal bits are names, not costs: with radii, 1-4 take 1.125, 1.625, 2.625 and 3.875 bits per coordinate
    at width 128. Widths with few factors of 2 have more radii: 80 takes 2.0, 2.5, 3.4 and 3.9.

    Args:
        parts: (width, nominal bits) of consecutive runs of coordinates.

    Raises:
        ValueError: for odd widths or bits outside 1-4.
    """

    def _part_sizes(self, width, bits):
        first, higher, levels = polar_levels(width, bits)
        radii = width >> levels
        size = packed_bytes(width // 2, first)
        return size + (packed_bytes(width // 2 - radii, higher) if levels > 1 else 0), radii

    def _encode_part(self, part, bits):
        first, higher, levels = polar_levels(part.shape[-1], bits)
        radii, codes = part, []
        for level in range(1, levels + 1):
            left, right = radii[..., 0::2], radii[..., 1::2]
            radii = torch.hypot(left, right)
            angle = torch.atan2(right, left)
            if level == 1:
                turn = settle(angle / (2 * math.pi))
                codes.append((turn * 2**first).floor().remainder(2**first).to(torch.uint8))
            else:
                table = angle_codebook(level, higher).to(part.device)
                codes.append(torch.bucketize(settle(angle), (table[1:] + table[:-1]) / 2).to(torch.uint8))
        packed = [pack(codes[0], first)]
        if levels > 1:
            packed.append(pack(torch.cat(codes[1:], dim=-1), higher))
        return torch.cat(packed, dim=-1), radii

    def _decode_part(self, codes, scales, width, bits):
        first, higher, levels = polar_levels(width, bits)
        size, radii = packed_bytes(width // 2, first), scales
        if levels > 1:
            index = unpack(codes[..., size:], higher, width // 2 - radii.shape[-1])
            by_level = index.split([width >> level for level in range(2, levels + 1)], dim=-1)
            for level in range(levels, 1, -1):
                radii = _spread(radii, by_level[level - 2], angle_codebook(level, higher))
        uniform = (torch.arange(2**first, dtype=torch.float64) + 0.5) * (2 * math.pi / 2**first)
        return _spread(radii, unpack(codes[..., :size], first, width // 2), uniform)


def _spread(radii: torch.Tensor, index: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Undoes one level: radii [..., A] and the index of their angles [..., A] -> [..., 2 A]."""
    pairs = torch.stack([angles.cos(), angles.sin()], dim=-1).to(device=radii.device, dtype=radii.dtype)
    return (radii[..., None] * pairs[index.int()]).flatten(-2)


def polar_levels(width: int, bits: int) -> tuple[int, int, int]:
    """(bits of a level 1 angle, bits of a higher angle, number of levels) for nominal bits of a part."""
    first, higher, levels = POLAR_BITS[bits]
    halvings = (width & -width).bit_length() - 1
    return first, higher, min(levels, halvings)


@cache
def angle_codebook(level: int, bits: int) -> torch.Tensor:
    """The 2**bits Lloyd-Max centroids of an angle of a level above 1, float64 radians, ascending.

    The angle between two radii of 2^(level - 1) random coordinates each has density proportional to
    sin(2 psi)^(2^(level - 1) - 1) on [0, pi / 2] (arXiv 2502.02617, section 3).
    """
    angle = (torch.arange(_GRID, dtype=torch.float64) + 0.5) * (math.pi / 2 / _GRID)
    weight = torch.sin(2 * angle) ** (2 ** (level - 1) - 1)
    mass = weight.cumsum(0)
    quantiles = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits
    centroids = angle[torch.searchsorted(mass, quantiles * mass[-1])]
    for _ in range(10_000):
        cell = torch.bucketize(angle, (centroids[1:] + centroids[:-1]) / 2)
        total = torch.zeros_like(centroids).index_add(0, cell, weight)
        updated = torch.zeros_like(centroids).index_add(0, cell, weight * angle) / total
        if torch.equal(updated, centroids):
            break
        centroids = updated
    return centroids
