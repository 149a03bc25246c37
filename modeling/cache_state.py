"""A cache layer as named tensors and plain numbers, and back: what `cache_files` writes.

Only what a layer holds is taken, never the room that it keeps for further tokens. Axis letters: B batch, G
key/value heads, P packed tokens, D head dim.
"""

from typing import Any

import torch

from .errors import MemoryFormatError
from .growing_tensor import GrowingTensor
from .layer_turboquant import PackedHeads, TurboQuantLayer
from .packed_states import ExactTokens

_GROWING = ("codes", "scales")  # of PackedHeads
_OPTIONAL = ("order", "gain")  # tensors of PackedHeads that may be None
_LAYER = ("norms", "starts")  # tensors of a TurboQuantLayer that may be None
_EXACT = ("keys", "values", "positions", "scores")
# What layers of Transformers set when their first states arrive.
_LATE = {"dtype", "device", "indexer_dtype", "indexer_device"}

Tensors = dict[str, torch.Tensor]


def layer_state(layer: Any) -> tuple[dict[str, Any], Tensors]:
    """(numbers for JSON, tensors) of one layer.

    Raises:
        ValueError: the layer holds something that is neither, so this kind of layer cannot be saved.
    """
    if isinstance(layer, TurboQuantLayer):
        return {"kind": type(layer).__name__, "packed_length": layer.packed_length}, _packed_tensors(layer)
    tensors: Tensors = {}
    attributes = {name: _plain(value, name, tensors, layer) for name, value in vars(layer).items()}
    return {"kind": type(layer).__name__, "attributes": attributes}, tensors


def restore_layer(layer: Any, numbers: dict[str, Any], tensors: Tensors, device: torch.device) -> None:
    """Gives an empty layer what `layer_state` took from another one; empties `tensors` on the way.

    Raises:
        MemoryFormatError: kind, tensors or shapes are not those of such a layer.
    """
    if numbers["kind"] != type(layer).__name__:
        raise MemoryFormatError(f"a layer must be a {type(layer).__name__}; got {numbers['kind']!r}")
    if isinstance(layer, TurboQuantLayer):
        _restore_packed(layer, numbers["packed_length"], tensors, device)
    else:
        known = set(vars(layer)) | _LATE
        for name, value in numbers["attributes"].items():
            if name not in known:
                raise MemoryFormatError(
                    f"{numbers['kind']} has no attribute {name!r} in this release of Transformers"
                )
            setattr(layer, name, _value(value, name, tensors, device))
    if tensors:
        raise MemoryFormatError(f"a {numbers['kind']} has no {', '.join(sorted(tensors))}")


def coded_parts(layer: Any) -> dict[str, tuple[tuple[int, int], ...]]:
    """How the bytes of a layer's codes and scales divide into symbols: {tensor: ((symbols, bits), ...)}."""
    if not isinstance(layer, TurboQuantLayer):
        return {}
    parts = {}
    for name, part in _named_parts(layer):
        quantizer, codes, scales = part.coding.quantizer, part.codes.buffer, part.scales.buffer
        if codes is not None:
            plain = type(quantizer).__name__ == "VectorQuantizer"
            parts[f"{name}.codes"] = quantizer.parts if plain else ((codes.shape[-1], 8),)
            parts[f"{name}.scales"] = ((scales.shape[-1] * scales.element_size(), 8),)
    return parts


def _named_parts(layer: TurboQuantLayer) -> list[tuple[str, PackedHeads]]:
    return [
        (f"{kind}.{number}", part)
        for kind, parts in (("keys", layer.packed_keys), ("values", layer.packed_values))
        for number, part in enumerate(parts)
    ]


def _packed_tensors(layer: TurboQuantLayer) -> Tensors:
    if layer.recent.keys is None:
        return {}
    keys, values = layer.recent.view()
    found = {"recent.keys": keys, "recent.values": values, "means": _rows(layer.means)}
    found |= {name: getattr(layer, name) for name in _LAYER}
    if layer.exact is not None:
        found |= {f"exact.{name}": getattr(layer.exact, name) for name in _EXACT}
    for name, part in _named_parts(layer):
        found |= {f"{name}.{field}": _rows(getattr(part, field)) for field in _GROWING}
        found |= {f"{name}.{field}": getattr(part, field) for field in _OPTIONAL}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _rows(growing: GrowingTensor) -> torch.Tensor | None:
    return None if growing.buffer is None else growing.view()


def _restore_packed(layer: TurboQuantLayer, packed: int, tensors: Tensors, device: torch.device) -> None:
    if not tensors and packed == 0:
        return
    take = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
    tensors.clear()
    keys, values = take.pop("recent.keys"), take.pop("recent.values")
    # The rows may have been widened or selected since the padding was given: their starts are saved.
    padding, layer.left_padding = layer.left_padding, None
    layer.lazy_initialization(keys, values)
    layer.left_padding = padding
    layer.packed_length = packed
    layer.recent.append(keys, values, layer.room(packed + keys.shape[2]))
    for name in _LAYER:
        setattr(layer, name, take.pop(name, None))
    if "exact.keys" in take:
        layer.exact = ExactTokens(*(take.pop(f"exact.{name}") for name in _EXACT))
    _fill(layer.means, take.pop("means", None))
    for name, part in _named_parts(layer):
        quantizer, leading = part.coding.quantizer, (keys.shape[0], len(part.coding.heads), packed)
        for field, size in zip(_GROWING, (quantizer.code_bytes, quantizer.scale_count)):
            rows = take.pop(f"{name}.{field}", None)
            shape, needed = None if rows is None else tuple(rows.shape), (*leading, size) if packed else None
            if shape != needed:
                raise MemoryFormatError(f"{name}.{field} must have shape {needed}; got {shape}")
            _fill(getattr(part, field), rows)
        for field in _OPTIONAL:
            setattr(part, field, take.pop(f"{name}.{field}", None))
    tensors |= take


def _fill(growing: GrowingTensor, rows: torch.Tensor | None) -> None:
    if rows is not None:
        growing.buffer, growing.length = rows, rows.shape[2]


def _plain(value: Any, name: str, tensors: Tensors, layer: Any) -> Any:
    """A value of a Transformers layer as JSON, its tensors set aside."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": None}
    if isinstance(value, dict) and all(isinstance(key, int) for key in value):
        items = [[key, _plain(item, f"{name}.{key}", tensors, layer)] for key, item in value.items()]
        return {"items": items}
    raise ValueError(
        f"a {type(layer).__name__} cannot be saved, because its {name} is a {type(value).__name__}; nothing "
        "was written"
    )


def _value(plain: Any, name: str, tensors: Tensors, device: torch.device) -> Any:
    """The value that `_plain` was given, with tensors on `device`."""
    if not isinstance(plain, dict):
        return plain
    [(kind, content)] = plain.items()
    if kind == "tensor":
        return tensors.pop(content).to(device, copy=True)
    if kind == "device":
        return device
    if kind == "items":
        return {key: _value(item, f"{name}.{key}", tensors, device) for key, item in content}
    if kind == "dtype" and isinstance(dtype := getattr(torch, content, None), torch.dtype):
        return dtype
    raise MemoryFormatError(f"{name} cannot be read: {plain!r}")
