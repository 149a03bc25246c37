"""Reading files and cutting documents: against what was written, and as properties of the pieces."""

import json
import logging
import re
import sys
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from msa_hf.documents import Document, count_words, read_documents, split_document
from msa_hf.html_text import HTMLText
from msa_hf.modeling.errors import DocumentError


def write(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def read_one(path):
    (document,) = read_documents(path)
    return document


def minimal_pdf(text):
    stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
    ]
    data, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    tail = b"trailer << /Size 5 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % len(data)
    return data + b"xref\n0 5\n0000000000 65535 f \n" + table + tail


# ---------------------------------------------------------------------------------------------------- reading


def test_folder_is_read_in_order_and_without_the_rest(tmp_path, caplog):
    caplog.set_level(logging.INFO, "msa_hf.documents")
    root = write(
        tmp_path / "docs",
        {
            "b.txt": "second",
            "a.md": "# First one #\n\nbody",
            "src/x.py": "def f():\n    return 1\n",
            "src/Makefile": "all:\n",
            ".hidden.txt": "no",
            ".git/config.txt": "no",
            "node_modules/m.js": "no",
            "photo.jpg": b"\xff\xd8",
            "data.txt": b"a\0b",
            "empty.txt": " \n",
            "huge.txt": "x" * 300,
        },
    )
    (root / "link.txt").symlink_to(root / "b.txt")
    found = list(read_documents(root, max_bytes=200))
    assert [d.id for d in found] == ["docs/a.md", "docs/b.txt", "docs/src/Makefile", "docs/src/x.py"]
    assert [d.title for d in found] == ["First one", "b", "docs/src/Makefile", "docs/src/x.py"]
    assert found[0].text == "# First one #\n\nbody" and found[0].source == str(root / "a.md")
    assert [d.metadata["kind"] for d in found] == ["markdown", "text", "code", "code"]
    for name, reason in [
        ("data", "binary"),
        ("huge", "300 bytes"),
        ("photo", "unknown"),
        ("link", "symbolic"),
    ]:
        assert re.search(f"{name}.* is skipped.*{reason}", caplog.text)
    assert "docs/empty.txt has no text" in caplog.text
    assert list(read_documents(root, max_bytes=200)) == found


@pytest.mark.parametrize(
    "data",
    [
        "naïve €\nx".encode(),
        b"\xef\xbb\xbf" + "naïve €\nx".encode(),
        "naïve €\r\nx".encode(),
        "naïve €\rx".encode(),
    ]
    + ["naïve €\nx".encode(encoding) for encoding in ("utf-16", "utf-32")],
)
def test_encodings(tmp_path, data):
    assert read_one(write(tmp_path, {"t.txt": data}) / "t.txt").text == "naïve €\nx"


def test_latin1_is_the_fallback(tmp_path):
    assert read_one(write(tmp_path, {"t.txt": "naïve".encode("latin-1")}) / "t.txt").text == "naïve"


@settings(max_examples=100, deadline=None)
@given(
    data=st.binary(max_size=200), suffix=st.sampled_from([".txt", ".md", ".html", ".py", ".jsonl", ".pdf"])
)
def test_any_bytes_give_text_or_a_named_error(tmp_path_factory, data, suffix):
    path = tmp_path_factory.mktemp("bytes") / f"file{suffix}"
    path.write_bytes(data)
    try:
        for document in read_documents(path):
            assert document.text.strip() and document.id.startswith("file")
            document.content.encode()
    except DocumentError as error:
        assert path.name in str(error)


def test_html(tmp_path):
    page = """<!DOCTYPE html><html><head><title>A &amp; B</title><style>p {x: 1}</style></head><body>
    <script>var a = "<p>no</p>";</script><h1>Top</h1><p>One <b>bold</b>
    word.<br>Next</p><ul><li>first<li>second</ul><pre>a
      b</pre><h2>Sub</h2>tail &eacute; <noscript>no</noscript><svg><title>no</title></svg></body></html>"""
    document = read_one(write(tmp_path, {"p.html": page}) / "p.html")
    assert document.title == "A & B"
    expected = "# Top\n\nOne bold word.\nNext\n\n- first\n- second\n\na\n      b\n\n## Sub\n\ntail é"
    assert document.text == expected


