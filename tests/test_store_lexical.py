"""LexicalView against a LexicalIndex of the visible texts alone: equal to the last bit."""

import random
import sqlite3
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msa_hf.modeling.errors import MemoryFormatError
from msa_hf.modeling.lexical import LexicalIndex
from msa_hf.store.lexical_view import (
    LexicalView,
    add_texts,
    check,
    create_tables,
    remove_texts,
    scrub,
)

# The last two rows: what Python's \w and FTS5's tokenizer see differently, so that a word becomes a phrase,
# or nothing; and what no UTF-8 can hold, or an FTS5 query would take as syntax.
WORDS = [
    "run", "runs", "running", "cat", "Cats", "café", "cafe\u0301", "cafes", "the", "of", "x1", "New", "York",
    "don't", "snake_case", "東京", "東京都", "\U0001f600", "straße", "İstanbul", "ΣΑΣ", "１２", "²",
    "a\u0340b", "a\u0340b\u0340a", "a", "b", "\u0340", "\u0301", "run\u0332cat", "cat run", "\u1cf2",
    "\ud800", "dog\ud83d", "\0", '"', '" OR "', "AND", "NEAR(", "title:", "*", "^run", "-cat", "> x", "(y)",
]  # fmt: skip
phrase = st.lists(st.sampled_from(WORDS), max_size=7).map(" ".join)
anything = st.text(st.characters(), max_size=20)
text = st.builds(lambda title, body: f"{title}\n{body}", phrase, phrase) | phrase | anything
query = phrase | anything | text


def database(rows=(), path=":memory:"):
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=0.1)
    create_tables(connection)
    with_commit(connection, add_texts, rows)
    return connection


def with_commit(connection, change, rows):
    connection.execute("BEGIN")
    change(connection, rows)
    connection.execute("COMMIT")


def view_of(connection, versions):
    return LexicalView(connection, threading.RLock(), np.array(sorted(versions), dtype=np.int64))


def assert_equal(view, texts, queries):
    """Every answer of the view is that of an index of its texts."""
    index = LexicalIndex(texts)
    assert len(view) == len(index)
    for query in queries:
        assert list(view.scores(query).items()) == list(index.scores(query).items())
        for k in (0, 1, 3, 1000):
            assert view.search(query, k) == index.search(query, k)
        assert view.mentioned(query) == index.mentioned(query)
        found = index.search(query, 5)
        assert view.follow_links(found, texts) == index.follow_links(found, texts)
        assert view.follow_links(found, texts, sources=1, weight=0.9) == index.follow_links(
            found, texts, sources=1, weight=0.9
        )
    index.close()


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(st.tuples(text, st.booleans(), st.integers(1, 300)), max_size=14),
    queries=st.lists(query, min_size=1, max_size=4),
)
def test_a_view_equals_an_index_of_what_it_sees(rows, queries):
    versions = np.cumsum([gap for _, _, gap in rows]).tolist()
    connection = database((version, text) for version, (text, _, _) in zip(versions, rows))
    seen = [(version, text) for version, (text, visible, _) in zip(versions, rows) if visible]
    texts = [text for _, text in seen]
    assert_equal(view_of(connection, [version for version, _ in seen]), texts, [*queries, *texts[:2]])
    assert check(connection) == []
    connection.close()


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(text, min_size=1, max_size=12),
    fates=st.lists(st.sampled_from(["seen", "hidden", "removed"]), min_size=12, max_size=12),
    queries=st.lists(query, min_size=1, max_size=3),
)
def test_a_view_after_removal_equals_an_index_of_what_it_sees(texts, fates, queries):
    rows = list(enumerate(texts, 5))
    connection = database(rows)
    with_commit(connection, remove_texts, [row for row, fate in zip(rows, fates) if fate == "removed"])
    seen = [row for row, fate in zip(rows, fates) if fate == "seen"]
    for _ in range(2):
        view = view_of(connection, [version for version, _ in seen])
        assert_equal(view, [text for _, text in seen], queries)
        assert check(connection) == []
        scrub(connection)
    connection.close()


def test_many_texts_of_real_lengths():
    """Lengths of more than one byte, postings over many pages, and more versions than one statement binds."""
    dice = random.Random(0)
    words = [f"word{i}" for i in range(400)]
    texts = [
        " ".join(dice.choices(words, k=4)) + "\n" + " ".join(dice.choices(words, k=dice.choice([3, 90, 700])))
        for _ in range(1500)
    ]
    connection = database(enumerate(texts))
    queries = [" ".join(dice.choices(words, k=k)) for k in (1, 5, 40)]
    assert_equal(view_of(connection, range(1500)), texts, queries)
    assert_equal(view_of(connection, range(0, 1500, 2)), texts[::2], queries)
    assert check(connection) == []


