"""From a state of the store to a MemoryBank: the visible documents of some namespaces, and nothing else.

Axis letters: N documents of the view.
"""

import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, overload

import numpy as np
import torch

from ..modeling.errors import MemoryFormatError
from ..modeling.memory_bank import LayerMemory, MemoryBank, first_rows
from ..modeling.memory_files import NAMES
from . import records
from .coding import FULL, Coding, Key
from .errors import Guard, HistoryError, StoreModelError
from .lexical_view import LexicalView
from .segments import Segment, rows_of
from .vectors import SegmentedRows, Storage

PORTION = 512  # texts read from the database at once


@dataclass(frozen=True)
class VisibleVersions:
    """What a query may see, in ascending order of version: int64 arrays [N]."""

    ids: np.ndarray
    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def keep(self, chosen: np.ndarray) -> "VisibleVersions":
        """Those where `chosen` [N] is true."""
        return VisibleVersions(
            *(own[chosen] for own in (self.ids, self.tokens, self.segments, self.positions))
        )


class StoredTexts(Sequence[str]):
    """The texts of a view, read from the database when they are asked for."""

    def __init__(self, connection: sqlite3.Connection, lock: Guard, versions: np.ndarray):
        self._connection, self._lock, self._versions = connection, lock, versions

    def __len__(self) -> int:
        return len(self._versions)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return list(self._read(self._versions[index]))
        return next(self._read(self._versions[[index]]))

    def __iter__(self) -> Iterator[str]:
        return self._read(self._versions)

    def _read(self, versions: np.ndarray) -> Iterator[str]:
        for start in range(0, len(versions), PORTION):
            wanted = versions[start : start + PORTION].tolist()
            with self._lock:
                found = dict(records.texts(self._connection, wanted))
            for version in wanted:
                if version not in found:
                    raise HistoryError(
                        "this document was erased from the store; refresh() shows what is there"
                    )
                yield found[version]


class StoredNotes(Sequence[dict]):
    """{"id", "namespace", "title", "source"} of each document of a view, read when asked for."""

    def __init__(self, connection: sqlite3.Connection, lock: Guard, versions: np.ndarray):
        self._connection, self._lock, self._versions = connection, lock, versions

    def __len__(self) -> int:
        return len(self._versions)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        with self._lock:
            namespace, document, metadata = records.note(self._connection, int(self._versions[index]))
        title, source = (metadata.get(name) for name in ("title", "source"))
        notes = {"id": document, "namespace": namespace}
        return notes | {"title": str(title or ""), "source": str(source or "")}


class StoredWords(LexicalView):
    """BM25 of a view; raises HistoryError, and not that the index is damaged, once a document was erased."""

    def _best(self, words: list[str], limit: int) -> list[tuple[int, float]]:
        try:
            return super()._best(words, limit)
        except MemoryFormatError as error:
            portions = (self._versions[start : start + PORTION] for start in range(0, len(self), PORTION))
            kept = sum(records.count_kept(self._database, portion.tolist()) for portion in portions)
            if kept < len(self):
                raise HistoryError(
                    "a document of this bank was erased from the store; ask the store for its bank again"
                ) from error
            raise


def visible(connection: sqlite3.Connection, at: int, namespaces: Sequence[str] | None) -> VisibleVersions:
    """Versions that are visible at commit `at` in `namespaces` (None: in all).

    Raises MemoryFormatError if what the database holds cannot be.
    """
    rows = records.visible_rows(connection, at, namespaces)
    try:
        table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    except (OverflowError, TypeError, ValueError) as error:
        raise MemoryFormatError(f"the store's table of versions is damaged: {error}") from error
    ids, tokens = table[:, 0], table[:, 1]
    if len(table) and (table.min() < 0 or (np.diff(ids) <= 0).any() or tokens.max() > 1 << 31):
        raise MemoryFormatError("the store's table of versions is damaged: numbers out of their range")
    return VisibleVersions(*table.T.copy())


