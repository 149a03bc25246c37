"""Another model for a store: every version that is kept is encoded again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from . import budget, database, records
from .provenance import coding_of, provenance_of
from .records import Version
from .rewriting import Rewriting, encoded

if TYPE_CHECKING:
    from .store import MemoryStore

PORTION_CHARACTERS = 2_000_000  # of the texts that are encoded for one segment


def reencode(store: MemoryStore, model, tokenizer, model_path: str | None, progress: bool) -> None:
    """See `MemoryStore.reencode`."""
    before = (store.coding, store.model, store.tokenizer)
    bits = store.provenance
    provenance = provenance_of(model, tokenizer, bits.key_bits, bits.value_bits, bits.router_bits)
    with store.reads() as connection:
        versions = records.all_versions(connection)
        files = records.segment_files(connection)
    store.coding, store.model, store.tokenizer = coding_of(provenance, model, tokenizer), model, tokenizer
    try:
        with Rewriting(store) as rewriting:
            tokens: dict[int, int] = {}
            for portion, texts in _portions(store, versions):
                segment = encoded(store, texts, [own.id for own in portion], progress=progress)
                rewriting.place(portion, rewriting.write([], segment))
                tokens |= dict(zip((own.id for own in portion), segment.token_counts.tolist()))
            with database.transaction(store.connection):
                rewriting.leave(sorted(files))
                rewriting.record()
                records.count_tokens(store.connection, tokens)
                values = {"provenance": provenance.to_json(), "coding": store.coding.to_bytes()}
                for name, value in {**values, "model": model_path}.items():
                    database.put(store.connection, name, value)
    except BaseException:
        store.coding, store.model, store.tokenizer = before
        raise
    store.committed(store.version)
    budget.enforce(store)


def _portions(store: MemoryStore, versions: list[Version]) -> Iterator[tuple[list[Version], list[str]]]:
    portion: list[Version] = []
    texts: list[str] = []
    size = 0
    for version in versions:
        with store.reads() as connection:
            text = dict(records.texts(connection, [version.id]))[version.id]
        portion.append(version)
        texts.append(text)
        size += len(text)
        if size >= PORTION_CHARACTERS:
            yield portion, texts
            portion, texts, size = [], [], 0
    if portion:
        yield portion, texts
