"""MemoryStore, method by method: what it accepts, what it refuses, and that a refusal changes nothing."""

import json
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from copy import deepcopy

import pytest
import torch
from store_cases import QUESTION, TEXTS, assert_same_bank, contents, default_id, fresh_bank, rows_of
from tiny_models import DOCUMENTS, tiny_model

from msa_hf import MemoryBank
from msa_hf.modeling.errors import MemoryFormatError, MemoryMismatchError, MSAError
from msa_hf.store import (
    DocumentExistsError,
    Event,
    HistoryError,
    MemoryStore,
    StoreError,
    StoreModelError,
    UnknownDocumentError,
)

LONG = "x" * 1024


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def store(tmp_path, model, tiny_tokenizer):
    with MemoryStore.create(tmp_path / "store", model, tiny_tokenizer) as store:
        yield store


@pytest.fixture
def counted(model, monkeypatch):
    """Texts that the model has encoded, as a list that grows."""
    texts, encode = [], model.encode_memory

    def counting(documents, *args, **kwargs):
        texts.extend(documents)
        return encode(documents, *args, **kwargs)

    monkeypatch.setattr(model, "encode_memory", counting)
    return texts


def assert_fresh(store, model, tokenizer, namespaces="default"):
    texts = [own.text for own in store.list(namespaces)]
    assert_same_bank(store.bank(namespaces), fresh_bank(model, tokenizer, texts), model, tokenizer)


# What is refused

NESTED: dict = {}
NESTED["own"] = NESTED
DEEP: list = []
for _ in range(100_000):
    DEEP = [DEEP]

