"""Puts a million tokens into the app through its page, while another visitor asks. Prints a JSON line.

    python scripts/space_million.py ./smol-msa                     # by default the packaged model
    python scripts/space_million.py ./smol-msa --tokens 300000 --minutes 20

Starts `msa-hf space` itself. The exit status is 1 if the texts did not get in, if a visitor waited too long,
or if no answer came from the right text.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from space_process import Served
from space_texts import Question, bridges, paragraphs
from space_visitor import Visitor, browsing
from transformers import AutoTokenizer

from msa_hf.packaged_model import ready_model

FILE_TOKENS = 10_000
EVERY = 20.0  # seconds between two questions of the other visitor
ENDED = ("Added", "Stopped", "Ready")
EXAMPLE, ASKED = "How this memory works", "What does a router choose?"
LONGEST_WAIT = 120.0  # seconds that a question may take meanwhile
FINAL = 20  # questions afterwards


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="folder of a converted model")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--minutes", type=float, default=120.0, help="after which adding is stopped")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, Served(options.model, Path(name) / "state") as app:
        report = ingest(app, options, Path(name))
    print(json.dumps(report))
    return 0 if report["ended"] and report["ask_worst"] < LONGEST_WAIT and report["sourced"] else 1


def write_files(folder: Path, tokens: int, count) -> tuple[list[Path], dict[str, str], dict[str, str]]:
    """Files of about FILE_TOKENS tokens; the paragraphs in them, and the file of each."""
    files, known, places, part, held, total = [], {}, {}, [], 0, 0
    folder.mkdir()
    for title, text in paragraphs().items():
        part.append(f"{title}\n{text}")
        known[title], places[title] = text, f"wikipedia-{len(files) + 1:03}.txt"
        own = count(part[-1])
        held, total = held + own, total + own
        if held >= FILE_TOKENS or total >= tokens:
            files.append(folder / places[title])
            files[-1].write_text("\n\n".join(part), encoding="utf-8")
            part, held = [], 0
        if total >= tokens:
            break
    return files, known, places


def ingest(app: Served, options: argparse.Namespace, folder: Path) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(options.model) if options.model else ready_model()[1]
    files, known, places = write_files(
        folder / "texts", options.tokens, lambda text: len(tokenizer(text)["input_ids"])
    )
    with browsing() as browser:
        owner, other, lister = (Visitor(browser, app.url) for _ in range(3))
        for visitor in (other, lister):
            visitor.press(EXAMPLE)
            visitor.added()
        alone = other.ask(ASKED).seconds
        memory, asks, lists, seen = [app.megabytes("RssAnon")], [], [], []
        begin = time.monotonic()
        owner.upload(*files)
        owner.page.locator(".msa-progress b").filter(has_text="Reading into memory").wait_for()
        first = time.monotonic() - begin
        stopped = False
        while not (shown := owner.progress()).startswith(ENDED):
            seen.append(shown)
            memory.append(app.megabytes("RssAnon"))
            other.forget_conversation()  # each question costs the same then, and a conversation keeps 40
            asks.append(other.ask(ASKED).seconds)
            lists.append(listing(lister))
            if not stopped and time.monotonic() - begin > 60 * options.minutes:
                owner.press("Stop adding")
                stopped = True
            waited = f"asked {asks[-1]:.1f} s, listed {lists[-1]:.2f} s, {memory[-1]:.0f} MB"
            print(f"{time.monotonic() - begin:6.0f} s  {shown!r}  {waited}", file=sys.stderr)
            owner.page.wait_for_timeout(1000 * EVERY)
        seconds = time.monotonic() - begin
        owner.page.locator(".msa-table").wait_for()
        tokens = owner.page.locator(".msa-figure b").first.inner_text()
        done = set(owner.documents())
        finals = [
            final(owner, question, places)
            for question in spread([q for q in bridges(known) if places[q.title] in done])
        ]
        asked_after = other.ask(ASKED).seconds
        strangers = other.documents()
        problems = owner.problems + other.problems + lister.problems
    return {
        "tokens": int(tokens.replace(",", "")),
        "documents": len(done),
        "ended": "Added." in shown and not stopped,
        "start_seconds": round(app.seconds, 1),
        "until_first_progress": round(first, 1),
        "seconds": round(seconds),
        "progress_shown": len(set(seen)),
        "ask_alone": round(alone, 1),
        "asks": len(asks),
        "ask_median": round(statistics.median(asks), 1),
        "ask_worst": round(max(asks), 1),
        "ask_after": round(asked_after, 1),
        "list_median": round(statistics.median(lists), 2),
        "list_worst": round(max(lists), 2),
        "anonymous_mb": [round(min(memory)), round(max(memory)), round(memory[-1])],
        "rss_peak_mb": round(app.megabytes("VmHWM")),
        "sourced": sum(own["sourced"] for own in finals),
        "sourced_and_right": sum(own["sourced"] and own["right"] for own in finals),
        "asked_finally": len(finals),
        "final_median": round(statistics.median(own["seconds"] for own in finals), 1),
        "finals": finals,
        "other_documents": strangers,
        "problems": problems,
    }


def spread(found: list[Question]) -> list[Question]:
    """Some of the questions, from all parts of the texts."""
    return found[:: max(1, len(found) // FINAL)][:FINAL]


def listing(visitor: Visitor) -> float:
    """Seconds until the list of documents answers a search, and shows all of them again."""
    begin = time.monotonic()
    visitor.search("no such words")
    visitor.page.get_by_text("No document matches these words.").wait_for()
    visitor.search("")
    visitor.page.locator(".msa-table").wait_for()
    return time.monotonic() - begin


def final(visitor: Visitor, question: Question, places: dict[str, str]) -> dict:
    """Whether an answer was read from the text that has it."""
    reply = visitor.ask(question.text)
    right = [
        source
        for source in reply.sources
        if source.document == places[question.title] and question.answered_by(source.text)
    ]
    return {
        "question": question.text,
        "expected": question.answers[0],
        "answer": reply.answer,
        "right": question.answered_by(reply.answer),
        "sourced": bool(right),
        "seconds": round(reply.seconds, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
