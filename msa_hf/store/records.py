"""Rows of a store's database, read and written: versions, contents and uses."""

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..modeling.errors import MemoryFormatError
from .coding import TIERS
from .database import checked
from .journal import VISIBLE
from .segments import SegmentFile


@dataclass(frozen=True)
class Version:
    """A document's content, as a row of `versions` (without its text)."""

    id: int
    namespace: str
    document: str
    sha256: bytes
    tokens: int
    segment: int
    position: int


_VERSION = (int, str, str, bytes, int, int, int)
_FILE = (int, str, int, bytes, int, int)
_COLUMNS = "versions.id, namespace, document, sha256, tokens, segment, position"


def _version(row: tuple) -> Version:
    return Version(*checked(row, _VERSION, "versions"))


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def insert(connection: sqlite3.Connection, version: Version, text: str, metadata: dict) -> None:
    values = (version.id, version.namespace, version.document, version.sha256)
    values += (version.tokens, version.segment, version.position)
    connection.execute("INSERT INTO versions VALUES (?,?,?,?,?,?,?)", values)
    connection.execute("INSERT INTO contents VALUES (?,?,?)", (version.id, as_json(metadata), text))


def as_json(metadata: dict) -> str:
    """Metadata as it is stored; equal for equal metadata alone, where to Python 1 is True."""
    return json.dumps(metadata, ensure_ascii=False, sort_keys=True)


def next_version(connection: sqlite3.Connection) -> int:
    """The number that the next version gets; none is ever used twice."""
    row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name='versions'").fetchone()
    return 1 if row is None else checked(row, (int,), "numbers")[0] + 1


def visible_rows(
    connection: sqlite3.Connection, at: int, namespaces: Sequence[str] | None
) -> list[tuple[int, int, int, int]]:
    """(id, tokens, segment, position) of the versions visible at commit `at`, by id."""
    chosen, names = "", {}
    if namespaces is not None:
        names = {f"n{number}": name for number, name in enumerate(namespaces)}
        chosen = f"AND namespace IN ({', '.join(':' + name for name in names)})"
    return connection.execute(
        f"SELECT id, tokens, segment, position FROM versions JOIN lives ON lives.version = id "
        f"WHERE {VISIBLE} {chosen} ORDER BY id",
        {"at": at, **names},
    ).fetchall()


def find(connection: sqlite3.Connection, at: int, namespace: str, document: str) -> Version | None:
    """The version of a document that is visible at commit `at`."""
    row = connection.execute(
        f"SELECT {_COLUMNS} FROM versions JOIN lives ON lives.version = versions.id "
        f"WHERE namespace = :namespace AND document = :document AND {VISIBLE}",
        {"at": at, "namespace": namespace, "document": document},
    ).fetchone()
    return None if row is None else _version(row)


def versions_of(connection: sqlite3.Connection, namespace: str, document: str) -> list[Version]:
    """All versions of a document that are kept, oldest first."""
    rows = f"SELECT {_COLUMNS} FROM versions WHERE namespace=? AND document=? ORDER BY id"
    return [_version(row) for row in connection.execute(rows, (namespace, document))]


def in_segments(connection: sqlite3.Connection, segments: Sequence[int]) -> list[Version]:
    """All versions whose vectors are in these segments, by id."""
    rows = f"SELECT {_COLUMNS} FROM versions WHERE segment IN ({_marks(segments)}) ORDER BY id"
    return [_version(row) for row in connection.execute(rows, list(segments))]


def texts(connection: sqlite3.Connection, versions: Sequence[int]) -> Iterator[tuple[int, str]]:
    """(id, text) of those that are kept. Raises MemoryFormatError for a text that was damaged."""
    rows = (
        "SELECT versions.id, text, sha256 FROM contents JOIN versions ON versions.id = version "
        f"WHERE version IN ({_marks(versions)})"
    )
    for version, text, sha256 in connection.execute(rows, list(versions)).fetchall():
        if not isinstance(text, str) or digest(text) != sha256:
            raise MemoryFormatError("the text of a document in the store is damaged: its SHA-256 differs")
        yield version, text


def metadata(connection: sqlite3.Connection, versions: Sequence[int]) -> Iterator[tuple[int, dict]]:
    """(id, metadata) of those that are kept."""
    rows = f"SELECT version, metadata FROM contents WHERE version IN ({_marks(versions)})"
    for version, stored in connection.execute(rows, list(versions)).fetchall():
        yield version, read_metadata(stored)


