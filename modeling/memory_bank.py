"""MemoryBank: documents with their chunk-pooled keys, values and router keys, per router layer.

Axis letters: B batch, T tokens, H query heads, G key/value heads, D head dim, W = G * D, C chunks, R router
chunks, N documents, P memory vectors in the prefix.
"""

from dataclasses import dataclass, field, replace

import torch
from torch.nn import functional as F

from .configuration_msa import MemorySettings
from .errors import MemoryMismatchError
from .lexical import LexicalIndex
from .memory_files import NAMES, read_memory, write_memory
from .ops import document_scores, memory_prefix
from .packed_vectors import PackedRows, RowCoder, RowPacking, gather_rows

DENSE_TILE_ELEMENTS = 1 << 25  # numbers that one product of routing reads: 64 MB in bfloat16


class DenseVectors:
    """Rows of vectors, [rows, width], in one tensor. The interface of every vector storage of a bank."""

    def __init__(self, data: torch.Tensor):
        self.data = data

    @classmethod
    def allocate(
        cls, rows: int, width: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> "DenseVectors":
        return cls(torch.empty(rows, width, dtype=dtype, device=device))

    def __len__(self) -> int:
        return self.data.shape[0]

    @property
    def width(self) -> int:
        return self.data.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize

    @property
    def kind(self) -> tuple:
        """Equal for storages whose stored bytes mean the same."""
        return ("dense", self.width, self.dtype)

    @property
    def tile_rows(self) -> int:
        """Rows up to which a slice is worth its memory. It depends on the width alone, so that where a bank
        lies changes no bit of a score."""
        return max(1, DENSE_TILE_ELEMENTS // self.width)

    def slice(self, start: int, stop: int) -> torch.Tensor:
        """[stop - start, width]: consecutive rows."""
        return self.data[start:stop]

    def rotate(self, queries: torch.Tensor) -> torch.Tensor:
        """Queries [..., D] in the basis of `rotated_slice`."""
        return queries

    def rotated_slice(self, start: int, stop: int) -> torch.Tensor:
        """[stop - start, width]: rows whose products with rotated queries are those of `slice` with these."""
        return self.slice(start, stop)

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """[len(rows), width]: chosen rows, as attention reads them."""
        return self.data.index_select(0, rows)

    def write(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        self.data.index_copy_(0, rows, values.to(self.data.device, self.data.dtype))

    def gathered(self, pieces: "list[tuple[DenseVectors, torch.Tensor, torch.Tensor]]") -> "DenseVectors":
        """New rows out of storages of the same kind: for each storage, which rows [n] (bool) are its, and the
        places [n] in it."""
        return DenseVectors(
            gather_rows([(own.data, chosen, places) for own, chosen, places in pieces], self.data)
        )

    def to(self, device: torch.device | str) -> "DenseVectors":
        return DenseVectors(self.data.to(device))

    def settings(self) -> None:
        """Dense vectors need none, see `PackedRows.settings`."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file holds, by the ending of its name."""
        return {"": self.data}


@dataclass
class LayerMemory:
    """One router layer's vectors: keys and values [C, W], router keys [R, W] (L2-normalised per head unless
    "dot"). Each of them is dense or packed."""

    keys: DenseVectors | PackedRows
    values: DenseVectors | PackedRows
    router_keys: DenseVectors | PackedRows

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes + self.router_keys.nbytes


@dataclass
class MemoryBank:
    """The memory of one model.

    Args:
        documents: N texts, as they were given to `encode_memory`.
        token_counts: [N] int64, tokens of each encoded document.
        settings: what the vectors depend on besides the weights.
        layers: vectors per router layer.
        head: K and V [G, tokens, D] of the template head per layer (every layer); empty dict without one.
        fingerprint: of the model that made the bank, see `MSAForCausalLM.fingerprint`.
        metadata: JSON-serialisable notes of the maker.
        means: [G, D] float32 by (layer, "keys" or "values"), typical of the model, which packing takes away;
            see `memory_encoding.typical_means`. Empty for a bank of an older release.
        numbers: by which the prompt format "msa" calls the documents; by default 0, 1, 2 ...
    """

    documents: list[str]
    token_counts: torch.Tensor
    settings: MemorySettings
    layers: dict[int, LayerMemory]
    head: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    fingerprint: dict | None = None
    metadata: dict = field(default_factory=dict)
    tokenizer: object = field(default=None, repr=False, compare=False)
    means: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict, repr=False)
    numbers: list[int] | None = None

    def __post_init__(self):
        if len(self.documents) != len(self.token_counts):
            raise ValueError(
                f"token_counts must have one entry per document; got {len(self.token_counts)} for "
                f"{len(self.documents)}"
            )
        self.chunk_counts = chunk_counts(self.token_counts, self.settings.chunk_size)
        self.router_chunk_counts = chunk_counts(self.token_counts, self.settings.router_chunk_size)
        self._first_chunk = first_rows(self.chunk_counts)
        self._lexical: LexicalIndex | None = None

    def __len__(self) -> int:
        return len(self.documents)

    def __getstate__(self) -> dict:
        """For copies and pickles: all but the lexical index, a database, which is built again when needed."""
        return self.__dict__ | {"_lexical": None}

    @property
    def router_layers(self) -> tuple[int, ...]:
        return self.settings.router_layers

    @property
    def num_tokens(self) -> int:
        return int(self.token_counts.sum())

    @property
    def head_length(self) -> int:
        return next(iter(self.head.values()))[0].shape[1] if self.head else 0

    @property
    def lexical(self) -> LexicalIndex:
        """BM25 over the documents' texts; built on first use."""
        if self._lexical is None:
            self._lexical = LexicalIndex(self.documents)
        return self._lexical

    @lexical.setter
    def lexical(self, index: LexicalIndex) -> None:
        """Another index of the same texts, with the methods of `LexicalIndex` that read."""
        self._lexical = index

    def route(
        self, layer: int, queries: torch.Tensor, question_mask: torch.Tensor, **reductions
    ) -> torch.Tensor:
        """Scores [B, N] float32 of all documents in one router layer.

        Args:
            queries: [B, H, T, D] router queries. question_mask: [B, T] bool, at least one token per row.
            reductions: `head_reduction`, `query_reduction`, `chunk_reduction`, see `ops.document_scores`.
        """
        keys = self.layers[layer].router_keys
        return document_scores(queries, question_mask, keys, self.router_chunk_counts, **reductions)

    def gather(
        self, layer: int, documents: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pooled K and V [B, G, P, D] of each sample's documents in bank order, and which of the P are real
        [B, P]."""
        memory, settings = self.layers[layer], self.settings
        ids = [chosen.sort().values.to(self.chunk_counts.device) for chosen in documents]
        totals = torch.stack([self.chunk_counts[chosen].sum() for chosen in ids])
        device = memory.keys.device
        mask = torch.arange(int(totals.max())) < totals[:, None]
        rows = torch.full(mask.shape, -1, dtype=torch.int64)
        rows = rows.masked_scatter(mask, segment_rows(self._first_chunk, torch.cat(ids))).to(device)
        keys, values = memory_prefix(memory.keys, memory.values, rows, settings.num_key_value_heads)
        return keys, values, mask.to(device)

    def pack(
        self, key_bits: int | None = 4, value_bits: int | None = 4, router_bits: int | None = 4
    ) -> "MemoryBank":
        """A new bank with its vectors as TurboQuant codes of 1 to 4 bits per number; None leaves them as they
        are.

        Documents, settings and whatever is not packed are shared with this bank. Routing and reading decode
        what they need: a tile of router keys at a time, and the keys and values of the chosen documents. A
        document gets the same bytes in every bank and store of its model.

        Raises:
            ValueError: for other bits, or vectors that are already packed or hold NaN or infinity.
        """
        bits = {"keys": key_bits, "values": value_bits, "router_keys": router_bits}
        packing = {name: packing_of(name, own) for name, own in bits.items() if own is not None}
        heads, layers = self.settings.num_key_value_heads, {}
        for layer, memory in self.layers.items():
            parts = {name: getattr(memory, name) for name in NAMES}
            for name, own in packing.items():
                if (stored := parts[name].settings()) is not None:
                    raise ValueError(
                        f"{name} must be dense to be packed; layer {layer} has them in {stored['bits']} "
                        "bits. Pack the bank that was encoded"
                    )
                vectors = parts[name].slice(0, len(parts[name]))
                means = self.means.get((layer, name)) if own.centered else None
                if own.centered and means is None:
                    coder = RowCoder.fit(vectors, heads, own)
                else:
                    coder = RowCoder(own, heads, self.settings.head_dim, means)
                parts[name] = PackedRows.code(vectors, coder)
            layers[layer] = LayerMemory(**parts)
        bank = replace(self, layers=layers)
        bank._lexical = self._lexical
        return bank

    def to(self, device: torch.device | str) -> "MemoryBank":
        """Moves the vectors to `device`, in place."""
        for memory in self.layers.values():
            memory.keys, memory.values = memory.keys.to(device), memory.values.to(device)
            memory.router_keys = memory.router_keys.to(device)
        self.head = {
            layer: (keys.to(device), values.to(device)) for layer, (keys, values) in self.head.items()
        }
        return self

    def stats(self) -> dict:
        """Counts and bytes, from the tensors held."""
        router_bytes = sum(memory.router_keys.nbytes for memory in self.layers.values())
        total = sum(memory.nbytes for memory in self.layers.values())
        return {
            "documents": len(self),
            "tokens": self.num_tokens,
            "chunks": int(self.chunk_counts.sum()),
            "router_chunks": int(self.router_chunk_counts.sum()),
            "router_layers": list(self.router_layers),
            "chunk_size": self.settings.chunk_size,
            "router_chunk_size": self.settings.router_chunk_size,
            "vector_bytes": total,
            "router_key_bytes": router_bytes,
            "text_bytes": sum(len(text.encode()) for text in self.documents),
            **{f"{name}_bits": self._bits(name) for name in NAMES},
            "vector_bytes_per_token": total / max(1, self.num_tokens),
        }

    def _bits(self, name: str) -> int | None:
        """Bits per number of the codes, None for dense vectors."""
        stored = (getattr(memory, name).settings() for memory in self.layers.values())
        return next((own["bits"] for own in stored if own is not None), None)

    def check_model(self, settings: MemorySettings, fingerprint: dict | None) -> None:
        """Raises MemoryMismatchError, saying what differs, unless a model with these settings made this
        bank."""
        differences = self.settings.differences(settings)
        if self.fingerprint and fingerprint:
            differences += [
                f"{part}: {self.fingerprint.get(part)} != {fingerprint.get(part)}"
                for part in sorted(set(self.fingerprint) | set(fingerprint))
                if self.fingerprint.get(part) != fingerprint.get(part)
            ]
        if differences:
            raise MemoryMismatchError(
                "this memory was made by another model; encode the documents with this one. "
                f"Differences (memory != model): {'; '.join(differences)}"
            )

    def save_pretrained(self, directory: str) -> None:
        """Writes memory.json, documents (JSON lines) and vectors (safetensors); replaces a memory that is
        there.

        The old memory stays readable until the new one is complete.
        """
        tensors, packing = {"token_counts": self.token_counts}, {}
        for layer, memory in self.layers.items():
            for name in NAMES:
                storage, prefix = getattr(memory, name), f"layers.{layer}.{name}"
                tensors.update({f"{prefix}{end}": tensor for end, tensor in storage.tensors().items()})
                if (settings := storage.settings()) is not None:
                    packing[prefix] = settings
        for layer, (keys, values) in self.head.items():
            tensors[f"head.{layer}.keys"], tensors[f"head.{layer}.values"] = keys, values
        for (layer, name), mean in self.means.items():
            if f"layers.{layer}.{name}" not in packing:  # packed vectors have them with their codes
                tensors[f"means.{layer}.{name}"] = mean
        write_memory(
            directory, self.documents, tensors, self.settings, self.fingerprint, self.metadata, packing
        )

    @classmethod
    def from_pretrained(cls, directory: str, model=None, tokenizer=None) -> "MemoryBank":
        """Reads what `save_pretrained` wrote.

        Args:
            model: if given, must be the model that made the memory; the vectors go to its device.
            tokenizer: kept for `generate`, which then needs none.

        Raises:
            MemoryFormatError: damaged, incomplete or of an unknown format version.
            MemoryMismatchError: made by another model.
        """
        documents, tensors, settings, fingerprint, metadata, packed = read_memory(directory)
        layers = {}
        for layer in settings.router_layers:
            prefixes = {name: f"layers.{layer}.{name}" for name in NAMES}
            parts = {
                name: packed[prefix] if prefix in packed else DenseVectors(tensors[prefix])
                for name, prefix in prefixes.items()
            }
            layers[layer] = LayerMemory(**parts)
        heads = sorted(
            int(name.split(".")[1]) for name in tensors if name.startswith("head.") and "keys" in name
        )
        head = {layer: (tensors[f"head.{layer}.keys"], tensors[f"head.{layer}.values"]) for layer in heads}
        means = {
            (layer, name): tensors[f"means.{layer}.{name}"]
            for layer in settings.router_layers
            for name in NAMES
            if f"means.{layer}.{name}" in tensors
        }
        bank = cls(
            documents,
            tensors["token_counts"],
            settings,
            layers,
            head,
            fingerprint,
            metadata,
            tokenizer,
            means,
        )
        if model is not None:
            bank.check_model(model.config.memory_settings, model.fingerprint())
            bank.to(model.device)
        return bank


def packing_of(name: str, bits: int) -> RowPacking:
    """How keys, values or router keys are packed in `bits`; chosen by measurement (BENCHMARKS.md)."""
    return RowPacking(bits, centered=name != "router_keys")


def chunk_counts(token_counts: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """Chunks of each document, the last one possibly shorter."""
    return (token_counts + chunk_size - 1) // chunk_size


def first_rows(counts: torch.Tensor) -> torch.Tensor:
    """[N + 1]: where the rows of each document begin, and where the last ones end."""
    return F.pad(counts.cumsum(0), (1, 0))


def segment_rows(first: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """Rows of `documents`, document after document; `first` from `first_rows`."""
    counts = first[documents + 1] - first[documents]
    shift = first[documents] - first_rows(counts)[:-1]
    return torch.arange(int(counts.sum())) + torch.repeat_interleave(shift, counts)
