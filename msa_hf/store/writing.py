"""One commit with new documents: encode, write a segment, then name it in the database."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from . import database, lexical_view, records, segments
from .coding import FULL
from .drafts import Draft
from .journal import Journal
from .records import Version
from .segments import Segment

if TYPE_CHECKING:
    from .store import MemoryStore

# Small segments are joined when there are FANOUT of a size, unless that would rewrite much of the store.
FANOUT = 8
MERGED_BYTES, MERGED_SHARE = 1 << 18, 0.004


def write_commit(
    store: MemoryStore,
    kind: str,
    drafts: Sequence[Draft],
    died: Sequence[int] = (),
    batch_tokens: int | None = None,
    progress: bool = False,
) -> int:
    """Stores documents, and ends the lives of versions, in one commit; its number."""
    with store.reads() as connection:
        first = records.next_version(connection)
        known = [_same_text(connection, draft) for draft in drafts]
    ids = range(first, first + len(drafts))
    fresh = [number for number, version in enumerate(known) if version is None]
    segment, kept = None, []
    if fresh:
        texts, numbers = [drafts[number].text for number in fresh], [ids[number] for number in fresh]
        segment = encoded(store, texts, numbers, batch_tokens, progress)
        kept = _small_segments(store, segment)
    with Rewriting(store) as rewriting:
        places: dict[int, tuple[int, int, int]] = {}
        if segment is not None:
            number = rewriting.write(kept, segment)
            counts = segment.token_counts.tolist()
            places = {index: (number, len(kept) + place, counts[place]) for place, index in enumerate(fresh)}
        with database.transaction(store._connection):
            rewriting.record()
            rows = []
            for index, (draft, version) in enumerate(zip(drafts, known)):
                if version is None:
                    where, position, tokens = places[index]
                else:
                    where, position, tokens = version.segment, version.position, version.tokens
                    where, position = rewriting.moved.get(version.id, (where, position))
                own = Version(
                    ids[index], draft.namespace, draft.document, draft.sha256, tokens, where, position
                )
                records.insert(store._connection, own, draft.text, draft.metadata)
                rows.append((ids[index], draft.text))
            lexical_view.add_texts(store._connection, rows)
            version = Journal(store._connection).append(kind, list(ids), died)
    store.committed(version)
    return version


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
    ones, and the store is as it was.
    """

    def __init__(self, store: MemoryStore):
        self.store = store
        self.moved: dict[int, tuple[int, int]] = {}
        self._files: list[tuple[int, segments.SegmentFile]] = []
        self._left: set[int] = set()
        self._removed: list[tuple[int, str]] = []

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
        connection = self.store._connection
        for number, file in self._files:
            records.insert_segment(connection, number, file)
        records.move(connection, self.moved)
        self._removed = records.remove_unused(connection, sorted(self._left))
        if self._removed or self.moved:
            database.put(connection, "epoch", (database.read(connection, "epoch") or 0) + 1)

    def __exit__(self, kind, error, trace) -> None:
        folder = self.store.path / database.SEGMENTS
        if kind is not None:
            for _, file in self._files:
                (folder / file.name).unlink(missing_ok=True)
            return
        self.store.drop_segments([number for number, _ in self._removed])
        for _, name in self._removed:
            (folder / name).unlink(missing_ok=True)


def _same_text(connection, draft: Draft) -> Version | None:
    """A version of the document, of whatever age, whose vectors are those of the draft."""
    versions = records.versions_of(connection, draft.namespace, draft.document)
    return next((own for own in versions if own.sha256 == draft.sha256), None)


def _small_segments(store: MemoryStore, fresh: Segment) -> list[Version]:
    """All versions in the small segments that a new one takes in."""
    with store.reads() as connection:
        files = records.segment_files(connection)
        limit = max(MERGED_BYTES, MERGED_SHARE * sum(file.bytes for file in files.values()))
        candidates = {number: file for number, file in files.items() if file.tier == FULL}
        documents, size, chosen = len(fresh.token_counts), 0, set()
        while True:
            peers = [
                number
                for number, file in candidates.items()
                if number not in chosen and file.documents <= documents
            ]
            added = sum(candidates[number].bytes for number in peers)
            if len(peers) < FANOUT - 1 or size + added > limit:
                break
            chosen |= set(peers)
            size += added
            documents += sum(candidates[number].documents for number in peers)
        return records.in_segments(connection, sorted(chosen)) if chosen else []
