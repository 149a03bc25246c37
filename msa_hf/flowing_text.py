"""The lines of printed pages as flowing text: where a line ends only because it was full, it goes on."""

import re
from collections.abc import Iterator, Sequence

_WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")
_BROKEN = re.compile(r"([^\W\d_]+)-$")  # a word that a line's end may have cut
_GOES_ON = re.compile(r"[^\W\d_A-Z]")
# Of a page's longest usual line; in a proportional font its letters vary. A sentence often ends a paragraph.
FULL, FULL_SENTENCE = 0.85, 0.95
LEAST_LINES = 4  # that show how long a page's lines are


def flowing(pages: Sequence[str]) -> str:
    """The text of pages, a paragraph a line, with an empty line between pages that do not run on.

    A line goes on in the next one if the first word there would not have fitted. A hyphen at its end goes if
    the document has the word without one elsewhere, and stays if it has the word with it, or both its parts.
    """
    pages = [page for page in (_stripped(page) for page in pages) if page]
    known = {word for page in pages for word in _whole_words(page)}
    text = ""
    for page in pages:
        measure = _measure(page)
        for number, line in enumerate(page):
            if number == 0:
                runs_on = bool(_GOES_ON.match(line)) and bool(text) and text[-1] not in ".!?:"
                between = "\n\n" if text and not runs_on else ""
            else:
                before = page[number - 1]
                runs_on = bool(before and line) and _is_full(before, line, measure)
                between = "" if runs_on else "\n"
            text = _joined(text, line, known) if runs_on else f"{text}{between}{line}"
    return text


def _stripped(page: str) -> list[str]:
    lines = [line.strip() for line in page.strip().split("\n")]
    return lines if any(lines) else []


def _measure(page: Sequence[str]) -> float:
    """Characters of a full line; infinite where too few lines tell."""
    lengths = sorted(len(line) for line in page if line)
    return lengths[-1 - len(lengths) // 20] if len(lengths) >= LEAST_LINES else float("inf")


def _is_full(line: str, after: str, measure: float) -> bool:
    full = FULL_SENTENCE if line[-1] in ".!?:" and not _GOES_ON.match(after) else FULL
    return len(line) + 1 + len(after.split(maxsplit=1)[0]) > full * measure


def _whole_words(page: Sequence[str]) -> Iterator[str]:
    """Words of a page without those that a line's end may have cut."""
    cut = False
    for line in page:
        whole = line.partition(" ")[2] if cut else line
        cut = bool(_BROKEN.search(line))
        yield from (word.casefold() for word in _WORD.findall(_BROKEN.sub("", whole)))


def _joined(text: str, line: str, known: set[str]) -> str:
    broken, rest = _BROKEN.search(text), _WORD.match(line)
    if not broken or not rest:
        return f"{text} {line}" if text and line else text + line
    left, right = broken[1].casefold(), rest[0].partition("-")[0].casefold()
    hyphened = f"{left}-{right}" in known or (left in known and right in known)
    drops = rest[0][0].islower() and (left + right in known or not hyphened)
    return (text[:-1] if drops else text) + line
