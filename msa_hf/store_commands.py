"""What the commands on a store do: open it, call one method, print."""

import argparse
import json
import logging
import shutil
import sys
import time
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .arguments import print_json
from .modeling.errors import MemoryFormatError, MSAError
from .store_opening import (
    check_no_settings,
    dtype_of,
    is_store,
    model_of,
    open_or_create,
    reading,
    remembered,
    settings_of,
    writing,
    writing_with_model,
)

logger = logging.getLogger(__name__)


def ingest(options: argparse.Namespace) -> None:
    from .ingestion import ingest_into
    from .model_loading import load_model, warn_untrained
    from .modeling.errors import DocumentError

    if options.resume:
        raise MSAError("--resume is for --out: into a store, the same command goes on by itself")
    fresh = not is_store(options.store)
    dtype = options.dtype if fresh else dtype_of(options)
    model, tokenizer = load_model(options.model, options.device, dtype)
    with open_or_create(options, model, tokenizer, options.model) as store:
        try:
            done = ingest_into(
                store,
                options.paths,
                namespace=options.namespace or "default",
                max_tokens=options.max_tokens,
                batch_tokens=options.batch_tokens,
                progress=sys.stderr.isatty(),
                on_error=(lambda error: logger.warning("%s", error)) if options.keep_going else None,
            )
        except DocumentError:
            if fresh and not len(store):
                shutil.rmtree(options.store)  # it was made a moment ago, and nothing came into it
            raise
        stats = store.stats()
    if options.json:
        print_json({"store": str(options.store), **done.to_dict(), "documents_in_store": stats["documents"]})
    else:
        print(
            f"{options.store}: {done.documents:,} documents in {done.pieces:,} pieces: {done.added:,} added, "
            f"{done.updated:,} updated, {done.deleted:,} deleted, {done.unchanged:,} as they were\n"
            f"version {done.version}: {stats['documents']:,} documents, {stats['tokens']:,} tokens, "
            f"{stats['bytes_per_token']:,.0f} bytes per token"
        )
    warn_untrained(model)


def add(options: argparse.Namespace) -> None:
    texts = list(options.texts) or [_text_of(options)]
    if options.texts and options.file:
        raise MSAError("give either TEXT or --file")
    if options.id is not None and len(texts) > 1:
        raise MSAError("--id names one document: give one TEXT")
    _check_not_empty(texts)
    with writing_with_model(options) as store:
        ids = store.add(
            texts,
            None if options.id is None else [options.id],
            options.namespace,
            None if options.metadata is None else [options.metadata] * len(texts),
        )
        _say(options, {"ids": ids, "version": store.version}, "\n".join(ids))


def update(options: argparse.Namespace) -> None:
    if options.text is not None and options.file:
        raise MSAError("give either TEXT or --file")
    text = _text_of(options) if options.text is None else options.text
    _check_not_empty([text])
    with writing_with_model(options) as store:
        store.get(options.id, options.namespace)
        store.update(options.id, text, options.namespace, options.metadata)
        _say(options, {"id": options.id, "version": store.version}, f"version {store.version}")


def delete(options: argparse.Namespace) -> None:
    with writing(options) as store:
        store.delete(options.ids, options.namespace)
        _say(options, {"deleted": options.ids, "version": store.version}, f"version {store.version}")


def step(options: argparse.Namespace) -> None:
    """undo and redo."""
    with writing(options) as store:
        getattr(store, options.step)(options.steps)
        last = store.log(1)[0]
        result = {"version": store.version, "added": last.added, "removed": last.removed}
        text = f"version {last.version}: {last.added:,} documents came, {last.removed:,} went"
        _say(options, result, text)


def forget(options: argparse.Namespace) -> int:
    with writing(options) as store:
        for document in options.ids:
            store.history(document, options.namespace)
        if sys.stdin.isatty() and not options.yes:
            print(
                f"erase {', '.join(options.ids)} for good, with all history? [y/N] ",
                end="",
                file=sys.stderr,
                flush=True,
            )
            if sys.stdin.readline().strip().lower() not in ("y", "yes"):
                print("msa-hf: nothing was erased", file=sys.stderr)
                return 1
        store.forget(options.ids, options.namespace)
        _say(options, {"forgotten": options.ids, "version": store.version}, f"version {store.version}")
    return 0


