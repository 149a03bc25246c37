"""The SQLite database of a store: its tables, how it is opened, and who may write.

A commit is a row of `commits`. A document's content is a *version*, a row that never changes; `lives` says
between which commits it is visible, so every state there ever was can be read until history is erased.
"""

import fcntl
import json
import os
import sqlite3
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from ..modeling.errors import MemoryFormatError
from . import lexical_view
from .errors import StoreLockedError, translated

FILE, LOCK, SEGMENTS, READERS = "store.sqlite", "writer.lock", "segments", "readers"
UNFINISHED = f"{FILE}.new"
FORMAT, FORMAT_VERSION = "msa_hf store", 1
APPLICATION_ID = 0x4D534148  # "MSAH", in the header of the file
PATIENCE = 0.5  # seconds that a second writer waits before it gives up

LARGEST = 1 << 53
# Types of what `put` keeps, as far as it is read by name.
KINDS = {"coding": bytes, "salt": bytes, "model": str, "erasing": bool}
KINDS |= {"budget_bytes": int, "epoch": int, "oldest": int}

TABLES = """
CREATE TABLE store (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE commits (
    id INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, kind TEXT NOT NULL,
    added INTEGER NOT NULL, removed INTEGER NOT NULL,
    parent INTEGER, state INTEGER NOT NULL, tip INTEGER NOT NULL);
CREATE TABLE versions (
    id INTEGER PRIMARY KEY AUTOINCREMENT, namespace TEXT NOT NULL, document TEXT NOT NULL,
    sha256 BLOB NOT NULL, tokens INTEGER NOT NULL, segment INTEGER NOT NULL, position INTEGER NOT NULL);
CREATE INDEX versions_by_document ON versions (namespace, document);
CREATE INDEX versions_by_segment ON versions (segment);
CREATE TABLE contents (version INTEGER PRIMARY KEY, metadata TEXT NOT NULL, text TEXT NOT NULL);
CREATE TABLE lives (
    version INTEGER NOT NULL, born INTEGER NOT NULL, died INTEGER, PRIMARY KEY (version, born)) WITHOUT ROWID;
CREATE INDEX lives_by_birth ON lives (born);
CREATE INDEX lives_by_death ON lives (died);
CREATE TABLE segments (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, bytes INTEGER NOT NULL, sha256 BLOB NOT NULL,
    documents INTEGER NOT NULL, tier INTEGER NOT NULL);
CREATE TABLE uses (
    namespace TEXT NOT NULL, document TEXT NOT NULL, count INTEGER NOT NULL, last REAL NOT NULL,
    PRIMARY KEY (namespace, document)) WITHOUT ROWID;
CREATE TABLE tombstones (digest BLOB PRIMARY KEY, time REAL NOT NULL) WITHOUT ROWID;
"""


def create(folder: Path, values: dict[str, object]) -> sqlite3.Connection:
    """A new database in `folder`, with `values` in its table `store`, and the folder of segments.

    The database gets its name when it is complete: what dies before has made no store.
    """
    unfinished = folder / UNFINISHED
    for name in _with_companions(UNFINISHED):
        (folder / name).unlink(missing_ok=True)
    (folder / SEGMENTS).mkdir(exist_ok=True)
    connection = _connect(f"file:{quote(str(unfinished))}?mode=rwc")
    try:
        connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
        connection.execute("PRAGMA journal_mode=WAL")
        _configure(connection)
        with transaction(connection):
            _fill(connection, values)
        if connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
            raise sqlite3.OperationalError("database is locked")
    finally:
        connection.close()
    sync_file(unfinished)
    os.replace(unfinished, folder / FILE)
    try:
        sync_folder(folder)
        return connect(folder, read_only=False)
    except BaseException:
        discard(folder)
        raise


def discard(folder: Path) -> None:
    """Removes the database of a store that could not be made, as far as the disk permits."""
    for name in _with_companions(FILE):
        with suppress(OSError):
            (folder / name).unlink()


