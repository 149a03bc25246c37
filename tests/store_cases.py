"""For tests of MemoryStore: a store as plain dicts, banks encoded afresh, and a search for bytes."""

import json
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import torch
from tiny_models import DOCUMENTS, MEMORY

from msa_hf.modeling.memory_files import NAMES
from msa_hf.modeling.packed_vectors import PackedRows
from msa_hf.modeling.retrieval_msa import MODES
from msa_hf.store import MemoryStore

LONGEST = 120  # seconds
QUESTION = "Which city lies on the Seine, and what spoils?"
# One chunk and many, titles that other texts mention, scripts, accents, an empty text, and equal words.
TEXTS = [
    *DOCUMENTS,
    "Seine\nThe Seine is a river. Le Havre lies where it ends.",
    "Le Havre\nA harbour in Normandy. Honey and gold are shipped from Le Havre, honey most of all.",
    "Gold\nGold is dense; a cube of 37 cm weighs a tonne. Paris buys gold.",
    "Z\u00fcrich liegt an der Limmat. \u304a\u306f\u3088\u3046 \U0001f41d\U0001f36f",
    "nul\x00 and tab\t and return\r\n end",
    "The city of the city by the sea " * 3,
    " ",
]


def default_id(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:24]


def as_json(value: object) -> str:
    """Equal for equal JSON: to Python, 1 is True."""
    return json.dumps(value, sort_keys=True)


@dataclass(frozen=True)
class Content:
    """What a document is: `order` is the creation of this content, which a bank is sorted by."""

    order: int
    text: str
    metadata: dict

    def same(self, text: str, metadata: dict) -> bool:
        return self.text == text and as_json(self.metadata) == as_json(metadata)

    def suits(self, where: dict) -> bool:
        """Whether it has all of these values, or one of a list of them."""
        return all(
            name in self.metadata
            and as_json(self.metadata[name]) in map(as_json, value if isinstance(value, list) else [value])
            for name, value in where.items()
        )


@dataclass
class DictStore:
    """What a store must look like: every state there was, as {(namespace, id): Content}."""

    states: dict[int, dict[tuple[str, str], Content]] = field(default_factory=lambda: {1: {}})
    births: dict[int, dict[int, int]] = field(default_factory=lambda: {1: {}})
    undoable: list[dict] = field(default_factory=list)
    redoable: list[dict] = field(default_factory=list)
    forgotten: set[tuple[str, str]] = field(default_factory=set)
    version: int = 1
    oldest: int = 1
    created: int = 0

    @property
    def now(self) -> dict[tuple[str, str], Content]:
        return self.states[self.version]

    def content(self, text: str, metadata: dict) -> Content:
        self.created += 1
        return Content(self.created, text, metadata)

    def change(self, state: dict) -> None:
        self.undoable.append(self.now)
        self.redoable.clear()
        self._commit(state)

    def add(self, namespace: str, drafts: dict[str, tuple[str, dict]], if_exists: str) -> bool:
        """Whether the store must take it; False is DocumentExistsError, which changes nothing."""
        state, changed = dict(self.now), {}
        for id, (text, metadata) in drafts.items():
            known = state.get((namespace, id))
            if known is not None and (if_exists == "keep" or known.same(text, metadata)):
                continue
            if known is not None and if_exists == "error":
                return False
            changed[namespace, id] = (text, metadata)
        if changed:
            self.change(state | {key: self.content(*own) for key, own in changed.items()})
        return True

    def delete(self, keys: Sequence[tuple[str, str]]) -> None:
        self.change({key: own for key, own in self.now.items() if key not in keys})

    def undo(self, steps: int) -> None:
        for _ in range(steps):
            self.redoable.append(self.now if not _ else self._target)
            self._target = self.undoable.pop()
        self._commit(self._target)

    def redo(self, steps: int) -> None:
        for _ in range(steps):
            self.undoable.append(self.now if not _ else self._target)
            self._target = self.redoable.pop()
        self._commit(self._target)

    def forget(self, keys: Sequence[tuple[str, str]]) -> None:
        self.undoable.clear()
        self.redoable.clear()
        self._commit({key: own for key, own in self.now.items() if key not in keys})
        for version, state in self.states.items():
            self.states[version] = {key: own for key, own in state.items() if key not in keys}
        self.forgotten |= set(keys)

    def drop_history(self) -> None:
        self.undoable.clear()
        self.redoable.clear()
        self._commit(self.now)
        self.oldest = self.version

    def known(self) -> set[tuple[str, str]]:
        """Documents of any state that can still be read."""
        return {key for version in range(self.oldest, self.version + 1) for key in self.states[version]}

    def rows(self, version: int, namespaces: Sequence[str] | None = None, where: dict | None = None):
        """(id, namespace, text, metadata, commit since which it is so) in the order of a bank."""
        chosen = [
            (own.order, id, namespace, own)
            for (namespace, id), own in self.states[version].items()
            if (namespaces is None or namespace in namespaces) and own.suits(where or {})
        ]
        births = self.births[version]
        return [
            (id, space, own.text, as_json(own.metadata), births[order])
            for order, id, space, own in sorted(chosen, key=lambda row: row[0])
        ]

    def _commit(self, state: dict) -> None:
        before = self.births[self.version]
        self.version += 1
        self.states[self.version] = state
        orders = [own.order for own in state.values()]
        self.births[self.version] = {order: before.get(order, self.version) for order in orders}