def history(options: argparse.Namespace) -> None:
    from .store import UnknownDocumentError

    with reading(options) as store:
        if options.id is None:
            commits = store.log(options.limit or 20)
            _print_rows(
                options,
                [vars(commit) for commit in commits],
                lambda row: (
                    f"{row['version']:>6}  {_when(row['time'])}  {row['kind']:8} "
                    f"+{row['added']:,} -{row['removed']:,}"
                ),
            )
            return
        try:
            events = store.history(options.id, options.namespace)
        except UnknownDocumentError:
            if store.was_forgotten(options.id, options.namespace):
                raise UnknownDocumentError(
                    f"document {options.id!r} was erased with all its history"
                ) from None
            raise
        _print_rows(
            options,
            [event.to_dict() for event in events],
            lambda row: (
                f"{row['version']:>6}  {_when(row['time'])}  {row['action']:8} {_preview(row['text'] or '')}"
            ),
        )


def show_documents(options: argparse.Namespace) -> None:
    where: dict[str, list] = {}
    for name, values in options.where:
        where.setdefault(name, []).extend(values)
    with reading(options) as store:
        reader, namespaces = _at(store, options), _namespaces(options)
        found = reader.list(namespaces, where or None, options.limit)
        _print_rows(
            options,
            [document.to_dict() for document in found],
            lambda row: (
                f"{row['id']}  ({row['namespace']}, {row['tokens']:,} tokens)  {_preview(row['text'])}"
            ),
        )
        if len(found) == options.limit:
            total = reader.count(namespaces, where or None)
            if total > options.limit:
                print(f"{options.limit:,} of {total:,} documents; --limit shows more", file=sys.stderr)


def search(options: argparse.Namespace) -> None:
    model = () if options.mode == "lexical" else model_of(options)
    with reading(options, *model) as store:
        reader = _at(store, options)
        hits = reader.search(options.query, options.k, mode=options.mode, namespaces=_namespaces(options))
        _print_rows(
            options,
            [{"rank": rank, **hit.to_dict()} for rank, hit in enumerate(hits, 1)],
            lambda row: (
                f"{row['rank']:>3}  {row['id']}  ({row['namespace']}, {_scores(row)})\n"
                f"     {_preview(row['text'])}"
            ),
        )


@contextmanager
def answering(options: argparse.Namespace):
    """The function that answers a question from a store: alone, or as the next turn of a conversation."""
    from .asking import ask, note_use
    from .conversation import Conversation

    if options.follow is not None and options.at is not None:
        raise MSAError("--follow remembers what is said now: it cannot read an earlier version (--at)")
    options.store = options.memory
    model, tokenizer = model_of(options)
    if options.follow is not None:
        with Conversation(options.store, options.follow, model, tokenizer, _namespaces(options)) as talk:
            yield talk.ask
        return

    def answer(question: str, **how):
        if options.at is None:
            store.refresh()
        bank = _at(store, options).bank(_namespaces(options)).to(model.device)
        reply = ask(model, tokenizer, bank, question, **how)
        if options.at is None:
            note_use(options.store, reply.sources, model, tokenizer)
        return reply

    with reading(options, model, tokenizer) as store:
        yield answer


def verify(options: argparse.Namespace) -> int:
    try:
        with reading(options) as store:
            problems = store.verify()
    except MemoryFormatError as error:
        problems = [str(error)]
    if options.json:
        print_json({"store": options.store, "problems": problems})
    else:
        print("\n".join(problems) or f"{options.store}: every byte is as it was written")
    return 1 if problems else 0


def compact(options: argparse.Namespace) -> None:
    before = _bytes_of(options.store)
    with writing(options) as store:
        store.compact(history=not options.drop_history)
        version = store.version
    after = _bytes_of(options.store)
    result = {"version": version, "bytes_before": before, "bytes": after}
    _say(options, result, f"{options.store}: {before:,} bytes before, {after:,} now")


