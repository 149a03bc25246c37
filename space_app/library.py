"""The documents of one session: a MemoryStore that is opened for the moment in which it is used."""

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from msa_hf.documents import Document, split_document
from msa_hf.store import MemoryStore, StoredDocument, StoreLockedError

from .changes import Changes
from .engine import Engine
from .limits import Limits
from .meter import Meter, cache_bytes
from .refusals import Refused

STORE = "store"
LONGEST_NAME = 200  # characters
SHOWN_EVERY = 0.5  # seconds between two states of cutting


@dataclass(frozen=True)
class Row:
    """A document of the library: its name, and how many passages and tokens it is."""

    name: str
    title: str
    kind: str
    passages: int
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Progress:
    """How far adding documents has come.

    Attributes:
        all_tokens: 0 until all documents are cut into passages; `cut` of them are. seconds: since then.
        cancelled: it ended early.
    """

    documents: int
    all_documents: int
    tokens: int
    all_tokens: int
    seconds: float
    ended: bool = False
    cancelled: bool = False
    cut: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """None while nothing is known."""
        rate = self.tokens_per_second
        return (self.all_tokens - self.tokens) / rate if rate else None


@dataclass(frozen=True)
class _Passage:
    id: str
    text: str
    metadata: dict[str, Any]
    tokens: int


class Library:
    """What a session has added. One change at a time; reading goes on meanwhile.

    Args:
        folder: of the session. visitor: whose turns encoding takes.
    """

    def __init__(self, folder: Path, engine: Engine, limits: Limits, visitor: str):
        self.folder, self._engine, self._limits, self._visitor = folder, engine, limits, visitor
        self._changing = threading.Lock()
        self._cancelled = threading.Event()
        if not self.store.is_dir():
            MemoryStore.create(self.store, engine.model, engine.tokenizer).close()
        self._changes = Changes(folder)
        self._known: tuple[int, list[Row]] = (-1, [])  # the rows of a commit

    @property
    def store(self) -> Path:
        return self.folder / STORE

    @property
    def busy(self) -> bool:
        return self._changing.locked()

    # Reading

    def rows(self, search: str = "") -> list[Row]:
        """The documents whose name or title has all words of `search`, the oldest first."""
        words = search.casefold().split()
        with self._reading() as store:
            return [row for row in self._rows_of(store) if _matches(row, words)]

    def text(self, name: str) -> str:
        """The text of a document, as it was cut. Raises Refused if it is not there."""
        pieces = [own for own in self._stored() if own.metadata["document"] == name]
        if not pieces:
            raise Refused(f"There is no document {name!r} any more.")
        pieces.sort(key=lambda own: own.metadata["piece"])
        titles = [f"{own.metadata['title']}\n" if own.metadata["title"] else "" for own in pieces]
        return "\n\n".join(own.text.removeprefix(title) for own, title in zip(pieces, titles))

    def meter(self) -> Meter:
        with self._reading() as store:
            rows, stats = self._rows_of(store), store.stats()
        tokens = sum(row.tokens for row in rows)
        return Meter(
            documents=len(rows),
            passages=sum(row.passages for row in rows),
            tokens=tokens,
            vector_bytes=stats["vector_bytes"] if rows else 0,
            cache_bytes=cache_bytes(self._engine.model.config, tokens),
            most_tokens=self._limits.tokens,
        )

    @property
    def undoable(self) -> int:
        return self._changes.undoable

    @property
    def redoable(self) -> int:
        return self._changes.redoable

    # Changing

    def add(self, documents: Sequence[Document]) -> Iterator[Progress]:
        """Adds documents; one of a name that is there replaces it. `cancel` ends it after a portion.

        What is refused is refused before the first portion: too many documents or tokens. Every portion is a
        commit, so whatever happens, what was reported as done is in the library.
        """
        with self._change():
            self._cancelled.clear()
            yield from self._add(_named(documents))

    def cancel(self) -> None:
        """Ends what `add` does; what is done stays."""
        self._cancelled.set()

    def free_name(self, wanted: str) -> str:
        """`wanted`, or with the first number that makes it new."""
        taken, name, number = {row.name for row in self.rows()}, wanted, 2
        while name in taken:
            name, number = f"{wanted} ({number})", number + 1
        return name

    def delete(self, names: Iterable[str]) -> None:
        """Removes documents, which `undo` brings back. Raises Refused, removing none, if one is not there."""
        with self._change(), self._writing() as store:
            store.delete(_passages_of(store.list(), names))
            self._changes.note()

    def forget(self, names: Iterable[str]) -> None:
        """Erases documents from every file. Earlier changes cannot be undone any more."""
        with self._change():
            try:
                with self._writing() as store:
                    gone = _passages_of(store.list(), names)
                    self._changes.clear()
                    store.forget(gone)
            except StoreLockedError as error:
                raise Refused(
                    "These documents are gone. An answer is still being written; the last traces of them are "
                    "removed with the next change after it."
                ) from error

    def undo(self) -> None:
        with self._change(), self._writing() as store:
            self._changes.undo(store.undo)

    def redo(self) -> None:
        with self._change(), self._writing() as store:
            self._changes.redo(store.redo)

    def _add(self, documents: list[Document]) -> Iterator[Progress]:
        stored = self._stored()
        known = {row.name: row for row in _rows(stored)}
        passages: list[list[_Passage]] = []
        shown = time.monotonic()
        for document in documents:
            passages.append(self._cut(document))
            if time.monotonic() - shown > SHOWN_EVERY:
                shown = time.monotonic()
                yield Progress(0, len(documents), 0, 0, 0.0, cut=len(passages))
        self._check_room(known, documents, passages)
        replaced = {document.id for document in documents} & known.keys()
        flat = [passage for cut in passages for passage in cut]
        last = {cut[-1].id for cut in passages}
        all_tokens = sum(own.tokens for own in flat)
        progress = Progress(0, len(documents), 0, all_tokens, 0.0, cut=len(documents))
        begun = time.monotonic()
        yield progress
        for portion in _portions(flat, self._engine.portion_tokens):
            # A document is not left half replaced.
            inside = portion[0].metadata["document"] in replaced and portion[0].metadata["piece"] > 1
            if self._cancelled.is_set() and not inside:
                break
            self._store(portion)
            progress = replace(
                progress,
                documents=progress.documents + sum(own.id in last for own in portion),
                tokens=progress.tokens + sum(own.tokens for own in portion),
                seconds=time.monotonic() - begun,
            )
            yield progress
        finished = replaced & {document.id for document in documents[: progress.documents]}
        current = {own.id for own in flat}
        self._remove(
            [own.id for own in stored if own.metadata["document"] in finished and own.id not in current]
        )
        yield replace(progress, ended=True, cancelled=progress.tokens < progress.all_tokens)

    def _cut(self, document: Document) -> list[_Passage]:
        pieces = split_document(document, self._limits.piece_tokens, self._engine.count)
        if not pieces:
            raise Refused(f"{document.id} has no text.")
        result = []
        for number, piece in enumerate(pieces, 1):
            own = document.id if len(pieces) == 1 else f"{document.id}#{number}"
            notes = {"document": document.id, "title": piece.title, "source": document.id}
            notes |= {"document_title": document.title, "kind": document.metadata["kind"], "piece": number}
            result.append(_Passage(own, piece.content, notes, self._engine.count(piece.content)))
        return result

    def _check_room(
        self, known: dict[str, Row], documents: list[Document], passages: list[list[_Passage]]
    ) -> None:
        new = {document.id: cut for document, cut in zip(documents, passages)}
        number = len(known.keys() | new.keys())
        if number > self._limits.documents:
            raise Refused(
                f"The library would have {number:,} documents; it may have {self._limits.documents:,}. "
                "Delete some, or add fewer."
            )
        tokens = sum(row.tokens for name, row in known.items() if name not in new)
        tokens += sum(own.tokens for cut in new.values() for own in cut)
        if tokens > self._limits.tokens:
            raise Refused(
                f"The library would have {tokens:,} tokens; it may have {self._limits.tokens:,}. "
                "Delete some documents, or add less."
            )

    def _store(self, portion: list[_Passage]) -> None:
        ids, texts, notes = (list(column) for column in zip(*((o.id, o.text, o.metadata) for o in portion)))
        self._changes.note(self._engine.add(self.store, texts, ids, notes, self._visitor))

    def _remove(self, ids: list[str]) -> None:
        if ids:
            with self._writing() as store:
                store.delete(ids)
                self._changes.note()

    def _rows_of(self, store: MemoryStore) -> list[Row]:
        version, rows = self._known
        if version != store.version:
            version, rows = store.version, _rows(store.list())
            self._known = version, rows
        return rows

    def _stored(self) -> list[StoredDocument]:
        with self._reading() as store:
            return store.list()

    @contextmanager
    def _reading(self) -> Iterator[MemoryStore]:
        with MemoryStore.open(self.store, read_only=True) as store:
            yield store

    @contextmanager
    def _writing(self) -> Iterator[MemoryStore]:
        with MemoryStore.open(self.store) as store:
            yield store

    @contextmanager
    def _change(self) -> Iterator[None]:
        if not self._changing.acquire(blocking=False):
            raise Refused("Documents are being added at the moment: wait until that has ended, or cancel it.")
        self._changes.begin()
        try:
            yield
        finally:
            self._changing.release()


