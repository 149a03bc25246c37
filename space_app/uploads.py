"""Files of strangers as documents: all of them are read and checked before the library is touched."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from msa_hf.documents import CODE_SUFFIXES, TEXT_SUFFIXES, Document, read_documents
from msa_hf.modeling.errors import DocumentError

from .archives import unpack
from .limits import Limits
from .refusals import Refused

TEXTS = TEXT_SUFFIXES | {".md", ".markdown"}
PAGES = frozenset((".html", ".htm", ".xhtml"))
SUFFIXES = TEXTS | PAGES | CODE_SUFFIXES | {".pdf", ".zip"}
TAKEN = "Text (.txt, .md), web pages (.html), PDF, source code, and zip files of these are taken."
MOST_CONTROLS = 0.02  # share of control characters that no text has


def read_uploads(
    paths: Sequence[str | Path], scratch: Path, limits: Limits, folder: bool = False
) -> list[Document]:
    """Documents of the files of one upload; their ids are the files' names, which may repeat.

    Args:
        scratch: folder for what is unpacked; removed again.
        folder: the files are all that a folder has, of which other kinds of files are left out.

    Raises Refused, naming the first file that is not taken and why.
    """
    paths = [Path(path) for path in paths]
    if not paths:
        raise Refused("Choose a file first.")
    most = limits.archive_files if folder else limits.upload_files
    if len(paths) > most:
        raise Refused(f"{len(paths):,} files are too many for one upload: send at most {most:,}, or a zip.")
    if folder:
        paths = [path for path in paths if _is_of_use(path)]
        if not paths:
            raise Refused(f"This folder has no file that is taken. {TAKEN}")
    for path in paths:
        _check_file(path, limits)
    total = sum(path.stat().st_size for path in paths)
    if total > limits.upload_bytes:
        raise Refused(
            f"These files have {_mb(total)} together; one upload may have {_mb(limits.upload_bytes)}."
        )
    documents: list[Document] = []
    try:
        for number, path in enumerate(paths):
            if path.suffix.lower() == ".zip":
                folder = scratch / str(number) / path.stem
                folder.mkdir(parents=True)
                unpack(path, path.name, folder, limits)
                documents += _read(folder, path.name, limits)
            else:
                documents += _read(path, path.name, limits)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return [
        Document(own.id, own.title, own.text, own.id, {"kind": own.metadata["kind"]}) for own in documents
    ]


def _is_of_use(path: Path) -> bool:
    """Whether a file that nobody has named is taken, as one in an archive would be."""
    hidden = path.name.startswith(".")
    return not hidden and path.suffix.lower() in SUFFIXES and path.is_file() and path.stat().st_size > 0


def text_document(text: str, title: str, name: str, limits: Limits) -> Document:
    """A pasted text. Raises Refused if it is empty, too long or no text."""
    if not isinstance(text, str) or not text.strip():
        raise Refused("There is no text to add: paste some first.")
    if len(text.encode("utf-8", "replace")) > limits.file_bytes:
        raise Refused(f"This text is longer than {_mb(limits.file_bytes)}: add it in parts.")
    text = text.encode("utf-8", "replace").decode().replace("\r\n", "\n")
    document = Document(name, title, text, name, {"kind": "text"})
    _check_text(document, "This text")
    return document


def _check_file(path: Path, limits: Limits) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise Refused(f"{path.name}: this kind of file is not taken. {TAKEN}")
    if not path.is_file():
        raise Refused(f"{path.name} did not arrive: send it again.")
    size = path.stat().st_size
    if size > limits.file_bytes:
        raise Refused(f"{path.name} has {_mb(size)}; a file may have {_mb(limits.file_bytes)}.")
    if not size:
        raise Refused(f"{path.name} is empty.")


def _read(path: Path, name: str, limits: Limits) -> list[Document]:
    """Documents of a file or of an unpacked archive. What an archive has of other kinds is left out."""
    for pdf in [path] if path.is_file() else sorted(path.rglob("*")):
        if pdf.suffix.lower() == ".pdf" and pdf.is_file():
            _check_pdf(pdf, limits)
    try:
        documents = list(read_documents([path], max_bytes=limits.file_bytes))
    except DocumentError as error:
        raise Refused(_without(str(error), path)) from error
    if not documents:
        raise Refused(f"{name} has no text. A PDF of scanned pages needs text recognition (OCR) first.")
    for document in documents:
        _check_text(document, document.id)
    return documents


def _check_pdf(path: Path, limits: Limits) -> None:
    import pypdf

    try:
        reader = pypdf.PdfReader(path)
        locked = reader.is_encrypted and not reader.decrypt("")
        pages = 0 if locked else len(reader.pages)
    except pypdf.errors.DependencyError:
        locked, pages = True, 0  # a cipher that is not installed here
    # pypdf raises its own errors and whatever a malformed object runs into: KeyError, RecursionError.
    except Exception as error:
        raise Refused(f"{path.name} is damaged or no PDF: save or download it again.") from error
    if locked:
        raise Refused(f"{path.name} is encrypted: save a copy without a password, and send that.")
    if pages > limits.pages:
        raise Refused(f"{path.name} has {pages:,} pages; a PDF may have {limits.pages:,}: split it.")


def _check_text(document: Document, name: str) -> None:
    controls = sum(
        1 for c in document.text[:100_000] if (c < " " and c not in "\n\t\f\r") or "\x7f" <= c < "\xa0"
    )
    if controls > MOST_CONTROLS * min(len(document.text), 100_000) or "\0" in document.text:
        raise Refused(f"{name} is not text, whatever its name says: convert it to text, and send that.")


def _without(message: str, path: Path) -> str:
    """A message without the place of the file on this machine."""
    return message.replace(f"{path.parent}/", "")


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
