"""The relevance budget: what is used keeps its precision, what is not gives way, and nothing is deleted.

While a store's vectors take more bytes than its budget, the least useful documents are stored in fewer bits;
when all are, the least useful lose their keys and values. Their router keys and texts stay, so that they are
found as before, and a model encodes them again when they are chosen. Axis letter: N versions.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..modeling.errors import MemoryFormatError
from . import database, records
from .coding import FULL, LOW, TEXT, TIERS, Coding
from .errors import UnknownDocumentError
from .records import Version
from .rewriting import Rewriting, encoded
from .segments import Segment, chunk_size

if TYPE_CHECKING:
    from .store import MemoryStore

ROOM = 0.9  # share of the budget that is left in use once it was passed, so that not every commit passes it
HALF_LIFE = 30 * 86400.0  # seconds after which a use counts half


def check_budget(budget_bytes: object) -> None:
    """Raises ValueError unless it is None or a positive number of bytes."""
    if budget_bytes is not None and (type(budget_bytes) is not int or budget_bytes < 1):
        raise ValueError(f"budget_bytes must be a whole number of at least 1, or None; got {budget_bytes!r}")


def enforce(store: MemoryStore) -> None:
    """Brings the vectors of a store within its budget, as far as fewer bits and dropping can."""
    with store.reads() as connection:
        budget = database.read(connection, "budget_bytes")
        if budget is None:
            return
        versions = records.all_versions(connection)
        tiers = tiers_of(connection, versions)
        worth = _usefulness(connection, versions, store.version, time.time())
    sizes = bytes_by_tier(store.coding, np.array([own.tokens for own in versions], dtype=np.int64))
    wanted = planned_tiers(sizes, tiers, worth, budget)
    if (wanted != tiers).any():
        _retier(store, versions, tiers, wanted)


def record_use(store: MemoryStore, ids: Sequence[str], namespace: str) -> None:
    """See `MemoryStore.record_use`."""
    with store.reads() as connection:
        used = [records.find(connection, store.version, namespace, document) for document in ids]
        for document, version in zip(ids, used):
            if version is None:
                raise UnknownDocumentError(f"no document {document!r} in namespace {namespace!r}")
        tiers = tiers_of(connection, used)
    with database.transaction(store.connection):
        for document in ids:
            records.count_use(store.connection, namespace, document, time.time())
    reduced = [version for version, tier in zip(used, tiers) if tier != FULL]
    if reduced and store.model is not None:
        _restore(store, reduced)
        enforce(store)


def planned_tiers(sizes: np.ndarray, tiers: np.ndarray, worth: np.ndarray, budget: int) -> np.ndarray:
    """The tier [N] that each version is to have.

    Args:
        sizes: bytes [3, N] in each tier. tiers: [N] as they are. worth: usefulness [N]; the least goes first,
            and what is below 0 before anything else.
    """
    wanted, total = tiers.copy(), int(sizes[tiers, np.arange(len(tiers))].sum())
    if total <= budget:
        return wanted
    order, places = np.lexsort((np.arange(len(worth)), worth)), np.arange(len(worth))
    for tier, concerned in ((TEXT, worth < 0), (LOW, worth >= 0), (TEXT, worth >= 0)):
        concerned = concerned & (wanted < tier)
        saved = np.where(concerned, sizes[wanted, places] - sizes[tier], 0)[order]
        needed = np.searchsorted(saved.cumsum(), total - ROOM * budget) + 1 if total > ROOM * budget else 0
        total -= int(saved[:needed].sum())
        wanted[order[:needed][concerned[order[:needed]]]] = tier
    return wanted


def bytes_by_tier(coding: Coding, tokens: np.ndarray) -> np.ndarray:
    """Bytes [3, N] of the vectors of documents with `tokens` [N] in each tier."""
    sizes = np.zeros((len(TIERS), len(tokens)), dtype=np.int64)
    for key in coding.keys:
        rows = -(-tokens // chunk_size(coding, key[1]))
        for tier in TIERS:
            storage = coding.empty(key, tier)
            if storage is not None:
                sizes[tier] += rows * storage.row_bytes
    return sizes


def tiers_of(connection: sqlite3.Connection, versions: Sequence[Version]) -> np.ndarray:
    """The tier [N] in which each version is stored."""
    files = records.segment_files(connection)
    if not all(own.segment in files for own in versions):
        raise MemoryFormatError("the store's database is damaged: a version is in an unknown segment")
    return np.array([files[own.segment].tier for own in versions], dtype=np.int64)


def _usefulness(connection: sqlite3.Connection, versions: list[Version], at: int, now: float) -> np.ndarray:
    """[N]: uses, which count half after each HALF_LIFE without one; -1 for what only history needs."""
    uses = records.uses(connection)
    births = records.births(connection, at)
    worth = np.full(len(versions), -1.0)
    for number, own in enumerate(versions):
        if own.id in births:
            count, last = uses.get((own.namespace, own.document), (0, births[own.id]))
            worth[number] = (1 + count) * 0.5 ** (max(0.0, now - last) / HALF_LIFE)
    return worth


def _retier(store: MemoryStore, versions: list[Version], tiers: np.ndarray, wanted: np.ndarray) -> None:
    """Rewrites the segments of the versions whose tier changes."""
    touched = {own.segment for own, old, new in zip(versions, tiers, wanted) if old != new}
    groups: dict[tuple[int, int], list[Version]] = {}
    for own, old, new in zip(versions, tiers.tolist(), wanted.tolist()):
        if own.segment in touched:
            groups.setdefault((old, new), []).append(own)
    with Rewriting(store) as rewriting:
        for (old, new), kept in sorted(groups.items()):
            rewriting.write(kept, tier=None if old == new else new)
        with database.transaction(store.connection):
            rewriting.record()
    store.committed(store.version)


def _restore(store: MemoryStore, versions: list[Version]) -> None:
    """Encodes versions again, in the store's own precision."""
    with store.reads() as connection:
        texts = dict(records.texts(connection, [own.id for own in versions]))
    segment: Segment = encoded(store, [texts[own.id] for own in versions], [own.id for own in versions])
    with Rewriting(store) as rewriting:
        number = rewriting.write([], segment)
        rewriting.place(versions, number)
        with database.transaction(store.connection):
            rewriting.record()
    store.committed(store.version)
