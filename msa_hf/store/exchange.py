"""A store's documents as a folder of JSON lines and safetensors, which another store takes in as they are.

    export.json          format, provenance, names, sizes and SHA-256 of the other files
    documents.jsonl      one {"id", "namespace", "text", "metadata"} per line
    coding.safetensors   means and template head
    vectors-*.safetensors   segments with the vectors of the documents, in their order

Where a store and an export have the same provenance, vectors move without being encoded again, byte for byte.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..modeling.errors import MemoryFormatError
from ..modeling.memory_bank import MemoryBank
from ..modeling.memory_files import check_file_name, check_size, file_sha256, read_format, replace_json
from ..modeling.packed_vectors import PackedRows
from . import records, segments, view
from .coding import FULL, Coding, Provenance
from .drafts import Draft, drafts_of
from .errors import StoreError, translated
from .rewriting import encoded
from .segments import Segment, SegmentFile

if TYPE_CHECKING:
    from .reader import StoreReader
    from .store import MemoryStore

INDEX, FORMAT, FORMAT_VERSION = "export.json", "msa_hf store export", 1
DOCUMENTS, CODING = "documents.jsonl", "coding.safetensors"


def export_to(reader: StoreReader, folder: str | Path, namespaces: tuple[str, ...] | None) -> int:
    """Writes what a store or snapshot has in `namespaces` (None: all); the number of documents.

    Raises StoreError if the folder holds something else than an export.
    """
    store, folder = reader._store, Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir()) and not (folder / INDEX).is_file()):
        raise StoreError(f"{folder} exists and is no export: choose another place")
    with translated(folder), store.reads() as connection:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in [folder / INDEX, *folder.glob("vectors-*.safetensors")]:
            stale.unlink(missing_ok=True)
        found = view.visible(connection, reader.version, namespaces)
        tiers = {number: file.tier for number, file in records.segment_files(connection).items()}
        full = [tiers.get(number) == FULL for number in found.segments.tolist()]
        with open(folder / DOCUMENTS, "w", encoding="utf-8") as file:
            for line, encoded_in_full in zip(_lines(connection, found.ids.tolist()), full):
                file.write(json.dumps({**line, "vectors": encoded_in_full}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        (folder / CODING).write_bytes(store.coding.to_bytes())
        kept = found.keep(torch.tensor(full, dtype=torch.bool).numpy())
        vectors = [_write_vectors(store, folder, number, part) for number, part in enumerate(_portions(kept))]
        files = [DOCUMENTS, CODING, *(file.name for file in vectors)]
        index = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "provenance": store.provenance.to_json(),
            "documents": len(found),
            "model": store.model_path,
            "files": {
                name: {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
                for name in files
            },
            "vectors": [{"name": file.name, "documents": file.documents} for file in vectors],
        }
        replace_json(folder / INDEX, index, "new")
    return len(found)


class Export:
    """An export that was checked byte for byte.

    Raises FileNotFoundError if there is none, MemoryFormatError if it is damaged or of another version.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            raise FileNotFoundError(f"no export in {folder}: {INDEX} is missing")
        try:
            index = read_format(self.folder / INDEX, FORMAT, FORMAT_VERSION)
            for name, stored in index["files"].items():
                path = self.folder / check_file_name(name, INDEX)
                check_size(path, stored["bytes"])
                if file_sha256(path) != stored["sha256"]:
                    raise MemoryFormatError(f"{path} is damaged: its SHA-256 differs from {INDEX}")
            if not {DOCUMENTS, CODING, *(own["name"] for own in index["vectors"])} <= set(index["files"]):
                raise MemoryFormatError(f"{self.folder / INDEX} does not name all of its files")
            self.provenance = Provenance.from_json(index["provenance"])
            self.coding = Coding.from_bytes(self.provenance, (self.folder / CODING).read_bytes())
            self.model_path = index["model"]
            self.vectors = [
                SegmentFile(own["name"], index["files"][own["name"]]["bytes"], b"", own["documents"], FULL)
                for own in index["vectors"]
            ]
            self.documents = [_checked_line(line) for line in self._read_lines()]
            if len(self.documents) != index["documents"]:
                raise MemoryFormatError(f"{self.folder / DOCUMENTS} must have {index['documents']} documents")
            if sum(own["vectors"] for own in self.documents) != sum(file.documents for file in self.vectors):
                raise MemoryFormatError(f"{self.folder}: vectors and documents do not fit together")
        except MemoryFormatError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise MemoryFormatError(f"the export in {folder} is damaged: {error!r}") from error

    def drafts(self, namespace: str | None) -> list[Draft]:
        """The documents, as they are to be stored; all in `namespace`, or in their own."""
        drafts: list[Draft] = []
        for line in self.documents:
            own = line["namespace"] if namespace is None else namespace
            drafts += drafts_of([line["text"]], [line["id"]], own, [line["metadata"]])
        names = [(draft.namespace, draft.document) for draft in drafts]
        if len(set(names)) < len(names):
            raise ValueError("ids must differ; documents of several namespaces have the same one")
        return drafts

    def segments(self, coding: Coding) -> list[Segment]:
        """The vectors, memory-mapped, as segments of a store with this coding."""
        return [segments.read_file(self.folder, file, coding) for file in self.vectors]

    def _read_lines(self) -> Iterator[Any]:
        with open(self.folder / DOCUMENTS, encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)


