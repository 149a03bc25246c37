"""Reading documents from files and folders: plain text, Markdown, HTML, PDF, JSON lines and source code."""

import codecs
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from .flowing_text import flowing
from .html_text import HTMLText
from .modeling.errors import DocumentError
from .splitting import Document, count_words, split_document

__all__ = ["Document", "count_words", "read_documents", "split_document"]

logger = logging.getLogger(__name__)

CODE_SUFFIXES = frozenset(
    ".bash .c .cc .clj .cmake .cpp .cs .css .cu .cuh .cxx .dart .ex .exs .go .gradle .h .hh .hpp .hs .ini "
    ".java .jl .js .jsx .kt .kts .lua .m .mjs .ml .mm .php .pl .pm .proto .ps1 .py .pyi .r .rb .rs .scala "
    ".scss .sh .sql .swift .tcl .tf .toml .ts .tsx .v .vhd .vue .yaml .yml .zig .zsh".split()
)
TEXT_SUFFIXES = frozenset(".txt .text .rst .adoc .org .tex .log".split())
KIND_OF_NAME = {"makefile": "code", "dockerfile": "code", "cmakelists.txt": "code"}
KIND_OF_NAME |= {"readme": "text", "license": "text"}
SKIPPED_FOLDERS = frozenset("node_modules __pycache__ venv site-packages dist build target".split())


def read_documents(
    paths: str | os.PathLike | Iterable[str | os.PathLike],
    *,
    max_bytes: int = 32 << 20,
    on_error: Callable[[DocumentError], None] | None = None,
) -> Iterator[Document]:
    """Documents of files and folders, one at a time and in the same order on every machine.

    Folders are walked in alphabetical order; hidden files, symbolic links, build folders, unknown kinds of
    files, binary files and files of more than `max_bytes` (eight times as much for .pdf) are left out, each
    with a logged reason. A file that is named itself is read whatever its suffix. Files and records without
    text are skipped with a warning, and a file that is reached twice is read once.

    Args:
        paths: files and folders.
        max_bytes: limit of a file, or of one line of a .jsonl file, which is read line by line.
        on_error: called with the error of a file that cannot be read, the rest of which is then skipped.
            Without it the error is raised.

    Raises:
        DocumentError: a path does not exist, or a file cannot be read; the message names it.
    """
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    seen_files: set[str] = set()
    used_ids: dict[str, int] = {}
    for path, name, explicit in _files([Path(path) for path in paths], on_error):
        real = os.path.realpath(path)
        if real in seen_files:
            continue
        seen_files.add(real)
        try:
            for document in _read_file(path, name, explicit, max_bytes):
                if not document.text.strip():
                    logger.warning("%s has no text and is skipped", document.id)
                    continue
                used_ids[document.id] = number = used_ids.get(document.id, 0) + 1
                yield document if number == 1 else _renamed(document, f"{document.id}~{number}")
        except DocumentError as error:
            _report(error, on_error)


def _files(paths: list[Path], on_error) -> Iterator[tuple[Path, str, bool]]:
    """(path, name that starts an id, whether it was named itself) of every file to look at."""
    for path in paths:
        if path.is_dir():
            root = path.resolve().name
            for folder, folders, files in os.walk(path, onerror=lambda error: _unreadable(error, on_error)):
                folders[:] = sorted(name for name in folders if _wanted_folder(Path(folder, name)))
                for name in sorted(files):
                    file = Path(folder, name)
                    if name.startswith(".") or file.is_symlink():
                        logger.info("%s is skipped: hidden or symbolic link", file)
                    else:
                        yield file, f"{root}/{file.relative_to(path).as_posix()}", False
        elif path.exists():
            yield path, path.name, True
        else:
            _report(DocumentError(f"{path} does not exist"), on_error)


def _wanted_folder(path: Path) -> bool:
    if path.name.startswith(".") or path.name.lower() in SKIPPED_FOLDERS or path.is_symlink():
        logger.info("%s is skipped: hidden, build output or symbolic link", path)
        return False
    return True


def _unreadable(error: OSError, on_error) -> None:
    _report(DocumentError(f"{error.filename} cannot be listed: {error.strerror}"), on_error)


def _report(error: DocumentError, on_error) -> None:
    if on_error is None:
        raise error
    on_error(error)


def _renamed(document: Document, name: str) -> Document:
    return Document(name, document.title, document.text, document.source, document.metadata)


def _kind(path: Path, explicit: bool) -> str | None:
    suffix = path.suffix.lower()
    known = {".md": "markdown", ".markdown": "markdown", ".html": "html", ".htm": "html", ".xhtml": "html"}
    known |= {".pdf": "pdf", ".jsonl": "jsonl", ".ndjson": "jsonl"}
    if path.name.lower() in KIND_OF_NAME:
        return KIND_OF_NAME[path.name.lower()]
    if suffix in known:
        return known[suffix]
    if suffix in CODE_SUFFIXES:
        return "code"
    return "text" if suffix in TEXT_SUFFIXES or explicit else None


