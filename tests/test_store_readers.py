"""Several at one store: readers beside a writer, one writer, namespaces that know nothing of each other."""

import os
import shutil
import signal
import time
from contextlib import suppress

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from store_cases import QUESTION, TEXTS, in_process, received, rows_of
from tiny_models import tiny_model

from msa_hf.modeling.memory_files import NAMES
from msa_hf.modeling.retrieval_msa import MODES
from msa_hf.store import HistoryError, MemoryStore, StoreError, StoreLockedError
from msa_hf.store.database import WriterLock

NOBODY = 65534  # user and group
HANG = 5.0  # seconds; a second writer gives up after half a one


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def store(tmp_path, model, tiny_tokenizer):
    with MemoryStore.create(tmp_path / "store", model, tiny_tokenizer) as store:
        yield store


def everything(reader, model, tokenizer, namespaces="default"):
    """All that a reader says, in values that can be compared."""
    bank = reader.bank(namespaces)
    vectors = [
        getattr(memory, name).slice(0, len(getattr(memory, name)))
        for memory in bank.layers.values()
        for name in NAMES
    ]
    return {
        "rows": rows_of(reader, namespaces),
        "texts": list(bank.documents),
        "notes": list(bank.metadata["documents"]),
        "count": reader.count(namespaces),
        "gets": [reader.get(own.id, own.namespace) for own in reader.list(namespaces)],
        "vectors": [own.float().numpy().tobytes() for own in vectors],
        "scores": [
            own.numpy().tobytes() for own in model.route_questions([QUESTION], bank, tokenizer).values()
        ],
        "ranks": [model.rank_documents([QUESTION], bank, 9, mode, tokenizer) for mode in MODES],
        "bm25": bank.lexical.scores(QUESTION),
        "hits": [reader.search(QUESTION, 50, mode=mode, namespaces=namespaces) for mode in MODES],
        "stats": bank.stats(),
    }


def differing(mine, theirs):
    return [name for name in mine if mine[name] != theirs[name]]


def watch(pipe, path, model, tokenizer):
    """A reader that says, whenever asked, what has changed since it opened the store."""
    with MemoryStore.open(path, model, tokenizer, read_only=True) as reader:
        first = everything(reader, model, tokenizer)
        pipe.send(first)
        while (told := pipe.recv()) != "close":
            if told == "refresh":
                reader.refresh()
                pipe.send((reader.version, everything(reader, model, tokenizer)))
            else:
                pipe.send(differing(first, everything(reader, model, tokenizer)))
    pipe.send("closed")


def ask(pipe, what):
    pipe.send(what)
    return received(pipe)


@pytest.mark.parametrize("history", (True, False))
def test_a_reader_stays_where_it_opened(history, store, model, tiny_tokenizer):
    store.add(TEXTS)
    process, pipe = in_process(watch, store.path, model, tiny_tokenizer)
    first = everything(store, model, tiny_tokenizer)
    assert differing(first, received(pipe)) == []
    ids = [own.id for own in store.list()]
    for number in range(100):
        change = number % 5
        if change < 3:
            store.add([f"New document {number} about Paris and gold."])
        elif change == 3:
            store.update(ids[number % len(ids)], f"Changed by {number}: honey of the Seine.")
        else:
            store.undo()
        if number % 33 == 0:
            assert ask(pipe, "look") == []
    store.delete([own.id for own in store.list()][:5])
    assert ask(pipe, "look") == []
    store.compact(history=history)
    assert ask(pipe, "look") == []
    store.add(["The last one."])
    version, seen = ask(pipe, "refresh")
    assert version == store.version and differing(everything(store, model, tiny_tokenizer), seen) == []
    assert ask(pipe, "close") == "closed"
    process.join()
    assert store.verify() == []


def test_a_bank_and_a_snapshot_outlive_edits(store, model, tiny_tokenizer):
    """What a bank was, it stays, though its documents are deleted and its segments rewritten."""
    store.add(TEXTS)
    version, bank = store.version, store.bank()
    first = everything(store, model, tiny_tokenizer)
    store.delete([own.id for own in store.list()])
    store.compact()
    assert list(bank.documents) == first["texts"]
    for mode, ranks in zip(MODES, first["ranks"]):
        assert model.rank_documents([QUESTION], bank, 9, mode, tiny_tokenizer) == ranks
    again = everything(store.snapshot(version), model, tiny_tokenizer)
    assert differing(first, again) == []