def test_what_is_not_visible_changes_nothing():
    texts = ["Ada\nruns far", "Cat\nthe cat runs", "Dog\nfar away"]
    small, large = database(enumerate(texts)), database(enumerate(texts))
    before = view_of(large, range(3))
    expected = view_of(small, range(3)).scores("run far cat")
    assert before.scores("run far cat") == expected and len(expected) == 3
    with_commit(large, add_texts, [(3 + i, "Ada\nruns runs far cat") for i in range(50)])
    assert before.scores("run far cat") == expected
    assert view_of(large, range(3)).scores("run far cat") == expected
    assert before.mentioned("Ada and Dog") == [0, 2]
    assert view_of(large, [1, 2, 7]).mentioned("Ada and Dog") == [2, 1]


def test_the_longest_visible_name_wins():
    connection = database([(1, "New York\n"), (2, "New York City Hall\n"), (3, "City\n")])
    assert view_of(connection, [1, 3]).mentioned("New York City Hall") == [0, 1]
    assert view_of(connection, [1, 2, 3]).mentioned("New York City Hall") == [1]


def test_an_empty_view_finds_nothing():
    for connection in (database(), database([(1, "Ada\nruns")])):
        view = view_of(connection, [])
        assert len(view) == 0 and view.search("ada runs", 5) == [] and view.scores("ada") == {}
        assert view.mentioned("Ada") == [] and view.follow_links([], []) == []


@pytest.mark.parametrize(
    "query",
    [
        "run runs running ran run",  # three phrases with one stem
        "cat cat CAT Cat",
        "the of",
        "The the THE",
        "",
        "?!",
        "zebra",
        "a\u0340b",
        "b\u0340a a\u0340b",
        "a\u0340b\u0340a\u0340b a",
        "\u0340 \u0301",
    ],
)
def test_queries_that_fts5_reads_in_its_own_way(query):
    texts = ["cat\nthe cat runs", "run of the cat\nb", "a\nb a b a b", "a b\na", "b\n", "\n", "", "other\nz"]
    connection = database(enumerate(texts, 1))
    assert_equal(view_of(connection, range(1, 9)), texts, [query])
    assert_equal(view_of(connection, [2, 3, 4, 7, 8]), [texts[i - 1] for i in (2, 3, 4, 7, 8)], [query])


@pytest.mark.parametrize("word", ["a" * 40_000, "東" * 11_000], ids=["ascii", "cut within a letter"])
def test_words_longer_than_a_term(word):
    texts = [word, f"t\n{word}x {word}", "t\nother"]
    assert_equal(view_of(database(enumerate(texts)), range(3)), texts, [word, f"{word}yz other"])


def test_thousands_of_words_in_one_query():
    texts = [f"t{i}\n" + " ".join(f"word{j}" for j in range(i, 2000, 7)) for i in range(5)]
    query = " ".join(f"word{i}" for i in range(2500))
    assert_equal(view_of(database(enumerate(texts)), range(5)), texts, [query])