BAD_ARGUMENTS = {
    "one text": (lambda s: s.add("a text"), "documents must be a list of texts; got str"),
    "no list": (lambda s: s.add(None), "documents must be a list of texts; got NoneType"),
    "a mapping": (lambda s: s.add({"a": "b"}), "documents must be a list of texts; got dict"),
    "a number": (lambda s: s.add(["new", 1]), r"documents\[1\] must be a text; got int"),
    "bytes": (lambda s: s.add([b"new"]), r"documents\[0\] must be a text; got bytes"),
    "surrogate": (lambda s: s.add(["new", "a\ud800b"]), r"documents\[1\] must be encodable as UTF-8"),
    "too long": (lambda s: s.add(["new", "y" * 257]), "at most max_position_embeddings=256.*longest has 257"),
    "few ids": (lambda s: s.add(["new", "newer"], ["n"]), r"ids must have one entry per document \(2\)"),
    "one id": (lambda s: s.add(["new", "newer"], "no"), r"ids must have one entry per document \(2\)"),
    "no id": (lambda s: s.add(["new"], [None]), r"ids\[0\] must be 1 to 1024 printable characters; got None"),
    "empty id": (lambda s: s.add(["new"], [""]), r"ids\[0\] must be 1 to 1024 printable"),
    "long id": (lambda s: s.add(["new"], [LONG + "y"]), r"ids\[0\] must be 1 to 1024 printable"),
    "id with NUL": (lambda s: s.add(["new"], ["a\0b"]), r"ids\[0\] must be 1 to 1024 printable"),
    "id with surrogate": (lambda s: s.add(["new"], ["\ud800"]), r"ids\[0\] must be 1 to 1024 printable"),
    "equal ids": (lambda s: s.add(["new", "newer"], ["n", "n"]), "ids must differ; 'n' stands for two"),
    "equal ids, other metadata": (
        lambda s: s.add(["new", "new"], ["n", "n"], metadata=[{"a": 1}, {"a": True}]),
        "ids must differ; 'n' stands for two",
    ),
    "namespace *": (lambda s: s.add(["new"], namespace="*"), r"namespace must not be '\*'"),
    "empty namespace": (lambda s: s.add(["new"], namespace=""), "namespace must be 1 to 1024 printable"),
    "no namespace": (lambda s: s.add(["new"], namespace=None), "namespace must be .* got None"),
    "NaN": (
        lambda s: s.add(["new"], metadata=[{"a": float("nan")}]),
        r"metadata\[0\] must be a JSON object: .*JSON",
    ),
    "infinity": (lambda s: s.add(["new"], metadata=[{"a": [1e999]}]), r"metadata\[0\] must be a JSON object"),
    "a set": (lambda s: s.add(["new"], metadata=[{"a": {1}}]), r"metadata\[0\] must be a JSON object: .*set"),
    "no object": (
        lambda s: s.add(["new"], metadata=[["a"]]),
        r"metadata\[0\] must be a JSON object; got list",
    ),
    "few metadata": (
        lambda s: s.add(["new"], metadata=[]),
        r"metadata must have one entry per document \(1\)",
    ),
    "one metadata": (
        lambda s: s.add(["new"], metadata={"a": 1}),
        "metadata must have one entry per document",
    ),
    "circle": (lambda s: s.add(["new"], metadata=[NESTED]), r"metadata\[0\] must be a JSON object"),
    "depth": (lambda s: s.add(["new"], metadata=[{"a": DEEP}]), r"metadata\[0\] must be a JSON object"),
    "much metadata": (
        lambda s: s.add(["new"], metadata=[{"a": "b" * (1 << 20)}]),
        r"metadata\[0\] must be at most",
    ),
    "metadata with surrogate": (
        lambda s: s.add(["new"], metadata=[{"a": "\ud800"}]),
        r"metadata\[0\] must be a JSON",
    ),
    "if_exists": (
        lambda s: s.add(["new"], if_exists="replace"),
        "if_exists must be one of error, update, keep; got 'r",
    ),
    "batch_tokens": (lambda s: s.add(["new"], batch_tokens=0), "batch_tokens must be at least 1; got 0"),
    "update by a number": (lambda s: s.update("a", 5), r"documents\[0\] must be a text; got int"),
    "update by NaN": (lambda s: s.update("a", "new", metadata={"a": float("nan")}), "must be a JSON object"),
    "delete a number": (lambda s: s.delete(5), "ids must be texts; got 5"),
    "delete None": (lambda s: s.delete(["a", None]), "ids must be texts; got None"),
    "forget a number": (lambda s: s.forget([5]), "ids must be texts; got 5"),
    "get a list": (lambda s: s.get(["a"]), "ids and namespaces must be texts"),
    "undo nothing": (lambda s: s.undo(0), "steps must be at least 1; got 0"),
    "undo True": (lambda s: s.undo(True), "steps must be at least 1; got True"),
    "redo by a text": (lambda s: s.redo("1"), "steps must be at least 1; got '1'"),
    "empty query": (lambda s: s.search(" \n"), "query must be a text with at least one character"),
    "no query": (lambda s: s.search(None), "query must be a text"),
    "query with surrogate": (lambda s: s.search("\ud800"), "query must be encodable as UTF-8"),
    "k": (lambda s: s.search("x", 0), "k must be at least 1; got 0"),
    "k as text": (lambda s: s.search("x", "1"), "k must be at least 1; got '1'"),
    "mode": (lambda s: s.search("x", mode="best"), "mode must be one of .*; got 'best'"),
    "namespaces": (lambda s: s.bank(["default", 5]), "namespaces must be names, or .* got 5"),
    "no namespaces": (lambda s: s.list(None), "namespaces must be names, or .* got None"),
    "all among others": (lambda s: s.bank(["*", "default"]), r"namespaces must be names, or '\*' alone"),
    "where": (lambda s: s.list(where="kind"), "where must be values by names of metadata; got 'kind'"),
    "where by numbers": (lambda s: s.bank(where={1: 2, "a": 3}), "where must be values by names"),
    "limit": (lambda s: s.list(limit=-1), "limit must be at least 0; got -1"),
    "offset": (lambda s: s.list(offset=-1), "offset must be at least 0; got -1"),
}

