"""BM25 over the versions that a view sees, equal bit for bit to a LexicalIndex of their texts alone.

One FTS5 table holds the words of every version there is, and its own bm25() would count them all. So a view
reads the postings of a query's words through an `fts5vocab` table, keeps those of the versions it sees, and
does FTS5's arithmetic (`modeling/lexical.py`) on them in float64, in FTS5's order.

V is the number of versions that a view sees.
"""

import math
import sqlite3
import threading
from collections.abc import Iterable
from contextlib import closing
from itertools import chain

import numpy as np

from ..modeling.errors import MemoryFormatError
from ..modeling.lexical import TITLE_WEIGHT, TOKENIZER, LexicalSearch, telling_name, title_and_body

K1, B, LEAST_IDF = 1.2, 0.75, 1e-6  # as in FTS5

_AT_ONCE = 500  # values bound by one statement; older SQLite takes at most 999
_POSTINGS = "SELECT doc, {} FROM text_terms WHERE term = CAST(? AS TEXT)"


def create_tables(connection: sqlite3.Connection) -> None:
    """The tables of an empty index: `texts`, `text_terms` (its postings) and `names`. Does not commit."""
    words = f"title, body, content='', tokenize='{TOKENIZER}'"
    connection.execute(f"CREATE VIRTUAL TABLE texts USING fts5({words})")
    connection.execute("CREATE VIRTUAL TABLE text_terms USING fts5vocab(texts, 'instance')")
    columns = "name TEXT NOT NULL, words INTEGER NOT NULL, version INTEGER PRIMARY KEY"
    connection.execute(f"CREATE TABLE names ({columns})")
    connection.execute("CREATE INDEX names_by_name ON names (name)")
    connection.execute("CREATE INDEX names_by_words ON names (words)")


def add_texts(connection: sqlite3.Connection, rows: Iterable[tuple[int, str]]) -> None:
    """Adds (new version, text) inside the caller's transaction."""
    for version, text in rows:
        title, body = title_and_body(text)
        connection.execute("INSERT INTO texts (rowid, title, body) VALUES (?, ?, ?)", (version, title, body))
        name = telling_name(title)
        if name:
            row = (name, name.count(" ") + 1, version)
            connection.execute("INSERT INTO names (name, words, version) VALUES (?, ?, ?)", row)


def remove_texts(connection: sqlite3.Connection, rows: Iterable[tuple[int, str]]) -> None:
    """Removes (version, the very text that was added) inside the caller's transaction.

    Raises MemoryFormatError if a version is not in the index, whose counts FTS5 would make wrong.
    """
    for version, text in rows:
        if not connection.execute("SELECT count(*) FROM texts_docsize WHERE id = ?", (version,)).fetchone()[
            0
        ]:
            raise MemoryFormatError(f"version {version} is not in the lexical index, so it cannot be removed")
        delete = "INSERT INTO texts (texts, rowid, title, body) VALUES ('delete', ?, ?, ?)"
        connection.execute(delete, (version, *title_and_body(text)))
        connection.execute("DELETE FROM names WHERE version = ?", (version,))


def scrub(connection: sqlite3.Connection) -> None:
    """After `remove_texts`: writes the index anew without the words that only removed texts had.

    Until then FTS5 keeps them, with a mark that they are gone. The freed pages are for `secure_delete` or
    VACUUM. Time and space of the whole index.
    """
    connection.execute("INSERT INTO texts (texts) VALUES ('optimize')")


def check(connection: sqlite3.Connection) -> list[str]:
    """What is wrong with the index, in sentences; [] if it is sound. Reads every word of every version.

    FTS5's own check of its pages needs the right to write and is left out where there is none. Raises
    sqlite3.OperationalError if another connection has the database locked.
    """
    problems = []
    try:
        problems += _broken_pages(connection)
        versions, lengths = _all_lengths(connection)
        counted, strangers = _count_words(connection, versions)
        if strangers:
            problems.append(f"the lexical index has words of {strangers} versions that it does not list")
        wrong = np.flatnonzero((counted != lengths).any(axis=1))
        if wrong.size:
            some = ", ".join(map(str, versions[wrong[:5]].tolist()))
            problems.append(
                f"the lexical index lost or gained words of {wrong.size} versions, among them {some}"
            )
        strays = "SELECT count(*) FROM names WHERE version NOT IN (SELECT id FROM texts_docsize)"
        count = connection.execute(strays).fetchone()[0]
        if count:
            problems.append(f"{count} names belong to no version of the lexical index")
    except MemoryFormatError as error:
        problems.append(str(error))
    except sqlite3.DatabaseError as error:
        if "is locked" in str(error):
            raise
        problems.append(f"the lexical index cannot be read: {error}")
    return problems