def test_threads_share_a_view():
    texts = [f"t{i}\nword{i % 7} filler" for i in range(200)]
    view = view_of(database(enumerate(texts)), range(200))
    expected, results = LexicalIndex(texts).search("word3 filler", 40), []
    threads = [
        threading.Thread(target=lambda: results.append(view.search("word3 filler", 40))) for _ in "1234"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4


def test_reading_leaves_no_transaction_open(tmp_path):
    path = str(tmp_path / "store.sqlite")
    connection = database([(1, "Ada\nruns"), (2, "Cat\nAda")], path)
    connection.execute("PRAGMA journal_mode=WAL")
    view = view_of(connection, [1, 2])
    other = sqlite3.connect(path, isolation_level=None)
    with_commit(other, add_texts, [(3, "Dog\nz")])
    assert view.search("ada", 2) and view.mentioned("Ada") == [0] and check(connection) == []
    assert not connection.in_transaction
    assert other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0


TRACE = b"ceofremov"


def traces(connection):
    """Where the bytes of a removed word stand in any table, FTS5's own among them."""
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    found = []
    for table in tables:
        if table not in ("texts", "text_terms"):
            for row in connection.execute(f"SELECT * FROM {table}"):
                values = [v if isinstance(v, bytes) else str(v).encode() for v in row]
                found += [table for value in values if TRACE in value]
    return found


@pytest.mark.parametrize("seed", range(6))
def test_scrub_leaves_no_trace_of_removed_words(tmp_path, seed):
    dice, path = random.Random(seed), str(tmp_path / "store.sqlite")
    connection = database(path=path)
    kept, version = {}, 0
    for size in dice.choices([1, 2, 10, 400], k=4):
        removed = {}
        for _ in range(size):
            version += 1
            name = f"Traceofremoved{version}"
            removed[version] = f"{name}\n{name} traceofremoved{version * 7} common " * dice.choice([1, 9])
            kept[version + 10_000] = f"Kept{version}\ncommon " + "word " * dice.choice([0, 5])
        rows = [*removed.items(), *((v, t) for v, t in kept.items() if v > 10_000 + version - size)]
        dice.shuffle(rows)
        for start in range(0, len(rows), 100):  # in one commit or several
            with_commit(connection, add_texts, rows[start : start + 100])
        assert "texts_data" in traces(connection) and "names" in traces(connection)
        with_commit(connection, remove_texts, removed.items())
        scrub(connection)
        assert traces(connection) == [] and check(connection) == []
    assert_equal(view_of(connection, kept), [kept[v] for v in sorted(kept)], ["common Kept1 word", "Kept2"])
    connection.execute("VACUUM")
    connection.close()
    assert TRACE not in (tmp_path / "store.sqlite").read_bytes()


def test_removal_and_scrub_in_one_transaction_with_the_addition():
    connection = database([(1, "Kept\ncommon")])
    connection.execute("BEGIN")
    add_texts(connection, [(2, "Traceofremoved\ntraceofremoved common")])
    remove_texts(connection, [(2, "Traceofremoved\ntraceofremoved common")])
    scrub(connection)
    connection.execute("COMMIT")
    assert traces(connection) == [] and check(connection) == []
    assert_equal(view_of(connection, [1]), ["Kept\ncommon"], ["common"])


def test_all_changes_belong_to_the_callers_transaction():
    connection = database([(1, "Ada\nruns")])
    connection.execute("BEGIN")
    add_texts(connection, [(2, "Cat\nruns")])
    remove_texts(connection, [(1, "Ada\nruns")])
    scrub(connection)
    connection.execute("ROLLBACK")
    assert check(connection) == []
    assert_equal(view_of(connection, [1]), ["Ada\nruns"], ["ada runs cat", "Ada Cat"])


def test_unknown_versions_are_named():
    connection = database([(1, "Ada\nruns")])
    with pytest.raises(MemoryFormatError, match="version 2"):
        remove_texts(connection, [(2, "Ada\nruns")])
    with pytest.raises(MemoryFormatError, match="1 of the 2 versions"):
        view_of(connection, [1, 2]).search("ada", 1)
    for versions in ([2, 1], [1, 1], [[1]]):
        with pytest.raises(ValueError, match="ascending"):
            LexicalView(connection, threading.RLock(), np.array(versions))


DAMAGE = {
    "no length": "DELETE FROM texts_docsize WHERE id = 2",
    "length of another text": "UPDATE texts_docsize SET sz = x'0109' WHERE id = 2",
    "length cut off": "UPDATE texts_docsize SET sz = x'01' WHERE id = 2",
    "length without end": "UPDATE texts_docsize SET sz = x'8181' WHERE id = 2",
    "length too long": "UPDATE texts_docsize SET sz = x'8181818181818101' || x'01' WHERE id = 2",
    "length as text": "UPDATE texts_docsize SET sz = 'ab' WHERE id = 2",
    "no length at all": "UPDATE texts_docsize SET sz = NULL WHERE id = 2",
    "page overwritten": "UPDATE texts_data SET block = x'00000004ffffffffffffff' WHERE id > 1000",
    "page emptied": "UPDATE texts_data SET block = x'' WHERE id > 1000",
    "page lost": "DELETE FROM texts_data WHERE id > 1000",
    "structure lost": "DELETE FROM texts_data WHERE id = 10",
    "all pages lost": "DROP TABLE texts_data",
    "name of nobody": "INSERT INTO names VALUES ('Bob', 1, 77)",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_check_tells_of_damage(tmp_path, damage):
    path = str(tmp_path / "store.sqlite")
    connection = database([(i, f"Ada{i}\nruns far") for i in range(5)], path)
    assert check(connection) == []
    connection.execute(damage)
    connection.close()
    connection = sqlite3.connect(path)
    assert check(connection) and all(isinstance(problem, str) for problem in check(connection))
    assert not connection.in_transaction


@pytest.mark.parametrize(
    "damage",
    [name for name in DAMAGE if name not in ("length of another text", "name of nobody")],
)
def test_damage_is_an_error_of_a_search(tmp_path, damage):
    path = str(tmp_path / "store.sqlite")
    connection = database([(i, f"Ada{i}\nruns far") for i in range(5)], path)
    connection.execute(DAMAGE[damage])
    connection.close()
    with pytest.raises((MemoryFormatError, sqlite3.DatabaseError)):
        view_of(sqlite3.connect(path), range(5)).search("far", 3)


def test_a_name_of_no_number_of_words_is_named():
    connection = database([(1, "Ada\nruns")])
    connection.execute("UPDATE names SET words = 'many'")
    with pytest.raises(MemoryFormatError, match="'many'"):
        view_of(connection, [1]).mentioned("Ada")


def test_check_works_without_the_right_to_write(tmp_path):
    path = tmp_path / "store.sqlite"
    database([(1, "Ada\nruns")], str(path)).close()
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    assert check(connection) == []
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA query_only=ON")
    assert check(connection) == []


def test_check_does_not_take_a_lock_for_damage(tmp_path):
    path = str(tmp_path / "store.sqlite")
    connection = database([(1, "Ada\nruns")], path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        check(connection)
    other.execute("ROLLBACK")
    assert check(connection) == []