STATES = {
    "another content": (
        lambda s: s.add(["new", "other"], ["n", "a"]),
        DocumentExistsError,
        "'a' exists in namespace",
    ),
    "other metadata": (
        lambda s: s.add(["A"], ["a"], metadata=[{"n": True}]),
        DocumentExistsError,
        "update it",
    ),
    "update unknown": (
        lambda s: s.update("z", "new"),
        UnknownDocumentError,
        "no document 'z' in namespace 'default'",
    ),
    "update elsewhere": (lambda s: s.update("a", "new", "work"), UnknownDocumentError, "namespace 'work'"),
    "delete unknown": (lambda s: s.delete(["a", "z"]), UnknownDocumentError, "no document 'z'"),
    "delete elsewhere": (lambda s: s.delete("a", "work"), UnknownDocumentError, "namespace 'work'"),
    "forget unknown": (
        lambda s: s.forget(["a", "z"]),
        UnknownDocumentError,
        "nothing is known of a document 'z'",
    ),
    "get unknown": (lambda s: s.get("z"), UnknownDocumentError, "no document 'z'"),
    "history unknown": (lambda s: s.history("z"), UnknownDocumentError, "nothing is known of a document 'z'"),
    "undo too much": (lambda s: s.undo(3), HistoryError, "3 changes cannot be undone: there are only 2"),
    "undo far too much": (lambda s: s.undo(1 << 70), HistoryError, "there are only 2"),
    "redo nothing": (lambda s: s.redo(), HistoryError, "1 changes cannot be redone: there are only 0"),
    "snapshot 0": (lambda s: s.snapshot(0), HistoryError, "version must be a number from 1 to 3; got 0"),
    "snapshot of the future": (lambda s: s.snapshot(4), HistoryError, "from 1 to 3; got 4"),
    "snapshot True": (lambda s: s.snapshot(True), HistoryError, "got True"),
    "snapshot by a text": (lambda s: s.snapshot("1"), HistoryError, "got '1'"),
}
REFUSED = {name: (act, ValueError, message) for name, (act, message) in BAD_ARGUMENTS.items()} | STATES


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_changes_nothing(name, store):
    act, error, message = REFUSED[name]
    store.add(["A", "B"], ["a", "b"], metadata=[{"n": 1}, {}])
    store.add(["C"], namespace="work")
    before, rows, log = contents(store.path), rows_of(store), store.log()
    with pytest.raises(error, match=message) as caught:
        act(store)
    if error is ValueError:
        assert not isinstance(caught.value, MSAError)
    assert (store.version, rows_of(store), store.log()) == (3, rows, log)
    assert contents(store.path) == before and store.verify() == []
    store.undo()


@pytest.mark.parametrize(
    ("fields", "message"),
    (
        ({"key_bits": 5}, "key_bits must be 1, 2, 3, 4 or None; got 5"),
        ({"value_bits": 0}, "value_bits must be"),
        ({"router_bits": True}, "router_bits must be"),
        ({"key_bits": 4.0}, "key_bits must be"),
        ({"budget_bytes": -1}, "budget_bytes must be"),
        ({"budget_bytes": "1"}, "budget_bytes must be"),
    ),
)
def test_creating_with_bad_settings_leaves_no_folder(fields, message, model, tiny_tokenizer, tmp_path):
    with pytest.raises(ValueError, match=message):
        MemoryStore.create(tmp_path / "store", model, tiny_tokenizer, **fields)
    assert not (tmp_path / "store").exists()


def test_where_a_store_can_be_made(store, model, tiny_tokenizer, tmp_path):
    for path in (store.path, store.path / "store.sqlite"):
        before = contents(store.path)
        with pytest.raises(StoreError, match="not an empty folder"):
            MemoryStore.create(path, model, tiny_tokenizer)
        assert contents(store.path) == before
    (tmp_path / "empty").mkdir()
    MemoryStore.create(tmp_path / "empty", model, tiny_tokenizer).close()
    MemoryStore.create(tmp_path / "deep" / "er", model, tiny_tokenizer).close()


@pytest.mark.parametrize(
    ("fields", "message"),
    (
        ({"seed": 1}, "backbone: .* != "),
        ({"chunk_size": 16}, "chunk_size: 8 != 16"),
        ({"router_chunk_size": 8}, "router_chunk_size: 4 != 8"),
        ({"router_layers": [1]}, "router_layers: "),
        ({"dtype": torch.bfloat16}, "dtype: float32 != bfloat16"),
        ({"prompt_format": "msa"}, "prompt_format: "),
        ({"kind": "qwen3"}, "backbone: "),
    ),
    ids=str,
)
def test_another_model_is_refused_by_what_differs(fields, message, store, tiny_tokenizer):
    store.close()
    before = contents(store.path)
    with pytest.raises(MemoryMismatchError, match=message):
        MemoryStore.open(store.path, tiny_model(**fields), tiny_tokenizer)
    assert contents(store.path) == before