def matching(
    connection: sqlite3.Connection, versions: VisibleVersions, where: Mapping[str, Any]
) -> VisibleVersions:
    """Those whose metadata has, for every name in `where`, the value, or one of a list of values."""
    wanted = {
        name: value if isinstance(value, (list, tuple, set)) else [value] for name, value in where.items()
    }
    chosen = np.zeros(len(versions), dtype=bool)
    for start in range(0, len(versions), PORTION):
        ids = versions.ids[start : start + PORTION].tolist()
        found = dict(records.metadata(connection, ids))
        for offset, version in enumerate(ids):
            own = found.get(version, {})
            chosen[start + offset] = all(
                name in own and any(_same(own[name], value) for value in values)
                for name, values in wanted.items()
            )
    return versions.keep(chosen)


def build_bank(
    connection: sqlite3.Connection,
    lock: Guard,
    versions: VisibleVersions,
    segments: Mapping[int, Segment],
    coding: Coding,
    notes: Mapping[str, Any],
    tokenizer,
    encode=None,
) -> MemoryBank:
    """The bank of the visible versions, on memory-mapped segments.

    Args:
        notes: kept as the bank's metadata.
        encode: texts and their numbers -> a bank coded as the store is; None where there is no model.
    """
    order = sorted(segments)
    opened = [segments[number] for number in order]
    sources = torch.from_numpy(np.searchsorted(np.array(order, dtype=np.int64), versions.segments))
    positions = torch.from_numpy(versions.positions)
    _check_positions(opened, sources, positions, torch.from_numpy(versions.tokens))
    texts = StoredTexts(connection, lock, versions.ids)
    dropped = _Dropped(coding, texts, versions, encode)
    layers = {}
    for layer in coding.provenance.settings.router_layers:
        parts = {}
        for name in NAMES:
            starts, counts = rows_of(opened, sources, positions, name)
            storages = [segment.storages[layer, name] for segment in opened]
            restore = dropped.reader((layer, name), counts)
            like = coding.empty((layer, name), FULL)
            parts[name] = SegmentedRows(storages, sources, starts, counts, like, restore)
        layers[layer] = LayerMemory(**parts)
    bank = MemoryBank(
        documents=texts,
        token_counts=torch.from_numpy(versions.tokens),
        settings=coding.provenance.settings,
        layers=layers,
        head=coding.head,
        fingerprint=coding.provenance.fingerprint,
        metadata={**notes, "documents": StoredNotes(connection, lock, versions.ids)},
        tokenizer=tokenizer,
        means=coding.means,
        numbers=versions.ids.tolist() if coding.provenance.settings.prompt_format == "msa" else None,
    )
    bank.lexical = StoredWords(connection, lock, versions.ids)
    return bank


class _Dropped:
    """Vectors of documents whose keys and values the budget has dropped; encoded when they are chosen."""

    def __init__(self, coding: Coding, texts: StoredTexts, versions: VisibleVersions, encode):
        self.coding, self.texts, self.versions, self.encode = coding, texts, versions, encode
        self.encoded = lru_cache(maxsize=64)(self._encoded)

    def reader(self, key: Key, counts: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """`restore` of `SegmentedRows` for one layer and name; counts [N] of each document's rows."""
        first = first_rows(counts)

        def restore(rows: torch.Tensor) -> torch.Tensor:
            owners = torch.searchsorted(first, rows, right=True) - 1
            parts = [
                self.encoded(owner)[key].take(rows[owners == owner] - first[owner])
                for owner in owners.unique().tolist()
            ]
            return torch.cat(parts)[owners.argsort(stable=True).argsort()]

        return restore

    def _encoded(self, document: int) -> dict[Key, Storage]:
        if self.encode is None:
            raise StoreModelError(
                "the keys and values of a chosen document were dropped to keep to the store's budget: open "
                "the store with its model, which encodes them again"
            )
        bank = self.encode([self.texts[document]], [int(self.versions.ids[document])])
        return {key: getattr(bank.layers[key[0]], key[1]) for key in self.coding.keys}


def _check_positions(
    segments: list[Segment], sources: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor
) -> None:
    for number, segment in enumerate(segments):
        own = sources == number
        held = segment.token_counts
        if (positions[own] >= len(held)).any() or (held[positions[own]] != tokens[own]).any():
            raise MemoryFormatError("a segment of the store does not hold the documents that it should")


def _same(stored: Any, wanted: Any) -> bool:
    """Equality as JSON has it: 1 is not true."""
    return stored == wanted and isinstance(stored, bool) == isinstance(wanted, bool)
