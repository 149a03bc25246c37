"""SegmentedRows: the vectors of chosen documents, wherever in the memory-mapped segments they lie.

To a `MemoryBank` it is one more vector storage: rows 0 to C - 1 are those of the documents of a view, in
order, and no other row can be reached. Axis letters: C rows, W width, G heads, N bytes of a vector's codes.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

from ..modeling.memory_bank import DenseVectors, first_rows
from ..modeling.packed_vectors import PackedRows
from .residency import release

Storage = DenseVectors | PackedRows
RESIDENT_BYTES = 1 << 27  # of segments that routing has read and left


class SegmentedRows:
    """Rows of several storages, one after another; the interface of `memory_bank.DenseVectors`.

    Bits are those of one storage that holds the same rows: a tile or a selection is put together from stored
    bytes first and decoded once.

    Args:
        storages: vectors of the segments; None where a segment has dropped them.
        sources: [n] int64, the storage of each run of rows. starts: [n] its first row there. counts: [n].
        like: a storage that tells width, type and coding, also where there are no rows.
        restore: vectors [r, W] of rows [r] of this object that are in no storage.
    """

    def __init__(
        self,
        storages: Sequence[Storage | None],
        sources: torch.Tensor,
        starts: torch.Tensor,
        counts: torch.Tensor,
        like: Storage,
        restore: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        present = counts > 0
        sources, starts, counts = sources[present], starts[present], counts[present]
        # Runs that continue each other become one: after an ingestion a view has one run per segment.
        follows = (sources[1:] == sources[:-1]) & (starts[1:] == starts[:-1] + counts[:-1])
        heads = torch.cat([follows.new_ones(min(1, len(counts))), ~follows])
        first = first_rows(counts)
        self._first = torch.cat([first[:-1][heads], first[-1:]])
        self._sources, self._starts = sources[heads], starts[heads]
        self._storages, self._like, self._restore = list(storages), like, restore
        self._read_through: set[int] = set()

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def width(self) -> int:
        return self._like.width

    @property
    def dtype(self) -> torch.dtype:
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        return self._like.device

    @property
    def tile_rows(self) -> int:
        return self._like.tile_rows

    @property
    def nbytes(self) -> int:
        """Of the rows that are stored, not of the files that hold them."""
        rows = torch.zeros(len(self._storages), dtype=torch.int64)
        rows.index_add_(0, self._sources, self._first.diff())
        stored = zip(self._storages, rows.tolist())
        return sum(count * storage.row_bytes for storage, count in stored if storage is not None)

    def rotate(self, queries: torch.Tensor) -> torch.Tensor:
        """Queries [..., D] in the basis of `rotated_slice`, which is the same for every number of bits."""
        return self._like.rotate(queries)

    def slice(self, start: int, stop: int) -> torch.Tensor:
        """[stop - start, W]: consecutive rows."""
        return self._read(torch.arange(start, stop), "slice")

    def rotated_slice(self, start: int, stop: int) -> torch.Tensor:
        """[stop - start, W]: rows whose products with rotated queries are those of `slice` with these.

        Segments that a pass over all rows has left behind do not stay in memory.
        """
        runs = torch.searchsorted(self._first, torch.tensor([start, stop - 1]), right=True) - 1
        if start < stop:
            self._let_go(set(self._sources[int(runs[0]) : int(runs[1]) + 1].tolist()))
        return self._read(torch.arange(start, stop), "rotated_slice")

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """[len(rows), W]: chosen rows, as attention reads them; nothing else is decoded."""
        return self._read(rows.cpu(), "slice")

    def to(self, device: torch.device | str) -> "SegmentedRows | Storage":
        """All rows in one storage on another device; itself on the CPU, and if they are coded differently."""
        if torch.device(device).type == "cpu" or not self.is_uniform:
            return self
        return self.joined().to(device)

    @property
    def is_uniform(self) -> bool:
        """Whether all rows are stored, and coded in one way."""
        held = [self._storages[source] for source in self._sources.unique().tolist()]
        return None not in held and len({storage.kind for storage in held}) <= 1

    def joined(self) -> Storage:
        """All rows in one storage in RAM, with the bytes that they have.

        Raises ValueError if they are coded in different ways.
        """
        if not self.is_uniform:
            raise ValueError("these documents are stored in different numbers of bits and cannot be joined")
        parts = list(self._gathered(torch.arange(len(self))))
        return parts[0][1] if parts else self._like.gathered([])

    def settings(self) -> dict | None:
        """See `PackedRows.settings`; None for dense vectors."""
        return self._like.settings()

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file holds, by the ending of its name; read from the segments."""
        return self.joined().tensors()

    def _let_go(self, current: set[int]) -> None:
        """Releases what was read before the segments that are read now, once it is much."""
        left = [self._storages[source] for source in self._read_through - current]
        left = [storage for storage in left if storage is not None]
        self._read_through |= current
        if sum(storage.nbytes for storage in left) > RESIDENT_BYTES:
            for storage in left:
                for tensor in storage.tensors().values():
                    release(tensor)
            self._read_through = set(current)

    def _read(self, rows: torch.Tensor, method: str) -> torch.Tensor:
        parts = list(self._gathered(rows))
        read = [
            self._restore(rows[where]) if storage is None else getattr(storage, method)(0, len(storage))
            for where, storage in parts
        ]
        if len(read) == 1:
            return read[0]
        result = torch.empty(len(rows), self.width, dtype=self.dtype)
        for (where, _), vectors in zip(parts, read):
            result[where] = vectors
        return result

    def _gathered(self, rows: torch.Tensor) -> Iterator[tuple[torch.Tensor, Storage | None]]:
        """The storages in which `rows` are: which of them, in order, and their bytes; by kind of coding."""
        runs = torch.searchsorted(self._first, rows, right=True) - 1
        sources = self._sources[runs]
        stored = self._starts[runs] + rows - self._first[runs]
        kinds: dict[object, list[int]] = {}
        for source in sources.unique().tolist():
            storage = self._storages[source]
            kinds.setdefault(storage if storage is None else storage.kind, []).append(source)
        for kind, members in kinds.items():
            where = torch.isin(sources, torch.tensor(members)).nonzero().squeeze(1)
            if kind is None:
                yield where, None
                continue
            own, places = sources[where], stored[where]
            pieces = [(self._storages[member], own == member, places) for member in members]
            yield where, self._storages[members[0]].gathered(pieces)