def test_another_router_or_tokenizer_is_refused(store, model, tiny_tokenizer):
    store.close()
    other = tiny_model()
    with torch.no_grad():
        other.model.layers[1].self_attn.router_k_proj[0].weight.add_(1.0)
    with pytest.raises(MemoryMismatchError, match="router.*: .* != "):
        MemoryStore.open(store.path, other, tiny_tokenizer)
    more = deepcopy(tiny_tokenizer)
    more.add_tokens(["Seine"])
    with pytest.raises(MemoryMismatchError, match="tokenizer: .* != "):
        MemoryStore.open(store.path, model, more)
    with pytest.raises(ValueError, match="tokenizer must be given with the model"):
        MemoryStore.open(store.path, model)
    MemoryStore.open(store.path, model, tiny_tokenizer).close()


def change_value(path, name, value):
    with closing(sqlite3.connect(path / "store.sqlite")) as database, database:
        database.execute("UPDATE store SET value=? WHERE name=?", (value, name))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    (
        ("format_version", "2", "format_version must be 1 for this release; got 2.*export it"),
        ("format_version", '"1"', "format_version must be 1"),
        ("format_version", "[", "format_version"),
        ("provenance", "[]", "provenance of the store is damaged"),
        ("provenance", "{}", "provenance of the store is damaged"),
        ("coding", b"", "coders of the store are damaged"),
    ),
)
def test_a_store_that_this_release_cannot_read(name, value, message, store):
    store.close()
    change_value(store.path, name, value)
    for read_only in (True, False):
        with pytest.raises(MemoryFormatError, match=message):
            MemoryStore.open(store.path, read_only=read_only)


def test_what_is_no_store(store, model, tiny_tokenizer, tmp_path):
    (tmp_path / "plain").mkdir()
    model.encode_memory(["x"], tiny_tokenizer).save_pretrained(tmp_path / "bank")
    for place in ("missing", "plain", "bank"):
        before = contents(tmp_path)
        with pytest.raises(FileNotFoundError, match="no store in .*store.sqlite is missing"):
            MemoryStore.open(tmp_path / place)
        assert contents(tmp_path) == before
    for content, message in ((b"", "another program"), (b"not a database" * 100, "damaged or not ours")):
        (tmp_path / "plain" / "store.sqlite").write_bytes(content)
        with pytest.raises(MemoryFormatError, match=message):
            MemoryStore.open(tmp_path / "plain")
    (tmp_path / "plain" / "store.sqlite").unlink()
    with closing(sqlite3.connect(tmp_path / "plain" / "store.sqlite")) as database:
        database.execute("CREATE TABLE store (name, value)")
    with pytest.raises(MemoryFormatError, match="database of another program"):
        MemoryStore.open(tmp_path / "plain")


def test_a_closed_store_says_so(store, model, tiny_tokenizer):
    store.add(TEXTS[:3])
    bank = store.bank()
    store.close()
    store.close()
    acts = (
        store.list,
        store.bank,
        store.refresh,
        store.undo,
        store.stats,
        lambda: store.add(["x"]),
        lambda: list(bank.documents),
        lambda: bank.metadata["documents"][0],
        lambda: bank.lexical.scores("water"),
    )
    for act in acts:
        with pytest.raises(StoreError, match="was closed"):
            act()
    assert len(model.rank_documents([QUESTION], bank, 3, "router", tiny_tokenizer)[0]) == 2  # vectors stay


# What is accepted