def test_a_snapshot_says_that_its_history_is_gone(store):
    """It must not show the part of the state that later versions happen to share."""
    store.add(["one", "two"], ["a", "b"])
    snapshot = store.snapshot(store.version)
    store.update("a", "three")
    store.compact()
    assert [own.text for own in snapshot.list()] == ["one", "two"] and snapshot.version == 2
    with MemoryStore.open(store.path, read_only=True) as reader:
        earlier = reader.snapshot(2)
        store.compact(history=False)
        for own in (snapshot, earlier):
            for act in (
                own.list,
                own.bank,
                own.count,
                lambda own=own: own.get("b"),
                lambda own=own: own.history("b"),
            ):
                with pytest.raises(HistoryError, match="version 2 is no longer kept"):
                    act()
        assert [own.text for own in reader.list()] == [own.text for own in store.list()] == ["two", "three"]


def test_marks_of_readers_go_with_them(store, model, tiny_tokenizer):
    store.add(["one"])
    process, pipe = in_process(watch, store.path, model, tiny_tokenizer)
    received(pipe)
    old = store.version
    store.update(store.list()[0].id, "two")
    store.compact(history=False)
    assert store.stats()["versions"] == 2  # what the reader sees is kept
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    store.compact(history=False)
    assert store.stats()["versions"] == 1 and not list((store.path / "readers").iterdir())
    with pytest.raises(HistoryError):
        store.snapshot(old)


def write(pipe, path):
    with MemoryStore.open(path):
        pipe.send("open")
        pipe.recv()
    pipe.send("closed")


def test_one_writer_at_a_time(store):
    path = store.path
    with pytest.raises(StoreLockedError, match="read_only=True"):  # the same process, another object
        MemoryStore.open(path)
    store.close()
    process, pipe = in_process(write, path)
    assert received(pipe) == "open"
    started = time.monotonic()
    with pytest.raises(StoreLockedError, match=f"process {process.pid}"):
        MemoryStore.open(path)
    assert time.monotonic() - started < HANG
    with MemoryStore.open(path, read_only=True) as reader:
        assert len(reader) == 0
    assert ask(pipe, "close") == "closed"
    process.join()
    with MemoryStore.open(path) as again:
        again.delete([])


def test_the_lock_of_a_killed_writer_is_free_at_once(store, model, tiny_tokenizer):
    path = store.path
    store.close()
    process, pipe = in_process(write, path)
    assert received(pipe) == "open"
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with MemoryStore.open(path, model, tiny_tokenizer) as again:
        assert again.add(["x"]) and again.verify() == []


def test_a_process_that_was_forked_meanwhile_does_not_keep_the_lock(store, model, tiny_tokenizer):
    child = os.fork()
    if not child:  # it has everything that is open here
        time.sleep(60)
        os._exit(0)
    try:
        store.close()
        MemoryStore.open(store.path, model, tiny_tokenizer).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_process_that_was_forked_meanwhile_does_not_give_the_lock_away(store):
    path = store.path
    store.close()
    lock = WriterLock(path)
    child = os.fork()
    if not child:
        lock.release()
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(StoreLockedError):
        WriterLock(path)
    lock.release()
    WriterLock(path).release()


def test_an_open_that_fails_leaves_no_lock(store, model, tiny_tokenizer):
    path = store.path
    store.close()
    with pytest.raises(ValueError, match="fingerprint|backbone"):
        MemoryStore.open(path, tiny_model(seed=3), tiny_tokenizer)
    MemoryStore.open(path, model, tiny_tokenizer).close()


def test_a_reader_cannot_write(store, model, tiny_tokenizer):
    id = store.add(["x"])[0]
    with MemoryStore.open(store.path, model, tiny_tokenizer, read_only=True) as reader:
        assert reader.read_only and not store.read_only
        changes = (
            lambda: reader.add(["y"]),
            lambda: reader.update(id, "y"),
            lambda: reader.delete(id),
            lambda: reader.forget(id),
            lambda: reader.undo(),
            lambda: reader.redo(),
            lambda: reader.compact(),
            lambda: reader.scrub(),
        )
        for change in changes:
            with pytest.raises(StoreError, match="read_only"):
                change()
        assert (
            reader.verify() == [] and rows_of(reader) == rows_of(store) and reader.stats()["documents"] == 1
        )


