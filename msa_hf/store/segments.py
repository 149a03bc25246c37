"""Segments: immutable safetensors files with the vectors of some documents, memory-mapped when read.

A file is complete and on the disk before the database names it, and is never changed afterwards. Axis
letters: n documents, N documents of a selection.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..modeling.errors import MemoryFormatError
from ..modeling.memory_bank import DenseVectors, chunk_counts, first_rows
from ..modeling.memory_files import check_file_name, check_size, file_sha256, write_tensors
from ..modeling.packed_vectors import PackedRows
from .coding import FULL, TIERS, Coding, Key
from .database import SEGMENTS, sync_folder
from .errors import translated
from .vectors import SegmentedRows, Storage

# Tokens of a segment that compaction makes: at 4 bits some 300 MB.
SEGMENT_TOKENS = 1 << 23


@dataclass(frozen=True)
class SegmentFile:
    """A row of the table `segments`; sha256 is that of the whole file."""

    name: str
    bytes: int
    sha256: bytes
    documents: int
    tier: int


@dataclass
class Segment:
    """The vectors of n documents: token counts [n] int64, and storages by layer and name (None: dropped)."""

    token_counts: torch.Tensor
    storages: dict[Key, Storage | None]
    coding: Coding
    tier: int = FULL

    def __post_init__(self):
        settings = self.coding.provenance.settings
        self._first = {
            size: first_rows(chunk_counts(self.token_counts, size))
            for size in (settings.chunk_size, settings.router_chunk_size)
        }

    def first_rows(self, name: str) -> torch.Tensor:
        """[n + 1]: where the rows of each document begin in the vectors of that name."""
        return self._first[chunk_size(self.coding, name)]

    def recoded(self, tier: int) -> "Segment":
        """The same documents as another tier keeps them."""
        storages = {
            key: None if own is None else self.coding.recode(key, own, tier)
            for key, own in self.storages.items()
        }
        return Segment(self.token_counts, storages, self.coding, tier)


def chunk_size(coding: Coding, name: str) -> int:
    settings = coding.provenance.settings
    return settings.router_chunk_size if name == "router_keys" else settings.chunk_size


def rows_of(
    segments: Sequence[Segment], sources: torch.Tensor, positions: torch.Tensor, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of documents [N] at `positions` of the segments numbered `sources`: their first rows, and how many."""
    starts, counts = torch.zeros_like(positions), torch.zeros_like(positions)
    for number, segment in enumerate(segments):
        own = sources == number
        first = segment.first_rows(name)
        starts[own] = first[positions[own]]
        counts[own] = first[positions[own] + 1] - starts[own]
    return starts, counts


def join(segments: Sequence[Segment], sources: torch.Tensor, positions: torch.Tensor) -> Segment:
    """One segment, in RAM, of documents [N] of segments of one tier; arguments as of `rows_of`."""
    first = segments[0]
    tokens = torch.zeros_like(positions)
    for number, segment in enumerate(segments):
        own = positions[sources == number]
        if (own >= len(segment.token_counts)).any():
            raise MemoryFormatError("a segment of the store does not hold the documents that it should")
        tokens[sources == number] = segment.token_counts[own]
    storages: dict[Key, Storage | None] = {}
    for key, like in first.storages.items():
        storages[key] = None
        if like is not None:
            starts, counts = rows_of(segments, sources, positions, key[1])
            parts = [own.storages[key] for own in segments]
            storages[key] = SegmentedRows(parts, sources, starts, counts, like).joined()
    return Segment(tokens, storages, first.coding, first.tier)


def write(folder: Path, segment: Segment) -> SegmentFile:
    """Writes a segment of the store in `folder`; see `write_file`."""
    return write_file(folder / SEGMENTS / f"segment-{uuid.uuid4().hex}.safetensors", segment)


def write_file(path: Path, segment: Segment) -> SegmentFile:
    """Writes a segment and waits until it is on the disk.

    Raises StoreWriteError, leaving no file behind, where the disk refuses.
    """
    tensors = {"token_counts": segment.token_counts}
    for (layer, kind), storage in segment.storages.items():
        if storage is not None:
            ends = storage.tensors()
            tensors |= {f"layers.{layer}.{kind}{end}": ends[end] for end in _endings(storage)}
    with translated(path.parent):
        try:
            write_tensors(path, tensors)
            sync_folder(path.parent)
            digest, size = bytes.fromhex(file_sha256(path)), path.stat().st_size
            return SegmentFile(path.name, size, digest, len(segment.token_counts), segment.tier)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def read(folder: Path, file: SegmentFile, coding: Coding) -> Segment:
    """A segment of the store in `folder`; see `read_file`."""
    return read_file(folder / SEGMENTS, file, coding)


def read_file(folder: Path, file: SegmentFile, coding: Coding) -> Segment:
    """The segment in a file, memory-mapped: nothing but its header and token counts is read.

    Raises MemoryFormatError if the file is missing, cut off, or not what is known about it.
    """
    path = folder / check_file_name(file.name, "the index")
    try:
        check_size(path, file.bytes)
        if file.tier not in TIERS:
            raise ValueError(f"tier must be one of {TIERS}; got {file.tier!r}")
        tensors = load_file(path)
        counts = tensors.pop("token_counts")
        if counts.dtype != torch.int64 or counts.shape != (file.documents,) or (counts < 0).any():
            raise ValueError(f"token_counts must be {file.documents} non-negative int64; got {counts.shape}")
        if len(counts) and int(counts.max()) > 1 << 31:
            raise ValueError(f"token_counts must be below 2**31; got {int(counts.max())}")
        storages = {key: _storage(key, tensors, counts, coding, file.tier) for key in coding.keys}
        if tensors:
            raise ValueError(f"unknown tensors: {', '.join(sorted(tensors))}")
    except MemoryFormatError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError, OSError, RuntimeError) as error:
        raise MemoryFormatError(
            f"the segment {path} is damaged: {error!r}. Restore a copy, or re-encode its documents"
        ) from error
    return Segment(counts, storages, coding, file.tier)


def _storage(
    key: Key, tensors: dict[str, torch.Tensor], counts: torch.Tensor, coding: Coding, tier: int
) -> Storage | None:
    """The storage of `key`, whose tensors are taken out of `tensors`; shapes must follow from the counts."""
    like = coding.empty(key, tier)
    if like is None:
        return None
    rows, stored = int(chunk_counts(counts, chunk_size(coding, key[1])).sum()), []
    for end in _endings(like):
        name, expected = f"layers.{key[0]}.{key[1]}{end}", like.tensors()[end]
        tensor = tensors.pop(name)
        if tensor.dtype != expected.dtype or tuple(tensor.shape) != (rows, *expected.shape[1:]):
            raise ValueError(
                f"{name} must be {expected.dtype} of shape {(rows, *expected.shape[1:])}; got {tensor.dtype} "
                f"{tuple(tensor.shape)}"
            )
        stored.append(tensor)
    if isinstance(like, DenseVectors):
        return DenseVectors(*stored)
    return PackedRows(like.coder, *stored, like.dtype)


def _endings(storage: Storage) -> tuple[str, ...]:
    """Of the tensors with one entry per row; means and gains are the store's."""
    return ("",) if isinstance(storage, DenseVectors) else (".codes", ".scales")