def note(connection: sqlite3.Connection, version: int) -> tuple[str, str, dict]:
    """(namespace, document, metadata) of a version; empty ones if it was erased."""
    row = connection.execute(
        "SELECT namespace, document, metadata FROM versions JOIN contents ON version = id WHERE id=?",
        (version,),
    ).fetchone()
    return ("", "", {}) if row is None else (row[0], row[1], read_metadata(row[2]))


def read_metadata(stored: object) -> dict[str, Any]:
    """Raises MemoryFormatError if it is not a JSON object."""
    try:
        value = json.loads(stored)
    except (TypeError, ValueError, RecursionError) as error:
        raise MemoryFormatError(f"the metadata of a document in the store is damaged: {error}") from error
    if not isinstance(value, dict):
        raise MemoryFormatError("the metadata of a document in the store is damaged: it is no object")
    return value


def _marks(values: Sequence) -> str:
    return ",".join("?" * len(values))


def headers(
    connection: sqlite3.Connection, versions: Sequence[int], at: int
) -> dict[int, tuple[str, str, int, int]]:
    """(namespace, document, tokens, commit since which it is visible) of versions visible at commit `at`."""
    marks = ", ".join(f":v{number}" for number in range(len(versions)))
    rows = connection.execute(
        "SELECT versions.id, namespace, document, tokens, born FROM versions "
        f"JOIN lives ON lives.version = versions.id WHERE versions.id IN ({marks}) AND {VISIBLE}",
        {"at": at, **{f"v{number}": version for number, version in enumerate(versions)}},
    )
    return {row[0]: row[1:] for row in rows}


def count_kept(connection: sqlite3.Connection, versions: Sequence[int]) -> int:
    """How many of these versions were not erased."""
    rows = f"SELECT count(*) FROM versions WHERE id IN ({_marks(versions)})"
    return connection.execute(rows, list(versions)).fetchone()[0]


def namespaces(connection: sqlite3.Connection, at: int) -> list[str]:
    """Names of the namespaces with documents visible at commit `at`."""
    rows = (
        f"SELECT DISTINCT namespace FROM versions JOIN lives ON lives.version = versions.id WHERE {VISIBLE}"
    )
    return sorted(str(name) for (name,) in connection.execute(rows, {"at": at}))


def events(
    connection: sqlite3.Connection, namespace: str, document: str, at: int
) -> Iterator[tuple[int, float, str, str, str | None, dict | None]]:
    """(commit, time, kind, action, text, metadata) of every change of a document up to commit `at`."""
    lives = connection.execute(
        "SELECT version, born, died FROM lives JOIN versions ON versions.id = version "
        "WHERE namespace=? AND document=? ORDER BY born",
        (namespace, document),
    ).fetchall()
    for life in lives:
        checked(life, (int, int, (int, type(None))), "lives")
    births = {born: version for version, born, _ in lives if born <= at}
    deaths = {died for *_, died in lives if died is not None and died <= at}
    for commit in sorted(births.keys() | deaths):
        row = connection.execute("SELECT time, kind FROM commits WHERE id=?", (commit,)).fetchone()
        when, kind = row or (0.0, "")
        if commit not in births:
            yield commit, when, kind, "deleted", None, None
            continue
        version = births[commit]
        action = "updated" if commit in deaths else "added"
        text, own = dict(texts(connection, [version])), dict(metadata(connection, [version]))
        yield commit, when, kind, action, text.get(version), own.get(version)


def segment_files(
    connection: sqlite3.Connection, numbers: Sequence[int] | None = None
) -> dict[int, SegmentFile]:
    """Segments by number; all of them, or some."""
    rows = connection.execute(
        "SELECT id, name, bytes, sha256, documents, tier FROM segments ORDER BY id"
    ).fetchall()
    wanted = None if numbers is None else set(numbers)
    found = {}
    for row in rows:
        if wanted is None or row[0] in wanted:
            found[row[0]] = SegmentFile(*checked(row, _FILE, "segments")[1:])
            if found[row[0]].tier not in TIERS:
                raise MemoryFormatError(f"the store's database is damaged: a segment of tier {row[-1]}")
    return found


