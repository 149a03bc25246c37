"""One document, and how a long one is cut into pieces at its natural boundaries."""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

# Where a span of text may begin, coarse to fine; headings are searched separately, because code fences
# hide them.
_PARAGRAPH = re.compile(r"\n[ \t]*\n\s*")
_SENTENCE = re.compile(r"[.!?…][\"'’”)\]]*\s+(?=[\"'‘“(\[]?[A-Z0-9À-Þ])|[。！？]\s*")
_LINE = re.compile(r"\n\s*")
_WORD = re.compile(r"\s+")
_HEADING = re.compile(r"^(?:#{1,6}[ \t]+(?P<marked>\S.*)|(?P<under>\S.*)\n(?:={3,}|-{3,})[ \t]*)$", re.M)
_DEFINITION = re.compile(
    r"^(?P<marked>(?:export |default |pub(?:\([a-z]+\))? |public |private |static |abstract |async )*"
    r"(?:def|class|function|func|fn|struct|enum|trait|impl|interface|module|namespace|type)\b[^\n{:]*)",
    re.M,
)
_FRONT_MATTER = re.compile(r"\A---[ \t]*\n.*?^---[ \t]*$", re.M | re.S)
_FENCE = re.compile(r"^[ \t]*(?P<mark>```+|~~~+).*?(?:^[ \t]*(?P=mark)[ \t]*$|\Z)", re.M | re.S)


@dataclass(frozen=True)
class Document:
    """A text with where it comes from.

    Attributes:
        id: unique among the documents that were read together.
        title: one line, may be empty.
        text: the body.
        source: file that it was read from.
        metadata: anything else; "kind" is "text", "markdown", "html", "pdf", "jsonl" or "code".
    """

    id: str
    title: str
    text: str
    source: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def content(self) -> str:
        """What a memory holds of it: the title line, then the body."""
        return f"{self.title}\n{self.text}" if self.title else self.text


def count_words(text: str) -> int:
    return len(text.split())


