"""How a TurboQuantCache lies on disk: cache.json and cache-*.safetensors.

cache.json names the other file with its size and SHA-256 and is replaced last, in one step, so a directory
always holds one whole cache: the old one until the new one is complete.
"""

import hashlib
import json
import re
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.cache_utils import get_layer_types_and_kwargs

from .cache_report import batch_size, token_count
from .cache_settings import CacheSettings
from .cache_state import Tensors, coded_parts, layer_state, restore_layer
from .entropy_coding import decode_stream, encode_streams
from .errors import MemoryFormatError, MemoryMismatchError
from .fingerprint_msa import hash_decoder
from .fitted_transforms import FittedTransforms
from .memory_files import (
    check_file_name,
    check_size,
    file_sha256,
    read_format,
    replace_json,
    write_tensors,
)

FORMAT = "msa_hf cache"
FORMAT_VERSION = 1
INDEX = "cache.json"
# What a cache of one model shares with every model that may read it.
_ARCHITECTURE = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rope_parameters",
)
_BROKEN = (AttributeError, IndexError, KeyError, TypeError, ValueError)  # what wrong JSON leads to
_OURS = re.compile(r"cache-[0-9a-f]{12}\.safetensors|\.cache\.json-[0-9a-f]{12}")


@dataclass(frozen=True)
class SavedCache:
    """What a cache takes on disk, in bytes; without entropy coding it would take `bytes_uncoded`."""

    bytes: int
    bytes_uncoded: int

    @property
    def bytes_saved(self) -> int:
        return self.bytes_uncoded - self.bytes


@dataclass(frozen=True)
class StoredCache:
    """A saved cache as it was read: what makes an empty cache, and what fills its layers."""

    settings: CacheSettings
    transforms: FittedTransforms | None
    left_padding: list[int] | None
    layers: list[tuple[dict[str, Any], Tensors]]

    def fill(self, layers: list, device: torch.device) -> None:
        """Gives the layers of an empty cache what was saved. Raises MemoryFormatError if they differ."""
        if len(layers) != len(self.layers):
            raise MemoryFormatError(f"a cache of {len(layers)} layers cannot hold {len(self.layers)}")
        for index, (layer, (numbers, tensors)) in enumerate(zip(layers, self.layers)):
            try:
                restore_layer(layer, numbers, tensors, device)
            except (*_BROKEN, RuntimeError) as error:
                raise MemoryFormatError(f"layer {index} of the cache cannot be read: {error}") from error


def architecture(config: Any) -> dict[str, Any]:
    """The fields of a configuration that decide what keys and values mean, as plain JSON."""
    decoder = config.get_text_config(decoder=True)
    kinds, arguments = get_layer_types_and_kwargs(decoder)
    found = {name: getattr(decoder, name, None) for name in _ARCHITECTURE}
    found["layer_types"] = list(kinds)
    found["sliding_windows"] = [kwargs.get("sliding_window") for kwargs in arguments]
    return json.loads(json.dumps(found, default=str))


def weights_of(model: Any) -> dict[str, str]:
    """Which weights a model computes keys and values with, and in which floating-point type."""
    return {"weights": hash_decoder(model), "dtype": str(model.dtype).removeprefix("torch.")}


