"""LexicalIndex against a BM25 written with dictionaries."""

import math
import sqlite3
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msa_hf.modeling import lexical
from msa_hf.modeling.errors import MemoryFormatError, MSAError
from msa_hf.modeling.lexical import LexicalIndex, query_words

WORDS = ["ant", "bee", "cat", "dog", "elk", "fox", "the", "of"]
line = st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join)
text = st.builds(lambda title, body: f"{title}\n{body}", line, line)


def naive_bm25(texts, words, title_weight=1.0):
    """{text number: score} by the formula of the FTS5 manual."""
    fields = [[part.split() for part in t.partition("\n")[::2]] for t in texts]
    lengths = [len(title) + len(body) for title, body in fields]
    average = sum(lengths) / len(lengths)
    scores = {}
    for word in words:
        holders = [i for i, (title, body) in enumerate(fields) if word in title or word in body]
        idf = max(math.log((len(texts) - len(holders) + 0.5) / (len(holders) + 0.5)), 1e-6)
        for i in holders:
            title, body = fields[i]
            frequency = title_weight * title.count(word) + body.count(word)
            norm = frequency + 1.2 * (1 - 0.75 + 0.75 * lengths[i] / average)
            scores[i] = scores.get(i, 0.0) + idf * frequency * 2.2 / norm
    return scores


def check_ranking(found, expected, k):
    assert [i for i, _ in found] == sorted(expected, key=lambda i: (-round(expected[i], 9), i))[:k] or [
        round(s, 9) for _, s in found
    ] == sorted((round(s, 9) for s in expected.values()), reverse=True)[:k]
    for i, score in found:
        assert score == pytest.approx(expected[i], rel=1e-6, abs=1e-9)


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(text, min_size=1, max_size=12), query=line, k=st.integers(1, 14))
def test_plain_equals_naive_bm25(texts, query, k):
    index = LexicalIndex.plain(texts)
    expected = naive_bm25(texts, dict.fromkeys(query.split()))
    check_ranking(index.search(query, k), expected, k)
    assert index.scores(query) == pytest.approx(expected, rel=1e-6)


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(text, min_size=1, max_size=12), query=line)
def test_title_weight_and_stop_words_equal_naive_bm25(texts, query):
    index = LexicalIndex(texts, title_weight=3.0)
    kept = [word for word in dict.fromkeys(query.split()) if word not in ("the", "of")] or query.split()
    check_ranking(index.search(query, 12), naive_bm25(texts, dict.fromkeys(kept), 3.0), 12)


def test_equal_scores_come_in_order_of_number():
    index = LexicalIndex(["x\nsame words"] * 3 + ["y\nother"] * 9)
    assert [i for i, _ in index.search("words", 12)] == [0, 1, 2]
    assert [i for i, _ in index.search("words", 2)] == [0, 1]


HOSTILE = [
    '"', '""', "dog AND", "NOT dog", "NEAR(dog cat)", "title : dog", "^dog", "dog*", "{title}: dog", "(",
    "-dog", "dog\0x", "dog' ; DROP TABLE texts; --", "\ud800dog", "a" * 100_000, "dog + cat", "𝔡𝔬𝔤 dog",
    "e\u0301 dog", "_dog_",
]  # fmt: skip


@pytest.mark.parametrize("query", HOSTILE, ids=range(len(HOSTILE)))
def test_no_query_is_syntax(query):
    texts = ["t\nthe dog", "t\nthe cat", "t\nelk", "t\nfox", "t\nbee"]
    found = LexicalIndex(texts).search(query, 5)
    assert ((0 in dict(found)) == ("dog" in query)) and len(found) <= 2


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_and_any_query_work(anything):
    index = LexicalIndex(["title\nbody", anything, ""])
    assert len(index) == 3
    assert all(0 <= i < 3 and score >= 0 for i, score in index.search(anything, 3))
    if anything.isascii() and query_words(anything):
        assert 1 in index.scores(anything)


def test_empty_cases():
    assert LexicalIndex().search("dog", 3) == []
    index = LexicalIndex(["t\ndog"])
    assert index.search("", 3) == [] and index.search("?!", 3) == [] and index.search("cat", 3) == []
    assert index.search("dog", 0) == [] and index.scores("") == {}


def test_a_query_of_stop_words_alone_still_searches():
    index = LexicalIndex(["The Who\na band", "Elk\nan animal", "Fox\nan animal"])
    assert index.search("the who", 1)[0][0] == 0


