"""Documents that are uploaded, as JSON or as JSON lines."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..store import DocumentExistsError, MemoryStore, StoredDocument, UnknownDocumentError
from ..store.drafts import drafts_of
from .errors import RequestError
from .protocol import parse_json

JSON_LINES = ("application/jsonl", "application/x-ndjson", "application/x-jsonlines", "application/ndjson")
IF_EXISTS = ("error", "update", "keep")
_FIELDS = ("id", "text", "metadata")


@dataclass(frozen=True)
class Upload:
    """Documents for one commit; `namespace` None where the request names none."""

    texts: list[str]
    ids: list[str]
    metadata: list[dict[str, Any]]
    namespace: str | None
    if_exists: str


def upload(body: bytes, content_type: str, query: Mapping[str, str]) -> Upload:
    """Reads {"documents": [{"id", "text", "metadata"}], "namespace", "if_exists"}, or JSON lines with one
    document each, whose namespace and if_exists are in the query. Raises RequestError."""
    if content_type.partition(";")[0].strip().lower() in JSON_LINES:
        given: Any = dict(query)
        given["documents"] = [_line(line, n) for n, line in enumerate(body.split(b"\n"), 1) if line.strip()]
    else:
        given = parse_json(body)
        if not isinstance(given, dict):
            raise RequestError(400, "the body must be a JSON object", None, "invalid_value")
        given = {**query, **given}
    strange = sorted(given.keys() - {"documents", "namespace", "if_exists"})
    if strange:
        raise RequestError(400, f"{strange[0]} is not known", strange[0], "unknown_field")
    documents, namespace = given.get("documents"), given.get("namespace")
    if not isinstance(documents, list) or not documents:
        raise RequestError(400, "documents must be a list of documents", "documents", "invalid_value")
    if namespace is not None and not isinstance(namespace, str):
        raise RequestError(400, "namespace must be a text", "namespace", "invalid_value")
    if_exists = given.get("if_exists") or "error"
    if if_exists not in IF_EXISTS:
        rule = f"if_exists must be one of {', '.join(IF_EXISTS)}"
        raise RequestError(400, rule, "if_exists", "invalid_value")
    checked = [_document(one, f"documents[{index}]") for index, one in enumerate(documents)]
    texts, ids, metadata = (list(column) for column in zip(*checked))
    return Upload(texts, ids, metadata, namespace, if_exists)


def add(store: MemoryStore, given: Upload, namespace: str) -> list[str]:
    """Adds an upload in one commit, see `MemoryStore.add`; the ids. Of one thread at a time.

    What is new is encoded before the store is touched, so that others read it meanwhile.
    """
    columns = (given.texts, given.ids, given.metadata)
    drafts_of(given.texts, given.ids, namespace, given.metadata)  # what is wrong is said before the work
    if store.provenance.settings.prompt_format == "msa":
        # Its vectors hold the numbers that the store gives, so that the store must encode.
        return store.add(given.texts, given.ids, namespace, given.metadata, if_exists=given.if_exists)
    new = [row for row in zip(*columns) if not _is_settled(store, *row, namespace, given.if_exists)]
    if new:
        texts, ids, metadata = (list(column) for column in zip(*new))
        bank = store.model.encode_memory(texts, store.tokenizer)
        store.add_bank(bank, ids, namespace, metadata, if_exists=given.if_exists)
    return given.ids


def _is_settled(store: MemoryStore, text: str, own: str, metadata: dict, namespace: str, if_exists) -> bool:
    """Whether there is nothing to add. Raises DocumentExistsError where there must not be something else."""
    try:
        known = store.get(own, namespace)
    except UnknownDocumentError:
        return False
    if if_exists == "keep" or (known.text == text and known.metadata == metadata):
        return True
    if if_exists == "error":
        raise DocumentExistsError(
            f"document {own!r} exists in namespace {namespace!r} with another content: send if_exists=update"
        )
    return False


def _line(line: bytes, number: int) -> Any:
    try:
        return parse_json(line)
    except RequestError as error:
        raise RequestError(400, f"line {number}: {error}", None, error.code) from error


def _document(value: Any, place: str) -> tuple[str, str, dict[str, Any]]:
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise RequestError(400, f"{place} must be an object with a text", place, "invalid_value")
    for name in value:
        if name not in _FIELDS:
            raise RequestError(400, f"{place}.{name} is not known", f"{place}.{name}", "unknown_field")
    text, own, metadata = value["text"], value.get("id"), value.get("metadata")
    if own is None:
        own = hashlib.sha256(text.encode()).hexdigest()[:24]  # as `MemoryStore.add` names documents
    if not isinstance(own, str):
        raise RequestError(400, f"{place}.id must be a text", f"{place}.id", "invalid_value")
    if metadata is not None and not isinstance(metadata, dict):
        raise RequestError(400, f"{place}.metadata must be an object", f"{place}.metadata", "invalid_value")
    return text, own, metadata or {}


def document(stored: StoredDocument) -> dict[str, Any]:
    """A document as the server shows it."""
    return {"object": "memory.document", **stored.to_dict()}
