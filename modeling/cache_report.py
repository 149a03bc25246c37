"""What a TurboQuantCache holds, in bytes, measured from its tensors.

Axis letters: B batch, G key/value heads, T tokens, P packed tokens, D head dim.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from .layer_turboquant import PackedHeads, TurboQuantLayer

_HELD = (
    "key_codes",
    "value_codes",
    "key_scales",
    "value_scales",
    "means",
    "exact",
    "window",
    "native",
    "transforms",
    "other",
    "reserved",
)


@dataclass(frozen=True)
class CacheReport:
    """Bytes of a TurboQuantCache by what they are for; `str()` prints a table.

    Args:
        tokens, batch: what the cache holds. packed_tokens: how many tokens of each row are codes.
        key_codes, value_codes, key_scales, value_scales: of the packed tokens.
        means: what was taken from the keys, by group of tokens.
        exact: attention sinks and extreme tokens in model precision. window: the recent tokens, likewise.
        native: layers that Transformers stores (sliding windows, dense layers, linear attention).
        transforms: rotations and what a calibration fitted, each counted once however many layers share it.
        other: typical lengths, orders of channels, starts of rows.
        reserved: room for further tokens, and what a slice of a larger tensor keeps alive.
        total: every byte that the cache keeps alive; the sum of the above.
        dense: what the same tokens would take in bfloat16.
        key_elements, value_elements: numbers in the packed tokens.
        packed_vectors: B * G * P over all packed layers, for bytes per token and head.
    """

    tokens: int
    batch: int
    packed_tokens: int
    key_codes: int
    value_codes: int
    key_scales: int
    value_scales: int
    means: int
    exact: int
    window: int
    native: int
    transforms: int
    other: int
    reserved: int
    total: int
    dense: int
    key_elements: int
    value_elements: int
    packed_vectors: int

    @property
    def key_bits(self) -> float:
        """Bits per number of a packed key: codes, scales and means."""
        return _ratio(8 * (self.key_codes + self.key_scales + self.means), self.key_elements)

    @property
    def value_bits(self) -> float:
        """Bits per number of a packed value: codes and scales."""
        return _ratio(8 * (self.value_codes + self.value_scales), self.value_elements)

    @property
    def bits(self) -> float:
        """Bits per number of packed keys and values: what one more token costs once the window is full."""
        return _ratio(8 * self._packed, self.key_elements + self.value_elements)

    @property
    def bytes_per_token_and_head(self) -> float:
        """Bytes that key and value of one packed token take in one head."""
        return _ratio(self._packed, self.packed_vectors)

    @property
    def compression(self) -> float:
        """How many times smaller than in bfloat16 everything held is."""
        return _ratio(self.dense, self.total)

    @property
    def marginal_compression(self) -> float:
        """How many times smaller than in bfloat16 a packed token is."""
        return _ratio(16, self.bits)

    @property
    def _packed(self) -> int:
        return self.key_codes + self.value_codes + self.key_scales + self.value_scales + self.means

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: every field and every ratio."""
        ratios = (
            "key_bits",
            "value_bits",
            "bits",
            "bytes_per_token_and_head",
            "compression",
            "marginal_compression",
        )
        return asdict(self) | {name: getattr(self, name) for name in ratios}

    def __str__(self) -> str:
        rows = f"{self.batch} row" + ("s" if self.batch != 1 else "")
        lines = [f"{rows} of {self.tokens:,} tokens, {self.packed_tokens:,} of them packed", ""]
        for name in (*_HELD, "total", "dense"):
            size = getattr(self, name)
            label = {"dense": "in bfloat16"}.get(name, name.replace("_", " "))
            lines.append(f"{label:<14}{size:>18,} bytes {_ratio(100 * size, self.total):>8.1f} %")
        lines += [
            "",
            f"{self.compression:.2f} times smaller than bfloat16; packed tokens "
            f"{self.marginal_compression:.2f} times",
            f"bits per number: keys {self.key_bits:.3f}, values {self.value_bits:.3f}, both {self.bits:.3f}",
        ]
        return "\n".join(lines)


