"""How a memory lies on disk: memory.json, documents-*.jsonl and vectors-*.safetensors.

memory.json names the other two with their sizes and is replaced last, in one step, so a directory always
holds one whole memory: the old one until the new one is complete. A memory whose vectors are all dense has
format version 1; one with packed vectors has version 2 and tells in memory.json how each is packed.
"""

import hashlib
import json
import os
import uuid
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .configuration_msa import MemorySettings
from .errors import MemoryFormatError
from .packed_vectors import PackedRows

DENSE_VERSION, PACKED_VERSION = 1, 2
NAMES = ("keys", "values", "router_keys")
INDEX = "memory.json"


def write_memory(
    directory: str | Path,
    documents: list[str],
    tensors: dict[str, torch.Tensor],
    settings: MemorySettings,
    fingerprint: dict | None,
    metadata: dict,
    packing: dict[str, dict] | None = None,
) -> None:
    """Writes a whole memory to `directory`; see `MemoryBank.save_pretrained`.

    `packing` are the settings of the packed vectors by the prefix of their tensors' names.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    stamp = uuid.uuid4().hex[:12]
    names = {"documents": f"documents-{stamp}.jsonl", "vectors": f"vectors-{stamp}.safetensors"}
    with open(directory / names["documents"], "w", encoding="utf-8") as file:
        for text in documents:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        _sync(file)
    write_tensors(directory / names["vectors"], tensors)
    index = {
        "format": "msa_hf memory",
        "format_version": PACKED_VERSION if packing else DENSE_VERSION,
        **({"packing": packing} if packing else {}),
        "settings": asdict(settings),
        "fingerprint": fingerprint,
        "metadata": metadata,
        "files": {
            kind: {"name": name, "bytes": (directory / name).stat().st_size} for kind, name in names.items()
        },
        "documents_sha256": file_sha256(directory / names["documents"]),
    }
    replace_json(directory / INDEX, index, stamp)
    for pattern in ("documents-*.jsonl", "vectors-*.safetensors"):
        for stale in directory.glob(pattern):
            if stale.name not in names.values():
                stale.unlink()


def read_memory(directory: str | Path):
    """(documents, tensors, settings, fingerprint, metadata, storages) of the memory in `directory`.

    `storages` are `PackedRows` by prefix, such as "layers.4.keys", for what is packed.

    Raises:
        FileNotFoundError: there is no memory. MemoryFormatError: it is damaged or of another format version.
    """
    directory = Path(directory)
    if not (directory / INDEX).is_file():
        raise FileNotFoundError(f"no memory in {directory}: {INDEX} is missing")
    try:
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        version = index["format_version"]
        if version not in (DENSE_VERSION, PACKED_VERSION):
            raise MemoryFormatError(
                f"{directory / INDEX}: format_version must be {DENSE_VERSION} or {PACKED_VERSION} for this "
                f"release; got {version!r}"
            )
        paths = {
            kind: directory / check_file_name(index["files"][kind]["name"], INDEX)
            for kind in ("documents", "vectors")
        }
        for kind, path in paths.items():
            check_size(path, index["files"][kind]["bytes"])
        if file_sha256(paths["documents"]) != index["documents_sha256"]:
            raise MemoryFormatError(f"{paths['documents']} is damaged: its SHA-256 differs from {INDEX}")
        settings = _settings(index["settings"])
        with open(paths["documents"], encoding="utf-8") as file:
            documents = [json.loads(line)["text"] for line in file]
        tensors = load_file(paths["vectors"])
        packing = index["packing"] if version == PACKED_VERSION else {}
        storages = _checked_storages(tensors, settings, len(documents), packing)
    except MemoryFormatError:
        raise
    except (KeyError, TypeError, ValueError, SafetensorError, RecursionError) as error:
        raise MemoryFormatError(
            f"the memory in {directory} is damaged: {error!r}. Encode its documents again."
        ) from error
    return documents, tensors, settings, index["fingerprint"], index["metadata"], storages


def _settings(stored: dict) -> MemorySettings:
    stored = {name: stored[name] for name in (field.name for field in fields(MemorySettings))}
    return MemorySettings(
        **{**stored, "router_layers": tuple(int(layer) for layer in stored["router_layers"])}
    )


def _checked_storages(
    tensors: dict, settings: MemorySettings, documents: int, packing: dict[str, dict]
) -> dict[str, PackedRows]:
    """The packed storages. Shapes must follow from the token counts, or a swapped file would give garbage."""
    counts = tensors["token_counts"]
    if counts.dtype != torch.int64 or counts.shape != (documents,) or (counts < 0).any():
        raise MemoryFormatError(
            f"token_counts must be {documents} non-negative int64; got {counts.dtype} {counts.shape}"
        )
    known = {f"layers.{layer}.{name}" for layer in settings.router_layers for name in NAMES}
    if not isinstance(packing, dict) or not set(packing) <= known:
        raise MemoryFormatError(f"packing must name vectors of this memory; got {packing!r}")
    heads, storages = (settings.num_key_value_heads, settings.head_dim), {}
    for prefix in sorted(known):
        chunk = settings.router_chunk_size if prefix.endswith(".router_keys") else settings.chunk_size
        rows = int(((counts + chunk - 1) // chunk).sum())
        if prefix in packing:
            storages[prefix] = PackedRows.from_tensors(packing[prefix], tensors, prefix, (rows, *heads))
            continue
        shape, expected = tuple(tensors[prefix].shape), (rows, heads[0] * heads[1])
        if shape != expected:
            raise MemoryFormatError(f"{prefix} must have shape {expected}; got {shape}")
    return storages


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes a safetensors file and waits until it is on the disk."""
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def replace_json(path: Path, data: dict, stamp: str) -> None:
    """Replaces a JSON file in one step; `stamp` makes the name of the file that is written first."""
    temporary = path.with_name(f".{path.name}-{stamp}")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(
            data, file, indent=1, default=list
        )  # a store's bank reads its notes when they are asked for
        _sync(file)
    os.replace(temporary, path)


def read_format(path: Path, name: str, version: int) -> dict:
    """The JSON object in a file that says which format and format_version it has.

    Raises MemoryFormatError if these are not `name` and `version`.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or data.get("format") != name:
        raise MemoryFormatError(f"{path} is not a file of the format {name!r}")
    if data["format_version"] != version:
        raise MemoryFormatError(
            f"{path}: format_version must be {version} for this release; got {data['format_version']!r}"
        )
    return data


def check_file_name(name: str, index: str) -> str:
    """The name, if it leads out of no directory; `index` is the file that gave it."""
    if not isinstance(name, str) or Path(name).name != name:
        raise MemoryFormatError(f"files in {index} must be plain file names; got {name!r}")
    return name


def check_size(path: Path, expected: int) -> None:
    """Raises MemoryFormatError if the file does not have the expected number of bytes."""
    size = path.stat().st_size if path.is_file() else None
    if size != expected:
        raise MemoryFormatError(
            f"{path} must have {expected} bytes; got {size}: the file is missing or cut off"
        )


def file_sha256(path: Path) -> str:
    """Hex digest of a file of any size."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())
