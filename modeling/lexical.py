"""BM25 over the documents of a memory, on the FTS5 module of Python's own sqlite3.

Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond" (2009), with FTS5's
constants (k1 = 1.2, b = 0.75) and its idf, log((N - n + 0.5) / (n + 0.5)) but never below 1e-6. The first
line of a text is its title.
"""

import re
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence

from .errors import MemoryFormatError, MSAError

# Letters and digits, with combining accents, which FTS5's unicode61 keeps inside a word and then strips.
_WORD = re.compile(r"(?:[^\W_]|[\u0300-\u036f])+")

_LONGEST_NAME = 12

TOKENIZER, TITLE_WEIGHT = "porter unicode61 remove_diacritics 2", 3.0

LINK_SOURCES, LINK_WEIGHT, JUST_BEHIND = 4, 0.5, 0.999

STOP_WORDS = frozenset(
    "a an and are as at be been but by did do does for from had has have he her hers him his how i if in "
    "into is it its me my no not of on or our she so than that the their them then there these they this "
    "those to too was we were what when where which while who whom whose why will with would you your".split()
)


class LexicalSearch:
    """What can be asked of BM25 over texts that are numbered from 0.

    A subclass has `stop_words` and a reentrant `_lock`, and supplies `_best`, which ranks, and, called under
    the lock, `_bearers` and `_longest_name`, which know the names of the texts.
    """

    stop_words: frozenset[str] = STOP_WORDS
    _lock: threading.RLock

    def search(self, query: str, k: int = 16) -> list[tuple[int, float]]:
        """The k best texts as (number, BM25 score), best first, equal scores by number. Only texts that hold
        a word of the query are listed, so there may be fewer than k, or none."""
        return self._ranked(query, max(int(k), 0))

    def scores(self, query: str) -> dict[int, float]:
        """BM25 score of every text that holds a word of the query, by its number."""
        return dict(self._ranked(query, -1))

    def follow_links(
        self,
        ranking: Sequence[tuple[int, float]],
        texts: Sequence[str],
        *,
        sources: int = LINK_SOURCES,
        weight: float = LINK_WEIGHT,
    ) -> list[tuple[int, float]]:
        """One step along the links between texts: what one of the best mentions by title rises behind it.

        The second half of a two-hop question's evidence often shares no word with the question and is only
        found this way.

        Args:
            ranking: (number, score >= 0) best first, of any origin. texts: what was added, in order; only the
                best `sources` are read.
            weight: how much of a source's score a mentioned text gains, never enough to pass the source.
        """
        own = dict(ranking)
        scores = dict(own)
        for source, score in ranking[:sources]:
            for number in self.mentioned(texts[source]) if score * weight > 0 else ():
                if number != source:
                    gained = min(own.get(number, 0.0) + weight * score, JUST_BEHIND * score)
                    scores[number] = max(scores.get(number, 0.0), gained)
        return sorted(scores.items(), key=lambda item: (-item[1], item[0]))

    def mentioned(self, text: str) -> list[int]:
        """Numbers of the texts whose title stands in `text`, in order of appearance and longest title first.

        A title counts without what is in parentheses at its end ("Mercury (planet)") and without the headings
        that a split document adds to it ("title > heading"); upper and lower case must agree.
        """
        words = _WORD.findall(text)
        found: dict[int, None] = {}
        with self._lock:
            longest = self._longest_name()
            ends = [min(i + longest, len(words)) for i in range(len(words))]
            spans = {" ".join(words[i:j]) for i, end in enumerate(ends) for j in range(i + 1, end + 1)}
            names = self._names(sorted(spans))
        start = 0
        while start < len(words):
            ends = range(min(len(words), start + longest), start, -1)
            end = next((end for end in ends if " ".join(words[start:end]) in names), None)
            if end is not None:
                found.update(dict.fromkeys(names[" ".join(words[start:end])]))
            start = start + 1 if end is None else end
        return list(found)

    def _names(self, spans: list[str]) -> dict[str, list[int]]:
        """Numbers of the texts that bear one of these names, by name."""
        names: dict[str, list[int]] = {}
        for start in range(0, len(spans), 500):
            for name, number in self._bearers(spans[start : start + 500]):
                names.setdefault(name, []).append(number)
        return names

    def _ranked(self, query: str, limit: int) -> list[tuple[int, float]]:
        words = query_words(query, self.stop_words)
        return self._best(words, limit) if words and limit != 0 else []

    def _best(self, words: list[str], limit: int) -> list[tuple[int, float]]:
        """(number, score) of texts that hold one of the words, best first, equal scores by number; `limit`
        of them, or all if it is below 0."""
        raise NotImplementedError

    def _bearers(self, names: list[str]) -> Iterable[tuple[str, int]]:
        """(name, number) of the texts that bear one of at most 500 names, in order of number."""
        raise NotImplementedError

    def _longest_name(self) -> int:
        """No text has a name of more words."""
        raise NotImplementedError