def report_cache(cache: Any) -> CacheReport:
    """Measures a TurboQuantCache; see `CacheReport`."""
    held = _Held()
    counts = dict.fromkeys(("key_elements", "value_elements", "packed_vectors", "dense"), 0)
    for layer in cache.layers:
        if isinstance(layer, TurboQuantLayer):
            _packed_layer(layer, held, counts)
        else:
            for tensor in reachable_tensors(layer):
                held.add("native", tensor)
                if tensor.is_floating_point():
                    counts["dense"] += 2 * tensor.numel()
    for layer in cache.packed_layers:
        for tensor in reachable_tensors(layer.transforms):
            held.add("transforms", tensor)
    for tensor in reachable_tensors(cache):
        held.add("other", tensor)
    packed = cache.packed_layers
    return CacheReport(
        tokens=token_count(cache.layers),
        batch=batch_size(cache.layers),
        packed_tokens=max((layer.packed_length for layer in packed), default=0),
        **held.bytes,
        reserved=held.total - sum(held.bytes.values()),
        total=held.total,
        **counts,
    )


def token_count(layers: list) -> int:
    """Tokens of the longest layer; layers without keys and values have no length."""
    return max((layer.get_seq_length() for layer in layers if hasattr(layer, "get_seq_length")), default=0)


def batch_size(layers: list) -> int:
    """Rows of the first layer that holds keys; 0 before any came."""
    for layer in layers:
        keys = layer.recent.keys if isinstance(layer, TurboQuantLayer) else getattr(layer, "keys", None)
        if keys is not None:
            return keys.shape[0]
    return 0


def reachable_tensors(root: Any) -> list[torch.Tensor]:
    """Every tensor in the attributes and items of an object, and of what they hold, each once."""
    found, seen, waiting = [], set(), [root]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, type):
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting += value
        else:
            waiting += getattr(value, "__dict__", {}).values()
    return found


class _Held:
    """Bytes by what they are for. A tensor counts once; storage beyond its tensors is reserve."""

    def __init__(self):
        self.bytes = dict.fromkeys((name for name in _HELD if name != "reserved"), 0)
        self._tensors: set[int] = set()
        self._storages: dict[tuple[torch.device, int], int] = {}

    def add(self, name: str, tensor: torch.Tensor | None, live: int | None = None) -> None:
        """Counts a tensor of which `live` bytes are in use, all of it by default."""
        if tensor is None or id(tensor) in self._tensors:
            return
        self._tensors.add(id(tensor))
        storage = tensor.untyped_storage()
        place = (tensor.device, storage.data_ptr())
        if place in self._storages and storage.nbytes():
            return
        self._storages[place] = storage.nbytes()
        self.bytes[name] += tensor.nbytes if live is None else live

    @property
    def total(self) -> int:
        return sum(self._storages.values())


def _packed_layer(layer: TurboQuantLayer, held: _Held, counts: dict[str, int]) -> None:
    if layer.recent.keys is None:
        return
    keys, values = layer.recent.view()
    held.add("window", layer.recent.keys, keys.nbytes)
    held.add("window", layer.recent.values, values.nbytes)
    _growing(held, "means", layer.means)
    for tensor in () if layer.exact is None else layer.exact.tensors():
        held.add("exact", tensor)
    for kind, parts in (("key", layer.packed_keys), ("value", layer.packed_values)):
        for part in parts:
            _growing(held, f"{kind}_codes", part.codes)
            _growing(held, f"{kind}_scales", part.scales)
            _transform(held, part)
    batch, heads, _, dim = keys.shape
    vectors = batch * heads * layer.packed_length
    counts["packed_vectors"] += vectors
    counts["key_elements"] += vectors * dim
    counts["value_elements"] += vectors * values.shape[3]
    counts["dense"] += 2 * batch * heads * layer.get_seq_length() * (dim + values.shape[3])


def _growing(held: _Held, name: str, growing) -> None:
    if growing.buffer is not None:
        held.add(name, growing.buffer, growing.view().nbytes)


def _transform(held: _Held, part: PackedHeads) -> None:
    for tensor in reachable_tensors([part.coding.transform, part.coding.quantizer]):
        held.add("transforms", tensor)


def _ratio(above: float, below: float) -> float:
    return above / below if below else 0.0
