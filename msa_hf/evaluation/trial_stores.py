"""What trials of stores share: a tiny model, random operations, and dictionaries that know what must be.

The trials stop a store in the middle of its work, let its disk fail and damage its files: `store_crashes`,
`store_faults`, `store_damage`, `store_hostility`. None of them needs a real model.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from msa_hf import MSAConfig, MSAForCausalLM
from msa_hf.modeling.memory_files import NAMES
from msa_hf.store import MemoryStore

NAMESPACES = ("default", "work")
SHAPE = {
    "vocab_size": 259,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

Name = tuple[str, str]  # namespace and id of a document


def tiny_model(seed: int = 0) -> MSAForCausalLM:
    """A random model that encodes a document in milliseconds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE))
        config = MSAConfig.from_backbone(
            backbone.config, router_layers=[1], chunk_size=8, router_chunk_size=4, routers_trained=True
        )
        model = MSAForCausalLM(config)
    model.load_state_dict(backbone.state_dict(), strict=False)
    return model.eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, after <pad>, <s> and </s>."""
    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@dataclass(frozen=True)
class Operation:
    """One call of a method of a store, which makes at most one commit."""

    method: str
    arguments: dict[str, Any]

    def run(self, store: MemoryStore) -> None:
        getattr(store, self.method)(**self.arguments)


@dataclass
class Expected:
    """What a store must hold after some operations, kept in dictionaries.

    Attributes:
        documents: number of the version, text and metadata of every visible document.
        versions: how many there have ever been. commit: number of the last one.
        states: `documents` after every commit that can be read. parents: where undo leads from each.
        state, tip: the change that is current, and the last one that redo leads to.
        known: all texts that are kept of a document. erased: texts of which no byte may be left.
    """

    documents: dict[Name, tuple[int, str, dict]] = field(default_factory=dict)
    versions: int = 0
    commit: int = 1
    states: dict[int, dict[Name, tuple[int, str, dict]]] = field(default_factory=lambda: {1: {}})
    parents: dict[int, int | None] = field(default_factory=lambda: {1: None})
    state: int = 1
    tip: int = 1
    known: dict[Name, set[str]] = field(default_factory=dict)
    erased: set[str] = field(default_factory=set)

    def after(self, operation: Operation) -> Expected:
        """What must be after one more operation."""
        then = copy.deepcopy(self)
        getattr(then, f"_{operation.method}")(**operation.arguments)
        return then

    def rows(self, version: int | None = None) -> list[tuple[str, str, str, dict]]:
        """(namespace, id, text, metadata) in the order of the store, now or after an earlier commit."""
        documents = self.documents if version is None else self.states[version]
        ordered = sorted(documents.items(), key=lambda item: item[1][0])
        return [(*name, text, metadata) for name, (_, text, metadata) in ordered]

    def undoable(self) -> int:
        """How many changes can be undone."""
        count, state = 0, self.parents[self.state]
        while state is not None:
            count, state = count + 1, self.parents[state]
        return count

    def redoable(self) -> int:
        """How many undos can be taken back."""
        return len(self._undone())

    def _add(self, documents: Sequence[str], ids: Sequence[str], namespace: str, metadata, if_exists: str):
        for text, id, own in zip(documents, ids, metadata):
            self._put((namespace, id), text, own)
        self._change()

    def _update(self, id: str, text: str, namespace: str) -> None:
        self._put((namespace, id), text, self.documents[namespace, id][2])
        self._change()

    def _delete(self, ids: Sequence[str], namespace: str) -> None:
        for id in ids:
            del self.documents[namespace, id]
        self._change()

    def _undo(self, steps: int) -> None:
        for _ in range(steps):
            self.state = self.parents[self.state]
        self._return()

    def _redo(self, steps: int) -> None:
        self.state = self._undone()[-steps]
        self._return()

    def _forget(self, ids: Sequence[str], namespace: str) -> None:
        for id in ids:
            self.erased |= self.known.pop((namespace, id))
            for documents in [self.documents, *self.states.values()]:
                documents.pop((namespace, id), None)
        self._change(root=True)

    def _compact(self, history: bool) -> None:
        if not history:
            kept = {name: {text} for name, (_, text, _) in self.documents.items()}
            self.erased |= set().union(*self.known.values()) - set().union(*kept.values())
            self.known = kept
            self._change(root=True)
            self.states = {self.commit: self.states[self.commit]}

    def _scrub(self) -> None:
        pass

    def _put(self, name: Name, text: str, metadata: dict) -> None:
        self.versions += 1
        self.documents[name] = (self.versions, text, metadata)
        self.known.setdefault(name, set()).add(text)

    def _change(self, root: bool = False) -> None:
        self.commit += 1
        self.states[self.commit] = dict(self.documents)
        self.parents[self.commit] = None if root else self.state
        self.state = self.tip = self.commit

    def _return(self) -> None:
        self.documents = dict(self.states[self.state])
        self.commit += 1
        self.states[self.commit] = dict(self.documents)

    def _undone(self) -> list[int]:
        found, state = [], self.tip
        while state != self.state:
            found.append(state)
            state = self.parents[state]
        return found


class Author:
    """Makes random operations that suit a state; every text has a word that no other has."""

    def __init__(self, random_numbers: random.Random):
        self.random = random_numbers
        self._words = 0

    def text(self) -> str:
        self._words += 1
        word = f"zq{self.random.getrandbits(48):012x}n{self._words}"
        return f"{word} on {self.random.choice('river stone cloud tree'.split())} {word}."

    def operation(self, expected: Expected) -> Operation:
        """One more operation; mostly additions while there is little."""
        method = self.random.choice(self._possible(expected))
        return Operation(method, getattr(self, f"_{method}")(expected))

    def operations(self, expected: Expected, count: int) -> list[Operation]:
        made = []
        for _ in range(count):
            made.append(self.operation(expected))
            expected = expected.after(made[-1])
        return made

    def _possible(self, expected: Expected) -> list[str]:
        possible = ["add"] * (6 if len(expected.documents) < 12 else 1) + ["compact"]
        if len(expected.documents) > 2:
            possible += ["add", "update", "update", "delete", "delete"]
        if len(expected.known) > 2:
            possible += ["forget", "forget"]
        if expected.undoable():
            possible += ["undo", "undo"]
        if expected.redoable():
            possible += ["redo"]
        return possible

    def additions(self, ids: Sequence[str], namespace: str = "default") -> dict:
        """Arguments of an `add` of new texts."""
        metadata = [{"n": self.random.randint(0, 9)} if self.random.random() < 0.5 else {} for _ in ids]
        texts = [self.text() for _ in ids]
        named = {"documents": texts, "ids": list(ids), "metadata": metadata, "namespace": namespace}
        return {**named, "if_exists": "update"}

    def _add(self, expected: Expected) -> dict:
        ids = [f"d{self.random.randint(0, 99)}" for _ in range(self.random.randint(1, 4))]
        return self.additions(list(dict.fromkeys(ids)), self.random.choice(NAMESPACES))

    def _update(self, expected: Expected) -> dict:
        namespace, id = self.random.choice(sorted(expected.documents))
        return {"id": id, "text": self.text(), "namespace": namespace}

    def _delete(self, expected: Expected) -> dict:
        return self._some(sorted(expected.documents))

    def _forget(self, expected: Expected) -> dict:
        return self._some(sorted(expected.known))

    def _undo(self, expected: Expected) -> dict:
        return {"steps": self.random.randint(1, min(3, expected.undoable()))}

    def _redo(self, expected: Expected) -> dict:
        return {"steps": self.random.randint(1, expected.redoable())}

    def _compact(self, expected: Expected) -> dict:
        return {"history": self.random.random() < 0.7}

    def _some(self, names: list[Name]) -> dict:
        namespace, _ = self.random.choice(names)
        ids = [id for own, id in names if own == namespace]
        return {
            "ids": self.random.sample(ids, min(len(ids), self.random.randint(1, 2))),
            "namespace": namespace,
        }


class Inspector:
    """Compares stores with what they must hold."""

    def __init__(self, model: MSAForCausalLM, tokenizer: PreTrainedTokenizerFast):
        self.model, self.tokenizer = model, tokenizer
        self._vectors: dict[str, dict[str, torch.Tensor]] = {}

    def inspect(
        self, folder: Path, possible: Sequence[Expected], reader_first: bool = False
    ) -> tuple[list[str], Expected]:
        """What is wrong with a store that was left in the middle of its work, and which of the states it has.

        A file that belongs to no commit may be there until the store is opened for writing.
        """
        if reader_first:
            with MemoryStore.open(folder, read_only=True) as store:
                if not any(self.is_state(store, state) for state in possible):
                    return ["a reader finds a state that never was"], possible[0]
                problems = [problem for problem in store.verify() if "belongs to no commit" not in problem]
                if problems:
                    return problems, possible[0]
        with MemoryStore.open(folder, self.model, self.tokenizer) as store:
            found = next((state for state in possible if self.is_state(store, state)), None)
            if found is None:
                return ["a writer finds a state that never was"], possible[0]
            problems = store.verify() + self.differences(store, found) + self.traces(folder, found)
        return problems + self.traces(folder, found), found

    def is_state(self, store: MemoryStore, expected: Expected) -> bool:
        """Whether the store reads as expected: commit, documents and their order."""
        rows = [(own.namespace, own.id, own.text, own.metadata) for own in store.list(namespaces="*")]
        return store.version == expected.commit and rows == expected.rows()

    def differences(self, store: MemoryStore, expected: Expected) -> list[str]:
        """Everything else that must be so: vectors, every earlier state, nothing left of what was erased."""
        problems = []
        bank = store.bank(namespaces="*")
        texts = [row[2] for row in expected.rows()]
        for name in NAMES:
            stored = getattr(bank.layers[1], name)
            wanted = [self.vectors(text)[name] for text in texts]
            found = stored.slice(0, len(stored))
            if not torch.equal(found, torch.cat(wanted) if wanted else found[:0]):
                problems.append(f"the {name} of the bank are not those of its texts")
        for version in expected.states:
            rows = [
                (own.namespace, own.id, own.text, own.metadata)
                for own in store.snapshot(version).list(namespaces="*")
            ]
            if rows != expected.rows(version):
                problems.append(f"the state of commit {version} is not what it was")
        return problems

    def traces(self, folder: Path, expected: Expected) -> list[str]:
        """Erased texts of which a word or vectors are still in a file of the store."""
        files = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        problems = []
        for text in sorted(expected.erased):
            for path, content in files.items():
                if text.split()[0].encode() in content.lower():
                    problems.append(f"{path.name} holds {text.split()[0]}, which was erased")
                if self.vectors(text)["codes"] in content:
                    problems.append(f"{path.name} holds vectors of {text.split()[0]}, which was erased")
        return problems

    def vectors(self, text: str) -> dict[str, Any]:
        """Keys, values and router keys of a text in 4 bits each, and the bytes of its keys."""
        if text not in self._vectors:
            bank = self.model.encode_memory([text], self.tokenizer).pack(4, 4, 4)
            layer = bank.layers[1]
            own = {name: getattr(layer, name).slice(0, len(getattr(layer, name))) for name in NAMES}
            own["codes"] = layer.keys.packed.codes.numpy().tobytes()
            self._vectors[text] = own
        return self._vectors[text]
