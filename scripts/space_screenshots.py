"""A visit of the app's page with a whole book, and a picture of every tab for docs/. Prints a JSON line.

    python scripts/space_screenshots.py ./smol-msa --folder docs

Starts `msa-hf space` itself. The book is a PDF of Wikipedia articles, twelve of SQuAD's by default.
"""

import argparse
import io
import json
import sys
import tempfile
from pathlib import Path

from PIL import Image
from space_process import Served
from space_texts import Question, articles, book, questions
from space_visitor import TABS, Visitor, browsing

WIDTHS, COLORS = (1280, 390), 192
HEIGHT = 1400  # of a window, in pixels
BOOK_SECONDS = 3600


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="folder of a converted model (default: the packaged one)")
    parser.add_argument("--folder", type=Path, default=Path("docs"), help="of the pictures (default docs)")
    parser.add_argument("--articles", type=int, default=12, help="of the book (default 12)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, Served(options.model, Path(name) / "state") as app:
        with browsing() as browser:
            report = visit(Visitor(browser, app.url), Path(name), options)
    print(json.dumps(report))
    return 1 if report["problems"] or max(report["overflow"].values()) > 0 else 0


def visit(visitor: Visitor, scratch: Path, options: argparse.Namespace) -> dict:
    chapters = articles(0, options.articles)
    others = articles(options.articles, 2)
    (scratch / "book.pdf").write_bytes(book(chapters))
    (scratch / "articles").mkdir()
    for title, text in others.items():
        (scratch / "articles" / f"{title}.txt").write_text(text, encoding="utf-8")
    overflow: dict[str, int] = {}
    for name in TABS:
        visitor.tab(name)
        visitor.settle()
        pictures(visitor, options.folder, f"{name.lower()}-empty", overflow, ((1280, False),))
    visitor.upload(scratch / "book.pdf")
    visitor.added(BOOK_SECONDS)
    told = visitor.watched()[-1]
    visitor.upload_folder(scratch / "articles")
    visitor.listed(f"{list(others)[0]}.txt")
    asked = [own for title in chapters for own in questions(title)]
    replies = [answered(visitor, own) for own in asked[:: len(asked) // 12][:12]]
    best = next((own for own in replies if own["right"] and own["sourced"]), replies[0])
    visitor.choose("book.pdf")
    visitor.press("Delete")
    visitor.listed("book.pdf", there=False)
    without = visitor.ask(best["question"]).answer
    visitor.tab("Library")
    visitor.press("Undo")
    visitor.listed("book.pdf")
    visitor.forget_conversation()
    visitor.ask(best["question"])
    caches = visitor.compare(best["question"], 1024)
    facts = visitor.needles([1000, 3000, 10000], 5)
    for name in TABS:
        visitor.tab(name)
        visitor.settle()
        every = [(width, dark) for width in WIDTHS for dark in (False, True)]
        pictures(visitor, options.folder, name.lower(), overflow, every)
    return {
        "book": told.replace("\n", " "),
        "bytes": (scratch / "book.pdf").stat().st_size,
        "asked": len(replies),
        "right": sum(own["right"] for own in replies),
        "sourced": sum(own["sourced"] for own in replies),
        "replies": replies,
        "without_the_book": without,
        "caches": [" ".join(row.split()) for row in caches],
        "facts": len(facts),
        "overflow": overflow,
        "problems": visitor.problems,
    }


def answered(visitor: Visitor, question: Question) -> dict:
    reply = visitor.ask(question.text)
    sourced = any(question.answered_by(source.text) for source in reply.sources)
    return {
        "question": question.text,
        "expected": question.answers,
        "answer": reply.answer,
        "right": question.answered_by(reply.answer),
        "sourced": sourced,
        "seconds": round(reply.seconds, 1),
    }


def pictures(visitor: Visitor, folder: Path, name: str, overflow: dict[str, int], looks) -> None:
    """The tab in sight, in these widths and colours, with few enough colours to be small."""
    folder.mkdir(parents=True, exist_ok=True)
    for width, dark in looks:
        visitor.look(width, dark, HEIGHT)
        visitor.settle()
        path = folder / f"{name}-{width}-{'dark' if dark else 'light'}.png"
        overflow[path.name] = visitor.overflow()
        with Image.open(io.BytesIO(visitor.picture())) as image:
            image = image.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
            image.save(path, optimize=True)
    visitor.look(WIDTHS[0], False)


if __name__ == "__main__":
    sys.exit(main())
