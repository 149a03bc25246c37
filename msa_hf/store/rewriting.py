"""New segments out of old ones and newly encoded texts, which replace the old ones in one transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from . import database, records, segments
from .records import Version
from .segments import Segment

if TYPE_CHECKING:
    from .store import MemoryStore


def encoded(
    store: MemoryStore,
    texts: list[str],
    numbers: list[int],
    batch_tokens: int | None = None,
    progress: bool = False,
) -> Segment:
    """The vectors of texts, which are the versions `numbers`, as the store codes them."""
    bank = store.coding.pack(store.encode(texts, numbers, batch_tokens, progress))
    storages = {key: getattr(bank.layers[key[0]], key[1]) for key in store.coding.keys}
    return Segment(bank.token_counts, storages, store.coding)


class Rewriting:
    """Segments that are being written, and those that they replace.

    Leaving the block without an error removes the replaced files; leaving it with one removes the new
    ones, and the store is as it was. A file that cannot be removed does no harm: it belongs to no commit,
    and the next `maintenance.remove_strays` is for it.
    """

    def __init__(self, store: MemoryStore):
        self.store = store
        self.moved: dict[int, tuple[int, int]] = {}
        self._files: list[tuple[int, segments.SegmentFile]] = []
        self._left: set[int] = set()
        self._removed: list[tuple[int, str]] = []
        self._recorded = False

    def __enter__(self) -> Rewriting:
        with self.store.reads() as connection:
            self._next = records.next_segment(connection)
        return self

    def write(self, kept: Sequence[Version], fresh: Segment | None = None, tier: int | None = None) -> int:
        """Writes a segment of what is stored of `kept`, all of one tier, then of `fresh`; its number.

        Args:
            tier: in which the vectors are to be; by default their own.
        """
        parts = []
        if kept:
            numbers = sorted({version.segment for version in kept})
            opened = [self.store.segment(number) for number in numbers]
            sources = torch.tensor([numbers.index(version.segment) for version in kept])
            parts.append(segments.join(opened, sources, torch.tensor([version.position for version in kept])))
        if fresh is not None:
            parts.append(fresh)
        sources = torch.repeat_interleave(torch.tensor([len(part.token_counts) for part in parts]))
        positions = torch.cat([torch.arange(len(part.token_counts)) for part in parts])
        segment = parts[0] if len(parts) == 1 else segments.join(parts, sources, positions)
        if tier is not None:
            segment = segment.recoded(tier)
        number = self._next
        self._next += 1
        self._files.append((number, segments.write(self.store.path, segment)))
        self.place(kept, number)
        return number

    def place(self, versions: Sequence[Version], number: int) -> None:
        """Says that these versions are now those of segment `number`, in order."""
        self.moved |= {version.id: (number, place) for place, version in enumerate(versions)}
        self._left |= {version.segment for version in versions}

    def leave(self, numbers: Sequence[int]) -> None:
        """Segments that may be of no use any more."""
        self._left |= set(numbers)

    def record(self) -> None:
        """Tells the database, in the caller's transaction, about the new segments and who moved there."""
        connection = self.store.connection
        self._recorded = True
        for number, file in self._files:
            records.insert_segment(connection, number, file)
        records.move(connection, self.moved)
        self._removed = records.remove_unused(connection, sorted(self._left))
        if self._removed or self.moved:
            database.put(connection, "epoch", self._epoch() + 1)

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.store.drop_segments([number for number, _ in self._removed])
            self._discard(name for _, name in self._removed)
        elif not self._recorded or self._overwrite():
            self._discard(file.name for _, file in self._files)

    def _overwrite(self) -> bool:
        """Whether the failed commit cannot come back.

        If the disk failed after its last page was written, a crash would bring it back, and it would name the
        new files; another commit takes its place in the write-ahead log.
        """
        try:
            with database.transaction(self.store.connection):
                database.put(self.store.connection, "epoch", self._epoch() + 1)
        except sqlite3.Error:
            return False
        return True

    def _epoch(self) -> int:
        return database.read(self.store.connection, "epoch") or 0

    def _discard(self, names: Iterable[str]) -> None:
        for name in names:
            with suppress(OSError):
                (self.store.path / database.SEGMENTS / name).unlink()
