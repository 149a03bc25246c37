"""How the vectors of a store are coded: provenance, the coder of every vector, and the tiers of the budget.

Axis letters: G key/value heads, D head dim, W = G * D.
"""

from dataclasses import asdict, dataclass, fields

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ..modeling.configuration_msa import MemorySettings
from ..modeling.errors import MemoryFormatError
from ..modeling.memory_bank import DenseVectors, LayerMemory, MemoryBank, packing_of
from ..modeling.memory_files import NAMES
from ..modeling.packed_vectors import DTYPES, PackedRows, RowCoder
from .vectors import Storage

# Tiers of the relevance budget: as the store was made, in fewer bits, and with router keys alone.
FULL, LOW, TEXT = 0, 1, 2
TIERS = (FULL, LOW, TEXT)
_FEWER = {None: 4, 4: 2, 3: 2, 2: 1, 1: 1}

Key = tuple[int, str]  # a router layer and one of NAMES


@dataclass(frozen=True)
class Provenance:
    """What the vectors of a store depend on; two stores with equal provenance have equal bytes.

    Args:
        settings: of the model's memory. fingerprint: of its weights. tokenizer: digest of the tokenizer.
        dtype: of vectors when they are read, the model's. key_bits, value_bits, router_bits: None is dense.
    """

    settings: MemorySettings
    fingerprint: dict[str, str]
    tokenizer: str
    dtype: str
    key_bits: int | None
    value_bits: int | None
    router_bits: int | None

    @property
    def bits(self) -> dict[str, int | None]:
        return dict(zip(NAMES, (self.key_bits, self.value_bits, self.router_bits)))

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, stored: object) -> "Provenance":
        """What `to_json` gave. Raises MemoryFormatError, naming what is wrong."""
        try:
            names = {field.name for field in fields(cls)}
            if set(stored) != names:
                raise ValueError(f"fields must be {', '.join(sorted(names))}; got {sorted(stored)}")
            settings = dict(stored["settings"])
            settings["router_layers"] = tuple(_integer(layer, 0) for layer in settings["router_layers"])
            for name in ("chunk_size", "router_chunk_size", "num_key_value_heads", "head_dim"):
                _integer(settings[name], 1)
            if settings["chunk_size"] % settings["router_chunk_size"] or settings["head_dim"] % 2:
                raise ValueError("router_chunk_size must divide chunk_size, and head_dim must be even")
            result = cls(**{**stored, "settings": MemorySettings(**settings)})
            if result.dtype not in DTYPES or not isinstance(result.fingerprint, dict):
                raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {result.dtype!r}")
            for name, bits in result.bits.items():
                if bits is not None:
                    packing_of(name, bits)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise MemoryFormatError(f"the provenance of the store is damaged: {error}") from error
        return result

    def differences(self, other: "Provenance") -> list[str]:
        """What differs, as "name: mine != theirs"."""
        found = self.settings.differences(other.settings)
        parts = sorted(set(self.fingerprint) | set(other.fingerprint))
        pairs = [(part, self.fingerprint.get(part), other.fingerprint.get(part)) for part in parts]
        pairs += [(name, getattr(self, name), getattr(other, name)) for name in ("tokenizer", "dtype")]
        pairs += [(f"bits of {name}", bits, other.bits[name]) for name, bits in self.bits.items()]
        return found + [f"{name}: {mine} != {theirs}" for name, mine, theirs in pairs if mine != theirs]