def is_unfinished(folder: Path) -> bool:
    """Whether a folder holds nothing but what `create` leaves when it dies."""
    remains = {LOCK, SEGMENTS, *_with_companions(UNFINISHED)}
    segments = folder / SEGMENTS
    return {path.name for path in folder.iterdir()} <= remains and not (
        segments.exists() and (not segments.is_dir() or any(segments.iterdir()))
    )


def _with_companions(name: str) -> list[str]:
    return [name, f"{name}-wal", f"{name}-shm", f"{name}-journal"]


def _fill(connection: sqlite3.Connection, values: dict[str, object]) -> None:
    for statement in TABLES.split(";\n"):
        if statement.strip():
            connection.execute(statement)
    lexical_view.create_tables(connection)
    connection.execute(
        "INSERT INTO commits (time, kind, added, removed, parent, state, tip) VALUES (?,?,0,0,NULL,1,1)",
        (time.time(), "create"),
    )
    for name, value in {"format": FORMAT, "format_version": FORMAT_VERSION, **values}.items():
        put(connection, name, value)


def sync_file(path: Path) -> None:
    """Waits until the content of a file is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until the names of new and removed files in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def connect(folder: Path, read_only: bool) -> sqlite3.Connection:
    """The database of the store in `folder`.

    Raises:
        FileNotFoundError: there is none.
        MemoryFormatError: it is damaged, another kind of database, or of another format version.
    """
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"no store in {folder}: {FILE} is missing")
    with translated(folder):
        mode = "mode=rw"
        if not (os.access(folder, os.W_OK) and os.access(path, os.W_OK)):
            log = folder / f"{FILE}-wal"
            # Without a log nothing is needed beside the file; with one, its commits must not be passed over.
            mode = "mode=ro" if log.exists() and log.stat().st_size else "mode=ro&immutable=1"
        connection = _connect(f"file:{quote(str(path))}?{mode}")
        try:
            _configure(connection)
            if read_only:
                connection.execute("PRAGMA query_only=ON")
            _check_format(connection, folder)
        except BaseException:
            connection.close()
            raise
    return connection


def _connect(uri: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        uri, uri=True, isolation_level=None, check_same_thread=False, timeout=PATIENCE, cached_statements=256
    )
    connection.text_factory = _text
    return connection


def _text(stored: bytes) -> str:
    """Text of a damaged page may be no UTF-8; it must still become an error of ours, not of the decoder."""
    return stored.decode("utf-8", "replace")


def _configure(connection: sqlite3.Connection) -> None:
    for pragma in (
        "trusted_schema=OFF",
        "cell_size_check=ON",
        "mmap_size=0",
        "synchronous=FULL",
        "secure_delete=ON",  # what is erased is overwritten, not only unlinked
    ):
        connection.execute(f"PRAGMA {pragma}")


def _check_format(connection: sqlite3.Connection, folder: Path) -> None:
    if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise MemoryFormatError(f"{folder / FILE} is a database of another program")
    found = read(connection, "format_version")
    if found != FORMAT_VERSION:
        by = read(connection, "written_by")
        raise MemoryFormatError(
            f"{folder}: format_version must be {FORMAT_VERSION} for this release; got {found!r}: open it "
            f"with msa-hf {by}, export it there and import it here"
        )
    fresh = sqlite3.connect(":memory:")
    try:
        fresh.executescript(TABLES)
        lexical_view.create_tables(fresh)
        expected, stored = _schema(fresh), _schema(connection)
    finally:
        fresh.close()
    if stored != expected:
        differing = sorted(
            str(name)
            for kind, name in expected.keys() | stored.keys()
            if expected.get((kind, name)) != stored.get((kind, name))
        )
        raise MemoryFormatError(f"the tables of {folder} are not those of a store: {', '.join(differing)}")


def _schema(connection: sqlite3.Connection) -> dict:
    """Everything that SQL could run or read, by kind and name, but for the planner's statistics."""
    rows = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master").fetchall()
    statistics = {("table", f"sqlite_stat{number}") for number in (1, 4)}
    return {row[:2]: row[2:] for row in rows if row[:2] not in statistics}


