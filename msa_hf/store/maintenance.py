"""What keeps a store sound and small: recovery, erasure, compaction, verification, statistics."""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..modeling.errors import MemoryFormatError
from ..modeling.memory_files import file_sha256
from . import database, lexical_view, records, segments, view
from .errors import StoreLockedError, UnknownDocumentError
from .journal import Journal
from .records import Version
from .writing import Rewriting

if TYPE_CHECKING:
    from .store import MemoryStore

SCRUB_PATIENCE = 5.0  # seconds to wait for readers


def recover(store: MemoryStore) -> None:
    """After a crash: removes files that no commit names, and finishes an erasure that was begun."""
    with store.reads() as connection:
        known = {file.name for file in records.segment_files(connection).values()}
        unfinished = database.read(connection, "erasing")
    for path in (store.path / database.SEGMENTS).glob("*"):
        if path.name not in known:
            path.unlink()
    database.versions_being_read(store.path)
    if unfinished:
        scrub(store)


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
        with database.transaction(store._connection):
            rewriting.leave(sorted(files))
            rewriting.record()
            database.put(store._connection, "erasing", True)
    scrub(store)
    store.committed(store.version)


def scrub(store: MemoryStore) -> None:
    """Rewrites the database's files, so that they hold nothing of what was deleted.

    Raises StoreLockedError if readers do not let go of the old pages; the next writer tries again.
    """
    connection = store._connection
    with database.transaction(connection):
        lexical_view.scrub(connection)
    connection.execute("VACUUM")
    deadline = time.monotonic() + SCRUB_PATIENCE
    while _checkpoint(connection):
        if time.monotonic() > deadline:
            raise StoreLockedError(
                f"what was erased from {store.path} is deleted, but a reader still holds old pages of the database: "
                "call scrub() when it has gone"
            )
        time.sleep(0.05)
    with database.transaction(connection):
        database.put(connection, "erasing", False)
    _checkpoint(connection)


def verify(store: MemoryStore) -> list[str]:
    """See `MemoryStore.verify`."""
    problems: list[str] = []
    connection = store._connection
    for check in (_check_pages, _check_words, _check_journal, _check_versions):
        try:
            problems += check(connection)
        except (sqlite3.Error, MemoryFormatError) as error:
            problems.append(f"{database.FILE}: {error}")
    try:
        files = records.segment_files(connection)
    except (sqlite3.Error, TypeError) as error:
        return [*problems, f"{database.FILE}: the table of segments cannot be read: {error}"]
    for number, file in files.items():
        problems += _check_segment(store, number, file)
    names = {file.name for file in files.values()}
    strangers = sorted(
        path.name for path in (store.path / database.SEGMENTS).glob("*") if path.name not in names
    )
    return problems + [f"{database.SEGMENTS}/{name}: belongs to no commit" for name in strangers]


def stats(store: MemoryStore) -> dict[str, Any]:
    """See `MemoryStore.stats`."""
    connection = store._connection
    files = records.segment_files(connection)
    now = view.visible(connection, store.version, None)
    tiers = {number: file.tier for number, file in files.items()}
    by_tier = [0, 0, 0]
    for segment in now.segments.tolist():
        by_tier[tiers.get(segment, 0)] += 1
    kept = connection.execute("SELECT count(*) FROM versions").fetchone()[0]
    text_bytes = connection.execute(
        "SELECT coalesce(sum(length(CAST(text AS BLOB))), 0) FROM contents"
    ).fetchone()[0]
    database_bytes = sum(path.stat().st_size for path in store.path.glob(f"{database.FILE}*"))
    vectors, tokens = sum(file.bytes for file in files.values()), int(now.tokens.sum())
    return {
        "version": store.version,
        "documents": len(now),
        "tokens": tokens,
        "namespaces": records.count_by_namespace(connection, store.version),
        "versions": kept,
        "segments": len(files),
        "vector_bytes": vectors,
        "database_bytes": database_bytes,
        "text_bytes": text_bytes,
        "bytes_per_token": (vectors + database_bytes) / max(1, tokens),
        **{f"{name}_bits": bits for name, bits in store.provenance.bits.items()},
        "budget_bytes": database.read(connection, "budget_bytes"),
        "documents_in_full": by_tier[0],
        "documents_in_fewer_bits": by_tier[1],
        "documents_as_text": by_tier[2],
        "forgotten": connection.execute("SELECT count(*) FROM tombstones").fetchone()[0],
        "router_layers": list(store.provenance.settings.router_layers),
        "chunk_size": store.provenance.settings.chunk_size,
        "router_chunk_size": store.provenance.settings.router_chunk_size,
    }


