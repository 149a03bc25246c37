"""Files into a memory or a store: read, split, encode, save, with where each document came from."""

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .documents import Document, read_documents, split_document
from .modeling.errors import DocumentError, MSAError
from .modeling.memory_bank import MemoryBank
from .store_ingestion import StoreIngestion, ingest_into, token_counter

__all__ = ["Ingestion", "StoreIngestion", "ingest", "ingest_into", "provenance", "remember"]


@dataclass(frozen=True)
class Ingestion:
    """A new memory, and how many documents it was made of before they were split."""

    memory: MemoryBank
    documents: int


def ingest(
    model,
    tokenizer,
    paths: Iterable[str | Path],
    out: str | Path,
    *,
    model_path: str | Path | None = None,
    max_tokens: int = 128,
    batch_tokens: int | None = None,
    resume: bool = False,
    progress: bool = False,
    on_error: Callable[[DocumentError], None] | None = None,
) -> Ingestion:
    """Makes a memory of files and folders and saves it in `out`.

    Args:
        model_path: remembered in the memory, for those who ask it later.
        max_tokens: limit of one piece of a document, title line included.
        resume: go on with the batches that an interrupted call left beside `out`; otherwise they are removed.
        on_error: see `read_documents`.

    Raises:
        DocumentError: a file cannot be read, or there is no text at all.
        MSAError: `out` holds something that is not a memory.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "memory.json").is_file())):
        raise MSAError(f"{out} exists and is no memory: choose another place")

    count_tokens = token_counter(tokenizer)
    pieces: list[Document] = []
    documents = 0
    for document in read_documents(paths, on_error=on_error):
        documents += 1
        pieces += split_document(document, max_tokens, count_tokens)
    if not pieces:
        raise DocumentError("no text was found in the given files and folders")
    options = {"batch_tokens": batch_tokens, "resume": resume, "progress": progress}
    return Ingestion(remember(model, tokenizer, pieces, out, model_path=model_path, **options), documents)


def remember(
    model,
    tokenizer,
    documents: list[Document],
    out: str | Path,
    *,
    model_path: str | Path | None = None,
    batch_tokens: int | None = None,
    resume: bool = False,
    progress: bool = False,
) -> MemoryBank:
    """Makes a memory of documents as they are and saves it in `out`; see `ingest`."""
    out = Path(out)
    batches = out.with_name(out.name + ".partial")
    if not resume:
        shutil.rmtree(batches, ignore_errors=True)
    memory = model.encode_memory(
        [document.content for document in documents],
        tokenizer,
        batch_tokens=batch_tokens,
        progress=progress,
        resume_dir=batches,
        metadata=provenance(documents, model_path),
    )
    memory.save_pretrained(out)
    shutil.rmtree(batches, ignore_errors=True)
    return memory


def provenance(documents: list[Document], model_path: str | Path | None = None) -> dict[str, Any]:
    """What a memory keeps beside its texts: the model's place and each document's id, title and source."""
    known = [{"id": d.id, "title": d.title, "source": d.source} for d in documents]
    return {"documents": known} | ({"model": str(model_path)} if model_path is not None else {})
