"""Bytes of every tensor that an object can reach, each storage once: what a cache really holds.

Follows attributes, slots, containers, bound methods, closures and tensor subclasses, and stops at classes and
modules of Python. Only torch is imported (see `cache_protocol`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch

_LEAVES = (str, bytes, int, float, complex, bool, type(None), type, ModuleType, torch.dtype, torch.device)


def held_bytes(root: Any, besides: Iterable[torch.Tensor] = ()) -> int:
    """Bytes of all storages reachable from `root`, without those of the tensors in `besides` (weights)."""
    known = {tensor.untyped_storage().data_ptr() for tensor in besides}
    sizes = {}
    for tensor in reachable_tensors(root):
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in known:
            sizes[(storage.device, storage.data_ptr())] = storage.nbytes()
    return sum(sizes.values())


def reachable_tensors(root: Any) -> Iterator[torch.Tensor]:
    """Every plain tensor that can be reached; views of one storage come one by one."""
    seen: dict[int, Any] = {}  # keeps the objects alive, so that no id is used twice
    waiting = [root]
    while waiting:
        item = waiting.pop()
        if isinstance(item, _LEAVES) or id(item) in seen:
            continue
        seen[id(item)] = item
        if isinstance(item, torch.Tensor) and not hasattr(type(item), "__tensor_flatten__"):
            yield item
        waiting += _parts(item)


def _parts(item: Any) -> Iterator[Any]:
    if isinstance(item, Mapping):
        yield from item.keys()
        yield from item.values()
    elif isinstance(item, (list, tuple, set, frozenset)):
        yield from item
    elif isinstance(item, MethodType):
        yield item.__self__
    elif isinstance(item, FunctionType):
        yield from [cell.cell_contents for cell in item.__closure__ or ()]
    elif isinstance(item, torch.Tensor) and hasattr(type(item), "__tensor_flatten__"):
        yield from [getattr(item, name) for name in item.__tensor_flatten__()[0]]
    yield from list(getattr(item, "__dict__", {}).values())
    for kind in type(item).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(item, name):
                yield getattr(item, name)