def test_html_title_and_charset(tmp_path):
    write(tmp_path, {"h.html": "<h1>Only  heading</h1><p>x", "n.htm": "<p>x", "e.html": ""})
    page = "<meta charset=windows-1251><title>Привет</title><p>мир".encode("cp1251")
    assert read_one(tmp_path / "h.html").title == "Only heading"
    assert read_one(tmp_path / "n.htm").title == "n"
    assert list(read_documents(tmp_path / "e.html")) == []
    document = read_one(write(tmp_path, {"c.html": page}) / "c.html")
    assert (document.title, document.text) == ("Привет", "мир")


def test_an_open_html_comment_hides_the_rest():
    parser = HTMLText()
    parser.feed("<p>seen</p> <!-- hidden <p> too")
    parser.close()
    assert parser.text() == "seen"


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            "<p> </p> <script> </script> <pre> </pre> <!-- --> <h1> </head> <br/> &#x; <svg> x <".split()
        ),
        max_size=12,
    )
)
@example(["<!--", "<p>"])
def test_broken_html_does_not_raise(parts):
    parser = HTMLText()
    parser.feed("".join(parts))
    parser.close()
    assert "<p>" not in parser.text()


def test_markdown_titles(tmp_path):
    cases = {
        "front.md": ("---\nauthor: x\ntitle: 'The title'\n---\n# Other\n", "The title"),
        "under.md": ("Under lined\n===\ntext", "Under lined"),
        "none.md": ("## second level", "none"),
    }
    write(tmp_path, {name: text for name, (text, _) in cases.items()})
    for name, (_, title) in cases.items():
        assert read_one(tmp_path / name).title == title


def test_pdf(tmp_path):
    document = read_one(write(tmp_path, {"p.pdf": minimal_pdf("Hello from a page")}) / "p.pdf")
    assert document.text == "Hello from a page" and document.title == "p"
    assert document.metadata == {"kind": "pdf", "page_count": 1}


@pytest.mark.parametrize("data", [b"%PDF-1.4 broken", b"not a pdf", minimal_pdf("x")[:120]])
def test_broken_pdf_is_named(tmp_path, data):
    write(tmp_path, {"broken.pdf": data, "good.txt": "text"})
    with pytest.raises(DocumentError, match=r"broken\.pdf"):
        list(read_documents(tmp_path / "broken.pdf"))
    errors = []
    assert [d.text for d in read_documents(tmp_path, on_error=errors.append)] == ["text"]
    assert len(errors) == 1 and "broken.pdf" in str(errors[0])


def test_missing_pypdf_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdf", None)
    write(tmp_path, {"p.pdf": minimal_pdf("x")})
    with pytest.raises(DocumentError, match=r"p\.pdf.*pip install"):
        list(read_documents(tmp_path / "p.pdf"))


def test_jsonl(tmp_path):
    records = [
        {"text": "one", "title": "T\n1", "id": "k", "year": 1999},
        {"text": "two"},
        {"text": ""},
        {"text": "three \ud800", "id": 7},
        {"text": "four", "id": "k"},
    ]
    lines = "\n\n".join(json.dumps(record) for record in records)
    found = list(read_documents(write(tmp_path, {"d.jsonl": b"\xef\xbb\xbf" + lines.encode()}) / "d.jsonl"))
    assert [(d.id, d.title, d.text) for d in found] == [
        ("k", "T 1", "one"),
        ("d.jsonl:3", "", "two"),
        ("7", "", "three ?"),
        ("k~2", "", "four"),
    ]
    assert found[0].metadata == {"year": 1999, "kind": "jsonl"} and found[1].source.endswith("d.jsonl:3")
    assert found[0].content == "T 1\none" and found[1].content == "two"