def split_document(
    document: Document, max_tokens: int = 512, count_tokens: Callable[[str], int] = count_words
) -> list[Document]:
    """Cuts a document into pieces whose `content` has at most `max_tokens` tokens, title line included.

    A document that fits stays whole. Otherwise cuts are made at headings, else between paragraphs, sentences,
    lines, words, and inside a word only where a word alone is too long. A piece's title is "title" or
    "title > heading", with the heading in force where the piece begins, and takes at most half of the
    tokens.

    Nothing is lost or repeated: each piece is `document.text[start:end]` with `start` and `end` in its
    metadata, pieces are in order and do not overlap, and between two of them, before the first and after the
    last there is only white space. A body of white space alone gives no piece.

    Args:
        count_tokens: number of tokens of a text; words by default. For a tokenizer:
            `lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])`.

    Raises:
        ValueError: `max_tokens` is less than one character of the text takes.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1; got {max_tokens}")
    return _Splitter(document, max_tokens, count_tokens).pieces()


class _Splitter:
    def __init__(self, document: Document, max_tokens: int, count_tokens: Callable[[str], int]):
        self.document, self.max_tokens, self.count_tokens = document, max_tokens, count_tokens
        self.text = document.text
        self.code = document.metadata.get("kind") == "code"
        self.headings = _headings(self.text, self.code)
        self.heading_starts = [start for start, _, _ in self.headings]
        self.titles: dict[str, str] = {}

    def pieces(self) -> list[Document]:
        start, end = _strip(self.text, 0, len(self.text))
        if start == end:
            return []
        whole = replace(self.document, metadata={**self.document.metadata, "start": start, "end": end})
        whole = replace(whole, text=self.text[start:end])
        if self.count_tokens(whole.content) <= self.max_tokens:
            return [whole]
        spans = list(self._split(start, end, 0))
        return [
            Document(
                f"{self.document.id}#{number}",
                self._title(start),
                self.text[start:end],
                self.document.source,
                {**self.document.metadata, "start": start, "end": end, "piece": number, "pieces": len(spans)},
            )
            for number, (start, end) in enumerate(spans, 1)
        ]

    def _split(self, start: int, end: int, level: int) -> Iterator[tuple[int, int]]:
        """Spans that fit and cover text[start:end] but for white space, cut at this level or finer."""
        start, end = _strip(self.text, start, end)
        if start == end:
            return
        if self._fits(start, end):
            yield start, end
            return
        edges = self._edges(start, end, level)
        while len(edges) == 2:
            level += 1
            edges = self._edges(start, end, level)
        first = 0
        while first < len(edges) - 1:
            last = self._furthest(edges, first)
            if last == first:
                yield from self._split(edges[first], edges[first + 1], level + 1)
                last = first + 1
            else:
                yield _strip(self.text, edges[first], edges[last])
            first = last

    def _furthest(self, edges: Sequence[int], first: int) -> int:
        """Largest `last` with text[edges[first]:edges[last]] fitting; `first` if one span is too long."""
        good, step = first, 1
        while good + step < len(edges) and self._fits(edges[first], edges[good + step]):
            good, step = good + step, step * 2
        bad = min(good + step, len(edges))
        while bad - good > 1:
            middle = (good + bad) // 2
            if self._fits(edges[first], edges[middle]):
                good = middle
            else:
                bad = middle
        return good

    def _fits(self, start: int, end: int) -> bool:
        start, end = _strip(self.text, start, end)
        title = self._title(start)
        content = f"{title}\n{self.text[start:end]}" if title else self.text[start:end]
        return start == end or self.count_tokens(content) <= self.max_tokens

    def _edges(self, start: int, end: int, level: int) -> Sequence[int]:
        """`start`, the positions between where spans of this level begin, and `end`."""
        patterns = [_PARAGRAPH, _LINE, _WORD] if self.code else [_PARAGRAPH, _SENTENCE, _LINE, _WORD]
        inside = slice(bisect_right(self.heading_starts, start), bisect_right(self.heading_starts, end - 1))
        if level == 0:
            cuts = self.heading_starts[inside]
        elif level <= len(patterns):
            found = [match.end() for match in patterns[level - 1].finditer(self.text, start, end)]
            # A heading stays with what it heads.
            headings = self.headings[max(inside.start - 1, 0) : inside.stop] if level == 1 else []
            kept = {_strip(self.text, stop, end)[0] for _, stop, _ in headings}
            cuts = [position for position in found if start < position < end and position not in kept]
        elif end - start > 1:
            return range(start, end + 1)
        else:
            raise ValueError(
                f"max_tokens must hold one character of {self.document.id or 'the document'}; "
                f"{self.max_tokens} does not hold {self.text[start:end]!r}"
            )
        return [start, *cuts, end]

    def _title(self, start: int) -> str:
        number = bisect_right(self.heading_starts, start)
        heading = self.headings[number - 1][2] if number else ""
        if heading not in self.titles:
            parts = [self.document.title, heading if heading != self.document.title else ""]
            self.titles[heading] = self._shorten(" > ".join(part for part in parts if part))
        return self.titles[heading]

    def _shorten(self, title: str) -> str:
        words = title[:1000].split()
        while words and self.count_tokens(" ".join(words) + "\n") > self.max_tokens // 2:
            words.pop()
        return " ".join(words)


def _headings(text: str, code: bool) -> list[tuple[int, int, str]]:
    """(start, end, name) of every heading of a text, or of every unindented definition of source code."""
    if code:
        return [(*match.span(), " ".join(match[1].split())[:120]) for match in _DEFINITION.finditer(text)]
    hidden = [match.span() for pattern in (_FRONT_MATTER, _FENCE) for match in pattern.finditer(text)]
    found = []
    for match in _HEADING.finditer(text):
        before = bisect_right(hidden, (match.start(), len(text))) - 1
        if before < 0 or match.start() >= hidden[before][1]:
            name = (match["marked"] or match["under"]).rstrip(" \t#")
            found.append((*match.span(), " ".join(name.split())[:120]))
    return found


def _strip(text: str, start: int, end: int) -> tuple[int, int]:
    """The same span without white space at its ends; empty spans collapse to (end, end)."""
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return start, end
