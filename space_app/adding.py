"""Ways into a library: files, pasted text, examples. All of them check first, then add."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from msa_hf.documents import Document
from msa_hf.modeling.errors import DataUnavailableError

from .library import Progress
from .refusals import Refused
from .sessions import Session
from .space import Space
from .uploads import read_uploads, text_document

EXAMPLES = Path(__file__).resolve().parent / "examples"
OWN = "How this memory works"
WIKIPEDIA = "Wikipedia paragraphs"
QUESTIONS = {
    OWN: [
        "What does a router choose?",
        "What happens to a document that is forgotten?",
        "What is a pooled chunk?",
    ],
    WIKIPEDIA: [
        "What is the county seat of the county where East Lempster, New Hampshire is located?",
        "Who is the writer of this song that was inspired by words on a tombstone and was the first track on "
        "the box set Back to Mono?",
        "Andrew Jaspan was the co-founder of what not-for-profit media outlet?",
    ],
}
MARKS = {OWN: OWN, WIKIPEDIA: "Steven D. Smith"}  # a document that only this example has
WIKIPEDIA_RECORDS = (80, 46, 90, *range(45))  # of HotpotQA (CC BY-SA 4.0), whose paragraphs are the example


def add_files(
    space: Space, session: Session, paths: Sequence[str | Path], folder: bool = False
) -> Iterator[Progress]:
    """Adds uploaded files, or a folder's, which are removed from where they arrived. Raises Refused."""
    try:
        session.uploads.take()
        space.sessions.check_room()
        documents = read_uploads(paths, session.scratch, space.limits, folder)
    finally:
        for path in map(Path, paths):
            if path.is_relative_to(space.uploads):
                path.unlink(missing_ok=True)
    yield from session.library.add(documents)


def add_text(space: Space, session: Session, text: str, title: str = "") -> Iterator[Progress]:
    """Adds a pasted text, which replaces one of the same title. Raises Refused."""
    session.uploads.take()
    space.sessions.check_room()
    title = " ".join(str(title or "").split())[:100]
    name = title or session.library.free_name("Note")
    yield from session.library.add([text_document(text, title, name, space.limits)])


def update_text(space: Space, session: Session, name: str, text: str) -> Iterator[Progress]:
    """Replaces the text of a document. Raises Refused if it is not there."""
    session.uploads.take()
    row = next((row for row in session.library.rows() if row.name == name), None)
    if row is None:
        raise Refused(f"There is no document {name!r} any more.")
    yield from session.library.add([text_document(text, row.title, name, space.limits)])


def add_example(space: Space, session: Session, example: str) -> Iterator[Progress]:
    """Adds one of the examples. Raises Refused if it cannot be had."""
    if example not in QUESTIONS:
        raise Refused(f"There is no example {example!r}.")
    session.uploads.take()
    space.sessions.check_room()
    yield from session.library.add(example_documents(example))


def example_documents(example: str) -> list[Document]:
    if example == OWN:
        text = (EXAMPLES / "how-this-memory-works.txt").read_text(encoding="utf-8")
        return [Document(OWN, OWN, text, OWN, {"kind": "text"})]
    from msa_hf.packages import hotpotqa

    try:
        every = hotpotqa()
    except DataUnavailableError as error:
        raise Refused(f"This example could not be fetched: {error}") from error
    records = [every[number] for number in WIKIPEDIA_RECORDS if number < len(every)]
    paragraphs = {title: "".join(sentences) for record in records for title, sentences in record["context"]}
    return [
        Document(title, title, text.strip(), title, {"kind": "text"}) for title, text in paragraphs.items()
    ]