class LexicalView(LexicalSearch):
    """Reads the index as if the given versions were all there is, numbered from 0 in their order.

    Safe to share between threads: the connection is used under `lock`, and no statement is left open.

    Args:
        connection: an open database with the tables of `create_tables`.
        lock: the reentrant lock of that connection.
        versions: int64 [V], ascending, all of them in the index at every search.

    Raises:
        ValueError: `versions` is not ascending.
        MemoryFormatError: from searches, if the index lacks one of the versions or is damaged.
        sqlite3.DatabaseError: from searches, if SQLite cannot read it.
    """

    def __init__(self, connection: sqlite3.Connection, lock: threading.RLock, versions: np.ndarray):
        self._database, self._lock = connection, lock
        self._versions = np.array(versions, dtype=np.int64)
        if self._versions.ndim != 1 or (np.diff(self._versions) <= 0).any():
            raise ValueError("versions must be one row of ascending ids without repetition")
        self._lengths: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._versions)

    def _best(self, words: list[str], limit: int) -> list[tuple[int, float]]:
        scores, held = np.zeros(len(self)), np.zeros(len(self), dtype=bool)
        phrases = _phrases(words) if len(self) else []
        with self._lock:
            postings = {phrase: self._postings(phrase) for phrase in dict.fromkeys(phrases)}
            if phrases and self._lengths is None:
                self._lengths = _row_lengths(self._database, self._versions)
        for phrase in phrases:  # the same phrase again counts again, as in FTS5
            numbers, frequencies = postings[phrase]
            if len(numbers):
                scores[numbers] += self._shares(numbers, frequencies)
                held[numbers] = True
        numbers = np.flatnonzero(held)
        best = numbers[np.argsort(-scores[numbers], kind="stable")]
        best = best if limit < 0 else best[:limit]
        return list(zip(best.tolist(), scores[best].tolist()))

    def _shares(self, numbers: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
        """What a phrase adds to the scores of the texts that hold it, from its weighted count in each."""
        lengths, n = self._lengths, len(numbers)
        if (lengths[numbers] == 0).any():
            raise MemoryFormatError("the lexical index has words of a version that it counts as empty")
        average = float(lengths.sum()) / len(self)
        idf = math.log((len(self) - n + 0.5) / (n + 0.5))
        idf = idf if idf > 0.0 else LEAST_IDF
        norm = frequencies + K1 * (1 - B + B * lengths[numbers] / average)
        return idf * ((frequencies * (K1 + 1.0)) / norm)

    def _postings(self, phrase: tuple[bytes, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Numbers, ascending, of the texts seen that hold the phrase, and how often: a title's words weigh
        more."""
        if len(phrase) > 1:
            return self._phrase_postings(phrase)
        columns = "sum(col = 'title'), sum(col = 'body')"
        doc, titles, bodies = self._read(_POSTINGS.format(columns) + " GROUP BY doc ORDER BY doc", phrase[0])
        numbers, seen = _find(self._versions, doc)
        return numbers[seen], titles[seen] * TITLE_WEIGHT + bodies[seen]

    def _phrase_postings(self, phrase: tuple[bytes, ...]) -> tuple[np.ndarray, np.ndarray]:
        """The same where the terms must follow each other in one column."""
        places = {}
        for term in dict.fromkeys(phrase):
            doc, title, offset = self._read(_POSTINGS.format("col = 'title', offset"), term)
            numbers, seen = _find(self._versions, doc)
            places[term] = (((numbers << 1) | title) << 32 | offset)[seen]  # no text has 2**32 words
        starts = places[phrase[0]]
        for behind, term in enumerate(phrase):
            starts = starts[np.isin(starts, places[term] - behind)]
        numbers, row = np.unique(starts >> 33, return_inverse=True)
        weights = np.where(starts >> 32 & 1, TITLE_WEIGHT, 1.0)
        return numbers, np.bincount(row, weights, minlength=len(numbers))

    def _read(self, statement: str, term: bytes) -> np.ndarray:
        """Three whole numbers of every row, as int64 [3, rows]."""
        rows = self._database.execute(statement, (term,)).fetchall()
        return np.fromiter(chain.from_iterable(rows), np.int64, count=3 * len(rows)).reshape(-1, 3).T

    def _bearers(self, names: list[str]) -> Iterable[tuple[str, int]]:
        marks = ",".join("?" * len(names))
        statement = f"SELECT name, version FROM names WHERE name IN ({marks}) ORDER BY version"
        rows = self._database.execute(statement, names).fetchall()
        numbers, seen = _find(self._versions, np.array([version for _, version in rows], dtype=np.int64))
        return [(rows[i][0], int(numbers[i])) for i in np.flatnonzero(seen)]

    def _longest_name(self) -> int:
        longest = self._database.execute("SELECT max(words) FROM names").fetchone()[0] or 0
        if not isinstance(longest, int):
            raise MemoryFormatError(f"the words of a name are counted as {longest!r} in the lexical index")
        return longest


def _find(versions: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where `wanted` [n] stands in ascending `versions` [V]: numbers [n], and whether it does [n]."""
    if not len(versions):
        return np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=bool)
    numbers = np.minimum(np.searchsorted(versions, wanted), len(versions) - 1)
    return numbers, versions[numbers] == wanted


def _phrases(words: list[str]) -> list[tuple[bytes, ...]]:
    """The terms that FTS5's tokenizer makes of every word, without the words of which it makes none.

    Mostly one; several where Python sees a letter and FTS5 a gap, and those FTS5 searches as a phrase. Bytes,
    because FTS5 cuts a term at 32,768 bytes, maybe within a letter.
    """
    terms: list[list[bytes]] = [[] for _ in words]
    with closing(sqlite3.connect(":memory:")) as database:
        database.text_factory = bytes
        database.execute(f"CREATE VIRTUAL TABLE words USING fts5(word, content='', tokenize='{TOKENIZER}')")
        database.execute("CREATE VIRTUAL TABLE word_terms USING fts5vocab(words, 'instance')")
        database.executemany("INSERT INTO words (rowid, word) VALUES (?, ?)", enumerate(words))
        for number, term in database.execute("SELECT doc, term FROM word_terms ORDER BY doc, offset"):
            terms[number].append(term)
    return [tuple(some) for some in terms if some]


def _row_lengths(connection: sqlite3.Connection, versions: np.ndarray) -> np.ndarray:
    """How many words each of the versions has, float64 [V]."""
    rows: list[tuple[int, bytes]] = []
    for start in range(0, len(versions), _AT_ONCE):
        some = versions[start : start + _AT_ONCE].tolist()
        marks = ",".join("?" * len(some))
        statement = f"SELECT id, sz FROM texts_docsize WHERE id IN ({marks}) ORDER BY id"
        rows += connection.execute(statement, some).fetchall()
    if len(rows) != len(versions) or [version for version, _ in rows] != versions.tolist():
        raise MemoryFormatError(
            f"the lexical index has {len(rows)} of the {len(versions)} versions of a view"
        )
    return _decoded([size for _, size in rows]).sum(axis=1).astype(np.float64)


def _all_lengths(connection: sqlite3.Connection) -> tuple[np.ndarray, np.ndarray]:
    """All versions of the index, and the words of title and body, int64 [V, 2]."""
    rows = connection.execute("SELECT id, sz FROM texts_docsize ORDER BY id").fetchall()
    versions = np.array([version for version, _ in rows], dtype=np.int64)
    return versions, _decoded([size for _, size in rows])


def _decoded(sizes: list[bytes]) -> np.ndarray:
    """FTS5's record of a row's length, for many rows, as words of title and body, int64 [V, 2].

    Two varints: seven bits a byte, high bits first, the highest bit set on every byte but the last.
    """
    damaged = MemoryFormatError("the lexical index has a damaged record of a version's length")
    if not all(isinstance(size, bytes) for size in sizes):
        raise damaged
    data = np.frombuffer(b"".join(sizes), dtype=np.uint8).astype(np.int64)
    lasts = np.flatnonzero(data < 128)
    ends = np.cumsum([len(size) for size in sizes], dtype=np.int64)
    if len(lasts) != 2 * len(sizes) or (lasts[1::2] + 1 != ends).any():
        raise damaged
    if not len(sizes):
        return np.zeros((0, 2), dtype=np.int64)
    firsts = np.concatenate([[0], lasts[:-1] + 1])
    lengths = lasts - firsts + 1
    if lengths.max() > 5:  # more than any row can have
        raise damaged
    shifts = np.repeat(lasts, lengths) - np.arange(len(data))
    return np.add.reduceat((data & 127) << 7 * shifts, firsts).reshape(-1, 2)


def _broken_pages(connection: sqlite3.Connection) -> list[str]:
    """FTS5's check of its own pages, which writes nothing but counts as a write."""
    inside = connection.in_transaction
    try:
        connection.execute("INSERT INTO texts (texts) VALUES ('integrity-check')")
    except sqlite3.DatabaseError as error:
        if "readonly" in str(error):
            return []
        if "is locked" in str(error):
            raise
        return [f"FTS5 finds the lexical index damaged: {error}"]
    finally:
        if connection.in_transaction and not inside:
            connection.rollback()
    return []


def _count_words(connection: sqlite3.Connection, versions: np.ndarray) -> tuple[np.ndarray, int]:
    """Words of title and body that each version has in the postings, int64 [V, 2], and how many other
    versions have any."""
    counts = np.zeros((len(versions), 2), dtype=np.int64)
    strangers: set[int] = set()
    with closing(connection.execute("SELECT doc, col = 'body' FROM text_terms")) as postings:
        while rows := postings.fetchmany(100_000):
            doc, body = np.fromiter(chain.from_iterable(rows), np.int64, count=2 * len(rows)).reshape(-1, 2).T
            numbers, known = _find(versions, doc)
            np.add.at(counts, (numbers[known], body[known]), 1)
            strangers.update(doc[~known].tolist())
    return counts, len(strangers)
