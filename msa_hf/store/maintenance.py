"""What keeps a store sound and small: recovery after a crash, erasure, compaction."""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import database, lexical_view, records, segments, view
from .errors import StoreLockedError, UnknownDocumentError
from .journal import Journal
from .records import Version
from .rewriting import Rewriting

if TYPE_CHECKING:
    from .store import MemoryStore

SCRUB_PATIENCE = 5.0  # seconds to wait for readers


def recover(store: MemoryStore) -> None:
    """After a crash: removes files that no commit names, and finishes an erasure that was begun."""
    with store.reads() as connection:
        unfinished = database.read(connection, "erasing")
    remove_strays(store)
    database.versions_being_read(store.path)
    if unfinished:
        scrub(store)


def remove_strays(store: MemoryStore) -> None:
    """Removes files of vectors that no commit names."""
    with store.reads() as connection:
        known = {file.name for file in records.segment_files(connection).values()}
    for path in (store.path / database.SEGMENTS).glob("*"):
        if path.name not in known:
            path.unlink()


def forget(store: MemoryStore, documents: Sequence[str], namespace: str) -> None:
    """See `MemoryStore.forget`."""
    with store.reads() as connection:
        salt = database.read(connection, "salt")
        gone: list[Version] = []
        for document in documents:
            versions = records.versions_of(connection, namespace, document)
            if not versions:
                raise UnknownDocumentError(
                    f"nothing is known of a document {document!r} in namespace {namespace!r}"
                )
            gone += versions
    if not gone:
        return
    _erase(store, gone, "forget", [tombstone(salt, namespace, document) for document in documents])
    scrub(store)


def tombstone(salt: bytes, namespace: str, document: str) -> bytes:
    """What is left of a document: a hash of its name that means nothing without the store's salt."""
    own = hashlib.sha256(salt)
    for part in (namespace, document):
        own.update(len(part.encode()).to_bytes(8, "little") + part.encode())
    return own.digest()


def compact(store: MemoryStore, history: bool) -> None:
    """See `MemoryStore.compact`."""
    if not history:
        _drop_history(store)
    with store.reads() as connection:
        files = records.segment_files(connection)
        versions = records.in_segments(connection, sorted(files))
    with Rewriting(store) as rewriting:
        for kept in _portions(versions, files):
            rewriting.write(kept)
        with database.transaction(store.connection):
            rewriting.leave(sorted(files))
            rewriting.record()
            database.put(store.connection, "erasing", True)
    scrub(store)
    store.committed(store.version)


def scrub(store: MemoryStore) -> None:
    """Rewrites the database's files and removes strays, so that nothing is left of what was deleted.

    Raises StoreLockedError if readers do not let go of the old pages; the next writer tries again.
    """
    connection = store.connection
    remove_strays(store)
    with database.transaction(connection):
        lexical_view.scrub(connection)
    connection.execute("VACUUM")
    deadline = time.monotonic() + SCRUB_PATIENCE
    while _checkpoint(connection):
        if time.monotonic() > deadline:
            raise StoreLockedError(
                f"what was erased from {store.path} is deleted, but a reader still holds old pages of the "
                "database: call scrub() when it has gone"
            )
        time.sleep(0.05)
    with database.transaction(connection):
        database.put(connection, "erasing", False)
    _checkpoint(connection)


def _erase(store: MemoryStore, gone: list[Version], kind: str, proofs: Sequence[bytes] = ()) -> None:
    """Removes versions from the database and their vectors from the segments; a commit without a way back."""
    lost = {version.id for version in gone}
    numbers = sorted({version.segment for version in gone})
    with store.reads() as connection:
        kept = [version for version in records.in_segments(connection, numbers) if version.id not in lost]
        visible = set(view.visible(connection, store.version, None).ids.tolist())
        texts = [
            row
            for start in range(0, len(gone), view.PORTION)
            for row in records.texts(
                connection, [version.id for version in gone[start : start + view.PORTION]]
            )
        ]
    with Rewriting(store) as rewriting:
        for number in numbers:
            own = [version for version in kept if version.segment == number]
            if own:
                rewriting.write(own)
        with database.transaction(store.connection):
            lexical_view.remove_texts(store.connection, texts)
            version = Journal(store.connection).append(kind, died=sorted(lost & visible), root=True)
            records.erase(store.connection, sorted(lost))
            for version_row in {(own.namespace, own.document) for own in gone}:
                records.forget_use(store.connection, *version_row)
            for proof in proofs:
                records.add_tombstone(store.connection, proof, time.time())
            rewriting.leave(numbers)
            rewriting.record()
            database.put(store.connection, "erasing", True)
            if kind == "compact":
                database.put(store.connection, "oldest", version)
    store.committed(version)


def _drop_history(store: MemoryStore) -> None:
    """Erases versions that nobody sees: neither the newest state nor a reader that is open."""
    with store.reads() as connection:
        seen: set[int] = set()
        for at in {store.version, *database.versions_being_read(store.path)}:
            seen |= set(view.visible(connection, at, None).ids.tolist())
        gone = [own for own in records.all_versions(connection) if own.id not in seen]
    _erase(store, gone, "compact")


def _portions(versions: list[Version], files: dict[int, segments.SegmentFile]) -> list[list[Version]]:
    """Versions in segments of a convenient size; those of one tier together."""
    portions: list[list[Version]] = []
    for tier in sorted({file.tier for file in files.values()}):
        portion, tokens = [], 0
        for version in versions:
            if files[version.segment].tier != tier:
                continue
            portion.append(version)
            tokens += version.tokens
            if tokens >= segments.SEGMENT_TOKENS:
                portions.append(portion)
                portion, tokens = [], 0
        if portion:
            portions.append(portion)
    return portions


def _checkpoint(connection: sqlite3.Connection) -> bool:
    """Moves the write-ahead log into the database and empties it; whether readers were in the way."""
    return bool(connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0])
