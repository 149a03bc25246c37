"""PackedRows: vectors of a memory bank in 1 to 4 bits per number, one quantised vector per row and head.

Axis letters: C rows, G key/value heads, D head dim, W = G * D, N bytes of a vector's codes.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields

import torch

from .turboquant import PackedVectors, Transform, VectorQuantizer, dequantize, quantize

BITS = (1, 2, 3, 4)
TILE_ELEMENTS = 1 << 19  # numbers coded or decoded at once: 2 MB in float32, which stays in a core's caches
FITTED_ROWS = 1 << 16  # that decide means and gains
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class RowPacking:
    """How the rows of a vector storage are coded.

    Args:
        bits: 1 to 4 per number.
        centered: whether the mean of each head is taken away before. Pooled keys are mostly mean: with it a
            bit less gives a smaller error (BENCHMARKS.md, "Packed memories").
        scale_rule: of `VectorQuantizer`. scale_bits: 16, or 8 with a gain per head.
        seed: of the rotation, a signed Hadamard.

    Raises:
        ValueError: for other values.
    """

    bits: int
    centered: bool = True
    scale_rule: str = "unbiased"
    scale_bits: int = 16
    seed: int = 0

    def __post_init__(self):
        if type(self.bits) is not int or self.bits not in BITS:
            raise ValueError(f"bits must be 1, 2, 3 or 4; got {self.bits!r}")
        if type(self.centered) is not bool:
            raise ValueError(f"centered must be true or false; got {self.centered!r}")
        if type(self.scale_bits) is not int:
            raise ValueError(f"scale_bits must be 8 or 16; got {self.scale_bits!r}")
        if type(self.seed) is not int or self.seed < 0:
            raise ValueError(f"seed must be a whole number of at least 0; got {self.seed!r}")
        self.quantizer(2)

    def quantizer(self, dim: int) -> VectorQuantizer:
        """Of vectors [..., D]."""
        return VectorQuantizer(((dim, self.bits),), self.scale_rule, self.scale_bits)


class RowCoder:
    """Codes rows [c, W] and reads them back. One coder gives the same bytes for the same vectors in any bank.

    Args:
        heads: G. dim: D.
        means: [G, D] float32, taken away before coding; None unless centered.
        gains: [G] float32, the typical size of a number, divided out before coding; None unless scales have
            8 bits.
    """

    def __init__(
        self,
        packing: RowPacking,
        heads: int,
        dim: int,
        means: torch.Tensor | None = None,
        gains: torch.Tensor | None = None,
    ):
        for name, fitted, wanted, shape in (
            ("means", means, packing.centered, (heads, dim)),
            ("gains", gains, packing.scale_bits == 8, (heads,)),
        ):
            if (fitted is not None) != wanted:
                raise ValueError(f"{name} must {'be given' if wanted else 'be None'} for {packing}")
            if wanted and (fitted.dtype != torch.float32 or tuple(fitted.shape) != shape):
                raise ValueError(
                    f"{name} must be float32 of shape {shape}; got {fitted.dtype} {tuple(fitted.shape)}"
                )
            if wanted and not fitted.isfinite().all():
                raise ValueError(f"{name} must be finite; got NaN or infinity")
        if gains is not None and not (gains > 0).all():
            raise ValueError(f"gains must be positive; the least is {float(gains.min())}")
        self.packing, self.heads, self.dim, self.means, self.gains = packing, heads, dim, means, gains
        self.quantizer = packing.quantizer(dim)
        self.transform = Transform.rotation("hadamard", (dim,), packing.seed)
        self.rotated_means = None
        if means is not None:
            self.rotated_means = (means.double() @ self.transform.to(means.device).encode).float()

    @classmethod
    def fit(cls, vectors: torch.Tensor, heads: int, packing: RowPacking) -> "RowCoder":
        """The coder whose means and gains are those of the first rows of vectors [c, W]."""
        if heads < 1 or vectors.shape[1] % heads:
            raise ValueError(f"heads must divide the width {vectors.shape[1]}; got {heads}")
        states = vectors[:FITTED_ROWS].unflatten(1, (heads, -1))
        means = gains = None
        if packing.centered:
            means = (states.sum(0, dtype=torch.float64) / max(1, len(states))).float()
        if packing.scale_bits == 8:
            rest = states.float() if means is None else states.float() - means
            size = rest.square().mean(2).median(0).values.sqrt() if len(states) else rest.new_ones(heads)
            gains = size.clamp(1e-30, 1e30).log2().round().exp2()
        return cls(packing, heads, states.shape[2], means, gains)

    def encode(self, vectors: torch.Tensor) -> PackedVectors:
        """Codes [c, G, N] and scales [c, G, 1] of vectors [c, W] on the coder's device."""
        states = vectors.unflatten(1, (self.heads, self.dim)).double()
        if self.means is not None:
            states = states - self.means
        if self.gains is not None:
            states = states / self.gains[:, None]
        return quantize(states, self.quantizer, self.transform)

    def decode(self, packed: PackedVectors, dtype: torch.dtype) -> torch.Tensor:
        """[c, W] of codes [c, G, N]."""
        return self._restored(dequantize(packed, self.transform), self.means).to(dtype).flatten(1)

    def decode_rotated(self, packed: PackedVectors, dtype: torch.dtype) -> torch.Tensor:
        """[c, W] in the rotated basis, which costs half as much."""
        return self._restored(packed.decode(), self.rotated_means).to(dtype).flatten(1)

    def _restored(self, states: torch.Tensor, means: torch.Tensor | None) -> torch.Tensor:
        if self.gains is not None:
            states = states * self.gains[:, None]
        return states if means is None else states + means

    def to(self, device: torch.device | str) -> "RowCoder":
        held = [fitted.device for fitted in (self.means, self.gains) if fitted is not None]
        if all(own == torch.device(device) for own in held):
            return self
        moved = (None if fitted is None else fitted.to(device) for fitted in (self.means, self.gains))
        return RowCoder(self.packing, self.heads, self.dim, *moved)


