"""Opening a store for a command, and finding its model; a model is loaded only where one is needed."""

import argparse
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .modeling.errors import MSAError

STORE_FILE = "store.sqlite"  # what tells a store from a memory
BITS = ("key_bits", "value_bits", "router_bits")


def is_store(folder: str | Path) -> bool:
    return (Path(folder) / STORE_FILE).is_file()


@contextmanager
def reading(options: argparse.Namespace, model=None, tokenizer=None):
    from .store import MemoryStore

    with MemoryStore.open(options.store, model, tokenizer, read_only=True) as store:
        yield store


@contextmanager
def writing(options: argparse.Namespace, model=None, tokenizer=None):
    from .store import MemoryStore

    with MemoryStore.open(options.store, model, tokenizer) as store:
        yield store


def writing_with_model(options: argparse.Namespace):
    return writing(options, *model_of(options))


def open_or_create(options: argparse.Namespace, model, tokenizer, model_path: str):
    """The store, made as the options say if it is not there; bits of one that is there cannot change."""
    from .store import MemoryStore

    settings = settings_of(options)
    if not is_store(options.store):
        return MemoryStore.create(
            options.store, model, tokenizer, **settings, model_path=remembered(model_path)
        )
    store = MemoryStore.open(options.store, model, tokenizer)
    try:
        for name in BITS:
            own = getattr(store.provenance, name)
            if name in settings and settings[name] != own:
                raise MSAError(
                    f"{options.store} has {name} {own or 'dense'}; only a new store can have others"
                )
        if "budget_bytes" in settings:
            store.set_budget(settings["budget_bytes"])
    except BaseException:
        store.close()
        raise
    return store


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What was said about a new store, as `MemoryStore.create` takes it."""
    given = {name: getattr(options, name) for name in (*BITS, "budget_bytes")}
    return {name: None if value == "dense" else value for name, value in given.items() if value is not None}


def check_no_settings(options: argparse.Namespace) -> None:
    if settings_of(options):
        raise MSAError(f"{options.store} is there: bits and budget are for a new store")


def model_of(options: argparse.Namespace):
    """(model, tokenizer) of a store, in the precision that made it unless another is asked for."""
    from .model_loading import load_model, model_path_of

    with reading(options) as store:
        path = model_path_of(store.model_path, options.store, options.model)
    return load_model(path, options.device, dtype_of(options))


def dtype_of(options: argparse.Namespace) -> str:
    if options.dtype != "auto":
        return options.dtype
    with reading(options) as store:
        return store.provenance.dtype


def remembered(model: str) -> str:
    """Where a model is, for those who open the store from another folder."""
    return os.path.abspath(model) if os.path.isdir(model) else model
