"""What was forgotten is in no file of the store: a search for its words, names and vectors."""

import json

import pytest
from store_cases import assert_same_bank, files_with, fresh_bank, in_process, received, rows_of, vector_bytes
from tiny_models import tiny_model

from msa_hf.store import HistoryError, MemoryStore, StoreLockedError, UnknownDocumentError, maintenance

# FTS5 keeps words in lower case, stemmed, and without the beginning that they share with the word before: the
# bytes that are searched for are the last of words that no stemmer shortens.
ASCII, CYRILLIC, TITLE, NAME, NOTE = (
    "qvkwjxzqo",
    "\u0449\u044a\u0436\u0444\u0446\u044d",
    "pzvhkwqug",
    "nxqjvwkzu",
    "mjzxvqkwa",
)
WORDS = {"ascii": ASCII, "cyrillic": CYRILLIC, "title": TITLE, "name": NAME, "note": NOTE}
SECRET = (
    f"The {TITLE}\nThe agent {ASCII} met \u0430\u0431{CYRILLIC} at the harbour and told him where 4711 "
    "of the barrels lie, which nobody else knew at that time."
)
OTHERS = [
    "Honey never spoils, and barrels of it lie at the harbour.",
    "The agent of the harbour knew the time of day, which is told by a bell.",
    "Gold\nGold is dense; nobody else knew where it lies.",
]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def store(tmp_path, model, tiny_tokenizer):
    with MemoryStore.create(tmp_path / "store", model, tiny_tokenizer) as store:
        store.add(OTHERS, ["o0", "o1", "o2"])
        yield store


def add_secret(store, id=f"id-{NAME}", namespace="default", text=SECRET):
    store.add([text], [id], namespace, [{"title": "t", "about": {"person": NOTE}}])
    return id


def traces(store, vectors=None):
    """Files that hold anything of the secret, by what it is."""
    found = {name: files_with(store.path, word.encode()) for name, word in WORDS.items()}
    found |= {
        f"{name} as JSON": files_with(store.path, json.dumps(word)[1:-1].encode())
        for name, word in WORDS.items()
    }
    for name, data in (vectors or {}).items():
        third = len(data) // 3
        assert third >= 12, "too short to be found nowhere else"
        for part in range(3):
            found[f"{name}, part {part}"] = files_with(store.path, data[part * third : (part + 1) * third])
    return {name: files for name, files in found.items() if files}


def only_texts(found):
    return {name: files for name, files in found.items() if name in WORDS}


def assert_all_there(store, vectors):
    found = traces(store, vectors)
    assert set(WORDS) <= set(found)
    assert all(
        any(name.startswith(f"{own}, part {part}") for name in found) for own in vectors for part in range(3)
    )
    assert all("segments" in file for name, files in found.items() if "part" in name for file in files)


def joined(store):
    store.compact()


def split(store):
    store.add([f"Filler number {n}." for n in range(3)])


def updated(store):
    store.update(f"id-{NAME}", "Nothing to see here.", metadata={})


def deleted(store):
    store.delete(f"id-{NAME}")


def undone(store):
    store.undo()


def updated_twice_and_compacted(store):
    updated(store)
    store.update(f"id-{NAME}", SECRET + " Again.")
    store.compact()


