"""What is to be written: documents as they were given, checked before anything is done."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .records import as_json, digest

LONGEST_NAME, LONGEST_METADATA = 1024, 1 << 20  # characters


@dataclass(frozen=True)
class Draft:
    """A document to be stored."""

    namespace: str
    document: str
    text: str
    metadata: dict[str, Any]
    sha256: bytes


def drafts_of(
    documents: Sequence[str],
    ids: Sequence[str] | None,
    namespace: str,
    metadata: Sequence[Mapping[str, Any]] | None,
) -> list[Draft]:
    """One draft per document; equal ids have equal drafts.

    Raises ValueError, naming field, rule and value, for what cannot be stored.
    """
    if isinstance(documents, (str, bytes, Mapping)) or not isinstance(documents, Iterable):
        raise ValueError(f"documents must be a list of texts; got {type(documents).__name__}")
    documents = list(documents)
    ids, metadata = (_per_document(*own, len(documents)) for own in (("ids", ids), ("metadata", metadata)))
    check_name("namespace", namespace)
    drafts: list[Draft] = []
    known: dict[str, Draft] = {}
    for index, text in enumerate(documents):
        check_text(f"documents[{index}]", text)
        own = digest(text)
        document = own.hex()[:24] if ids is None else check_name(f"ids[{index}]", ids[index])
        notes = {} if metadata is None else checked_metadata(index, metadata[index])
        draft = Draft(namespace, document, text, notes, own)
        first = known.setdefault(document, draft)
        if first.sha256 != own or as_json(first.metadata) != as_json(notes):
            raise ValueError(f"ids must differ; {document!r} stands for two different documents")
        drafts.append(draft)
    return drafts


def _per_document(name: str, values: Iterable | None, count: int) -> list | None:
    if values is None:
        return None
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must have one entry per document ({count}); got {type(values).__name__}")
    values = list(values)
    if len(values) != count:
        raise ValueError(f"{name} must have one entry per document ({count}); got {len(values)}")
    return values


def check_name(field: str, name: object) -> str:
    """A name of a document or namespace."""
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
        raise ValueError(f"{field} must be 1 to {LONGEST_NAME} printable characters; got {name!r}")
    if field == "namespace" and name == "*":
        raise ValueError("namespace must not be '*', which stands for all")
    return name


def checked_metadata(index: int, value: object) -> dict[str, Any]:
    """A JSON object, as it is read back."""
    if not isinstance(value, Mapping):
        raise ValueError(f"metadata[{index}] must be a JSON object; got {type(value).__name__}")
    try:
        stored = json.dumps(dict(value), ensure_ascii=False, allow_nan=False)
        stored.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"metadata[{index}] must be a JSON object: {error}") from error
    if len(stored) > LONGEST_METADATA:
        raise ValueError(
            f"metadata[{index}] must be at most {LONGEST_METADATA} characters of JSON; got {len(stored)}"
        )
    return json.loads(stored)


def check_text(field: str, text: object) -> None:
    """Raises ValueError for anything that is no text, or cannot be written as UTF-8."""
    if not isinstance(text, str):
        raise ValueError(f"{field} must be a text; got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{field} must be encodable as UTF-8; it holds a lone surrogate") from error