def vectors_of_export(store: MemoryStore, export: Export, drafts: Sequence[Draft]):
    """What `writing.store_drafts` asks for: vectors of the export where they fit, others encoded."""
    numbered = store.provenance.settings.prompt_format == "msa"
    fits = not store.provenance.differences(export.provenance) and not numbered
    opened = export.segments(store.coding) if fits else []
    places: dict[tuple[str, str], tuple[int, int]] = {}
    spots = ((source, place) for source, own in enumerate(opened) for place in range(len(own.token_counts)))
    for draft, line in zip(drafts, export.documents):
        if fits and line["vectors"]:
            places[draft.namespace, draft.document] = next(spots)

    def vectors(new: list[Draft], numbers: list[int]) -> Segment:
        missing = [i for i, draft in enumerate(new) if (draft.namespace, draft.document) not in places]
        parts = list(opened)
        if missing:
            texts, own = [new[i].text for i in missing], [numbers[i] for i in missing]
            parts.append(encoded(store, texts, own))
        encoded_at = {i: (len(opened), place) for place, i in enumerate(missing)}
        chosen = [encoded_at.get(i) or places[draft.namespace, draft.document] for i, draft in enumerate(new)]
        sources, positions = torch.tensor(chosen).T
        return segments.join(parts, sources, positions)

    return vectors


def vectors_of_bank(store: MemoryStore, bank: MemoryBank, drafts: Sequence[Draft]):
    """What `writing.store_drafts` asks for, out of a bank of the store's own model."""
    bank.check_model(store.provenance.settings, store.provenance.fingerprint)
    storages = {key: getattr(bank.layers[key[0]], key[1]) for key in store.coding.keys}
    if any(isinstance(storage, PackedRows) for storage in storages.values()):
        raise ValueError(
            "the bank must be dense: the store packs it itself, so that its bytes are the store's"
        )
    if store.provenance.settings.prompt_format == "msa":
        raise ValueError('a bank of the prompt format "msa" has numbers in its vectors: add its texts')
    packed = store.coding.pack(bank)
    whole = Segment(
        bank.token_counts,
        {key: getattr(packed.layers[key[0]], key[1]) for key in store.coding.keys},
        store.coding,
    )
    place = {draft.document: number for number, draft in enumerate(drafts)}

    def vectors(new: list[Draft], numbers: list[int]) -> Segment:
        positions = torch.tensor([place[draft.document] for draft in new])
        return segments.join([whole], torch.zeros_like(positions), positions)

    return vectors


def _lines(connection, versions: list[int]) -> Iterator[dict[str, Any]]:
    for start in range(0, len(versions), view.PORTION):
        wanted = versions[start : start + view.PORTION]
        texts, metadata = dict(records.texts(connection, wanted)), dict(records.metadata(connection, wanted))
        for version in wanted:
            namespace, document, _ = records.note(connection, version)
            yield {
                "id": document,
                "namespace": namespace,
                "text": texts[version],
                "metadata": metadata[version],
            }


def _portions(versions: view.VisibleVersions) -> Iterator[view.VisibleVersions]:
    """Versions in parts of SEGMENT_TOKENS tokens."""
    parts = versions.tokens.cumsum() // segments.SEGMENT_TOKENS
    for part in sorted(set(parts.tolist())):
        yield versions.keep(parts == part)


def _write_vectors(store: MemoryStore, folder: Path, number: int, part: view.VisibleVersions) -> SegmentFile:
    wanted = sorted(set(part.segments.tolist()))
    opened = [store.segment(own) for own in wanted]
    sources = torch.tensor([wanted.index(own) for own in part.segments.tolist()])
    joined = segments.join(opened, sources, torch.from_numpy(part.positions))
    return segments.write_file(folder / f"vectors-{number:05d}.safetensors", joined)


def _checked_line(line: Any) -> dict[str, Any]:
    if set(line) != {"id", "namespace", "text", "metadata", "vectors"} or type(line["vectors"]) is not bool:
        raise ValueError("a document must have id, namespace, text, metadata and vectors")
    return line
