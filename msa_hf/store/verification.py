"""Is every byte of a store what it was, and what does the store consist of?"""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, Any

from ..modeling.errors import MemoryFormatError
from ..modeling.memory_files import file_sha256
from . import database, lexical_view, records, segments, view
from .journal import Journal

if TYPE_CHECKING:
    from .store import MemoryStore


def verify(store: MemoryStore) -> list[str]:
    """See `MemoryStore.verify`."""
    problems: list[str] = []
    connection = store.connection
    for check in (_check_pages, _check_words, _check_journal, _check_versions):
        try:
            problems += check(connection)
        except (sqlite3.Error, TypeError, ValueError) as error:
            problems.append(f"{database.FILE}: {error}")
    try:
        files = records.segment_files(connection)
    except (sqlite3.Error, TypeError, ValueError) as error:
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
    connection = store.connection
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


def _check_pages(connection: sqlite3.Connection) -> list[str]:
    rows = [row[0] for row in connection.execute("PRAGMA integrity_check(20)")]
    return [] if rows == ["ok"] else [f"{database.FILE}: {row}" for row in rows]


def _check_words(connection: sqlite3.Connection) -> list[str]:
    return [f"{database.FILE}: {problem}" for problem in lexical_view.check(connection)]


def _check_journal(connection: sqlite3.Connection) -> list[str]:
    problems = []
    statements = {
        "a life of a version that is not there": "SELECT count(*) FROM lives "
        "WHERE version NOT IN (SELECT id FROM versions)",
        "a document that is there twice": "SELECT count(*) FROM "
        "(SELECT 1 FROM lives JOIN versions ON id = version "
        "WHERE died IS NULL GROUP BY namespace, document HAVING count(*) > 1)",
        "a life that ends before it begins": "SELECT count(*) FROM lives WHERE died <= born",
        "a version without content": "SELECT count(*) FROM versions "
        "WHERE id NOT IN (SELECT version FROM contents)",
        "a version in an unknown segment": "SELECT count(*) FROM versions "
        "WHERE segment NOT IN (SELECT id FROM segments)",
    }
    for what, statement in statements.items():
        count = connection.execute(statement).fetchone()[0]
        if count:
            problems.append(f"{database.FILE}: {what} ({count} times)")
    Journal(connection).newest()
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
        rows = records.in_segments(store.connection, [number])
        if any(not 0 <= own.position < len(held) or held[own.position] != own.tokens for own in rows):
            return [f"{where}: does not hold the documents that the database says"]
    except (MemoryFormatError, OSError, TypeError) as error:
        return [f"{where}: {error}"]
    return []
