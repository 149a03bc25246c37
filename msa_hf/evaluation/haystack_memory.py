"""A memory that grows as texts are encoded, and parts of it with one document replaced and no other encoded.

A document's vectors depend on nothing but the document, so what comes out is, on a CPU to the last bit, the
bank that encodes everything at once. Axis letters: C rows, N documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from msa_hf.modeling.memory_bank import DenseVectors, LayerMemory, MemoryBank, chunk_counts, first_rows
from msa_hf.modeling.memory_files import NAMES
from msa_hf.modeling.packed_vectors import PackedRows

Storage = DenseVectors | PackedRows


class HaystackMemory:
    """Documents of known lengths, encoded from the first one on and coded at once.

    Args:
        documents: N texts. token_counts: tokens of each as it will be encoded.
        bits: of keys, values and router keys, see `MemoryBank.pack`; None leaves them as they are.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        documents: Sequence[str],
        token_counts: Sequence[int],
        bits: int | None,
    ):
        self.model, self.tokenizer, self.bits = model, tokenizer, bits
        self.documents = list(documents)
        self.token_counts = torch.tensor(list(token_counts), dtype=torch.int64)
        self.encoded = 0
        self._bank: MemoryBank | None = None

    def encode_next(self, tokens: int, before: int) -> int:
        """Encodes documents of about `tokens` tokens, none from number `before` on; their tokens together."""
        start = stop = self.encoded
        size = 0
        while stop < before and (stop == start or size + int(self.token_counts[stop]) <= tokens):
            size += int(self.token_counts[stop])
            stop += 1
        dense = self.model.encode_memory(
            self.documents[start:stop], self.tokenizer, numbers=list(range(start, stop))
        )
        if self._bank is None:
            self._bank = self._allocated(dense)
        firsts = _first_rows(self._bank)
        for layer, memory in self._bank.layers.items():
            for name in NAMES:
                new = getattr(dense.layers[layer], name)
                first = int(firsts[name][start])
                rows = torch.arange(first, first + len(new), device=new.device)
                getattr(memory, name).write(rows, new.slice(0, len(new)))
        self.encoded = stop
        return size

    def with_document(self, count: int, place: int, text: str) -> MemoryBank:
        """The bank of the first `count` documents, encoded before, with number `place` replaced by `text`."""
        if not 0 <= place < count <= self.encoded:
            raise ValueError(
                f"place and count must be 0 <= place < count <= {self.encoded}; got {place}, {count}"
            )
        other = self.model.encode_memory([text], self.tokenizer, numbers=[place], means=self._bank.means)
        other = self._coded(other)
        firsts = _first_rows(self._bank)
        layers = {}
        for layer, memory in self._bank.layers.items():
            parts = {}
            for name in NAMES:
                start, stop, end = (int(firsts[name][i]) for i in (place, place + 1, count))
                parts[name] = _spliced(
                    getattr(memory, name), getattr(other.layers[layer], name), start, stop, end
                )
            layers[layer] = LayerMemory(**parts)
        counts = self.token_counts[:count].clone()
        counts[place] = other.token_counts[0]
        documents = [*self.documents[:place], text, *self.documents[place + 1 : count]]
        return replace(self._bank, documents=documents, token_counts=counts, layers=layers)

    def _coded(self, bank: MemoryBank) -> MemoryBank:
        return bank if self.bits is None else bank.pack(self.bits, self.bits, self.bits)

    def _allocated(self, dense: MemoryBank) -> MemoryBank:
        """Room for the rows of all documents, coded as `dense` would be."""
        bank = replace(self._coded(dense), documents=self.documents, token_counts=self.token_counts)
        bank.numbers = None  # the places of the documents
        firsts = _first_rows(bank)
        layers = {}
        for layer, memory in bank.layers.items():
            parts = {}
            for name in NAMES:
                like, rows = getattr(memory, name), int(firsts[name][-1])
                if isinstance(like, PackedRows):
                    parts[name] = PackedRows.allocate(rows, like.coder, like.dtype, like.device)
                else:
                    parts[name] = DenseVectors.allocate(rows, like.width, like.dtype, like.device)
            layers[layer] = LayerMemory(**parts)
        return replace(bank, layers=layers)


def _first_rows(bank: MemoryBank) -> dict[str, torch.Tensor]:
    """[N + 1] where the rows of each document begin, by name of the vectors."""
    chunks, routers = (
        first_rows(chunk_counts(bank.token_counts, size))
        for size in (bank.settings.chunk_size, bank.settings.router_chunk_size)
    )
    return {name: routers if name == "router_keys" else chunks for name in NAMES}


def _spliced(own: Storage, new: Storage, start: int, stop: int, end: int) -> Storage:
    """Rows 0 to `end` of `own`, those from `start` to `stop` replaced by all of `new`; bytes as they are."""

    def joined(left: torch.Tensor, middle: torch.Tensor) -> torch.Tensor:
        return torch.cat([left[:start], middle, left[stop:end]])

    if isinstance(own, DenseVectors):
        return DenseVectors(joined(own.data, new.data))
    codes = joined(own.packed.codes, new.packed.codes)
    return PackedRows(own.coder, codes, joined(own.packed.scales, new.packed.scales), own.dtype)
