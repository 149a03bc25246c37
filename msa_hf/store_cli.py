"""Parsers of the commands that read and edit a store; what they do is in `store_commands`."""

import argparse

from . import store_commands
from .arguments import (
    add_batch_tokens,
    add_loading,
    add_store_settings,
    command,
    json_object,
    name_and_value,
    positive,
)


def add_store_commands(subparsers) -> None:
    for add in (
        _add_add,
        _add_update,
        _add_delete,
        _add_undo_and_redo,
        _add_forget,
        _add_history,
        _add_list,
        _add_search,
        _add_verify,
        _add_compact,
        _add_stats,
        _add_export,
        _add_import,
        _add_reencode,
    ):
        add(subparsers)


def add_reading(parser: argparse.ArgumentParser, default: str = '"default"') -> None:
    """Which documents of a store are read."""
    parser.add_argument(
        "--namespace",
        action="append",
        metavar="NAME",
        help=f'of a store, may be repeated; "*" is all (default {default})',
    )
    parser.add_argument("--at", type=positive, metavar="VERSION", help="a store as it was at a commit")


def _add_add(subparsers) -> None:
    parser = _store_command(
        subparsers,
        "add",
        "add documents to a store",
        "Each TEXT is a document; without TEXT and --file, standard input is one. Ids are made from the\n"
        "texts unless --id names one. Long files are for msa-hf ingest, which splits them.",
        'msa-hf add ./store "Honey never spoils." --id honey --metadata \'{"topic": "food"}\'',
        "msa-hf add ./store --file note.txt --namespace notes",
        "msa-hf add ./store < note.txt",
    )
    parser.add_argument("texts", metavar="TEXT", nargs="*", help="in quotes")
    parser.add_argument("--id", metavar="ID", help="of the only document")
    _add_writing(parser)


def _add_update(subparsers) -> None:
    parser = _store_command(
        subparsers,
        "update",
        "replace the text of a document",
        "The old text stays in the history. Without TEXT and --file, it is read from standard input.",
        'msa-hf update ./store honey "Honey keeps for thousands of years."',
    )
    parser.add_argument("id", metavar="ID")
    parser.add_argument("text", metavar="TEXT", nargs="?", help="in quotes")
    _add_writing(parser)


def _add_writing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--file", metavar="FILE", help="a text file that is the document")
    parser.add_argument(
        "--metadata", type=json_object, metavar="JSON", help='an object; "title" and "source" are shown'
    )
    _add_one_namespace(parser)
    _add_model(parser)
    name = parser.prog.rpartition(" ")[2]
    parser.set_defaults(run=getattr(store_commands, name))


def _add_delete(subparsers) -> None:
    parser = _store_command(
        subparsers,
        "delete",
        "remove documents from a store",
        "They stay in the history: undo brings them back. To erase them, use forget.",
        "msa-hf delete ./store honey wax",
    )
    parser.add_argument("ids", metavar="ID", nargs="+")
    _add_one_namespace(parser)
    parser.set_defaults(run=store_commands.delete)


def _add_undo_and_redo(subparsers) -> None:
    for name, title, text in (
        ("undo", "take back the last changes of a store", "Changes of all namespaces, one commit each."),
        ("redo", "take back the last undos of a store", "Possible until something else is changed."),
    ):
        parser = _store_command(
            subparsers, name, title, text, f"msa-hf {name} ./store", f"msa-hf {name} ./store 3"
        )
        parser.add_argument("steps", metavar="N", type=positive, nargs="?", default=1, help="default 1")
        parser.set_defaults(run=store_commands.step, step=name)


def _add_forget(subparsers) -> None:
    parser = _store_command(
        subparsers,
        "forget",
        "erase documents with all their history",
        "Texts, words and vectors leave every file of the store. Nothing before it can be undone any more.\n"
        "Asks first in a terminal.",
        "msa-hf forget ./store honey --yes",
    )
    parser.add_argument("ids", metavar="ID", nargs="+")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    _add_one_namespace(parser)
    parser.set_defaults(run=store_commands.forget)


def _add_history(subparsers) -> None:
    parser = _store_command(
        subparsers,
        "history",
        "show what happened to a store or to a document",
        "Without ID the commits, newest first; with ID the document's changes, oldest first. A version\n"
        "number is what --at takes. With --json, one object per line.",
        "msa-hf history ./store --limit 5",
        "msa-hf history ./store honey",
    )
    parser.add_argument("id", metavar="ID", nargs="?")
    parser.add_argument("--limit", type=positive, metavar="N", help="commits at most, default 20")
    _add_one_namespace(parser)
    parser.set_defaults(run=store_commands.history)