def put(connection: sqlite3.Connection, name: str, value: object) -> None:
    """Keeps bytes, or anything that JSON can hold, under a name."""
    stored = value if isinstance(value, bytes) else json.dumps(value)
    connection.execute("INSERT OR REPLACE INTO store VALUES (?, ?)", (name, stored))


def read(connection: sqlite3.Connection, name: str):
    """What `put` kept; None where there is nothing. Raises MemoryFormatError if it cannot be that."""
    row = connection.execute("SELECT value FROM store WHERE name=?", (name,)).fetchone()
    kind = KINDS.get(name)
    if row is None and kind is not bytes:
        return None
    try:
        value = row and (row[0] if isinstance(row[0], bytes) else json.loads(row[0]))
        if kind is not None and (value is not None or kind is bytes):
            checked((value,), (kind,), "values")
    except (TypeError, ValueError, RecursionError) as error:
        raise MemoryFormatError(f"the value {name!r} in the store's database is damaged: {error}") from error
    return value


def checked(row: tuple, kinds: Sequence[type | tuple[type, ...]], table: str) -> tuple:
    """The row, whose values must be of these types; SQLite takes any value in any column.

    Raises MemoryFormatError for others, and for whole numbers below 0 or so large that sums of them overflow.
    """
    for value, kind in zip(row, kinds):
        if not isinstance(value, kind) or isinstance(value, int) and not 0 <= value < LARGEST:
            raise MemoryFormatError(f"the table of {table} in the store's database is damaged: {value!r:.60}")
    return row


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All statements of the block, durably, or none of them."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


@contextmanager
def reading(connection: sqlite3.Connection) -> Iterator[None]:
    """All statements of the block see one state of the database."""
    if connection.in_transaction:
        yield
        return
    connection.execute("BEGIN")
    try:
        yield
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


class WriterLock:
    """The right to write, held by one object at a time. The system takes it back from a process that dies.

    Raises StoreLockedError within a second if another writer has it.
    """

    def __init__(self, folder: Path):
        self._file, self._process = open(folder / LOCK, "a+b", buffering=0), os.getpid()
        try:
            self._take(folder)
        except BaseException:
            self._file.close()
            raise

    def _take(self, folder: Path) -> None:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    self._file.seek(0)
                    holder = self._file.read(100).decode("ascii", "replace").strip() or "unknown"
                    raise StoreLockedError(
                        f"{folder} is open for writing (process {holder}): close it there, or open it here "
                        "with read_only=True"
                    ) from None
                time.sleep(0.02)
        self._file.truncate(0)
        self._file.write(str(os.getpid()).encode())

    def release(self) -> None:
        # A process that was forked meanwhile has the file, too; the lock must not last as long as that one.
        if not self._file.closed and os.getpid() == self._process:
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()


class ReaderMark:
    """Says which commit a reader reads, so that compaction keeps it; gone with the reader's process."""

    def __init__(self, path: Path, file):
        self._path, self._file = path, file

    @classmethod
    def place(cls, folder: Path, version: int) -> "ReaderMark | None":
        """The mark of a reader at `version`; None where the folder cannot be written to."""
        if not os.access(folder, os.W_OK):
            return None
        (folder / READERS).mkdir(exist_ok=True)
        path = folder / READERS / f"{version}-{uuid.uuid4().hex}"
        file = open(path, "w")
        fcntl.flock(file, fcntl.LOCK_SH)
        return cls(path, file)

    def release(self) -> None:
        self._path.unlink(missing_ok=True)
        self._file.close()


def versions_being_read(folder: Path) -> list[int]:
    """Commits that live readers have marked; marks of dead ones are removed."""
    versions = []
    for path in sorted((folder / READERS).glob("*-*")):
        try:
            with open(path, "r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
        except BlockingIOError:
            number = path.name.partition("-")[0]
            versions += [int(number)] if number.isdigit() else []
        except FileNotFoundError:
            continue
    return versions


def written_by() -> str:
    """This release, which opens what it writes."""
    from .. import __version__

    return __version__


def salt() -> bytes:
    """Makes the hash that is left of an erased document useless without the store."""
    return os.urandom(32)