def write_cache(
    directory: str | Path,
    layers: list,
    settings: CacheSettings,
    transforms: FittedTransforms | None,
    architecture: dict[str, Any],
    left_padding: list[int] | None,
    weights: dict[str, str] | None,
    entropy_coding: bool,
) -> SavedCache:
    """Writes a whole cache to `directory`; see `TurboQuantCache.save_pretrained`."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # an offloaded layer may be on its way
    states, tensors, parts = [], {}, {}
    for index, layer in enumerate(layers):
        numbers, own = layer_state(layer)
        states.append(numbers)
        tensors |= {f"layers.{index}.{name}": tensor for name, tensor in own.items()}
        parts |= {f"layers.{index}.{name}": part for name, part in coded_parts(layer).items()}
    matrices = {} if transforms is None else transforms.matrices
    tensors |= {f"transforms.{name}": matrix for name, matrix in matrices.items()}
    tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    uncoded = sum(tensor.nbytes for tensor in tensors.values())
    coded = _encode(tensors, parts) if entropy_coding else {}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    stamp = uuid.uuid4().hex[:12]
    path = directory / f"cache-{stamp}.safetensors"
    try:
        write_tensors(path, tensors)
        index = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "transformers": transformers.__version__,
            "settings": settings.to_dict(),
            "architecture": architecture,
            "weights": weights,
            "left_padding": left_padding,
            "tokens": token_count(layers),
            "batch": batch_size(layers),
            "layers": states,
            "coded": coded,
            "file": {"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)},
        }
        replace_json(directory / INDEX, index | {"sha256": _digest(index)}, stamp)
    finally:
        _remove_stale(directory)
    written = path.stat().st_size + (directory / INDEX).stat().st_size
    extra = sum(tensor.nbytes for tensor in tensors.values()) - uncoded
    return SavedCache(written, written - extra - (len(json.dumps(coded, indent=1)) if coded else 0))


def _remove_stale(directory: Path) -> None:
    """Removes what earlier saves, or one that failed, have left behind: all that cache.json does not name."""
    kept = None
    if (directory / INDEX).is_file():
        try:
            kept = json.loads((directory / INDEX).read_text(encoding="utf-8"))["file"]["name"]
        except (*_BROKEN, RecursionError):
            return
    for path in directory.iterdir():
        if _OURS.fullmatch(path.name) and path.name != kept:
            path.unlink(missing_ok=True)


def read_cache(directory: str | Path, config: Any, model: Any = None) -> StoredCache:
    """What `write_cache` wrote, checked against a model's configuration and, if given, its weights.

    Raises:
        FileNotFoundError: there is no cache. MemoryFormatError: it is damaged or of another format version.
        MemoryMismatchError: it was made by another model; the message says what differs.
        ImportError: its codes are entropy coded and constriction is not installed.
    """
    directory = Path(directory)
    if not (directory / INDEX).is_file():
        raise FileNotFoundError(f"no cache in {directory}: {INDEX} is missing")
    own, weights = architecture(config), None if model is None else weights_of(model)
    try:
        index = _read_index(directory / INDEX)
        check_same_model(f"the cache in {directory}", index["architecture"], own)
        if weights is not None and index["weights"] is not None:
            check_same_model(f"the cache in {directory}", index["weights"], weights)
        path = directory / check_file_name(index["file"]["name"], INDEX)
        check_size(path, index["file"]["bytes"])
        if file_sha256(path) != index["file"]["sha256"]:
            raise MemoryFormatError(f"{path} is damaged: its SHA-256 differs from {INDEX}")
        settings = CacheSettings.from_dict(index["settings"])
        tensors = load_file(path)
        _decode(tensors, index["coded"])
        names = [name for name in tensors if name.startswith("transforms.")]
        matrices = {name.removeprefix("transforms."): tensors.pop(name) for name in names}
        layers = [(numbers, {}) for numbers in index["layers"]]
        for name, tensor in tensors.items():
            number, _, own = name.removeprefix("layers.").partition(".")
            layers[int(number)][1][own] = tensor
    except (MemoryFormatError, MemoryMismatchError):
        raise
    except (*_BROKEN, SafetensorError, RecursionError) as error:
        raise MemoryFormatError(
            f"the cache in {directory} is damaged: {error!r}. Prefill it again."
        ) from error
    transforms = FittedTransforms(matrices) if matrices else None
    return StoredCache(settings, transforms, index["left_padding"], layers)


def check_same_model(cache: str, stored: dict[str, Any], own: dict[str, Any]) -> None:
    """Raises MemoryMismatchError naming every field in which a cache differs from a model."""
    if differing := differing_fields(stored, own):
        raise MemoryMismatchError(
            f"{cache} was made by another model: {'; '.join(differing)}. Load it with the model that made "
            "it, adapter and dtype included, or prefill it again with this one."
        )


def differing_fields(stored: dict[str, Any], own: dict[str, Any]) -> list[str]:
    """What differs between the description of a model in a file and that of the model at hand."""
    return [
        f"{name} is {stored.get(name)!r} there and {own.get(name)!r} in this model"
        for name in sorted(set(stored) | set(own))
        if stored.get(name) != own.get(name)
    ]


def _read_index(path: Path) -> dict[str, Any]:
    index = read_format(path, FORMAT, FORMAT_VERSION)
    if index.pop("sha256", None) != _digest(index):
        raise MemoryFormatError(f"{path} is damaged: its own SHA-256 differs")
    return index


def _digest(index: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _encode(tensors: Tensors, parts: dict[str, tuple[tuple[int, int], ...]]) -> dict[str, Any]:
    """Replaces codes and scales by their coded form where that is shorter; returns what reads them."""
    raw = {name: tensors[name].contiguous().cpu() for name in parts}
    streams = {name: (tensor.view(torch.uint8), parts[name]) for name, tensor in raw.items()}
    coded, tables = encode_streams(streams)
    tensors |= {f"tables.{bits}": table for bits, table in tables.items()}
    found = {}
    for name, stream in coded.items():
        tensors[name] = stream
        found[name] = {
            "shape": list(streams[name][0].shape),
            "dtype": str(raw[name].dtype).removeprefix("torch."),
            "parts": parts[name],
            "sha256": _tensor_sha256(streams[name][0]),
        }
    return found


def _decode(tensors: Tensors, coded: dict[str, Any]) -> None:
    """Undoes `_encode`."""
    names = [name for name in tensors if name.startswith("tables.")]
    tables = {int(name.removeprefix("tables.")): tensors.pop(name) for name in names}
    for name, how in coded.items():
        decoded = decode_stream(tensors[name], tables, tuple(how["shape"]), how["parts"])
        if _tensor_sha256(decoded) != how["sha256"]:
            raise MemoryFormatError(
                f"{name} was decoded to other bytes than were coded: this release of constriction does not "
                "read what another one wrote (0.5.0 is known to work)"
            )
        tensors[name] = decoded.view(getattr(torch, how["dtype"]))


def _tensor_sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy()).hexdigest()[:16]