def rows_of(reader, namespaces="*", where=None) -> list[tuple]:
    """What `DictStore.rows` gives, as a store tells it."""
    return [
        (own.id, own.namespace, own.text, as_json(own.metadata), own.version)
        for own in reader.list(namespaces, where)
    ]


def fresh_bank(model, tokenizer, texts, bits=(4, 4, 4), numbers=None):
    """The memory that never was in a store."""
    return model.encode_memory(list(texts), tokenizer, numbers=numbers).pack(*bits)


def assert_same_bank(bank, fresh, model, tokenizer, questions=(QUESTION,), generate=False) -> None:
    """Every bit that a model can read of two banks."""
    assert list(bank.documents) == list(fresh.documents)
    assert torch.equal(bank.token_counts, fresh.token_counts)
    assert bank.settings == fresh.settings and bank.fingerprint == fresh.fingerprint
    assert bank.layers.keys() == fresh.layers.keys() and bank.head.keys() == fresh.head.keys()
    for layer, memory in fresh.layers.items():
        for name in NAMES:
            ours, wanted = getattr(bank.layers[layer], name), getattr(memory, name)
            assert len(ours) == len(wanted) and ours.dtype == wanted.dtype
            vectors = ours.slice(0, len(ours))
            assert torch.equal(vectors, wanted.slice(0, len(wanted))), (layer, name)
            assert not vectors.requires_grad
    for layer, pair in fresh.head.items():
        assert all(torch.equal(mine, own) for mine, own in zip(bank.head[layer], pair))
    questions = list(questions)
    if len(fresh):
        scores, expected = (model.route_questions(questions, own, tokenizer) for own in (bank, fresh))
        assert all(torch.equal(scores[layer], expected[layer]) for layer in expected)
    for mode in MODES:
        for k in (1, len(fresh) + 3):
            ours = model.rank_documents(questions, bank, k, mode, tokenizer)
            assert ours == model.rank_documents(questions, fresh, k, mode, tokenizer), mode
    assert bank.lexical.scores(questions[0]) == fresh.lexical.scores(questions[0])
    if generate:
        assert_same_tokens(bank, fresh, model, tokenizer, questions)


def assert_same_tokens(bank, fresh, model, tokenizer, questions=(QUESTION,)) -> None:
    batch = tokenizer(list(questions), return_tensors="pt", padding=True)
    for retrieval in ("attention", "router"):
        options = {"retrieval": retrieval, "max_new_tokens": 4, "do_sample": False, "tokenizer": tokenizer}
        ours, wanted = (model.generate(**batch, memory=own, **options) for own in (bank, fresh))
        assert torch.equal(ours, wanted), retrieval


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, for comparing; shared memory of SQLite's readers changes with every reader."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith("-shm")
    }


def files_with(folder: Path, needle: bytes) -> list[str]:
    """Files of a folder, of whatever kind, that hold these bytes."""
    return [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and needle in path.read_bytes()
    ]


def vector_bytes(store: MemoryStore, id: str, namespace: str = "default") -> dict[str, bytes]:
    """A document's stored vectors of every kind: codes of packed ones, numbers of dense ones."""
    bank = store.bank(namespace)
    place = [own.id for own in store.list(namespace)].index(id)
    found = {}
    for layer in MEMORY["router_layers"]:
        for name in NAMES:
            counts = bank.router_chunk_counts if name == "router_keys" else bank.chunk_counts
            first = int(counts[:place].sum())
            stored = getattr(bank.layers[layer], name).joined()
            data = stored.packed.codes if isinstance(stored, PackedRows) else stored.data
            own = data[first : first + int(counts[place])].contiguous()
            found[f"{layer}.{name}"] = own.view(torch.uint8).numpy().tobytes()
    return found


def in_process(target, *arguments):
    """(process, pipe) of a forked process that runs `target(pipe, *arguments)`."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def received(pipe):
    """What the other process sends; the limit only ends a test that hangs."""
    assert pipe.poll(LONGEST), "the other process does not answer"
    return pipe.recv()
