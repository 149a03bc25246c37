"""MemoryStore: a memory as durable data that can be edited, undone, erased and shared."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..modeling.errors import MemoryFormatError, MemoryMismatchError
from ..modeling.memory_bank import MemoryBank
from . import budget, database, exchange, maintenance, records, reencoding, segments, verification, view
from .coding import Coding, Provenance
from .drafts import Draft, drafts_of
from .errors import (
    Guard,
    HistoryError,
    StoreError,
    StoreModelError,
    UnknownDocumentError,
    translated,
)
from .journal import Commit, Journal
from .provenance import coding_of, provenance_of
from .reader import DEFAULT_NAMESPACE, Snapshot, StoreReader
from .rewriting import encoded
from .writing import store_drafts

READ_TRIES = 5  # of a reader that meets a compaction


class MemoryStore(StoreReader):
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
        self._store, self._connection, self._writer, self._mark = self, connection, lock, mark
        self._guard = Guard(path)
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
            (path / database.SEGMENTS).mkdir(parents=True)
            lock = database.WriterLock(path)
            values = {
                "written_by": database.written_by(),
                "provenance": coding.provenance.to_json(),
                "coding": coding.to_bytes(),
                "budget_bytes": budget_bytes,
                "model": None if model_path is None else str(model_path),
                "salt": database.salt(),
            }
            try:
                connection = database.create(path, values)
                segments.sync_folder(path)
            except BaseException:
                lock.release()
                raise
        return cls(path, connection, coding, lock, None, model, tokenizer)

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

    def close(self) -> None:
        """Releases the store for other writers. Banks of it keep their vectors, but not their texts."""
        self._connection.close()
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
        with self._guard, translated(self.path):
            if self._mark is not None:
                mark = _mark(self.path, self._connection)
                self._mark.release()
                self._mark = mark
            newest = Journal(self._connection).newest()
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
        key = (version, namespaces, repr(sorted(where.items())) if where else None)
        with self._guard:
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
        return view.build_bank(
            self._connection, self._guard, found, opened, self.coding, notes, self.tokenizer, encode
        )

    def segment(
        self, number: int, files: Mapping[int, segments.SegmentFile] | None = None
    ) -> segments.Segment:
        """An open segment, memory-mapped once."""
        with self._guard:
            if number not in self._segments:
                if files is None:
                    files = records.segment_files(self._connection, [number])
                if number not in files:
                    raise MemoryFormatError(f"the store's database is damaged: segment {number} is unknown")
                self._segments[number] = segments.read(self.path, files[number], self.coding)
            return self._segments[number]

    def drop_segments(self, numbers: Sequence[int]) -> None:
        """Forgets open segments that the store no longer has."""
        with self._guard:
            for number in numbers:
                self._segments.pop(number, None)

    @contextmanager
    def reads(self) -> Iterator[sqlite3.Connection]:
        """The database, for statements that see one state of it."""
        with self._guard, translated(self.path), database.reading(self._connection):
            yield self._connection

    # Writing

    def add(
        self,
        documents: Sequence[str],
        ids: Sequence[str] | None = None,
        namespace: str = DEFAULT_NAMESPACE,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        *,
        if_exists: str = "error",
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> list[str]:
        """Adds documents in one commit, and returns their ids.

        Adding what is there already, with the same id, text and metadata, changes nothing.

        Args:
            documents: texts. ids: their names; by default the first 24 hex digits of their SHA-256.
            metadata: a JSON object per document. "title" and "source" are shown with answers.
            if_exists: what happens to an id with another content: "error", "update" it, or "keep" the old.
            batch_tokens, progress: of `encode_memory`.

        Raises:
            ValueError: texts, ids or metadata that cannot be stored. DocumentExistsError: see `if_exists`.
            StoreModelError: the store was opened without its model. StoreWriteError: the disk refused.
        """
        drafts = drafts_of(documents, ids, namespace, metadata)

        def vectors(new: list[Draft], numbers: list[int]) -> segments.Segment:
            return encoded(self, [draft.text for draft in new], numbers, batch_tokens, progress)

        with self.writes():
            store_drafts(self, drafts, if_exists, vectors)
        return [draft.document for draft in drafts]

    def update(
        self,
        id: str,
        text: str,
        namespace: str = DEFAULT_NAMESPACE,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Replaces a document's text; its metadata, too, where given.

        Raises UnknownDocumentError if it is not there, and what `add` raises.
        """
        known = self.get(id, namespace).metadata
        self.add([text], [id], namespace, [known if metadata is None else metadata], if_exists="update")

    def delete(self, ids: str | Sequence[str], namespace: str = DEFAULT_NAMESPACE) -> None:
        """Removes documents from the memory. `undo` brings them back; `forget` erases them.

        Raises UnknownDocumentError, removing none, if one of them is not there.
        """
        with self.writes() as connection:
            died = [self._known(connection, id, namespace).id for id in _ids(ids)]
            if died:
                self._change(lambda journal: journal.append("delete", died=died))

    def undo(self, steps: int = 1) -> int:
        """Takes back the last changes; the new version. Raises HistoryError if there are fewer."""
        return self._step("undo", steps)

    def redo(self, steps: int = 1) -> int:
        """Takes back the last undos; the new version. Raises HistoryError if there are fewer."""
        return self._step("redo", steps)

    def forget(self, ids: str | Sequence[str], namespace: str = DEFAULT_NAMESPACE) -> None:
        """Erases documents with all their history: texts, words and vectors leave every file of the store.

        What is left is a hash that proves it, see `was_forgotten`. Earlier changes cannot be undone any more.

        Raises:
            UnknownDocumentError: nothing is known of one of them; none is erased.
            StoreLockedError: a reader is at work; the documents are gone, `scrub()` finishes the erasure.
        """
        with self.writes():
            maintenance.forget(self, _ids(ids), namespace)

    def was_forgotten(self, id: str, namespace: str = DEFAULT_NAMESPACE) -> bool:
        """Whether a document of this name was erased."""
        with self.reads() as connection:
            proof = maintenance.tombstone(database.read(connection, "salt"), namespace, id)
            return records.has_tombstone(connection, proof)

    def record_use(self, ids: str | Sequence[str], namespace: str = DEFAULT_NAMESPACE) -> None:
        """Counts a use of documents. What is used keeps, or gets back, its precision under a budget.

        Raises UnknownDocumentError, counting none, if one of them is not there.
        """
        with self.writes():
            budget.record_use(self, _ids(ids), namespace)

    def set_budget(self, budget_bytes: int | None) -> None:
        """Another budget of vectors in bytes, or None. Raises ValueError for anything else."""
        budget.check_budget(budget_bytes)
        with self.writes() as connection:
            with database.transaction(connection):
                database.put(connection, "budget_bytes", budget_bytes)
            budget.enforce(self)

    def scrub(self) -> None:
        """Finishes an erasure: the database's own files hold nothing of what was deleted."""
        with self.writes():
            maintenance.scrub(self)

    def add_bank(
        self,
        bank: MemoryBank,
        ids: Sequence[str] | None = None,
        namespace: str = DEFAULT_NAMESPACE,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        *,
        if_exists: str = "error",
    ) -> list[str]:
        """Adds the documents of a dense bank that the store's model has encoded; see `add`.

        Raises MemoryMismatchError if another model made it, ValueError if it is packed, and what `add` does.
        """
        drafts = drafts_of(list(bank.documents), ids, namespace, metadata)
        with self.writes():
            store_drafts(self, drafts, if_exists, exchange.vectors_of_bank(self, bank, drafts))
        return [draft.document for draft in drafts]

    def import_from(
        self, folder: str | Path, namespace: str | None = None, *, if_exists: str = "error"
    ) -> list[str]:
        """Adds the documents of an export in one commit, and returns their ids.

        Vectors of an export of the same provenance are taken as they are; else texts are encoded.

        Args:
            namespace: for all of them; by default each keeps its own. if_exists: see `add`.

        Raises FileNotFoundError, MemoryFormatError (damaged; nothing is added), and what `add` raises.
        """
        export = exchange.Export(folder)
        drafts = export.drafts(namespace)
        with self.writes():
            store_drafts(self, drafts, if_exists, exchange.vectors_of_export(self, export, drafts))
        return [draft.document for draft in drafts]

    def reencode(self, model, tokenizer, *, model_path: str | None = None, progress: bool = False) -> None:
        """Makes the store one of another model: encodes all texts, those of the history, too.

        The old vectors stay until all new ones are on the disk. Readers must open the store again.
        """
        with self.writes():
            reencoding.reencode(self, model, tokenizer, model_path, progress)

    def compact(self, history: bool = True) -> None:
        """Puts the vectors into few segments in order, and gives back space that nothing needs.

        Args:
            history: keep what undo and earlier versions need. Without it only what is visible now, or to
                a reader that is open, stays.
        """
        with self.writes():
            maintenance.compact(self, history)

    def verify(self) -> list[str]:
        """Checks all bytes against their checksums, and that all parts fit. What is wrong, as sentences."""
        with self._guard:
            return verification.verify(self)

    def stats(self) -> dict[str, Any]:
        """Counts and bytes of the store."""
        with self.reads():
            return verification.stats(self)

    # What writing needs

    @contextmanager
    def writes(self) -> Iterator[sqlite3.Connection]:
        """The database, for one method that may commit."""
        if self._writer is None:
            raise StoreError(f"{self.path} was opened with read_only=True: open it for writing")
        with self._guard, translated(self.path):
            yield self._connection

    def encode(
        self, texts: list[str], numbers: list[int], batch_tokens: int | None = None, progress: bool = False
    ):
        """A dense bank of texts. Raises StoreModelError without a model."""
        if self.model is None:
            raise StoreModelError(
                f"{self.path} was opened without its model, which encodes texts: give it to open()"
            )
        return self.model.encode_memory(
            texts, self.tokenizer, batch_tokens=batch_tokens, progress=progress, numbers=numbers
        )

    def committed(self, version: int) -> None:
        """Takes note of a commit that is now read."""
        self._version = version
        self._banks.clear()

    def _change(self, change) -> int:
        with database.transaction(self._connection):
            version = change(Journal(self._connection))
        self.committed(version)
        return version

    def _step(self, kind: str, steps: int) -> int:
        if type(steps) is not int or steps < 1:
            raise ValueError(f"steps must be at least 1; got {steps!r}")
        with self.writes():
            return self._change(lambda journal: getattr(journal, kind)(steps))

    def _known(self, connection: sqlite3.Connection, id: str, namespace: str) -> records.Version:
        found = records.find(connection, self._version, namespace, id)
        if found is None:
            raise UnknownDocumentError(f"no document {id!r} in namespace {namespace!r}")
        return found


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
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
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


def _ids(ids: str | Sequence[str]) -> list[str]:
    names = list(ids) if isinstance(ids, Iterable) and not isinstance(ids, str) else [ids]
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"ids must be texts; got {name!r}")
    return list(dict.fromkeys(names))
