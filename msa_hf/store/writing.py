"""One commit with new documents: their vectors are written first, then the database names them."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from . import budget, database, lexical_view, records
from .coding import FULL
from .drafts import Draft
from .errors import DocumentExistsError
from .journal import Journal
from .records import Version
from .rewriting import Rewriting
from .segments import Segment

if TYPE_CHECKING:
    from .store import MemoryStore

IF_EXISTS = ("error", "update", "keep")

VectorsOf = Callable[[list[Draft], list[int]], Segment]  # of drafts, which get these numbers as versions

# Small segments are joined when there are FANOUT of a size, unless that would rewrite much of the store.
FANOUT = 8
MERGED_BYTES, MERGED_SHARE = 1 << 18, 0.004


def store_drafts(store: MemoryStore, drafts: Sequence[Draft], if_exists: str, vectors: VectorsOf) -> None:
    """Stores the drafts that the store does not have yet, in one commit; see `MemoryStore.add`."""
    if if_exists not in IF_EXISTS:
        raise ValueError(f"if_exists must be one of {', '.join(IF_EXISTS)}; got {if_exists!r}")
    new, died = [], []
    with store.reads() as connection:
        for draft in {(draft.namespace, draft.document): draft for draft in drafts}.values():
            found = records.find(connection, store.version, draft.namespace, draft.document)
            if found is not None:
                if if_exists == "keep" or _is_stored(connection, found, draft):
                    continue
                if if_exists == "error":
                    raise DocumentExistsError(
                        f"document {draft.document!r} exists in namespace {draft.namespace!r} with another "
                        "content: update it, or add with if_exists='update'"
                    )
                died.append(found.id)
            new.append(draft)
    if new:
        _commit(store, "update" if len(died) == len(new) else "add", new, died, vectors)
        budget.enforce(store)


def _commit(store: MemoryStore, kind: str, drafts: list[Draft], died: list[int], vectors: VectorsOf) -> None:
    """Documents that appear, and versions that they replace, in one commit."""
    numbered = store.provenance.settings.prompt_format == "msa"  # then vectors are those of one version alone
    with store.reads() as connection:
        first = records.next_version(connection)
        known = [None if numbered else _same_text(connection, draft) for draft in drafts]
    ids = range(first, first + len(drafts))
    fresh = [number for number, version in enumerate(known) if version is None]
    segment, kept = None, []
    if fresh:
        segment = vectors([drafts[number] for number in fresh], [ids[number] for number in fresh])
        kept = _small_segments(store, segment)
    with Rewriting(store) as rewriting:
        places: dict[int, tuple[int, int, int]] = {}
        if segment is not None:
            number, counts = rewriting.write(kept, segment), segment.token_counts.tolist()
            places = {index: (number, len(kept) + place, counts[place]) for place, index in enumerate(fresh)}
        for index, version in enumerate(known):
            if version is not None:
                where = rewriting.moved.get(version.id, (version.segment, version.position))
                places[index] = (*where, version.tokens)
        with database.transaction(store.connection):
            rewriting.record()
            for index, draft in enumerate(drafts):
                segment_number, position, tokens = places[index]
                own = Version(
                    ids[index],
                    draft.namespace,
                    draft.document,
                    draft.sha256,
                    tokens,
                    segment_number,
                    position,
                )
                records.insert(store.connection, own, draft.text, draft.metadata)
            texts = zip(ids, (draft.text for draft in drafts))
            lexical_view.add_texts(store.connection, texts)
            version = Journal(store.connection).append(kind, list(ids), died)
    store.committed(version)


def _is_stored(connection: sqlite3.Connection, found: Version, draft: Draft) -> bool:
    if found.sha256 != draft.sha256:
        return False
    stored = dict(records.metadata(connection, [found.id])).get(found.id)
    return stored is not None and records.as_json(stored) == records.as_json(draft.metadata)


def _same_text(connection: sqlite3.Connection, draft: Draft) -> Version | None:
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
