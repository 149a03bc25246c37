"""A store under random histories, against a dict of states and against banks that are encoded afresh."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from store_cases import TEXTS, DictStore, assert_same_bank, default_id, fresh_bank, rows_of
from tiny_models import tiny_model

from msa_hf.store import (
    DocumentExistsError,
    HistoryError,
    MemoryStore,
    StoreModelError,
    UnknownDocumentError,
)

NAMESPACES = ("default", "work", "caf\u00e9")
IDS = ("a", "b", "c", "\u00fc", "x y")
METADATA = (
    {},
    {"kind": "note", "title": "T"},
    {"kind": "fact", "n": 1},
    {"kind": "fact", "n": True, "deep": [1.5]},
)
WHERE = (None, {"kind": "fact"}, {"kind": "note", "title": "T"}, {"missing": 1}, {"n": 1}, {"n": [True, 2]})
SPACES = ("*", "default", "work", ["work", "caf\u00e9"], [], "nobody")

texts, spaces, ids = st.sampled_from(TEXTS), st.sampled_from(NAMESPACES), st.sampled_from(IDS)
metadata = st.sampled_from(METADATA)


class StoreMachine(RuleBasedStateMachine):
    """Every operation on a store and on a DictStore."""

    model = tokenizer = None
    bits = (4, 4, 4)
    numbered = False
    operations = 0

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "store"
        names = ("key_bits", "value_bits", "router_bits")
        self.store = MemoryStore.create(self.path, self.model, self.tokenizer, **dict(zip(names, self.bits)))
        self.dicts = DictStore()
        self.numbers: dict[int, str] = {}

    def teardown(self):
        self.check_vectors("*", None)
        assert self.store.verify() == []
        self.store.close()
        self.folder.cleanup()

    def counted(self):
        type(self).operations += 1

    # Operations

    @rule(
        space=spaces,
        drafts=st.lists(st.tuples(ids | st.none(), texts, metadata), max_size=4),
        if_exists=st.sampled_from(("error", "update", "keep")),
        noted=st.booleans(),
    )
    def add(self, space, drafts, if_exists, noted):
        self.counted()
        drafts = [(id or default_id(text), text, own if noted else {}) for id, text, own in drafts]
        wanted = {id: (text, own) for id, text, own in drafts}
        unique = all(wanted[id] == (text, own) for id, text, own in drafts)
        arguments = {"ids": [id for id, *_ in drafts], "namespace": space, "if_exists": if_exists}
        if noted:
            arguments["metadata"] = [own for *_, own in drafts]
        texts = [text for _, text, _ in drafts]
        if not unique:
            with pytest.raises(ValueError, match="ids must differ"):
                self.store.add(texts, **arguments)
        elif self.dicts.add(space, wanted, if_exists):
            assert self.store.add(texts, **arguments) == [id for id, *_ in drafts]
        else:
            with pytest.raises(DocumentExistsError):
                self.store.add(texts, **arguments)

    @rule(space=spaces, texts=st.lists(texts, max_size=3), twice=st.booleans())
    def add_without_ids(self, space, texts, twice):
        self.counted()
        texts = texts * 2 if twice else texts
        accepted = self.dicts.add(space, {default_id(text): (text, {}) for text in texts}, "error")
        if accepted:
            assert self.store.add(texts, namespace=space) == [default_id(text) for text in texts]
        else:
            with pytest.raises(DocumentExistsError):
                self.store.add(texts, namespace=space)

    @rule(data=st.data(), text=texts, own=metadata | st.none())
    def update(self, data, text, own):
        self.counted()
        space, id = data.draw(st.sampled_from([*sorted(self.dicts.now), ("default", "a")]))
        if (space, id) not in self.dicts.now:
            with pytest.raises(UnknownDocumentError):
                self.store.update(id, text, space, own)
            return
        self.store.update(id, text, space, own)
        own = self.dicts.now[space, id].metadata if own is None else own
        self.dicts.add(space, {id: (text, own)}, "update")

    @rule(data=st.data(), space=spaces, stranger=st.booleans())
    def delete(self, data, space, stranger):
        self.counted()
        known = sorted(id for own, id in self.dicts.now if own == space)
        chosen = data.draw(st.lists(st.sampled_from(known), max_size=3)) if known else []
        if stranger:
            with pytest.raises(UnknownDocumentError):
                self.store.delete([*chosen, "stranger"], space)
            return
        self.store.delete(chosen, space)
        if chosen:
            self.dicts.delete([(space, id) for id in chosen])

    @rule(steps=st.sampled_from((1, 1, 1, 2, 3)))
    def undo(self, steps):
        self.counted()
        if steps > len(self.dicts.undoable):
            with pytest.raises(HistoryError):
                self.store.undo(steps)
            return
        version = self.store.undo(steps)
        self.dicts.undo(steps)
        assert version == self.dicts.version

    @rule(steps=st.sampled_from((1, 1, 1, 2, 3)))
    def redo(self, steps):
        self.counted()
        if steps > len(self.dicts.redoable):
            with pytest.raises(HistoryError):
                self.store.redo(steps)
            return
        version = self.store.redo(steps)
        self.dicts.redo(steps)
        assert version == self.dicts.version

    @precondition(lambda self: self.dicts.version > 8)
    @rule(data=st.data(), rarely=st.sampled_from((True, False, False, False)))
    def forget(self, data, rarely):
        if not rarely or not self.dicts.known():
            return
        self.counted()
        space, id = data.draw(st.sampled_from(sorted(self.dicts.known())))
        self.store.forget(id, space)
        self.dicts.forget([(space, id)])
        assert self.store.was_forgotten(id, space)
        with pytest.raises(UnknownDocumentError):
            self.store.history(id, space)

    @precondition(lambda self: self.dicts.version > 8)
    @rule(chance=st.sampled_from(("keep", "drop", "nothing", "nothing", "nothing")))
    def compact(self, chance):
        if chance == "nothing":
            return
        self.counted()
        self.store.compact(history=chance == "keep")
        if chance == "drop":
            self.dicts.drop_history()
        assert self.store.stats()["segments"] <= 1

    @rule(with_model=st.sampled_from((True, True, True, False)))
    def reopen(self, with_model):
        self.counted()
        self.store.close()
        if not with_model:
            with MemoryStore.open(self.path) as store:
                assert store.version == self.dicts.version
                assert rows_of(store) == self.dicts.rows(self.dicts.version)
                with pytest.raises(StoreModelError):
                    store.add(["a text that no version has"])
        self.store = MemoryStore.open(self.path, self.model, self.tokenizer)

    # Reading

    @rule(data=st.data(), space=st.sampled_from(SPACES), where=st.sampled_from(WHERE))
    def read_an_earlier_state(self, data, space, where):
        self.counted()
        version = data.draw(st.integers(self.dicts.oldest, self.dicts.version))
        snapshot = self.store.snapshot(version)
        wanted = self.dicts.rows(version, named(space), where)
        assert rows_of(snapshot, space, where) == wanted
        assert list(snapshot.bank(space, where).documents) == [row[2] for row in wanted]
        assert snapshot.count(space, where) == len(wanted)
        for impossible in (self.dicts.oldest - 1, self.dicts.version + 1):
            with pytest.raises(HistoryError):
                self.store.snapshot(impossible)
        if data.draw(st.booleans()):
            self.check_vectors(space, where, version)

    @rule(space=st.sampled_from(SPACES), where=st.sampled_from(WHERE), generate=st.booleans())
    def read_all_bits(self, space, where, generate):
        self.counted()
        self.check_vectors(space, where, generate=generate)

    @rule(space=st.sampled_from(SPACES), mode=st.sampled_from(("router", "lexical", "fused", None)))
    def search(self, space, mode):
        self.counted()
        wanted = {(row[1], row[0]): row[2] for row in self.dicts.rows(self.dicts.version, named(space))}
        hits = self.store.search("gold in Paris by the Seine", 50, mode=mode, namespaces=space)
        assert {(hit.namespace, hit.id): hit.text for hit in hits}.items() <= wanted.items()
        assert len(hits) == len({(hit.namespace, hit.id) for hit in hits})
        if mode == "router":
            found = [text for text in wanted.values() if text or self.numbered]  # one without tokens is not
            assert len(hits) == len(found)

    @rule()
    def verify(self):
        self.counted()
        assert self.store.verify() == []

    @invariant()
    def all_lists_are_those_of_the_dict(self):
        now = self.dicts.version
        assert self.store.version == now
        assert rows_of(self.store) == self.dicts.rows(now)
        for space in NAMESPACES:
            assert rows_of(self.store, space) == self.dicts.rows(now, [space])
        assert self.store.namespaces() == sorted({space for space, _ in self.dicts.now})
        assert len(self.store) == len(self.dicts.now)
        files = {path.name for path in (self.path / "segments").iterdir()}
        assert len(files) == self.store.stats()["segments"]

    def check_vectors(self, space, where, version=None, generate=False):
        version = version or self.dicts.version
        reader = self.store.snapshot(version)
        wanted = self.dicts.rows(version, named(space), where)
        bank = reader.bank(space, where)
        if self.numbered:
            self.check_numbers(bank)
        fresh = fresh_bank(self.model, self.tokenizer, [row[2] for row in wanted], self.bits, bank.numbers)
        assert_same_bank(bank, fresh, self.model, self.tokenizer, generate=generate and bool(wanted))
        notes = [(note["id"], note["namespace"]) for note in bank.metadata["documents"]]
        assert notes == [row[:2] for row in wanted]

    def check_numbers(self, bank):
        """What the model calls documents by: no number ever stands for two texts."""
        assert bank.numbers == sorted(set(bank.numbers)) and len(bank.numbers) == len(bank)
        for number, text in zip(bank.numbers, bank.documents):
            assert self.numbers.setdefault(number, text) == text


def named(space):
    return None if space == "*" else [space] if isinstance(space, str) else space


def run(model, tokenizer, examples, steps, **fields):
    machine = type(
        "Machine", (StoreMachine,), {"model": model, "tokenizer": tokenizer, "operations": 0, **fields}
    )
    own = settings(
        max_examples=examples,
        stateful_step_count=steps,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # shrinking a history takes minutes
    )
    run_state_machine_as_test(machine, settings=own)
    return machine.operations


def test_a_thousand_operations(tiny_tokenizer):
    assert run(tiny_model(), tiny_tokenizer, 40, 60) >= 1500


@pytest.mark.parametrize(
    ("fields", "bits"),
    (
        ({}, (None, None, None)),
        ({}, (3, 2, 1)),
        ({}, (None, 4, 1)),
        ({"dtype": torch.bfloat16}, (4, 4, 4)),
        ({"dtype": torch.bfloat16}, (None, None, None)),
        ({"head_dim": 12}, (4, 4, 4)),
        ({"kind": "qwen3", "head_dim": 24, "query_reduction": "maxsim"}, (4, 3, 2)),
        ({"prompt_format": "msa"}, (4, 4, 4)),
    ),
    ids=str,
)
def test_other_vectors_and_models(fields, bits, tiny_tokenizer):
    numbered = fields.get("prompt_format") == "msa"
    assert run(tiny_model(**fields), tiny_tokenizer, 8, 50, bits=bits, numbered=numbered) >= 200
