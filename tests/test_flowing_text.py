"""Printed lines made to flow again: what textwrap has broken is what it was."""

from textwrap import wrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msa_hf.flowing_text import flowing

PROSE = (
    "The Normans were the people who in the tenth and eleventh centuries gave their name to a region of the "
    "north. They were descended from raiders and pirates who came by sea, and under their leader they agreed "
    "to swear fealty to the king. Through generations of assimilation and mixing with the native people, "
    "their descendants would gradually merge with the older cultures of the land."
)
LINES = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=80), max_size=12)


@pytest.mark.parametrize("width", [40, 60, 92])
def test_wrapped_paragraphs_flow_again(width):
    paragraphs = [PROSE, PROSE[:200].rpartition(" ")[0] + ".", PROSE]
    page = "\n".join(line for text in paragraphs for line in wrap(text, width, break_on_hyphens=False))
    assert flowing([page]).split("\n") == paragraphs


def test_short_lines_stay():
    poem = "Tyger Tyger, burning bright,\nIn the forests of the night;\nWhat immortal hand or eye,"
    heading = "Contents\n\n1 Beginnings\n2 Ends\n" + "\n".join(wrap(PROSE, 60))
    assert flowing([poem + "\n" + "\n".join(wrap(PROSE, 90))]).startswith(poem + "\n")
    assert flowing([heading]) == "Contents\n\n1 Beginnings\n2 Ends\n" + PROSE
    assert flowing(["one line\nand another"]) == "one line\nand another"  # too few to tell


def test_pages_run_on_where_a_sentence_does():
    lines = wrap(PROSE, 50)
    assert flowing(["\n".join(lines[:4]), "\n".join(lines[4:])]) == PROSE
    assert flowing(["An end.", "A beginning"]) == "An end.\n\nA beginning"
    assert flowing(["", "only", "  \n "]) == "only"
    assert flowing([]) == ""


@pytest.mark.parametrize(
    ("left", "right", "elsewhere", "word"),
    [
        ("exam-", "ple", "an example", "example"),
        ("exam-", "ple", "", "example"),
        ("well-", "known", "a well-known one", "well-known"),
        ("Carolingian-", "based", "based on Carolingian law", "Carolingian-based"),
        ("Anglo-", "Saxon", "", "Anglo-Saxon"),
    ],
)
def test_hyphens_at_the_ends_of_lines(left, right, elsewhere, word):
    filler = "some words that fill this line of text to its very end here"
    lines = [filler, filler, f"{filler[:-8]} {left}", f"{right} goes on after it", elsewhere or "end"]
    assert f" {word} goes on after it\n" in flowing(["\n".join(lines)])


@given(st.lists(LINES, max_size=4))
def test_nothing_is_lost_but_space_and_hyphens(pages):
    def bare(text):
        return "".join(text.split()).replace("-", "")

    pages = ["\n".join(lines) for lines in pages]
    assert bare(flowing(pages)) == bare("".join(pages))
