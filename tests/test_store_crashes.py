"""A writer that is killed at any moment leaves a whole store, with everything that it had acknowledged."""

import os
import sqlite3

import pytest
from tiny_models import tiny_model

from msa_hf.evaluation import store_crashes
from msa_hf.evaluation.store_crashes import kill_often
from msa_hf.modeling.errors import MSAError
from msa_hf.store import MemoryStore, StoreError

needs_fork = pytest.mark.skipif(
    not hasattr(store_crashes.os, "fork"), reason="forks the writers that it kills"
)


@needs_fork
def test_killed_writers_leave_whole_stores(tmp_path):
    report = kill_often(20, tmp_path, seed=7)
    assert report.problems == []
    assert report.kills == 20 == sum(report.hit.values())
    assert report.hit["end"] < 10  # most of them in the middle of an operation


@needs_fork
def test_the_trial_notices_a_commit_that_is_lost(tmp_path, monkeypatch):
    """Where a writer acknowledges what it did not do, the trial must say so."""
    monkeypatch.setattr(store_crashes.Operation, "run", lambda self, store: None)
    assert kill_often(3, tmp_path, seed=1).problems


@needs_fork
def test_a_creation_that_died_can_be_repeated(tmp_path, tiny_tokenizer, monkeypatch):
    model, folder = tiny_model(), tmp_path / "store"
    for step in ("os.replace", "os.fsync"):

        def die(*_):
            os._exit(1)

        child = os.fork()
        if not child:
            monkeypatch.setattr(step, die)
            MemoryStore.create(folder, model, tiny_tokenizer)
            os._exit(0)
        assert os.waitpid(child, 0)[1] >> 8 == 1
        with pytest.raises(FileNotFoundError):
            MemoryStore.open(folder)
    with MemoryStore.create(folder, model, tiny_tokenizer) as store:
        store.add(["a document"])
        assert store.verify() == []
    assert {path.name for path in folder.iterdir()} == {"store.sqlite", "segments", "writer.lock"}
    with pytest.raises(StoreError, match="is not an empty folder"):
        MemoryStore.create(folder, model, tiny_tokenizer)


def test_a_creation_whose_last_step_fails_leaves_nothing(tmp_path, tiny_tokenizer, monkeypatch):
    model, folder = tiny_model(), tmp_path / "store"

    def fail(self):
        raise sqlite3.DatabaseError("database disk image is malformed")

    with monkeypatch.context() as patched:
        patched.setattr("msa_hf.store.journal.Journal.newest", fail)
        with pytest.raises(MSAError):
            MemoryStore.create(folder, model, tiny_tokenizer)
    with MemoryStore.create(folder, model, tiny_tokenizer) as store:
        assert len(store) == 0
