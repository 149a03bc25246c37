"""msa-hf push: parsers of what goes to the Hub, and what they do."""

import argparse
import json
import logging
import tempfile
from pathlib import Path

from .arguments import command, examples

logger = logging.getLogger(__name__)

_KINDS = {
    "model": "a converted model, with its code, as a model repository",
    "adapter": "trained routers, as a PEFT adapter",
    "memory": "the documents of a store and their vectors, as a dataset repository",
    "kernels": "the Triton kernels of this package, for kernels.get_kernel",
    "space": "a Gradio Space",
}


def add_push(subparsers) -> None:
    """Adds `push` with its kinds."""
    parser = subparsers.add_parser(
        "push",
        help="send a model, routers, a memory or the kernels to the Hugging Face Hub",
        description="Send something to the Hugging Face Hub.\n\n"
        + "\n".join(f"{name:10} {what}" for name, what in _KINDS.items()),
        epilog=examples(
            "msa-hf push model ./smol-msa USER/smol-msa --dry-run       # what would go; contacts nothing",
            "msa-hf push memory ./store USER/notes --private --model USER/smol-msa",
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(title="kinds", metavar="KIND", required=True)
    for add in (_add_model, _add_adapter, _add_memory, _add_kernels, _add_space):
        add(kinds)


def _add_model(kinds) -> None:
    parser = _push_command(
        kinds,
        "model",
        "msa-hf push model ./smol-msa USER/smol-msa --dry-run       # what would go; contacts nothing",
        "msa-hf push model ./smol-msa USER/smol-msa --private",
        "msa-hf push model ./msa USER/msa --base-model Qwen/Qwen3-0.6B --license apache-2.0",
    )
    parser.add_argument("folder", metavar="FOLDER", help="made by msa-hf convert or save_pretrained")
    _add_repository(parser)
    _add_base(parser)


def _add_adapter(kinds) -> None:
    parser = _push_command(kinds, "adapter", "msa-hf push adapter ./routers USER/smol-routers --dry-run")
    parser.add_argument("folder", metavar="FOLDER", help="made by msa-hf train-router")
    _add_repository(parser)
    _add_base(parser)


def _add_memory(kinds) -> None:
    parser = _push_command(
        kinds,
        "memory",
        "msa-hf push memory ./store USER/notes --private --model USER/smol-msa",
        "msa-hf push memory ./store USER/manuals --namespace manuals --license cc-by-4.0",
    )
    parser.add_argument("store", metavar="STORE", help="made by msa-hf ingest --store")
    _add_repository(parser)
    parser.add_argument("--namespace", action="append", metavar="NAME", help="may be repeated (default: all)")
    parser.add_argument("--model", metavar="REPO", help="on the Hub, the model that made the memory")
    parser.add_argument("--license", metavar="ID", help='of the documents (default "unknown")')
    parser.add_argument(
        "--keep-paths",
        action="store_true",
        help="keep absolute paths of the files that documents came from (default: relative to their folder)",
    )


def _add_kernels(kinds) -> None:
    _add_repository(_push_command(kinds, "kernels", "msa-hf push kernels USER/msa-kernels"))


def _add_space(kinds) -> None:
    parser = _push_command(kinds, "space", "msa-hf push space USER/msa --folder ./space_app")
    _add_repository(parser)
    parser.add_argument("--folder", default="space_app", help='with an app.py in it (default "space_app")')


def _push_command(kinds, kind: str, *lines: str) -> argparse.ArgumentParser:
    parser = command(
        kinds,
        kind,
        f"send {_KINDS[kind]}",
        "The repository is made where it is missing, and gets one commit. After an interruption the same\n"
        "command goes on: what was uploaded is not uploaded again. The token is the one of `hf auth login`\n"
        "or HF_TOKEN. Files that look like secrets, pickles and links to the outside are refused."
        + ("" if kind == "space" else " README.md is\nthe card, which is written anew from what is known."),
        *lines,
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would go; contacts nothing")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", metavar="BRANCH", help='made where it is missing (default "main")')
    parser.add_argument("--message", metavar="TEXT", help="of the commit")
    parser.set_defaults(run=push, kind=kind)
    return parser


def _add_repository(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repository", metavar="REPO", help="USER/NAME on the Hub")


def _add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base-model", metavar="REPO", help="on the Hub, the backbone, for the card")
    parser.add_argument("--license", metavar="ID", help="of the backbone, for the card (default: as noted)")


def push(options: argparse.Namespace) -> None:
    from .hub import send

    with tempfile.TemporaryDirectory(prefix="msa-push-") as scratch:
        planned = _plan(options, Path(scratch) / "export")
        if options.dry_run:
            _print_plan(planned.to_dict(), options.json)
            return
        done = send(planned, private=options.private, message=options.message)
    if options.json:
        result = {"url": done.url, "commits": done.commits, "files": len(planned.files)}
        print(json.dumps({"kind": planned.kind, "repository": planned.repository, **result}))
        return
    for branch, commit in done.commits.items():
        print(f"{done.url}: {len(planned.files)} files, {branch} is now {commit}")


def _plan(options: argparse.Namespace, scratch: Path):
    from . import hub

    chosen = {"revision": options.revision}
    if options.kind in ("model", "adapter"):
        plan = hub.plan_model if options.kind == "model" else hub.plan_adapter
        chosen |= {"base_model": options.base_model, "license": options.license}
        return plan(options.folder, options.repository, **chosen)
    if options.kind == "kernels":
        return hub.plan_kernels(options.repository, scratch, **chosen)
    if options.kind == "space":
        return hub.plan_space(options.folder, options.repository, **chosen)
    from .store import MemoryStore

    chosen |= {"namespaces": options.namespace or "*", "keep_paths": options.keep_paths}
    chosen |= {"model": options.model, "license": options.license}
    with MemoryStore.open(options.store, read_only=True) as store:
        return hub.plan_memory(store, options.repository, scratch, **chosen)


def _print_plan(plan: dict, as_json: bool) -> None:
    if as_json:
        print(json.dumps({**plan, "dry_run": True}))
        return
    width = max(len(file["path"]) for file in plan["files"])
    print(f"{plan['kind']} -> {plan['repository']} ({plan['repo_type']}), {', '.join(plan['branches'])}")
    for file in plan["files"]:
        print(f"  {file['path']:{width}} {file['bytes']:>15,}{'  LFS' if file['lfs'] else ''}")
    print(f"  {len(plan['files'])} files, {plan['bytes']:,} bytes; nothing was sent\n")
    print(plan["card"])
