"""What can go wrong with a store, as typed errors, and the translation of SQLite's and the system's own."""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..modeling.errors import MemoryFormatError, MSAError

_BUSY, _FULL, _IO, _READ_ONLY, _CANNOT_OPEN = 5, 13, 10, 8, 14  # SQLite's primary result codes


# SQLite's own message quotes the names in a damaged database, which may be no UTF-8.
_OF_SQLITE = (sqlite3.Error, UnicodeDecodeError)


class StoreError(MSAError):
    """Base of the errors of a store; nothing that was stored is lost or changed."""


class StoreLockedError(StoreError, OSError):
    """Another process, or another object of this one, has the store open for writing."""


class StoreWriteError(StoreError, OSError):
    """The disk refused a write: full, failing, or read-only. What was committed before is intact."""


class StoreModelError(StoreError, ValueError):
    """An operation that encodes text was called on a store that was opened without its model."""


class UnknownDocumentError(StoreError, LookupError):
    """No document has this id in this namespace at this version."""


class DocumentExistsError(StoreError, ValueError):
    """A document with this id and another content is there already."""


class HistoryError(StoreError, LookupError):
    """A state that cannot be reached: nothing to undo or redo, or history that was erased."""


@contextmanager
def translated(place: Path) -> Iterator[None]:
    """Raises errors of SQLite, safetensors and the system as those of this module; `place` is the store."""
    try:
        yield
    except _OF_SQLITE as error:
        raise _of_sqlite(error, place) from error
    except SafetensorError as error:
        raise StoreWriteError(f"{place} could not be written: {error}") from error
    except OSError as error:
        if isinstance(error, MSAError):
            raise
        raise StoreWriteError(f"{place} could not be read or written: {error}") from error


class Guard:
    """The reentrant lock of a store's connection; SQLite's errors leave its block as those of this module."""

    def __init__(self, place: Path):
        self._place, self._lock = place, threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, kind, error, trace) -> None:
        self._lock.release()
        if isinstance(error, _OF_SQLITE):
            raise _of_sqlite(error, self._place) from error


def _of_sqlite(
    error: sqlite3.Error | UnicodeDecodeError, place: Path
) -> StoreError | MemoryFormatError | ValueError:
    code = getattr(error, "sqlite_errorcode", None)  # since Python 3.11
    primary = None if code is None else code & 0xFF
    message = str(error)
    if "closed database" in message:
        return StoreError(f"{place} was closed: open it again")
    if "binding" in message and isinstance(error, (sqlite3.ProgrammingError, sqlite3.InterfaceError)):
        return ValueError(f"ids and namespaces must be texts: {message}")
    if primary == _BUSY or "is locked" in message:
        return StoreLockedError(f"the database of {place} is in use by another process: {message}")
    refused = ("disk I/O", "is full", "readonly database", "unable to open")
    if primary in (_FULL, _IO, _READ_ONLY, _CANNOT_OPEN) or any(part in message for part in refused):
        return StoreWriteError(f"{place} could not be read or written: {message}")
    return MemoryFormatError(
        f"the database of {place} is damaged or not ours: {message}. Restore a copy, or import an export"
    )