def test_texts_of_all_kinds(store, model, tiny_tokenizer):
    texts = [
        "",
        "\0",
        "a\0b",
        " ",
        "\n",
        "\n\nbody",
        "\U0001f41d" * 20,
        "e\u0301 \u00e9 \u202e rtl \u05d0",
        "\ufeffbom",
        "x",
    ]
    texts += [
        "y" * 256,
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "a" * 8,
        "a" * 9,
        "'; DROP TABLE versions; --",
        '"*" OR NEAR(',
    ]
    ids = store.add(texts)
    assert ids == [default_id(text) for text in texts]
    for id, text in zip(ids, texts):
        assert store.get(id).text == text
    store.close()
    with MemoryStore.open(store.path, model, tiny_tokenizer) as again:
        assert [own.text for own in again.list()] == texts and again.verify() == []
        assert_fresh(again, model, tiny_tokenizer)
        assert again.search('"*" OR NEAR(', 99, mode="lexical")[0].text == texts[-1]


@pytest.mark.parametrize("texts", ([], [""], ["", ""], ["x"], ["", "x", " "]), ids=str)
def test_small_stores(texts, store, model, tiny_tokenizer):
    assert store.add([]) == [] and store.version == 1
    ids = store.add(texts)
    assert len(ids) == len(texts) and len(store) == len(set(texts))
    assert_fresh(store, model, tiny_tokenizer)
    for mode in ("router", "lexical", "fused", None):
        assert len(store.search("x", 1000, mode=mode)) <= len(store)
    tokens = tiny_tokenizer([QUESTION], return_tensors="pt")
    for retrieval in ("attention", "router"):
        options = {
            "retrieval": retrieval,
            "max_new_tokens": 3,
            "do_sample": False,
            "tokenizer": tiny_tokenizer,
        }
        ours = model.generate(**tokens, memory=store, **options)
        fresh = fresh_bank(model, tiny_tokenizer, list(dict.fromkeys(texts)))
        assert torch.equal(ours, model.generate(**tokens, memory=fresh, **options))
    store.delete(list(set(ids)))
    assert len(store.bank()) == 0 and store.search("x") == []
    assert_fresh(store, model, tiny_tokenizer)


def test_names_at_their_limits(store):
    names = [LONG, "\U0001f41d", "a b", "'", "..", "*", "%"]
    store.add([f"text {n}" for n in range(len(names))], names, LONG)
    assert [own.id for own in store.list(LONG)] == names and store.namespaces() == [LONG]
    for number, name in enumerate(names):
        assert store.get(name, LONG).text == f"text {number}"
    store.delete("*", LONG)
    assert len(store) == len(names) - 1


def test_metadata_comes_back_as_json_has_it(store):
    given = {
        "a": None,
        "b": [1, 2.5, True, "\u00fc\0\U0001f41d"],
        "c": {"d": {}},
        "": "",
        "big": 1 << 80,
        "t": (1, 2),
    }
    store.add(["x", "y"], ["x", "y"], metadata=[given, {}])
    assert store.get("x").metadata == json.loads(json.dumps(given)) and store.get("y").metadata == {}
    given["b"].append("later")
    assert "later" not in store.get("x").metadata["b"]
    store.get("x").metadata["b"].clear()
    assert store.get("x").metadata["b"]


def test_where_compares_as_json_does(store):
    values = [1, True, 1.0, "1", None, [1], {"a": 1}, 2]
    store.add([f"text {n}" for n in range(8)], list("abcdefgh"), metadata=[{"v": value} for value in values])
    store.add(["nothing"], ["z"])

    def found(where):
        assert store.count("default", where) == len(store.bank(where=where)) == len(store.list(where=where))
        hits = store.search("text", 99, mode="lexical", where=where)
        assert {hit.id for hit in hits} == {own.id for own in store.list(where=where)}
        return "".join(own.id for own in store.list(where=where))

    assert found({"v": 1}) == found({"v": 1.0}) == "ac"
    assert found({"v": True}) == "b" and found({"v": "1"}) == "d" and found({"v": None}) == "e"
    assert found({"v": [[1]]}) == "f" and found({"v": {"a": 1}}) == "g"
    assert found({"v": [2, True]}) == "bh" and found({"v": []}) == "" and found({"w": 1}) == ""


def test_equal_documents_are_stored_once(store, counted):
    first = store.add(["x", "y", "x"])
    assert first == [default_id(text) for text in ("x", "y", "x")] and len(store) == 2
    version, files = store.version, contents(store.path)
    assert store.add(["y", "x", "y"]) == [first[1], first[0], first[1]]
    assert store.add(["x"], [first[0]], if_exists="update") == first[:1]
    assert store.version == version and contents(store.path) == files and sorted(counted) == ["x", "y"]


