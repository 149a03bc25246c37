"""Exports, imports, banks taken in, and re-encoding by another model."""

import json
import shutil

import pytest
import torch
from tiny_models import DOCUMENTS, QUESTIONS, tiny_model

from msa_hf.modeling.errors import MemoryFormatError, MemoryMismatchError
from msa_hf.store import DocumentExistsError, MemoryStore, StoreError, StoreModelError

METADATA = [{"title": f"t{number}", "tags": ["a", "ü"]} for number in range(len(DOCUMENTS))]
IDS = [f"id {number}" for number in range(len(DOCUMENTS))]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def store(model, tiny_tokenizer, tmp_path):
    with MemoryStore.create(tmp_path / "store", model, tiny_tokenizer, model_path="the model") as store:
        store.add(DOCUMENTS[:4], IDS[:4], metadata=METADATA[:4])
        store.add(DOCUMENTS[4:], IDS[4:], "other", METADATA[4:])
        yield store


@pytest.fixture
def no_encoding(monkeypatch, model):
    """Any attempt to encode is an error."""

    def refuse(*_, **__):
        raise AssertionError("encode_memory was called")

    monkeypatch.setattr(type(model), "encode_memory", refuse)


def assert_same(first, second, namespaces="*"):
    documents = [
        (own.id, own.namespace, own.text, own.metadata, own.tokens) for own in first.list(namespaces)
    ]
    assert documents == [
        (own.id, own.namespace, own.text, own.metadata, own.tokens) for own in second.list(namespaces)
    ]
    assert_same_vectors(first.bank(namespaces), second.bank(namespaces))


def assert_same_vectors(first, second):
    assert list(first.documents) == list(second.documents)
    for layer, memory in first.layers.items():
        for name in ("keys", "values", "router_keys"):
            mine, theirs = getattr(memory, name), getattr(second.layers[layer], name)
            assert len(mine) == len(theirs)
            assert torch.equal(mine.slice(0, len(mine)), theirs.slice(0, len(theirs)))


def test_an_export_makes_the_same_store_without_model_or_encoding(store, tmp_path, no_encoding):
    assert store.export_to(tmp_path / "export") == len(DOCUMENTS)
    with MemoryStore.from_export(tmp_path / "copy", tmp_path / "export") as copy:
        assert_same(store, copy)
        assert copy.model_path == "the model" and copy.verify() == []
        assert copy.provenance == store.provenance
    store.export_to(tmp_path / "export")  # an export is replaced
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == [
        "coding.safetensors",
        "documents.jsonl",
        "export.json",
        "vectors-00000.safetensors",
    ]


def test_import_into_a_store_of_the_same_model_moves_bytes(
    store, model, tiny_tokenizer, tmp_path, monkeypatch
):
    store.export_to(tmp_path / "export", "other")
    with MemoryStore.create(tmp_path / "new", model, tiny_tokenizer) as new:
        new.add(["here before"], ["x"])
        with monkeypatch.context() as patched:
            patched.setattr(type(model), "encode_memory", None)
            assert new.import_from(tmp_path / "export", "mine") == IDS[4:]
            version = new.version
            assert new.import_from(tmp_path / "export", "mine") == IDS[4:]
        assert new.version == version, "importing again changes nothing"
        assert [own.text for own in new.list("mine")] == DOCUMENTS[4:]
        assert_same_vectors(new.bank("mine"), store.bank("other"))
        new.undo()
        assert new.namespaces() == ["default"]


def test_import_by_another_model_encodes(store, tiny_tokenizer, tmp_path):
    store.export_to(tmp_path / "export")
    other = tiny_model(seed=3)
    with MemoryStore.create(tmp_path / "new", other, tiny_tokenizer) as new:
        new.import_from(tmp_path / "export")
        assert_same_vectors(new.bank("*"), other.encode_memory(DOCUMENTS, tiny_tokenizer).pack())
    with MemoryStore.open(tmp_path / "new") as plain:
        with pytest.raises(StoreModelError):
            plain.import_from(tmp_path / "export", "elsewhere")
        assert plain.namespaces() == ["default", "other"]


def test_documents_without_full_vectors_are_encoded_on_import(store, model, tiny_tokenizer, tmp_path):
    store.set_budget(1)
    store.export_to(tmp_path / "export")
    with MemoryStore.create(tmp_path / "new", model, tiny_tokenizer) as new:
        new.import_from(tmp_path / "export")
        assert_same_vectors(new.bank("*"), model.encode_memory(DOCUMENTS, tiny_tokenizer).pack())


def test_a_snapshot_is_exported_as_it_was(store, tmp_path):
    version = store.version
    store.delete(IDS[0])
    store.update(IDS[1], "changed")
    store.snapshot(version).export_to(tmp_path / "export")
    with MemoryStore.from_export(tmp_path / "old", tmp_path / "export") as old:
        assert [own.text for own in old.list("*")] == DOCUMENTS
    assert [own.text for own in store.list("*")] != DOCUMENTS


def test_empty_stores_are_exported_too(model, tiny_tokenizer, tmp_path):
    with MemoryStore.create(tmp_path / "store", model, tiny_tokenizer) as store:
        assert store.export_to(tmp_path / "export") == 0
    with MemoryStore.from_export(tmp_path / "copy", tmp_path / "export", model, tiny_tokenizer) as copy:
        assert len(copy) == 0 and copy.add(["x"])


