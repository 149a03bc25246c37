"""What a folder, a store or the kernels say about themselves, for their cards."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from .configs import preset, presets, routers_folder
from .conversion import NOTES_FILE
from .modeling.configuration_msa import MSAConfig
from .modeling.errors import MemoryFormatError, MSAError
from .modeling.memory_files import file_sha256
from .modeling.modeling_msa import MSAForCausalLM
from .store.coding import Provenance
from .store.exchange import INDEX as EXPORT_INDEX
from .store.exchange import Export
from .training.adapter import SETTINGS_FILE, WEIGHTS_FILE

if TYPE_CHECKING:
    from .store import MemoryStore

MEASURED = "measured"  # the group of configs with measured results
UNKNOWN_LICENSE = "unknown"
ADAPTER_FILE = "adapter_config.json"
TRAINING_FILE, TRAINING_LOG = "training.json", "training.jsonl"


class CardError(MSAError, ValueError):
    """There is nothing of this kind to write a card for."""


@dataclass(frozen=True)
class Base:
    """The model below.

    Args:
        name: on the Hub; None if nobody noted it. license: identifier, "unknown" if nobody noted it.
        measured: the entry of configs/measured, None where nothing was measured.
    """

    name: str | None
    license: str
    measured: dict[str, Any] | None = None


@dataclass(frozen=True)
class ModelFacts:
    config: MSAConfig
    base: Base
    parameters: int
    dtype: str
    files: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class AdapterFacts:
    """settings: of msa_router.json. training: of training.json, questions: of its log; None without them."""

    settings: dict[str, Any]
    base: Base
    lora_rank: int | None
    training: dict[str, Any] | None
    questions: dict[str, Any] | None


@dataclass(frozen=True)
class MemoryFacts:
    documents: int
    namespaces: dict[str, int]
    text_bytes: int
    vector_bytes: int
    provenance: Provenance
    model: str | None


@dataclass(frozen=True)
class KernelFacts:
    """operators: name to what it computes. digest: of the sources."""

    operators: dict[str, str]
    metadata: dict[str, Any]
    measured: dict[str, Any] | None


def model_facts(folder: str | Path, base_model: str | None = None, license: str | None = None) -> ModelFacts:
    """Raises CardError unless the folder holds a model of ours with weights in safetensors."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if config.get("model_type") != MSAConfig.model_type:
        found = config.get("model_type")
        raise CardError(
            f"{folder} holds a model of type {found!r}, not {MSAConfig.model_type!r}: make one with "
            "msa-hf convert"
        )
    files = weight_files(folder)
    parameters, dtypes = 0, Counter()
    for file in files:
        with _opened(folder / file) as tensors:
            for name in tensors.keys():
                own = tensors.get_slice(name)
                count = torch.Size(own.get_shape()).numel()
                parameters += count
                dtypes[own.get_dtype()] += count
    measured = _measured_model(folder, files)
    base = _base(measured, folder, base_model, license)
    dtype = dtypes.most_common(1)[0][0] if dtypes else "none"
    return ModelFacts(MSAConfig.from_pretrained(folder), base, parameters, dtype, files)


def adapter_facts(
    folder: str | Path, base_model: str | None = None, license: str | None = None
) -> AdapterFacts:
    """Raises CardError unless the folder holds a router adapter."""
    folder = Path(folder)
    for name in (SETTINGS_FILE, WEIGHTS_FILE, ADAPTER_FILE):
        if not (folder / name).is_file():
            raise CardError(f"{folder} is not the folder of a router adapter: {name} is missing")
    settings, peft = read_json(folder / SETTINGS_FILE), read_json(folder / ADAPTER_FILE)
    with _opened(folder / WEIGHTS_FILE) as tensors:
        lora = any("lora_" in name for name in tensors.keys())
    training = folder / TRAINING_FILE
    log = folder / TRAINING_LOG
    questions = None
    if log.is_file():
        with open(log, encoding="utf-8") as file:
            questions = json.loads(file.readline() or "{}")
    known = base_model or hub_name(peft.get("base_model_name_or_path"))
    return AdapterFacts(
        settings,
        _base(_measured_adapter(folder), folder, known, license),
        peft.get("r") if lora else None,
        read_json(training) if training.is_file() else None,
        questions if questions and "questions" in questions else None,
    )