def _read_file(path: Path, name: str, explicit: bool, max_bytes: int) -> Iterator[Document]:
    kind = _kind(path, explicit)
    try:
        if not path.is_file():
            return _refuse(path, "not a regular file", explicit)
        if kind is None:
            logger.info("%s is skipped: unknown kind of file", path)
            return
        size = path.stat().st_size
        limit = max_bytes * 8 if kind == "pdf" else max_bytes
        if kind != "jsonl" and size > limit:
            return _refuse(path, f"{size:,} bytes are more than the limit of {limit:,}", explicit)
        if kind == "jsonl":
            yield from _read_jsonl(path, name, max_bytes)
        elif kind == "pdf":
            yield _read_pdf(path, name)
        else:
            data = path.read_bytes()
            if _is_binary(data):
                return _refuse(path, "it holds binary data, not text", explicit)
            yield _READERS[kind](path, name, data)
    except OSError as error:
        raise DocumentError(f"{path} cannot be read: {error.strerror or error}") from error


def _refuse(path: Path, reason: str, explicit: bool) -> None:
    """A file that was asked for by name must not vanish silently; one found in a folder is only logged."""
    if explicit:
        raise DocumentError(f"{path} cannot be read: {reason}")
    logger.warning("%s is skipped: %s", path, reason)


def decode(data: bytes) -> str:
    """Text in UTF-8 or as a byte order mark says, else in Latin-1, which takes any bytes; line ends \\n."""
    marks = [(codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")]
    marks += [(codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")]
    encoding = next((encoding for mark, encoding in marks if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _is_binary(data: bytes) -> bool:
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE))
    return b"\0" in data[:8192] and not marked


def _read_text(path: Path, name: str, data: bytes) -> Document:
    return Document(name, path.stem, decode(data), str(path), {"kind": "text"})


def _read_code(path: Path, name: str, data: bytes) -> Document:
    return Document(name, name, decode(data), str(path), {"kind": "code"})


def _read_markdown(path: Path, name: str, data: bytes) -> Document:
    text = decode(data)
    named = re.search(r"\A---[ \t]*\n(?:.*\n)*?title:[ \t]*(.+)\n", text[:4096])
    heading = re.search(r"^#[ \t]+(.+)$|^(\S.*)\n===+[ \t]*$", text, re.M)
    title = (named[1].strip("\"' ") if named else "") or (heading and (heading[1] or heading[2])) or path.stem
    return Document(name, _one_line(title.rstrip(" #")), text, str(path), {"kind": "markdown"})


def _read_html(path: Path, name: str, data: bytes) -> Document:
    declared = re.search(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?([\w.:-]+)""", data[:4096], re.I)
    text = decode(data)
    if declared and not data.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            text = data.decode(declared[1].decode("ascii"))
        except (LookupError, UnicodeDecodeError):
            logger.debug("%s does not decode as the %r that it declares", path, declared[1])
    parser = HTMLText()
    parser.feed(text)
    parser.close()
    title = _one_line(parser.title) or _one_line(parser.first_heading) or path.stem
    return Document(name, title, parser.text(), str(path), {"kind": "html"})


_READERS = {"text": _read_text, "code": _read_code, "markdown": _read_markdown, "html": _read_html}


def _read_pdf(path: Path, name: str) -> Document:
    try:
        import pypdf
    except ImportError as error:
        advice = "pip install 'msa-hf[documents]'"
        raise DocumentError(f"{path} is a PDF, which needs pypdf: {advice}") from error
    try:
        reader = pypdf.PdfReader(path)
        pages = [page.extract_text() or "" for page in reader.pages]
        title = _one_line(str((reader.metadata or {}).get("/Title") or ""))
    # pypdf raises its own errors and whatever a malformed object runs into: KeyError, TypeError,
    # RecursionError.
    except Exception as error:
        raise DocumentError(f"{path} cannot be read as PDF: {error or type(error).__name__}") from error
    text = _encodable(flowing(pages))
    return Document(name, title or path.stem, text, str(path), {"kind": "pdf", "page_count": len(pages)})


def _read_jsonl(path: Path, name: str, max_bytes: int) -> Iterator[Document]:
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(max_bytes + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > max_bytes:
                raise DocumentError(f"{where} is longer than the limit of {max_bytes:,} bytes")
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise DocumentError(f"{where} is not JSON: {error}") from error
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise DocumentError(f'{where} must be an object with a string "text"')
            title = record.get("title")
            key = record.get("id")
            known = ("text", "title", "id")
            yield Document(
                str(key) if isinstance(key, (str, int)) and str(key) else f"{name}:{number}",
                _one_line(_encodable(title)) if isinstance(title, str) else "",
                _encodable(record["text"]),
                where,
                {**{name: value for name, value in record.items() if name not in known}, "kind": "jsonl"},
            )


def _encodable(text: str) -> str:
    """The text with lone surrogates, which no tokenizer takes, replaced by question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