def next_segment(connection: sqlite3.Connection) -> int:
    row = connection.execute("SELECT seq FROM sqlite_sequence WHERE name='segments'").fetchone()
    return 1 if row is None else checked(row, (int,), "numbers")[0] + 1


def insert_segment(connection: sqlite3.Connection, number: int, file: SegmentFile) -> None:
    values = (number, file.name, file.bytes, file.sha256, file.documents, file.tier)
    connection.execute("INSERT INTO segments VALUES (?,?,?,?,?,?)", values)


def move(connection: sqlite3.Connection, places: dict[int, tuple[int, int]]) -> None:
    """Versions' vectors are now at (segment, position)."""
    rows = ((segment, position, version) for version, (segment, position) in places.items())
    connection.executemany("UPDATE versions SET segment=?, position=? WHERE id=?", rows)


def remove_unused(connection: sqlite3.Connection, numbers: Sequence[int]) -> list[tuple[int, str]]:
    """Removes those of the segments that no version uses; (number, name of the file) of each."""
    removed = []
    for number in numbers:
        used = connection.execute("SELECT 1 FROM versions WHERE segment=? LIMIT 1", (number,)).fetchone()
        row = connection.execute("SELECT name FROM segments WHERE id=?", (number,)).fetchone()
        if used is None and row is not None:
            connection.execute("DELETE FROM segments WHERE id=?", (number,))
            removed.append((number, row[0]))
    return removed


def erase(connection: sqlite3.Connection, versions: Sequence[int]) -> None:
    """Removes versions, their contents and their lives; the words are the lexical view's."""
    for table, column in (("versions", "id"), ("contents", "version"), ("lives", "version")):
        rows = ((version,) for version in versions)
        connection.executemany(f"DELETE FROM {table} WHERE {column}=?", rows)


def add_tombstone(connection: sqlite3.Connection, proof: bytes, time: float) -> None:
    connection.execute("INSERT OR REPLACE INTO tombstones VALUES (?, ?)", (proof, time))


def has_tombstone(connection: sqlite3.Connection, proof: bytes) -> bool:
    return connection.execute("SELECT 1 FROM tombstones WHERE digest=?", (proof,)).fetchone() is not None


def all_versions(connection: sqlite3.Connection) -> list[Version]:
    """All versions that are kept, by id."""
    return [_version(row) for row in connection.execute(f"SELECT {_COLUMNS} FROM versions ORDER BY id")]


def count_by_namespace(connection: sqlite3.Connection, at: int) -> dict[str, int]:
    """Documents visible at commit `at`."""
    rows = (
        "SELECT namespace, count(*) FROM versions JOIN lives ON lives.version = versions.id "
        f"WHERE {VISIBLE} GROUP BY namespace ORDER BY namespace"
    )
    return dict(connection.execute(rows, {"at": at}).fetchall())


def forget_use(connection: sqlite3.Connection, namespace: str, document: str) -> None:
    connection.execute("DELETE FROM uses WHERE namespace=? AND document=?", (namespace, document))


def count_use(connection: sqlite3.Connection, namespace: str, document: str, now: float) -> None:
    connection.execute(
        "INSERT INTO uses VALUES (?, ?, 1, ?) "
        "ON CONFLICT (namespace, document) DO UPDATE SET count = count + 1, last = excluded.last",
        (namespace, document, now),
    )


def uses(connection: sqlite3.Connection) -> dict[tuple[str, str], tuple[int, float]]:
    """How often each document was used, and when last."""
    rows = connection.execute("SELECT namespace, document, count, last FROM uses")
    kinds = (str, str, int, (int, float))
    return {row[:2]: row[2:] for row in (checked(row, kinds, "uses") for row in rows)}


def births(connection: sqlite3.Connection, at: int) -> dict[int, float]:
    """When each version that is visible at commit `at` appeared."""
    rows = f"SELECT version, time FROM lives JOIN commits ON commits.id = born WHERE {VISIBLE}"
    found = connection.execute(rows, {"at": at}).fetchall()
    return dict(checked(row, (int, (int, float)), "commits") for row in found)


def count_tokens(connection: sqlite3.Connection, tokens: dict[int, int]) -> None:
    """How many tokens versions have for another tokenizer."""
    rows = ((count, version) for version, count in tokens.items())
    connection.executemany("UPDATE versions SET tokens=? WHERE id=?", rows)
