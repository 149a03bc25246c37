"""TurboQuant's vector quantiser (arXiv 2504.19874): rotate, code every coordinate, keep one scale.

Axis letters: D dimension of the vectors, N bytes of a vector's codes, S scales of a vector (one per part).

A vector x is written as y = x @ transform.encode, whose coordinates behave like those of a random direction;
each is replaced by the index of the nearest centroid, and x is read back as (scale * centroids) @
transform.decode. An attention score needs no decoding: <q, x> = scale * <q @ transform.decode.T, centroids>.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache

import torch

from .bit_packing import MOST_BITS, pack, packed_bytes, unpack
from .codebooks import boundaries, codebook
from .rotations import haar, signed_hadamard

SCALE_RULES = ("least_squares", "unbiased", "matched_norm")
LARGEST_SCALE = 2.0**120  # longer vectors are read as shorter ones, so that float32 holds them in every basis


class Transform:
    """A pair of matrices, x -> x @ encode and back with decode = encode's inverse.

    Args:
        encode: [D, D], or [G, D, D] with one matrix per key/value head. decode: its inverse; None if encode
            is orthogonal.
    """

    def __init__(self, encode: torch.Tensor, decode: torch.Tensor | None = None):
        decode = encode.mT if decode is None else decode
        with torch.inference_mode(False):  # caches share it, also those that are read with gradients
            encode, decode = (own.clone() if own.is_inference() else own for own in (encode, decode))
            self.encode, self.decode = encode.double(), decode.float().contiguous()
        self._elsewhere: dict[torch.device, Transform] = {}
        self.prepared: dict[tuple, tuple[torch.Tensor, float]] = {}  # `encode` as kernels take it

    @classmethod
    def rotation(cls, kind: str, parts: tuple[int, ...], seed: int = 0) -> "Transform":
        """A random rotation of each part of the coordinates: kind is "hadamard", "haar" or "none"."""
        make = {"hadamard": signed_hadamard, "haar": haar, "none": lambda size, seed: torch.eye(size)}
        if kind not in make:
            raise ValueError(f"rotation must be one of {', '.join(make)}; got {kind!r}")
        return cls(torch.block_diag(*(make[kind](size, seed + i).double() for i, size in enumerate(parts))))

    @property
    def nbytes(self) -> int:
        return self.encode.nbytes + self.decode.nbytes

    def __deepcopy__(self, memo: dict) -> "Transform":
        """Itself: nothing changes a transform, and a copied cache reads with the same one."""
        return self

    def to(self, device: torch.device) -> "Transform":
        """The same on a device. Layers share transforms, so this one stays where it is."""
        if self.encode.device == device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = Transform(self.encode.to(device), self.decode.to(device))
        return self._elsewhere[device]


@dataclass(frozen=True)
class VectorQuantizer:
    """Scalar codes and one scale for each part of a vector that was rotated before.

    Args:
        parts: (width, bits) of consecutive runs of coordinates; one part is plain TurboQuant, two are the
            paper's outlier channels (section 4.3) or transform coding.
        scale_rule: "least_squares" has the lowest squared error, "unbiased" gives E<q, x~> = <q, x>,
            "matched_norm" keeps the length.
        code_search: how often codes are tried for a vector, each time a little longer or shorter; those with
            the largest cosine are kept. 1 is the paper's nearest centroids; 9 lowers the KL of a cache by a
            third at 4 bits and costs nothing to read.
        scale_bits: 16 (bfloat16), or 8: see `scale_table`, for vectors of a typical length near 1.

    Raises:
        ValueError: for an unknown rule, widths below 2 or bits outside 1-6.
    """

    parts: tuple[tuple[int, int], ...]
    scale_rule: str = "least_squares"
    scale_bits: int = 16
    code_search: int = 1

    def __post_init__(self):
        object.__setattr__(self, "parts", tuple((int(width), int(bits)) for width, bits in self.parts))
        if self.scale_rule not in SCALE_RULES:
            raise ValueError(f"scale_rule must be one of {', '.join(SCALE_RULES)}; got {self.scale_rule!r}")
        if self.code_search < 1:
            raise ValueError(f"code_search must be at least 1; got {self.code_search}")
        if self.scale_bits not in (8, 16):
            raise ValueError(f"scale_bits must be 8 or 16; got {self.scale_bits}")
        for width, bits in self.parts:
            if not 1 <= bits <= MOST_BITS:
                raise ValueError(f"bits must be 1 to {MOST_BITS}; got {bits}")
            if width < 2:
                raise ValueError(f"the width of a part must be at least 2; got {width}")

    @property
    def dim(self) -> int:
        return sum(width for width, _ in self.parts)

    @property
    def code_bytes(self) -> int:
        return sum(packed_bytes(width, bits) for width, bits in self.parts)

    @property
    def scale_count(self) -> int:
        return len(self.parts)

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.uint8 if self.scale_bits == 8 else torch.bfloat16

    @property
    def vector_bytes(self) -> int:
        return self.code_bytes + self.scale_count * self.scale_bits // 8

    @property
    def bits_per_element(self) -> float:
        return 8 * self.vector_bytes / self.dim

    def encode(self, rotated: torch.Tensor) -> "PackedVectors":
        """Codes of rotated vectors [..., D]. Finite, and finite when read, for every finite input.

        Works in float64 and settles what lies on a boundary, so that neither overflow nor the shape of the
        batch decides a bit.
        """
        codes, scales, start = [], [], 0
        for width, bits in self.parts:
            part = rotated[..., start : start + width].double()
            index, scale = self._encode_part(part, bits)
            codes.append(pack(index, bits))
            scales.append(scale)
            start += width
        return PackedVectors(torch.cat(codes, dim=-1), torch.cat(scales, dim=-1), self)

    def _encode_part(self, part: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        width = part.shape[-1]
        length = part.norm(dim=-1, keepdim=True)
        index, product, norm = self._best_codes(part * (width**0.5 / length.clamp_min(1e-300)), bits)
        if self.scale_rule == "matched_norm":
            ratio = width**0.5 / norm
        elif self.scale_rule == "least_squares":
            ratio = product / norm.square()
        else:
            ratio = width / product
        scale = torch.where(length > 0, ratio * (length / width**0.5), 0.0)
        return index.to(torch.uint8), _store_scale(scale, self.scale_bits)

    def _best_codes(self, spread: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes of vectors [..., W] of length sqrt(W), with <vector, centroids> and ||centroids|| [..., 1].

        The nearest centroids of a slightly longer or shorter vector are often closer in direction.
        """
        width = spread.shape[-1]
        limits, table = boundaries(width, bits).to(spread.device), codebook(width, bits).to(spread.device)
        best = None
        for stretch in _stretches(self.code_search):
            index = torch.bucketize(settle(spread * stretch), limits, out_int32=True)
            centroids = table[index].double()
            product = (spread * centroids).sum(dim=-1, keepdim=True)
            norm = centroids.norm(dim=-1, keepdim=True)
            found = (settle(product / (norm * width**0.5)), index, product, norm)
            if best is None:
                best = found
            else:
                better = found[0] > best[0]
                best = tuple(torch.where(better, new, old) for new, old in zip(found, best))
        return best[1:]

    def decode(self, packed: "PackedVectors", dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """scale * centroids, [..., D], in the rotated basis."""
        scales = read_scale(packed.scales, dtype)
        decoded, start = [], 0
        for i, (width, bits) in enumerate(self.parts):
            size = packed_bytes(width, bits)
            index = unpack(packed.codes[..., start : start + size], bits, width)
            table = codebook(width, bits).to(device=index.device, dtype=dtype)
            centroids = table.index_select(0, index.int().flatten()).view(index.shape)
            decoded.append(centroids * scales[..., i : i + 1])
            start += size
        return decoded[0] if len(decoded) == 1 else torch.cat(decoded, dim=-1)


@cache
def _stretches(count: int) -> tuple[float, ...]:
    """`count` factors between 0.76 and 1.24, the one nearest to 1 first."""
    factors = torch.linspace(0.76, 1.24, count).tolist() if count > 1 else [1.0]
    return tuple(sorted(factors, key=lambda factor: abs(factor - 1)))


def settle(numbers: torch.Tensor) -> torch.Tensor:
    """Float64 numbers of a size around 1, rounded to 2^-40.

    Sums of few-bit numbers often cancel exactly, on the boundary between two codes. In floating point the
    order of the sum, which depends on the batch and the device, would then choose the code; the rounding
    absorbs it.
    """
    return (numbers * 2.0**40).round() * 2.0**-40


def _store_scale(scale: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 16:
        return scale.clamp(max=LARGEST_SCALE).bfloat16()
    table = scale_table().to(scale.device)
    middle = (table[1:] * table[:-1]).sqrt()  # 0 below the first scale, so only a zero vector gets level 0
    return torch.bucketize(scale, middle, out_int32=True).to(torch.uint8)


@cache
def scale_table() -> torch.Tensor:
    """What the levels of an 8 bit scale mean: 0, then 2^(v/32 * (1 + (v/64)^4)) for v = -127 ... 127.

    Steps of 2^(1/32) around 1, where the scales of a head lie once its typical length is divided out, and
    wider ones outwards, to 2^-65 and 2^65. An error of the scale is an error along the key itself and costs
    more than its size: with steps of 2^(1/8) the KL of 4 bit keys and values doubles.
    """
    v = torch.arange(-127, 128, dtype=torch.float64)
    return torch.cat([torch.zeros(1, dtype=torch.float64), (v / 32 * (1 + (v / 64) ** 4)).exp2()])


def read_scale(stored: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The scales that were stored in 8 or 16 bits, as `dtype`."""
    if stored.dtype != torch.uint8:
        return stored.to(dtype)
    table = scale_table().to(stored.device, torch.float32)
    return table.index_select(0, stored.int().flatten()).view(stored.shape).to(dtype)


@dataclass
class PackedVectors:
    """Quantised vectors: codes uint8 [..., N], scales [..., S], and the quantiser that reads them.

    Indexing and `map` act on the leading axes of the stored bytes, so that selecting is exact.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    quantizer: VectorQuantizer = field(repr=False)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.codes.shape[:-1], self.quantizer.dim))

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "PackedVectors":
        return replace(self, codes=change(self.codes), scales=change(self.scales))

    def __getitem__(self, index) -> "PackedVectors":
        return self.map(lambda tensor: tensor[index])

    def decode(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.quantizer.decode(self, dtype)


def quantize(vectors: torch.Tensor, quantizer: VectorQuantizer, transform: Transform) -> PackedVectors:
    """Codes of vectors [..., D], or [..., G, T, D] for a transform per head.

    Raises ValueError if a vector holds NaN or infinity.
    """
    if not vectors.isfinite().all():
        raise ValueError("only finite vectors can be quantised; got NaN or infinity")
    return quantizer.encode(vectors.double() @ transform.to(vectors.device).encode)


def dequantize(packed: PackedVectors, transform: Transform) -> torch.Tensor:
    """float32 vectors [..., D] in the basis in which they were given to `quantize`."""
    return packed.decode() @ transform.to(packed.codes.device).decode
