"""The relevance budget: who gives way first, what is still found, and that nothing is lost."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tiny_models import QUESTIONS, tiny_model

from msa_hf.store import MemoryStore, StoreModelError, UnknownDocumentError, budget, records
from msa_hf.store.coding import FULL, LOW, TEXT

TEXTS = [f"Document {number} tells of {'cats' if number % 2 else 'dogs'} " * 6 for number in range(24)]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def store(model, tiny_tokenizer, tmp_path):
    with MemoryStore.create(tmp_path / "store", model, tiny_tokenizer) as store:
        yield store


def tiers(store) -> dict[str, int]:
    with store.reads() as connection:
        versions = records.all_versions(connection)
        return dict(zip([own.document for own in versions], budget.tiers_of(connection, versions).tolist()))


def size(store) -> int:
    with store.reads() as connection:
        versions = records.all_versions(connection)
        held = budget.tiers_of(connection, versions)
    sizes = budget.bytes_by_tier(store.coding, np.array([own.tokens for own in versions]))
    return int(sizes[held, np.arange(len(held))].sum())


def test_bytes_are_those_of_the_storages(store):
    store.add(TEXTS)
    assert size(store) == sum(memory.nbytes for memory in store.bank().layers.values())


def test_within_the_budget_nothing_changes(store):
    store.add(TEXTS)
    before = store.bank()
    store.set_budget(size(store))
    assert set(tiers(store).values()) == {FULL}
    assert all(
        torch.equal(getattr(own, name).slice(0, 9), getattr(before.layers[layer], name).slice(0, 9))
        for layer, own in store.bank().layers.items()
        for name in ("keys", "values", "router_keys")
    )


def test_the_least_used_give_way_first_and_nothing_is_deleted(store):
    ids = store.add(TEXTS, [f"d{number}" for number in range(24)])
    for number in (3, 4, 5):
        store.record_use(f"d{number}")
    texts, full = [own.text for own in store.list()], size(store)
    store.set_budget(int(full * 0.8))
    held = tiers(store)
    assert size(store) <= full * 0.8
    assert {held[f"d{number}"] for number in (3, 4, 5)} == {FULL}
    assert LOW in held.values() and TEXT not in held.values()
    store.set_budget(int(full * 0.6))
    held = tiers(store)
    assert size(store) <= full * 0.6
    assert TEXT in held.values()
    assert {held[f"d{number}"] for number in (3, 4, 5)} <= {LOW, FULL}
    assert [own.text for own in store.list()] == texts and store.verify() == []
    assert [own.id for own in store.list()] == ids
    found = store.stats()
    counted = [list(held.values()).count(tier) for tier in (FULL, LOW, TEXT)]
    names = ("documents_in_full", "documents_in_fewer_bits", "documents_as_text")
    assert [found[name] for name in names] == counted


def test_an_impossible_budget_drops_all_keys_and_values_and_no_document(store):
    store.add(TEXTS)
    store.set_budget(1)
    assert set(tiers(store).values()) == {TEXT}
    assert len(store.search("cats and dogs", k=24)) == 24


def test_dropped_vectors_are_encoded_again_when_they_are_chosen(store, model, tiny_tokenizer):
    store.add(TEXTS)
    question = tiny_tokenizer(QUESTIONS[0], return_tensors="pt")
    options = {
        "retrieval": "attention",
        "max_new_tokens": 6,
        "do_sample": False,
        "return_dict_in_generate": True,
    }
    store.set_budget(1)
    bank = store.bank()
    tokens = model.generate(**question, memory=bank, **options).sequences
    # The oracle: router keys as they are now, keys and values of a bank in full.
    full = store.coding.pack(model.encode_memory(TEXTS, tiny_tokenizer))
    for layer, memory in full.layers.items():
        memory.router_keys = bank.layers[layer].router_keys
    assert torch.equal(tokens, model.generate(**question, memory=full, **options).sequences)
    rows = torch.tensor([7, 0, 31, 7, 2])
    for layer, memory in full.layers.items():
        assert torch.equal(bank.layers[layer].keys.take(rows), memory.keys.take(rows))


def test_without_the_model_dropped_vectors_are_an_error_that_says_so(store):
    store.add(TEXTS)
    store.set_budget(1)
    store.close()
    with MemoryStore.open(store.path) as plain:
        assert len(plain.search("cats", k=3)) == 3
        with pytest.raises(StoreModelError, match="with its model"):
            plain.bank().layers[1].keys.take(torch.tensor([0]))


def test_a_used_document_gets_its_precision_back(store, model, tiny_tokenizer):
    store.add(TEXTS, [f"d{number}" for number in range(24)])
    full = size(store)
    store.set_budget(int(full * 0.6))
    assert tiers(store)["d0"] == TEXT
    store.record_use("d0")
    held = tiers(store)
    assert held["d0"] == FULL and size(store) <= full * 0.6
    own, fresh = store.bank(), model.encode_memory(TEXTS[:1], tiny_tokenizer).pack()
    for layer, memory in fresh.layers.items():
        assert torch.equal(
            own.layers[layer].keys.slice(0, len(memory.keys)), memory.keys.slice(0, len(memory.keys))
        )
    assert store.verify() == []


def test_what_only_history_needs_goes_first(store):
    store.add(TEXTS, [f"d{number}" for number in range(24)])
    store.delete([f"d{number}" for number in range(12, 24)])
    store.set_budget(int(size(store) * 0.95))
    held = tiers(store)
    assert {held[f"d{number}"] for number in range(12)} == {FULL}
    assert {held[f"d{number}"] for number in range(12, 24)} <= {FULL, TEXT} and TEXT in held.values()
    store.undo()
    assert len(store) == 24


def test_adding_to_a_full_store_keeps_to_the_budget(store):
    store.add(TEXTS[:12])
    limit = size(store)
    store.set_budget(limit)
    for text in TEXTS[12:]:
        store.add([text])
    assert size(store) <= limit and len(store) == 24 and store.verify() == []


def test_errors(store):
    store.add(TEXTS[:2], ["a", "b"])
    with pytest.raises(ValueError, match="budget_bytes must be a whole number of at least 1.*0"):
        store.set_budget(0)
    with pytest.raises(UnknownDocumentError, match="'x'"):
        store.record_use(["a", "x"])
    with store.reads() as connection:
        assert connection.execute("SELECT count(*) FROM uses").fetchone() == (0,)


@given(
    st.integers(1, 12).flatmap(
        lambda count: st.tuples(
            arrays(np.int64, count, elements=st.integers(0, 400)),
            arrays(np.int64, count, elements=st.integers(0, 2)),
            arrays(np.float64, count, elements=st.floats(0, 100)),
            st.integers(1, 20000),
        )
    )
)
def test_plan(case):
    tokens, held, worth, limit = case
    sizes = np.stack([tokens * 9, tokens * 5, tokens * 4])
    wanted = budget.planned_tiers(sizes, held, worth, limit)
    place = np.arange(len(tokens))
    total = sizes[wanted, place].sum()
    assert (wanted >= held).all()
    if sizes[held, place].sum() <= limit:
        assert (wanted == held).all()
    else:
        assert total <= limit or (wanted[tokens > 0] == TEXT).all()
    for tier in (LOW, TEXT):
        given_way = (wanted == tier) & (held < tier) & (tokens > 0)
        stayed = (wanted < tier) & (tokens > 0)
        if given_way.any() and stayed.any():
            assert worth[given_way].max() <= worth[stayed].min()