@pytest.mark.parametrize("if_exists", ("update", "keep"))
def test_adding_what_exists(if_exists, store):
    store.add(["A", "B"], ["a", "b"], metadata=[{"n": 1}, {"n": 2}])
    version = store.version
    assert store.add(["A2", "C"], ["a", "c"], if_exists=if_exists) == ["a", "c"]
    assert store.version == version + 1
    expected = {"a": ("A2", {}), "b": ("B", {"n": 2}), "c": ("C", {})}
    if if_exists == "keep":
        expected["a"] = ("A", {"n": 1})
    assert {own.id: (own.text, own.metadata) for own in store.list()} == expected


def test_texts_that_were_encoded_are_not_encoded_again(store, model, tiny_tokenizer, counted):
    store.add(DOCUMENTS, [f"d{n}" for n in range(len(DOCUMENTS))])
    assert len(counted) == len(DOCUMENTS)
    store.update("d3", DOCUMENTS[3], metadata={"title": "new"})
    store.delete(["d0", "d5"])
    store.add([DOCUMENTS[0], DOCUMENTS[5]], ["d0", "d5"])
    store.update("d1", "Changed.")
    store.update("d1", DOCUMENTS[1])
    store.undo(2)
    store.redo()
    store.compact()
    store.update("d3", DOCUMENTS[3], metadata={})
    assert counted == [*DOCUMENTS, "Changed."] and store.verify() == []
    assert_fresh(store, model, tiny_tokenizer)


def test_numbered_documents_are_encoded_with_their_numbers(tmp_path, tiny_tokenizer):
    model = tiny_model(prompt_format="msa")
    with MemoryStore.create(tmp_path / "store", model, tiny_tokenizer) as store:
        store.add(DOCUMENTS[:4], list("abcd"))
        store.update("b", DOCUMENTS[1], metadata={"title": "new"})
        store.delete("a")
        store.add([DOCUMENTS[0]], ["a"])
        texts, bank = [own.text for own in store.list()], store.bank()
        assert texts == [DOCUMENTS[2], DOCUMENTS[3], DOCUMENTS[1], DOCUMENTS[0]]
        assert bank.numbers == [3, 4, 5, 6]
        fresh = fresh_bank(model, tiny_tokenizer, texts, numbers=bank.numbers)
        assert_same_bank(bank, fresh, model, tiny_tokenizer, generate=True)


def test_small_segments_are_joined(store, model, tiny_tokenizer):
    most, known = 0, {}
    for number in range(200):
        store.add([f"Document {number} about {'gold' if number % 3 else 'the Seine'}."])
        stats = store.stats()
        most = max(most, stats["segments"])
        assert len(list((store.path / "segments").iterdir())) == stats["segments"]
        known[number] = stats["vector_bytes"]
    assert most <= 7 * 3  # fewer than eight of a size, and 200 is less than eight to the third
    assert store.verify() == [] and store.stats()["documents"] == 200
    assert_fresh(store, model, tiny_tokenizer)
    snapshot = store.snapshot(101)
    assert len(snapshot) == 100
    texts = [own.text for own in snapshot.list()]
    assert_same_bank(snapshot.bank(), fresh_bank(model, tiny_tokenizer, texts), model, tiny_tokenizer)


def test_history_and_log(store):
    store.add(["one"], ["a"], metadata=[{"n": 1}])
    store.add(["else"], ["b"])
    store.update("a", "two")
    store.delete(["a", "b"])
    store.undo()
    store.update("a", "two", metadata={})
    store.undo(3)  # of the updates and of "b": the deletion was undone before
    events = store.history("a")
    assert all(isinstance(event, Event) and event.to_dict()["version"] == event.version for event in events)
    assert [(e.version, e.kind, e.action, e.text, e.metadata) for e in events] == [
        (2, "add", "added", "one", {"n": 1}),
        (4, "update", "updated", "two", {"n": 1}),
        (5, "delete", "deleted", None, None),
        (6, "undo", "added", "two", {"n": 1}),
        (7, "update", "updated", "two", {}),
        (8, "undo", "updated", "one", {"n": 1}),
    ]
    assert [e.action for e in store.snapshot(5).history("a")] == ["added", "updated", "deleted"]
    log = store.log()
    assert [(own.version, own.kind, own.added, own.removed) for own in reversed(log)] == [
        (1, "create", 0, 0),
        (2, "add", 1, 0),
        (3, "add", 1, 0),
        (4, "update", 1, 1),
        (5, "delete", 0, 2),
        (6, "undo", 2, 0),
        (7, "update", 1, 1),
        (8, "undo", 1, 2),
    ]
    assert all(early.time <= late.time for late, early in zip(log, log[1:]))
    assert store.log(2) == log[:2] and store.log(0) == [] and store.log(99) == log


