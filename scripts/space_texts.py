"""Real texts with known answers, as the files that a visitor of the app drops: articles, books, folders."""

from dataclasses import dataclass
from textwrap import wrap

from msa_hf.packages import hotpotqa, squad

COLUMNS, LINES = 92, 58  # of a printed page


@dataclass(frozen=True)
class Question:
    """A question, its answers, any of which will do, and the title of the text that has them."""

    text: str
    answers: tuple[str, ...]
    title: str

    def answered_by(self, text: str) -> bool:
        return any(answer.casefold() in text.casefold() for answer in self.answers)


def articles(first: int, number: int) -> dict[str, str]:
    """Articles of SQuAD v2 dev (Wikipedia, CC BY-SA 4.0) by title: from place `first`, so many."""
    chosen = squad()["data"][first : first + number]
    return {
        own["title"].replace("_", " "): "\n\n".join(part["context"] for part in own["paragraphs"])
        for own in chosen
    }


def questions(title: str) -> list[Question]:
    """Questions to an article, those with answers."""
    [own] = [own for own in squad()["data"] if own["title"].replace("_", " ") == title]
    return [
        Question(asked["question"], tuple({answer["text"] for answer in asked["answers"]}), title)
        for part in own["paragraphs"]
        for asked in part["qas"]
        if asked["answers"]
    ]


def paragraphs() -> dict[str, str]:
    """Paragraphs of HotpotQA dev (Wikipedia, CC BY-SA 4.0) by title, in the order of its records."""
    return {title: "".join(text).strip() for record in hotpotqa() for title, text in record["context"]}


def bridges(known: dict[str, str]) -> list[Question]:
    """HotpotQA's questions whose answer stands in one of their paragraphs, all of which are known."""
    result = []
    for record in hotpotqa():
        titles = {title for title, _ in record["supporting_facts"]}
        answer = record["answer"]
        holding = [title for title in sorted(titles) if answer.casefold() in known.get(title, "").casefold()]
        if titles <= known.keys() and len(holding) == 1 and len(answer) > 3:
            result.append(Question(record["question"], (answer,), holding[0]))
    return result


def book(chapters: dict[str, str]) -> bytes:
    """A PDF of A4 pages in Helvetica: one chapter after the other, each from a new page."""
    pages = []
    for title, text in chapters.items():
        lines = [title, ""]
        for part in text.split("\n"):
            lines += wrap(part, COLUMNS) or [""]
        pages += [lines[start : start + LINES] for start in range(0, len(lines), LINES)]
    return _pdf([_drawn(page) for page in pages])


def _drawn(lines: list[str]) -> bytes:
    """The drawing operators of a page: a line of text below the other."""
    shown = b"".join(b"(%s) Tj T*\n" % _literal(line) for line in lines)
    return b"BT /F1 10 Tf 13 TL 50 790 Td\n" + shown + b"ET"


def _literal(line: str) -> bytes:
    text = line.encode("cp1252", "replace")
    for special in (b"\\", b"(", b")"):
        text = text.replace(special, b"\\" + special)
    return text


def _pdf(drawings: list[bytes]) -> bytes:
    """The file: catalogue, tree of pages, font, then each page and its drawing (ISO 32000-1, 7.5)."""
    font = b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>"
    kids = b" ".join(b"%d 0 R" % (4 + 2 * number) for number in range(len(drawings)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [%s] /Count %d >>" % (kids, len(drawings)),
        font,
    ]
    for number, drawing in enumerate(drawings):
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Resources << /Font << /F1 3 0 R >> >> "
            b"/Contents %d 0 R >>" % (5 + 2 * number)
        )
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(drawing), drawing))
    data, places = bytearray(b"%PDF-1.4\n"), []
    for number, content in enumerate(objects, 1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    end = b"xref\n0 %d\n0000000000 65535 f \n%strailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n"
    return bytes(data) + end % (len(objects) + 1, table, len(objects) + 1, len(data))