def _rows(stored: Iterable[StoredDocument]) -> list[Row]:
    rows: dict[str, Row] = {}
    for own in stored:
        notes = own.metadata
        name = notes["document"]
        known = rows.get(name) or Row(name, notes["document_title"], notes["kind"], 0, 0)
        rows[name] = replace(known, passages=known.passages + 1, tokens=known.tokens + own.tokens)
    return list(rows.values())


def _matches(row: Row, words: list[str]) -> bool:
    shown = f"{row.name}\n{row.title}".casefold()
    return all(word in shown for word in words)


def _passages_of(stored: list[StoredDocument], names: Iterable[str]) -> list[str]:
    names = list(dict.fromkeys(names))
    if not names:
        raise Refused("Choose a document first.")
    known = {own.metadata["document"] for own in stored}
    for name in names:
        if name not in known:
            raise Refused(f"There is no document {name!r} any more.")
    return [own.id for own in stored if own.metadata["document"] in names]


def _named(documents: Iterable[Document]) -> list[Document]:
    """The documents under names that a store takes, all different, and none that of another's passage."""
    result: list[Document] = []
    taken: set[str] = set()
    for document in documents:
        name = "".join(c if c.isprintable() else "?" for c in document.id.replace("#", "\uff03"))
        wanted, number = name.strip()[:LONGEST_NAME] or "document", 2
        name = wanted
        while name in taken:
            name, number = f"{wanted} ({number})", number + 1
        taken.add(name)
        result.append(replace(document, id=name))
    return result


def _portions(passages: list[_Passage], tokens: int) -> Iterator[list[_Passage]]:
    portion: list[_Passage] = []
    held = 0
    for passage in passages:
        portion.append(passage)
        held += passage.tokens
        if held >= tokens:
            yield portion
            portion, held = [], 0
    if portion:
        yield portion