def memory_facts(source: MemoryStore | str | Path, model: str | None = None) -> MemoryFacts:
    """Of a store, or of the folder of an export. Raises CardError where there is neither."""
    if not isinstance(source, (str, Path)):
        stats = source.stats()
        return MemoryFacts(
            stats["documents"],
            stats["namespaces"],
            stats["text_bytes"],
            stats["vector_bytes"],
            source.provenance,
            model or hub_name(source.model_path),
        )
    if not (Path(source) / EXPORT_INDEX).is_file():
        raise CardError(f"{source} is no export of a store: {EXPORT_INDEX} is missing")
    export = Export(source)
    return MemoryFacts(
        len(export.documents),
        dict(Counter(line["namespace"] for line in export.documents)),
        sum(len(line["text"].encode()) for line in export.documents),
        sum(file.bytes for file in export.vectors),
        export.provenance,
        model or hub_name(export.model_path),
    )


def kernel_facts(variant: str | Path) -> KernelFacts:
    """Of the folder that `kernel_export.export_kernels` returned."""
    variant = Path(variant)
    operators = {}
    sources = {
        node.name: ast.get_docstring(node) or ""
        for path in sorted(variant.glob("*.py"))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    for name in _available(variant / "__init__.py"):
        operators[name] = " ".join(sources.get(name, "").split("\n\n")[0].split())
    known = preset(MEASURED, "kernels") if "kernels" in presets(MEASURED) else None
    return KernelFacts(operators, read_json(variant / "metadata.json"), known)


def fingerprint_of(folder: str | Path, files: list[str]) -> dict[str, str]:
    """`MSAForCausalLM.fingerprint` of a saved model; weights are memory-mapped, and hardly read."""
    config = MSAConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = MSAForCausalLM(config)
    tensors = {}
    for file in files:
        tensors |= load_file(Path(folder) / file)
    model.load_state_dict(tensors, strict=False, assign=True)
    return model.fingerprint()


def weight_files(folder: Path) -> list[str]:
    """Names of the model's files of weights. Raises CardError if one is missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(read_json(index)["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    if absent := [name for name in files if not (folder / name).is_file()]:
        raise CardError(f"{folder} lacks {', '.join(absent)}: weights must be complete, and in safetensors")
    return files


def read_json(path: Path) -> dict[str, Any]:
    """Raises CardError unless the file holds a JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise CardError(f"{path} {reason}") from error
    return found


def hub_name(place: object) -> str | None:
    """`place` if it can be a name on the Hub, and is no folder here."""
    if not isinstance(place, str) or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", place):
        return None
    return None if Path(place).exists() else place


def _base(measured: dict[str, Any] | None, folder: Path, base_model: str | None, license: str | None) -> Base:
    """What was said wins; then what was measured; then what the card in the folder says."""
    noted = _noted(folder)
    known = measured or {}
    name = base_model or known.get("base_model") or hub_name(noted.get("base_model"))
    own = license or known.get("license") or noted.get("license")
    return Base(name, own if isinstance(own, str) else UNKNOWN_LICENSE, measured)


def _noted(folder: Path) -> dict[str, Any]:
    """Base and license, as the conversion or the folder's own card names them."""
    if (folder / NOTES_FILE).is_file():
        return read_json(folder / NOTES_FILE)
    card = folder / "README.md"
    if not card.is_file() or not card.read_text(encoding="utf-8").startswith("---"):
        return {}
    try:
        data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (yaml.YAMLError, TypeError, ValueError, OSError) as error:
        raise CardError(f"the metadata at the top of {card} cannot be read: {error}") from error
    return {name: data[name] for name in ("base_model", "license") if isinstance(data.get(name), str)}


def _measured_model(folder: Path, files: list[str]) -> dict[str, Any] | None:
    found = fingerprint_of(folder, files)
    known = [preset(MEASURED, name) for name in presets(MEASURED)]
    return next((own for own in known if own.get("fingerprint") == found), None)


def _measured_adapter(folder: Path) -> dict[str, Any] | None:
    """The entry whose routers have these very weights."""
    digest = file_sha256(folder / WEIGHTS_FILE)
    for name in presets(MEASURED):
        own = preset(MEASURED, name)
        shipped = routers_folder(own["routers"]) / WEIGHTS_FILE if "routers" in own else None
        if shipped is not None and shipped.is_file() and file_sha256(shipped) == digest:
            return own
    return None


def _available(path: Path) -> tuple[str, ...]:
    """The names that the package of kernels says it has, without importing it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "available":
            return ast.literal_eval(node.value)
    return ()


def _opened(path: Path):
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise MemoryFormatError(f"{path} cannot be read as safetensors: {error}") from error
