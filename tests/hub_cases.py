"""What the tests of the Hub push: a saved model, routers, a store, and the command itself."""

from argparse import ArgumentParser
from pathlib import Path

from tiny_models import DOCUMENTS, tiny_model

from msa_hf import MemoryStore, push_cli


def saved_model(folder: Path, tokenizer) -> Path:
    """A model in several shards."""
    tiny_model().save_pretrained(folder, max_shard_size="60KB")
    tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) >= 3
    return folder


def filled_store(folder: Path, tokenizer) -> MemoryStore:
    """A store of two namespaces, which knows the folder that its model came from."""
    store = MemoryStore.create(folder / "store", tiny_model(), tokenizer, model_path=folder)
    store.add(DOCUMENTS, [f"d{i}" for i in range(len(DOCUMENTS))], metadata=[{"n": i} for i in range(7)])
    store.add(["Of another namespace."], ["other"], "other")
    return store


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, by path."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def push(*words) -> None:
    """Runs `msa-hf push` in this process."""
    parser = ArgumentParser()
    push_cli.add_push(parser.add_subparsers())
    options = parser.parse_args(["push", *map(str, words)])
    options.run(options)
