"""What can be asked of a store at one of its versions: documents, search, and the bank that a model reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..modeling.memory_bank import MemoryBank
from ..modeling.retrieval_msa import FUSION_DEPTH, MODES
from . import database, exchange, records, view
from .drafts import check_text
from .errors import HistoryError, StoreModelError, UnknownDocumentError

if TYPE_CHECKING:
    from .store import MemoryStore

DEFAULT_NAMESPACE = "default"


@dataclass(frozen=True)
class StoredDocument:
    """A document as the store has it; `version` is the commit since which it is so, `tokens` as encoded."""

    id: str
    namespace: str
    text: str
    metadata: dict[str, Any]
    tokens: int
    version: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Hit:
    """A document that a search found, best first.

    Attributes:
        score: what it was ranked by (fused, routers' consensus or BM25). router_rank, router_score: by the
            routers alone; None in a lexical search without a model. lexical: BM25, None without common words.
    """

    id: str
    namespace: str
    text: str
    score: float
    router_rank: int | None
    router_score: float | None
    lexical: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Event:
    """One change of a document: commit, when, by what kind of commit, and what the document was afterwards
    (text and metadata; None where it was no longer there)."""

    version: int
    time: float
    kind: str
    action: str
    text: str | None
    metadata: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class StoreReader:
    """The reading half of a store, at `version`.

    Every method names the namespaces that it may read; documents of others are neither selected, scored nor
    counted. `namespaces` is a name or a list of names, by default "default"; "*" stands for all.
    """

    _store: MemoryStore

    @property
    def version(self) -> int:
        """Number of the commit whose state is read."""
        raise NotImplementedError

    def bank(
        self, namespaces: str | Sequence[str] = DEFAULT_NAMESPACE, where: Mapping[str, Any] | None = None
    ) -> MemoryBank:
        """The memory that a model reads: `model.generate(..., memory=store.bank())`.

        The bank stays as it is, whatever is written afterwards. Its vectors are memory-mapped, its texts are
        read when they are needed.

        Args:
            where: metadata that documents must have, as {name: value} or {name: [value, value]}.
        """
        return self._store.bank_at(self.version, _names(namespaces), _conditions(where))

    def get(self, id: str, namespace: str = DEFAULT_NAMESPACE) -> StoredDocument:
        """One document. Raises UnknownDocumentError if it is not there."""
        with self._store.reads() as connection:
            found = records.find(connection, self.version, namespace, id)
            if found is None:
                raise UnknownDocumentError(f"no document {id!r} in namespace {namespace!r}")
            return next(_documents(connection, [found.id], self.version))

    def list(
        self,
        namespaces: str | Sequence[str] = DEFAULT_NAMESPACE,
        where: Mapping[str, Any] | None = None,
        limit: int | None = None,
        offset: int = 0,
    ) -> list[StoredDocument]:
        """Documents in the order of the bank, at most `limit`, after the first `offset`."""
        for name, value in (("limit", limit or 0), ("offset", offset)):
            if type(value) is not int or value < 0:
                raise ValueError(f"{name} must be at least 0; got {value!r}")
        where = _conditions(where)
        with self._store.reads() as connection:
            found = view.visible(connection, self.version, _names(namespaces))
            if where:
                found = view.matching(connection, found, where)
            stop = None if limit is None else offset + limit
            return list(_documents(connection, found.ids[offset:stop].tolist(), self.version))

    def count(self, namespaces: str | Sequence[str] = "*", where: Mapping[str, Any] | None = None) -> int:
        """How many documents there are."""
        where = _conditions(where)
        with self._store.reads() as connection:
            found = view.visible(connection, self.version, _names(namespaces))
            return len(view.matching(connection, found, where) if where else found)

    def __len__(self) -> int:
        return self.count()

    def namespaces(self) -> list[str]:
        """The names of the namespaces that hold documents."""
        with self._store.reads() as connection:
            return records.namespaces(connection, self.version)

    def history(self, id: str, namespace: str = DEFAULT_NAMESPACE) -> list[Event]:
        """What happened to a document until this version, oldest first.

        Raises UnknownDocumentError if nothing is known of it.
        """
        with self._store.reads() as connection:
            events = [Event(*row) for row in records.events(connection, namespace, id, self.version)]
        if not events:
            raise UnknownDocumentError(f"nothing is known of a document {id!r} in namespace {namespace!r}")
        return events

    def search(
        self,
        query: str,
        k: int = 10,
        *,
        mode: str | None = None,
        namespaces: str | Sequence[str] = DEFAULT_NAMESPACE,
        where: Mapping[str, Any] | None = None,
    ) -> list[Hit]:
        """The k documents that suit a query best.

        Args:
            mode: "router", "lexical" (BM25 over SQLite's FTS5) or "fused", see `retrieval_msa.rank`. By
                default the model's own choice, and "lexical" for a store that was opened without one.

        Raises ValueError for an empty query, k below 1 or another mode; StoreModelError without a model.
        """
        if not isinstance(query, str) or not query.strip():
            raise ValueError(f"query must be a text with at least one character; got {query!r}")
        check_text("query", query)
        if type(k) is not int or k < 1:
            raise ValueError(f"k must be at least 1; got {k!r}")
        if mode is not None and mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
        bank, model = self.bank(namespaces, where), self._store.model
        if model is None:
            if mode not in (None, "lexical"):
                raise StoreModelError(f"a search by {mode!r} needs the model: open the store with it")
            words = bank.lexical.search(query, max(k, FUSION_DEPTH))
            found = [(i, score, None, None, dict(words).get(i)) for i, score in _linked(bank, words)[:k]]
        else:
            ranked = model.rank_documents([query], bank, k, mode, self._store.tokenizer)[0]
            found = [(own.id, own.score, own.router_rank, own.consensus, own.lexical) for own in ranked]
        notes = bank.metadata["documents"]
        hits = []
        for index, *scores in found:
            note = notes[index]
            hits.append(Hit(note["id"], note["namespace"], bank.documents[index], *scores))
        return hits

    def export_to(self, folder: str | Path, namespaces: str | Sequence[str] = "*") -> int:
        """Writes the documents with their vectors into a folder, for `import_from` and for the Hub; how many.

        Raises StoreError if the folder holds something else, StoreWriteError where the disk refuses.
        """
        return exchange.export_to(self, folder, _names(namespaces))


class Snapshot(StoreReader):
    """A store as it was after an earlier commit; it can only be read."""

    def __init__(self, store: MemoryStore, version: int):
        self._store, self._version = store, version

    @property
    def version(self) -> int:
        """Number of the commit. Raises HistoryError once a compaction has given it up."""
        with self._store.reads() as connection:
            oldest = database.read(connection, "oldest") or 1
        if self._version < oldest and self._version != self._store.version:
            raise HistoryError(f"version {self._version} is no longer kept: the oldest is {oldest}")
        return self._version


def _linked(bank: MemoryBank, words: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return bank.lexical.follow_links(words[:FUSION_DEPTH], bank.documents)


def _documents(connection, versions: list[int], at: int):
    """StoredDocuments of versions that are visible at commit `at`."""
    for start in range(0, len(versions), view.PORTION):
        wanted = versions[start : start + view.PORTION]
        texts = dict(records.texts(connection, wanted))
        metadata = dict(records.metadata(connection, wanted))
        rows = records.headers(connection, wanted, at)
        for version in wanted:
            if version not in texts or version not in rows:
                raise HistoryError("a document was erased from the store; refresh() shows what is there")
            namespace, document, tokens, born = rows[version]
            yield StoredDocument(document, namespace, texts[version], metadata[version], tokens, born)


def _names(namespaces: str | Sequence[str]) -> tuple[str, ...] | None:
    """The namespaces to read, None for all. Raises ValueError for anything that is no name."""
    if namespaces == "*":
        return None
    several = isinstance(namespaces, Iterable) and not isinstance(namespaces, str)
    names = list(namespaces) if several else [namespaces]
    for name in names:
        if not isinstance(name, str) or name in ("", "*"):
            raise ValueError(f"namespaces must be names, or '*' alone for all; got {name!r}")
        check_text("namespaces", name)
    return tuple(sorted(set(names)))


def _conditions(where: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if where is None:
        return {}
    if not isinstance(where, Mapping) or not all(isinstance(name, str) for name in where):
        raise ValueError(f"where must be values by names of metadata; got {where!r}")
    return where