def stats(options: argparse.Namespace) -> None:
    with reading(options) as store:
        found = {**store.stats(), "model": store.model_path}
    width = max(map(len, found))
    lines = (f"{name:{width}}  {_figure(name, value)}" for name, value in found.items())
    _say(options, found, "\n".join(lines))


def export(options: argparse.Namespace) -> None:
    with reading(options) as store:
        count = _at(store, options).export_to(options.folder, _namespaces(options, default="*"))
    _say(options, {"folder": options.folder, "documents": count}, f"{options.folder}: {count:,} documents")


def import_folder(options: argparse.Namespace) -> None:
    from .store import MemoryStore, StoreModelError

    if is_store(options.store):
        check_no_settings(options)
        try:
            # Vectors of the same model move as they are; only others need one.
            with writing(options, *(model_of(options) if options.model else ())) as store:
                count = _import(store, options)
        except StoreModelError:
            if options.model:
                raise
            with writing(options, *model_of(options)) as store:
                count = _import(store, options)
    elif options.model:
        from .model_loading import load_model

        model = load_model(options.model, options.device, options.dtype)
        with open_or_create(options, *model, options.model) as store:
            count = _import(store, options)
    else:
        if options.namespace or settings_of(options):
            raise MSAError(
                f"{options.store} is not there: with --namespace or bits, name the model with --model"
            )
        with MemoryStore.from_export(options.store, options.folder) as store:
            count = len(store)
    _say(
        options,
        {"store": options.store, "documents": count},
        f"{options.store}: {count:,} documents imported",
    )


def reencode(options: argparse.Namespace) -> None:
    from .model_loading import load_model

    with writing(options) as store:
        model, tokenizer = load_model(options.model, options.device, options.dtype)
        store.reencode(model, tokenizer, model_path=remembered(options.model), progress=sys.stderr.isatty())
        count = len(store)
    _say(
        options,
        {"store": options.store, "documents": count, "model": remembered(options.model)},
        f"{options.store}: {count:,} documents encoded by {options.model}",
    )


def _import(store, options: argparse.Namespace) -> int:
    return len(store.import_from(options.folder, options.namespace))


def _at(store, options: argparse.Namespace):
    return store if options.at is None else store.snapshot(options.at)


def _namespaces(options: argparse.Namespace, default: str = "default") -> str | list[str]:
    given = options.namespace or [default]
    return "*" if "*" in given else given


# Texts


def _text_of(options: argparse.Namespace) -> str:
    from .documents import decode

    if options.file is not None:
        return decode(Path(options.file).read_bytes())
    if sys.stdin.isatty():
        print("reading the text from the terminal; end it with Ctrl-D", file=sys.stderr)
    return sys.stdin.read()


def _check_not_empty(texts: Iterable[str]) -> None:
    if not all(text.strip() for text in texts):
        raise MSAError("the text must not be empty")


# Printing


def _say(options: argparse.Namespace, result: dict[str, Any], text: str) -> None:
    print(json.dumps(result) if options.json else text)


def _print_rows(options: argparse.Namespace, rows: list[dict], line) -> None:
    for row in rows:
        print(json.dumps(row) if options.json else line(row))


def _preview(text: str, width: int = 80) -> str:
    words = " ".join(text[: 4 * width].split())
    return words if len(words) <= width else words[: width - 2] + " …"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _scores(row: dict) -> str:
    routed = "" if row["router_rank"] is None else f", routers alone: {row['router_rank']:,}"
    words = "" if row["lexical"] is None else f", BM25 {row['lexical']:.2f}"
    return f"score {row['score']:.4f}{routed}{words}"


def _figure(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {own:,}" for key, own in value.items()) or "none"
    if name.endswith("_bits"):
        return "dense" if value is None else str(value)
    if isinstance(value, float):
        return f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else "none" if value is None else str(value)


def _bytes_of(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