@pytest.mark.parametrize("line", ["{", "[1]", '{"text": 3}', '{"title": "x"}', "[" * 100_000, b"\xff\xfe{}"])
def test_bad_jsonl_names_file_and_line(tmp_path, line):
    line = line if isinstance(line, bytes) else line.encode()
    write(tmp_path, {"d.jsonl": b'{"text": "fine"}\n' + line + b"\n"})
    found = read_documents(tmp_path / "d.jsonl")
    assert next(found).text == "fine"
    with pytest.raises(DocumentError, match=r"d\.jsonl:2"):
        next(found)


def test_jsonl_is_streamed_and_lines_are_limited(tmp_path):
    write(tmp_path, {"d.jsonl": b'{"text": "fine"}\n' * 50 + b'{"text": "' + b"x" * 500 + b'"}'})
    found = read_documents(tmp_path / "d.jsonl", max_bytes=100)
    assert [next(found).text for _ in range(50)] == ["fine"] * 50
    with pytest.raises(DocumentError, match="d.jsonl:51 is longer"):
        next(found)


def test_paths_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(DocumentError, match="nowhere does not exist"):
        list(read_documents([tmp_path, tmp_path / "nowhere"]))
    with pytest.raises(DocumentError, match="b.bin.*binary"):
        list(read_documents(write(tmp_path, {"b.bin": b"\0\1"}) / "b.bin"))


def test_named_file_of_unknown_suffix_is_text_and_doubles_are_read_once(tmp_path):
    write(tmp_path, {"notes.xyz": "hello", "a.txt": "a"})
    path = tmp_path / "notes.xyz"
    assert [d.text for d in read_documents([path, tmp_path, path, str(tmp_path)])] == ["hello", "a"]


def test_equal_ids_are_told_apart(tmp_path):
    write(tmp_path, {"one/x/a.txt": "1", "two/x/a.txt": "2"})
    found = list(read_documents([tmp_path / "one" / "x", tmp_path / "two" / "x"]))
    assert [d.id for d in found] == ["x/a.txt", "x/a.txt~2"]


# -------------------------------------------------------------------------------------------------- splitting


def check_pieces(document, pieces, max_tokens, count_tokens):
    """The promise of split_document, from the document alone."""
    position = 0
    for piece in pieces:
        start, end = piece.metadata["start"], piece.metadata["end"]
        assert position <= start < end and piece.text == document.text[start:end] == piece.text.strip()
        assert not document.text[position:start].strip()
        assert count_tokens(piece.content) <= max_tokens
        assert piece.source == document.source
        position = end
    assert not document.text[position:].strip()
    assert len({piece.id for piece in pieces}) == len(pieces)


fragments = st.sampled_from(
    ["# Head\n", "\n\n", "## Sub head\n\n", "One two. ", "Three! Four? ", "wörd ", "word ", "\n", "  \n \n",
     "```\n# no\n```\n", "x" * 30, "def f(x):\n", "    return 1\n", "。", "日本語。", "Under\n---\n", "\t",
     "\u2003", "e.g. Mr. X ", "---\n"]
)  # fmt: skip
texts = st.one_of(st.lists(fragments, max_size=40).map("".join), st.text(max_size=120))


@settings(max_examples=300, deadline=None)
@given(
    text=texts,
    title=st.sampled_from(["", "Title", "A rather long title of seven words"]),
    max_tokens=st.integers(1, 30),
    kind=st.sampled_from(["text", "code"]),
)
@example(text="a b", title="t", max_tokens=1, kind="text")
def test_pieces_hold_the_text_within_the_limit(text, title, max_tokens, kind):
    document = Document("id", title, text, "file", {"kind": kind})
    pieces = split_document(document, max_tokens)
    check_pieces(document, pieces, max_tokens, count_words)
    assert split_document(document, max_tokens) == pieces


