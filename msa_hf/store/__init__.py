"""MemoryStore: durable, editable memories (SQLite and immutable safetensors segments)."""

from .errors import (
    DocumentExistsError,
    HistoryError,
    StoreError,
    StoreLockedError,
    StoreModelError,
    StoreWriteError,
    UnknownDocumentError,
)
from .reader import Event, Hit, Snapshot, StoredDocument
from .store import MemoryStore

__all__ = [
    "DocumentExistsError",
    "Event",
    "Hit",
    "HistoryError",
    "MemoryStore",
    "Snapshot",
    "StoreError",
    "StoreLockedError",
    "StoreModelError",
    "StoreWriteError",
    "StoredDocument",
    "UnknownDocumentError",
]