def _add_list(subparsers) -> None:
    parser = _store_command(
        subparsers,
        "list",
        "list the documents of a store",
        "With --json, one object per line, with the whole text.",
        "msa-hf list ./store --limit 10",
        "msa-hf list ./store --namespace notes --where topic=food --where kind=text --where kind=markdown",
        "msa-hf list ./store --at 3 --json",
    )
    parser.add_argument(
        "--where",
        type=name_and_value,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="metadata that documents must have; of one name, any of its values",
    )
    parser.add_argument("--limit", type=positive, default=100, metavar="N", help="at most, default 100")
    add_reading(parser)
    parser.set_defaults(run=store_commands.show_documents)


def _add_search(subparsers) -> None:
    parser = _store_command(
        subparsers,
        "search",
        "find documents of a store",
        "By the model's routers and BM25, best first; --mode lexical needs no model. With --json, one\n"
        "object per line.",
        'msa-hf search ./store "Who wrote the first program?"',
        'msa-hf search ./store "honey" --mode lexical --k 3 --namespace "*" --json',
    )
    parser.add_argument("query", metavar="QUERY", help="in quotes")
    parser.add_argument("--k", type=positive, default=10, metavar="N", help="documents at most, default 10")
    parser.add_argument("--mode", choices=["fused", "router", "lexical"], help="default: as the model says")
    add_reading(parser)
    _add_model(parser)
    parser.set_defaults(run=store_commands.search)


def _add_verify(subparsers) -> None:
    parser = _store_command(
        subparsers,
        "verify",
        "check a store",
        "Reads every byte and compares it with its checksum. Changes nothing. Exit code 1 if anything is\n"
        "wrong; files that another process is just writing count as strangers.",
        "msa-hf verify ./store",
    )
    parser.set_defaults(run=store_commands.verify)


def _add_compact(subparsers) -> None:
    parser = _store_command(
        subparsers,
        "compact",
        "give back space of a store that nothing needs",
        "Puts the vectors into few files, in order.",
        "msa-hf compact ./store",
        "msa-hf compact ./store --drop-history      # also what undo and --at would need",
    )
    parser.add_argument(
        "--drop-history", action="store_true", help="keep only what is there now; undo ends here"
    )
    parser.set_defaults(run=store_commands.compact)


def _add_stats(subparsers) -> None:
    parser = _store_command(
        subparsers,
        "stats",
        "count the documents and bytes of a store",
        "Of its newest version.",
        "msa-hf stats ./store --json",
    )
    parser.set_defaults(run=store_commands.stats)


def _add_export(subparsers) -> None:
    parser = _store_command(
        subparsers,
        "export",
        "write the documents of a store to a folder",
        "Texts and metadata as JSON lines, vectors as safetensors. A store of the same model takes them in\n"
        "as they are; one of another model encodes the texts.",
        "msa-hf export ./store ./export                  # all namespaces",
        "msa-hf export ./store ./export --namespace notes --at 7",
    )
    parser.add_argument("folder", metavar="FOLDER", help="folder to make, or export to replace")
    add_reading(parser, default="all")
    parser.set_defaults(run=store_commands.export)


def _add_import(subparsers) -> None:
    parser = _store_command(
        subparsers,
        "import",
        "add what was exported to a store",
        "A store that is not there is made: with --model for that model, else as a copy of the one that was\n"
        "exported. What is there already with another content is an error.",
        "msa-hf import ./copy ./export",
        "msa-hf import ./other ./export --model ./better-model --key-bits 3",
    )
    parser.add_argument("folder", metavar="FOLDER", help="folder made by export")
    parser.add_argument("--namespace", metavar="NAME", help="put all documents there (default: as exported)")
    _add_model(parser)
    add_store_settings(parser)
    parser.set_defaults(run=store_commands.import_folder)


def _add_reencode(subparsers) -> None:
    parser = _store_command(
        subparsers,
        "reencode",
        "encode a store anew for another model",
        "Documents and history stay; the store belongs to MODEL from then on.",
        "msa-hf reencode ./store ./better-model",
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a converted model")
    add_batch_tokens(parser)
    add_loading(parser)
    parser.set_defaults(run=store_commands.reencode)


def _store_command(subparsers, name: str, *texts: str) -> argparse.ArgumentParser:
    parser = command(subparsers, name, *texts)
    parser.add_argument("store", metavar="STORE", help="folder made by msa-hf ingest --store")
    return parser


def _add_one_namespace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--namespace", default="default", metavar="NAME", help='default "default"')


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="folder of the model; default: the one that made the store")
    add_loading(parser)