class LexicalIndex(LexicalSearch):
    """A BM25 index of texts, numbered from 0 in the order of their arrival. Safe to share between threads.

    Words are stemmed (Porter), words of the title count `title_weight` times, and stop words of a query are
    left out as long as other words remain. `LexicalIndex.plain(texts)` is the textbook baseline without any
    of this. A run of Chinese or Japanese script is one word to FTS5, so such texts need the routers.

    Args:
        texts: texts to add at once.
        path: database file to keep the index in, which continues one that is there; None keeps it in memory.
        tokenizer: FTS5 tokenizer, used when the index is new.
        title_weight: how many times a word of the title (the first line) counts; above 0.
        stop_words: lower-case words that a query does not search for.

    Raises:
        MSAError: this Python's sqlite3 has no FTS5.
        MemoryFormatError: `path` holds something else.
        ValueError: `title_weight` is not above 0.
    """

    def __init__(
        self,
        texts: Iterable[str] = (),
        *,
        path: str | None = None,
        tokenizer: str = TOKENIZER,
        title_weight: float = TITLE_WEIGHT,
        stop_words: frozenset[str] = STOP_WORDS,
    ):
        if not title_weight > 0:
            raise ValueError(f"title_weight must be above 0, got {title_weight}")
        self.title_weight = float(title_weight)
        self.stop_words = stop_words
        self._lock = threading.RLock()
        self._database = _open(path, tokenizer)
        self._size = self._database.execute("SELECT count(*) FROM texts").fetchone()[0]
        self.add(texts)

    @classmethod
    def plain(cls, texts: Iterable[str] = (), path: str | None = None) -> "LexicalIndex":
        """Textbook BM25: no stemming, no stop words, title and body alike."""
        return cls(texts, path=path, tokenizer="unicode61", title_weight=1.0, stop_words=frozenset())

    def __len__(self) -> int:
        return self._size

    def add(self, texts: Iterable[str]) -> None:
        """Appends texts in one transaction: either all of them are in, or none."""
        with self._lock, self._database:
            for row in _rows(texts, start=self._size):
                self._database.execute("INSERT INTO texts(rowid, title, body) VALUES (?, ?, ?)", row)
                name = telling_name(row[1])
                if name:
                    named = (name, name.count(" ") + 1, row[0])
                    self._database.execute("INSERT INTO names VALUES (?, ?, ?)", named)
        self._size = self._database.execute("SELECT count(*) FROM texts").fetchone()[0]

    def close(self) -> None:
        """Closes the database; nothing can be added or searched afterwards."""
        self._database.close()

    def _best(self, words: list[str], limit: int) -> list[tuple[int, float]]:
        # Each word is a quoted FTS5 string, so nothing in a query can act as query syntax.
        match = " OR ".join(f'"{word}"' for word in words)
        statement = (
            "SELECT rowid, -bm25(texts, ?, 1.0) AS score FROM texts WHERE texts MATCH ? "
            "ORDER BY score DESC, rowid LIMIT ?"
        )
        with self._lock:
            return self._database.execute(statement, (self.title_weight, match, limit)).fetchall()

    def _bearers(self, names: list[str]) -> Iterable[tuple[str, int]]:
        marks = ",".join("?" * len(names))
        statement = f"SELECT name, number FROM names WHERE name IN ({marks}) ORDER BY number"
        return self._database.execute(statement, names)

    def _longest_name(self) -> int:
        return self._database.execute("SELECT max(words) FROM names").fetchone()[0] or 0


def query_words(query: str, stop_words: frozenset[str] = STOP_WORDS) -> list[str]:
    """The different words of a query in lower case, without stop words unless there is nothing else."""
    words = list(dict.fromkeys(word.lower() for word in _WORD.findall(query)))
    return [word for word in words if word not in stop_words] or words


def telling_name(title: str) -> str:
    """The words by which other texts would mention a title; '' when that says too little or too much."""
    words = _WORD.findall(re.sub(r"\s*\([^()]*\)\s*$", "", title.split(" > ", 1)[0]))
    telling = [word for word in words if word.lower() not in STOP_WORDS]
    return " ".join(words) if telling and len(words) <= _LONGEST_NAME else ""


def title_and_body(text: str) -> tuple[str, str]:
    """A text as the index keeps it: its first line and the rest, with "?" for what UTF-8 cannot hold."""
    title, _, body = text.encode("utf-8", "replace").decode("utf-8").partition("\n")
    return title, body


def _rows(texts: Iterable[str], start: int) -> Iterator[tuple[int, str, str]]:
    for number, text in enumerate(texts, start):
        yield number, *title_and_body(text)


def _open(path: str | None, tokenizer: str) -> sqlite3.Connection:
    database = sqlite3.connect(":memory:" if path is None else path, check_same_thread=False)
    quoted = tokenizer.replace("'", "''")
    try:
        # content='' keeps the postings alone: the texts themselves live in the memory bank.
        columns = f"title, body, content='', tokenize='{quoted}'"
        database.execute(f"CREATE VIRTUAL TABLE IF NOT EXISTS texts USING fts5({columns})")
        database.execute("CREATE TABLE IF NOT EXISTS names (name TEXT, words INTEGER, number INTEGER)")
        database.execute("CREATE INDEX IF NOT EXISTS names_by_name ON names (name)")
        database.execute("SELECT bm25(texts) FROM texts WHERE texts MATCH 'probe' LIMIT 1").fetchall()
    except sqlite3.DatabaseError as error:
        database.close()
        if "no such module: fts5" in str(error):
            raise MSAError(
                "This Python's sqlite3 was built without FTS5, which lexical retrieval needs: use a Python "
                "whose SQLite has it (python.org, Debian, conda), or switch the lexical prior off."
            ) from error
        name = "the lexical index" if path is None else path
        raise MemoryFormatError(f"{name} cannot be used as a lexical index: {error}") from error
    return database