def look_at_a_read_only_folder(pipe, path, model, tokenizer, user):
    if os.getuid() == 0:  # to whom no folder is read-only
        os.setgid(user)
        os.setuid(user)
    try:
        (path / "probe").touch()
        pipe.send("the folder can be written to")
        return
    except OSError:
        pass
    with MemoryStore.open(path, model, tokenizer, read_only=True) as reader:
        pipe.send(everything(reader, model, tokenizer))
        pipe.send(reader.verify())
    try:
        MemoryStore.open(path)
    except StoreError as error:
        pipe.send(str(error))


@pytest.mark.parametrize("left_by", ("closing", "a crash"))
def test_a_folder_that_nobody_may_write_to(left_by, store, model, tiny_tokenizer, tmp_path):
    """As on a disk that is mounted for reading; after a crash the newest commits are in the log alone."""
    store.add(TEXTS)
    expected, path = everything(store, model, tiny_tokenizer), tmp_path / "copy"
    if left_by == "closing":
        store.close()
    shutil.copytree(store.path, path)
    assert (path / "store.sqlite-wal").exists() == (left_by == "a crash")
    parents = [
        own
        for own in path.parents
        if own.stat().st_uid == os.getuid() and own.stat().st_mode & 0o055 != 0o055
    ]
    modes = [place.stat().st_mode for place in parents]
    for place, mode in zip(parents, modes):
        place.chmod(mode | 0o055)
    places = [path, *path.rglob("*")]
    for place in places:
        place.chmod(0o555 if place.is_dir() else 0o444)
    try:
        process, pipe = in_process(look_at_a_read_only_folder, path, model, tiny_tokenizer, NOBODY)
        assert differing(expected, received(pipe)) == []
        assert received(pipe) == []
        assert str(path) in received(pipe)
        process.join()
    finally:
        for place, mode in zip(parents, modes):
            place.chmod(mode)
        for place in places:
            place.chmod(0o755 if place.is_dir() else 0o644)


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.generate],  # shrinking takes minutes
)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(
                ("add", "update", "delete", "undo", "redo", "forget", "compact", "same", "again")
            ),
            st.sampled_from(TEXTS),
        ),
        min_size=3,
        max_size=12,
    )
)
def test_a_namespace_knows_nothing_of_another(steps, model, tiny_tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("namespaces") / "store"
    with MemoryStore.create(path, model, tiny_tokenizer) as store:
        store.add(TEXTS[3:11], namespace="mine")
        store.forget(store.add(["first"], namespace="theirs"), "theirs")  # no undo goes back before it
        expected = everything(store, model, tiny_tokenizer, "mine")
        asked = store.search(QUESTION, 50, namespaces=["mine", "nobody"])
        for change, text in steps:
            known = [own.id for own in store.list("theirs")]
            if change == "add":
                store.add([text], namespace="theirs", if_exists="update")
            elif change == "same":
                store.add(TEXTS[3:11], namespace="theirs", if_exists="update")
            elif change == "again":
                store.add([text + " Paris, gold, honey, Seine."] * 2, namespace="theirs", if_exists="keep")
            elif change == "update" and known:
                store.update(known[0], text, "theirs")
            elif change == "delete" and known:
                store.delete(known[-1], "theirs")
            elif change == "forget" and known:
                store.forget(known[0], "theirs")
            elif change == "compact":
                store.compact(history=len(text) % 2 == 0)
            elif change in ("undo", "redo"):
                with suppress(HistoryError):
                    getattr(store, change)()
            found = everything(store, model, tiny_tokenizer, "mine")
            assert differing(expected, found) == []
            assert store.search(QUESTION, 50, namespaces=["mine", "nobody"]) == asked
            assert all(hit.namespace == "mine" for hit in asked)
            assert {hit.namespace for hit in store.search(QUESTION, 50, namespaces="theirs")} <= {"theirs"}


def test_all_namespaces_together_are_all_documents(store, model, tiny_tokenizer):
    store.add(TEXTS[:4], namespace="a")
    store.add(TEXTS[2:9], namespace="b")
    bank, both = store.bank("*"), store.bank(["b", "a", "b"])
    assert list(bank.documents) == list(both.documents) == TEXTS[:4] + TEXTS[2:9]
    assert store.count() == len(store) == 11 and store.namespaces() == ["a", "b"]
    fresh = model.encode_memory(TEXTS[:4] + TEXTS[2:9], tiny_tokenizer).pack(4, 4, 4)
    ours, wanted = (model.route_questions([QUESTION], own, tiny_tokenizer) for own in (bank, fresh))
    assert all(torch.equal(ours[layer], wanted[layer]) for layer in wanted)