class PackedRows:
    """Rows of vectors, [rows, width], as codes; the interface of `memory_bank.DenseVectors`.

    Args:
        codes: uint8 [C, G, N]. scales: [C, G, 1]. dtype: in which rows are read.
    """

    def __init__(self, coder: RowCoder, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype):
        self.coder, self.dtype = coder, dtype
        self.packed = PackedVectors(codes, scales, coder.quantizer)

    @classmethod
    def allocate(
        cls, rows: int, coder: RowCoder, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> "PackedRows":
        quantizer, shape = coder.quantizer, (rows, coder.heads)
        codes = torch.empty(*shape, quantizer.code_bytes, dtype=torch.uint8, device=device)
        scales = torch.empty(*shape, 1, dtype=quantizer.scale_dtype, device=device)
        return cls(coder.to(device), codes, scales, dtype)

    @classmethod
    def code(cls, vectors: torch.Tensor, coder: RowCoder) -> "PackedRows":
        """vectors [C, W], a tile at a time, on their device."""
        storage = cls.allocate(len(vectors), coder, vectors.dtype, vectors.device)
        rows = torch.arange(len(vectors), device=vectors.device)
        for tile in storage._tiles(len(vectors)):
            storage.write(rows[tile], vectors[tile])
        return storage

    def __len__(self) -> int:
        return len(self.packed.codes)

    @property
    def width(self) -> int:
        return self.coder.heads * self.coder.dim

    @property
    def device(self) -> torch.device:
        return self.packed.codes.device

    @property
    def nbytes(self) -> int:
        """Of codes, scales, means and gains; the rotation follows from a seed and is shared."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def row_bytes(self) -> int:
        quantizer = self.coder.quantizer
        return self.coder.heads * (quantizer.code_bytes + quantizer.scale_dtype.itemsize)

    @property
    def kind(self) -> tuple:
        """Equal for storages whose stored bytes mean the same."""
        return ("packed", id(self.coder), self.dtype)

    @property
    def tile_rows(self) -> int:
        return max(1, TILE_ELEMENTS // self.width)

    def slice(self, start: int, stop: int) -> torch.Tensor:
        """[stop - start, width]: consecutive rows."""
        return self.coder.decode(self.packed[start:stop], self.dtype)

    def rotate(self, queries: torch.Tensor) -> torch.Tensor:
        """Queries [..., D] in the basis of `rotated_slice`, float32."""
        return queries.float() @ self.coder.transform.to(queries.device).decode.T

    def rotated_slice(self, start: int, stop: int) -> torch.Tensor:
        """[stop - start, width]: rows whose products with rotated queries are those of `slice` with these."""
        return self.coder.decode_rotated(self.packed[start:stop], self.dtype)

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """[len(rows), width]: chosen rows, as attention reads them; nothing else is decoded."""
        return self.coder.decode(self.packed.map(lambda stored: stored.index_select(0, rows)), self.dtype)

    def write(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Codes values [len(rows), width]. Raises ValueError if they hold NaN or infinity."""
        coded = self.coder.encode(values.to(self.device))
        self.packed.codes.index_copy_(0, rows, coded.codes)
        self.packed.scales.index_copy_(0, rows, coded.scales)

    def gathered(self, pieces: "list[tuple[PackedRows, torch.Tensor, torch.Tensor]]") -> "PackedRows":
        """See `DenseVectors.gathered`."""
        parts = (
            gather_rows([(getattr(own.packed, name), chosen, places) for own, chosen, places in pieces], like)
            for name, like in (("codes", self.packed.codes), ("scales", self.packed.scales))
        )
        return PackedRows(self.coder, *parts, self.dtype)

    def to(self, device: torch.device | str) -> "PackedRows":
        moved = self.packed.map(lambda stored: stored.to(device))
        return PackedRows(self.coder.to(device), moved.codes, moved.scales, self.dtype)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that `from_tensors` needs beside the settings, by the ending of its name in a file."""
        parts = {
            ".codes": self.packed.codes,
            ".scales": self.packed.scales,
            ".means": self.coder.means,
            ".gains": self.coder.gains,
        }
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    def settings(self) -> dict:
        """The packing and the dtype, for JSON."""
        return {**asdict(self.coder.packing), "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def from_tensors(cls, settings: dict, tensors: dict, prefix: str, shape: tuple) -> "PackedRows":
        """The storage that gave `settings()`, and `tensors()` under `prefix`; `shape` is (C, G, D).

        Raises ValueError or KeyError, naming what is wrong, if these do not fit together.
        """
        packing, dtype = read_packing(settings)
        rows, heads, dim = shape
        coder = RowCoder(packing, heads, dim, tensors.get(f"{prefix}.means"), tensors.get(f"{prefix}.gains"))
        quantizer = coder.quantizer
        stored = []
        for name, size, kind in (
            ("codes", quantizer.code_bytes, torch.uint8),
            ("scales", 1, quantizer.scale_dtype),
        ):
            tensor = tensors[f"{prefix}.{name}"]
            if tuple(tensor.shape) != (rows, heads, size) or tensor.dtype != kind:
                raise ValueError(
                    f"{prefix}.{name} must be {kind} of shape {(rows, heads, size)}; got {tensor.dtype} "
                    f"{tuple(tensor.shape)}"
                )
            stored.append(tensor)
        return cls(coder, *stored, dtype)

    def _tiles(self, rows: int) -> Iterator[slice]:
        step = self.tile_rows
        return (slice(start, min(rows, start + step)) for start in range(0, rows, step))


def gather_rows(
    pieces: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], like: torch.Tensor
) -> torch.Tensor:
    """[n, ...] put together of tensors' rows: for each, which of the n are its (bool [n]), and their places.

    Consecutive rows of one tensor are a view of it, which reads nothing. `like` has the rows' shape and type.
    """
    if not pieces:
        return like[:0]
    places = pieces[0][2]
    if len(pieces) == 1:
        stored, first = pieces[0][0], int(places[0])
        if int(places[-1]) - first + 1 == len(places) and bool((places.diff() == 1).all()):
            return stored[first : first + len(places)]
        return stored.index_select(0, places)
    result = torch.empty(len(places), *like.shape[1:], dtype=like.dtype)
    for stored, chosen, _ in pieces:
        result[chosen] = stored.index_select(0, places[chosen])
    return result


def read_packing(settings: dict) -> tuple[RowPacking, torch.dtype]:
    """What `PackedRows.settings` gave. Raises ValueError, naming field, rule and value."""
    names = {field.name for field in fields(RowPacking)} | {"dtype"}
    if not isinstance(settings, dict) or set(settings) != names:
        raise ValueError(f"packing must have the fields {', '.join(sorted(names))}; got {settings!r}")
    rest = dict(settings)
    dtype = rest.pop("dtype")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    return RowPacking(**rest), DTYPES[dtype]