def _erase(store: MemoryStore, gone: list[Version], kind: str, proofs: Sequence[bytes] = ()) -> None:
    """Removes versions from the database and their vectors from the segments; a commit without a way back."""
    lost = {version.id for version in gone}
    numbers = sorted({version.segment for version in gone})
    with store.reads() as connection:
        kept = [version for version in records.in_segments(connection, numbers) if version.id not in lost]
        files = records.segment_files(connection)
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
        with database.transaction(store._connection):
            lexical_view.remove_texts(store._connection, texts)
            version = Journal(store._connection).append(kind, died=sorted(lost & visible), root=True)
            records.erase(store._connection, sorted(lost))
            for version_row in {(own.namespace, own.document) for own in gone}:
                records.forget_use(store._connection, *version_row)
            for proof in proofs:
                records.add_tombstone(store._connection, proof, time.time())
            rewriting.leave(numbers)
            rewriting.record()
            database.put(store._connection, "erasing", True)
    store.committed(version)


def _drop_history(store: MemoryStore) -> None:
    """Erases versions that nobody sees: neither the newest state nor a reader that is open."""
    with store.reads() as connection:
        seen: set[int] = set()
        for at in {store.version, *database.versions_being_read(store.path)}:
            seen |= set(view.visible(connection, at, None).ids.tolist())
        gone = [own for own in records.all_versions(connection) if own.id not in seen]
    _erase(store, gone, "compact")
    with database.transaction(store._connection):
        database.put(store._connection, "oldest", store.version)


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


def _check_pages(connection: sqlite3.Connection) -> list[str]:
    rows = [row[0] for row in connection.execute("PRAGMA integrity_check(20)")]
    return [] if rows == ["ok"] else [f"{database.FILE}: {row}" for row in rows]


def _check_words(connection: sqlite3.Connection) -> list[str]:
    return [f"{database.FILE}: {problem}" for problem in lexical_view.check(connection)]


def _check_journal(connection: sqlite3.Connection) -> list[str]:
    problems = []
    statements = {
        "a life of a version that is not there": "SELECT count(*) FROM lives WHERE version NOT IN (SELECT id FROM versions)",
        "a document that is there twice": "SELECT count(*) FROM (SELECT 1 FROM lives JOIN versions ON id = version "
        "WHERE died IS NULL GROUP BY namespace, document HAVING count(*) > 1)",
        "a life that ends before it begins": "SELECT count(*) FROM lives WHERE died <= born",
        "a version without content": "SELECT count(*) FROM versions WHERE id NOT IN (SELECT version FROM contents)",
        "a version in an unknown segment": "SELECT count(*) FROM versions WHERE segment NOT IN (SELECT id FROM segments)",
    }
    for what, statement in statements.items():
        count = connection.execute(statement).fetchone()[0]
        if count:
            problems.append(f"{database.FILE}: {what} ({count} times)")
    journal = Journal(connection)
    journal.newest()
    return problems


def _check_versions(connection: sqlite3.Connection) -> list[str]:
    """Every text against its SHA-256, and all metadata."""
    ids = [row[0] for row in connection.execute("SELECT id FROM versions ORDER BY id")]
    for start in range(0, len(ids), view.PORTION):
        wanted = ids[start : start + view.PORTION]
        list(records.texts(connection, wanted))
        list(records.metadata(connection, wanted))
    return []


def _check_segment(store: MemoryStore, number: int, file: segments.SegmentFile) -> list[str]:
    where = f"{database.SEGMENTS}/{file.name}"
    try:
        segment = segments.read(store.path, file, store.coding)
        if bytes.fromhex(file_sha256(store.path / database.SEGMENTS / file.name)) != file.sha256:
            return [f"{where}: damaged, its SHA-256 differs"]
        held = segment.token_counts.tolist()
        rows = records.in_segments(store._connection, [number])
        if any(not 0 <= own.position < len(held) or held[own.position] != own.tokens for own in rows):
            return [f"{where}: does not hold the documents that the database says"]
    except (MemoryFormatError, OSError, TypeError) as error:
        return [f"{where}: {error}"]
    return []