class Coding:
    """The coders of a store, one for every router layer, kind of vector and tier.

    Args:
        means: [G, D] float32 by (layer, "keys" or "values"), see `memory_encoding.typical_means`.
        head: K and V [G, tokens, D] of the template head by layer.
    """

    def __init__(self, provenance: Provenance, means: dict[Key, torch.Tensor], head: dict):
        self.provenance, self.means, self.head = provenance, means, head
        settings = provenance.settings
        self.keys = [(layer, name) for layer in settings.router_layers for name in NAMES]
        self._empty: dict[tuple[Key, int], Storage | None] = {}
        for key in self.keys:
            for tier in TIERS:
                self._empty[key, tier] = self._storage(key, tier)

    def empty(self, key: Key, tier: int) -> Storage | None:
        """A storage without rows, coded as those of the tier; None where the tier keeps no such vectors."""
        return self._empty[key, tier]

    def pack(self, bank: MemoryBank) -> MemoryBank:
        """The bank with the vectors that a store with this coding has for the same documents."""
        bits = self.provenance
        packed = bank.pack(bits.key_bits, bits.value_bits, bits.router_bits)
        for layer, memory in packed.layers.items():
            packed.layers[layer] = LayerMemory(
                *(self.adopt((layer, name), getattr(memory, name)) for name in NAMES)
            )
        return packed

    def adopt(self, key: Key, storage: Storage) -> Storage:
        """The same bytes on the CPU, read by this coding's own coder, so that they join with the store's."""
        own = self.empty(key, FULL)
        if storage.settings() is None:  # a model that was loaded as remote code has classes of its own
            return DenseVectors(storage.data.to("cpu", own.dtype))
        return PackedRows(own.coder, storage.packed.codes.cpu(), storage.packed.scales.cpu(), own.dtype)

    def recode(self, key: Key, storage: Storage, tier: int) -> Storage | None:
        """The vectors as another tier keeps them."""
        own = self.empty(key, tier)
        if own is None:
            return None
        if own.kind == storage.kind:
            return storage
        coded = PackedRows.allocate(len(storage), own.coder, own.dtype)
        for start in range(0, len(storage), own.tile_rows):
            rows = torch.arange(start, min(len(storage), start + own.tile_rows))
            coded.write(rows, storage.slice(start, start + len(rows)))
        return PackedRows(own.coder, coded.packed.codes, coded.packed.scales, own.dtype)

    def to_bytes(self) -> bytes:
        """Means and head as one safetensors file."""
        tensors = {f"means.{layer}.{name}": mean for (layer, name), mean in self.means.items()}
        for layer, (keys, values) in self.head.items():
            tensors |= {f"head.{layer}.keys": keys.contiguous(), f"head.{layer}.values": values.contiguous()}
        return save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})

    @classmethod
    def from_bytes(cls, provenance: Provenance, stored: bytes) -> "Coding":
        """What `to_bytes` gave. Raises MemoryFormatError if it does not fit the provenance."""
        try:
            tensors = load(stored)
            means = {}
            for layer in provenance.settings.router_layers:
                means |= {(layer, name): tensors.pop(f"means.{layer}.{name}") for name in ("keys", "values")}
            layers = sorted({int(name.split(".")[1]) for name in tensors})
            head = {n: (tensors[f"head.{n}.keys"], tensors[f"head.{n}.values"]) for n in layers}
            shape = (provenance.settings.num_key_value_heads, provenance.settings.head_dim)
            for keys, values in head.values():
                if keys.shape != values.shape or (keys.shape[0], keys.shape[2]) != shape:
                    raise ValueError(f"the template head must have {shape} heads and dimensions")
            return cls(provenance, means, head)
        except (
            SafetensorError,
            AttributeError,
            IndexError,
            KeyError,
            TypeError,
            ValueError,
            RuntimeError,
        ) as error:
            raise MemoryFormatError(f"the coders of the store are damaged: {error!r}") from error

    def _storage(self, key: Key, tier: int) -> Storage | None:
        layer, name = key
        settings, bits = self.provenance.settings, self.provenance.bits[name]
        if tier == TEXT:
            return self._empty[key, LOW] if name == "router_keys" else None
        bits = bits if tier == FULL else _FEWER[bits]
        heads, dim, dtype = settings.num_key_value_heads, settings.head_dim, DTYPES[self.provenance.dtype]
        if bits is None:
            return DenseVectors.allocate(0, heads * dim, dtype)
        packing = packing_of(name, bits)
        means = self.means[key] if packing.centered else None
        return PackedRows.allocate(0, RowCoder(packing, heads, dim, means), dtype)


def _integer(value: object, least: int) -> int:
    if type(value) is not int or not least <= value < 1 << 31:
        raise ValueError(f"expected a whole number of at least {least}; got {value!r}")
    return value