def test_undo_and_redo_as_in_an_editor(store):
    for text in "abcd":
        store.add([text], [text])
    store.undo(2)
    store.undo()
    assert [own.id for own in store.list()] == ["a"]
    store.redo(2)
    assert [own.id for own in store.list()] == ["a", "b", "c"]
    with pytest.raises(HistoryError, match="2 changes cannot be redone: there are only 1"):
        store.redo(2)
    store.add(["e"], ["e"])
    with pytest.raises(HistoryError):  # a new change is the end of what was undone
        store.redo()
    store.undo(4)
    assert len(store) == 0 and store.redo(4) == store.version and len(store) == 4


def test_pages_of_a_list(store):
    ids = store.add([f"text {n}" for n in range(10)])
    assert [own.id for own in store.list(limit=3, offset=4)] == ids[4:7]
    assert store.list(limit=0) == [] and store.list(offset=10) == [] and len(store.list(limit=99)) == 10


def test_without_the_model(store):
    store.add(TEXTS)
    rows, lexical = rows_of(store), store.search("gold in Paris", 50, mode="lexical")
    store.close()
    with MemoryStore.open(store.path) as again:
        assert rows_of(again) == rows and again.verify() == []
        hits = again.search("gold in Paris", 50)
        assert hits == again.search("gold in Paris", 50, mode="lexical")
        assert [(hit.id, hit.score, hit.lexical) for hit in hits] == [
            (h.id, h.score, h.lexical) for h in lexical
        ]
        assert all(hit.router_rank is None and hit.router_score is None for hit in hits)
        for mode in ("router", "fused"):
            with pytest.raises(StoreModelError, match="needs the model"):
                again.search("gold", mode=mode)
        version = again.version
        with pytest.raises(StoreModelError, match="opened without its model"):
            again.add(["a new text"])
        assert again.version == version and again.add(TEXTS) == [row[0] for row in rows]
        again.delete(rows[0][0])
        again.add([TEXTS[0]])  # its vectors are still there
        again.undo(2)
        assert [row[:4] for row in rows_of(again)] == [row[:4] for row in rows]


def test_a_store_is_given_to_generate_as_it_is(store, model, tiny_tokenizer):
    store.add(TEXTS)
    tokens = tiny_tokenizer([QUESTION], return_tensors="pt")
    fresh = fresh_bank(model, tiny_tokenizer, TEXTS)
    options = {
        "retrieval": "attention",
        "max_new_tokens": 4,
        "do_sample": False,
        "return_dict_in_generate": True,
    }
    ours, wanted = (model.generate(**tokens, memory=own, **options) for own in (store, fresh))
    assert torch.equal(ours.sequences, wanted.sequences) and ours.rounds == wanted.rounds
    assert model.rank_documents([QUESTION], store, 5) == model.rank_documents([QUESTION], fresh, 5)