@pytest.mark.parametrize("bits", ((4, 4, 4), (None, None, None), (1, 2, 3)), ids=str)
@pytest.mark.parametrize(
    "history",
    (
        (),
        (joined,),
        (split, joined),
        (updated,),
        (deleted,),
        (undone,),
        (deleted, undone),
        (updated_twice_and_compacted,),
    ),
    ids=lambda steps: "-".join(step.__name__ for step in steps) or "added",
)
def test_no_file_holds_anything_of_a_forgotten_document(history, bits, tmp_path, model, tiny_tokenizer):
    names = ("key_bits", "value_bits", "router_bits")
    with MemoryStore.create(tmp_path / "store", model, tiny_tokenizer, **dict(zip(names, bits))) as store:
        store.add(OTHERS, ["o0", "o1", "o2"])
        id = add_secret(store)
        vectors = vector_bytes(store, id)
        for step in history:
            step(store)
        assert_all_there(store, vectors)
        others = {own: vector_bytes(store, own) for own in ("o0", "o1", "o2")}
        before = store.version
        store.forget(id)
        assert traces(store, vectors) == {}
        assert (
            store.was_forgotten(id) and not store.was_forgotten("o0") and not store.was_forgotten(id, "else")
        )
        assert {own: vector_bytes(store, own) for own in others} == others
        assert store.verify() == []
        with pytest.raises(UnknownDocumentError):
            store.history(id)
        with pytest.raises(UnknownDocumentError):
            store.forget(id)
        for change in (store.undo, store.redo):
            with pytest.raises(HistoryError):
                change()
        for version in range(1, before + 2):
            assert not [row for row in rows_of(store.snapshot(version)) if row[0] == id]
        kept = [row[2] for row in rows_of(store)]
        fresh = fresh_bank(model, tiny_tokenizer, kept, bits)
        assert_same_bank(store.bank(), fresh, model, tiny_tokenizer)
    with MemoryStore.open(tmp_path / "store", model, tiny_tokenizer) as store:
        assert traces(store, vectors) == {} and store.was_forgotten(id)
        assert_same_bank(store.bank(), fresh, model, tiny_tokenizer)


def test_only_the_named_document_is_erased(store, model, tiny_tokenizer):
    id = add_secret(store)
    add_secret(store, namespace="work")
    add_secret(store, "another")
    vectors = vector_bytes(store, id)
    store.forget(id)
    assert [own.id for own in store.list()] == ["o0", "o1", "o2", "another"]
    assert [own.id for own in store.list("work")] == [id]
    assert store.get(id, "work").text == SECRET and store.search(ASCII, namespaces="work")[0].id == id
    assert vector_bytes(store, id, "work") == vectors == vector_bytes(store, "another")
    assert not store.was_forgotten(id, "work") and len(store.history(id, "work")) == 1
    store.forget("another")
    assert vector_bytes(store, id, "work") == vectors
    store.forget(id, "work")
    assert traces(store, vectors) == {}


def test_several_at_once_and_none_if_one_is_unknown(store):
    ids = [add_secret(store, f"{NAME}{n}", text=f"{SECRET} Part {n}.") for n in range(4)]
    before = rows_of(store)
    with pytest.raises(UnknownDocumentError, match="stranger"):
        store.forget([ids[0], "stranger"])
    assert rows_of(store) == before and not store.was_forgotten(ids[0])
    version = store.version
    store.forget([])
    assert store.version == version
    store.forget([*ids, ids[0]])
    assert traces(store) == {} and len(store) == 3 and all(map(store.was_forgotten, ids))
    assert store.stats()["forgotten"] == 4


def test_a_forgotten_name_can_be_used_again(store):
    id = add_secret(store)
    store.forget(id)
    store.add(["A new text."], [id])
    assert [event.text for event in store.history(id)] == ["A new text."] and store.was_forgotten(id)
    store.undo()
    assert len(store) == 3


def test_forgetting_everything(store):
    id = add_secret(store)
    vectors = vector_bytes(store, id)
    store.forget([own.id for own in store.list()])
    assert traces(store, vectors) == {} and len(store) == 0 and store.verify() == []
    assert not list((store.path / "segments").iterdir())
    assert store.search("harbour") == [] and len(store.bank()) == 0


def reader(pipe, path):
    """Reads the secret, then stays open, inside a statement where it is told so."""
    with MemoryStore.open(path, read_only=True) as store:
        bank = store.bank()
        pipe.send((list(bank.documents), bank.layers[1].keys.slice(0, 3), store.search(ASCII)[0].text))
        while (told := pipe.recv()) != "close":
            if told == "hold":
                with store.reads() as connection:
                    connection.execute("SELECT count(*) FROM contents").fetchone()
                    pipe.send("held")
                    pipe.recv()
                pipe.send("let go")
            else:
                with pytest.raises(HistoryError):
                    bank.documents[3]
                pipe.send([own.id for own in store.list()])
    pipe.send("closed")


def test_a_reader_that_had_read_it_keeps_nothing_in_the_files(store):
    id = add_secret(store)
    vectors = vector_bytes(store, id)
    process, pipe = in_process(reader, store.path)
    assert received(pipe)[2] == SECRET
    store.forget(id)
    assert traces(store, vectors) == {}
    pipe.send("read")
    assert received(pipe) == ["o0", "o1", "o2"]
    pipe.send("close")
    assert received(pipe) == "closed"
    process.join()
    store.scrub()
    assert traces(store, vectors) == {}