def test_conflicts_change_nothing(store, model, tiny_tokenizer, tmp_path):
    store.export_to(tmp_path / "export")
    with MemoryStore.create(tmp_path / "new", model, tiny_tokenizer) as new:
        new.add(["something else"], [IDS[0]])
        version = new.version
        with pytest.raises(DocumentExistsError, match=IDS[0]):
            new.import_from(tmp_path / "export")
        assert new.version == version and len(new) == 1
        new.import_from(tmp_path / "export", if_exists="keep")
        assert new.get(IDS[0]).text == "something else" and len(new) == len(DOCUMENTS)


@pytest.mark.parametrize(
    "name", ["documents.jsonl", "coding.safetensors", "vectors-00000.safetensors", "export.json"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_a_damaged_export_is_refused_whole(store, model, tiny_tokenizer, tmp_path, name, damage):
    store.export_to(tmp_path / "export")
    path = tmp_path / "export" / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    with MemoryStore.create(tmp_path / "new", model, tiny_tokenizer) as new:
        with pytest.raises((MemoryFormatError, FileNotFoundError)):
            new.import_from(tmp_path / "export")
        assert len(new) == 0 and new.version == 1


def test_an_export_cannot_name_files_elsewhere(store, tmp_path):
    store.export_to(tmp_path / "export")
    path = tmp_path / "export" / "export.json"
    index = json.loads(path.read_text())
    shutil.copy(tmp_path / "export" / "documents.jsonl", tmp_path / "documents.jsonl")
    index["files"]["../documents.jsonl"] = index["files"]["documents.jsonl"]
    path.write_text(json.dumps(index))
    with pytest.raises(MemoryFormatError, match="plain file names"):
        MemoryStore.from_export(tmp_path / "new", tmp_path / "export")


def test_places_that_hold_something_else_are_refused(store, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(StoreError, match="is no export"):
        store.export_to(tmp_path / "mine")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    with pytest.raises(FileNotFoundError, match=r"export\.json is missing"):
        store.import_from(tmp_path / "mine")


def test_a_bank_is_taken_in_without_encoding(store, model, tiny_tokenizer, no_encoding, monkeypatch):
    monkeypatch.undo()
    bank = model.encode_memory(DOCUMENTS, tiny_tokenizer)
    monkeypatch.setattr(type(model), "encode_memory", None)
    store.add_bank(bank, namespace="bank")
    assert [own.text for own in store.list("bank")] == DOCUMENTS
    assert_same_vectors(store.bank("bank"), bank.pack())


def test_banks_that_do_not_fit(store, model, tiny_tokenizer):
    bank = model.encode_memory(["a"], tiny_tokenizer)
    with pytest.raises(ValueError, match="must be dense"):
        store.add_bank(bank.pack())
    with pytest.raises(MemoryMismatchError, match="backbone"):
        store.add_bank(tiny_model(seed=5).encode_memory(["a"], tiny_tokenizer))
    assert store.count() == len(DOCUMENTS)


def test_reencoding_makes_the_store_another_models(store, tiny_tokenizer):
    store.update(IDS[0], "changed")
    other = tiny_model(seed=7)
    path = store.path
    store.reencode(other, tiny_tokenizer, model_path="another")
    store.undo()
    assert [own.text for own in store.list("*")] == DOCUMENTS, "history was encoded, too"
    fresh = other.encode_memory(DOCUMENTS, tiny_tokenizer).pack()
    assert_same_vectors(store.bank("*"), fresh)
    question = [QUESTIONS[0]]
    assert other.rank_documents(question, store.bank("*"), tokenizer=tiny_tokenizer) == other.rank_documents(
        question, fresh, tokenizer=tiny_tokenizer
    )
    assert store.verify() == [] and store.model_path == "another"
    store.close()
    with MemoryStore.open(path, other, tiny_tokenizer) as again:
        assert_same_vectors(again.bank("*"), fresh)
    with pytest.raises(MemoryMismatchError, match="fingerprint|backbone"):
        MemoryStore.open(path, tiny_model(), tiny_tokenizer)


def test_reencoding_that_fails_changes_nothing(store, tiny_tokenizer, monkeypatch):
    before = store.bank("*")
    other = tiny_model(seed=7)
    files = sorted(path.name for path in (store.path / "segments").iterdir())

    def fail(*_, **__):
        raise RuntimeError("no power")

    monkeypatch.setattr(other, "encode_memory", fail)
    with pytest.raises(RuntimeError, match="no power"):
        store.reencode(other, tiny_tokenizer)
    assert sorted(path.name for path in (store.path / "segments").iterdir()) == files
    assert_same_vectors(store.bank("*"), before)
    assert store.add(["still of the first model"]) and store.verify() == []


def test_a_reader_of_a_reencoded_store_must_open_it_again(store, tiny_tokenizer):
    with MemoryStore.open(store.path, read_only=True) as reader:
        kept = reader.bank("*")
        before = kept.layers[1].keys.slice(0, 3)
        store.reencode(tiny_model(seed=7), tiny_tokenizer)
        assert torch.equal(kept.layers[1].keys.slice(0, 3), before)
        reader.refresh()
        store.add(["more"])
        reader.refresh()
        with pytest.raises(MemoryMismatchError, match="open it again"):
            reader.bank("*")
