"""Files into a store: what has changed since the last time is encoded, and nothing else.

A document of a file becomes pieces: store documents whose id is the document's, or, if it was cut, "id#1",
"id#2" ... Their metadata names the document, the file, and what the file itself tells.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from transformers.utils.logging import tqdm

from .documents import Document, read_documents, split_document
from .modeling.errors import DocumentError
from .store import MemoryStore, StoredDocument, UnknownDocumentError
from .store.drafts import checked_metadata

PORTION_TOKENS = 100_000  # new tokens of one commit: what an interruption costs at most
LONGEST_ID = 900  # characters; the store takes some more, for the number of a piece
OWN_PLACE = ("start", "end", "pieces")  # would change with every edit elsewhere in the document


@dataclass(frozen=True)
class StoreIngestion:
    """What an ingestion did: documents that were read, their pieces, and what became of these."""

    documents: int
    pieces: int
    added: int
    updated: int
    deleted: int
    unchanged: int
    version: int

    def to_dict(self) -> dict[str, int]:
        """Plain data for JSON."""
        return asdict(self)


def ingest_into(
    store: MemoryStore,
    paths: Iterable[str | Path],
    *,
    namespace: str = "default",
    max_tokens: int = 128,
    batch_tokens: int | None = None,
    portion_tokens: int = PORTION_TOKENS,
    progress: bool = False,
    on_error: Callable[[DocumentError], None] | None = None,
) -> StoreIngestion:
    """Brings files and folders into a store that was opened with its model.

    Pieces that are there already cost nothing; those that differ are updated; pieces that a document no
    longer has are deleted, after its new ones are there. Documents of other files stay as they are, also of
    files that are gone. A document of another file with the same id gets the id "id~2" and so on, unless that
    other file is no longer where it was: then this is taken for the same file in a new place.

    Every commit holds some new pieces, so that after an interruption the same call goes on.

    Args:
        max_tokens: limit of one piece of a document, title line included.
        portion_tokens: new tokens of one commit.
        on_error: see `read_documents`.

    Raises:
        DocumentError: a file cannot be read, or there is no text at all.
        StoreError: see `MemoryStore.add`.
    """
    if portion_tokens < 1:
        raise ValueError(f"portion_tokens must be at least 1; got {portion_tokens}")
    portion = _Portion(store, namespace, portion_tokens, batch_tokens, progress)
    names = _Names(store, namespace)
    count_tokens = token_counter(store.tokenizer)
    documents = pieces = 0
    read = read_documents(paths, on_error=on_error)
    for document in tqdm(read, desc="reading", unit=" documents", disable=not progress):
        try:
            metadata = _metadata(document)
        except ValueError as error:
            refused = DocumentError(f"{document.source} cannot be stored: {error}")
            if on_error is None:
                raise refused from error
            on_error(refused)
            continue
        name = names.choose(document, metadata)
        cut = split_document(document, max_tokens, count_tokens)
        ids = [name if piece.id == document.id else f"{name}#{number}" for number, piece in enumerate(cut, 1)]
        documents, pieces = documents + 1, pieces + len(cut)
        for number, (own, piece) in enumerate(zip(ids, cut), 1):
            notes = {**metadata, "document": name, "title": piece.title}
            if own != name:
                notes["piece"] = number
            portion.put(own, piece.content, notes, count_tokens)
        portion.remove(names.outgrown(name, ids))
    portion.commit()
    if not documents:
        raise DocumentError("no text was found in the given files and folders")
    return StoreIngestion(documents, pieces, **portion.counts, version=store.version)


class _Portion:
    """Pieces that wait for the next commit."""

    def __init__(
        self, store: MemoryStore, namespace: str, tokens: int, batch_tokens: int | None, progress: bool
    ):
        self.store, self.namespace, self.limit = store, namespace, tokens
        self.options = {"batch_tokens": batch_tokens, "progress": progress}
        self.counts = dict.fromkeys(("added", "updated", "deleted", "unchanged"), 0)
        self.pieces: list[tuple[str, str, dict[str, Any]]] = []
        self.gone: list[str] = []
        self.tokens = self.updates = 0

    def put(self, id: str, text: str, metadata: dict[str, Any], count_tokens: Callable[[str], int]) -> None:
        known = _find(self.store, self.namespace, id)
        if known is not None and known.text == text and known.metadata == metadata:
            self.counts["unchanged"] += 1
            return
        self.updates += known is not None
        self.pieces.append((id, text, metadata))
        if known is None or known.text != text:
            self.tokens += count_tokens(text)
        if self.tokens >= self.limit:
            self.commit()

    def remove(self, ids: Iterable[str]) -> None:
        self.gone += ids

    def commit(self) -> None:
        if self.pieces:
            ids, texts, metadata = map(list, zip(*self.pieces))
            self.store.add(texts, ids, self.namespace, metadata, if_exists="update", **self.options)
        if self.gone:
            self.store.delete(self.gone, self.namespace)
        self.counts["added"] += len(self.pieces) - self.updates
        self.counts["updated"] += self.updates
        self.counts["deleted"] += len(self.gone)
        self.pieces, self.gone, self.tokens, self.updates = [], [], 0, 0


class _Names:
    """Which document of the store a document of a file is."""

    def __init__(self, store: MemoryStore, namespace: str):
        self.store, self.namespace = store, namespace
        self.taken: set[str] = set()
        self.read: Counter[str] = Counter()

    def choose(self, document: Document, metadata: dict[str, Any]) -> str:
        """The id in the store: the one that its file has there, else the first that is free."""
        file, free = _file(metadata), None
        for name in self._family(document.id):
            if name in self.taken:
                continue
            known = self._first_piece(name)
            if known is None:
                free = free or name
                break
            if known.metadata.get("document") == name:
                if _file(known.metadata) == file:
                    free = name
                    break
                if free is None and not os.path.exists(_file(known.metadata)):
                    free = name
        self.taken.add(free)
        return free

    def outgrown(self, name: str, ids: list[str]) -> Iterator[str]:
        """Pieces that the document had in the store and has no more."""
        cut = ids != [name]
        if cut and self._is_piece_of(name, name):
            yield name
        for number in count(len(ids) + 1 if cut else 1):
            if not self._is_piece_of(f"{name}#{number}", name):
                return
            yield f"{name}#{number}"

    def _family(self, id: str) -> Iterator[str]:
        """`id`, "id~2", "id~3" ...; `read_documents` has numbered those that it met in one call itself."""
        numbered = re.fullmatch(r"(.*)~(\d+)", id, re.S)
        if numbered and int(numbered[2]) == self.read[numbered[1]] + 1 > 1:
            id = numbered[1]
        self.read[id] += 1
        base = _storable(id)
        yield base
        for number in count(2):
            yield f"{base}~{number}"

    def _first_piece(self, name: str) -> StoredDocument | None:
        return _find(self.store, self.namespace, name) or _find(self.store, self.namespace, f"{name}#1")

    def _is_piece_of(self, id: str, name: str) -> bool:
        known = _find(self.store, self.namespace, id)
        return known is not None and known.metadata.get("document") == name


def _metadata(document: Document) -> dict[str, Any]:
    """What all pieces of a document say of it. Raises ValueError if that cannot be stored.

    "source" is the file, or what a JSON line itself has there; the file is then "file".
    """
    path = document.source
    if document.metadata.get("kind") == "jsonl":
        path = path.rpartition(":")[0]  # the number of the line changes with every edit before it
    path = "".join(c if c.isprintable() else "?" for c in os.path.abspath(path))
    own = {name: value for name, value in document.metadata.items() if name not in OWN_PLACE}
    place = {"source": path} if not isinstance(own.get("source"), str) else {"file": path}
    return checked_metadata(0, own | place)


def _file(metadata: dict[str, Any]) -> str:
    """The file that a piece came from; empty for a document that no file was ingested for."""
    return str(metadata.get("file") or metadata.get("source") or "")


def _storable(id: str) -> str:
    """An id as a store takes it: printable, not too long, and never that of a piece."""
    id = "".join(c if c.isprintable() else "?" for c in id)
    id = id if len(id) <= LONGEST_ID else f"{id[: LONGEST_ID - 1]}…"
    return f"{id}~1" if re.search(r"#\d+\Z", id) else id


def _find(store: MemoryStore, namespace: str, id: str) -> StoredDocument | None:
    try:
        return store.get(id, namespace)
    except UnknownDocumentError:
        return None


def token_counter(tokenizer) -> Callable[[str], int]:
    """What `split_document` measures texts with."""
    return lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