def test_a_bank_with_an_erased_document_says_so(store, model, tiny_tokenizer):
    id = add_secret(store)
    bank = store.bank()
    with MemoryStore.open(store.path, model, tiny_tokenizer, read_only=True) as reader:
        old = reader.bank()
        store.forget(id)
        for own in (bank, old):
            assert list(own.documents[:3]) == OTHERS
            for act in (lambda own=own: own.documents[3], lambda own=own: own.lexical.search("harbour")):
                with pytest.raises(HistoryError, match="erased"):
                    act()
        for own in (store, reader):  # the reader without a refresh
            assert_same_bank(own.bank(), fresh_bank(model, tiny_tokenizer, OTHERS), model, tiny_tokenizer)
            for mode in ("router", "lexical", "fused"):
                assert id not in [hit.id for hit in own.search("harbour of the agent", 9, mode=mode)]
        assert rows_of(reader) == rows_of(store)


def test_a_reader_at_work_delays_the_erasure(store, monkeypatch):
    monkeypatch.setattr(maintenance, "SCRUB_PATIENCE", 0.0)
    id = add_secret(store)
    vectors = vector_bytes(store, id)
    process, pipe = in_process(reader, store.path)
    received(pipe)
    pipe.send("hold")
    assert received(pipe) == "held"
    with pytest.raises(StoreLockedError, match="scrub"):
        store.forget(id)
    assert [own.id for own in store.list()] == ["o0", "o1", "o2"] and store.was_forgotten(id)
    assert store.version == store.log(1)[0].version and store.log(1)[0].kind == "forget"
    with pytest.raises(StoreLockedError):
        store.scrub()
    pipe.send("go on")
    assert received(pipe) == "let go"
    store.scrub()
    assert traces(store, vectors) == {} and store.verify() == []
    pipe.send("close")
    assert received(pipe) == "closed"
    process.join()


def test_an_erasure_that_was_cut_off_is_finished_by_the_next_writer(store, monkeypatch):
    id = add_secret(store)
    vectors = vector_bytes(store, id)

    def fails(*_):
        raise StoreLockedError("cut off")

    with monkeypatch.context() as patch:
        patch.setattr(maintenance, "scrub", fails)
        with pytest.raises(StoreLockedError, match="cut off"):
            store.forget(id)
    assert len(store) == 3 and only_texts(traces(store))
    store.close()
    with MemoryStore.open(store.path) as again:
        assert traces(again, vectors) == {} and again.verify() == []


def test_compaction_without_history_erases_what_was_superseded(store):
    id = add_secret(store)
    vectors = vector_bytes(store, id)
    gone = add_secret(store, "gone")
    store.update(id, "Nothing to see here.", metadata={})
    store.delete(gone)
    store.compact()
    assert_texts_and_vectors(store, vectors)
    kept = rows_of(store)
    store.compact(history=False)
    found = traces(store, vectors)
    assert (
        set(found) <= {"name", "name as JSON"} and found["name"]
    )  # the name is that of a document still there
    assert [row[:4] for row in rows_of(store)] == [row[:4] for row in kept] and store.verify() == []
    assert not store.was_forgotten("gone")
    with pytest.raises(HistoryError):
        store.undo()
    with pytest.raises(HistoryError):
        store.snapshot(store.version - 1)


def test_compaction_without_history_leaves_a_reader_its_state(store):
    id = add_secret(store)
    vectors = vector_bytes(store, id)
    process, pipe = in_process(reader, store.path)
    received(pipe)
    store.delete(id)
    store.compact(history=False)
    assert_texts_and_vectors(store, vectors)
    pipe.send("close")
    assert received(pipe) == "closed"
    process.join()
    store.compact(history=False)
    assert traces(store, vectors) == {}


def assert_texts_and_vectors(store, vectors):
    found = traces(store, vectors)
    assert {"ascii", "cyrillic", "title", "note"} <= set(found)
    assert sum("part" in name for name in found) == 3 * len(vectors)
