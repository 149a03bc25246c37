"""MemoryStore: a memory as durable data that can be edited, undone, erased and shared."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..modeling.errors import MemoryFormatError, MemoryMismatchError
from ..modeling.memory_bank import MemoryBank
from . import budget, database, exchange, maintenance, records, segments, verification, view
from .coding import Coding, Provenance
from .errors import (
    Guard,
    HistoryError,
    StoreError,
    StoreModelError,
    translated,
)
from .journal import Commit, Journal
from .provenance import coding_of, provenance_of
from .reader import DEFAULT_NAMESPACE, Snapshot, StoreReader
from .writer import StoreWriter

READ_TRIES = 5  # of a reader that meets a compaction


class MemoryStore(StoreReader, StoreWriter):
    """A folder with a memory in it: documents, their history, and the vectors that a model reads.

    One object writes at a time; any number of readers, in any process, see the state of the commit that they
    opened or last refreshed. A method that writes returns once its commit is on the disk; whatever fails, an
    earlier commit is never lost. Make one with `create`, open it with `open`.

    Attributes:
        path: the folder. coding: how vectors are coded. model, tokenizer: None where it was opened without.
    """

    def __init__(
        self,
        path: Path,
        connection: sqlite3.Connection,
        coding: Coding,
        lock: database.WriterLock | None,
        mark: database.ReaderMark | None = None,
        model=None,
        tokenizer=None,
    ):
        self.path, self.coding, self.model, self.tokenizer = path, coding, model, tokenizer
        self._store, self.connection, self._writer, self._mark = self, connection, lock, mark
        self.guard = Guard(path)
        self._segments: dict[int, segments.Segment] = {}
        self._banks: dict[tuple, MemoryBank] = {}
        self._version = Journal(connection).newest()

    @classmethod
    def create(
        cls,
        path: str | Path,
        model,
        tokenizer,
        *,
        key_bits: int | None = 4,
        value_bits: int | None = 4,
        router_bits: int | None = 4,
        budget_bytes: int | None = None,
        model_path: str | None = None,
    ) -> MemoryStore:
        """A new, empty store in the folder `path`, which must not exist or be empty.

        Args:
            key_bits, value_bits, router_bits: 1 to 4 bits per number of keys, values and router keys; None
                keeps them as the model makes them.
            budget_bytes: of vectors; beyond it the least useful documents take fewer bits, see `budget`.
            model_path: remembered, for those who open the store later.

        Raises:
            StoreError: the folder holds something. ValueError: other bits or budget.
        """
        budget.check_budget(budget_bytes)
        provenance = provenance_of(model, tokenizer, key_bits, value_bits, router_bits)
        path = _empty_folder(path)
        coding = coding_of(provenance, model, tokenizer)
        return cls._make(path, coding, budget_bytes, model_path, model, tokenizer)

    @classmethod
    def _make(cls, path: Path, coding: Coding, budget_bytes, model_path, model, tokenizer) -> MemoryStore:
        """The files of a new store, and the object that writes them."""
        path = _empty_folder(path)
        with translated(path):
            path.mkdir(parents=True, exist_ok=True)
            lock = database.WriterLock(path)
            values = {
                "written_by": database.written_by(),
                "provenance": coding.provenance.to_json(),
                "coding": coding.to_bytes(),
                "budget_bytes": budget_bytes,
                "model": None if model_path is None else str(model_path),
                "salt": database.salt(),
            }
            connection = None
            try:
                _empty_folder(path)  # another process may have made a store in it by now
                connection = database.create(path, values)
                return cls(path, connection, coding, lock, None, model, tokenizer)
            except BaseException:
                if connection is not None:
                    connection.close()
                    database.discard(path)
                lock.release()
                raise

    @classmethod
    def open(cls, path: str | Path, model=None, tokenizer=None, *, read_only: bool = False) -> MemoryStore:
        """An existing store.

        Args:
            model, tokenizer: needed to add, to update and to search by routers; must be those that made it.
            read_only: for readers beside a writer. Their state stays as it was when they opened the store.

        Raises:
            FileNotFoundError: there is no store. StoreLockedError: another writer has it.
            MemoryFormatError: it is damaged, or of a format that another release reads.
            MemoryMismatchError: another model or tokenizer made it; the message says what differs.
        """
        path = Path(path)
        if not (path / database.FILE).is_file():
            raise FileNotFoundError(f"no store in {path}: {database.FILE} is missing")
        with translated(path):
            lock = None if read_only else database.WriterLock(path)
            connection = None
            try:
                connection = database.connect(path, read_only)
                provenance = Provenance.from_json(database.read(connection, "provenance"))
                coding = Coding.from_bytes(provenance, database.read(connection, "coding"))
                if model is not None:
                    check_model(provenance, model, tokenizer)
                mark = _mark(path, connection) if read_only else None
                store = cls(path, connection, coding, lock, mark, model, tokenizer)
                if not read_only:
                    maintenance.recover(store)
                return store
            except BaseException:
                if connection is not None:
                    connection.close()
                if lock is not None:
                    lock.release()
                raise

    @classmethod
    def from_export(cls, path: str | Path, folder: str | Path, model=None, tokenizer=None) -> MemoryStore:
        """A new store in `path` with what is in an export, vectors as they are; it needs no model.

        Raises what `create` and `import_from` raise.
        """
        export = exchange.Export(folder)
        if model is not None:
            check_model(export.provenance, model, tokenizer)
        store = cls._make(Path(path), export.coding, None, export.model_path, model, tokenizer)
        try:
            store.import_from(folder)
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    def from_hub(
        cls,
        repo_id: str,
        path: str | Path,
        *,
        revision: str | None = None,
        model=None,
        tokenizer=None,
        token: str | bool | None = None,
    ) -> MemoryStore:
        """A new store in `path` with a memory that `msa-hf push memory` sent to the Hub.

        Every file is checked against its SHA-256, and nothing that came from the Hub is ever run.

        Args:
            revision: branch, tag or, best, the commit that you looked at.
            token: by default the one that huggingface_hub knows.

        Raises what `from_export` raises; HubError, see `hub_errors`, where the memory cannot be had.
        """
        from ..hub import fetch_memory

        _empty_folder(path)
        return cls.from_export(path, fetch_memory(repo_id, revision=revision, token=token), model, tokenizer)

    def close(self) -> None:
        """Releases the store for other writers. Banks of it keep their vectors, but not their texts."""
        self.connection.close()
        for held in (self._writer, self._mark):
            if held is not None:
                held.release()
        self._segments.clear()
        self._banks.clear()

    def __enter__(self) -> MemoryStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def version(self) -> int:
        """Number of the commit that is read: the newest, or for a reader that of its last refresh."""
        return self._version

    @property
    def read_only(self) -> bool:
        return self._writer is None

    @property
    def provenance(self) -> Provenance:
        return self.coding.provenance

    @property
    def model_path(self) -> str | None:
        """Where the model was, as `create` was told."""
        with self.reads() as connection:
            return database.read(connection, "model")

    # Reading

    def refresh(self) -> int:
        """Goes to the newest commit, and returns its number."""
        with self.guard, translated(self.path):
            if self._mark is not None:
                mark = _mark(self.path, self.connection)
                self._mark.release()
                self._mark = mark
            newest = Journal(self.connection).newest()
            if newest != self._version:
                self.committed(newest)
        return newest

    def snapshot(self, version: int) -> Snapshot:
        """The store as it was after commit `version`. Raises HistoryError if that cannot be read any more."""
        with self.reads() as connection:
            oldest = database.read(connection, "oldest") or 1
            newest = Journal(connection).newest()
        if type(version) is not int or not oldest <= version <= newest:
            raise HistoryError(f"version must be a number from {oldest} to {newest}; got {version!r}")
        return Snapshot(self, version)

    def log(self, limit: int | None = None) -> list[Commit]:
        """The last `limit` commits, newest first."""
        with self.reads() as connection:
            return Journal(connection).commits(-1 if limit is None else limit)

    def bank_at(
        self, version: int, namespaces: tuple[str, ...] | None, where: Mapping[str, Any] | None
    ) -> MemoryBank:
        """The bank of a state; see `StoreReader.bank`."""
        conditions = repr(sorted(where.items())) if where else None
        with self.guard:
            with self.reads() as connection:
                epoch = database.read(connection, "epoch")  # another process may have erased documents
            key = (version, namespaces, conditions, epoch)
            if key not in self._banks:
                bank = self._read_bank(version, namespaces, where)
                self._banks = dict(list(self._banks.items())[-7:]) | {key: bank}
            return self._banks[key]

    def _read_bank(self, version, namespaces, where) -> MemoryBank:
        for last in [False] * (READ_TRIES - 1) + [True]:
            with self.reads() as connection:
                found = view.visible(connection, version, namespaces)
                if where:
                    found = view.matching(connection, found, where)
                wanted = sorted(set(found.segments.tolist()))
                files = records.segment_files(connection, wanted)
                epoch = database.read(connection, "epoch")
                if Provenance.from_json(database.read(connection, "provenance")) != self.provenance:
                    raise MemoryMismatchError(f"{self.path} was re-encoded by another model: open it again")
            try:
                opened = {number: self.segment(number, files) for number in wanted}
                break
            except MemoryFormatError:
                # A compaction may have moved the vectors since the database was read.
                with self.reads() as connection:
                    if last or database.read(connection, "epoch") == epoch:
                        raise
        encode = None
        if self.model is not None:

            def encode(texts, numbers):
                return self.coding.pack(self.encode(texts, numbers))

        notes = {} if self.model_path is None else {"model": self.model_path}
        bank = view.build_bank(
            self.connection, self.guard, found, opened, self.coding, notes, self.tokenizer, encode
        )
        return bank if self.model is None else bank.to(self.model.device)

    def segment(
        self, number: int, files: Mapping[int, segments.SegmentFile] | None = None
    ) -> segments.Segment:
        """An open segment, memory-mapped once."""
        with self.guard:
            if number not in self._segments:
                if files is None:
                    files = records.segment_files(self.connection, [number])
                if number not in files:
                    raise MemoryFormatError(f"the store's database is damaged: segment {number} is unknown")
                self._segments[number] = segments.read(self.path, files[number], self.coding)
            return self._segments[number]

    def drop_segments(self, numbers: Sequence[int]) -> None:
        """Forgets open segments that the store no longer has."""
        with self.guard:
            for number in numbers:
                self._segments.pop(number, None)

    @contextmanager
    def reads(self) -> Iterator[sqlite3.Connection]:
        """The database, for statements that see one state of it."""
        with self.guard, translated(self.path), database.reading(self.connection):
            yield self.connection

    def was_forgotten(self, id: str, namespace: str = DEFAULT_NAMESPACE) -> bool:
        """Whether a document of this name was erased."""
        with self.reads() as connection:
            proof = maintenance.tombstone(database.read(connection, "salt"), namespace, id)
            return records.has_tombstone(connection, proof)

    def verify(self) -> list[str]:
        """Checks all bytes against their checksums, and that all parts fit. What is wrong, as sentences."""
        with self.reads():
            pass  # a store that was closed says so, instead of looking damaged
        with self.guard:
            return verification.verify(self)

    def stats(self) -> dict[str, Any]:
        """Counts and bytes of the store."""
        with self.reads():
            return verification.stats(self)

    # What the modules of this package use

    @contextmanager
    def writes(self) -> Iterator[sqlite3.Connection]:
        """The database, for one method that may commit."""
        if self._writer is None:
            raise StoreError(f"{self.path} was opened with read_only=True: open it for writing")
        with self.guard, translated(self.path):
            yield self.connection

    def encode(
        self, texts: list[str], numbers: list[int], batch_tokens: int | None = None, progress: bool = False
    ):
        """A dense bank of texts. Raises StoreModelError without a model."""
        if self.model is None:
            raise StoreModelError(
                f"{self.path} was opened without its model, which encodes texts: give it to open()"
            )
        return self.model.encode_memory(
            texts,
            self.tokenizer,
            batch_tokens=batch_tokens,
            progress=progress,
            numbers=numbers,
            means=self.coding.means,
        )

    def committed(self, version: int) -> None:
        """Takes note of a commit that is now read."""
        self._version = version
        self._banks.clear()


def check_model(provenance: Provenance, model, tokenizer) -> None:
    """Raises MemoryMismatchError, saying what differs, unless model and tokenizer made the store."""
    if tokenizer is None:
        raise ValueError("tokenizer must be given with the model")
    given = provenance_of(
        model, tokenizer, provenance.key_bits, provenance.value_bits, provenance.router_bits
    )
    if differences := provenance.differences(given):
        raise MemoryMismatchError(
            "this store was made by another model; open it with that one, or reencode() it. Differences "
            f"(store != model): {'; '.join(differences)}"
        )


def _empty_folder(path: str | Path) -> Path:
    path = Path(path)
    if path.exists() and not (path.is_dir() and database.is_unfinished(path)):
        raise StoreError(f"{path} exists and is not an empty folder: open it, or choose another place")
    return path


def _mark(path: Path, connection: sqlite3.Connection) -> database.ReaderMark | None:
    """A reader's mark at the newest commit, which no compaction has passed when it stood."""
    journal = Journal(connection)
    while True:
        newest = journal.newest()
        mark = database.ReaderMark.place(path, newest)
        if mark is None or journal.newest() == newest:
            return mark
        mark.release()