@pytest.mark.parametrize("bits", ((4, 3, 2), (None, 4, None)), ids=str)
def test_a_bank_of_a_store_is_a_bank(bits, model, tiny_tokenizer, tmp_path):
    names = dict(zip(("key_bits", "value_bits", "router_bits"), bits))
    with MemoryStore.create(tmp_path / "store", model, tiny_tokenizer, **names) as store:
        store.add(TEXTS[:4])
        store.add(TEXTS[4:])
        store.delete(default_id(TEXTS[5]))
        texts = [own.text for own in store.list()]
        bank, fresh = store.bank(), fresh_bank(model, tiny_tokenizer, texts, bits)
        ours, wanted = bank.stats(), fresh.stats()
        assert [ours[f"{name}_bits"] for name in ("keys", "values", "router_keys")] == list(bits)
        for name in ours.keys() - {"vector_bytes", "router_key_bytes", "vector_bytes_per_token"}:
            assert ours[name] == wanted[name], name  # the means are the store's, not the bank's
        bank.save_pretrained(tmp_path / "bank")
        again = MemoryBank.from_pretrained(tmp_path / "bank", model=model, tokenizer=tiny_tokenizer)
        assert_same_bank(again, fresh, model, tiny_tokenizer)
        assert again.metadata["documents"] == list(bank.metadata["documents"])
        with pytest.raises(ValueError, match="values must be dense to be packed.* bits"):
            bank.pack(None, 2, None)
        if bits[0] is None:
            packed, expected = bank.pack(2, None, 1), fresh.pack(2, None, 1)
            assert_same_bank(packed, expected, model, tiny_tokenizer)
        last = len(texts) - 1
        for notes in (bank.documents, bank.metadata["documents"]):
            assert notes[-1] == notes[last] == notes[-1:][0] and len(notes) == len(texts)
            for index in (len(texts), -len(texts) - 1, 1 << 40):
                with pytest.raises(IndexError):
                    notes[index]


def test_stats_count_what_is_there(store, model, tiny_tokenizer):
    store.add(TEXTS)
    store.add(TEXTS[:2], namespace="work")
    store.update(default_id(TEXTS[0]), "Changed.")
    stats, bank = store.stats(), store.bank("*")
    assert stats["documents"] == len(TEXTS) + 2 and stats["namespaces"] == {"default": len(TEXTS), "work": 2}
    assert stats["versions"] == len(TEXTS) + 3 and stats["tokens"] == bank.num_tokens
    files = [path.stat().st_size for path in (store.path / "segments").iterdir()]
    assert (stats["segments"], stats["vector_bytes"]) == (len(files), sum(files))
    assert stats["documents_in_full"] == len(TEXTS) + 2 and stats["documents_as_text"] == 0


def test_threads_read_while_one_writes(store, model, tiny_tokenizer):
    """Every bank that a thread gets is the state of one commit, with the vectors of exactly its texts."""
    store.add(TEXTS)
    single = {}
    for text in [*TEXTS, *(f"Written {n}: gold of Paris." for n in range(30))]:
        bank = fresh_bank(model, tiny_tokenizer, [text])
        single[text] = bank.layers[1].router_keys.slice(0, len(bank.layers[1].router_keys))
    done = threading.Event()

    def read():
        seen = 0
        while True:
            last = done.is_set()
            bank = store.bank()
            texts, keys = list(bank.documents), bank.layers[1].router_keys
            assert texts[: len(TEXTS)] == TEXTS
            assert texts[len(TEXTS) :] == [
                f"Written {n}: gold of Paris." for n in range(len(texts) - len(TEXTS))
            ]
            assert torch.equal(keys.slice(0, len(keys)), torch.cat([single[text] for text in texts]))
            for mode in ("lexical", "router"):
                hits = store.search("gold of Paris", 99, mode=mode)
                assert {hit.text for hit in hits} <= single.keys()
            assert [own.text for own in store.list()][: len(texts)] == texts
            seen += 1
            if last:
                return seen, len(texts)

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read) for _ in range(3)]
        try:
            for number in range(30):
                store.add([f"Written {number}: gold of Paris."])
                if number % 10 == 9:
                    store.compact()
        finally:
            done.set()
        assert all(reader.result()[1] == len(TEXTS) + 30 for reader in readers)
    assert store.verify() == []


def test_a_closed_store_does_not_look_damaged(model, tiny_tokenizer, tmp_path):
    store = MemoryStore.create(tmp_path / "store", model, tiny_tokenizer)
    store.add(iter(["a", "b"]), ids=iter("xy"), metadata=iter([{}, {"n": 1}]))
    assert [own.id for own in store.list()] == ["x", "y"]
    store.close()
    with pytest.raises(StoreError, match="was closed"):
        store.verify()
