"""The writing half of a store: every method is one commit, durable when it returns, or changes nothing."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..modeling.memory_bank import MemoryBank
from . import budget, database, exchange, maintenance, records, reencoding, segments
from .drafts import Draft, drafts_of
from .errors import UnknownDocumentError
from .journal import Journal
from .reader import DEFAULT_NAMESPACE
from .rewriting import encoded
from .writing import store_drafts

if TYPE_CHECKING:
    from .store import MemoryStore


class StoreWriter:
    """Methods of `MemoryStore` that commit. All raise StoreError for a store that was opened to read only,
    and StoreWriteError where the disk refuses."""

    _store: MemoryStore

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
            return encoded(self._store, [draft.text for draft in new], numbers, batch_tokens, progress)

        with self._store.writes():
            store_drafts(self._store, drafts, if_exists, vectors)
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
        known = self._store.get(id, namespace).metadata
        self.add([text], [id], namespace, [known if metadata is None else metadata], if_exists="update")

    def delete(self, ids: str | Sequence[str], namespace: str = DEFAULT_NAMESPACE) -> None:
        """Removes documents from the memory. `undo` brings them back; `forget` erases them.

        Raises UnknownDocumentError, removing none, if one of them is not there.
        """
        with self._store.writes() as connection:
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
        with self._store.writes():
            maintenance.forget(self._store, _ids(ids), namespace)

    def record_use(self, ids: str | Sequence[str], namespace: str = DEFAULT_NAMESPACE) -> None:
        """Counts a use of documents. What is used keeps, or gets back, its precision under a budget.

        Raises UnknownDocumentError, counting none, if one of them is not there.
        """
        with self._store.writes():
            budget.record_use(self._store, _ids(ids), namespace)

    def set_budget(self, budget_bytes: int | None) -> None:
        """Another budget of vectors in bytes, or None. Raises ValueError for anything else."""
        budget.check_budget(budget_bytes)
        with self._store.writes() as connection:
            with database.transaction(connection):
                database.put(connection, "budget_bytes", budget_bytes)
            budget.enforce(self._store)

    def scrub(self) -> None:
        """Finishes an erasure: the database's own files hold nothing of what was deleted."""
        with self._store.writes():
            maintenance.scrub(self._store)

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

        Raises MemoryMismatchError if another model made it, ValueError if it is packed, and as `add`.
        """
        drafts = drafts_of(list(bank.documents), ids, namespace, metadata)
        with self._store.writes():
            store_drafts(self._store, drafts, if_exists, exchange.vectors_of_bank(self._store, bank, drafts))
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
        with self._store.writes():
            store_drafts(
                self._store, drafts, if_exists, exchange.vectors_of_export(self._store, export, drafts)
            )
        return [draft.document for draft in drafts]

    def reencode(self, model, tokenizer, *, model_path: str | None = None, progress: bool = False) -> None:
        """Makes the store one of another model: encodes all texts, those of the history, too.

        The old vectors stay until all new ones are on the disk. Readers must open the store again.
        """
        with self._store.writes():
            reencoding.reencode(self._store, model, tokenizer, model_path, progress)

    def compact(self, history: bool = True) -> None:
        """Puts the vectors into few segments in order, and gives back space that nothing needs.

        Args:
            history: keep what undo and earlier versions need. Without it only what is visible now, or to
                a reader that is open, stays.
        """
        with self._store.writes():
            maintenance.compact(self._store, history)

    def _change(self, change) -> int:
        with database.transaction(self._store.connection):
            version = change(Journal(self._store.connection))
        self._store.committed(version)
        return version

    def _step(self, kind: str, steps: int) -> int:
        if type(steps) is not int or steps < 1:
            raise ValueError(f"steps must be at least 1; got {steps!r}")
        with self._store.writes():
            return self._change(lambda journal: getattr(journal, kind)(steps))

    def _known(self, connection: sqlite3.Connection, id: str, namespace: str) -> records.Version:
        found = records.find(connection, self._store.version, namespace, id)
        if found is None:
            raise UnknownDocumentError(f"no document {id!r} in namespace {namespace!r}")
        return found


def _ids(ids: str | Sequence[str]) -> list[str]:
    names = list(ids) if isinstance(ids, Iterable) and not isinstance(ids, str) else [ids]
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"ids must be texts; got {name!r}")
    return list(dict.fromkeys(names))
