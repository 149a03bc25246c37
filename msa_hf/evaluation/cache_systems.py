"""The caches of this package as systems that a benchmark can name: presets and plain bit widths."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from msa_hf.evaluation.held_bytes import held_bytes

DENSE = "dense"
ATTENTION = "turboquant"


@dataclass(frozen=True)
class CacheSystem:
    """A named way to make a cache, and the attention that reads it (None: the model's own)."""

    name: str
    make: Callable[[Any], Any]
    attention: str | None = None


def dense_system() -> CacheSystem:
    """DynamicCache, the one that all others are compared with."""
    return CacheSystem(DENSE, lambda config: DynamicCache(config=config))


def cache_systems(names: Sequence[str], **settings: Any) -> list[CacheSystem]:
    """Systems by name: "dense", a preset of TurboQuantCache such as "4bit", widths such as "k4v3".

    A folder is a calibration (`msa-hf calibrate-cache`), a name that ends in ".json" a file of settings.

    Args:
        settings: further arguments of every TurboQuantCache.

    Raises ValueError for another name.
    """
    from msa_hf.modeling.cache_settings import PRESETS, CacheSettings
    from msa_hf.modeling.cache_turboquant import TurboQuantCache
    from msa_hf.modeling.calibration_files import Calibration

    def system(name: str) -> CacheSystem:
        if name == DENSE:
            return dense_system()
        if name in PRESETS:
            return CacheSystem(name, partial(TurboQuantCache, preset=name, **settings), ATTENTION)
        if match := re.fullmatch(r"k([1-4])v([1-4])", name):
            bits = {"key_bits": int(match[1]), "value_bits": int(match[2])}
            return CacheSystem(name, partial(TurboQuantCache, **{**settings, **bits}), ATTENTION)
        if Path(name).is_dir():
            make = partial(TurboQuantCache, preset=Calibration.from_pretrained(name), **settings)
            return CacheSystem(Path(name).name, make, ATTENTION)
        if name.endswith(".json") and Path(name).is_file():
            stored = CacheSettings.from_dict(json.loads(Path(name).read_text(encoding="utf-8")))
            make = partial(TurboQuantCache, preset=stored, **settings)
            return CacheSystem(Path(name).stem, make, ATTENTION)
        known = ", ".join([DENSE, *PRESETS])
        raise ValueError(
            f"a system is one of {known}, bits of keys and values such as k4v3, or a file; got {name!r}"
        )

    return [system(name) for name in names]


class using_attention:
    """Context in which a model reads caches with another attention; its own comes back at the end."""

    def __init__(self, model: Any, attention: str | None):
        self.model, self.attention = model, attention

    def __enter__(self) -> Any:
        self.own = self.model.config._attn_implementation
        if self.attention is not None:
            self.model.set_attn_implementation(self.attention)
        return self.model

    def __exit__(self, *_: object) -> None:
        self.model.set_attn_implementation(self.own)


def settled_bytes(cache: Any, weights: Sequence[torch.Tensor] = ()) -> int:
    """Bytes that a cache holds, without the room for coming tokens that its own report declares.

    Raises RuntimeError if a cache with a report() does not hold what it says.
    """
    counted = held_bytes(cache, weights)
    if not hasattr(cache, "report"):
        return counted
    report = cache.report()
    if report.total != counted:
        raise RuntimeError(f"the cache reports {report.total:,} bytes and holds {counted:,}")
    return counted - report.reserved