def test_thousands_of_words_in_one_query():
    index = LexicalIndex(["t\nword4999", "t\nnothing", "t\nelse"])
    assert index.search(" ".join(f"word{i}" for i in range(5000)), 3)[0][0] == 0


def test_stems_accents_and_titles_help():
    index = LexicalIndex(["Rivers\nlong", "Lake\nriver river", "Café\nshut", "x\ny", "z\nw"])
    assert index.search("river", 2)[0][0] in (0, 1) and len(index.search("river", 5)) == 2
    assert index.search("cafe", 2)[0][0] == 2 and index.search("cafe\u0301", 2)[0][0] == 2


def test_mentions_follow_titles():
    texts = [
        "Ada Lovelace\nborn in London, worked with Babbage",
        "London\na city",
        "London (Ontario)\na town",
    ]
    texts += ["Babbage > Engines\nthe engine", "The\nnothing", "x\nlondon"]
    index = LexicalIndex(texts)
    assert index.mentioned(texts[0]) == [0, 1, 2, 3]
    assert index.mentioned("in London town") == [1, 2]
    assert (
        index.mentioned("london the THE") == []
        and index.mentioned("") == []
        and LexicalIndex().mentioned("x") == []
    )


def test_the_longest_title_wins():
    index = LexicalIndex(["New York\n", "New York City\n", "City\n"])
    assert index.mentioned("New York City") == [1] and index.mentioned("New York, the City") == [0, 2]


def test_linked_search_finds_the_second_hop():
    texts = [
        "Movie A\ndirected by Jane Roe",
        "Jane Roe\nborn in 1950",
        "Movie B\ndirected by an unknown person, and otherwise nothing is known",
        "z\nother",
    ]
    texts += [f"pad{i}\nfiller" for i in range(9)]
    index = LexicalIndex(texts)
    question = "What year was the maker of Movie A born?"
    assert [i for i, _ in index.search("Movie A", 4)][:2] == [0, 2]
    found = index.search("Movie A", 4)
    linked = index.follow_links(found, texts)
    assert {i for i, _ in linked} == {0, 1, 2} and linked[0] == found[0]
    assert dict(linked)[1] == pytest.approx(0.5 * found[0][1])
    assert index.follow_links(found, texts, weight=9.0)[1] == (1, pytest.approx(0.999 * found[0][1]))
    assert {i for i, _ in index.follow_links(index.search(question, 4), texts)[:2]} <= {0, 1, 2}
    assert index.follow_links([], texts) == []
    assert index.follow_links(found, texts, weight=0.0) == found
    assert index.follow_links(found, texts, sources=0) == found


def test_file_is_continued(tmp_path):
    path = str(tmp_path / "index.sqlite")
    first = LexicalIndex(["t\ndog", "t\ncat"], path=path)
    first.close()
    again = LexicalIndex(["t\nelk"], path=path)
    assert len(again) == 3 and again.search("elk", 3)[0][0] == 2 and again.search("dog", 3)[0][0] == 0
    again.close()


def test_a_failed_add_leaves_nothing():
    def broken():
        yield "t\ndog"
        raise OSError("disk")

    index = LexicalIndex(["t\ncat"])
    with pytest.raises(OSError):
        index.add(broken())
    assert len(index) == 1 and index.search("dog", 3) == []
    index.add(["t\ndog"])
    assert index.search("dog", 3)[0][0] == 1


def test_other_file_is_refused_by_name(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("not a database " * 100)
    with pytest.raises(MemoryFormatError, match=r"notes\.txt"):
        LexicalIndex(path=str(path))


def test_missing_fts5_is_named(monkeypatch):
    class Bare:
        def execute(self, *_):
            raise sqlite3.OperationalError("no such module: fts5")

        def close(self):
            pass

    monkeypatch.setattr(lexical.sqlite3, "connect", lambda *a, **k: Bare())
    with pytest.raises(MSAError, match="FTS5"):
        LexicalIndex()


def test_bad_title_weight_is_named():
    with pytest.raises(ValueError, match="title_weight"):
        LexicalIndex(title_weight=0)


def test_threads_share_an_index():
    index = LexicalIndex([f"t{i}\nword{i % 7} filler" for i in range(200)])
    expected = index.search("word3", 40)
    results = []
    threads = [threading.Thread(target=lambda: results.append(index.search("word3", 40))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 8