@settings(max_examples=150, deadline=None)
@given(text=texts, title=st.sampled_from(["", "Title", "Long title " * 4]), max_tokens=st.integers(1, 60))
def test_pieces_within_a_limit_of_characters(text, title, max_tokens):
    """Words longer than the limit must be cut, too."""
    document = Document("id", title, text)
    check_pieces(document, split_document(document, max_tokens, len), max_tokens, len)


def test_whole_document_stays_whole():
    (piece,) = split_document(Document("id", "T", " body. Next.\n\n# H\n "), 10)
    assert (piece.id, piece.title, piece.text) == ("id", "T", "body. Next.\n\n# H")


def test_empty_document_gives_no_piece():
    assert split_document(Document("id", "T", ""), 3) == split_document(Document("id", "T", " \n\t"), 3) == []


def test_cuts_are_natural_and_titles_carry_the_heading():
    text = "Intro words here.\n\n# Alpha\n\nFirst sentence is this. Second one is that.\n\n## Beta\n\nshort"
    pieces = split_document(Document("id", "Doc", text), 10)
    assert [(p.title, p.text) for p in pieces] == [
        ("Doc", "Intro words here."),
        ("Doc > Alpha", "# Alpha\n\nFirst sentence is this."),
        ("Doc > Alpha", "Second one is that."),
        ("Doc > Beta", "## Beta\n\nshort"),
    ]
    assert [p.id for p in pieces] == ["id#1", "id#2", "id#3", "id#4"]


def test_paragraphs_before_sentences_and_sentences_before_words():
    text = "One two three. Four five six.\n\nSeven eight nine ten."
    assert [p.text for p in split_document(Document("i", "", text), 6)] == text.split("\n\n")
    assert [p.text for p in split_document(Document("i", "", text), 3)] == [
        "One two three.",
        "Four five six.",
        "Seven eight nine",
        "ten.",
    ]


def test_code_is_cut_at_definitions():
    text = "import os\n\n\ndef first(a):\n    x = 1\n\n    return x\n\n\nclass Second(Base):\n    y = 2\n"
    pieces = split_document(Document("i", "f.py", text, metadata={"kind": "code"}), 12)
    assert [p.title for p in pieces] == ["f.py", "f.py > class Second(Base)"]
    assert pieces[0].text.startswith("import os") and pieces[0].text.endswith("return x")


def test_comments_in_fences_are_no_headings():
    text = "# Real\n\none two three four\n\n```sh\n# comment\nmake it now\n```\n\nfive six seven"
    assert {p.title for p in split_document(Document("i", "D", text), 8)} == {"D > Real"}


def test_a_limit_below_one_character_is_named():
    with pytest.raises(ValueError, match="max_tokens"):
        split_document(Document("i", "", "ab"), 1, lambda text: 2 * len(text))
    with pytest.raises(ValueError, match="max_tokens"):
        split_document(Document("i", "", "ab"), 0)


def test_a_real_tokenizer_keeps_the_limit(tiny_tokenizer):
    def count(text):
        return len(tiny_tokenizer(text, add_special_tokens=False)["input_ids"])

    document = Document("i", "Τίτλος", "Ένα δύο τρία. 🙂🙂🙂 four five " * 20)
    check_pieces(document, split_document(document, 40, count), 40, count)


@pytest.mark.parametrize(
    "text", ["# " + "#" * 200_000 + "x", "\n" * 200_000 + "x", ". " + " " * 200_000 + "x", "`" * 100_000]
)
def test_hostile_texts_take_no_time(text):

    start = time.process_time()
    split_document(Document("i", "T", "word word word " + text + "x"), 2)
    assert time.process_time() - start < 5


def test_splitting_a_long_document_counts_few_tokens():
    """Every cut is found by doubling and halving, so the work stays near-linear in the text."""
    counted = 0

    def count(text):
        nonlocal counted
        counted += len(text)
        return len(text.split())

    text = "\n\n".join("Some words of a paragraph that goes on. " * 5 for _ in range(2000))
    document = Document("i", "T", text)
    check_pieces(document, split_document(document, 200, count), 200, count_words)
    assert counted < 40 * len(text)
